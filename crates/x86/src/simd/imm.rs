//! Vector instructions with an immediate byte.
//!
//! An immediate is part of the instruction's bytes, so where the host executes the instruction there is one function
//! per value; `lower` puts the right one into `Op::imm`. What is easily said in Rust is said in Rust.

use std::arch::asm;
use std::marker::PhantomData;
use std::mem::transmute;

use iced_x86::{Code, Instruction, OpKind};

use super::{Run, available, operands, pairs};
use crate::cpu::{Cpu, Xmm};
use crate::decode::{Lowered, xmm};
use crate::flags::bit;
use crate::op::{Op, reg};
use crate::ops::t;

/// `op xmm, xmm/m, imm8`, executed by the host.
trait Imm {
    const FP: bool;
    const BYTES: u64;
    unsafe fn run<const I: u8>(dst: *mut u8, src: *const u8);
}

/// What a string comparison gives: flags, ECX (index forms), XMM0 (mask forms).
struct Found {
    flags: u64,
    index: u64,
    mask: Xmm,
}

type Find = unsafe fn(a: *const u8, b: *const u8, la: i32, lb: i32) -> Found;

/// PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM.
trait Text {
    const EXPLICIT: bool;
    const INDEX: bool;
    unsafe fn find<const I: u8>(a: *const u8, b: *const u8, la: i32, lb: i32) -> Found;
}

macro_rules! row {
    ($o:ident, $f:ident, $h:literal) => {
        [
            $o::$f::<{ $h * 16 }>,
            $o::$f::<{ $h * 16 + 1 }>,
            $o::$f::<{ $h * 16 + 2 }>,
            $o::$f::<{ $h * 16 + 3 }>,
            $o::$f::<{ $h * 16 + 4 }>,
            $o::$f::<{ $h * 16 + 5 }>,
            $o::$f::<{ $h * 16 + 6 }>,
            $o::$f::<{ $h * 16 + 7 }>,
            $o::$f::<{ $h * 16 + 8 }>,
            $o::$f::<{ $h * 16 + 9 }>,
            $o::$f::<{ $h * 16 + 10 }>,
            $o::$f::<{ $h * 16 + 11 }>,
            $o::$f::<{ $h * 16 + 12 }>,
            $o::$f::<{ $h * 16 + 13 }>,
            $o::$f::<{ $h * 16 + 14 }>,
            $o::$f::<{ $h * 16 + 15 }>,
        ]
    };
}

macro_rules! rows {
    ($o:ident, $f:ident; $($h:literal)*) => { [$(row!($o, $f, $h)),*] };
}

struct Table<O>(PhantomData<O>);

impl<O: Imm> Table<O> {
    const SHORT: [[Run; 16]; 1] = rows!(O, run; 0);
    const FULL: [[Run; 16]; 16] = rows!(O, run; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
}

impl<O: Text> Table<O> {
    const TEXT: [[Find; 16]; 8] = rows!(O, find; 0 1 2 3 4 5 6 7);
}

unsafe fn apply<const MEM: bool, const BYTES: u64, const FP: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    if cpu.x87.gate == 0
        && let Some(src) = cpu.source_in_place::<MEM>(op, BYTES)
    {
        transmute::<usize, Run>((*op).imm as usize)(cpu.xmm_ptr((*op).dst), src);
        return Op::run_next(cpu, op);
    }
    apply_apart::<MEM, BYTES, FP>(cpu, op)
}

#[cold]
#[inline(never)]
unsafe fn apply_apart<const MEM: bool, const BYTES: u64, const FP: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    let check = if FP { t!(cpu, op, cpu.fp_begin()) } else { false };
    if !FP {
        available!(cpu, op);
    }
    let src = if BYTES == 16 {
        t!(cpu, op, cpu.source::<MEM, BYTES, true>(op))
    } else {
        t!(cpu, op, cpu.source::<MEM, BYTES, false>(op))
    };
    let run = transmute::<usize, Run>((*op).imm as usize);
    if FP && check {
        let old = cpu.xmm((*op).dst);
        run(cpu.xmm_ptr((*op).dst), src);
        t!(cpu, op, cpu.fp_end_or_restore((*op).dst, old));
    } else {
        run(cpu.xmm_ptr((*op).dst), src);
    }
    Op::run_next(cpu, op)
}

fn full<O: Imm>(insn: &Instruction, op: &mut Op) -> Lowered {
    let i = insn.immediate8() as usize;
    with_run::<O>(insn, op, Table::<O>::FULL[i >> 4][i & 15])
}

fn short<O: Imm>(insn: &Instruction, op: &mut Op, mask: u8) -> Lowered {
    with_run::<O>(insn, op, Table::<O>::SHORT[0][(insn.immediate8() & mask) as usize & 15])
}

fn with_run<O: Imm>(insn: &Instruction, op: &mut Op, run: Run) -> Lowered {
    op.imm = run as usize as u64;
    op.h = match (operands(insn, op), O::BYTES, O::FP) {
        (false, _, true) => apply::<false, 16, true>,
        (false, _, false) => apply::<false, 16, false>,
        (true, 16, true) => apply::<true, 16, true>,
        (true, 16, false) => apply::<true, 16, false>,
        (true, 8, _) => apply::<true, 8, true>,
        (true, _, _) => apply::<true, 4, true>,
    };
    Lowered::Plain
}

macro_rules! imms {
    ($($fp:literal $bytes:literal { $($code:ident $name:ident $lower:ident $(& $mask:literal)?;)* })*) => {
        $($(
            #[allow(non_camel_case_types, reason = "iced's names")]
            struct $code;
            impl Imm for $code {
                const FP: bool = $fp;
                const BYTES: u64 = $bytes;
                unsafe fn run<const I: u8>(dst: *mut u8, src: *const u8) {
                    asm!(
                        "movaps xmm0, [{d}]",
                        concat!(stringify!($name), " xmm0, [{s}], {i}"),
                        "movaps [{d}], xmm0",
                        d = in(reg) dst, s = in(reg) src, i = const I, out("xmm0") _,
                        options(nostack, preserves_flags)
                    );
                }
            }
        )*)*
        fn lower_host(insn: &Instruction, op: &mut Op) -> Lowered {
            match insn.code() {
                $($(Code::$code => $lower::<$code>(insn, op $(, $mask)?),)*)*
                _ => Lowered::No,
            }
        }
    };
}

imms! {
    false 16 {
        Pshufd_xmm_xmmm128_imm8 pshufd full;
        Pshuflw_xmm_xmmm128_imm8 pshuflw full;
        Pshufhw_xmm_xmmm128_imm8 pshufhw full;
        Shufps_xmm_xmmm128_imm8 shufps full;
        Shufpd_xmm_xmmm128_imm8 shufpd short & 3;
        Blendps_xmm_xmmm128_imm8 blendps short & 15;
        Blendpd_xmm_xmmm128_imm8 blendpd short & 3;
        Mpsadbw_xmm_xmmm128_imm8 mpsadbw short & 7;
    }
    true 16 {
        Cmpps_xmm_xmmm128_imm8 cmpps short & 7;
        Cmppd_xmm_xmmm128_imm8 cmppd short & 7;
        Roundps_xmm_xmmm128_imm8 roundps short & 15;
        Roundpd_xmm_xmmm128_imm8 roundpd short & 15;
        Dpps_xmm_xmmm128_imm8 dpps full;
        Dppd_xmm_xmmm128_imm8 dppd full;
    }
    true 8 {
        Cmpsd_xmm_xmmm64_imm8 cmpsd short & 7;
        Roundsd_xmm_xmmm64_imm8 roundsd short & 15;
    }
    true 4 {
        Cmpss_xmm_xmmm32_imm8 cmpss short & 7;
        Roundss_xmm_xmmm32_imm8 roundss short & 15;
    }
}

/// The part of [`Portable`] operations that differs: (destination, source, immediate) to result.
type Compute = fn(u128, u128, u8) -> u128;

fn palignr(d: u128, s: u128, n: u8) -> u128 {
    let bits = u32::from(n) * 8;
    match n {
        0 => s,
        1..16 => s >> bits | d << (128 - bits),
        16..32 => d >> (bits - 128),
        _ => 0,
    }
}

fn pslldq(d: u128, _: u128, n: u8) -> u128 {
    if n < 16 { d << (u32::from(n) * 8) } else { 0 }
}

fn psrldq(d: u128, _: u128, n: u8) -> u128 {
    if n < 16 { d >> (u32::from(n) * 8) } else { 0 }
}

fn pblendw(d: u128, s: u128, n: u8) -> u128 {
    let mask = (0..8).filter(|i| n >> i & 1 != 0).fold(0u128, |m, i| m | 0xffff << (16 * i));
    d & !mask | s & mask
}

/// INSERTPS; from memory the source is its lowest element whatever the immediate says, so `lower` clears that part.
fn insertps(d: u128, s: u128, n: u8) -> u128 {
    let v = s >> (32 * (n >> 6)) & 0xffff_ffff;
    let at = 32 * (n >> 4 & 3);
    let r = d & !(0xffff_ffff << at) | v << at;
    (0..4).filter(|i| n >> i & 1 != 0).fold(r, |r, i| r & !(0xffff_ffff << (32 * i)))
}

unsafe fn portable<const MEM: bool, const BYTES: u64>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let src = if BYTES == 16 {
        let p = t!(cpu, op, cpu.source::<MEM, BYTES, true>(op));
        p.cast::<u128>().read_unaligned()
    } else {
        let p = t!(cpu, op, cpu.source::<MEM, BYTES, false>(op));
        u128::from(p.cast::<u32>().read_unaligned())
    };
    let dst = cpu.xmm_ptr((*op).dst).cast::<u128>();
    let compute = transmute::<usize, Compute>((*op).imm as usize);
    *dst = compute(*dst, src, (*op).aux);
    Op::run_next(cpu, op)
}

fn lower_portable(insn: &Instruction, op: &mut Op) -> Lowered {
    let memory = insn.op1_kind() == OpKind::Memory;
    let compute: Compute = match insn.code() {
        Code::Palignr_xmm_xmmm128_imm8 => palignr,
        Code::Pblendw_xmm_xmmm128_imm8 => pblendw,
        Code::Insertps_xmm_xmmm32_imm8 => insertps,
        Code::Pslldq_xmm_imm8 => pslldq,
        Code::Psrldq_xmm_imm8 => psrldq,
        _ => return Lowered::No,
    };
    op.dst = xmm(insn.op0_register());
    op.aux = insn.immediate8();
    op.imm = compute as usize as u64;
    op.h = portable::<false, 16>;
    if memory {
        op.h = portable::<true, 16>;
        if insn.code() == Code::Insertps_xmm_xmmm32_imm8 {
            op.aux &= 0x3f;
            op.h = portable::<true, 4>;
        }
    } else if insn.op1_kind() == OpKind::Register {
        op.src = xmm(insn.op1_register());
    } else {
        op.src = op.dst;
    }
    Lowered::Plain
}

/// Shifts by an immediate: the shift by a register, with the count as the source.
unsafe fn shift(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    cpu.x87.operand = Xmm([u64::from((*op).aux), 0]);
    let run = transmute::<usize, Run>((*op).imm as usize);
    run(cpu.xmm_ptr((*op).dst), (&raw const cpu.x87.operand).cast());
    Op::run_next(cpu, op)
}

fn lower_shift(insn: &Instruction, op: &mut Op) -> Lowered {
    let by_register = match insn.code() {
        Code::Psllw_xmm_imm8 => Code::Psllw_xmm_xmmm128,
        Code::Pslld_xmm_imm8 => Code::Pslld_xmm_xmmm128,
        Code::Psllq_xmm_imm8 => Code::Psllq_xmm_xmmm128,
        Code::Psrlw_xmm_imm8 => Code::Psrlw_xmm_xmmm128,
        Code::Psrld_xmm_imm8 => Code::Psrld_xmm_xmmm128,
        Code::Psrlq_xmm_imm8 => Code::Psrlq_xmm_xmmm128,
        Code::Psraw_xmm_imm8 => Code::Psraw_xmm_xmmm128,
        Code::Psrad_xmm_imm8 => Code::Psrad_xmm_xmmm128,
        _ => return Lowered::No,
    };
    let Some(run) = pairs::run(by_register) else { return Lowered::No };
    op.dst = xmm(insn.op0_register());
    op.aux = insn.immediate8();
    op.imm = run as usize as u64;
    op.h = shift;
    Lowered::Plain
}

macro_rules! text {
    ($($t:ident $name:literal $explicit:literal $index:literal)*) => {$(
        struct $t;
        impl Text for $t {
            const EXPLICIT: bool = $explicit;
            const INDEX: bool = $index;
            unsafe fn find<const I: u8>(a: *const u8, b: *const u8, la: i32, lb: i32) -> Found {
                let (flags, index): (u64, u64);
                let mut mask = Xmm::default();
                asm!(
                    "movaps xmm1, [{a}]",
                    "movups xmm2, [{b}]",
                    "movaps xmm0, [{m}]",
                    concat!($name, " xmm1, xmm2, {i}"),
                    "pushfq",
                    "pop {f}",
                    "movaps [{m}], xmm0",
                    a = in(reg) a, b = in(reg) b, m = in(reg) &raw mut mask, i = const I, f = out(reg) flags,
                    inout("rax") i64::from(la) => _, inout("rdx") i64::from(lb) => _, out("rcx") index,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _,
                );
                Found { flags, index, mask }
            }
        }
    )*};
}

text! {
    Estri "pcmpestri" true true
    Estrm "pcmpestrm" true false
    Istri "pcmpistri" false true
    Istrm "pcmpistrm" false false
}

/// A length operand, of which only -16 to 16 matter.
fn length(cpu: &Cpu, r: u8, wide: bool) -> i32 {
    let v = cpu.r[r as usize >> 3];
    let v = if wide { v as i64 } else { i64::from(v as i32) };
    v.clamp(-16, 16) as i32
}

unsafe fn find<O: Text, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let src = t!(cpu, op, cpu.source::<MEM, 16, false>(op));
    let find = transmute::<usize, Find>((*op).imm as usize);
    let wide = (*op).aux != 0;
    let (la, lb) =
        if O::EXPLICIT { (length(cpu, reg::RAX, wide), length(cpu, reg::RDX, wide)) } else { (0, 0) };
    let found = find(cpu.xmm_ptr((*op).dst), src, la, lb);
    if O::INDEX {
        cpu.set_reg::<u64>(reg::RCX, found.index & 0xffff_ffff);
    } else {
        cpu.set_xmm(0, found.mask);
    }
    cpu.fl.set_bits(found.flags & bit::ARITHMETIC);
    Op::run_next(cpu, op)
}

fn text<O: Text>(insn: &Instruction, op: &mut Op, wide: bool) -> Lowered {
    let i = insn.immediate8() as usize & 0x7f;
    op.imm = Table::<O>::TEXT[i >> 4][i & 15] as usize as u64;
    op.aux = u8::from(wide);
    op.h = if operands(insn, op) { find::<O, true> } else { find::<O, false> };
    Lowered::Plain
}

/// Lowers the instructions of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    match insn.code() {
        Code::Pcmpestri_xmm_xmmm128_imm8 => return text::<Estri>(insn, op, false),
        Code::Pcmpestri64_xmm_xmmm128_imm8 => return text::<Estri>(insn, op, true),
        Code::Pcmpestrm_xmm_xmmm128_imm8 => return text::<Estrm>(insn, op, false),
        Code::Pcmpestrm64_xmm_xmmm128_imm8 => return text::<Estrm>(insn, op, true),
        Code::Pcmpistri_xmm_xmmm128_imm8 => return text::<Istri>(insn, op, false),
        Code::Pcmpistrm_xmm_xmmm128_imm8 => return text::<Istrm>(insn, op, false),
        _ => {}
    }
    for lower in [lower_host, lower_portable, lower_shift] {
        let lowered = lower(insn, op);
        if !matches!(lowered, Lowered::No) {
            return lowered;
        }
    }
    Lowered::No
}
