//! Advisory locks that die with their process (SNAPSHOT.md, section 5).
//!
//! `flock` locks belong to the open file description: the kernel drops them when a process ends in any way, and two
//! handles of one process exclude each other like two processes do. Every file is opened close-on-exec (the
//! standard library's default), and the lock is released explicitly on drop, so that a child that is between fork and
//! exec cannot prolong it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A held lock on an open file.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    /// Opens or creates a lock file and waits for a shared lock.
    pub(crate) fn shared(path: &Path) -> io::Result<FileLock> {
        let file = open(path)?;
        lock(&file, FlockOperation::LockShared)?;
        Ok(FileLock { file })
    }

    /// Opens or creates a lock file and waits for the exclusive lock.
    pub(crate) fn exclusive(path: &Path) -> io::Result<FileLock> {
        let file = open(path)?;
        lock(&file, FlockOperation::LockExclusive)?;
        Ok(FileLock { file })
    }

    /// The exclusive lock, or the open file when somebody else holds a lock.
    pub(crate) fn try_exclusive(path: &Path) -> io::Result<Result<FileLock, File>> {
        FileLock::try_exclusive_on(open(path)?)
    }

    /// The exclusive lock on an open file, or that file when somebody else holds a lock.
    pub(crate) fn try_exclusive_on(file: File) -> io::Result<Result<FileLock, File>> {
        match lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Ok(FileLock { file })),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Err(file)),
            Err(e) => Err(e),
        }
    }

    /// Waits for a shared lock on an open file.
    pub(crate) fn shared_on(file: File) -> io::Result<FileLock> {
        lock(&file, FlockOperation::LockShared)?;
        Ok(FileLock { file })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether the locked file still has a name. A lock on a file that was removed meanwhile protects nothing.
    pub(crate) fn is_linked(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.nlink() > 0)
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing would do, unless a forked child still has a copy of the descriptor.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn lock(file: &File, operation: FlockOperation) -> io::Result<()> {
    loop {
        match flock(file, operation) {
            Err(Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// Process ids that hold a lock on `file`, from `/proc/locks`: best effort, for messages only.
pub(crate) fn holders(file: &File) -> Vec<u32> {
    let (Ok(meta), Ok(table)) = (file.metadata(), std::fs::read_to_string("/proc/locks")) else {
        return Vec::new();
    };
    let dev = meta.dev();
    let key = format!("{:02x}:{:02x}:{}", rustix::fs::major(dev), rustix::fs::minor(dev), meta.ino());
    parse_holders(&table, &key)
}

fn parse_holders(table: &str, key: &str) -> Vec<u32> {
    let mut pids: Vec<u32> = table
        .lines()
        .filter_map(|line| {
            // "12: FLOCK  ADVISORY  READ 1234 fe:00:5678 0 EOF"; waiting requests have "->" as second word.
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            match words.as_slice() {
                [_, "FLOCK", _, _, pid, file, ..] if *file == key => pid.parse().ok().filter(|pid| *pid > 0),
                _ => None,
            }
        })
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_and_exclusive_exclude_each_other_within_a_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let a = FileLock::shared(&path).unwrap();
        let b = FileLock::shared(&path).unwrap();
        let file = FileLock::try_exclusive(&path).unwrap().unwrap_err();
        let found = holders(&file);
        assert!(found.is_empty() || found == [std::process::id()], "{found:?}");
        drop(a);
        assert!(FileLock::try_exclusive(&path).unwrap().is_err());
        drop(b);
        let x = FileLock::try_exclusive(&path).unwrap().unwrap();
        assert!(FileLock::try_exclusive(&path).unwrap().is_err());
        assert!(x.is_linked().unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!x.is_linked().unwrap());
    }

    #[test]
    fn holders_are_read_from_the_kernel_table() {
        let table = "1: FLOCK  ADVISORY  READ 12 fe:00:55 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 13 fe:00:55 0 EOF\n\
                     2: POSIX  ADVISORY  READ 14 fe:00:55 0 EOF\n3: FLOCK  ADVISORY  READ 9 fe:00:55 0 EOF\n\
                     4: FLOCK  ADVISORY  READ 15 fe:00:56 0 EOF\n5: FLOCK  ADVISORY  READ 0 fe:00:55 0 EOF\nnoise\n";
        assert_eq!(parse_holders(table, "fe:00:55"), [9, 12]);
    }
}
