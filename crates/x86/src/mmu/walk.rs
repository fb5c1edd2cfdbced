//! The page walk: 4-level paging with 4 KiB and 2 MiB pages (Intel SDM vol. 3, 4.5 to 4.8).
//!
//! 1 GiB pages are not offered by CPUID, so PS in a PDPTE is a reserved bit; MAXPHYADDR is 40.

use super::canonical;
use crate::bus::PageFlags;
use crate::cpu::{Cpu, Stop, Trap, TrapInfo, vector};
use crate::system::{cr0, efer};

/// Error code bits of page faults; the access kinds among them double as the description of an access.
pub(crate) mod access {
    pub(crate) const PRESENT: u32 = 1;
    pub(crate) const WRITE: u32 = 2;
    pub(crate) const USER: u32 = 4;
    pub(crate) const RESERVED: u32 = 8;
    pub(crate) const FETCH: u32 = 16;
}

/// Page table entry bits.
mod pte {
    pub(super) const P: u64 = 1;
    pub(super) const W: u64 = 1 << 1;
    pub(super) const U: u64 = 1 << 2;
    pub(super) const A: u64 = 1 << 5;
    pub(super) const D: u64 = 1 << 6;
    pub(super) const PS: u64 = 1 << 7;
    pub(super) const G: u64 = 1 << 8;
    pub(super) const NX: u64 = 1 << 63;
    /// Bits 12 to 39: the address of a table or page.
    pub(super) const ADDRESS: u64 = 0x00ff_ffff_f000;
    /// Bits 40 to 51: beyond MAXPHYADDR.
    pub(super) const BEYOND: u64 = 0x000f_ff00_0000_0000;
    /// Bits 13 to 20: below a large page's address.
    pub(super) const LARGE_RESERVED: u64 = 0x001f_e000;
}

/// The result of a page walk for one access.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    /// Guest-physical address of the 4 KiB page.
    pub(super) pa: u64,
    pub(super) global: bool,
    pub(super) large: bool,
    /// A write with the same privilege needs no further walk: permitted, and D is set.
    pub(super) writable: bool,
}

impl Cpu {
    /// Raises #PF.
    #[cold]
    fn page_fault(&mut self, va: u64, error: u32) -> Trap {
        // I/D is reported only when execution can be disabled at all (SDM vol. 3, 4.7).
        let fetch = if self.ctl.efer & efer::NXE == 0 { access::FETCH } else { 0 };
        self.trap = TrapInfo { vector: vector::PF, error: Some(error & !fetch), address: va };
        self.stop = Stop::Exception;
        Trap
    }

    /// Host address of a page table entry, or `None` where there is no RAM.
    #[inline(always)]
    unsafe fn entry_ptr(&mut self, pa: u64) -> Result<Option<*mut u64>, Trap> {
        let Some(page) = self.ram_page(pa) else { return Ok(None) };
        self.page_present(page)?;
        Ok(Some(self.ram_host.add((page << 12 | pa & 0xfff) as usize).cast()))
    }

    /// Sets A or D in a page table entry.
    #[cold]
    unsafe fn set_entry_bits(&mut self, pa: u64, bits: u64) -> Result<(), Trap> {
        let Some(page) = self.ram_page(pa) else { return Ok(()) };
        let flags = self.page_present(page)?;
        if flags & PageFlags::CODE != 0 && self.code.holds(page, pa & 0xfff, 8) {
            // A table that is also code: the sequence being executed, even if it is of this page, may finish.
            self.invalidate_page(page);
        }
        self.mark_dirty(page, flags);
        let p = self.ram_host.add((page << 12 | pa & 0xfff) as usize).cast::<u64>();
        p.write(p.read() | bits);
        Ok(())
    }

    /// Translates `va` for an access (a set of [`access`] bits), setting A and D.
    pub(super) unsafe fn walk(&mut self, va: u64, access: u32) -> Result<Leaf, Trap> {
        if !canonical(va) {
            return Err(self.raise(vector::GP, Some(0)));
        }
        let reserved = pte::BEYOND | if self.ctl.efer & efer::NXE == 0 { pte::NX } else { 0 };
        let mut table = self.ctl.cr3 & pte::ADDRESS;
        let mut allowed = pte::W | pte::U;
        let mut nx = 0;
        let mut shift = 39;
        loop {
            let at = table + (va >> shift & 0x1ff) * 8;
            let entry = match self.entry_ptr(at)? {
                Some(p) => p.read(),
                None => 0,
            };
            if entry & pte::P == 0 {
                return Err(self.page_fault(va, access));
            }
            let leaf = shift == 12 || entry & pte::PS != 0;
            let mut bad = entry & reserved;
            if leaf && shift != 12 {
                bad |= if shift == 21 { entry & pte::LARGE_RESERVED } else { pte::PS };
            }
            if bad != 0 {
                return Err(self.page_fault(va, access | access::PRESENT | access::RESERVED));
            }
            allowed &= entry;
            nx |= entry;
            if !leaf {
                if entry & pte::A == 0 {
                    self.set_entry_bits(at, pte::A)?;
                }
                table = entry & pte::ADDRESS;
                shift -= 9;
                continue;
            }
            let write = if access & access::USER != 0 {
                if allowed & pte::U == 0 {
                    return Err(self.page_fault(va, access | access::PRESENT));
                }
                allowed & pte::W != 0
            } else {
                allowed & pte::W != 0 || self.ctl.cr0 & cr0::WP == 0
            };
            if access & access::WRITE != 0 && !write || access & access::FETCH != 0 && nx & pte::NX != 0 {
                return Err(self.page_fault(va, access | access::PRESENT));
            }
            let set = pte::A | if access & access::WRITE != 0 { pte::D } else { 0 };
            if entry & set != set {
                self.set_entry_bits(at, set)?;
            }
            let large = shift == 21;
            let inside = if large { va & 0x001f_f000 } else { 0 };
            let address = if large { entry & pte::ADDRESS & !0x001f_ffff } else { entry & pte::ADDRESS };
            return Ok(Leaf {
                pa: address | inside,
                global: entry & pte::G != 0 && self.ctl.cr4 & crate::system::cr4::PGE != 0,
                large,
                writable: write && (entry | set) & pte::D != 0,
            });
        }
    }
}
