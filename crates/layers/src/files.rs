//! Temporary work areas and durable directory changes (SNAPSHOT.md, section 5).
//!
//! Every operation that spans several renames keeps a directory in `tmp/`, with a lock file that it holds. Whoever
//! finds such a directory unlocked knows that its owner died in the middle, collects what that left behind, and only then
//! removes the directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::StoreError;
use crate::ids::random_text;
use crate::lock::FileLock;

/// The lock file inside of a snapshot's or a work area's directory.
pub(crate) const LOCK_NAME: &str = "lock";
const ATTEMPTS: usize = 64;
const COPY_BUFFER: usize = 1 << 20;

/// A directory in `tmp/` that belongs to one operation of this process.
#[derive(Debug)]
pub(crate) struct WorkArea {
    dir: PathBuf,
    _lock: FileLock,
}

impl WorkArea {
    pub(crate) fn create(tmp: &Path) -> Result<WorkArea, StoreError> {
        for _ in 0..ATTEMPTS {
            let dir = tmp.join(random_text().map_err(|e| StoreError::write("name a file in", tmp, e))?);
            create_dir(&dir)?;
            // Between the two steps a cleaner can take the directory for a dead one, lock it and remove it. Then the
            // lock file is gone, or it is the removed one that was locked: try again.
            match FileLock::exclusive(&dir.join(LOCK_NAME)) {
                Ok(lock) => {
                    if lock.is_linked().map_err(|e| StoreError::read(&dir, e))? {
                        return Ok(WorkArea { dir, _lock: lock });
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    let _ = fs::remove_dir_all(&dir);
                    return Err(StoreError::write("create a file in", &dir, e));
                }
            }
        }
        let busy = io::Error::new(io::ErrorKind::ResourceBusy, "other processes keep removing it");
        Err(StoreError::write("create a directory in", tmp, busy))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for WorkArea {
    fn drop(&mut self) {
        // The lock is held until the fields are dropped; what cannot be removed now is the next opener's task.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Work areas whose owner is dead, locked for the caller.
pub(crate) fn dead_work_areas(tmp: &Path) -> Result<Vec<(PathBuf, FileLock)>, StoreError> {
    let mut dead = Vec::new();
    for entry in fs::read_dir(tmp).map_err(|e| StoreError::read(tmp, e))? {
        let dir = entry.map_err(|e| StoreError::read(tmp, e))?.path();
        match FileLock::try_exclusive(&dir.join(LOCK_NAME)) {
            Ok(Ok(lock)) => dead.push((dir, lock)),
            Ok(Err(_)) => {}
            // Finished and removed meanwhile, or no directory of ours.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(e) => return Err(StoreError::write("lock", &dir, e)),
        }
    }
    Ok(dead)
}

/// Creates a directory that only its owner can read: memory images hold secrets.
pub(crate) fn create_dir(dir: &Path) -> Result<(), StoreError> {
    DirBuilder::new().mode(0o700).create(dir).map_err(|e| StoreError::write("create", dir, e))
}

/// Creates a directory and its parents unless they exist.
pub(crate) fn create_dirs(dir: &Path) -> Result<(), StoreError> {
    let create = DirBuilder::new().mode(0o700).recursive(true).create(dir);
    create.map_err(|e| StoreError::write("create", dir, e))
}

/// A new file that only its owner can read.
pub(crate) fn create_file(path: &Path) -> Result<File, StoreError> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|e| StoreError::write("create", path, e))
}

/// A new file with this content, durable (its name is not, until the directory is synced).
pub(crate) fn write_file(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let file = create_file(path)?;
    let written = file.write_all_at(content, 0).and_then(|()| file.sync_all());
    written.map_err(|e| StoreError::write("write", path, e))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::write("sync", dir, e))
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(|e| StoreError::write("rename a file to", to, e))
}

/// A durable copy of an open file; shares its blocks where the file system can.
pub(crate) fn copy(from: &File, to: &Path) -> Result<(), StoreError> {
    let file = create_file(to)?;
    let copied =
        if rustix::fs::ioctl_ficlone(&file, from).is_ok() { Ok(()) } else { copy_bytes(from, &file) };
    copied.and_then(|()| file.sync_all()).map_err(|e| StoreError::write("write", to, e))
}

fn copy_bytes(from: &File, to: &File) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BUFFER];
    let mut at = 0;
    loop {
        match from.read_at(&mut buffer, at) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all_at(&buffer[..n], at)?;
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_areas_vanish_and_dead_ones_are_found() {
        let tmp = tempfile::tempdir().unwrap();
        let live = WorkArea::create(tmp.path()).unwrap();
        fs::write(live.path("x"), "y").unwrap();
        assert!(dead_work_areas(tmp.path()).unwrap().is_empty());
        let dead = tmp.path().join("dead");
        fs::create_dir(&dead).unwrap();
        fs::write(tmp.path().join("stray"), "").unwrap();
        let found = dead_work_areas(tmp.path()).unwrap();
        assert_eq!(found.iter().map(|(d, _)| d.clone()).collect::<Vec<_>>(), [dead]);
        let dir = live.path("");
        drop(live);
        assert!(!dir.exists());
    }

    #[test]
    fn copies_are_equal() {
        let tmp = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..3_000_000u32).map(|i| (i / 7) as u8).collect();
        write_file(&tmp.path().join("a"), &content).unwrap();
        copy(&File::open(tmp.path().join("a")).unwrap(), &tmp.path().join("b")).unwrap();
        assert_eq!(fs::read(tmp.path().join("b")).unwrap(), content);
        assert!(matches!(write_file(&tmp.path().join("a"), b""), Err(StoreError::Io { .. })));
    }
}
