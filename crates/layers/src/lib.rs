//! Snapshots of Amberbox machines: images of memory and disk, layers, manifests, and the store on disk.
//!
//! An [`Image`] is one sealed address space of 4 KiB pages. Its pages are found through a flat map of extents in
//! immutable layers of independently compressed frames, whatever the number of ancestors. A [`Snapshot`] is two
//! images (memory and disk) and sections of machine state, resolved by one manifest. A [`Store`] is a
//! directory of layers and manifests that several processes share without a daemon. A [`SnapshotWriter`] builds a
//! snapshot from the pages that changed, and publishes it atomically.
//!
//! SNAPSHOT.md at the root of the repository specifies every byte and argues crash safety.
//!
//! Invariants: nothing read from a file is used before its hash was compared; no length from a file decides an
//! allocation before it was compared with what is there; layers never change after publication; this crate
//! knows nothing about machines, and has no `unsafe` code.

#![forbid(unsafe_code)]

mod adopt;
mod capture;
mod claim;
mod codec;
mod collect;
mod error;
mod extent;
mod files;
mod format;
mod ids;
mod image;
mod known;
mod layer;
mod lock;
mod manifest;
mod meta;
mod publish;
mod store;
mod transfer;
mod writer;

pub use capture::{CaptureStats, PageSource};
pub use claim::Claim;
pub use collect::{Collected, Problem, Usage, Verified};
pub use error::{FormatError, ImageError, Part, StoreError};
pub use format::{FORMAT_VERSION, FRAME_PAGES, PAGE_SIZE, Page};
pub use ids::{BuildId, DEFAULT_TAG, LayerId, SnapshotId};
pub use image::{Image, PageKind, PageRange};
pub use manifest::{Prefetch, Section, SectionId};
pub use meta::{Kind, ListFilter, NewSnapshot, Parent, SnapshotMeta};
pub use store::{Snapshot, Store};
pub use transfer::Exported;
pub use writer::{DEFAULT_LEVEL, SnapshotWriter};
