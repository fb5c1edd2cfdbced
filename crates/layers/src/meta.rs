//! What a snapshot says about itself: the metadata record of a manifest, and the filters of a listing.
//!
//! The record is CBOR with named fields, every one with a default, so that fields can be added without a new format
//! version and old snapshots still load. Id and tag are not part of it: they are the manifest's path, which lets
//! a template be adopted under the id that a name already has.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{FormatError, Part, StoreError};
use crate::ids::{BuildId, SnapshotId, check_name, check_tag};

/// What made a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Made when a guest image was built; what `Sandbox.create()` starts from.
    Template,
    /// Taken from a running sandbox.
    #[default]
    Snapshot,
    /// A sandbox that is paused, or in the middle of being copied: state of that one sandbox, which no user names.
    Sandbox,
}

/// The snapshot that another one was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its id.
    pub id: SnapshotId,
    /// Its content at that time.
    pub build: BuildId,
}

/// What the caller says about a snapshot that is being published.
#[derive(Debug, Clone, Default)]
pub struct NewSnapshot {
    /// Template or snapshot.
    pub kind: Kind,
    /// The id to have, unless one of the names has another one; `None` is a new one. An earlier snapshot with it is replaced.
    pub id: Option<SnapshotId>,
    /// Names (without tag). When one of them exists, its snapshot gets a new build under the same id.
    pub names: Vec<String>,
    /// The tag; `None` is `default`.
    pub tag: Option<String>,
    /// The id of the sandbox that it was taken from.
    pub source: Option<String>,
    /// The snapshot that the sandbox was created from.
    pub parent: Option<Parent>,
    /// Anything, as JSON text; stored as it is.
    pub metadata: String,
    /// Version of the platform that the guest sees.
    pub platform: u32,
    /// What a machine must offer to run it: CPU model, backends and so on. Opaque to this crate.
    pub constraints: BTreeMap<String, String>,
}

impl NewSnapshot {
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.names.iter().try_for_each(|name| check_name(name))?;
        self.tag.as_deref().map_or(Ok(()), check_tag)?;
        let size =
            self.metadata.len() + self.constraints.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
        if size > META_TEXT_MAX {
            return Err(StoreError::InvalidInput { reason: "more than 512 KiB of metadata" });
        }
        Ok(())
    }
}

const META_TEXT_MAX: usize = 512 << 10;

/// A published snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// Its id.
    pub id: SnapshotId,
    /// Its tag.
    pub tag: String,
    /// This content.
    pub build: BuildId,
    /// Template or snapshot.
    pub kind: Kind,
    /// Names without tag; empty for an unnamed snapshot.
    pub names: Vec<String>,
    /// When it was published, in nanoseconds since 1970.
    pub created_ns: u64,
    /// The sandbox it was taken from.
    pub source: Option<String>,
    /// The snapshot that the sandbox was created from.
    pub parent: Option<Parent>,
    /// JSON text of the caller.
    pub metadata: String,
    /// Pages of memory.
    pub memory_pages: u64,
    /// Pages of disk.
    pub disk_pages: u64,
    /// Pages of memory that are not zero.
    pub memory_data_pages: u64,
    /// Pages of disk that are not zero.
    pub disk_data_pages: u64,
    /// Bytes on disk that this snapshot added: its own layer and its manifest.
    pub own_bytes: u64,
    /// Bytes on disk of everything it needs, shared or not.
    pub total_bytes: u64,
    /// Platform version.
    pub platform: u32,
    /// What a machine must offer.
    pub constraints: BTreeMap<String, String>,
}

impl SnapshotMeta {
    /// When it was published, in milliseconds since 1970.
    pub fn created_ms(&self) -> u64 {
        self.created_ns / 1_000_000
    }

    /// This snapshot as the parent of another.
    pub fn as_parent(&self) -> Parent {
        Parent { id: self.id.clone(), build: self.build }
    }
}

/// Which snapshots to list. Empty filters match everything.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    /// Only templates, or only snapshots.
    pub kind: Option<Kind>,
    /// Only those taken from this sandbox.
    pub source: Option<String>,
    /// Only this id or name, optionally with `:tag`. An unknown one matches nothing.
    pub name: Option<String>,
}

impl ListFilter {
    pub(crate) fn matches(&self, meta: &SnapshotMeta) -> bool {
        self.kind.is_none_or(|kind| kind == meta.kind)
            && self.source.as_ref().is_none_or(|source| meta.source.as_ref() == Some(source))
            && self.name.as_ref().is_none_or(|name| Reference::parse(name).matches(meta))
    }
}

/// An id or name with an optional tag, as users write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reference<'a> {
    pub(crate) name: &'a str,
    pub(crate) tag: Option<&'a str>,
}

impl<'a> Reference<'a> {
    pub(crate) fn parse(text: &'a str) -> Reference<'a> {
        match text.rsplit_once(':') {
            Some((name, tag)) => Reference { name, tag: Some(tag) },
            None => Reference { name: text, tag: None },
        }
    }

    pub(crate) fn matches(&self, meta: &SnapshotMeta) -> bool {
        (meta.id.as_str() == self.name || meta.names.iter().any(|n| n == self.name))
            && self.tag.is_none_or(|tag| tag == meta.tag)
    }
}

/// The record as it is stored (SNAPSHOT.md, section 3.1).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MetaRecord {
    pub(crate) kind: Kind,
    pub(crate) names: Vec<String>,
    pub(crate) created_ns: u64,
    pub(crate) source: Option<String>,
    pub(crate) parent: Option<Parent>,
    pub(crate) metadata: String,
    pub(crate) memory_pages: u64,
    pub(crate) disk_pages: u64,
    pub(crate) memory_data_pages: u64,
    pub(crate) disk_data_pages: u64,
    pub(crate) layer_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) platform: u32,
    pub(crate) constraints: BTreeMap<String, String>,
}

impl MetaRecord {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StoreError> {
        let mut out = Vec::new();
        // Writing to a Vec cannot fail, and the record has no values that CBOR lacks.
        ciborium::into_writer(self, &mut out)
            .map_err(|_| StoreError::InvalidInput { reason: "metadata cannot be encoded" })?;
        Ok(out)
    }

    pub(crate) fn decode(file: &Path, part: Part, bytes: &[u8]) -> Result<MetaRecord, FormatError> {
        ciborium::from_reader(bytes)
            .map_err(|_| FormatError::corrupt(file, part, "metadata cannot be decoded"))
    }

    pub(crate) fn into_meta(
        self,
        id: SnapshotId,
        tag: String,
        build: BuildId,
        manifest_len: u64,
    ) -> SnapshotMeta {
        SnapshotMeta {
            id,
            tag,
            build,
            kind: self.kind,
            names: self.names,
            created_ns: self.created_ns,
            source: self.source,
            parent: self.parent,
            metadata: self.metadata,
            memory_pages: self.memory_pages,
            disk_pages: self.disk_pages,
            memory_data_pages: self.memory_data_pages,
            disk_data_pages: self.disk_data_pages,
            own_bytes: self.layer_bytes.saturating_add(manifest_len),
            total_bytes: self.total_bytes.saturating_add(manifest_len),
            platform: self.platform,
            constraints: self.constraints,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_without_or_with_unknown_fields_load() {
        let file = Path::new("m");
        let part = Part::Section(1);
        let mut bytes = Vec::new();
        let fields: BTreeMap<&str, u32> = [("platform", 3), ("from_the_future", 1)].into();
        ciborium::into_writer(&fields, &mut bytes).unwrap();
        let record = MetaRecord::decode(file, part, &bytes).unwrap();
        assert_eq!(record, MetaRecord { platform: 3, ..MetaRecord::default() });
        assert!(MetaRecord::decode(file, part, &[0xff]).is_err());
        assert!(MetaRecord::decode(file, part, &[]).is_err());
        // A string that claims more bytes than there are must not be allocated first.
        assert!(
            MetaRecord::decode(file, part, &[0x7b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err()
        );
    }

    #[test]
    fn references_have_an_optional_tag() {
        assert_eq!(Reference::parse("a/b"), Reference { name: "a/b", tag: None });
        assert_eq!(Reference::parse("a/b:v1"), Reference { name: "a/b", tag: Some("v1") });
    }
}
