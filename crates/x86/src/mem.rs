//! Memory access: the software TLB's fast path.
//!
//! A TLB entry holds for one virtual page the tags that a read and a write must match and the distance to host memory.
//! Absent, clean, code-holding and supervisor pages simply do not match, so the fast path has one comparison and no
//! flags; everything else is `mmu`'s.

use crate::cpu::{Cpu, Trap, Xmm};

/// Entries per TLB; a power of two.
pub(crate) const TLB_SIZE: usize = 512;
pub(crate) const PAGE_MASK: u64 = 0xfff;

/// One translation. A tag is the page's virtual address, or [`TlbEntry::NO_TAG`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct TlbEntry {
    pub(crate) read_tag: u64,
    pub(crate) write_tag: u64,
    /// Host address minus guest-virtual address (wrapping).
    pub(crate) addend: u64,
    /// Guest-physical address of the page; bit 0: global.
    pub(crate) pa: u64,
}

impl TlbEntry {
    pub(crate) const NO_TAG: u64 = u64::MAX;
    pub(crate) const EMPTY: TlbEntry =
        TlbEntry { read_tag: Self::NO_TAG, write_tag: Self::NO_TAG, addend: 0, pa: 0 };
    pub(crate) const GLOBAL: u64 = 1;
}

mod sealed {
    pub(crate) trait Sealed {}
}

/// A guest operand: u8, u16, u32, u64.
pub(crate) trait Int: Copy + sealed::Sealed + 'static {
    const BYTES: u64;
    const BITS: u32;
    fn from_u64(v: u64) -> Self;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn sext(self) -> u64;
    /// Sum with carry-in, CF, OF.
    fn add_carry(self, b: Self, carry: bool) -> (Self, bool, bool);
    /// Difference with borrow-in, CF, OF.
    fn sub_borrow(self, b: Self, borrow: bool) -> (Self, bool, bool);
}

macro_rules! int {
    ($($u:ty, $i:ty);*) => {$(
        impl sealed::Sealed for $u {}
        impl Int for $u {
            const BYTES: u64 = size_of::<$u>() as u64;
            const BITS: u32 = <$u>::BITS;
            #[inline(always)]
            fn from_u64(v: u64) -> Self { v as $u }
            #[inline(always)]
            fn to_u64(self) -> u64 { u64::from(self) }
            #[inline(always)]
            fn sext(self) -> u64 { self as $i as i64 as u64 }
            #[inline(always)]
            fn add_carry(self, b: Self, carry: bool) -> (Self, bool, bool) {
                let (r1, c1) = self.overflowing_add(b);
                let (r, c2) = r1.overflowing_add(<$u>::from(carry));
                (r, c1 | c2, ((self ^ r) & (b ^ r)) >> (<$u>::BITS - 1) != 0)
            }
            #[inline(always)]
            fn sub_borrow(self, b: Self, borrow: bool) -> (Self, bool, bool) {
                let (r1, c1) = self.overflowing_sub(b);
                let (r, c2) = r1.overflowing_sub(<$u>::from(borrow));
                (r, c1 | c2, ((self ^ b) & (self ^ r)) >> (<$u>::BITS - 1) != 0)
            }
        }
    )*};
}
int!(u8, i8; u16, i16; u32, i32; u64, i64);

impl Cpu {
    #[inline(always)]
    unsafe fn tlb_entry(&self, va: u64) -> *mut TlbEntry {
        self.dtlb.add((va >> 12) as usize & (TLB_SIZE - 1))
    }

    /// Host address of `bytes` readable bytes at `va`, if the TLB has them in one page.
    #[inline(always)]
    pub(crate) unsafe fn read_ptr(&self, va: u64, bytes: u64) -> Option<*const u8> {
        let e = self.tlb_entry(va);
        if (va.wrapping_add(bytes - 1)) & !PAGE_MASK == (*e).read_tag {
            Some((*e).addend.wrapping_add(va) as *const u8)
        } else {
            None
        }
    }

    /// Host address of `bytes` writable bytes at `va`, if the TLB has them in one page.
    #[inline(always)]
    pub(crate) unsafe fn write_ptr(&self, va: u64, bytes: u64) -> Option<*mut u8> {
        let e = self.tlb_entry(va);
        if (va.wrapping_add(bytes - 1)) & !PAGE_MASK == (*e).write_tag {
            Some((*e).addend.wrapping_add(va) as *mut u8)
        } else {
            None
        }
    }

    /// Reads an operand at a linear address with the current privilege.
    #[inline(always)]
    pub(crate) unsafe fn load<T: Int>(&mut self, va: u64) -> Result<T, Trap> {
        match self.read_ptr(va, T::BYTES) {
            Some(p) => Ok(p.cast::<T>().read_unaligned()),
            None => self.load_slow(va, T::BYTES).map(T::from_u64),
        }
    }

    /// Writes an operand at a linear address with the current privilege.
    #[inline(always)]
    pub(crate) unsafe fn store<T: Int>(&mut self, va: u64, v: T) -> Result<(), Trap> {
        match self.write_ptr(va, T::BYTES) {
            Some(p) => {
                p.cast::<T>().write_unaligned(v);
                Ok(())
            }
            None => self.store_slow(va, T::BYTES, v.to_u64()),
        }
    }

    /// Reads, changes and writes back an operand. The page is checked for writing before `f` runs, so `f` may change
    /// flags; what else it changes must be restartable.
    #[inline(always)]
    pub(crate) unsafe fn modify<T: Int>(
        &mut self,
        va: u64,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap> {
        match self.write_ptr(va, T::BYTES) {
            Some(p) => {
                let old = p.cast::<T>().read_unaligned();
                let new = f(self, old);
                p.cast::<T>().write_unaligned(new);
                Ok(())
            }
            None => {
                self.probe_write(va, T::BYTES)?;
                let old = T::from_u64(self.load_slow(va, T::BYTES)?);
                let new = f(self, old);
                self.store_slow(va, T::BYTES, new.to_u64())
            }
        }
    }

    /// Reads 16 bytes (no alignment check).
    #[inline(always)]
    pub(crate) unsafe fn load128(&mut self, va: u64) -> Result<Xmm, Trap> {
        match self.read_ptr(va, 16) {
            Some(p) => Ok(Xmm(p.cast::<[u64; 2]>().read_unaligned())),
            None => Ok(Xmm([self.load_slow(va, 8)?, self.load_slow(va.wrapping_add(8), 8)?])),
        }
    }

    /// Writes 16 bytes (no alignment check); nothing is written when any part faults.
    #[inline(always)]
    pub(crate) unsafe fn store128(&mut self, va: u64, v: Xmm) -> Result<(), Trap> {
        match self.write_ptr(va, 16) {
            Some(p) => {
                p.cast::<[u64; 2]>().write_unaligned(v.0);
                Ok(())
            }
            None => {
                self.probe_write(va, 16)?;
                self.store_slow(va, 8, v.0[0])?;
                self.store_slow(va.wrapping_add(8), 8, v.0[1])
            }
        }
    }
}
