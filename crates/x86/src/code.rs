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

/// Bytes of the longest sequence.
const MAX_BYTES: usize = decode::MAX_INSTRUCTIONS * decode::MAX_LENGTH;

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

pub(crate) type AddressMap<V> = HashMap<u64, V, BuildHasherDefault<AddressHasher>>;

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
        let page = self.code_page(pa)?;
        let offset = pa & 0xfff;
        if let Some((ops, bytes)) = self.shared_sequence(page, offset) {
            return Ok(self.keep(pa, page, ops, bytes));
        }
        let sequence = self.decode_at(rip, pa, page, decode::MAX_INSTRUCTIONS)?;
        self.diagnostics.sequences_decoded += 1;
        if let Some(second) = sequence.second_page {
            let other = self.code.pages.entry(second).or_default();
            other.lines |= lines(0, offset + sequence.bytes - 4096);
            if second != page {
                other.crossing.push(page);
            }
        }
        Ok(self.keep(pa, page, sequence.ops.into_boxed_slice(), sequence.bytes))
    }

    /// The page of an instruction, present and marked as holding code: from here on, a write to it is noticed.
    unsafe fn code_page(&mut self, pa: u64) -> Result<u64, Trap> {
        let Some(page) = self.ram.page_of(pa) else {
            // Nothing but RAM holds code on this platform.
            return Err(self.raise(vector::GP, Some(0)));
        };
        self.page_present(page)?;
        self.mark_code(page);
        Ok(page)
    }

    /// Sets [`PageFlags::CODE`]. Before the page's bytes are looked at: a device that writes them afterwards reports it.
    fn mark_code(&mut self, page: u64) {
        let before = self.ram.flags()[page as usize].fetch_or(PageFlags::CODE, Ordering::AcqRel);
        // A page with CODE has no write translation already.
        if before & PageFlags::CODE == 0 {
            self.forget_writable(page);
        }
    }

    /// Adds a sequence to the cache.
    fn keep(&mut self, pa: u64, page: u64, ops: Box<[Op]>, bytes: u64) -> *const Op {
        let first = ops.as_ptr();
        self.code.bytes += size_of_val(&*ops);
        let code = self.code.pages.entry(page).or_default();
        code.lines |= lines(pa & 0xfff, bytes);
        code.sequences.push(ops);
        code.starts.push(pa);
        self.code.starts.insert(pa, first);
        first
    }

    /// Whether the page, marked as code, is still that of the sealed image.
    fn is_sealed(&self, page: u64) -> bool {
        self.ram.flags()[page as usize].load(Ordering::Acquire) & PageFlags::DIRTY == 0
    }

    /// The sequence at `offset` of the page, if another CPU over the same image has decoded it and it holds here.
    fn shared_sequence(&self, page: u64, offset: u64) -> Option<(Box<[Op]>, u64)> {
        let shared = self.ram.shared_code()?;
        if self.is_sealed(page) { shared.get(page << 12 | offset) } else { None }
    }

    /// Leaves a sequence to other CPUs over the same image, if `code`, which it was decoded from, is the image's.
    fn share(&self, page: u64, offset: usize, code: &[u8], ops: &[Op]) {
        let Some(shared) = self.ram.shared_code() else { return };
        let mut image = [0u8; MAX_BYTES];
        let Some(image) = image.get_mut(..code.len()) else { return };
        // A device may have written the page a moment ago, unnoticed yet: the image itself decides.
        if self.is_sealed(page) && self.ram.sealed(page, offset, image) && image == code {
            shared.put(page << 12 | offset as u64, ops, code.len() as u64);
        }
    }

    /// Decodes the one instruction at `rip` outside the cache, into `self.alone_ops`.
    pub(crate) unsafe fn lookup_alone(&mut self) -> Result<*const Op, Trap> {
        let rip = self.rip;
        let pa = self.fetch(rip)?;
        let Some(page) = self.ram.page_of(pa) else {
            return Err(self.raise(vector::GP, Some(0)));
        };
        self.page_present(page)?;
        let sequence = self.decode_at(rip, pa, page, 1)?;
        self.alone_ops = sequence.ops;
        // However it branches, it comes back to the run loop.
        self.icount_limit = 0;
        Ok(self.alone_ops.as_ptr())
    }

    /// Decodes up to `max` instructions at `pa` in `page`, which is present. One that ends in the next page comes alone;
    /// that page is marked as holding code, if `page` is.
    unsafe fn decode_at(&mut self, rip: u64, pa: u64, page: u64, max: usize) -> Result<Sequence, Trap> {
        let offset = (pa & 0xfff) as usize;
        let host = self.ram_host.add(page as usize * 4096).cast_const();
        // A copy: decoding wants a stable slice, and device threads may write to the page.
        let mut bytes = [0u8; MAX_BYTES];
        let len = (4096 - offset).min(MAX_BYTES);
        ptr::copy_nonoverlapping(host.add(offset), bytes.as_mut_ptr(), len);
        if let Some(sequence) = decode::sequence(&bytes[..len], offset, max) {
            if max > 1 {
                self.share(page, offset, &bytes[..sequence.bytes as usize], &sequence.ops);
            }
            return Ok(sequence);
        }
        // The first instruction goes on in the next page.
        let second_pa = self.fetch((rip & !0xfff).wrapping_add(4096))?;
        let second = if max > 1 {
            self.code_page(second_pa)?
        } else {
            let Some(second) = self.ram.page_of(second_pa) else {
                return Err(self.raise(vector::GP, Some(0)));
            };
            self.page_present(second)?;
            second
        };
        let host = self.ram_host.add(second as usize * 4096).cast_const();
        ptr::copy_nonoverlapping(host, bytes.as_mut_ptr().add(len), decode::MAX_LENGTH);
        let mut sequence = decode::crossing(&bytes[..len + decode::MAX_LENGTH], offset, second_pa);
        sequence.second_page = Some(second);
        Ok(sequence)
    }
}
