//! Instructions of the form `op xmm, xmm/m`: the destination is computed from itself and the source.
//!
//! One line per instruction; its body is the instruction itself.

use std::arch::asm;

use iced_x86::{Code, Instruction};

use super::{Run, available, gate, operands};
use crate::cpu::Cpu;
use crate::decode::Lowered;
use crate::op::Op;
use crate::ops::t;

/// An instruction of this form.
trait Pair {
    /// Whether it can raise a floating-point exception.
    const FP: bool;
    /// Size of a memory operand; one of 16 bytes must be aligned.
    const BYTES: u64;
    /// Executes it.
    unsafe fn run(dst: *mut u8, src: *const u8);
}

unsafe fn reg<O: Pair>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.x87.gate & mask::<O>() != 0 {
        return reg_apart(cpu, op, O::run, O::FP);
    }
    let src = cpu.xmm_ptr((*op).src);
    O::run(cpu.xmm_ptr((*op).dst), src);
    Op::run_next(cpu, op)
}

unsafe fn mem<O: Pair>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea(op);
    if cpu.x87.gate & mask::<O>() == 0
        && (O::BYTES < 16 || va & 15 == 0)
        && let Some(src) = cpu.read_ptr(va, O::BYTES)
    {
        O::run(cpu.xmm_ptr((*op).dst), src);
        return Op::run_next(cpu, op);
    }
    mem_apart(cpu, op, O::run, O::FP, O::BYTES)
}

fn mask<O: Pair>() -> u8 {
    gate::UD | gate::NM | if O::FP { gate::XM } else { 0 }
}

/// Ends `mem` with the checks and slow accesses that it does not do itself.
#[cold]
#[inline(never)]
unsafe fn mem_apart(cpu: &mut Cpu, op: *const Op, run: Run, fp: bool, bytes: u64) -> *const Op {
    t!(cpu, op, cpu.vector_available());
    let va = cpu.ea(op);
    if bytes == 16 && va & 15 != 0 {
        return cpu.alignment_fault(op);
    }
    cpu.x87.operand = t!(cpu, op, cpu.source_slow(va, bytes));
    let src = (&raw const cpu.x87.operand).cast();
    execute(cpu, op, run, src, fp)
}

/// Ends `reg` likewise.
#[cold]
#[inline(never)]
unsafe fn reg_apart(cpu: &mut Cpu, op: *const Op, run: Run, fp: bool) -> *const Op {
    let src = cpu.xmm_ptr((*op).src);
    execute(cpu, op, run, src, fp)
}

unsafe fn execute(cpu: &mut Cpu, op: *const Op, run: Run, src: *const u8, fp: bool) -> *const Op {
    let old = cpu.xmm((*op).dst);
    if fp {
        let check = t!(cpu, op, cpu.fp_begin());
        run(cpu.xmm_ptr((*op).dst), src);
        if check {
            t!(cpu, op, cpu.fp_end_or_restore((*op).dst, old));
        }
    } else {
        available!(cpu, op);
        run(cpu.xmm_ptr((*op).dst), src);
    }
    Op::run_next(cpu, op)
}

fn pair<O: Pair>(insn: &Instruction, op: &mut Op) -> Lowered {
    op.h = if operands(insn, op) { mem::<O> } else { reg::<O> };
    Lowered::Plain
}

macro_rules! pairs {
    ($($fp:literal $bytes:literal { $($code:ident $name:ident)* })*) => {
        $($(
            #[allow(non_camel_case_types, reason = "iced's names")]
            struct $code;
            impl Pair for $code {
                const FP: bool = $fp;
                const BYTES: u64 = $bytes;
                #[inline(always)]
                unsafe fn run(dst: *mut u8, src: *const u8) {
                    asm!(
                        "movaps xmm0, [{d}]",
                        concat!(stringify!($name), " xmm0, [{s}]"),
                        "movaps [{d}], xmm0",
                        d = in(reg) dst, s = in(reg) src, out("xmm0") _,
                        options(nostack, preserves_flags)
                    );
                }
            }
        )*)*

        /// What executes an instruction of this file.
        pub(super) fn run(code: Code) -> Option<Run> {
            match code {
                $($(Code::$code => Some($code::run),)*)*
                _ => None,
            }
        }

        /// Lowers the instructions of this file.
        pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
            match insn.code() {
                $($(Code::$code => pair::<$code>(insn, op),)*)*
                Code::Blendvps_xmm_xmmm128 => blend::<0>(insn, op),
                Code::Blendvpd_xmm_xmmm128 => blend::<1>(insn, op),
                Code::Pblendvb_xmm_xmmm128 => blend::<2>(insn, op),
                _ => Lowered::No,
            }
        }
    };
}

pairs! {
    false 16 {
        Paddb_xmm_xmmm128 paddb
        Paddw_xmm_xmmm128 paddw
        Paddd_xmm_xmmm128 paddd
        Paddq_xmm_xmmm128 paddq
        Paddsb_xmm_xmmm128 paddsb
        Paddsw_xmm_xmmm128 paddsw
        Paddusb_xmm_xmmm128 paddusb
        Paddusw_xmm_xmmm128 paddusw
        Psubb_xmm_xmmm128 psubb
        Psubw_xmm_xmmm128 psubw
        Psubd_xmm_xmmm128 psubd
        Psubq_xmm_xmmm128 psubq
        Psubsb_xmm_xmmm128 psubsb
        Psubsw_xmm_xmmm128 psubsw
        Psubusb_xmm_xmmm128 psubusb
        Psubusw_xmm_xmmm128 psubusw
        Pand_xmm_xmmm128 pand
        Pandn_xmm_xmmm128 pandn
        Por_xmm_xmmm128 por
        Pxor_xmm_xmmm128 pxor
        Andps_xmm_xmmm128 andps
        Andpd_xmm_xmmm128 andpd
        Andnps_xmm_xmmm128 andnps
        Andnpd_xmm_xmmm128 andnpd
        Orps_xmm_xmmm128 orps
        Orpd_xmm_xmmm128 orpd
        Xorps_xmm_xmmm128 xorps
        Xorpd_xmm_xmmm128 xorpd
        Pcmpeqb_xmm_xmmm128 pcmpeqb
        Pcmpeqw_xmm_xmmm128 pcmpeqw
        Pcmpeqd_xmm_xmmm128 pcmpeqd
        Pcmpeqq_xmm_xmmm128 pcmpeqq
        Pcmpgtb_xmm_xmmm128 pcmpgtb
        Pcmpgtw_xmm_xmmm128 pcmpgtw
        Pcmpgtd_xmm_xmmm128 pcmpgtd
        Pcmpgtq_xmm_xmmm128 pcmpgtq
        Pmullw_xmm_xmmm128 pmullw
        Pmulhw_xmm_xmmm128 pmulhw
        Pmulhuw_xmm_xmmm128 pmulhuw
        Pmulld_xmm_xmmm128 pmulld
        Pmuldq_xmm_xmmm128 pmuldq
        Pmuludq_xmm_xmmm128 pmuludq
        Pmaddwd_xmm_xmmm128 pmaddwd
        Pmaddubsw_xmm_xmmm128 pmaddubsw
        Pmulhrsw_xmm_xmmm128 pmulhrsw
        Psadbw_xmm_xmmm128 psadbw
        Pavgb_xmm_xmmm128 pavgb
        Pavgw_xmm_xmmm128 pavgw
        Pminub_xmm_xmmm128 pminub
        Pminuw_xmm_xmmm128 pminuw
        Pminud_xmm_xmmm128 pminud
        Pminsb_xmm_xmmm128 pminsb
        Pminsw_xmm_xmmm128 pminsw
        Pminsd_xmm_xmmm128 pminsd
        Pmaxub_xmm_xmmm128 pmaxub
        Pmaxuw_xmm_xmmm128 pmaxuw
        Pmaxud_xmm_xmmm128 pmaxud
        Pmaxsb_xmm_xmmm128 pmaxsb
        Pmaxsw_xmm_xmmm128 pmaxsw
        Pmaxsd_xmm_xmmm128 pmaxsd
        Phminposuw_xmm_xmmm128 phminposuw
        Psllw_xmm_xmmm128 psllw
        Pslld_xmm_xmmm128 pslld
        Psllq_xmm_xmmm128 psllq
        Psrlw_xmm_xmmm128 psrlw
        Psrld_xmm_xmmm128 psrld
        Psrlq_xmm_xmmm128 psrlq
        Psraw_xmm_xmmm128 psraw
        Psrad_xmm_xmmm128 psrad
        Packsswb_xmm_xmmm128 packsswb
        Packssdw_xmm_xmmm128 packssdw
        Packuswb_xmm_xmmm128 packuswb
        Packusdw_xmm_xmmm128 packusdw
        Punpcklbw_xmm_xmmm128 punpcklbw
        Punpcklwd_xmm_xmmm128 punpcklwd
        Punpckldq_xmm_xmmm128 punpckldq
        Punpcklqdq_xmm_xmmm128 punpcklqdq
        Punpckhbw_xmm_xmmm128 punpckhbw
        Punpckhwd_xmm_xmmm128 punpckhwd
        Punpckhdq_xmm_xmmm128 punpckhdq
        Punpckhqdq_xmm_xmmm128 punpckhqdq
        Unpcklps_xmm_xmmm128 unpcklps
        Unpckhps_xmm_xmmm128 unpckhps
        Unpcklpd_xmm_xmmm128 unpcklpd
        Unpckhpd_xmm_xmmm128 unpckhpd
        Phaddw_xmm_xmmm128 phaddw
        Phaddd_xmm_xmmm128 phaddd
        Phaddsw_xmm_xmmm128 phaddsw
        Phsubw_xmm_xmmm128 phsubw
        Phsubd_xmm_xmmm128 phsubd
        Phsubsw_xmm_xmmm128 phsubsw
        Pshufb_xmm_xmmm128 pshufb
        Psignb_xmm_xmmm128 psignb
        Psignw_xmm_xmmm128 psignw
        Psignd_xmm_xmmm128 psignd
        Pabsb_xmm_xmmm128 pabsb
        Pabsw_xmm_xmmm128 pabsw
        Pabsd_xmm_xmmm128 pabsd
        Movsldup_xmm_xmmm128 movsldup
        Movshdup_xmm_xmmm128 movshdup
    }
    false 8 {
        Movddup_xmm_xmmm64 movddup
        Pmovsxbw_xmm_xmmm64 pmovsxbw
        Pmovsxwd_xmm_xmmm64 pmovsxwd
        Pmovsxdq_xmm_xmmm64 pmovsxdq
        Pmovzxbw_xmm_xmmm64 pmovzxbw
        Pmovzxwd_xmm_xmmm64 pmovzxwd
        Pmovzxdq_xmm_xmmm64 pmovzxdq
    }
    false 4 {
        Pmovsxbd_xmm_xmmm32 pmovsxbd
        Pmovsxwq_xmm_xmmm32 pmovsxwq
        Pmovzxbd_xmm_xmmm32 pmovzxbd
        Pmovzxwq_xmm_xmmm32 pmovzxwq
    }
    false 2 {
        Pmovsxbq_xmm_xmmm16 pmovsxbq
        Pmovzxbq_xmm_xmmm16 pmovzxbq
    }
    true 16 {
        Addps_xmm_xmmm128 addps
        Addpd_xmm_xmmm128 addpd
        Subps_xmm_xmmm128 subps
        Subpd_xmm_xmmm128 subpd
        Mulps_xmm_xmmm128 mulps
        Mulpd_xmm_xmmm128 mulpd
        Divps_xmm_xmmm128 divps
        Divpd_xmm_xmmm128 divpd
        Minps_xmm_xmmm128 minps
        Minpd_xmm_xmmm128 minpd
        Maxps_xmm_xmmm128 maxps
        Maxpd_xmm_xmmm128 maxpd
        Sqrtps_xmm_xmmm128 sqrtps
        Sqrtpd_xmm_xmmm128 sqrtpd
        Rcpps_xmm_xmmm128 rcpps
        Rsqrtps_xmm_xmmm128 rsqrtps
        Haddps_xmm_xmmm128 haddps
        Haddpd_xmm_xmmm128 haddpd
        Hsubps_xmm_xmmm128 hsubps
        Hsubpd_xmm_xmmm128 hsubpd
        Addsubps_xmm_xmmm128 addsubps
        Addsubpd_xmm_xmmm128 addsubpd
        Cvtdq2ps_xmm_xmmm128 cvtdq2ps
        Cvtps2dq_xmm_xmmm128 cvtps2dq
        Cvttps2dq_xmm_xmmm128 cvttps2dq
        Cvtpd2ps_xmm_xmmm128 cvtpd2ps
        Cvtpd2dq_xmm_xmmm128 cvtpd2dq
        Cvttpd2dq_xmm_xmmm128 cvttpd2dq
    }
    true 8 {
        Addsd_xmm_xmmm64 addsd
        Subsd_xmm_xmmm64 subsd
        Mulsd_xmm_xmmm64 mulsd
        Divsd_xmm_xmmm64 divsd
        Minsd_xmm_xmmm64 minsd
        Maxsd_xmm_xmmm64 maxsd
        Sqrtsd_xmm_xmmm64 sqrtsd
        Cvtsd2ss_xmm_xmmm64 cvtsd2ss
        Cvtps2pd_xmm_xmmm64 cvtps2pd
        Cvtdq2pd_xmm_xmmm64 cvtdq2pd
    }
    true 4 {
        Addss_xmm_xmmm32 addss
        Subss_xmm_xmmm32 subss
        Mulss_xmm_xmmm32 mulss
        Divss_xmm_xmmm32 divss
        Minss_xmm_xmmm32 minss
        Maxss_xmm_xmmm32 maxss
        Sqrtss_xmm_xmmm32 sqrtss
        Rcpss_xmm_xmmm32 rcpss
        Rsqrtss_xmm_xmmm32 rsqrtss
        Cvtss2sd_xmm_xmmm32 cvtss2sd
    }
}

/// The blends whose mask is XMM0.
unsafe fn blend_run<const KIND: u8>(dst: *mut u8, src: *const u8, mask: *const u8) {
    macro_rules! blend {
        ($name:literal) => {
            asm!(
                "movaps xmm0, [{m}]",
                "movaps xmm1, [{d}]",
                concat!($name, " xmm1, [{s}], xmm0"),
                "movaps [{d}], xmm1",
                d = in(reg) dst, s = in(reg) src, m = in(reg) mask, out("xmm0") _, out("xmm1") _,
                options(nostack, preserves_flags)
            )
        };
    }
    match KIND {
        0 => blend!("blendvps"),
        1 => blend!("blendvpd"),
        _ => blend!("pblendvb"),
    }
}

unsafe fn blend_op<const KIND: u8, const MEM: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    available!(cpu, op);
    let src = t!(cpu, op, cpu.source::<MEM, 16, true>(op));
    let mask = cpu.xmm_ptr(0);
    blend_run::<KIND>(cpu.xmm_ptr((*op).dst), src, mask);
    Op::run_next(cpu, op)
}

fn blend<const KIND: u8>(insn: &Instruction, op: &mut Op) -> Lowered {
    op.h = if operands(insn, op) { blend_op::<KIND, true> } else { blend_op::<KIND, false> };
    Lowered::Plain
}
