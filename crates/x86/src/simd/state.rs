//! MXCSR and the FXSAVE image (Intel SDM vol. 1, 10.2.3 and 10.5.1).

use iced_x86::{Code, Instruction};

use super::{CR0_EM, CR0_TS, MXCSR_VALID, available};
use crate::cpu::{Cpu, Trap, Xmm, vector};
use crate::decode::Lowered;
use crate::op::Op;
use crate::ops::t;

/// Bytes of the image that FXSAVE writes and FXRSTOR reads; the other 96 are software's.
const IMAGE: usize = 416;

unsafe fn ldmxcsr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = t!(cpu, op, cpu.load::<u32>(cpu.ea(op)));
    if v & !MXCSR_VALID != 0 {
        cpu.raise(vector::GP, Some(0));
        return cpu.trap(op);
    }
    cpu.set_mxcsr(v);
    Op::run_next(cpu, op)
}

unsafe fn stmxcsr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    cpu.sync_mxcsr();
    let v = cpu.mxcsr;
    t!(cpu, op, cpu.store::<u32>(cpu.ea(op), v));
    Op::run_next(cpu, op)
}

/// FXSAVE and FXRSTOR: #NM for EM or TS, #GP unless aligned to 16.
unsafe fn image_operand(cpu: &mut Cpu, op: *const Op) -> Result<u64, Trap> {
    if cpu.ctl.cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(cpu.raise(vector::NM, None));
    }
    let va = cpu.ea(op);
    if va & 15 != 0 { Err(cpu.misaligned()) } else { Ok(va) }
}

unsafe fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = t!(cpu, op, image_operand(cpu, op));
    t!(cpu, op, cpu.probe_write(va, 512));
    cpu.x87_save();
    cpu.sync_mxcsr();
    let mut image = cpu.fxsave_image();
    if !WIDE {
        // The upper half of FIP and FDP is the selector's place; selectors are not kept.
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    for (i, part) in image[..IMAGE].chunks_exact(16).enumerate() {
        let part = part.as_ptr().cast::<[u64; 2]>().read_unaligned();
        t!(cpu, op, cpu.store128(va.wrapping_add(16 * i as u64), Xmm(part)));
    }
    Op::run_next(cpu, op)
}

unsafe fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = t!(cpu, op, image_operand(cpu, op));
    let mut image = [0u8; 512];
    // The whole area must be there.
    t!(cpu, op, cpu.load::<u8>(va.wrapping_add(511)));
    for (i, part) in image[..IMAGE].chunks_exact_mut(16).enumerate() {
        let Xmm(v) = t!(cpu, op, cpu.load128(va.wrapping_add(16 * i as u64)));
        part.as_mut_ptr().cast::<[u64; 2]>().write_unaligned(v);
    }
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if mxcsr & !MXCSR_VALID != 0 {
        cpu.raise(vector::GP, Some(0));
        return cpu.trap(op);
    }
    if !WIDE {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    cpu.x87_discard();
    cpu.set_fxsave_image(&image);
    cpu.enter_guest_fp();
    Op::run_next(cpu, op)
}

impl Cpu {
    /// The FXSAVE64 image of the x87, MMX and SSE state. Inside `run`, save the live parts first.
    pub(crate) fn fxsave_image(&self) -> [u8; 512] {
        let mut image = [0; 512];
        self.x87.to_image(&mut image);
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&MXCSR_VALID.to_le_bytes());
        for (x, part) in self.xmm.iter().zip(image[160..IMAGE].chunks_exact_mut(16)) {
            part[..8].copy_from_slice(&x.0[0].to_le_bytes());
            part[8..].copy_from_slice(&x.0[1].to_le_bytes());
        }
        image
    }

    /// Loads an FXSAVE64 image; MXCSR bits that do not exist are dropped.
    pub(crate) fn set_fxsave_image(&mut self, image: &[u8; 512]) {
        let word = |i: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&image[i..i + 8]);
            u64::from_le_bytes(w)
        };
        self.x87.set_image(image);
        self.mxcsr = word(24) as u32 & MXCSR_VALID;
        for (i, x) in self.xmm.iter_mut().enumerate() {
            *x = Xmm([word(160 + 16 * i), word(168 + 16 * i)]);
        }
    }
}

/// Lowers the instructions of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    op.h = match insn.code() {
        Code::Ldmxcsr_m32 => ldmxcsr,
        Code::Stmxcsr_m32 => stmxcsr,
        Code::Fxsave_m512byte => fxsave::<false>,
        Code::Fxsave64_m512byte => fxsave::<true>,
        Code::Fxrstor_m512byte => fxrstor::<false>,
        Code::Fxrstor64_m512byte => fxrstor::<true>,
        _ => return Lowered::No,
    };
    Lowered::Plain
}
