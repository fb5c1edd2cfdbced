//! The operation: one guest instruction, decoded once and executed many times.

use crate::cpu::Cpu;

/// What an operation does. Called with the CPU and the operation itself; returns the operation to execute next, or
/// null to go back to the run loop with [`Cpu::stop`](crate::cpu::Cpu) telling why.
///
/// # Safety
/// The contract of every handler: `op` points to a live operation of the sequence being executed, followed by the
/// rest of that sequence (the last operation of a sequence never falls through); its register fields are in range
/// for the register file they name; `cpu.bus` is valid for the call.
pub(crate) type Handler = unsafe fn(&mut Cpu, *const Op) -> *const Op;

/// One decoded operation; 32 bytes, so that two share a cache line.
///
/// Register fields are byte offsets: into `Cpu::r` for general registers (`AH` is `RAX + 1`), into `Cpu::xmm` for vector
/// registers (index * 16). Addresses are `r[base] + (r[index] << scale) + r[seg] + disp`, with [`reg::ZERO`] for what is
/// missing and [`reg::PAGE`] as the base of RIP-relative operands.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    pub(crate) h: Handler,
    pub(crate) dst: u8,
    pub(crate) src: u8,
    pub(crate) base: u8,
    pub(crate) index: u8,
    pub(crate) scale: u8,
    pub(crate) seg: u8,
    /// Length of the instruction in bytes.
    pub(crate) len: u8,
    /// Free for the handler (a condition code, a shift count, ...).
    pub(crate) aux: u8,
    /// Offset of the instruction in its page.
    pub(crate) off: u16,
    /// Instructions from the start of the sequence up to and including this one.
    pub(crate) n: u16,
    pub(crate) disp: i32,
    /// Immediate operand, branch target, second function pointer: the handler knows.
    pub(crate) imm: u64,
}

/// Slots of `Cpu::r` as byte offsets.
pub(crate) mod reg {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 8;
    pub(crate) const RDX: u8 = 16;
    pub(crate) const RBX: u8 = 24;
    pub(crate) const RSP: u8 = 32;
    pub(crate) const RBP: u8 = 40;
    pub(crate) const RSI: u8 = 48;
    pub(crate) const RDI: u8 = 56;
    pub(crate) const R11: u8 = 88;
    /// Always zero.
    pub(crate) const ZERO: u8 = 128;
    /// Virtual address of the page that is being executed; RIP is this plus `Op::off`.
    pub(crate) const PAGE: u8 = 136;
    /// FS.base.
    pub(crate) const FS: u8 = 144;
    /// GS.base.
    pub(crate) const GS: u8 = 152;
    /// Scratch of one instruction: the address of a 32-bit addressing form.
    pub(crate) const TMP: u8 = 160;
    /// Number of slots.
    pub(crate) const COUNT: usize = 21;
}

impl Op {
    /// The operation that follows.
    ///
    /// # Safety
    /// `this` is not the last operation of its sequence.
    #[inline(always)]
    pub(crate) unsafe fn next(this: *const Op) -> *const Op {
        this.add(1)
    }

    /// Executes the operation that follows, as a handler's last act.
    ///
    /// Optimised builds make this a jump, so that straight-line code runs from handler to handler. It does not depend
    /// on that: branches return to the run loop's dispatcher, so at worst one sequence's handlers nest.
    ///
    /// # Safety
    /// As [`Op::next`].
    #[inline(always)]
    pub(crate) unsafe fn run_next(cpu: &mut Cpu, this: *const Op) -> *const Op {
        let next = this.add(1);
        ((*next).h)(cpu, next)
    }
}
