//! The x87 floating-point unit (Intel SDM vol. 1, chapter 8); MMX registers alias it.
//!
//! At rest the state is the legacy part of an FXSAVE64 image. The first x87 instruction loads it into the host's own
//! x87 unit, where it stays ("live") while such instructions follow: each is then executed by the host as it is, so
//! that rounding, denormals, NaNs, stack faults and unmasked exceptions are exact. Compiled Rust never uses that
//! unit on x86-64. An unmasked exception shows in the status word right behind the instruction that caused it; the state
//! then comes to rest, so that no later instruction of the host's can trip over it, and the guest's next waiting
//! instruction raises #MF. Leaving [`Cpu::run`](crate::Cpu::run) (and whatever needs the image) saves the state
//! and leaves the host's unit as FNINIT does.
//!
//! - `exec`: instructions that compute. `control`: control, environment and state.

mod control;
mod exec;

use std::arch::asm;

use iced_x86::Instruction;

use crate::cpu::{Cpu, Trap, Xmm, vector};
use crate::decode::Lowered;
use crate::op::{Op, reg};
use crate::simd::{CR0_EM, CR0_TS};

/// Status word: error summary and busy, the sticky exception flags.
const FSW_ES: u16 = 1 << 7;
const FSW_BUSY: u16 = 1 << 15;
const FSW_EXCEPTIONS: u16 = 0x3f;
/// Control word: the exception masks, and the bits that can be set.
const FCW_MASKS: u16 = 0x3f;
const FCW_VALID: u16 = 0x1f3f;
/// Control word bit 6 reads as one.
const FCW_ONE: u16 = 0x40;

/// The x87 state: bytes 0 to 159 of the FXSAVE64 image, and what the CPU needs to know about it.
#[derive(Clone, Copy)]
pub(crate) struct X87 {
    /// Control word.
    pub(crate) fcw: u16,
    /// Status word, with TOP.
    pub(crate) fsw: u16,
    /// Abridged tag word: one bit per physical register, set when it is in use.
    pub(crate) ftw: u8,
    /// Last opcode.
    pub(crate) fop: u16,
    /// Address of the last non-control instruction.
    pub(crate) fip: u64,
    /// Offset of its memory operand.
    pub(crate) fdp: u64,
    /// ST(0) to ST(7); the upper six bytes of each are zero.
    pub(crate) st: [[u64; 2]; 8],
    /// The state is in the host's x87 unit; the fields above (but `fip`, `fdp`, `fop`) are stale.
    pub(crate) live: bool,
    /// The live control word unmasks an exception.
    unmasked: bool,
    /// [`gate`](crate::simd::gate) bits: why vector instructions need a second look.
    pub(crate) gate: u8,
    /// Copy of a memory operand that is not in one page of RAM, for the length of an instruction.
    pub(crate) operand: Xmm,
}

impl Default for X87 {
    /// The state that FNINIT leaves, with zeroed registers.
    fn default() -> X87 {
        X87 {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 2]; 8],
            live: false,
            unmasked: false,
            gate: 0,
            operand: Xmm::default(),
        }
    }
}

impl X87 {
    /// TOP of the state at rest.
    pub(crate) fn top(&self) -> usize {
        usize::from(self.fsw >> 11 & 7)
    }

    pub(crate) fn set_top(&mut self, top: u16) {
        self.fsw = self.fsw & !(7 << 11) | top << 11;
    }

    /// Whether an unmasked exception waits for the next waiting instruction. A live state has none.
    pub(crate) fn pending(&self) -> bool {
        !self.live && self.fsw & FSW_ES != 0
    }

    /// Takes a new status word whose TOP may differ: registers stay where they are, so ST(i) becomes another.
    fn turn_to(&mut self, fcw: u16, fsw: u16) {
        let old = self.top();
        self.set_words(fcw, fsw);
        let turn = self.top().wrapping_sub(old) & 7;
        self.st.rotate_left(turn);
    }

    /// Takes new control and status words as hardware does.
    fn set_words(&mut self, fcw: u16, fsw: u16) {
        self.fcw = fcw & FCW_VALID | FCW_ONE;
        self.fsw = fsw & !(FSW_ES | FSW_BUSY);
        if self.fsw & !self.fcw & FSW_EXCEPTIONS != 0 {
            self.fsw |= FSW_ES | FSW_BUSY;
        }
    }

    /// Writes bytes 0 to 23 and 32 to 159 of an FXSAVE64 image.
    pub(crate) fn to_image(self, image: &mut [u8; 512]) {
        image[..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        image[5] = 0;
        image[6..8].copy_from_slice(&self.fop.to_le_bytes());
        image[8..16].copy_from_slice(&self.fip.to_le_bytes());
        image[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        for (st, part) in self.st.iter().zip(image[32..160].chunks_exact_mut(16)) {
            part[..8].copy_from_slice(&st[0].to_le_bytes());
            part[8..].copy_from_slice(&st[1].to_le_bytes());
        }
    }

    /// Reads what [`X87::to_image`] writes. Any content is valid.
    pub(crate) fn set_image(&mut self, image: &[u8; 512]) {
        let half = |i: usize| u16::from_le_bytes([image[i], image[i + 1]]);
        let word = |i: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&image[i..i + 8]);
            u64::from_le_bytes(w)
        };
        self.live = false;
        self.set_words(half(0), half(2));
        self.ftw = image[4];
        self.fop = half(6) & 0x7ff;
        self.fip = word(8);
        self.fdp = word(16);
        for (i, st) in self.st.iter_mut().enumerate() {
            *st = [word(32 + 16 * i), u64::from(half(40 + 16 * i))];
        }
    }
}

/// What the host's FXSAVE64 and FXRSTOR64 take.
#[repr(C, align(16))]
struct HostImage([u8; 512]);

impl Cpu {
    /// Brings the x87 state to rest, and the host's unit to its initial state.
    #[inline]
    pub(crate) fn x87_save(&mut self) {
        if self.x87.live {
            self.x87_save_slow();
        }
    }

    #[cold]
    fn x87_save_slow(&mut self) {
        let mut image = HostImage([0; 512]);
        // SAFETY: FXSAVE64 writes 512 bytes to an aligned local; neither instruction waits for exceptions.
        unsafe { asm!("fxsave64 [{}]", "fninit", in(reg) &raw mut image, options(nostack, preserves_flags)) };
        let (fop, fip, fdp) = (self.x87.fop, self.x87.fip, self.x87.fdp);
        self.x87.set_image(&image.0);
        // The host's pointers are the host's.
        (self.x87.fop, self.x87.fip, self.x87.fdp) = (fop, fip, fdp);
    }

    /// Forgets a live state that is about to be replaced.
    pub(crate) fn x87_discard(&mut self) {
        if self.x87.live {
            // SAFETY: resets a unit that compiled code does not use.
            unsafe { asm!("fninit", options(nomem, nostack, preserves_flags)) };
            self.x87.live = false;
        }
    }

    /// Before a waiting instruction that computes: makes the state live.
    #[inline(always)]
    unsafe fn x87_begin(&mut self) -> Result<(), Trap> {
        if self.x87.live { Ok(()) } else { self.x87_begin_slow() }
    }

    #[cold]
    #[inline(never)]
    unsafe fn x87_begin_slow(&mut self) -> Result<(), Trap> {
        self.x87_available()?;
        if self.x87.pending() {
            return Err(self.raise(vector::MF, None));
        }
        let mut image = HostImage([0; 512]);
        self.x87.to_image(&mut image.0);
        // FXRSTOR loads the vector registers too, so all are named as clobbered, and MXCSR gets what it has.
        asm!(
            "stmxcsr [{i} + 24]",
            "fxrstor64 [{i}]",
            i = in(reg) &raw mut image,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, preserves_flags)
        );
        self.x87.live = true;
        self.x87.unmasked = self.x87.fcw & FCW_MASKS != FCW_MASKS;
        Ok(())
    }

    /// #NM when there is no x87 unit.
    unsafe fn x87_available(&mut self) -> Result<(), Trap> {
        if self.ctl.cr0 & (CR0_EM | CR0_TS) != 0 { Err(self.raise(vector::NM, None)) } else { Ok(()) }
    }

    /// Behind an instruction that computes.
    #[inline(always)]
    unsafe fn x87_end(&mut self, op: *const Op) {
        self.x87.fip = self.slot(reg::PAGE).wrapping_add(u64::from((*op).off));
        if self.x87.unmasked {
            self.x87_check();
        }
    }

    /// Brings the state to rest if it holds an unmasked exception.
    #[cold]
    #[inline(never)]
    unsafe fn x87_check(&mut self) {
        if host_status() & FSW_ES != 0 {
            self.x87_save();
        }
    }
}

/// The live status word.
unsafe fn host_status() -> u16 {
    let sw: u16;
    asm!("fnstsw ax", out("ax") sw, options(nomem, nostack, preserves_flags));
    sw
}

/// Lowers x87 instructions.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    let lowered = exec::lower(insn, op);
    if matches!(lowered, Lowered::No) { control::lower(insn, op) } else { lowered }
}
