//! x87 instructions that compute: each is executed by the host on the live state, from its own two bytes.

use std::arch::asm;

use iced_x86::{Code, Instruction, Register};

use super::{FSW_ES, host_status};
use crate::cpu::{Cpu, Trap, Xmm};
use crate::decode::Lowered;
use crate::op::{Handler, Op};
use crate::ops::t;

/// No memory operand.
unsafe fn plain<const B0: u8, const B1: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_begin());
    asm!(".byte {}, {}", const B0, const B1, options(nomem, nostack));
    cpu.x87_end(op);
    Op::run_next(cpu, op)
}

/// FCMOVcc: reads the guest's flags.
unsafe fn conditional<const B0: u8, const B1: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_begin());
    let ah = (cpu.fl.bits() as u16 & 0xff | 2) << 8;
    asm!("sahf", ".byte {}, {}", const B0, const B1, in("ax") ah, options(nomem, nostack));
    cpu.x87_end(op);
    Op::run_next(cpu, op)
}

/// FCOMI and its kin: set the guest's flags.
unsafe fn compare<const B0: u8, const B1: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_begin());
    let ax: u16;
    asm!(".byte {}, {}", "lahf", const B0, const B1, out("ax") ax, options(nomem, nostack));
    cpu.x87_end(op);
    cpu.set_zpc(ax);
    Op::run_next(cpu, op)
}

/// A memory operand that is read.
unsafe fn read<const B0: u8, const N: u8, const BYTES: u64>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_begin());
    let va = cpu.ea(op);
    let p = match cpu.read_ptr(va, BYTES) {
        Some(p) => p,
        None => {
            cpu.x87.operand = Xmm(t!(cpu, op, read_slow(cpu, va, BYTES)));
            (&raw const cpu.x87.operand).cast()
        }
    };
    asm!(".byte {}, {}", const B0, const N * 8, in("rax") p, options(nostack, readonly));
    cpu.x87.fdp = va.wrapping_sub(cpu.slot((*op).seg));
    cpu.x87_end(op);
    Op::run_next(cpu, op)
}

#[cold]
unsafe fn read_slow(cpu: &mut Cpu, va: u64, bytes: u64) -> Result<[u64; 2], Trap> {
    Ok(match bytes {
        2 => [u64::from(cpu.load::<u16>(va)?), 0],
        4 => [u64::from(cpu.load::<u32>(va)?), 0],
        8 => [cpu.load::<u64>(va)?, 0],
        _ => [cpu.load::<u64>(va)?, u64::from(cpu.load::<u16>(va.wrapping_add(8))?)],
    })
}

#[cold]
unsafe fn write_slow(cpu: &mut Cpu, va: u64, bytes: u64, v: [u64; 2]) -> Result<(), Trap> {
    match bytes {
        2 => cpu.store::<u16>(va, v[0] as u16),
        4 => cpu.store::<u32>(va, v[0] as u32),
        8 => cpu.store::<u64>(va, v[0]),
        _ => {
            cpu.store::<u64>(va, v[0])?;
            cpu.store::<u16>(va.wrapping_add(8), v[1] as u16)
        }
    }
}

/// Executes a store whose operand is not in one writable page.
#[cold]
#[inline(never)]
unsafe fn store_apart<const B0: u8, const N: u8, const BYTES: u64>(
    cpu: &mut Cpu,
    va: u64,
) -> Result<(), Trap> {
    let mut v = [0u64; 2];
    if !cpu.x87.unmasked {
        cpu.probe_write(va, BYTES)?;
        asm!(".byte {}, {}", const B0, const N * 8, in("rax") &raw mut v, options(nostack));
        return write_slow(cpu, va, BYTES, v);
    }
    // An unmasked exception may keep it from storing, and then memory is not touched. Whether it stored shows when it
    // gives the same over different old contents.
    cpu.x87_save();
    let before = cpu.x87;
    cpu.x87_begin()?;
    asm!(".byte {}, {}", const B0, const N * 8, in("rax") &raw mut v, options(nostack));
    if host_status() & FSW_ES != 0 {
        cpu.x87_discard();
        cpu.x87 = before;
        cpu.x87_begin()?;
        let mut again = [u64::MAX; 2];
        asm!(".byte {}, {}", const B0, const N * 8, in("rax") &raw mut again, options(nostack));
        if v[0] as u16 != again[0] as u16 {
            return Ok(());
        }
    }
    let stored = cpu.probe_write(va, BYTES);
    if stored.is_err() {
        cpu.x87_discard();
        cpu.x87 = before;
        return stored;
    }
    write_slow(cpu, va, BYTES, v)
}

/// A memory operand that is written.
unsafe fn write<const B0: u8, const N: u8, const BYTES: u64>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_begin());
    let va = cpu.ea(op);
    match cpu.write_ptr(va, BYTES) {
        Some(p) => asm!(".byte {}, {}", const B0, const N * 8, in("rax") p, options(nostack)),
        None => t!(cpu, op, store_apart::<B0, N, BYTES>(cpu, va)),
    }
    cpu.x87.fdp = va.wrapping_sub(cpu.slot((*op).seg));
    cpu.x87_end(op);
    Op::run_next(cpu, op)
}

macro_rules! row {
    ($f:ident, $b0:literal, $h:literal) => {
        [
            $f::<$b0, { $h }>,
            $f::<$b0, { $h + 1 }>,
            $f::<$b0, { $h + 2 }>,
            $f::<$b0, { $h + 3 }>,
            $f::<$b0, { $h + 4 }>,
            $f::<$b0, { $h + 5 }>,
            $f::<$b0, { $h + 6 }>,
            $f::<$b0, { $h + 7 }>,
        ]
    };
}

macro_rules! register_forms {
    ($($h:ident $b0:literal { $($code:ident $b1:literal)* })*) => {
        /// The handlers of `code` for ST(0) to ST(7).
        fn indexed(code: Code) -> Option<&'static [Handler; 8]> {
            match code {
                $($(Code::$code => {
                    static ROW: [Handler; 8] = row!($h, $b0, $b1);
                    Some(&ROW)
                })*)*
                _ => None,
            }
        }
    };
}

register_forms! {
    plain 0xd8 {
        Fadd_st0_sti 0xc0 Fmul_st0_sti 0xc8 Fcom_st0_sti 0xd0 Fcomp_st0_sti 0xd8
        Fsub_st0_sti 0xe0 Fsubr_st0_sti 0xe8 Fdiv_st0_sti 0xf0 Fdivr_st0_sti 0xf8
    }
    plain 0xd9 { Fld_sti 0xc0 Fxch_st0_sti 0xc8 Fstpnce_sti 0xd8 }
    conditional 0xda { Fcmovb_st0_sti 0xc0 Fcmove_st0_sti 0xc8 Fcmovbe_st0_sti 0xd0 Fcmovu_st0_sti 0xd8 }
    conditional 0xdb { Fcmovnb_st0_sti 0xc0 Fcmovne_st0_sti 0xc8 Fcmovnbe_st0_sti 0xd0 Fcmovnu_st0_sti 0xd8 }
    compare 0xdb { Fucomi_st0_sti 0xe8 Fcomi_st0_sti 0xf0 }
    plain 0xdc {
        Fadd_sti_st0 0xc0 Fmul_sti_st0 0xc8 Fcom_st0_sti_DCD0 0xd0 Fcomp_st0_sti_DCD8 0xd8
        Fsubr_sti_st0 0xe0 Fsub_sti_st0 0xe8 Fdivr_sti_st0 0xf0 Fdiv_sti_st0 0xf8
    }
    plain 0xdd {
        Ffree_sti 0xc0 Fxch_st0_sti_DDC8 0xc8 Fst_sti 0xd0 Fstp_sti 0xd8 Fucom_st0_sti 0xe0 Fucomp_st0_sti 0xe8
    }
    plain 0xde {
        Faddp_sti_st0 0xc0 Fmulp_sti_st0 0xc8 Fcomp_st0_sti_DED0 0xd0
        Fsubrp_sti_st0 0xe0 Fsubp_sti_st0 0xe8 Fdivrp_sti_st0 0xf0 Fdivp_sti_st0 0xf8
    }
    plain 0xdf { Ffreep_sti 0xc0 Fxch_st0_sti_DFC8 0xc8 Fstp_sti_DFD0 0xd0 Fstp_sti_DFD8 0xd8 }
    compare 0xdf { Fucomip_st0_sti 0xe8 Fcomip_st0_sti 0xf0 }
}

macro_rules! fixed_forms {
    ($($b0:literal { $($code:ident $b1:literal)* })*) => {
        fn fixed(code: Code) -> Option<Handler> {
            Some(match code {
                $($(Code::$code => plain::<$b0, $b1>,)*)*
                _ => return None,
            })
        }
    };
}

fixed_forms! {
    0xd9 {
        Fnop 0xd0 Fchs 0xe0 Fabs 0xe1 Ftst 0xe4 Fxam 0xe5
        Fld1 0xe8 Fldl2t 0xe9 Fldl2e 0xea Fldpi 0xeb Fldlg2 0xec Fldln2 0xed Fldz 0xee
        F2xm1 0xf0 Fyl2x 0xf1 Fptan 0xf2 Fpatan 0xf3 Fxtract 0xf4 Fprem1 0xf5 Fdecstp 0xf6 Fincstp 0xf7
        Fprem 0xf8 Fyl2xp1 0xf9 Fsqrt 0xfa Fsincos 0xfb Frndint 0xfc Fscale 0xfd Fsin 0xfe Fcos 0xff
    }
    0xda { Fucompp 0xe9 }
    0xde { Fcompp 0xd9 }
}

macro_rules! memory_forms {
    ($($h:ident $b0:literal { $($code:ident $n:literal $bytes:literal)* })*) => {
        fn memory(code: Code) -> Option<Handler> {
            Some(match code {
                $($(Code::$code => $h::<$b0, $n, $bytes>,)*)*
                _ => return None,
            })
        }
    };
}

memory_forms! {
    read 0xd8 {
        Fadd_m32fp 0 4 Fmul_m32fp 1 4 Fcom_m32fp 2 4 Fcomp_m32fp 3 4
        Fsub_m32fp 4 4 Fsubr_m32fp 5 4 Fdiv_m32fp 6 4 Fdivr_m32fp 7 4
    }
    read 0xd9 { Fld_m32fp 0 4 }
    write 0xd9 { Fst_m32fp 2 4 Fstp_m32fp 3 4 }
    read 0xda {
        Fiadd_m32int 0 4 Fimul_m32int 1 4 Ficom_m32int 2 4 Ficomp_m32int 3 4
        Fisub_m32int 4 4 Fisubr_m32int 5 4 Fidiv_m32int 6 4 Fidivr_m32int 7 4
    }
    read 0xdb { Fild_m32int 0 4 Fld_m80fp 5 10 }
    write 0xdb { Fisttp_m32int 1 4 Fist_m32int 2 4 Fistp_m32int 3 4 Fstp_m80fp 7 10 }
    read 0xdc {
        Fadd_m64fp 0 8 Fmul_m64fp 1 8 Fcom_m64fp 2 8 Fcomp_m64fp 3 8
        Fsub_m64fp 4 8 Fsubr_m64fp 5 8 Fdiv_m64fp 6 8 Fdivr_m64fp 7 8
    }
    read 0xdd { Fld_m64fp 0 8 }
    write 0xdd { Fisttp_m64int 1 8 Fst_m64fp 2 8 Fstp_m64fp 3 8 }
    read 0xde {
        Fiadd_m16int 0 2 Fimul_m16int 1 2 Ficom_m16int 2 2 Ficomp_m16int 3 2
        Fisub_m16int 4 2 Fisubr_m16int 5 2 Fidiv_m16int 6 2 Fidivr_m16int 7 2
    }
    read 0xdf { Fild_m16int 0 2 Fbld_m80bcd 4 10 Fild_m64int 5 8 }
    write 0xdf {
        Fisttp_m16int 1 2 Fist_m16int 2 2 Fistp_m16int 3 2 Fbstp_m80bcd 6 10 Fistp_m64int 7 8
    }
}

/// Lowers the instructions of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    let code = insn.code();
    let handler = if let Some(row) = indexed(code) {
        // The register that is not the implied ST(0): both operands name ST(0) for ST(0).
        let number =
            |i| if insn.op_register(i) == Register::None { 0 } else { insn.op_register(i).number() & 7 };
        let i = (0..insn.op_count()).map(number).max().unwrap_or(0);
        Some(row[i])
    } else {
        fixed(code).or_else(|| memory(code))
    };
    match handler {
        Some(h) => {
            op.h = h;
            Lowered::Plain
        }
        None => Lowered::No,
    }
}
