//! Segment registers and descriptors (Intel SDM vol. 3, 3.4, 5.3 to 5.8 and 7.2).
//!
//! 64-bit mode uses little of them, but loads must check and fault as they do everywhere.

use super::unsupported;
use crate::cpu::{Cpu, Segment, Trap, seg, vector};
use crate::op::reg;

/// Bits of [`Segment::attributes`].
pub(crate) mod attr {
    /// Type: accessed.
    pub(crate) const ACCESSED: u16 = 1;
    /// Type: readable code or writable data.
    pub(crate) const READ_WRITE: u16 = 1 << 1;
    /// Type: conforming code.
    pub(crate) const CONFORMING: u16 = 1 << 2;
    /// Type: code.
    pub(crate) const CODE: u16 = 1 << 3;
    /// A code or data segment, not a system one.
    pub(crate) const S: u16 = 1 << 4;
    pub(crate) const P: u16 = 1 << 7;
    pub(crate) const L: u16 = 1 << 13;
    pub(crate) const DB: u16 = 1 << 14;
    pub(crate) const G: u16 = 1 << 15;
    /// Type and S of system descriptors.
    pub(crate) const SYSTEM: u16 = 0x1f;
    pub(crate) const LDT: u16 = 2;
    pub(crate) const TSS_AVAILABLE: u16 = 9;
    pub(crate) const TSS_BUSY: u16 = 11;
}

/// The flat 64-bit code segment of SYSCALL and SYSRET, DPL 0.
pub(crate) const FLAT_CODE: Segment = Segment { selector: 0, base: 0, limit: u32::MAX, attributes: 0xa09b };
/// The flat stack segment of SYSCALL and SYSRET, DPL 0.
pub(crate) const FLAT_DATA: Segment = Segment { selector: 0, base: 0, limit: u32::MAX, attributes: 0xc093 };

/// Reads a descriptor's fields (SDM vol. 3, figure 3-8).
pub(crate) fn unpack(selector: u16, raw: u64) -> Segment {
    let attributes = (raw >> 40) as u16 & 0xf0ff;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    Segment {
        selector,
        base: raw >> 16 & 0x00ff_ffff | raw >> 32 & 0xff00_0000,
        limit: if attributes & attr::G != 0 { limit << 12 | 0xfff } else { limit },
        attributes,
    }
}

impl Segment {
    #[inline(always)]
    pub(crate) fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    #[inline(always)]
    pub(crate) fn has(&self, bits: u16) -> bool {
        self.attributes & bits == bits
    }
    #[inline(always)]
    pub(crate) fn present(&self) -> bool {
        self.has(attr::P)
    }
    pub(crate) fn is_code(&self) -> bool {
        self.has(attr::S | attr::CODE)
    }
    pub(crate) fn is_data(&self) -> bool {
        self.attributes & (attr::S | attr::CODE) == attr::S
    }
    /// 64-bit code: L without D.
    pub(crate) fn is_long(&self) -> bool {
        self.attributes & (attr::L | attr::DB) == attr::L
    }
    pub(crate) fn with_dpl(mut self, selector: u16, dpl: u8) -> Segment {
        self.selector = selector;
        self.attributes |= u16::from(dpl) << 5;
        self
    }
    /// What a null selector leaves; DPL tells the CPL, where the stack segment is meant.
    pub(crate) fn null(selector: u16) -> Segment {
        Segment { selector, base: 0, limit: 0, attributes: (selector & 3) << 5 }
    }
}

#[inline(always)]
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// A selector as an error code.
#[inline(always)]
pub(crate) fn error_of(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

impl Cpu {
    /// #GP(0).
    pub(crate) fn gp0(&mut self) -> Trap {
        self.raise(vector::GP, Some(0))
    }

    /// The linear address of a selector's descriptor, if it is inside its table.
    #[inline]
    fn descriptor_address(&self, selector: u16) -> Option<u64> {
        let offset = selector & 0xfff8;
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        } else if !is_null(self.ldtr.selector) {
            (self.ldtr.base, self.ldtr.limit)
        } else {
            return None;
        };
        (u32::from(offset) + 7 <= limit).then(|| base.wrapping_add(u64::from(offset)))
    }

    /// Reads a selector's descriptor and its address; #GP(selector + `ext`) when there is none.
    #[inline]
    pub(crate) unsafe fn read_descriptor(&mut self, selector: u16, ext: u32) -> Result<(Segment, u64), Trap> {
        let Some(at) = self.descriptor_address(selector) else {
            return Err(self.raise(vector::GP, Some(error_of(selector) | ext)));
        };
        let raw = self.load_sys(at)?;
        Ok((unpack(selector, raw), at))
    }

    /// Marks a code or data descriptor accessed, in its table too.
    #[inline]
    pub(crate) unsafe fn set_accessed(&mut self, s: &mut Segment, at: u64) -> Result<(), Trap> {
        if s.attributes & attr::ACCESSED == 0 {
            s.attributes |= attr::ACCESSED;
            self.store_sys(at.wrapping_add(5), s.attributes as u8)?;
        }
        Ok(())
    }

    /// Reads and checks what SS is to hold at privilege `cpl`. `bad` is the vector for failed checks (#GP, or #TS).
    pub(crate) unsafe fn stack_segment(&mut self, selector: u16, cpl: u8) -> Result<Segment, Trap> {
        if is_null(selector) {
            // Legal in 64-bit mode below ring 3 only, with RPL = CPL.
            if cpl == 3 || selector & 3 != u16::from(cpl) {
                return Err(self.gp0());
            }
            return Ok(Segment::null(selector));
        }
        let (mut s, at) = self.read_descriptor(selector, 0)?;
        if selector & 3 != u16::from(cpl) || !s.is_data() || !s.has(attr::READ_WRITE) || s.dpl() != cpl {
            return Err(self.raise(vector::GP, Some(error_of(selector))));
        }
        if !s.present() {
            return Err(self.raise(vector::SS, Some(error_of(selector))));
        }
        self.set_accessed(&mut s, at)?;
        Ok(s)
    }

    /// Loads a segment register other than CS.
    pub(crate) unsafe fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Trap> {
        if index == seg::SS {
            self.segs[seg::SS] = self.stack_segment(selector, self.cpl)?;
            return Ok(());
        }
        let s = if is_null(selector) {
            Segment::null(selector)
        } else {
            let (mut s, at) = self.read_descriptor(selector, 0)?;
            let readable = s.is_data() || s.is_code() && s.has(attr::READ_WRITE);
            let conforming = s.is_code() && s.has(attr::CONFORMING);
            let privileged = conforming || (selector & 3) as u8 <= s.dpl() && self.cpl <= s.dpl();
            if !readable || !privileged {
                return Err(self.raise(vector::GP, Some(error_of(selector))));
            }
            if !s.present() {
                return Err(self.raise(vector::NP, Some(error_of(selector))));
            }
            self.set_accessed(&mut s, at)?;
            s
        };
        self.segs[index] = s;
        match index {
            seg::FS => self.set_slot(reg::FS, s.base),
            seg::GS => self.set_slot(reg::GS, s.base),
            _ => {}
        }
        Ok(())
    }

    /// Reads and checks the target of a far transfer to code that stays at privilege `rpl` (the current one, or for
    /// returns an outer one).
    pub(crate) unsafe fn code_segment(&mut self, selector: u16, returning: bool) -> Result<Segment, Trap> {
        if is_null(selector) {
            return Err(self.gp0());
        }
        let (mut s, at) = self.read_descriptor(selector, 0)?;
        let rpl = (selector & 3) as u8;
        let privileged = match (s.has(attr::CONFORMING), returning) {
            (false, true) => s.dpl() == rpl && rpl >= self.cpl,
            (true, true) => s.dpl() <= rpl && rpl >= self.cpl,
            (false, false) => s.dpl() == self.cpl && rpl <= self.cpl,
            (true, false) => s.dpl() <= self.cpl,
        };
        if !s.is_code() || !privileged {
            return Err(self.raise(vector::GP, Some(error_of(selector))));
        }
        if !s.present() {
            return Err(self.raise(vector::NP, Some(error_of(selector))));
        }
        if !s.is_long() {
            unsupported(self, "compatibility mode");
            return Err(self.raise(vector::GP, Some(error_of(selector))));
        }
        self.set_accessed(&mut s, at)?;
        if !returning {
            s.selector = selector & 0xfffc | u16::from(self.cpl);
        }
        Ok(s)
    }

    /// Reads a 16-byte system descriptor from the GDT for LLDT and LTR.
    unsafe fn system_descriptor(&mut self, selector: u16, kind: u16) -> Result<(Segment, u64), Trap> {
        let offset = selector & 0xfff8;
        if selector & 4 != 0 || u32::from(offset) + 15 > u32::from(self.gdtr.limit) {
            return Err(self.raise(vector::GP, Some(error_of(selector))));
        }
        let at = self.gdtr.base.wrapping_add(u64::from(offset));
        let low: u64 = self.load_sys(at)?;
        let high: u64 = self.load_sys(at.wrapping_add(8))?;
        let mut s = unpack(selector, low);
        s.base |= high << 32;
        if s.attributes & attr::SYSTEM != kind || high >> 40 & 0x1f != 0 || !crate::mmu::canonical(s.base) {
            return Err(self.raise(vector::GP, Some(error_of(selector))));
        }
        if !s.present() {
            return Err(self.raise(vector::NP, Some(error_of(selector))));
        }
        Ok((s, at))
    }

    /// LLDT's work.
    pub(crate) unsafe fn load_ldtr(&mut self, selector: u16) -> Result<(), Trap> {
        self.ldtr = if is_null(selector) {
            Segment::null(selector)
        } else {
            self.system_descriptor(selector, attr::LDT)?.0
        };
        Ok(())
    }

    /// LTR's work: the TSS becomes busy.
    pub(crate) unsafe fn load_tr(&mut self, selector: u16) -> Result<(), Trap> {
        if is_null(selector) {
            return Err(self.gp0());
        }
        let (mut s, at) = self.system_descriptor(selector, attr::TSS_AVAILABLE)?;
        s.attributes |= attr::TSS_BUSY;
        self.store_sys(at.wrapping_add(5), s.attributes as u8)?;
        self.tr = s;
        Ok(())
    }

    /// A descriptor that LAR, LSL, VERR and VERW may see at the current privilege; `None` clears ZF.
    pub(crate) unsafe fn visible_descriptor(
        &mut self,
        selector: u16,
    ) -> Result<Option<(Segment, u64)>, Trap> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(at) = self.descriptor_address(selector) else { return Ok(None) };
        let raw: u64 = self.load_sys(at)?;
        let s = unpack(selector, raw);
        let conforming = s.is_code() && s.has(attr::CONFORMING);
        let privileged = conforming || self.cpl <= s.dpl() && (selector & 3) as u8 <= s.dpl();
        Ok(privileged.then_some((s, raw)))
    }
}
