//! Watches a directory, and if wanted everything below it, and tells the host what changes.
//!
//! One inotify instance and one task per watch. The kernel's event queue is the only queue: a host that reads slowly lets it fill up, and when
//! it overflows the watch ends with an error, because events are lost. The meaning of events is that of fsnotify, on which E2B's
//! daemon stands: what appears under a name, moved or new, is *create*; what moves away is *rename* under its old name.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Poll;

use amber_proto::{ChangeKind, ErrorCode, Kind, Watch, WatchEvent, WatchEvents, WatchStarted, encode_cbor};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use crate::conn::{Conn, Failure, Result, failure};
use crate::files::{self, entry_info};
use crate::state::State;
use crate::stream::Stream;
use crate::users::Names;

/// Directories of one watch: what is beyond costs more memory than a watch may.
const MAX_DIRECTORIES: usize = 1 << 16;

/// Events per frame.
const BATCH: usize = 256;

/// Bytes of an event before its name.
const EVENT_HEADER: usize = 16;

/// Types of file systems whose changes are made elsewhere and not seen here: NFS, CIFS, SMB 1 and 2, FUSE.
const NETWORK: [i64; 5] = [0x6969, 0xff53_4d42, 0x517b, 0xfe53_4d42, 0x6573_5546];

/// The watched directories of one watch.
struct Watcher {
    inotify: OwnedFd,
    root: PathBuf,
    recursive: bool,
    /// Path of each directory, relative to the root.
    directories: HashMap<i32, PathBuf>,
    /// What a scan of a new directory has reported while the kernel may have the same in its queue.
    reported: HashSet<PathBuf>,
}

/// A change that has not been told yet.
struct Change {
    path: PathBuf,
    kind: ChangeKind,
}

/// One event of the kernel.
struct Raw<'a> {
    watch: i32,
    flags: u32,
    name: &'a [u8],
}

/// What the events of one read come to.
#[derive(Default)]
struct Digest {
    changes: Vec<Change>,
    /// Trees that were moved here and have to be watched.
    arrived: Vec<PathBuf>,
    /// The watched directory itself is gone.
    over: bool,
}

/// Carries out a watch until the host closes the connection or the directory is gone.
pub(crate) async fn run(state: &Rc<State>, slot: &mut Option<Conn>, request: Watch) -> Result<()> {
    let settings = state.settings();
    let (_, path) = files::locate(&settings, request.user.as_deref(), &request.path)?;
    let mut watcher =
        blocking(move || Watcher::start(&path, request.recursive, request.allow_network_mounts)).await??;
    let stream = Stream::new(watcher.inotify.try_clone().map_err(internal)?).map_err(internal)?;
    let conn = slot.take().ok_or(Failure::Gone)?;
    conn.reply::<Watch>(&WatchStarted {}).await?;
    let outcome = follow(state, &mut watcher, &stream, &conn, || {
        request.include_entry.then(|| Names::read(&settings.etc))
    });
    if let Err(Failure::Remote(error)) = outcome.await {
        conn.refuse(&error).await;
    }
    Ok(())
}

async fn follow(
    state: &State,
    watcher: &mut Watcher,
    stream: &Stream,
    conn: &Conn,
    names: impl Fn() -> Option<Names>,
) -> Result<()> {
    loop {
        let read = std::future::poll_fn(|cx| {
            if conn.poll_closed(cx).is_ready() {
                return Poll::Ready(None);
            }
            stream.poll_read(cx, &mut state.scratch.borrow_mut()).map(Some)
        });
        let Some(count) = read.await else { return Ok(()) };
        let count = count.map_err(internal)?;
        // Nobody else has run since it was read into the buffer that all share.
        let mut digest = watcher.digest(&state.scratch.borrow()[..count])?;
        for tree in std::mem::take(&mut digest.arrived) {
            let mut moved = watcher.detach()?;
            *watcher = blocking(move || moved.add_tree(&tree, None).map(|()| moved)).await??;
        }
        let names = names();
        for changes in digest.changes.chunks(BATCH) {
            let events =
                changes.iter().map(|change| change.describe(&watcher.root, names.as_ref())).collect();
            let frame = encode_cbor(Kind::EVENTS, &WatchEvents { events })
                .map_err(|error| failure(ErrorCode::Internal, error.to_string()))?;
            conn.send(&frame).await?;
        }
        if digest.over {
            return conn.send(&amber_proto::header(Kind::END, 0)).await;
        }
    }
}

/// Runs what may take long outside the event loop.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::Gone)
}

fn internal(error: impl Into<io::Error>) -> Failure {
    failure(ErrorCode::Internal, format!("error watching directory: {}", error.into()))
}

impl Watcher {
    fn start(path: &str, recursive: bool, network: bool) -> Result<Self> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(failure(ErrorCode::InvalidArgument, format!("path '{path}' is not a directory")));
            }
            Err(error) => return Err(files::missing_file(path, &error)),
        }
        let kind = rustix::fs::statfs(path).map_or(0, |disk| disk.f_type);
        if !network && NETWORK.contains(&kind) {
            let message = format!("path '{path}' is on a network file system, whose changes may not be seen");
            return Err(failure(ErrorCode::InvalidArgument, message));
        }
        let inotify =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|error| match error {
                Errno::MFILE => failure(ErrorCode::InvalidArgument, "too many directories are watched"),
                error => internal(error),
            })?;
        let mut watcher = Self {
            inotify,
            root: path.into(),
            recursive,
            directories: HashMap::new(),
            reported: HashSet::new(),
        };
        watcher.add_tree(Path::new(""), None)?;
        Ok(watcher)
    }

    /// The watcher for another thread; what stays behind is replaced by what comes back.
    fn detach(&mut self) -> Result<Self> {
        let inotify = self.inotify.try_clone().map_err(internal)?;
        let empty = Self {
            inotify,
            root: self.root.clone(),
            recursive: self.recursive,
            directories: HashMap::new(),
            reported: HashSet::new(),
        };
        Ok(std::mem::replace(self, empty))
    }

    /// Watches a directory, and those below it. With `changes`, what is in it already is told as new.
    fn add_tree(&mut self, tree: &Path, mut changes: Option<&mut Vec<Change>>) -> Result<()> {
        let mut pending = vec![tree.to_owned()];
        while let Some(relative) = pending.pop() {
            if !self.add(&relative)? || !self.recursive {
                continue;
            }
            let Ok(listing) = fs::read_dir(self.root.join(&relative)) else { continue };
            for entry in listing.flatten() {
                let path = relative.join(entry.file_name());
                if let Some(changes) = changes.as_deref_mut() {
                    self.reported.insert(path.clone());
                    changes.push(Change { path: path.clone(), kind: ChangeKind::Create });
                    if entry.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0) {
                        changes.push(Change { path: path.clone(), kind: ChangeKind::Write });
                    }
                }
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    pending.push(path);
                }
            }
        }
        Ok(())
    }

    /// Watches one directory. `false` if it is not there any more.
    fn add(&mut self, relative: &Path) -> Result<bool> {
        let mut flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ONLYDIR;
        if relative.as_os_str().is_empty() {
            flags |= WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        } else {
            flags |= WatchFlags::DONT_FOLLOW;
        }
        let full = || failure(ErrorCode::InvalidArgument, "too many directories are watched");
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(full());
        }
        match inotify::add_watch(&self.inotify, self.root.join(relative), flags) {
            Ok(watch) => {
                self.directories.insert(watch, relative.to_owned());
                Ok(true)
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS)
                if !relative.as_os_str().is_empty() =>
            {
                Ok(false)
            }
            Err(Errno::NOSPC | Errno::NOMEM) => Err(full()),
            Err(error) => Err(internal(error)),
        }
    }

    /// Stops watching a directory that has moved away, and those below it.
    fn remove_tree(&mut self, tree: &Path) {
        let inotify = self.inotify.as_fd();
        self.directories.retain(|&watch, relative| {
            let below = relative.starts_with(tree);
            if below {
                // It may be gone already.
                let _ = inotify::remove_watch(inotify, watch);
            }
            !below
        });
    }

    fn digest(&mut self, mut bytes: &[u8]) -> Result<Digest> {
        let mut digest = Digest::default();
        while let Some(event) = Raw::take(&mut bytes) {
            self.take(&event, &mut digest)?;
        }
        // The queue was read to its end, or nearly: what a scan saw first has been skipped by now.
        if rustix::io::ioctl_fionread(&self.inotify).unwrap_or(0) == 0 {
            self.reported.clear();
        }
        Ok(digest)
    }

    fn take(&mut self, event: &Raw<'_>, digest: &mut Digest) -> Result<()> {
        if event.flags & libc::IN_Q_OVERFLOW != 0 {
            return Err(failure(
                ErrorCode::Internal,
                "events were lost: the watched directory changes too fast",
            ));
        }
        if event.flags & libc::IN_IGNORED != 0 {
            self.directories.remove(&event.watch);
            return Ok(());
        }
        let Some(directory) = self.directories.get(&event.watch) else { return Ok(()) };
        let root = directory.as_os_str().is_empty();
        if event.name.is_empty() {
            // Other directories are told of by what is above them.
            if root {
                let own = [
                    (libc::IN_ATTRIB, ChangeKind::Chmod),
                    (libc::IN_DELETE_SELF, ChangeKind::Remove),
                    (libc::IN_MOVE_SELF, ChangeKind::Rename),
                ];
                for (flag, kind) in own {
                    if event.flags & flag != 0 {
                        digest.over |= kind != ChangeKind::Chmod;
                        digest.changes.push(Change { path: PathBuf::from("."), kind });
                    }
                }
            }
            return Ok(());
        }
        let path = directory.join(std::ffi::OsStr::from_bytes(event.name));
        let kind = match event.flags {
            flags if flags & (libc::IN_CREATE | libc::IN_MOVED_TO) != 0 => ChangeKind::Create,
            flags if flags & libc::IN_DELETE != 0 => ChangeKind::Remove,
            flags if flags & libc::IN_MOVED_FROM != 0 => ChangeKind::Rename,
            flags if flags & libc::IN_MODIFY != 0 => ChangeKind::Write,
            flags if flags & libc::IN_ATTRIB != 0 => ChangeKind::Chmod,
            _ => return Ok(()),
        };
        if !(self.reported.remove(&path) && event.flags & libc::IN_CREATE != 0) {
            digest.changes.push(Change { path: path.clone(), kind });
        }
        if self.recursive && event.flags & libc::IN_ISDIR != 0 {
            if event.flags & libc::IN_CREATE != 0 {
                self.add_tree(&path, Some(&mut digest.changes))?;
            } else if event.flags & libc::IN_MOVED_TO != 0 {
                digest.arrived.push(path);
            } else if event.flags & libc::IN_MOVED_FROM != 0 {
                self.remove_tree(&path);
            }
        }
        Ok(())
    }
}

impl<'a> Raw<'a> {
    /// The first event of a buffer, which is moved on.
    fn take(bytes: &mut &'a [u8]) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(EVENT_HEADER)?;
        let field = |at: usize| head.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let (name, rest) = rest.split_at_checked(usize::try_from(field(12)?).ok()?)?;
        *bytes = rest;
        // Names are padded with NUL bytes.
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        Some(Self { watch: field(0)?.cast_signed(), flags: field(4)?, name: &name[..end] })
    }
}

impl Change {
    fn describe(&self, root: &Path, names: Option<&Names>) -> WatchEvent {
        let present = matches!(self.kind, ChangeKind::Create | ChangeKind::Write | ChangeKind::Chmod);
        let path = if self.path == Path::new(".") { root.to_owned() } else { root.join(&self.path) };
        let entry = names.filter(|_| present).and_then(|names| entry_info(path, names).ok());
        WatchEvent { name: self.path.to_string_lossy().into_owned(), kind: self.kind, entry }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every change that the kernel has told of by now.
    fn changes(watcher: &mut Watcher) -> Vec<(String, ChangeKind)> {
        let mut all = Vec::new();
        let mut buffer = [0; 64 << 10];
        while let Ok(count) = rustix::io::read(&watcher.inotify, &mut buffer) {
            let digest = watcher.digest(&buffer[..count]).unwrap();
            for tree in &digest.arrived {
                watcher.add_tree(tree, None).unwrap();
            }
            all.extend(
                digest.changes.iter().map(|change| (change.path.to_string_lossy().into_owned(), change.kind)),
            );
        }
        all
    }

    fn has(changes: &[(String, ChangeKind)], name: &str, kind: ChangeKind) -> usize {
        changes.iter().filter(|(path, which)| path == name && *which == kind).count()
    }

    #[test]
    fn tells_what_changes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        let mut watcher = Watcher::start(root.to_str().unwrap(), false, false).unwrap();
        fs::write(root.join("a"), "x").unwrap();
        fs::write(root.join("sub/unseen"), "x").unwrap();
        fs::rename(root.join("a"), root.join("b")).unwrap();
        fs::remove_file(root.join("b")).unwrap();
        let seen = changes(&mut watcher);
        for (name, kind) in [
            ("a", ChangeKind::Create),
            ("a", ChangeKind::Write),
            ("a", ChangeKind::Rename),
            ("b", ChangeKind::Create),
            ("b", ChangeKind::Remove),
        ] {
            assert_eq!(has(&seen, name, kind), 1, "{name} {kind:?} in {seen:?}");
        }
        assert!(seen.iter().all(|(name, _)| !name.contains('/')), "{seen:?}");
    }

    #[test]
    fn follows_new_and_moved_directories() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        let mut watcher = Watcher::start(root.to_str().unwrap(), true, false).unwrap();
        // Made before anybody looks: the kernel tells of the first directory only.
        fs::create_dir_all(root.join("n/e/w")).unwrap();
        fs::write(root.join("n/e/w/early"), "x").unwrap();
        let seen = changes(&mut watcher);
        for name in ["n", "n/e", "n/e/w"] {
            assert_eq!(has(&seen, name, ChangeKind::Create), 1, "{name} in {seen:?}");
        }
        assert_eq!(has(&seen, "n/e/w/early", ChangeKind::Write), 1, "{seen:?}");
        fs::write(root.join("n/e/w/f"), "x").unwrap();
        assert_eq!(has(&changes(&mut watcher), "n/e/w/f", ChangeKind::Write), 1);
        fs::rename(root.join("n"), root.join("m")).unwrap();
        let seen = changes(&mut watcher);
        assert_eq!((has(&seen, "n", ChangeKind::Rename), has(&seen, "m", ChangeKind::Create)), (1, 1));
        fs::write(root.join("m/e/w/f"), "y").unwrap();
        assert_eq!(has(&changes(&mut watcher), "m/e/w/f", ChangeKind::Write), 1);
        // Away from the tree.
        fs::rename(root.join("m"), dir.path().join("outside")).unwrap();
        changes(&mut watcher);
        fs::write(dir.path().join("outside/e/w/f"), "z").unwrap();
        assert_eq!(changes(&mut watcher), []);
        assert_eq!(watcher.directories.len(), 1);
    }

    #[test]
    fn a_directory_that_is_gone_ends_the_watch() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        let mut watcher = Watcher::start(root.to_str().unwrap(), true, false).unwrap();
        fs::remove_dir(&root).unwrap();
        let mut buffer = [0; 4096];
        let count = rustix::io::read(&watcher.inotify, &mut buffer).unwrap();
        assert!(watcher.digest(&buffer[..count]).unwrap().over);
    }

    #[test]
    fn what_cannot_be_watched() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let code = |path: &Path| match Watcher::start(path.to_str().unwrap(), true, false) {
            Err(Failure::Remote(error)) => error.code,
            _ => ErrorCode::Internal,
        };
        assert_eq!(code(&file), ErrorCode::InvalidArgument);
        assert_eq!(code(&dir.path().join("missing")), ErrorCode::NotFound);
    }
}
