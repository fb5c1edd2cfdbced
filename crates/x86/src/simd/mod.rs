//! Vector instructions: MMX, SSE to SSE4.2 (Intel SDM vol. 1, chapters 9 to 12).

use crate::cpu::Cpu;
use crate::decode::Lowered;
use crate::op::Op;

/// Lowers vector instructions.
pub(crate) fn lower(_insn: &iced_x86::Instruction, _op: &mut Op) -> Lowered {
    Lowered::No
}

impl Cpu {
    /// Called on entry of `run`: brings the guest's floating-point environment into the host.
    pub(crate) fn enter_guest_fp(&mut self) {}
    /// Called before `run` returns: takes the guest's floating-point state out of the host.
    pub(crate) fn leave_guest_fp(&mut self) {}
    /// Called after every change of CR0 or CR4.
    pub(crate) fn update_fp_gate(&mut self) {}
    /// The FXSAVE64 image of the x87, MMX and SSE state.
    pub(crate) fn fxsave_image(&mut self) -> [u8; 512] {
        [0; 512]
    }
    /// Loads an FXSAVE64 image; reserved MXCSR bits are dropped.
    pub(crate) fn set_fxsave_image(&mut self, _image: &[u8; 512]) {}
}
