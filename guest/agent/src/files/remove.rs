//! Removal of files and trees. No recursion and no path longer than a name: a tree may be deeper than any path can say.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;

use amber_proto::{Done, ErrorCode, Remove};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;

use super::{explain, locate};
use crate::conn::{BlockingConn, Result, failure};
use crate::state::Settings;

/// Levels that are removed; each holds a descriptor.
const MAX_DEPTH: usize = 50_000;

pub(crate) fn remove(settings: &Settings, conn: &mut BlockingConn, request: Remove) -> Result<()> {
    let (_, path) = locate(settings, request.user.as_deref(), &request.path)?;
    if Path::new(&path).file_name().is_none() {
        return Err(failure(ErrorCode::InvalidArgument, format!("path '{path}' cannot be removed")));
    }
    match remove_tree(path.trim_end_matches('/')) {
        Ok(()) | Err(Errno::NOENT) => conn.reply::<Remove>(&Done {}),
        Err(Errno::MFILE) => {
            Err(failure(ErrorCode::InvalidArgument, format!("path '{path}' is nested too deeply")))
        }
        Err(error) => Err(explain("error removing file or directory", &path, &error.into())),
    }
}

/// A directory being emptied: what is left in it are these directories.
struct Level {
    fd: OwnedFd,
    directories: Vec<CString>,
}

fn remove_tree(path: &str) -> std::result::Result<(), Errno> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        result => return result,
    }
    let mut levels = vec![empty(openat(CWD, path, directory_flags(), Mode::empty())?)?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.directories.last() {
            let fd = match openat(&level.fd, name, directory_flags(), Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    level.directories.pop();
                    continue;
                }
                Err(error) => return Err(error),
            };
            if levels.len() >= MAX_DEPTH {
                return Err(Errno::MFILE);
            }
            levels.push(empty(fd)?);
            continue;
        }
        levels.pop();
        let Some(parent) = levels.last_mut() else { break };
        let Some(name) = parent.directories.pop() else { continue };
        match unlinkat(&parent.fd, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    unlinkat(CWD, path, AtFlags::REMOVEDIR)
}

/// Links are never followed: what they point to stays.
fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// Removes everything from a directory but its directories.
fn empty(fd: OwnedFd) -> std::result::Result<Level, Errno> {
    let mut directories = Vec::new();
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            match unlinkat(&fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                // A directory after all: not every file system tells in its listings.
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(error) => return Err(error),
            }
        }
        directories.push(name.to_owned());
    }
    Ok(Level { fd, directories })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_deep_trees_and_spares_what_links_point_to() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "x").unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        std::fs::create_dir_all(tree.join("c")).unwrap();
        std::fs::write(tree.join("a/f"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        // Deeper than a path can say, and than a recursive removal's stack would bear.
        let mut fd = openat(CWD, tree.join("c").as_path(), directory_flags(), Mode::empty()).unwrap();
        for _ in 0..900 {
            let name = "n".repeat(100);
            rustix::fs::mkdirat(&fd, name.as_str(), Mode::RWXU).unwrap();
            fd = openat(&fd, name.as_str(), directory_flags(), Mode::empty()).unwrap();
        }
        drop(fd);
        remove_tree(tree.to_str().unwrap()).unwrap();
        assert!(!tree.exists() && outside.join("kept").exists());
        assert_eq!(remove_tree(tree.to_str().unwrap()), Err(Errno::NOENT));
        std::os::unix::fs::symlink(&outside, dir.path().join("link")).unwrap();
        remove_tree(dir.path().join("link").to_str().unwrap()).unwrap();
        assert!(outside.join("kept").exists());
    }
}
