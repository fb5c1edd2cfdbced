//! Accesses that the TLB's fast path could not do: misses, page crossings, MMIO, absent, clean and code pages.

use std::sync::atomic::Ordering;

use super::walk::access::{FETCH, USER, WRITE};
use super::{ITLB_SIZE, ItlbEntry, LARGE, WRITABLE};
use crate::bus::PageFlags;
use crate::cpu::{Cpu, Stop, Trap};
use crate::mem::{Int, PAGE_MASK, TLB_SIZE, TlbEntry};

/// Where an access goes.
#[derive(Clone, Copy)]
enum Place {
    /// Host memory.
    Ram(*mut u8),
    /// Host memory, in a page (its index) with decoded code; for writes only.
    Code(*mut u8, u64),
    /// A guest-physical address that is not RAM.
    Device(u64),
}

/// Reads 1 to 8 bytes of host memory.
#[inline(always)]
unsafe fn read_bytes(p: *const u8, bytes: u64) -> u64 {
    match bytes {
        8 => p.cast::<u64>().read_unaligned(),
        4 => u64::from(p.cast::<u32>().read_unaligned()),
        2 => u64::from(p.cast::<u16>().read_unaligned()),
        _ => {
            let mut v = [0; 8];
            std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), bytes as usize);
            u64::from_le_bytes(v)
        }
    }
}

/// Writes 1 to 8 bytes of host memory.
#[inline(always)]
unsafe fn write_bytes(p: *mut u8, bytes: u64, v: u64) {
    match bytes {
        8 => p.cast::<u64>().write_unaligned(v),
        4 => p.cast::<u32>().write_unaligned(v as u32),
        2 => p.cast::<u16>().write_unaligned(v as u16),
        _ => std::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), p, bytes as usize),
    }
}

/// How many of `bytes` bytes at `va` are in the first page.
#[inline(always)]
fn first_part(va: u64, bytes: u64) -> u64 {
    bytes.min(0x1000 - (va & PAGE_MASK))
}

/// The largest naturally aligned access of at most `bytes` bytes at `pa`.
fn aligned_part(pa: u64, bytes: u64) -> u64 {
    let mut n = 8;
    while n > bytes || pa & (n - 1) != 0 {
        n /= 2;
    }
    n
}

impl Cpu {
    /// Finds where `va` leads for reading or writing, filling the TLB.
    unsafe fn place(&mut self, va: u64, write: bool, user: bool) -> Result<Place, Trap> {
        let page_va = va & !PAGE_MASK;
        let index = (va >> 12) as usize & (TLB_SIZE - 1);
        let e = *self.tlb[usize::from(user)].get_unchecked(index);
        if e.read_tag == page_va {
            let p = e.addend.wrapping_add(va) as *mut u8;
            if !write || e.write_tag == page_va {
                return Ok(Place::Ram(p));
            }
            if e.pa & WRITABLE != 0 {
                // The guest permits it; it is we who wanted to know.
                let page = (p as usize - self.ram_host as usize) as u64 >> 12;
                let flags = self.page_flags(page).load(Ordering::Acquire);
                if flags & PageFlags::CODE != 0 {
                    self.mark_dirty(page, flags);
                    return Ok(Place::Code(p, page));
                }
                self.mark_dirty(page, flags);
                self.tlb[usize::from(user)].get_unchecked_mut(index).write_tag = page_va;
                return Ok(Place::Ram(p));
            }
        }
        let access = if write { WRITE } else { 0 } | if user { USER } else { 0 };
        let leaf = self.walk(va, access)?;
        let Some(page) = self.ram_page(leaf.pa) else { return Ok(Place::Device(leaf.pa | va & PAGE_MASK)) };
        let mut flags = self.page_present(page)?;
        let host = self.ram_host.add((page << 12) as usize);
        if write && flags & PageFlags::DIRTY == 0 {
            self.mark_dirty(page, flags);
            flags |= PageFlags::DIRTY;
        }
        // A read takes the write tag along when a write would change nothing but the data.
        let tag_write = leaf.writable && flags & (PageFlags::DIRTY | PageFlags::CODE) == PageFlags::DIRTY;
        *self.tlb[usize::from(user)].get_unchecked_mut(index) = TlbEntry {
            read_tag: page_va,
            write_tag: if tag_write { page_va } else { TlbEntry::NO_TAG },
            addend: (host as u64).wrapping_sub(page_va),
            pa: leaf.pa
                | if leaf.global { TlbEntry::GLOBAL } else { 0 }
                | if leaf.writable { WRITABLE } else { 0 }
                | if leaf.large { LARGE } else { 0 },
        };
        if user || !leaf.global {
            self.mmu.local[usize::from(user)][index / 64] |= 1 << (index % 64);
        }
        if leaf.large {
            self.note_large(va);
        }
        let p = host.add((va & PAGE_MASK) as usize);
        Ok(if write && !tag_write { Place::Code(p, page) } else { Place::Ram(p) })
    }

    /// Before a write to a page with decoded code: drops what the write would make stale.
    pub(super) unsafe fn write_to_code(&mut self, page: u64, offset: u64, bytes: u64) -> Result<(), Trap> {
        if !self.code.holds(page, offset, bytes) {
            return Ok(());
        }
        if !self.alone && self.executing_page() == Some(page) {
            self.stop = Stop::SelfModifying;
            return Err(Trap);
        }
        self.invalidate_page(page);
        Ok(())
    }

    /// Reads up to 8 bytes within one page.
    unsafe fn read_part(&mut self, va: u64, bytes: u64, user: bool) -> Result<u64, Trap> {
        match self.place(va, false, user)? {
            Place::Ram(p) | Place::Code(p, _) => Ok(read_bytes(p, bytes)),
            Place::Device(pa) => Ok(self.read_device(pa, bytes)),
        }
    }

    /// Makes sure that a write within one page will succeed.
    unsafe fn probe_part(&mut self, va: u64, bytes: u64, user: bool) -> Result<Place, Trap> {
        let place = self.place(va, true, user)?;
        if let Place::Code(_, page) = place {
            self.write_to_code(page, va & PAGE_MASK, bytes)?;
        }
        Ok(place)
    }

    unsafe fn write_place(&mut self, place: Place, bytes: u64, v: u64) {
        match place {
            Place::Ram(p) | Place::Code(p, _) => write_bytes(p, bytes, v),
            Place::Device(pa) => self.write_device(pa, bytes, v),
        }
    }

    #[cold]
    unsafe fn read_device(&mut self, pa: u64, bytes: u64) -> u64 {
        let mut data = [0xff; 8];
        let mut done = 0;
        while done < bytes {
            let n = aligned_part(pa + done, bytes - done);
            if let Some(mut bus) = self.bus {
                bus.as_mut().mmio_read(pa + done, &mut data[done as usize..(done + n) as usize]);
            }
            done += n;
        }
        u64::from_le_bytes(data) & (u64::MAX >> (64 - 8 * bytes))
    }

    #[cold]
    unsafe fn write_device(&mut self, pa: u64, bytes: u64, v: u64) {
        let data = v.to_le_bytes();
        let mut done = 0;
        while done < bytes {
            let n = aligned_part(pa + done, bytes - done);
            if let Some(mut bus) = self.bus {
                bus.as_mut().mmio_write(pa + done, &data[done as usize..(done + n) as usize]);
            }
            done += n;
        }
    }

    /// Reads 1 to 8 bytes with the given privilege.
    unsafe fn load_at(&mut self, va: u64, bytes: u64, user: bool) -> Result<u64, Trap> {
        let n = first_part(va, bytes);
        if n == bytes {
            return self.read_part(va, bytes, user);
        }
        // Both pages must be there before a device behind either sees the access.
        self.place(va, false, user)?;
        self.place(va.wrapping_add(n), false, user)?;
        let low = self.read_part(va, n, user)?;
        let high = self.read_part(va.wrapping_add(n), bytes - n, user)?;
        Ok(low | high << (8 * n))
    }

    /// Writes 1 to 8 bytes with the given privilege; nothing is written when any part faults.
    unsafe fn store_at(&mut self, va: u64, bytes: u64, v: u64, user: bool) -> Result<(), Trap> {
        let n = first_part(va, bytes);
        let low = self.probe_part(va, n, user)?;
        if n < bytes {
            let high = self.probe_part(va.wrapping_add(n), bytes - n, user)?;
            self.write_place(high, bytes - n, v >> (8 * n));
        }
        self.write_place(low, n, v);
        Ok(())
    }

    /// Reads what [`Cpu::load`] could not: 1 to 8 bytes with the current privilege.
    #[inline(never)]
    pub(crate) unsafe fn load_slow(&mut self, va: u64, bytes: u64) -> Result<u64, Trap> {
        self.load_at(va, bytes, self.cpl == 3)
    }

    /// Writes what [`Cpu::store`] could not: 1 to 8 bytes with the current privilege.
    #[inline(never)]
    pub(crate) unsafe fn store_slow(&mut self, va: u64, bytes: u64, v: u64) -> Result<(), Trap> {
        self.store_at(va, bytes, v, self.cpl == 3)
    }

    /// Faults as a write of `bytes` bytes (at most a page) would; without effect otherwise.
    #[inline(never)]
    pub(crate) unsafe fn probe_write(&mut self, va: u64, bytes: u64) -> Result<(), Trap> {
        self.probe_write_as(va, bytes, self.cpl == 3)
    }

    /// [`Cpu::probe_write`] with the given privilege.
    pub(crate) unsafe fn probe_write_as(&mut self, va: u64, bytes: u64, user: bool) -> Result<(), Trap> {
        let n = first_part(va, bytes);
        self.probe_part(va, n, user)?;
        if n < bytes {
            self.probe_part(va.wrapping_add(n), bytes - n, user)?;
        }
        Ok(())
    }

    /// Translates for execution; returns the guest-physical address.
    #[inline]
    pub(crate) unsafe fn fetch(&mut self, va: u64) -> Result<u64, Trap> {
        let key = (va & !PAGE_MASK) ^ self.mode_key;
        let e = *self.mmu.itlb.get_unchecked((va >> 12) as usize & (ITLB_SIZE - 1));
        if e.key == key { Ok(e.pa | va & PAGE_MASK) } else { self.fetch_slow(va, key) }
    }

    #[inline(never)]
    unsafe fn fetch_slow(&mut self, va: u64, key: u64) -> Result<u64, Trap> {
        let user = self.cpl == 3;
        let leaf = self.walk(va, FETCH | if user { USER } else { 0 })?;
        if let Some(page) = self.ram_page(leaf.pa) {
            self.page_present(page)?;
        }
        *self.mmu.itlb.get_unchecked_mut((va >> 12) as usize & (ITLB_SIZE - 1)) =
            ItlbEntry { key, pa: leaf.pa };
        self.mmu.mark_executed(user, va, leaf.large);
        if leaf.large {
            self.note_large(va);
        }
        self.mmu.local_code |= !user && !leaf.global;
        Ok(leaf.pa | va & PAGE_MASK)
    }

    /// Host pointer to `va`, good until the page's end. `None`: a device, or (for writing) a page with decoded code.
    #[inline]
    pub(crate) unsafe fn translate_ptr(&mut self, va: u64, write: bool) -> Result<Option<*mut u8>, Trap> {
        match self.place(va, write, self.cpl == 3)? {
            Place::Ram(p) => Ok(Some(p)),
            Place::Code(..) | Place::Device(_) => Ok(None),
        }
    }

    /// Reads with supervisor privilege: descriptor tables, TSS.
    #[inline(always)]
    pub(crate) unsafe fn load_sys<T: Int>(&mut self, va: u64) -> Result<T, Trap> {
        let e = self.tlb[0].get_unchecked((va >> 12) as usize & (TLB_SIZE - 1));
        if va.wrapping_add(T::BYTES - 1) & !PAGE_MASK == e.read_tag {
            return Ok((e.addend.wrapping_add(va) as *const T).read_unaligned());
        }
        self.load_at(va, T::BYTES, false).map(T::from_u64)
    }

    /// Writes with supervisor privilege: descriptor tables.
    #[inline(always)]
    pub(crate) unsafe fn store_sys<T: Int>(&mut self, va: u64, v: T) -> Result<(), Trap> {
        let e = self.tlb[0].get_unchecked((va >> 12) as usize & (TLB_SIZE - 1));
        if va.wrapping_add(T::BYTES - 1) & !PAGE_MASK == e.write_tag {
            (e.addend.wrapping_add(va) as *mut T).write_unaligned(v);
            return Ok(());
        }
        self.store_at(va, T::BYTES, v.to_u64(), false)
    }

    /// Writes consecutive words with the given privilege (a stack frame); all of them or none.
    #[inline]
    pub(crate) unsafe fn store_frame(&mut self, va: u64, words: &[u64], user: bool) -> Result<(), Trap> {
        let bytes = words.len() as u64 * 8;
        let e = self.tlb[usize::from(user)].get_unchecked((va >> 12) as usize & (TLB_SIZE - 1));
        if va.wrapping_add(bytes - 1) & !PAGE_MASK == e.write_tag {
            let p = e.addend.wrapping_add(va) as *mut u64;
            for (i, word) in words.iter().enumerate() {
                p.add(i).write_unaligned(*word);
            }
            return Ok(());
        }
        // In the order of pushes, so that the right address is reported.
        for i in (0..words.len() as u64).rev() {
            self.probe_write_as(va.wrapping_add(i * 8), 8, user)?;
        }
        for (i, word) in words.iter().enumerate() {
            self.store_at(va.wrapping_add(i as u64 * 8), 8, *word, user)?;
        }
        Ok(())
    }
}
