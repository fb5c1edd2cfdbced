//! Contents of files, to and from the host.
//!
//! # Writing
//!
//! A write either happens or leaves what was there: the disk may fill up and the host may vanish at any byte. A new file grows in place and is
//! removed again if it cannot be completed. An existing file keeps its inode, as programs that watch it, hold it open or have hard links to
//! it expect, so it is not replaced by a rename: the new content is gathered first (in memory while it is small, then in an unnamed file),
//! then room is reserved, and only then the file is overwritten.
//!
//! What is large goes to the disk directly, past the page cache ([`super::bulk`]).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use amber_proto::{CHUNK, ErrorCode, HEADER_LEN, Kind, Read, ReadStart, Write, header};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::bulk::{self, Bulk};
use super::{ensure_directory, entry, explain, locate, missing_file};
use crate::conn::{BlockingConn, Failure, Result, Sink, failure};
use crate::state::Settings;
use crate::users::{Names, User};

/// Content that is gathered in memory.
const IN_MEMORY: usize = 1 << 20;

/// Sends the content of a file.
pub(crate) fn read(settings: &Settings, conn: &mut BlockingConn, request: Read) -> Result<()> {
    let (_, path) = locate(settings, request.user.as_deref(), &request.path)?;
    let (mut file, metadata) = open_for_reading(&path)?;
    if request.offset > 0 {
        file.seek(io::SeekFrom::Start(request.offset))
            .map_err(|error| explain("error reading file", &path, &error))?;
    }
    let start = ReadStart { size: metadata.len(), modified_ns: entry::modified(&metadata) };
    conn.reply::<Read>(&start)?;
    let wanted = request.length.unwrap_or(u64::MAX);
    if wanted.min(metadata.len().saturating_sub(request.offset)) >= bulk::WORTHWHILE {
        let send = |piece: &[u8]| conn.send_frame(Kind::DATA, piece);
        bulk::read(&file, request.offset, wanted, send, |error| explain("error reading file", &path, error))?;
        return conn.send(&header(Kind::END, 0));
    }
    // The buffer has the size of the file if that is small; files of /proc say 0 and have content.
    let size = usize::try_from(metadata.len()).unwrap_or(CHUNK).clamp(4096, CHUNK - 1) + 1;
    let mut buffer = vec![0; HEADER_LEN + size];
    let mut left = request.length.unwrap_or(u64::MAX);
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(size).min(size);
        let count = match file.read(&mut buffer[HEADER_LEN..HEADER_LEN + wanted]) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(explain("error reading file", &path, &error)),
        };
        buffer[..HEADER_LEN].copy_from_slice(&header(Kind::DATA, count));
        conn.send(&buffer[..HEADER_LEN + count])?;
        left -= count as u64;
    }
    conn.send(&header(Kind::END, 0))
}

/// Opens a regular file. Everything else is refused: reading a FIFO or a device may block for ever, or do things.
fn open_for_reading(path: &str) -> Result<(File, fs::Metadata)> {
    let check = |metadata: &fs::Metadata| match metadata {
        metadata if metadata.is_dir() => {
            Err(failure(ErrorCode::InvalidArgument, format!("path '{path}' is a directory")))
        }
        metadata if !metadata.is_file() => {
            Err(failure(ErrorCode::InvalidArgument, format!("path '{path}' is not a regular file")))
        }
        _ => Ok(()),
    };
    check(&fs::metadata(path).map_err(|error| missing_file(path, &error))?)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file =
        rustix::fs::open(path, flags, Mode::empty()).map_err(|error| missing_file(path, &error.into()))?;
    let file = File::from(file);
    // Again: it may have been replaced in between.
    let metadata = file.metadata().map_err(|error| explain("error reading file", path, &error))?;
    check(&metadata)?;
    Ok((file, metadata))
}

/// Takes the content of a file.
pub(crate) fn write(settings: &Settings, conn: &mut BlockingConn, request: Write) -> Result<()> {
    let (user, path) = locate(settings, request.user.as_deref(), &request.path)?;
    check_metadata(&request.metadata)?;
    if path.ends_with('/') {
        return Err(failure(ErrorCode::InvalidArgument, format!("path is a directory: {path}")));
    }
    if let Some(parent) = Path::new(&path).parent() {
        ensure_directory(parent, &user)?;
    }
    let mut upload = Upload::begin(&path, &user, &request)?;
    conn.receive(&mut upload)?;
    upload.complete()?;
    let entry =
        entry::entry(&path, &Names::read(&settings.etc)).map_err(|error| missing_file(&path, &error))?;
    conn.reply::<Write>(&entry)
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<()> {
    for (key, value) in metadata {
        if key.is_empty()
            || key.contains('\0')
            || entry::PREFIX.len() + key.len() > 255
            || value.len() > 64 << 10
        {
            return Err(failure(
                ErrorCode::InvalidArgument,
                format!("metadata key '{key}' or its value is not valid"),
            ));
        }
    }
    Ok(())
}

/// A file being written. Dropped before it is complete, it leaves what was there.
struct Upload<'a> {
    path: &'a str,
    user: &'a User,
    request: &'a Write,
    file: File,
    /// The content, while it is small.
    gathered: Vec<u8>,
    /// Bytes of `gathered` that are content.
    length: usize,
    /// The content on its way to the disk: in place if the file is new, otherwise in a file without a name.
    bulk: Option<Bulk>,
    /// The new file's path, to be removed unless the file is completed.
    remove: Option<PathBuf>,
}

impl<'a> Upload<'a> {
    fn begin(path: &'a str, user: &'a User, request: &'a Write) -> Result<Self> {
        let fail = |error: io::Error| explain("error opening file", path, &error);
        let fresh = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                return Err(failure(ErrorCode::InvalidArgument, format!("path is a directory: {path}")));
            }
            Ok(metadata) if !metadata.is_file() => {
                return Err(failure(
                    ErrorCode::InvalidArgument,
                    format!("path '{path}' is not a regular file"),
                ));
            }
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(fail(error)),
        };
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mode = Mode::from_raw_mode(0o644);
        let opened = match fresh {
            true => rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, mode),
            false => rustix::fs::open(path, flags, mode),
        };
        let (fd, fresh) = match opened {
            Ok(fd) => (fd, fresh),
            // A link to a file that is not there, or somebody else was faster.
            Err(Errno::EXIST) => (
                rustix::fs::open(path, flags | OFlags::CREATE, mode).map_err(|error| fail(error.into()))?,
                false,
            ),
            Err(error) => return Err(fail(error.into())),
        };
        let upload = Self {
            path,
            user,
            request,
            file: File::from(fd),
            gathered: Vec::new(),
            length: 0,
            bulk: None,
            remove: fresh.then(|| path.into()),
        };
        let room = rustix::fs::fstatvfs(&upload.file)
            .map_or(u64::MAX, |disk| disk.f_bfree.saturating_mul(disk.f_frsize));
        if request.length.is_some_and(|length| length > room) {
            return Err(no_space());
        }
        if fresh {
            upload.dress(true)?;
        }
        Ok(upload)
    }

    /// Whether the file is new.
    fn fresh(&self) -> bool {
        self.remove.is_some()
    }

    /// Turns to the disk when the content becomes large.
    fn bulk(&mut self) -> Result<&mut Bulk> {
        if self.bulk.is_none() {
            let file = if self.fresh() { self.file.try_clone() } else { unnamed_file(Path::new(self.path)) };
            let gathered = std::mem::take(&mut self.gathered);
            let begin = |file| {
                let mut bulk = Bulk::new(file);
                bulk.add(&gathered[..self.length]).map(|()| bulk)
            };
            self.bulk = Some(file.and_then(begin).map_err(|error| self.fail(&error))?);
        }
        self.bulk.as_mut().ok_or(Failure::Gone)
    }

    /// Puts the content in its place.
    fn complete(mut self) -> Result<()> {
        let fresh = self.fresh();
        let length = match self.bulk.as_mut().map(Bulk::finish).transpose() {
            Ok(written) => written.unwrap_or(self.length as u64),
            Err(error) => return Err(self.fail(&error)),
        };
        if !fresh {
            self.reserve(length)?;
            self.dress(false)?;
        }
        let put = || -> io::Result<()> {
            match &self.bulk {
                Some(_) if fresh => return Ok(()),
                Some(bulk) => bulk.copy_to(&self.file)?,
                None => (&self.file).write_all(&self.gathered[..self.length])?,
            }
            if fresh { Ok(()) } else { self.file.set_len(length) }
        };
        put().map_err(|error| self.fail(&error))?;
        self.remove = None;
        Ok(())
    }

    /// Makes sure that the content fits before anything of the old one is overwritten.
    fn reserve(&self, length: u64) -> Result<()> {
        let metadata = self.file.metadata().map_err(|error| self.fail(&error))?;
        if metadata.blocks().saturating_mul(512) >= length || length == 0 {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, length) {
            // File systems that cannot reserve fail later, if at all.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(error) => Err(self.fail(&error.into())),
        }
    }

    /// Sets owner, mode and metadata.
    fn dress(&self, fresh: bool) -> Result<()> {
        let change = || -> io::Result<()> {
            entry::set_attributes(&self.file, &self.request.metadata, fresh)?;
            let metadata = self.file.metadata()?;
            if (metadata.uid(), metadata.gid()) != (self.user.uid, self.user.gid) {
                fchown(&self.file, Some(self.user.uid), Some(self.user.gid))?;
            }
            if let Some(mode) = self.request.mode.map(|mode| mode & 0o7777)
                && metadata.mode() & 0o7777 != mode
            {
                self.file.set_permissions(fs::Permissions::from_mode(mode))?;
            }
            Ok(())
        };
        change().map_err(|error| self.fail(&error))
    }

    fn fail(&self, error: &io::Error) -> Failure {
        explain("error writing file", self.path, error)
    }
}

impl Sink for Upload<'_> {
    fn add(&mut self, data: &[u8]) -> Result<()> {
        if self.bulk.is_none() && self.length + data.len() <= IN_MEMORY {
            self.gathered.truncate(self.length);
            self.gathered.extend_from_slice(data);
            self.length += data.len();
            return Ok(());
        }
        let added = self.bulk()?.add(data);
        added.map_err(|error| self.fail(&error))
    }

    fn space(&mut self, wanted: usize) -> Result<&mut [u8]> {
        if self.bulk.is_none() && self.length + wanted <= IN_MEMORY {
            self.gathered.resize(self.length + wanted, 0);
            return Ok(&mut self.gathered[self.length..]);
        }
        Ok(self.bulk()?.space())
    }

    fn filled(&mut self, count: usize) -> Result<()> {
        match self.bulk.as_mut().map(|bulk| bulk.filled(count)).transpose() {
            Ok(Some(())) => Ok(()),
            Ok(None) => {
                self.length += count;
                Ok(())
            }
            Err(error) => Err(self.fail(&error)),
        }
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if let Some(path) = &self.remove {
            // If somebody else has removed or replaced it, so be it.
            let _ = fs::remove_file(path);
        }
    }
}

fn no_space() -> Failure {
    failure(ErrorCode::NoSpace, "not enough disk space available")
}

/// A file without a name on the file system of `path`; it vanishes with its last descriptor.
fn unnamed_file(path: &Path) -> io::Result<File> {
    let directory = fs::canonicalize(path)?;
    let directory = directory.parent().unwrap_or(Path::new("/"));
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => return Ok(fd.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    // The file system has no unnamed files: a named one loses its name at once.
    let unique = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let name = directory.join(format!(".amberbox-{}-{}", unique.tv_sec, unique.tv_nsec));
    let fd = rustix::fs::open(&name, flags | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR)?;
    fs::remove_file(&name)?;
    Ok(fd.into())
}
