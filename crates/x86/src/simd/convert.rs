//! Vector instructions with a general register or the flags on one side: conversions, compares, mask moves, element
//! insertion and extraction, CRC32.

use std::arch::asm;

use iced_x86::{Code, Instruction, OpKind};

use super::{available, operands};
use crate::cpu::Cpu;
use crate::decode::{Lowered, gpr, xmm};
use crate::flags::bit;
use crate::mem::Int;
use crate::op::Op;
use crate::ops::t;

/// CVT(T)SS2SI and CVT(T)SD2SI.
trait ToInteger {
    const BYTES: u64;
    unsafe fn run(src: *const u8) -> u64;
}

/// CVTSI2SS and CVTSI2SD.
trait FromInteger {
    type Integer: Int;
    unsafe fn run(dst: *mut u8, v: u64);
}

/// COMIS* and UCOMIS*: returns AH as LAHF gives it.
trait Compare {
    const BYTES: u64;
    unsafe fn run(a: *const u8, b: *const u8) -> u16;
}

#[inline(always)]
unsafe fn scalar<const MEM: bool>(
    cpu: &mut Cpu,
    op: *const Op,
    bytes: u64,
) -> Result<*const u8, crate::cpu::Trap> {
    if bytes == 8 { cpu.source::<MEM, 8, false>(op) } else { cpu.source::<MEM, 4, false>(op) }
}

unsafe fn to_integer<O: ToInteger, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.x87.gate == 0
        && let Some(src) = cpu.source_in_place::<MEM>(op, O::BYTES)
    {
        cpu.set_reg::<u64>((*op).dst, O::run(src));
        return Op::run_next(cpu, op);
    }
    to_integer_apart::<O, MEM>(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn to_integer_apart<O: ToInteger, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let check = t!(cpu, op, cpu.fp_begin());
    let src = t!(cpu, op, scalar::<MEM>(cpu, op, O::BYTES));
    let v = O::run(src);
    if check {
        t!(cpu, op, cpu.fp_end());
    }
    cpu.set_reg::<u64>((*op).dst, v);
    Op::run_next(cpu, op)
}

unsafe fn from_integer<O: FromInteger, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if !MEM && cpu.x87.gate == 0 {
        let v = cpu.reg::<O::Integer>((*op).src).to_u64();
        O::run(cpu.xmm_ptr((*op).dst), v);
        return Op::run_next(cpu, op);
    }
    from_integer_apart::<O, MEM>(cpu, op)
}

#[inline(never)]
unsafe fn from_integer_apart<O: FromInteger, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let check = t!(cpu, op, cpu.fp_begin());
    let v =
        if MEM { t!(cpu, op, cpu.load::<O::Integer>(cpu.ea(op))) } else { cpu.reg::<O::Integer>((*op).src) };
    if check {
        let old = cpu.xmm((*op).dst);
        O::run(cpu.xmm_ptr((*op).dst), v.to_u64());
        t!(cpu, op, cpu.fp_end_or_restore((*op).dst, old));
    } else {
        O::run(cpu.xmm_ptr((*op).dst), v.to_u64());
    }
    Op::run_next(cpu, op)
}

unsafe fn compare<O: Compare, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.x87.gate == 0
        && let Some(src) = cpu.source_in_place::<MEM>(op, O::BYTES)
    {
        let ah = O::run(cpu.xmm_ptr((*op).dst), src);
        cpu.set_zpc(ah);
        return Op::run_next(cpu, op);
    }
    compare_apart::<O, MEM>(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn compare_apart<O: Compare, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let check = t!(cpu, op, cpu.fp_begin());
    let src = t!(cpu, op, scalar::<MEM>(cpu, op, O::BYTES));
    let ah = O::run(cpu.xmm_ptr((*op).dst), src);
    if check {
        t!(cpu, op, cpu.fp_end());
    }
    cpu.set_zpc(ah);
    Op::run_next(cpu, op)
}

impl Cpu {
    /// Sets ZF, PF and CF from AH as LAHF loads it, and clears the other three.
    #[inline(always)]
    pub(crate) fn set_zpc(&mut self, ax: u16) {
        let f = u32::from(ax >> 8);
        let (zf, pf, cf) = (f >> 6 & 1, f >> 2 & 1, f & 1);
        // A result of 0 means ZF and PF, one of 1 neither; bit 17 of `c` flips PF.
        self.fl.res = u64::from(zf ^ 1);
        self.fl.ab = self.fl.res;
        self.fl.c = cf | (pf ^ zf) << 17;
    }
}

macro_rules! to_integer {
    ($($code:ident $bytes:literal $template:literal)*) => {
        $(
            #[allow(non_camel_case_types, reason = "iced's names")]
            struct $code;
            impl ToInteger for $code {
                const BYTES: u64 = $bytes;
                #[inline(always)]
                unsafe fn run(src: *const u8) -> u64 {
                    let v: u64;
                    asm!($template, o = out(reg) v, s = in(reg) src,
                        options(nostack, preserves_flags, readonly));
                    v
                }
            }
        )*
        fn lower_to_integer(insn: &Instruction, op: &mut Op) -> Lowered {
            let memory = insn.op1_kind() == OpKind::Memory;
            op.h = match insn.code() {
                $(Code::$code if memory => to_integer::<$code, true>, Code::$code => to_integer::<$code, false>,)*
                _ => return Lowered::No,
            };
            op.dst = gpr(insn.op0_register());
            if !memory {
                op.src = xmm(insn.op1_register());
            }
            Lowered::Plain
        }
    };
}

to_integer! {
    Cvtss2si_r32_xmmm32 4 "cvtss2si {o:e}, dword ptr [{s}]"
    Cvtss2si_r64_xmmm32 4 "cvtss2si {o}, dword ptr [{s}]"
    Cvttss2si_r32_xmmm32 4 "cvttss2si {o:e}, dword ptr [{s}]"
    Cvttss2si_r64_xmmm32 4 "cvttss2si {o}, dword ptr [{s}]"
    Cvtsd2si_r32_xmmm64 8 "cvtsd2si {o:e}, qword ptr [{s}]"
    Cvtsd2si_r64_xmmm64 8 "cvtsd2si {o}, qword ptr [{s}]"
    Cvttsd2si_r32_xmmm64 8 "cvttsd2si {o:e}, qword ptr [{s}]"
    Cvttsd2si_r64_xmmm64 8 "cvttsd2si {o}, qword ptr [{s}]"
}

macro_rules! from_integer {
    ($($code:ident $int:ty, $template:literal)*) => {
        $(
            #[allow(non_camel_case_types, reason = "iced's names")]
            struct $code;
            impl FromInteger for $code {
                type Integer = $int;
                #[inline(always)]
                unsafe fn run(dst: *mut u8, v: u64) {
                    asm!("movaps xmm0, [{d}]", $template, "movaps [{d}], xmm0",
                        d = in(reg) dst, v = in(reg) v, out("xmm0") _, options(nostack, preserves_flags));
                }
            }
        )*
        fn lower_from_integer(insn: &Instruction, op: &mut Op) -> Lowered {
            let memory = insn.op1_kind() == OpKind::Memory;
            op.h = match insn.code() {
                $(Code::$code if memory => from_integer::<$code, true>,
                Code::$code => from_integer::<$code, false>,)*
                _ => return Lowered::No,
            };
            op.dst = xmm(insn.op0_register());
            if !memory {
                op.src = gpr(insn.op1_register());
            }
            Lowered::Plain
        }
    };
}

from_integer! {
    Cvtsi2ss_xmm_rm32 u32, "cvtsi2ss xmm0, {v:e}"
    Cvtsi2ss_xmm_rm64 u64, "cvtsi2ss xmm0, {v}"
    Cvtsi2sd_xmm_rm32 u32, "cvtsi2sd xmm0, {v:e}"
    Cvtsi2sd_xmm_rm64 u64, "cvtsi2sd xmm0, {v}"
}

macro_rules! compare {
    ($($code:ident $bytes:literal $name:literal)*) => {
        $(
            #[allow(non_camel_case_types, reason = "iced's names")]
            struct $code;
            impl Compare for $code {
                const BYTES: u64 = $bytes;
                #[inline(always)]
                unsafe fn run(a: *const u8, b: *const u8) -> u16 {
                    let ax: u16;
                    asm!("movaps xmm0, [{a}]", concat!($name, " xmm0, [{b}]"), "lahf",
                        a = in(reg) a, b = in(reg) b, out("ax") ax, out("xmm0") _, options(nostack, readonly));
                    ax
                }
            }
        )*
        fn lower_compare(insn: &Instruction, op: &mut Op) -> Lowered {
            let memory = insn.op1_kind() == OpKind::Memory;
            op.h = match insn.code() {
                $(Code::$code if memory => compare::<$code, true>, Code::$code => compare::<$code, false>,)*
                _ => return Lowered::No,
            };
            operands(insn, op);
            Lowered::Plain
        }
    };
}

compare! {
    Comiss_xmm_xmmm32 4 "comiss"
    Ucomiss_xmm_xmmm32 4 "ucomiss"
    Comisd_xmm_xmmm64 8 "comisd"
    Ucomisd_xmm_xmmm64 8 "ucomisd"
}

/// PTEST: ZF when no bit is set in both, CF when the source has none outside the destination.
unsafe fn ptest<const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let src = t!(cpu, op, cpu.source::<MEM, 16, true>(op));
    let s = src.cast::<[u64; 2]>().read_unaligned();
    let d = cpu.xmm((*op).dst).0;
    let zf = s[0] & d[0] | s[1] & d[1] == 0;
    let cf = s[0] & !d[0] | s[1] & !d[1] == 0;
    cpu.fl.set_bits(if zf { bit::ZF } else { 0 } | if cf { bit::CF } else { 0 });
    Op::run_next(cpu, op)
}

macro_rules! mask {
    ($($handler:ident $name:literal)*) => {
        $(
            unsafe fn $handler(cpu: &mut Cpu, op: *const Op) -> *const Op {
                available!(cpu, op);
                let v: u64;
                asm!("movaps xmm0, [{s}]", concat!($name, " {o:e}, xmm0"),
                    s = in(reg) cpu.xmm_ptr((*op).src), o = out(reg) v, out("xmm0") _,
                    options(nostack, preserves_flags, readonly));
                cpu.set_reg::<u64>((*op).dst, v);
                Op::run_next(cpu, op)
            }
        )*
    };
}

mask! {
    pmovmskb "pmovmskb"
    movmskps "movmskps"
    movmskpd "movmskpd"
}

/// PEXTRB, PEXTRW, PEXTRD, PEXTRQ and EXTRACTPS; `aux` is the element.
unsafe fn extract<T: Int, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = cpu.xmm_ptr((*op).src).cast::<T>().add((*op).aux as usize).read_unaligned();
    if MEM {
        t!(cpu, op, cpu.store::<T>(cpu.ea(op), v));
    } else {
        cpu.set_reg::<u64>((*op).dst, v.to_u64());
    }
    Op::run_next(cpu, op)
}

/// PINSRB, PINSRW, PINSRD and PINSRQ; `aux` is the element.
unsafe fn insert<T: Int, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let v = if MEM { t!(cpu, op, cpu.load::<T>(cpu.ea(op))) } else { T::from_u64(cpu.reg::<u64>((*op).src)) };
    cpu.xmm_ptr((*op).dst).cast::<T>().add((*op).aux as usize).write_unaligned(v);
    Op::run_next(cpu, op)
}

fn extract_of<T: Int>(insn: &Instruction, op: &mut Op) -> Lowered {
    op.src = xmm(insn.op1_register());
    op.aux = insn.immediate8() & (16 / T::BYTES - 1) as u8;
    op.h = if insn.op0_kind() == OpKind::Memory {
        extract::<T, true>
    } else {
        op.dst = gpr(insn.op0_register());
        extract::<T, false>
    };
    Lowered::Plain
}

fn insert_of<T: Int>(insn: &Instruction, op: &mut Op) -> Lowered {
    op.dst = xmm(insn.op0_register());
    op.aux = insn.immediate8() & (16 / T::BYTES - 1) as u8;
    op.h = if insn.op1_kind() == OpKind::Memory {
        insert::<T, true>
    } else {
        op.src = gpr(insn.op1_register());
        insert::<T, false>
    };
    Lowered::Plain
}

/// CRC32 (SSE4.2).
unsafe fn crc32<T: Int, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = if MEM { t!(cpu, op, cpu.load::<T>(cpu.ea(op))) } else { cpu.reg::<T>((*op).src) }.to_u64();
    let mut c = cpu.reg::<u64>((*op).dst);
    match T::BYTES {
        1 => asm!("crc32 {c:e}, {v:l}", c = inout(reg) c, v = in(reg) v, options(pure, nomem, nostack)),
        2 => asm!("crc32 {c:e}, {v:x}", c = inout(reg) c, v = in(reg) v, options(pure, nomem, nostack)),
        4 => asm!("crc32 {c:e}, {v:e}", c = inout(reg) c, v = in(reg) v, options(pure, nomem, nostack)),
        _ => asm!("crc32 {c}, {v}", c = inout(reg) c, v = in(reg) v, options(pure, nomem, nostack)),
    }
    cpu.set_reg::<u64>((*op).dst, c);
    Op::run_next(cpu, op)
}

fn crc32_of<T: Int>(insn: &Instruction, op: &mut Op) -> Lowered {
    op.dst = gpr(insn.op0_register());
    op.h = if insn.op1_kind() == OpKind::Memory {
        crc32::<T, true>
    } else {
        op.src = gpr(insn.op1_register());
        crc32::<T, false>
    };
    Lowered::Plain
}

/// Lowers the instructions of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    for lower in [lower_to_integer, lower_from_integer, lower_compare] {
        let lowered = lower(insn, op);
        if !matches!(lowered, Lowered::No) {
            return lowered;
        }
    }
    match insn.code() {
        Code::Ptest_xmm_xmmm128 => {
            op.h = if operands(insn, op) { ptest::<true> } else { ptest::<false> };
        }
        Code::Pmovmskb_r32_xmm | Code::Pmovmskb_r64_xmm => return mask_of(insn, op, pmovmskb),
        Code::Movmskps_r32_xmm | Code::Movmskps_r64_xmm => return mask_of(insn, op, movmskps),
        Code::Movmskpd_r32_xmm | Code::Movmskpd_r64_xmm => return mask_of(insn, op, movmskpd),
        Code::Pextrb_r32m8_xmm_imm8 | Code::Pextrb_r64m8_xmm_imm8 => return extract_of::<u8>(insn, op),
        Code::Pextrw_r32_xmm_imm8
        | Code::Pextrw_r64_xmm_imm8
        | Code::Pextrw_r32m16_xmm_imm8
        | Code::Pextrw_r64m16_xmm_imm8 => return extract_of::<u16>(insn, op),
        Code::Pextrd_rm32_xmm_imm8 | Code::Extractps_rm32_xmm_imm8 | Code::Extractps_r64m32_xmm_imm8 => {
            return extract_of::<u32>(insn, op);
        }
        Code::Pextrq_rm64_xmm_imm8 => return extract_of::<u64>(insn, op),
        Code::Pinsrb_xmm_r32m8_imm8 | Code::Pinsrb_xmm_r64m8_imm8 => return insert_of::<u8>(insn, op),
        Code::Pinsrw_xmm_r32m16_imm8 | Code::Pinsrw_xmm_r64m16_imm8 => return insert_of::<u16>(insn, op),
        Code::Pinsrd_xmm_rm32_imm8 => return insert_of::<u32>(insn, op),
        Code::Pinsrq_xmm_rm64_imm8 => return insert_of::<u64>(insn, op),
        Code::Crc32_r32_rm8 | Code::Crc32_r64_rm8 => return crc32_of::<u8>(insn, op),
        Code::Crc32_r32_rm16 => return crc32_of::<u16>(insn, op),
        Code::Crc32_r32_rm32 => return crc32_of::<u32>(insn, op),
        Code::Crc32_r64_rm64 => return crc32_of::<u64>(insn, op),
        _ => return Lowered::No,
    }
    Lowered::Plain
}

fn mask_of(insn: &Instruction, op: &mut Op, h: crate::op::Handler) -> Lowered {
    op.dst = gpr(insn.op0_register());
    op.src = xmm(insn.op1_register());
    op.h = h;
    Lowered::Plain
}
