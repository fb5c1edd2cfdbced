//! Vector instructions: MMX, SSE to SSE4.2 and CRC32 (Intel SDM vol. 1, chapters 9 to 12).
//!
//! The host is an x86-64 CPU itself, so what an instruction computes is left to that very instruction on host
//! registers; this module fetches operands, checks alignment and availability, and keeps the floating-point
//! environment. While [`Cpu::run`](crate::Cpu::run) runs, the host's MXCSR is the guest's with all exceptions masked:
//! rounding, FTZ and DAZ hold for free and status flags gather in the host's register. A guest that unmasks
//! exceptions takes a slower path that looks at the flags of every single instruction.
//!
//! - `pairs`: `op xmm, xmm/m`, the bulk of the set.
//! - `imm`: the same with an immediate byte that is part of the instruction; shifts by immediate; PCMPxSTRx.
//! - `moves`, `convert`: moves; general registers and flags as destination or source.
//! - `mmx`: MMX registers. `state`: MXCSR, FXSAVE, FXRSTOR.

mod convert;
mod imm;
mod mmx;
mod moves;
mod pairs;
mod state;
#[cfg(test)]
mod tests;

use std::arch::asm;

use iced_x86::{Instruction, OpKind};

use crate::cpu::{Cpu, Trap, Xmm, vector};
use crate::decode::{Lowered, xmm};
use crate::op::Op;
use crate::ops::t;

/// Why a vector instruction may not simply execute: bits of `X87::gate`.
pub(crate) mod gate {
    /// CR0.EM or no CR4.OSFXSR: vector instructions are undefined (MMX: EM alone).
    pub(crate) const UD: u8 = 1;
    /// CR0.TS: device not available.
    pub(crate) const NM: u8 = 2;
    /// MXCSR unmasks an exception.
    pub(crate) const XM: u8 = 4;
}

pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_EM: u64 = 1 << 2;
pub(crate) const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// MXCSR's exception masks, its flags, and the bits that exist.
const MXCSR_MASKS: u32 = 0x1f80;
const MXCSR_FLAGS: u32 = 0x3f;
pub(crate) const MXCSR_VALID: u32 = 0xffff;

/// What an instruction does to its destination, given the source's address: 16 bytes in the register file or, for a
/// memory operand, at least as many as the instruction reads.
type Run = unsafe fn(*mut u8, *const u8);

/// Begins a handler of an instruction that does not compute floating-point numbers.
macro_rules! available {
    ($cpu:ident, $op:ident) => {
        if $cpu.x87.gate & ($crate::simd::gate::UD | $crate::simd::gate::NM) != 0 {
            return $cpu.vector_fault($op);
        }
    };
}
use available;

/// Lowers vector instructions.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    for lower in [pairs::lower, moves::lower, convert::lower, imm::lower, state::lower, mmx::lower] {
        let lowered = lower(insn, op);
        if !matches!(lowered, Lowered::No) {
            return lowered;
        }
    }
    Lowered::No
}

/// Sets `dst` and, unless operand 1 is in memory, `src` to the vector registers that the instruction names.
fn operands(insn: &Instruction, op: &mut Op) -> bool {
    op.dst = xmm(insn.op0_register());
    let memory = insn.op1_kind() == OpKind::Memory;
    if !memory {
        op.src = xmm(insn.op1_register());
    }
    memory
}

#[inline(always)]
fn read_mxcsr() -> u32 {
    let mut v = 0u32;
    // SAFETY: stores MXCSR to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut v, options(nostack, preserves_flags)) };
    v
}

#[inline(always)]
fn write_mxcsr(v: u32) {
    // SAFETY: all callers pass valid bits with every exception masked, so this changes how SSE rounds until
    // `leave_guest_fp` restores the default; nothing on the way depends on rounding.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const v, options(nostack, preserves_flags)) };
}

impl Cpu {
    /// Called on entry of `run`: brings the guest's floating-point environment into the host.
    #[inline]
    pub(crate) fn enter_guest_fp(&mut self) {
        write_mxcsr((self.mxcsr & MXCSR_VALID) | MXCSR_MASKS);
        self.update_fp_gate();
    }

    /// Called before `run` returns: takes the guest's floating-point state out of the host.
    #[inline]
    pub(crate) fn leave_guest_fp(&mut self) {
        self.x87_save();
        self.sync_mxcsr();
        write_mxcsr(MXCSR_MASKS);
    }

    /// Called after every change of CR0, CR4 or MXCSR.
    pub(crate) fn update_fp_gate(&mut self) {
        let mut g = 0;
        if self.ctl.cr0 & CR0_EM != 0 || self.ctl.cr4 & CR4_OSFXSR == 0 {
            g |= gate::UD;
        }
        if self.ctl.cr0 & CR0_TS != 0 {
            g |= gate::NM;
        }
        if self.mxcsr & MXCSR_MASKS != MXCSR_MASKS {
            g |= gate::XM;
        }
        if self.ctl.cr0 & (CR0_EM | CR0_TS) != 0 {
            // x87 instructions look at nothing but `live` on their fast path.
            self.x87_save();
        }
        self.x87.gate = g;
    }

    /// Gathers the host's MXCSR flags into the guest's.
    #[inline]
    fn sync_mxcsr(&mut self) {
        self.mxcsr |= read_mxcsr() & MXCSR_FLAGS;
    }

    /// Sets the guest's MXCSR while `run` runs.
    fn set_mxcsr(&mut self, v: u32) {
        self.mxcsr = v;
        self.enter_guest_fp();
    }

    /// Address of a vector register.
    #[inline(always)]
    fn xmm_ptr(&mut self, off: u8) -> *mut u8 {
        // SAFETY: `off` is a register index times 16.
        unsafe { (&raw mut self.xmm).cast::<u8>().add(off as usize) }
    }

    #[inline(always)]
    fn xmm(&self, off: u8) -> Xmm {
        self.xmm[off as usize >> 4]
    }

    #[inline(always)]
    fn set_xmm(&mut self, off: u8, v: Xmm) {
        self.xmm[off as usize >> 4] = v;
    }

    /// Raises #UD or #NM when vector instructions are not available.
    unsafe fn vector_available(&mut self) -> Result<(), Trap> {
        if self.x87.gate & gate::UD != 0 {
            return Err(self.raise(vector::UD, None));
        }
        if self.x87.gate & gate::NM != 0 {
            return Err(self.raise(vector::NM, None));
        }
        Ok(())
    }

    /// Leaves the sequence at a vector instruction that is not available.
    #[cold]
    #[inline(never)]
    unsafe fn vector_fault(&mut self, op: *const Op) -> *const Op {
        t!(self, op, self.vector_available());
        self.trap(op)
    }

    /// Leaves the sequence at an instruction whose operand is not aligned.
    #[cold]
    #[inline(never)]
    unsafe fn alignment_fault(&mut self, op: *const Op) -> *const Op {
        self.misaligned();
        self.trap(op)
    }

    /// Before a floating-point instruction; tells whether [`Cpu::fp_end`] must be called behind it.
    #[inline(always)]
    unsafe fn fp_begin(&mut self) -> Result<bool, Trap> {
        if self.x87.gate != 0 { self.fp_begin_slow() } else { Ok(false) }
    }

    #[cold]
    #[inline(never)]
    unsafe fn fp_begin_slow(&mut self) -> Result<bool, Trap> {
        self.vector_available()?;
        self.sync_mxcsr();
        write_mxcsr((self.mxcsr & !MXCSR_FLAGS) | MXCSR_MASKS);
        Ok(true)
    }

    /// Behind a floating-point instruction whose result is not yet written: raises what the guest has not masked.
    #[cold]
    #[inline(never)]
    unsafe fn fp_end(&mut self) -> Result<(), Trap> {
        let mut flags = read_mxcsr() & MXCSR_FLAGS;
        let unmasked = flags & !(self.mxcsr >> 7);
        // Invalid, denormal and divide-by-zero are found before computing: then nothing is known of the result.
        if unmasked & 7 != 0 {
            flags &= 7;
        }
        self.mxcsr |= flags;
        write_mxcsr(self.mxcsr | MXCSR_MASKS);
        if unmasked == 0 {
            return Ok(());
        }
        let v = if self.ctl.cr4 & CR4_OSXMMEXCPT != 0 { vector::XM } else { vector::UD };
        Err(self.raise(v, None))
    }

    /// [`Cpu::fp_end`] for a result that is written already: takes it back if the instruction faults.
    #[cold]
    #[inline(never)]
    unsafe fn fp_end_or_restore(&mut self, dst: u8, old: Xmm) -> Result<(), Trap> {
        let result = self.fp_end();
        if result.is_err() {
            self.set_xmm(dst, old);
        }
        result
    }

    /// Host address of the source operand: operand 1's register, or `BYTES` bytes of memory (copied into the CPU when
    /// they cannot be had in place; a local copy would keep handlers from running on into each other).
    #[inline(always)]
    unsafe fn source<const MEM: bool, const BYTES: u64, const ALIGNED: bool>(
        &mut self,
        op: *const Op,
    ) -> Result<*const u8, Trap> {
        if !MEM {
            return Ok(self.xmm_ptr((*op).src));
        }
        let va = self.ea(op);
        if ALIGNED && va & (BYTES - 1) != 0 {
            return Err(self.misaligned());
        }
        match self.read_ptr(va, BYTES) {
            Some(p) => Ok(p),
            None => {
                self.x87.operand = self.source_slow(va, BYTES)?;
                Ok((&raw const self.x87.operand).cast())
            }
        }
    }

    /// The source operand when nothing stands in the way of using it in place.
    #[inline(always)]
    unsafe fn source_in_place<const MEM: bool>(&mut self, op: *const Op, bytes: u64) -> Option<*const u8> {
        if !MEM {
            return Some(self.xmm_ptr((*op).src));
        }
        let va = self.ea(op);
        if bytes == 16 && va & 15 != 0 { None } else { self.read_ptr(va, bytes) }
    }

    #[cold]
    unsafe fn misaligned(&mut self) -> Trap {
        self.raise(vector::GP, Some(0))
    }

    #[cold]
    #[inline(never)]
    unsafe fn source_slow(&mut self, va: u64, bytes: u64) -> Result<Xmm, Trap> {
        if bytes == 16 { self.load128(va) } else { Ok(Xmm([self.load_slow(va, bytes)?, 0])) }
    }
}
