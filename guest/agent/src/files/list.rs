//! Listings: depth first, names in byte order, every directory before its content. No recursion: the depth of a tree is the guest's choice.

use std::fs;
use std::io;

use amber_proto::{Entries, ErrorCode, List};

use super::{entry, explain, locate};
use crate::conn::{BlockingConn, Result, failure};
use crate::state::Settings;
use crate::users::Names;

/// Entries per reply. Even entries of the largest size that a file system allows fit into a frame.
const BATCH: usize = 32;

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
    let mut pending =
        vec![children(&path).map_err(|error| explain("error reading directory", &path, &error))?];
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
        if descend && let Ok(level) = children(&path) {
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

/// Paths in a directory, in order.
fn children(path: &str) -> io::Result<std::vec::IntoIter<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().into_encoded_bytes());
    }
    names.sort_unstable();
    let base = path.trim_end_matches('/');
    let paths: Vec<String> =
        names.iter().map(|name| format!("{base}/{}", String::from_utf8_lossy(name))).collect();
    Ok(paths.into_iter())
}

/// Roughly the bytes of an encoded entry.
fn entry_size(entry: &amber_proto::EntryInfo) -> usize {
    let metadata: usize = entry.metadata.iter().map(|(key, value)| key.len() + value.len() + 10).sum();
    let target = entry.symlink_target.as_ref().map_or(0, String::len);
    160 + entry.name.len() + entry.path.len() + entry.owner.len() + entry.group.len() + target + metadata
}
