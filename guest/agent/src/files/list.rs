//! Listings: depth first, names in byte order, every directory before its content. No recursion: the depth of a tree is the guest's choice.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use amber_proto::{Entries, ErrorCode, List};

use super::{entry, explain, locate};
use crate::conn::{BlockingConn, Result, failure};
use crate::state::Settings;
use crate::users::Names;

/// Entries per reply. Even entries of the largest size that a file system allows fit into a frame.
const BATCH: usize = 32;

/// Bytes of names that are sorted at once: process 1 must not use up the guest's memory.
const MAX_NAMES: usize = 32 << 20;

/// Bytes of a reply after which it is sent.
const BATCH_BYTES: usize = 128 << 10;

pub(crate) fn list(settings: &Settings, conn: &mut BlockingConn, request: List) -> Result<()> {
    let (_, path) = locate(settings, request.user.as_deref(), &request.path)?;
    let metadata = fs::metadata(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => failure(ErrorCode::NotFound, format!("path not found: {path}")),
        _ => explain("error accessing path", &path, &error),
    })?;
    if !metadata.is_dir() {
        return Err(failure(ErrorCode::InvalidArgument, format!("path is not a directory: {path}")));
    }
    let names = Names::read(&settings.etc);
    // Without slashes that say nothing, so that entries have the path that users expect.
    let tidy: PathBuf = Path::new(&path).components().collect();
    let mut pending =
        vec![Level::open(&tidy).map_err(|error| explain("error reading directory", &path, &error))?];
    let depth = usize::try_from(request.depth.max(1)).unwrap_or(usize::MAX);
    let mut reply = Entries::default();
    let mut size = 0;
    while let Some(level) = pending.last_mut() {
        let Some(path) = level.next() else {
            pending.pop();
            continue;
        };
        // What has vanished since it was listed, or cannot be examined, is left out.
        let Ok(entry) = entry::entry(&path, &names) else { continue };
        let descend = pending.len() < depth && entry.permissions.starts_with('d');
        size += entry_size(&entry);
        reply.entries.push(entry);
        if descend && let Ok(level) = Level::open(&path) {
            pending.push(level);
        }
        if size >= BATCH_BYTES || (size >= BATCH_BYTES / 4 && reply.entries.len() % BATCH == 0) {
            let full = Entries { entries: std::mem::take(&mut reply.entries), more: true };
            conn.reply::<List>(&full)?;
            size = 0;
        }
    }
    conn.reply::<List>(&reply)
}

/// The names in a directory that have not been looked at yet.
struct Level {
    directory: PathBuf,
    names: std::vec::IntoIter<OsString>,
}

impl Level {
    fn open(path: &Path) -> io::Result<Self> {
        let (mut names, mut size) = (Vec::new(), 0);
        for entry in fs::read_dir(path)? {
            let name = entry?.file_name();
            size += name.len() + size_of::<OsString>();
            if size > MAX_NAMES {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            names.push(name);
        }
        names.sort_unstable();
        Ok(Self { directory: path.to_owned(), names: names.into_iter() })
    }

    fn next(&mut self) -> Option<PathBuf> {
        self.names.next().map(|name| self.directory.join(name))
    }
}

/// Roughly the bytes of an encoded entry.
fn entry_size(entry: &amber_proto::EntryInfo) -> usize {
    let metadata: usize = entry.metadata.iter().map(|(key, value)| key.len() + value.len() + 10).sum();
    let target = entry.symlink_target.as_ref().map_or(0, String::len);
    160 + entry.name.len() + entry.path.len() + entry.owner.len() + entry.group.len() + target + metadata
}
