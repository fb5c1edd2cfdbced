//! Address translation: the TLBs' bookkeeping (Intel SDM vol. 3, chapters 4.10 and 4.1).
//!
//! `walk` reads the guest's page tables, `slow` does what the fast path in `mem` could not. Two rules keep stale
//! translations out: whatever enters a TLB that a CR3 write must drop is marked in a bitmap, so that a CR3 write costs
//! what was used since the last one; and decoded code reached by user-mode addresses carries a generation number
//! in its jump-cache key, so that a CR3 write forgets it by counting up.

mod slow;
mod walk;

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use walk::access;

use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::{GuestRam, PageFlags};
use crate::cpu::{Cpu, JumpEntry, Stop, Trap};
use crate::mem::{PAGE_MASK, TLB_SIZE, TlbEntry};

/// Bits of [`TlbEntry::pa`] beside [`TlbEntry::GLOBAL`]: the guest's tables permit writing and D is set, so a missing
/// write tag is ours (a clean page, or one with decoded code) ...
const WRITABLE: u64 = 2;
/// ... and the translation is part of a large page.
const LARGE: u64 = 4;

const ITLB_SIZE: usize = 256;
/// User-mode bit of [`Cpu::mode_key`]; below it are the generation's bits.
const USER_KEY: u64 = 1 << 62;
const GENERATION_SHIFT: u32 = 48;
/// The generation stays below bit 60, so that no key can equal [`JumpEntry::EMPTY`]'s.
const GENERATIONS: u64 = 1 << 12;
const LARGE_PAGE: u64 = 1 << 21;
/// Size of each filter of executed pages; a power of two.
const EXECUTED_BITS: usize = 2048;

/// A translation for execution. `key` is the page's address XOR the mode's key.
#[derive(Clone, Copy)]
struct ItlbEntry {
    key: u64,
    pa: u64,
}

impl ItlbEntry {
    /// Not page-aligned: matches nothing.
    const EMPTY: ItlbEntry = ItlbEntry { key: u64::MAX, pa: 0 };
}

/// What the MMU keeps beside the TLBs themselves.
pub(crate) struct Mmu {
    /// Guest-physical addresses below this are their own RAM offsets.
    low_bytes: u64,
    /// First element of [`GuestRam::flags`].
    flags: *const AtomicU8,
    /// Entries of each TLB that a CR3 write must drop, one bit each.
    local: [[u64; TLB_SIZE / 64]; 2],
    itlb: Box<[ItlbEntry; ITLB_SIZE]>,
    /// Counts CR3 writes, for user-mode keys.
    generation: u64,
    /// Supervisor code ran from a page that is not global: CR3 writes must drop its keys too.
    local_code: bool,
    /// Bloom filters of the pages that the supervisor and the user fetched from since their keys were last dropped.
    executed: [[u64; EXECUTED_BITS / 64]; 2],
}

impl Mmu {
    /// Looks at `ram`'s layout; RAM addresses must grow with page indices.
    pub(crate) fn new(ram: &dyn GuestRam) -> Mmu {
        // The largest prefix of pages that lie at their own index.
        let (mut low, mut high) = (0, ram.pages());
        while low < high {
            let mid = low + (high - low) / 2;
            if ram.address_of(mid) == mid << 12 { low = mid + 1 } else { high = mid }
        }
        Mmu {
            low_bytes: low << 12,
            flags: ram.flags().as_ptr(),
            local: [[0; TLB_SIZE / 64]; 2],
            itlb: Box::new([ItlbEntry::EMPTY; ITLB_SIZE]),
            generation: 0,
            local_code: false,
            executed: [[0; EXECUTED_BITS / 64]; 2],
        }
    }

    /// A filter's word and bit for the page or large page at `va`.
    fn executed_bit(va: u64, large: bool) -> (usize, u64) {
        let page = if large { !(va >> 21) } else { va >> 12 };
        let h = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - EXECUTED_BITS.trailing_zeros());
        ((h >> 6) as usize, 1 << (h & 63))
    }

    fn mark_executed(&mut self, user: bool, va: u64, large: bool) {
        let (word, bit) = Self::executed_bit(va, large);
        self.executed[usize::from(user)][word] |= bit;
    }

    fn was_executed(&self, user: bool, va: u64) -> bool {
        [false, true].into_iter().any(|large| {
            let (word, bit) = Self::executed_bit(va, large);
            self.executed[usize::from(user)][word] & bit != 0
        })
    }
}

/// Whether an address is canonical for 48-bit linear addresses.
#[inline(always)]
pub(crate) fn canonical(va: u64) -> bool {
    ((va << 16) as i64 >> 16) as u64 == va
}

impl Cpu {
    /// The flag byte of a RAM page.
    ///
    /// # Safety
    /// `page` is below the number of RAM pages.
    #[inline(always)]
    unsafe fn page_flags(&self, page: u64) -> &AtomicU8 {
        &*self.mmu.flags.add(page as usize)
    }

    /// The RAM page at a guest-physical address.
    #[inline(always)]
    fn ram_page(&self, pa: u64) -> Option<u64> {
        if pa < self.mmu.low_bytes {
            Some(pa >> 12)
        } else {
            self.ram.page_of(pa).filter(|p| *p < self.ram.pages())
        }
    }

    /// Makes a RAM page's content present and returns its flags.
    #[inline(always)]
    pub(crate) unsafe fn page_present(&mut self, page: u64) -> Result<u8, Trap> {
        let flags = self.page_flags(page).load(Ordering::Acquire);
        if flags & PageFlags::PRESENT != 0 { Ok(flags) } else { self.bring_in(page) }
    }

    #[cold]
    unsafe fn bring_in(&mut self, page: u64) -> Result<u8, Trap> {
        match self.ram.fill(page) {
            Ok(()) => Ok(self.page_flags(page).load(Ordering::Acquire)),
            Err(e) => {
                self.stop = Stop::RamFault;
                self.ram_error = e;
                Err(Trap)
            }
        }
    }

    /// Marks a RAM page as changed, before it is.
    #[inline(always)]
    unsafe fn mark_dirty(&self, page: u64, flags: u8) {
        if flags & PageFlags::DIRTY == 0 {
            if flags & PageFlags::CAPTURE != 0 {
                self.ram.preserve(page);
            }
            self.page_flags(page).fetch_or(PageFlags::DIRTY, Ordering::Relaxed);
        }
    }

    /// Sets the privilege level, and with it the TLB and the key of jump-cache entries.
    #[inline(always)]
    pub(crate) fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        let user = cpl == 3;
        self.dtlb = self.tlb[usize::from(user)].as_mut_ptr();
        self.mode_key = if user { USER_KEY | self.mmu.generation << GENERATION_SHIFT } else { 0 };
    }

    /// Drops translations: all of them, or (a CR3 write) those that are not global.
    pub(crate) fn flush_tlb(&mut self, global: bool) {
        if global {
            for tlb in &mut self.tlb {
                tlb.fill(TlbEntry::EMPTY);
            }
            self.mmu.local = [[0; TLB_SIZE / 64]; 2];
            self.large = [None; 2];
            self.forget_code_addresses();
            return;
        }
        for (tlb, local) in self.tlb.iter_mut().zip(&mut self.mmu.local) {
            for (i, word) in local.iter_mut().enumerate() {
                let mut bits = std::mem::take(word);
                while bits != 0 {
                    tlb[i * 64 + bits.trailing_zeros() as usize] = TlbEntry::EMPTY;
                    bits &= bits - 1;
                }
            }
        }
        if self.mmu.local_code {
            self.forget_code_addresses();
        } else {
            self.forget_user_code_addresses();
        }
    }

    /// Drops what is known about which user-mode address holds which code.
    fn forget_user_code_addresses(&mut self) {
        self.mmu.generation += 1;
        self.mmu.executed[1] = [0; EXECUTED_BITS / 64];
        if self.mmu.generation == GENERATIONS {
            self.forget_code_addresses();
        }
        self.set_cpl(self.cpl);
    }

    /// Drops what is known about which virtual address holds which code.
    fn forget_code_addresses(&mut self) {
        self.jump_cache.fill(JumpEntry::EMPTY);
        self.mmu.itlb.fill(ItlbEntry::EMPTY);
        self.mmu.executed = [[0; EXECUTED_BITS / 64]; 2];
        self.mmu.local_code = false;
        self.mmu.generation = 0;
        self.set_cpl(self.cpl);
    }

    /// INVLPG: drops the translations of the page that holds `va`, whatever its size, global or not.
    pub(crate) fn invlpg(&mut self, va: u64) {
        if !canonical(va) {
            return;
        }
        let page = va & !PAGE_MASK;
        for tlb in &mut self.tlb {
            let e = &mut tlb[(va >> 12) as usize & (TLB_SIZE - 1)];
            if e.read_tag == page || e.write_tag == page {
                *e = TlbEntry::EMPTY;
            }
        }
        if let Some((base, mask)) = self.large[(va >> 63) as usize]
            && va & mask == base
        {
            for e in self.tlb.iter_mut().flat_map(|tlb| tlb.iter_mut()) {
                if e.pa & LARGE != 0 && (e.read_tag ^ va) < LARGE_PAGE {
                    *e = TlbEntry::EMPTY;
                }
            }
        }
        if self.mmu.was_executed(false, va) {
            self.forget_code_addresses();
        } else if self.mmu.was_executed(true, va) {
            self.forget_user_code_addresses();
        }
    }

    /// Notes that the large page around `va` is in use.
    fn note_large(&mut self, va: u64) {
        let va = va & !(LARGE_PAGE - 1);
        let slot = &mut self.large[(va >> 63) as usize];
        *slot = Some(match *slot {
            None => (va, !(LARGE_PAGE - 1)),
            Some((base, mask)) => {
                let differ = (base ^ va) & mask;
                let mask = if differ == 0 { mask } else { !(u64::MAX >> differ.leading_zeros()) };
                (base & mask, mask)
            }
        });
    }

    /// Takes away the write tags of a RAM page, so that the next write to it comes through the slow path.
    pub(crate) fn forget_writable(&mut self, page: u64) {
        let pa = self.ram.address_of(page);
        for e in self.tlb.iter_mut().flat_map(|tlb| tlb.iter_mut()) {
            if e.pa & !PAGE_MASK == pa {
                e.write_tag = TlbEntry::NO_TAG;
            }
        }
    }

    /// Takes away all write tags: after the pages' DIRTY flags were cleared, the next write to each sets it again.
    pub fn forget_all_writable(&mut self) {
        for e in self.tlb.iter_mut().flat_map(|tlb| tlb.iter_mut()) {
            e.write_tag = TlbEntry::NO_TAG;
        }
    }
}
