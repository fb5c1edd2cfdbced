//! Typed failures of this crate: what went wrong, in which file and part, and what a user can do about it.
//!
//! [`FormatError`] says that the bytes of one file are not usable (SNAPSHOT.md, "Refusals"), [`ImageError`] that a page of
//! an image could not be produced, [`StoreError`] that an operation on a store failed. The cause is never repeated
//! in the message when it is available as `source()`.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::ids::{LayerId, SnapshotId};

/// Which part of a file an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The fixed header and the table or index that it covers.
    Header,
    /// One compressed frame of a layer.
    Frame(u32),
    /// One section of a manifest, by its number.
    Section(u16),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => write!(f, "header"),
            Part::Frame(n) => write!(f, "frame {n}"),
            Part::Section(id) => write!(f, "section {id:#06x}"),
        }
    }
}

/// The bytes of a layer, a manifest or a store marker cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file does not begin with the magic bytes of what it should be.
    #[error("{} is not {expected}. Point to a store that Amberbox wrote", .file.display())]
    NotASnapshot {
        /// The file.
        file: PathBuf,
        /// What was expected there, with its article.
        expected: &'static str,
    },
    /// A newer Amberbox wrote the file.
    #[error(
        "The {part} of {} has version {found}, this Amberbox reads up to {supported}. Update Amberbox to use this snapshot", .file.display()
    )]
    NewerVersion {
        /// The file.
        file: PathBuf,
        /// The part that carries the version.
        part: Part,
        /// The version in the file.
        found: u16,
        /// The newest version this build reads.
        supported: u16,
    },
    /// The file is shorter (or longer) than its own header says.
    #[error(
        "{} is truncated or was appended to: {found} bytes instead of {expected}. Delete the snapshot, or put the file back from a copy", .file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The length the file should have (at least).
        expected: u64,
        /// The length it has.
        found: u64,
    },
    /// The content of a part does not have the hash that was recorded for it.
    #[error(
        "The {part} of {} does not match its recorded hash: the file was damaged. Delete the snapshot, or put the file back from a copy", .file.display()
    )]
    HashMismatch {
        /// The file.
        file: PathBuf,
        /// The damaged part.
        part: Part,
    },
    /// The content contradicts itself, although its hash (if it has one) is right.
    #[error("The {part} of {} is invalid: {reason}. The snapshot cannot be used", .file.display())]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// The invalid part.
        part: Part,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A section that must be understood is not known to this build.
    #[error(
        "{} needs section {id:#06x} (version {version}), which this Amberbox does not know. Update Amberbox to use this snapshot", .file.display()
    )]
    UnknownSection {
        /// The manifest.
        file: PathBuf,
        /// The section's number.
        id: u16,
        /// The section's version.
        version: u16,
    },
}

impl FormatError {
    pub(crate) fn corrupt(file: &Path, part: Part, reason: &'static str) -> FormatError {
        FormatError::Corrupt { file: file.to_owned(), part, reason }
    }
}

/// A page of an image could not be produced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The stored bytes are not usable.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The range lies outside of the image.
    #[error("Pages {first}..{} lie outside of an image of {pages} pages", .first.saturating_add(*.count))]
    OutOfRange {
        /// First page asked for.
        first: u64,
        /// Pages asked for.
        count: u64,
        /// Pages of the image.
        pages: u64,
    },
    /// Reading the layer (or raw file) failed.
    #[error("Cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The memory file that holds decoded pages could not be made or written.
    #[error(
        "Cannot hold decoded pages in memory. Free memory, or raise the limit of shared memory of this process"
    )]
    Memory(#[source] io::Error),
}

/// An operation on the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file of the store is not usable.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A page of an image is not usable.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no such snapshot.
    #[error("Snapshot '{name}' not found")]
    NotFound {
        /// The id or name asked for.
        name: String,
    },
    /// A manifest names a layer that is not in the store.
    #[error("Layer {layer} is missing from {}. Delete the snapshots that need it, or put the file back from a copy", .store.display())]
    MissingLayer {
        /// The layer.
        layer: LayerId,
        /// The store.
        store: PathBuf,
    },
    /// The snapshot is open somewhere, so it cannot be deleted.
    #[error("Snapshot '{id}' is in use{}. Kill the sandboxes that were created from it first", holders_text(.holders))]
    InUse {
        /// The snapshot.
        id: SnapshotId,
        /// Process ids of the holders, as far as the kernel tells; may be empty.
        holders: Vec<u32>,
    },
    /// The directory exists and is something else.
    #[error("{} is not an Amberbox store and not empty. Choose another directory", .path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// The store cannot be written.
    #[error("Cannot write to {}. Check its owner and permissions, or choose another store directory", .path.display())]
    NotWritable {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file system (or the user's quota, or the writer's limit) is full. Nothing was published.
    #[error("No space left for {}. Delete snapshots or free disk space, then try again", .path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The store would become larger than it may. Nothing was published.
    #[error("The store {} has {used} of {quota} bytes, which leaves no room for this snapshot. Delete snapshots, or raise the quota", .store.display())]
    Quota {
        /// The store.
        store: PathBuf,
        /// What it may have, in bytes.
        quota: u64,
        /// What it has, in bytes.
        used: u64,
    },
    /// A name, tag or id breaks the rules.
    #[error("'{name}' is not a valid {what}: use {rule}")]
    InvalidName {
        /// What was given.
        name: String,
        /// A name, a tag or an id.
        what: &'static str,
        /// The rule.
        rule: &'static str,
    },
    /// The names given belong to different snapshots.
    #[error("The names '{first}' and '{second}' belong to different snapshots. Use one of them")]
    NameConflict {
        /// One name.
        first: String,
        /// Another one.
        second: String,
    },
    /// A template directory must hold exactly one snapshot.
    #[error("{} holds {found} snapshots, a template directory holds exactly one", .path.display())]
    NotATemplate {
        /// The directory.
        path: PathBuf,
        /// How many there are.
        found: usize,
    },
    /// What was given to the writer cannot be stored.
    #[error("Cannot store this snapshot: {reason}")]
    InvalidInput {
        /// What is wrong.
        reason: &'static str,
    },
    /// The source of pages failed while a snapshot was taken.
    #[error("Cannot read page {page} of the machine")]
    Source {
        /// The page.
        page: u64,
        /// The cause.
        source: io::Error,
    },
    /// Any other failure of the file system.
    #[error("Cannot {action} {}", .path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn holders_text(holders: &[u32]) -> String {
    match holders {
        [] => String::new(),
        [one] => format!(" by process {one}"),
        many => {
            let list: Vec<String> = many.iter().map(u32::to_string).collect();
            format!(" by processes {}", list.join(", "))
        }
    }
}

impl StoreError {
    /// Maps a failed write to the variant that tells the user what to do.
    pub(crate) fn write(action: &'static str, path: &Path, source: io::Error) -> StoreError {
        use io::ErrorKind as K;
        let path = path.to_owned();
        match source.kind() {
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => StoreError::DiskFull { path, source },
            K::PermissionDenied | K::ReadOnlyFilesystem => StoreError::NotWritable { path, source },
            _ => StoreError::Io { action, path, source },
        }
    }

    /// A failed read.
    pub(crate) fn read(path: &Path, source: io::Error) -> StoreError {
        StoreError::Io { action: "read", path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn failed_writes_are_told_apart() {
        let p = Path::new("/x");
        let map = |e: Errno| StoreError::write("write", p, e.into());
        assert!(matches!(map(Errno::NOSPC), StoreError::DiskFull { .. }));
        assert!(matches!(map(Errno::DQUOT), StoreError::DiskFull { .. }));
        assert!(matches!(map(Errno::FBIG), StoreError::DiskFull { .. }));
        assert!(matches!(map(Errno::ROFS), StoreError::NotWritable { .. }));
        assert!(matches!(map(Errno::ACCESS), StoreError::NotWritable { .. }));
        assert!(matches!(map(Errno::PERM), StoreError::NotWritable { .. }));
        assert!(matches!(map(Errno::IO), StoreError::Io { .. }));
    }

    #[test]
    fn holders_are_named() {
        let id = SnapshotId::parse("abc").unwrap();
        let text = |holders| StoreError::InUse { id: id.clone(), holders }.to_string();
        assert!(text(vec![]).starts_with("Snapshot 'abc' is in use. "));
        assert!(text(vec![7]).contains("by process 7."));
        assert!(text(vec![7, 8]).contains("by processes 7, 8."));
    }
}
