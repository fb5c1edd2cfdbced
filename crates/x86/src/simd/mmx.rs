//! MMX: 64-bit vectors in the significands of the x87 registers (Intel SDM vol. 1, chapter 9).
//!
//! The first MMX instruction after x87 ones turns the register stack so that MMi is physical register i, marks all
//! registers as used and TOP as 0. Rare in 64-bit programs, so nothing here is tuned.

use std::arch::asm;
use std::mem::transmute;

use iced_x86::{Code, Instruction, OpKind, Register};

use super::moves::rdi_operand;
use super::{CR0_EM, CR0_TS, Run, available};
use crate::cpu::{Cpu, Trap, Xmm, vector};
use crate::decode::{Lowered, gpr, xmm};
use crate::op::Op;
use crate::ops::t;

/// Bits 64 to 79 of a register that an MMX instruction wrote.
const EXPONENT: u64 = 0xffff;

impl Cpu {
    /// Before an MMX instruction: what can fault but for memory.
    unsafe fn mmx_begin(&mut self) -> Result<(), Trap> {
        if self.ctl.cr0 & CR0_EM != 0 {
            return Err(self.raise(vector::UD, None));
        }
        if self.ctl.cr0 & CR0_TS != 0 {
            return Err(self.raise(vector::NM, None));
        }
        self.x87_save();
        if self.x87.pending() { Err(self.raise(vector::MF, None)) } else { Ok(()) }
    }

    /// Once nothing can fault any more: the x87 state becomes MMX state.
    fn mmx_commit(&mut self) {
        self.mmx_turn();
        self.x87.ftw = 0xff;
    }

    /// TOP becomes 0; registers stay where they are.
    fn mmx_turn(&mut self) {
        let top = self.x87.top();
        self.x87.st.rotate_right(top);
        self.x87.set_top(0);
    }

    fn mm(&self, off: u8) -> u64 {
        self.x87.st[off as usize >> 4][0]
    }

    fn set_mm(&mut self, off: u8, v: u64) {
        self.x87.st[off as usize >> 4] = [v, EXPONENT];
    }

    /// The source operand: memory (`MEM`) of `bytes` bytes, or the register (after the commit).
    unsafe fn mmx_source<const MEM: bool>(&mut self, op: *const Op, bytes: u64) -> Result<u64, Trap> {
        self.mmx_begin()?;
        if MEM {
            let va = self.ea(op);
            let v = if bytes == 8 {
                self.load::<u64>(va)?
            } else if bytes == 4 {
                u64::from(self.load::<u32>(va)?)
            } else {
                u64::from(self.load::<u16>(va)?)
            };
            self.mmx_commit();
            Ok(v)
        } else {
            self.mmx_commit();
            Ok(self.mm((*op).src))
        }
    }
}

/// Offset of an MMX register in the file.
fn mm(r: Register) -> u8 {
    r.number() as u8 * 16
}

/// `op mm, mm/m`: `imm` holds what to run, `aux` the size of a memory operand.
unsafe fn pair<const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let src = t!(cpu, op, cpu.mmx_source::<MEM>(op, u64::from((*op).aux)));
    run(cpu, op, src)
}

/// Shifts by an immediate, which is the source of the shift by a register.
unsafe fn shift(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    run(cpu, op, u64::from((*op).aux))
}

unsafe fn run(cpu: &mut Cpu, op: *const Op, src: u64) -> *const Op {
    let mut dst = cpu.mm((*op).dst);
    let run = transmute::<usize, Run>((*op).imm as usize);
    run((&raw mut dst).cast(), (&raw const src).cast());
    cpu.set_mm((*op).dst, dst);
    Op::run_next(cpu, op)
}

macro_rules! pairs {
    ($($bytes:literal { $($code:ident $name:ident)* })*) => {
        fn host(code: Code) -> Option<(Run, u8)> {
            $($(
                unsafe fn $name(dst: *mut u8, src: *const u8) {
                    asm!(
                        "movq mm0, [{d}]",
                        concat!(stringify!($name), " mm0, [{s}]"),
                        "movq [{d}], mm0",
                        "emms",
                        d = in(reg) dst, s = in(reg) src,
                        out("mm0") _, options(nostack, preserves_flags)
                    );
                }
            )*)*
            match code {
                $($(Code::$code => Some(($name, $bytes)),)*)*
                _ => None,
            }
        }
    };
}

pairs! {
    8 {
        Paddb_mm_mmm64 paddb
        Paddw_mm_mmm64 paddw
        Paddd_mm_mmm64 paddd
        Paddq_mm_mmm64 paddq
        Paddsb_mm_mmm64 paddsb
        Paddsw_mm_mmm64 paddsw
        Paddusb_mm_mmm64 paddusb
        Paddusw_mm_mmm64 paddusw
        Psubb_mm_mmm64 psubb
        Psubw_mm_mmm64 psubw
        Psubd_mm_mmm64 psubd
        Psubq_mm_mmm64 psubq
        Psubsb_mm_mmm64 psubsb
        Psubsw_mm_mmm64 psubsw
        Psubusb_mm_mmm64 psubusb
        Psubusw_mm_mmm64 psubusw
        Pand_mm_mmm64 pand
        Pandn_mm_mmm64 pandn
        Por_mm_mmm64 por
        Pxor_mm_mmm64 pxor
        Pcmpeqb_mm_mmm64 pcmpeqb
        Pcmpeqw_mm_mmm64 pcmpeqw
        Pcmpeqd_mm_mmm64 pcmpeqd
        Pcmpgtb_mm_mmm64 pcmpgtb
        Pcmpgtw_mm_mmm64 pcmpgtw
        Pcmpgtd_mm_mmm64 pcmpgtd
        Pmullw_mm_mmm64 pmullw
        Pmulhw_mm_mmm64 pmulhw
        Pmulhuw_mm_mmm64 pmulhuw
        Pmuludq_mm_mmm64 pmuludq
        Pmaddwd_mm_mmm64 pmaddwd
        Pmaddubsw_mm_mmm64 pmaddubsw
        Pmulhrsw_mm_mmm64 pmulhrsw
        Psadbw_mm_mmm64 psadbw
        Pavgb_mm_mmm64 pavgb
        Pavgw_mm_mmm64 pavgw
        Pminub_mm_mmm64 pminub
        Pminsw_mm_mmm64 pminsw
        Pmaxub_mm_mmm64 pmaxub
        Pmaxsw_mm_mmm64 pmaxsw
        Psllw_mm_mmm64 psllw
        Pslld_mm_mmm64 pslld
        Psllq_mm_mmm64 psllq
        Psrlw_mm_mmm64 psrlw
        Psrld_mm_mmm64 psrld
        Psrlq_mm_mmm64 psrlq
        Psraw_mm_mmm64 psraw
        Psrad_mm_mmm64 psrad
        Packsswb_mm_mmm64 packsswb
        Packssdw_mm_mmm64 packssdw
        Packuswb_mm_mmm64 packuswb
        Punpckhbw_mm_mmm64 punpckhbw
        Punpckhwd_mm_mmm64 punpckhwd
        Punpckhdq_mm_mmm64 punpckhdq
        Phaddw_mm_mmm64 phaddw
        Phaddd_mm_mmm64 phaddd
        Phaddsw_mm_mmm64 phaddsw
        Phsubw_mm_mmm64 phsubw
        Phsubd_mm_mmm64 phsubd
        Phsubsw_mm_mmm64 phsubsw
        Pshufb_mm_mmm64 pshufb
        Psignb_mm_mmm64 psignb
        Psignw_mm_mmm64 psignw
        Psignd_mm_mmm64 psignd
        Pabsb_mm_mmm64 pabsb
        Pabsw_mm_mmm64 pabsw
        Pabsd_mm_mmm64 pabsd
    }
    4 {
        Punpcklbw_mm_mmm32 punpcklbw
        Punpcklwd_mm_mmm32 punpcklwd
        Punpckldq_mm_mmm32 punpckldq
    }
}

/// PSHUFW and PALIGNR: (destination, source, immediate) to result.
type Compute = fn(u64, u64, u8) -> u64;

fn pshufw(_: u64, s: u64, n: u8) -> u64 {
    (0..4).fold(0, |r, i| r | (s >> (16 * (n >> (2 * i) & 3)) & 0xffff) << (16 * i))
}

fn palignr(d: u64, s: u64, n: u8) -> u64 {
    let both = u128::from(d) << 64 | u128::from(s);
    if n < 16 { (both >> (8 * u32::from(n))) as u64 } else { 0 }
}

unsafe fn immediate<const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let src = t!(cpu, op, cpu.mmx_source::<MEM>(op, 8));
    let compute = transmute::<usize, Compute>((*op).imm as usize);
    let v = compute(cpu.mm((*op).dst), src, (*op).aux);
    cpu.set_mm((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOVQ and MOVD to an MMX register from memory of `aux` bytes or from one.
unsafe fn load<const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, cpu.mmx_source::<MEM>(op, u64::from((*op).aux)));
    cpu.set_mm((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOVQ, MOVNTQ and MOVD to memory of `aux` bytes.
unsafe fn store(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    let va = cpu.ea(op);
    // TOP changes even if the store faults.
    cpu.mmx_turn();
    let v = cpu.mm((*op).src);
    if (*op).aux == 8 {
        t!(cpu, op, cpu.store::<u64>(va, v));
    } else {
        t!(cpu, op, cpu.store::<u32>(va, v as u32));
    }
    cpu.mmx_commit();
    Op::run_next(cpu, op)
}

/// MOVD and MOVQ from a general register; `aux` bytes.
unsafe fn from_gpr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    let v = if (*op).aux == 8 { cpu.reg::<u64>((*op).src) } else { u64::from(cpu.reg::<u32>((*op).src)) };
    cpu.set_mm((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOVD and MOVQ to a general register; `aux` bytes.
unsafe fn to_gpr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    let v = cpu.mm((*op).src);
    cpu.set_reg::<u64>((*op).dst, if (*op).aux == 8 { v } else { v & 0xffff_ffff });
    Op::run_next(cpu, op)
}

/// PMOVMSKB.
unsafe fn byte_mask(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    let v = cpu.mm((*op).src);
    let mask = (0..8).fold(0, |m, i| m | (v >> (8 * i + 7) & 1) << i);
    cpu.set_reg::<u64>((*op).dst, mask);
    Op::run_next(cpu, op)
}

/// PEXTRW.
unsafe fn extract(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    let v = cpu.mm((*op).src) >> (16 * (*op).aux) & 0xffff;
    cpu.set_reg::<u64>((*op).dst, v);
    Op::run_next(cpu, op)
}

/// PINSRW.
unsafe fn insert<const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = if MEM {
        t!(cpu, op, cpu.mmx_source::<true>(op, 2))
    } else {
        t!(cpu, op, cpu.mmx_begin());
        cpu.mmx_commit();
        u64::from(cpu.reg::<u16>((*op).src))
    };
    let at = 16 * (*op).aux;
    let old = cpu.mm((*op).dst);
    cpu.set_mm((*op).dst, old & !(0xffff << at) | v << at);
    Op::run_next(cpu, op)
}

/// MASKMOVQ.
unsafe fn maskmov(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    let va = cpu.ea(op);
    // Faults leave the x87 state as it was, so look at the registers where they are now.
    let top = cpu.x87.top();
    let at = |off: u8| ((off as usize >> 4).wrapping_sub(top)) & 7;
    let v = Xmm([cpu.x87.st[at((*op).dst)][0], 0]);
    let mask = Xmm([cpu.x87.st[at((*op).src)][0], 0]);
    t!(cpu, op, cpu.store_masked(va, v, mask, 8));
    cpu.mmx_commit();
    Op::run_next(cpu, op)
}

/// MOVQ2DQ.
unsafe fn to_xmm(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    let v = cpu.mm((*op).src);
    cpu.set_xmm((*op).dst, Xmm([v, 0]));
    Op::run_next(cpu, op)
}

/// MOVDQ2Q.
unsafe fn from_xmm(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    let v = cpu.xmm((*op).src).0[0];
    cpu.set_mm((*op).dst, v);
    Op::run_next(cpu, op)
}

unsafe fn emms(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.mmx_begin());
    cpu.mmx_commit();
    cpu.x87.ftw = 0;
    Op::run_next(cpu, op)
}

macro_rules! conversions {
    ($($name:ident)*) => {$(
        unsafe fn $name(dst: *mut u8, src: *const u8) {
            asm!(
                "movaps xmm0, [{d}]",
                "movq mm0, [{s}]",
                concat!(stringify!($name), " xmm0, mm0"),
                "movaps [{d}], xmm0",
                "emms",
                d = in(reg) dst, s = in(reg) src, out("xmm0") _,
                out("mm0") _, options(nostack, preserves_flags)
            );
        }
    )*};
}
conversions!(cvtpi2ps cvtpi2pd);

macro_rules! conversions_to_mm {
    ($($name:ident)*) => {$(
        unsafe fn $name(dst: *mut u8, src: *const u8) {
            asm!(
                "movaps xmm0, [{s}]",
                concat!(stringify!($name), " mm0, xmm0"),
                "movq [{d}], mm0",
                "emms",
                d = in(reg) dst, s = in(reg) src, out("xmm0") _,
                out("mm0") _, options(nostack, preserves_flags)
            );
        }
    )*};
}
conversions_to_mm!(cvtps2pi cvttps2pi cvtpd2pi cvttpd2pi);

/// CVTPI2PS and CVTPI2PD: `imm` holds what to run. From memory they do not touch the x87 state.
unsafe fn convert_from<const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let check = t!(cpu, op, cpu.fp_begin());
    let src = if MEM {
        // Executing it needs the host's MMX registers.
        cpu.x87_save();
        t!(cpu, op, cpu.load::<u64>(cpu.ea(op)))
    } else {
        t!(cpu, op, cpu.mmx_source::<false>(op, 8))
    };
    let old = cpu.xmm((*op).dst);
    let run = transmute::<usize, Run>((*op).imm as usize);
    cpu.x87.operand = Xmm([src, 0]);
    run(cpu.xmm_ptr((*op).dst), (&raw const cpu.x87.operand).cast());
    if check {
        t!(cpu, op, cpu.fp_end_or_restore((*op).dst, old));
    }
    Op::run_next(cpu, op)
}

/// CVT(T)PS2PI and CVT(T)PD2PI.
unsafe fn convert_to<const MEM: bool, const BYTES: u64>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let check = t!(cpu, op, cpu.fp_begin());
    t!(cpu, op, cpu.mmx_begin());
    let src = if !MEM {
        cpu.xmm((*op).src)
    } else if BYTES == 8 {
        Xmm([t!(cpu, op, cpu.load::<u64>(cpu.ea(op))), 0])
    } else {
        let va = cpu.ea(op);
        if va & 15 != 0 {
            return cpu.alignment_fault(op);
        }
        t!(cpu, op, cpu.load128(va))
    };
    let run = transmute::<usize, Run>((*op).imm as usize);
    let mut dst = 0u64;
    run((&raw mut dst).cast(), (&raw const src).cast());
    // The x87 state changes even if the conversion faults.
    cpu.mmx_commit();
    if check {
        t!(cpu, op, cpu.fp_end());
    }
    cpu.set_mm((*op).dst, dst);
    Op::run_next(cpu, op)
}

fn lower_convert(insn: &Instruction, op: &mut Op) -> Lowered {
    let memory = insn.op1_kind() == OpKind::Memory;
    let (run, bytes): (Run, u8) = match insn.code() {
        Code::Cvtpi2ps_xmm_mmm64 => (cvtpi2ps, 0),
        Code::Cvtpi2pd_xmm_mmm64 => (cvtpi2pd, 0),
        Code::Cvtps2pi_mm_xmmm64 => (cvtps2pi, 8),
        Code::Cvttps2pi_mm_xmmm64 => (cvttps2pi, 8),
        Code::Cvtpd2pi_mm_xmmm128 => (cvtpd2pi, 16),
        Code::Cvttpd2pi_mm_xmmm128 => (cvttpd2pi, 16),
        _ => return Lowered::No,
    };
    op.imm = run as usize as u64;
    if bytes >= 8 {
        op.dst = mm(insn.op0_register());
        if !memory {
            op.src = xmm(insn.op1_register());
        }
        op.h = match (memory, bytes) {
            (false, _) => convert_to::<false, 8>,
            (true, 8) => convert_to::<true, 8>,
            (true, _) => convert_to::<true, 16>,
        };
    } else {
        op.dst = xmm(insn.op0_register());
        if !memory {
            op.src = mm(insn.op1_register());
        }
        op.h = if memory { convert_from::<true> } else { convert_from::<false> };
    }
    Lowered::Plain
}

fn lower_shift(insn: &Instruction, op: &mut Op) -> Lowered {
    let by_register = match insn.code() {
        Code::Psllw_mm_imm8 => Code::Psllw_mm_mmm64,
        Code::Pslld_mm_imm8 => Code::Pslld_mm_mmm64,
        Code::Psllq_mm_imm8 => Code::Psllq_mm_mmm64,
        Code::Psrlw_mm_imm8 => Code::Psrlw_mm_mmm64,
        Code::Psrld_mm_imm8 => Code::Psrld_mm_mmm64,
        Code::Psrlq_mm_imm8 => Code::Psrlq_mm_mmm64,
        Code::Psraw_mm_imm8 => Code::Psraw_mm_mmm64,
        Code::Psrad_mm_imm8 => Code::Psrad_mm_mmm64,
        _ => return Lowered::No,
    };
    let Some((run, _)) = host(by_register) else { return Lowered::No };
    op.imm = run as usize as u64;
    op.dst = mm(insn.op0_register());
    op.aux = insn.immediate8();
    op.h = shift;
    Lowered::Plain
}

/// Lowers MMX instructions.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if let Some((run, bytes)) = host(insn.code()) {
        op.imm = run as usize as u64;
        op.aux = bytes;
        op.dst = mm(insn.op0_register());
        if !memory {
            op.src = mm(insn.op1_register());
        }
        op.h = if memory { pair::<true> } else { pair::<false> };
        return Lowered::Plain;
    }
    match insn.code() {
        Code::Pshufw_mm_mmm64_imm8 | Code::Palignr_mm_mmm64_imm8 => {
            let compute: Compute = if insn.code() == Code::Pshufw_mm_mmm64_imm8 { pshufw } else { palignr };
            op.imm = compute as usize as u64;
            op.aux = insn.immediate8();
            op.dst = mm(insn.op0_register());
            if !memory {
                op.src = mm(insn.op1_register());
            }
            op.h = if memory { immediate::<true> } else { immediate::<false> };
        }
        Code::Movq_mm_mmm64 => {
            op.dst = mm(insn.op0_register());
            op.aux = 8;
            if !memory {
                op.src = mm(insn.op1_register());
            }
            op.h = if memory { load::<true> } else { load::<false> };
        }
        Code::Movd_mm_rm32 | Code::Movq_mm_rm64 => {
            op.dst = mm(insn.op0_register());
            op.aux = if insn.code() == Code::Movd_mm_rm32 { 4 } else { 8 };
            if !memory {
                op.src = gpr(insn.op1_register());
            }
            op.h = if memory { load::<true> } else { from_gpr };
        }
        Code::Movd_rm32_mm | Code::Movq_rm64_mm => {
            op.src = mm(insn.op1_register());
            op.aux = if insn.code() == Code::Movd_rm32_mm { 4 } else { 8 };
            if !memory {
                op.dst = gpr(insn.op0_register());
            }
            op.h = if memory { store } else { to_gpr };
        }
        Code::Movq_mmm64_mm | Code::Movntq_m64_mm => {
            op.src = mm(insn.op1_register());
            op.aux = 8;
            if !memory {
                op.dst = mm(insn.op0_register());
            }
            op.h = if memory { store } else { load::<false> };
        }
        Code::Maskmovq_rDI_mm_mm => {
            if insn.op0_kind() != OpKind::MemorySegRDI {
                return Lowered::No;
            }
            rdi_operand(insn, op);
            op.dst = mm(insn.op1_register());
            op.src = mm(insn.op2_register());
            op.h = maskmov;
        }
        Code::Pmovmskb_r32_mm | Code::Pmovmskb_r64_mm => {
            op.dst = gpr(insn.op0_register());
            op.src = mm(insn.op1_register());
            op.h = byte_mask;
        }
        Code::Pextrw_r32_mm_imm8 | Code::Pextrw_r64_mm_imm8 => {
            op.dst = gpr(insn.op0_register());
            op.src = mm(insn.op1_register());
            op.aux = insn.immediate8() & 3;
            op.h = extract;
        }
        Code::Pinsrw_mm_r32m16_imm8 | Code::Pinsrw_mm_r64m16_imm8 => {
            op.dst = mm(insn.op0_register());
            op.aux = insn.immediate8() & 3;
            if !memory {
                op.src = gpr(insn.op1_register());
            }
            op.h = if memory { insert::<true> } else { insert::<false> };
        }
        Code::Movq2dq_xmm_mm => {
            op.dst = xmm(insn.op0_register());
            op.src = mm(insn.op1_register());
            op.h = to_xmm;
        }
        Code::Movdq2q_mm_xmm => {
            op.dst = mm(insn.op0_register());
            op.src = xmm(insn.op1_register());
            op.h = from_xmm;
        }
        Code::Emms => op.h = emms,
        _ => {
            return if matches!(lower_convert(insn, op), Lowered::Plain) {
                Lowered::Plain
            } else {
                lower_shift(insn, op)
            };
        }
    }
    Lowered::Plain
}
