//! The x87 floating-point unit and the MMX registers that alias it (Intel SDM vol. 1, chapters 8 and 9).
//!
//! At rest the state is the legacy part of an FXSAVE64 image. The first x87 instruction loads it into the host's own
//! x87 unit, where it stays ("live") while such instructions follow: each is then executed by the host as it is, so
//! that rounding, denormals, NaNs, stack faults and unmasked exceptions are exact. Leaving [`Cpu::run`](crate::Cpu::run)
//! (and whatever needs the image) saves it and leaves the host's unit initialised.

use crate::decode::Lowered;
use crate::op::Op;

/// The x87 state: bytes 0 to 159 of the FXSAVE64 image, and what the CPU needs to know about it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub(crate) struct X87 {
    /// Control word.
    pub(crate) fcw: u16,
    /// Status word, with TOP.
    pub(crate) fsw: u16,
    /// Abridged tag word: one bit per physical register, set when it is in use.
    pub(crate) ftw: u8,
    pub(crate) reserved: u8,
    /// Last opcode.
    pub(crate) fop: u16,
    /// Address of the last non-control instruction.
    pub(crate) fip: u64,
    /// Address of its memory operand.
    pub(crate) fdp: u64,
    /// Place of MXCSR in the image; the real one is `Cpu::mxcsr`.
    pub(crate) mxcsr: [u32; 2],
    /// ST(0) to ST(7), ten bytes used of each.
    pub(crate) st: [[u64; 2]; 8],
    /// The state is in the host's x87 unit; the fields above (but `fip`, `fdp`, `fop`) are stale.
    pub(crate) live: bool,
    /// [`gate`](crate::simd::gate) bits: why vector or x87 instructions need a second look.
    pub(crate) gate: u8,
}

impl Default for X87 {
    /// The state that FNINIT leaves, with zeroed registers.
    fn default() -> X87 {
        X87 {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: [0; 2],
            st: [[0; 2]; 8],
            live: false,
            gate: 0,
        }
    }
}

/// Lowers x87 instructions.
pub(crate) fn lower(_insn: &iced_x86::Instruction, _op: &mut Op) -> Lowered {
    Lowered::No
}
