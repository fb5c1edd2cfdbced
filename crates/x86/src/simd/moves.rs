//! Moves between vector registers, general registers and memory.

use iced_x86::{Code, Instruction, OpKind};

use super::{available, operands};
use crate::cpu::{Cpu, Xmm};
use crate::decode::{Lowered, gpr, xmm};
use crate::mem::Int;
use crate::op::{Op, reg};
use crate::ops::t;

/// Register to register, all 16 bytes.
unsafe fn copy(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm((*op).src);
    cpu.set_xmm((*op).dst, v);
    Op::run_next(cpu, op)
}

unsafe fn load<const ALIGNED: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let va = cpu.ea(op);
    if ALIGNED && va & 15 != 0 {
        return cpu.alignment_fault(op);
    }
    match cpu.read_ptr(va, 16) {
        Some(p) => {
            let v = Xmm(p.cast::<[u64; 2]>().read_unaligned());
            cpu.set_xmm((*op).dst, v);
            Op::run_next(cpu, op)
        }
        None => load_apart(cpu, op),
    }
}

unsafe fn store<const ALIGNED: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let va = cpu.ea(op);
    if ALIGNED && va & 15 != 0 {
        return cpu.alignment_fault(op);
    }
    match cpu.write_ptr(va, 16) {
        Some(p) => {
            p.cast::<[u64; 2]>().write_unaligned(cpu.xmm((*op).src).0);
            Op::run_next(cpu, op)
        }
        None => store_apart(cpu, op),
    }
}

/// MOVSS, MOVD (`T` is u32), MOVSD, MOVQ from memory: the rest becomes zero.
unsafe fn load_low<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    match cpu.read_ptr(cpu.ea(op), T::BYTES) {
        Some(p) => {
            let v = p.cast::<T>().read_unaligned().to_u64();
            cpu.set_xmm((*op).dst, Xmm([v, 0]));
            Op::run_next(cpu, op)
        }
        None => load_low_apart::<T>(cpu, op),
    }
}

/// MOVLPS and MOVHPS from memory: one half changes.
unsafe fn load_half<const HALF: usize>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    match cpu.read_ptr(cpu.ea(op), 8) {
        Some(p) => {
            let v = p.cast::<u64>().read_unaligned();
            cpu.xmm[(*op).dst as usize >> 4].0[HALF] = v;
            Op::run_next(cpu, op)
        }
        None => load_half_apart::<HALF>(cpu, op),
    }
}

/// Stores the low (`HALF` 0) or high part.
unsafe fn store_part<T: Int, const HALF: usize>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    match cpu.write_ptr(cpu.ea(op), T::BYTES) {
        Some(p) => {
            p.cast::<T>().write_unaligned(T::from_u64(cpu.xmm((*op).src).0[HALF]));
            Op::run_next(cpu, op)
        }
        None => store_part_apart::<T, HALF>(cpu, op),
    }
}

// What the handlers above end with when the TLB does not have the operand in one page: apart, so that they need no
// stack frame.

#[cold]
#[inline(never)]
unsafe fn load_apart(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, cpu.load128(cpu.ea(op)));
    cpu.set_xmm((*op).dst, v);
    Op::run_next(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn store_apart(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = cpu.xmm((*op).src);
    t!(cpu, op, cpu.store128(cpu.ea(op), v));
    Op::run_next(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn load_low_apart<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, cpu.load::<T>(cpu.ea(op)));
    cpu.set_xmm((*op).dst, Xmm([v.to_u64(), 0]));
    Op::run_next(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn load_half_apart<const HALF: usize>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, cpu.load::<u64>(cpu.ea(op)));
    cpu.xmm[(*op).dst as usize >> 4].0[HALF] = v;
    Op::run_next(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn store_part_apart<T: Int, const HALF: usize>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = T::from_u64(cpu.xmm((*op).src).0[HALF]);
    t!(cpu, op, cpu.store::<T>(cpu.ea(op), v));
    Op::run_next(cpu, op)
}

/// MOVSS register to register: 4 bytes change.
unsafe fn merge32(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm((*op).src).0[0];
    let d = &mut cpu.xmm[(*op).dst as usize >> 4].0[0];
    *d = *d >> 32 << 32 | v & 0xffff_ffff;
    Op::run_next(cpu, op)
}

/// MOVSD, MOVHLPS, MOVLHPS register to register: half `FROM` of the source becomes half `TO`.
unsafe fn merge64<const FROM: usize, const TO: usize>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm((*op).src).0[FROM];
    cpu.xmm[(*op).dst as usize >> 4].0[TO] = v;
    Op::run_next(cpu, op)
}

/// MOVQ register to register: the upper half becomes zero.
unsafe fn low64(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm((*op).src).0[0];
    cpu.set_xmm((*op).dst, Xmm([v, 0]));
    Op::run_next(cpu, op)
}

unsafe fn from_gpr32(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.reg::<u32>((*op).src);
    cpu.set_xmm((*op).dst, Xmm([u64::from(v), 0]));
    Op::run_next(cpu, op)
}

unsafe fn from_gpr64(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.reg::<u64>((*op).src);
    cpu.set_xmm((*op).dst, Xmm([v, 0]));
    Op::run_next(cpu, op)
}

unsafe fn to_gpr32(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm((*op).src).0[0];
    cpu.set_reg::<u32>((*op).dst, v as u32);
    Op::run_next(cpu, op)
}

unsafe fn to_gpr64(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm((*op).src).0[0];
    cpu.set_reg::<u64>((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOVNTI.
unsafe fn movnti<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = cpu.reg::<T>((*op).src);
    t!(cpu, op, cpu.store::<T>(cpu.ea(op), v));
    Op::run_next(cpu, op)
}

/// MASKMOVDQU: bytes whose mask bit is set go to [RDI].
unsafe fn maskmov(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let va = cpu.ea(op);
    let (v, mask) = (cpu.xmm((*op).dst), cpu.xmm((*op).src));
    t!(cpu, op, cpu.store_masked(va, v, mask, 16));
    Op::run_next(cpu, op)
}

impl Cpu {
    /// Stores those of the first `bytes` bytes of `v` whose mask byte has bit 7 set; nothing when any of them faults.
    pub(super) unsafe fn store_masked(
        &mut self,
        va: u64,
        v: Xmm,
        mask: Xmm,
        bytes: u64,
    ) -> Result<(), crate::cpu::Trap> {
        let byte = |x: &Xmm, i: u64| (x.0[i as usize >> 3] >> (i % 8 * 8)) as u8;
        for i in (0..bytes).filter(|&i| byte(&mask, i) & 0x80 != 0) {
            self.probe_write(va.wrapping_add(i), 1)?;
        }
        for i in (0..bytes).filter(|&i| byte(&mask, i) & 0x80 != 0) {
            self.store::<u8>(va.wrapping_add(i), byte(&v, i))?;
        }
        Ok(())
    }
}

/// Lowers moves.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    match insn.code() {
        Code::Movaps_xmm_xmmm128
        | Code::Movapd_xmm_xmmm128
        | Code::Movdqa_xmm_xmmm128
        | Code::Movntdqa_xmm_m128 => {
            op.h = if operands(insn, op) { load::<true> } else { copy };
        }
        Code::Movups_xmm_xmmm128
        | Code::Movupd_xmm_xmmm128
        | Code::Movdqu_xmm_xmmm128
        | Code::Lddqu_xmm_m128 => {
            op.h = if operands(insn, op) { load::<false> } else { copy };
        }
        Code::Movaps_xmmm128_xmm
        | Code::Movapd_xmmm128_xmm
        | Code::Movdqa_xmmm128_xmm
        | Code::Movntps_m128_xmm
        | Code::Movntpd_m128_xmm
        | Code::Movntdq_m128_xmm
            if memory =>
        {
            op.src = xmm(insn.op1_register());
            op.h = store::<true>;
        }
        Code::Movups_xmmm128_xmm | Code::Movupd_xmmm128_xmm | Code::Movdqu_xmmm128_xmm if memory => {
            op.src = xmm(insn.op1_register());
            op.h = store::<false>;
        }
        Code::Movaps_xmmm128_xmm
        | Code::Movapd_xmmm128_xmm
        | Code::Movdqa_xmmm128_xmm
        | Code::Movups_xmmm128_xmm
        | Code::Movupd_xmmm128_xmm
        | Code::Movdqu_xmmm128_xmm => {
            operands(insn, op);
            op.h = copy;
        }
        Code::Movss_xmm_xmmm32 => op.h = if operands(insn, op) { load_low::<u32> } else { merge32 },
        Code::Movsd_xmm_xmmm64 => op.h = if operands(insn, op) { load_low::<u64> } else { merge64::<0, 0> },
        Code::Movq_xmm_xmmm64 => op.h = if operands(insn, op) { load_low::<u64> } else { low64 },
        Code::Movss_xmmm32_xmm => {
            op.src = xmm(insn.op1_register());
            op.h = if memory { store_part::<u32, 0> } else { merge32 };
            if !memory {
                op.dst = xmm(insn.op0_register());
            }
        }
        Code::Movsd_xmmm64_xmm | Code::Movq_xmmm64_xmm => {
            let q = insn.code() == Code::Movq_xmmm64_xmm;
            op.src = xmm(insn.op1_register());
            op.h = match (memory, q) {
                (true, _) => store_part::<u64, 0>,
                (false, true) => low64,
                (false, false) => merge64::<0, 0>,
            };
            if !memory {
                op.dst = xmm(insn.op0_register());
            }
        }
        Code::Movlps_xmm_m64 | Code::Movlpd_xmm_m64 => {
            operands(insn, op);
            op.h = load_half::<0>;
        }
        Code::Movhps_xmm_m64 | Code::Movhpd_xmm_m64 => {
            operands(insn, op);
            op.h = load_half::<1>;
        }
        Code::Movlps_m64_xmm | Code::Movlpd_m64_xmm => {
            op.src = xmm(insn.op1_register());
            op.h = store_part::<u64, 0>;
        }
        Code::Movhps_m64_xmm | Code::Movhpd_m64_xmm => {
            op.src = xmm(insn.op1_register());
            op.h = store_part::<u64, 1>;
        }
        Code::Movhlps_xmm_xmm => {
            operands(insn, op);
            op.h = merge64::<1, 0>;
        }
        Code::Movlhps_xmm_xmm => {
            operands(insn, op);
            op.h = merge64::<0, 1>;
        }
        Code::Movd_xmm_rm32 => {
            op.dst = xmm(insn.op0_register());
            op.h = if memory { load_low::<u32> } else { from_gpr32 };
            if !memory {
                op.src = gpr(insn.op1_register());
            }
        }
        Code::Movq_xmm_rm64 => {
            op.dst = xmm(insn.op0_register());
            op.h = if memory { load_low::<u64> } else { from_gpr64 };
            if !memory {
                op.src = gpr(insn.op1_register());
            }
        }
        Code::Movd_rm32_xmm => {
            op.src = xmm(insn.op1_register());
            op.h = if memory { store_part::<u32, 0> } else { to_gpr32 };
            if !memory {
                op.dst = gpr(insn.op0_register());
            }
        }
        Code::Movq_rm64_xmm => {
            op.src = xmm(insn.op1_register());
            op.h = if memory { store_part::<u64, 0> } else { to_gpr64 };
            if !memory {
                op.dst = gpr(insn.op0_register());
            }
        }
        Code::Movnti_m32_r32 => {
            op.src = gpr(insn.op1_register());
            op.h = movnti::<u32>;
        }
        Code::Movnti_m64_r64 => {
            op.src = gpr(insn.op1_register());
            op.h = movnti::<u64>;
        }
        Code::Maskmovdqu_rDI_xmm_xmm => {
            if insn.op0_kind() != OpKind::MemorySegRDI {
                return Lowered::No;
            }
            rdi_operand(insn, op);
            op.dst = xmm(insn.op1_register());
            op.src = xmm(insn.op2_register());
            op.h = maskmov;
        }
        _ => return Lowered::No,
    }
    Lowered::Plain
}

/// The implied memory operand of MASKMOVDQU and MASKMOVQ: seg:[RDI].
pub(super) fn rdi_operand(insn: &Instruction, op: &mut Op) {
    op.base = reg::RDI;
    op.index = reg::ZERO;
    op.scale = 0;
    op.disp = 0;
    op.seg = match insn.memory_segment() {
        iced_x86::Register::FS => reg::FS,
        iced_x86::Register::GS => reg::GS,
        _ => reg::ZERO,
    };
}
