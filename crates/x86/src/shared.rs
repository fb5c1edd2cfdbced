//! Decoded code that the CPUs of all copies of one sealed image share.
//!
//! Copies of a snapshot begin by executing the same code: the kernel, the agent, the shell. Decoding it costs more than
//! executing it once, so the first CPU that decodes a sequence from a page of the image leaves a copy here, and the
//! others copy it into their own caches (a CPU writes links into its sequences, so the operations themselves cannot be
//! shared).
//!
//! **What is here was decoded from the image, and from nothing else**: before a sequence is put here, the bytes it was
//! decoded from are compared with those of the image ([`GuestRam::sealed`](crate::GuestRam::sealed)), so that no guest can
//! make others execute what it wrote. It is used only for pages that do not differ from the image.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::code::AddressMap;
use crate::op::Op;

/// Bytes of operations that one image's code may take. Boot, agent and shell are about 4 MB.
const CAPACITY: usize = 32 << 20;
const SHARDS: usize = 16;

struct Entry {
    ops: Box<[Op]>,
    /// Bytes of guest code it was decoded from.
    bytes: u16,
}

/// Decoded sequences of one sealed image, by their place in it.
pub struct SharedCode {
    shards: [RwLock<AddressMap<Entry>>; SHARDS],
    held: AtomicUsize,
}

impl Default for SharedCode {
    fn default() -> Self {
        SharedCode { shards: std::array::from_fn(|_| RwLock::default()), held: AtomicUsize::new(0) }
    }
}

impl std::fmt::Debug for SharedCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedCode").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl SharedCode {
    /// Nothing decoded yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held by shared operations.
    pub fn bytes(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn shard(&self, at: u64) -> &RwLock<AddressMap<Entry>> {
        &self.shards[(at >> 12) as usize % SHARDS]
    }

    /// A copy of the sequence at a byte offset of the image, and the length of its code.
    pub(crate) fn get(&self, at: u64) -> Option<(Box<[Op]>, u64)> {
        let shard = self.shard(at).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&at).map(|entry| (entry.ops.clone(), u64::from(entry.bytes)))
    }

    /// Keeps a copy of a sequence that has not been executed yet, unless there is one or the room is used up.
    pub(crate) fn put(&self, at: u64, ops: &[Op], bytes: u64) {
        let size = size_of_val(ops);
        if self.bytes() + size > CAPACITY {
            return;
        }
        let mut shard = self.shard(at).write().unwrap_or_else(PoisonError::into_inner);
        shard.entry(at).or_insert_with(|| {
            self.held.fetch_add(size, Ordering::Relaxed);
            Entry { ops: ops.into(), bytes: bytes as u16 }
        });
    }
}
