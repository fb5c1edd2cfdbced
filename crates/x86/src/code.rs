//! The code cache: decoded sequences, keyed by guest-physical address.
//!
//! A sequence lives and dies with the page it starts in. Pages that hold decoded code carry `PageFlags::CODE`, and no TLB
//! entry lets anyone write to them directly; a write to a line with decoded code drops the page's sequences. Memory of
//! dropped sequences is freed at the next sequence boundary, for the CPU may still be inside one.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr;
use std::sync::atomic::Ordering;

use crate::bus::PageFlags;
use crate::cpu::{Cpu, JumpEntry, Trap, vector};
use crate::decode::{self, Sequence};
use crate::op::Op;

/// Decoded code beyond this many bytes makes the cache start over.
const CAPACITY: usize = 48 << 20;

/// Hashes addresses and page numbers by one multiplication.
#[derive(Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        let h = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = h ^ h >> 32;
    }
}

type AddressMap<V> = HashMap<u64, V, BuildHasherDefault<AddressHasher>>;

/// What is decoded of one page.
#[derive(Default)]
struct PageCode {
    /// Bit n: bytes n*64 to n*64+63 belong to some sequence.
    lines: u64,
    sequences: Vec<Box<[Op]>>,
    /// Guest-physical start addresses of `sequences`.
    starts: Vec<u64>,
    /// Pages with an instruction that ends in this one.
    crossing: Vec<u64>,
}

/// All decoded sequences.
#[derive(Default)]
pub(crate) struct CodeCache {
    starts: AddressMap<*const Op>,
    pages: AddressMap<PageCode>,
    dropped: Vec<Box<[Op]>>,
    bytes: usize,
}

fn lines(first: u64, bytes: u64) -> u64 {
    let (a, b) = (first / 64, (first + bytes - 1).min(4095) / 64);
    (u64::MAX >> (63 - b)) & (u64::MAX << a)
}

impl CodeCache {
    /// Whether any of these bytes of a page belong to a decoded sequence.
    pub(crate) fn holds(&self, page: u64, offset: u64, bytes: u64) -> bool {
        self.pages.get(&page).is_some_and(|p| p.lines & lines(offset, bytes) != 0)
    }

    /// Whether dropped sequences wait for a boundary.
    #[inline(always)]
    pub(crate) fn has_dropped(&self) -> bool {
        !self.dropped.is_empty() || self.bytes > CAPACITY
    }

    /// Bytes held by decoded operations.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn drop_page(&mut self, page: u64, cleared: &mut Vec<u64>) {
        let Some(code) = self.pages.remove(&page) else { return };
        for start in &code.starts {
            self.starts.remove(start);
        }
        for sequence in code.sequences {
            self.bytes -= size_of_val(&*sequence);
            self.dropped.push(sequence);
        }
        cleared.push(page);
        for other in code.crossing {
            self.drop_page(other, cleared);
        }
    }
}

impl Cpu {
    /// Drops what is decoded of a page, because its content changes.
    pub(crate) fn invalidate_page(&mut self, page: u64) {
        let mut cleared = Vec::new();
        self.code.drop_page(page, &mut cleared);
        cleared.push(page);
        for page in cleared {
            self.ram.flags()[page as usize].fetch_and(!PageFlags::CODE, Ordering::AcqRel);
        }
        self.forget_jumps();
    }

    /// Drops all decoded code.
    pub(crate) fn invalidate_all_code(&mut self) {
        let pages: Vec<u64> = self.code.pages.keys().copied().collect();
        for page in pages {
            self.invalidate_page(page);
        }
        self.forget_jumps();
    }

    /// Empties the jump cache: translations or decoded code changed.
    pub(crate) fn forget_jumps(&mut self) {
        self.jump_cache.fill(JumpEntry::EMPTY);
        self.link_from = ptr::null_mut();
    }

    /// Frees dropped sequences. Only at a sequence boundary.
    pub(crate) fn bury(&mut self) {
        self.code.dropped.clear();
        if self.code.bytes > CAPACITY {
            self.invalidate_all_code();
            self.code.dropped.clear();
        }
    }

    /// The page index being executed, if it is RAM.
    pub(crate) unsafe fn executing_page(&mut self) -> Option<u64> {
        let va = self.slot(crate::op::reg::PAGE);
        let pa = self.fetch(va).ok()?;
        self.ram.page_of(pa)
    }

    /// Finds or decodes the sequence at `rip`.
    pub(crate) unsafe fn lookup(&mut self) -> Result<*const Op, Trap> {
        let rip = self.rip;
        let pa = self.fetch(rip)?;
        if let Some(&op) = self.code.starts.get(&pa) {
            return Ok(op);
        }
        let (page, sequence) = self.decode_at(rip, pa, decode::MAX_INSTRUCTIONS)?;
        self.diagnostics.sequences_decoded += 1;
        self.forget_writable(page);
        self.ram.flags()[page as usize].fetch_or(PageFlags::CODE, Ordering::AcqRel);
        let offset = pa & 0xfff;
        let ops = sequence.ops.into_boxed_slice();
        let first = ops.as_ptr();
        self.code.bytes += size_of_val(&*ops);
        let code = self.code.pages.entry(page).or_default();
        code.lines |= lines(offset, sequence.bytes);
        code.sequences.push(ops);
        code.starts.push(pa);
        self.code.starts.insert(pa, first);
        if let Some(second) = sequence.second_page {
            let end = offset + sequence.bytes - 4096;
            self.forget_writable(second);
            self.ram.flags()[second as usize].fetch_or(PageFlags::CODE, Ordering::AcqRel);
            let other = self.code.pages.entry(second).or_default();
            other.lines |= lines(0, end);
            if second != page {
                other.crossing.push(page);
            }
        }
        Ok(first)
    }

    /// Decodes the one instruction at `rip` outside the cache, into `self.alone_ops`.
    pub(crate) unsafe fn lookup_alone(&mut self) -> Result<*const Op, Trap> {
        let rip = self.rip;
        let pa = self.fetch(rip)?;
        let (_, sequence) = self.decode_at(rip, pa, 1)?;
        self.alone_ops = sequence.ops;
        // However it branches, it comes back to the run loop.
        self.icount_limit = 0;
        Ok(self.alone_ops.as_ptr())
    }

    unsafe fn decode_at(&mut self, rip: u64, pa: u64, max: usize) -> Result<(u64, Sequence), Trap> {
        let Some(page) = self.ram.page_of(pa) else {
            // Nothing but RAM holds code on this platform.
            return Err(self.raise(vector::GP, Some(0)));
        };
        let offset = (pa & 0xfff) as usize;
        self.page_present(page)?;
        let host = self.ram_host.add(page as usize * 4096).cast_const();
        // A copy: decoding wants a stable slice, and device threads may write to the page.
        let mut bytes = [0u8; 4096];
        let len = 4096 - offset;
        ptr::copy_nonoverlapping(host.add(offset), bytes.as_mut_ptr(), len);
        if let Some(sequence) = decode::sequence(&bytes[..len], offset, max) {
            return Ok((page, sequence));
        }
        // The first instruction goes on in the next page.
        let second_pa = self.fetch((rip & !0xfff).wrapping_add(4096))?;
        let Some(second) = self.ram.page_of(second_pa) else {
            return Err(self.raise(vector::GP, Some(0)));
        };
        self.page_present(second)?;
        let host = self.ram_host.add(second as usize * 4096).cast_const();
        ptr::copy_nonoverlapping(host, bytes.as_mut_ptr().add(len), 15);
        let mut sequence = decode::crossing(&bytes[..len + 15], offset, second_pa);
        sequence.second_page = Some(second);
        Ok((page, sequence))
    }
}
