//! Identities: snapshots (stable, random), builds (one content of a snapshot), layers (named by content), names and tags.
//!
//! A snapshot id stays the same when a named snapshot is taken again; each publication is a new build. A layer's
//! id is the BLAKE3 hash of its header and index, which in turn holds the hash of every frame.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::StoreError;

const ID_ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const ID_LEN: usize = 20;
const ID_MAX: usize = 64;
const NAME_MAX: usize = 200;
/// The tag of a snapshot that was given none.
pub const DEFAULT_TAG: &str = "default";

/// Names one snapshot of a store, whatever its content is at the moment.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

impl SnapshotId {
    /// Checks that `text` can be an id: 1 to 64 of `a-z 0-9 _ -`.
    pub fn parse(text: &str) -> Result<SnapshotId, StoreError> {
        let fine = (1..=ID_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
        if fine {
            Ok(SnapshotId(text.to_owned()))
        } else {
            Err(StoreError::InvalidName {
                name: text.to_owned(),
                what: "snapshot id",
                rule: "1 to 64 of a-z, 0-9, _ and -",
            })
        }
    }

    /// A new id from the kernel's random generator.
    pub(crate) fn generate() -> std::io::Result<SnapshotId> {
        Ok(SnapshotId(random_text()?))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = StoreError;
    fn try_from(text: String) -> Result<SnapshotId, StoreError> {
        SnapshotId::parse(&text)
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({})", self.0)
    }
}

/// Names one content of a snapshot; every publication has its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BuildId(#[serde(with = "serde_bytes")] pub [u8; 16]);

impl BuildId {
    pub(crate) fn generate() -> std::io::Result<BuildId> {
        let mut bytes = [0; 16];
        random(&mut bytes)?;
        Ok(BuildId(bytes))
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names a layer by its content: BLAKE3 of the layer's header and index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub [u8; 32]);

impl LayerId {
    /// Reads 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<LayerId> {
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut id = [0; 32];
        for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(LayerId(id))
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

/// Checks a name: `a-z 0-9 _ . - /`, as E2B's `name` and `team/name` (without the tag).
pub(crate) fn check_name(name: &str) -> Result<(), StoreError> {
    let fine = (1..=NAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-./".contains(&b));
    if fine {
        Ok(())
    } else {
        Err(StoreError::InvalidName {
            name: name.to_owned(),
            what: "snapshot name",
            rule: "1 to 200 of a-z, 0-9, _, -, . and /",
        })
    }
}

/// Checks a tag; it becomes part of a file name.
pub(crate) fn check_tag(tag: &str) -> Result<(), StoreError> {
    let fine = (1..=ID_MAX).contains(&tag.len())
        && tag.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-.".contains(&b))
        && !tag.starts_with('.');
    if fine {
        Ok(())
    } else {
        Err(StoreError::InvalidName {
            name: tag.to_owned(),
            what: "tag",
            rule: "1 to 64 of a-z, 0-9, _, - and ., not beginning with a dot",
        })
    }
}

/// Twenty characters of `a-z 0-9` without bias.
pub(crate) fn random_text() -> std::io::Result<String> {
    let mut text = String::with_capacity(ID_LEN);
    let mut bytes = [0; 32];
    while text.len() < ID_LEN {
        random(&mut bytes)?;
        // 252 is the largest multiple of 36 in a byte; what lies above would favour the first letters.
        let picked = bytes.iter().filter(|&&b| b < 252).map(|b| char::from(ID_ALPHABET[usize::from(b % 36)]));
        text.extend(picked.take(ID_LEN - text.len()));
    }
    Ok(text)
}

fn random(bytes: &mut [u8]) -> std::io::Result<()> {
    use rustix::rand::{GetRandomFlags, getrandom};
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_are_valid_and_differ() {
        let a = SnapshotId::generate().unwrap();
        let b = SnapshotId::generate().unwrap();
        assert_eq!(a.as_str().len(), 20);
        assert_ne!(a, b);
        assert_eq!(SnapshotId::parse(a.as_str()).unwrap(), a);
    }

    #[test]
    fn ids_that_could_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "a.b", "A", "a b", "\0", &"a".repeat(65)] {
            assert!(SnapshotId::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["", ".hidden", "a/b", "A", &"a".repeat(65)] {
            assert!(check_tag(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "a:b", "Name", "a b"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_tag("v1.2_x-y").is_ok());
        assert!(check_name("team/name.x").is_ok());
    }

    #[test]
    fn layer_ids_survive_text() {
        let id = LayerId(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        assert_eq!(LayerId::parse(&id.to_string()), Some(id));
        assert_eq!(LayerId::parse(&id.to_string().to_uppercase()), None);
        assert_eq!(LayerId::parse("00"), None);
    }
}
