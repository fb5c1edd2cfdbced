//! Directory entries as the host sees them, and the metadata kept in extended attributes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use amber_proto::{EntryInfo, FileType};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;

use crate::paths;
use crate::users::Names;

/// Attributes that hold metadata.
pub(super) const PREFIX: &str = "user.e2b.";

/// Bytes of attribute names, and of one value, that are read.
const MAX_ATTRIBUTES: usize = 64 << 10;

/// What is at a path; links are not followed.
pub(crate) fn entry(path: impl AsRef<Path>, names: &Names) -> io::Result<EntryInfo> {
    let path = path.as_ref();
    let text = path.to_string_lossy();
    let metadata = fs::symlink_metadata(path)?;
    let (mut kind, mut mode, mut symlink_target) = (file_type(&metadata), metadata.mode() & 0o777, None);
    if metadata.is_symlink() {
        // A link that leads nowhere, or in circles, has no type and is its own target.
        (kind, mode, symlink_target) = (FileType::Unknown, 0, Some(text.clone().into_owned()));
        if let Ok(target) = fs::canonicalize(path) {
            if let Ok(metadata) = fs::metadata(&target) {
                (kind, mode) = (file_type(&metadata), metadata.mode() & 0o777);
            }
            symlink_target = Some(target.to_string_lossy().into_owned());
        }
    }
    Ok(EntryInfo {
        name: paths::base(&text).to_owned(),
        path: text.clone().into_owned(),
        kind,
        size: metadata.size(),
        mode,
        permissions: permissions(metadata.mode()),
        owner: names.user(metadata.uid()),
        group: names.group(metadata.gid()),
        modified_ns: modified(&metadata),
        symlink_target,
        metadata: attributes(path),
    })
}

/// Last change of the content, nanoseconds since the epoch.
pub(super) fn modified(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

fn file_type(metadata: &fs::Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::Dir
    } else if metadata.is_file() {
        FileType::File
    } else {
        FileType::Unknown
    }
}

/// Type and permissions in the form of Go's `FileMode`, which is what E2B's users see.
fn permissions(mode: u32) -> String {
    let mut text = String::with_capacity(12);
    text.push_str(match mode & libc::S_IFMT {
        libc::S_IFDIR => "d",
        libc::S_IFLNK => "L",
        libc::S_IFBLK => "D",
        libc::S_IFCHR => "Dc",
        libc::S_IFIFO => "p",
        libc::S_IFSOCK => "S",
        _ => "",
    });
    for (bit, letter) in [(libc::S_ISUID, 'u'), (libc::S_ISGID, 'g'), (libc::S_ISVTX, 't')] {
        if mode & bit != 0 {
            text.push(letter);
        }
    }
    if text.is_empty() {
        text.push('-');
    }
    for shift in [6, 3, 0] {
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if mode >> shift & bit != 0 { letter } else { '-' });
        }
    }
    text
}

/// The metadata of a file. A file whose attributes cannot be read has none.
fn attributes(path: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    // Most files have no attributes; asking for the length needs no buffer.
    if !matches!(rustix::fs::llistxattr_query(path), Ok(1..)) {
        return found;
    }
    let mut names = Vec::with_capacity(MAX_ATTRIBUTES);
    if rustix::fs::llistxattr(path, spare_capacity(&mut names)).is_err() {
        return found;
    }
    let mut value = Vec::with_capacity(MAX_ATTRIBUTES);
    for name in names.split(|byte| *byte == 0) {
        let Some(key) = name.strip_prefix(PREFIX.as_bytes()) else { continue };
        value.clear();
        if rustix::fs::lgetxattr(path, name, spare_capacity(&mut value)).is_ok() {
            found.insert(
                String::from_utf8_lossy(key).into_owned(),
                String::from_utf8_lossy(&value).into_owned(),
            );
        }
    }
    found
}

/// Replaces the metadata of a file as a whole.
pub(super) fn set_attributes(
    file: &fs::File,
    metadata: &BTreeMap<String, String>,
    fresh: bool,
) -> io::Result<()> {
    if !fresh && matches!(rustix::fs::flistxattr_query(file), Ok(1..)) {
        let mut names = Vec::with_capacity(MAX_ATTRIBUTES);
        rustix::fs::flistxattr(file, spare_capacity(&mut names))?;
        for name in names.split(|byte| *byte == 0).filter(|name| name.starts_with(PREFIX.as_bytes())) {
            match rustix::fs::fremovexattr(file, name) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    for (key, value) in metadata {
        let name = format!("{PREFIX}{}", key.to_ascii_lowercase());
        rustix::fs::fsetxattr(file, name, value.as_bytes(), rustix::fs::XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_those_of_go() {
        for (mode, text) in [
            (libc::S_IFREG | 0o644, "-rw-r--r--"),
            (libc::S_IFDIR | 0o755, "drwxr-xr-x"),
            (libc::S_IFDIR | 0o1777, "dtrwxrwxrwx"),
            (libc::S_IFLNK | 0o777, "Lrwxrwxrwx"),
            (libc::S_IFREG | 0o4755, "urwxr-xr-x"),
            (libc::S_IFCHR | 0o666, "Dcrw-rw-rw-"),
            (libc::S_IFIFO | 0o600, "prw-------"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }

    #[test]
    fn links_have_the_type_of_their_target() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name).to_str().unwrap().to_owned();
        std::fs::create_dir(path("d")).unwrap();
        for (link, target) in [("to-dir", "d"), ("broken", "nothing"), ("loop", "loop")] {
            std::os::unix::fs::symlink(target, path(link)).unwrap();
        }
        let entry = |name: &str| entry(path(name), &Names::default()).unwrap();
        assert_eq!((entry("to-dir").kind, entry("to-dir").symlink_target), (FileType::Dir, Some(path("d"))));
        assert_eq!(
            (entry("broken").kind, entry("broken").symlink_target),
            (FileType::Unknown, Some(path("broken")))
        );
        assert_eq!(
            (entry("loop").kind, entry("loop").symlink_target),
            (FileType::Unknown, Some(path("loop")))
        );
        assert_eq!((entry("d").kind, entry("d").symlink_target), (FileType::Dir, None));
    }
}
