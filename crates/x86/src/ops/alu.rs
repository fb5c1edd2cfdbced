//! Two-operand arithmetic and logic, comparisons, and their fusion with a conditional jump.

use super::branch::conditional;
use super::{Mem, Place, Source, t};
use crate::cpu::Cpu;
use crate::mem::Int;
use crate::op::{Handler, Op};

/// An arithmetic operation: computes, and sets flags where `F` asks for them.
pub(crate) trait Alu {
    unsafe fn apply<T: Int, const F: bool>(cpu: &mut Cpu, a: T, b: T) -> T;
}

pub(crate) struct Add;
pub(crate) struct Adc;
pub(crate) struct Sub;
pub(crate) struct Sbb;
pub(crate) struct And;
pub(crate) struct Or;
pub(crate) struct Xor;

macro_rules! arithmetic {
    ($($name:ident $operation:ident ($cpu:ident => $carry:expr));*) => {$(
        impl Alu for $name {
            #[inline(always)]
            unsafe fn apply<T: Int, const F: bool>($cpu: &mut Cpu, a: T, b: T) -> T {
                let (r, cf, of) = a.$operation(b, $carry);
                if F {
                    $cpu.fl.set_arith(r.sext(), a.to_u64() ^ b.to_u64(), cf, of);
                }
                r
            }
        }
    )*};
}
arithmetic!(
    Add add_carry (cpu => false);
    Adc add_carry (cpu => cpu.fl.cf());
    Sub sub_borrow (cpu => false);
    Sbb sub_borrow (cpu => cpu.fl.cf())
);
macro_rules! logic {
    ($($name:ident $op:tt);*) => {$(
        impl Alu for $name {
            #[inline(always)]
            unsafe fn apply<T: Int, const F: bool>(cpu: &mut Cpu, a: T, b: T) -> T {
                let r = T::from_u64(a.to_u64() $op b.to_u64());
                if F {
                    cpu.fl.set_logic(r.sext());
                }
                r
            }
        }
    )*};
}
logic!(And &; Or |; Xor ^);

/// `D = D op S`.
pub(crate) unsafe fn alu<T: Int, O: Alu, D: Place, S: Source, const F: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    let b: T = t!(cpu, op, S::get(cpu, op));
    t!(cpu, op, D::modify(cpu, op, |cpu, a: T| O::apply::<T, F>(cpu, a, b)));
    Op::run_next(cpu, op)
}

/// CMP and TEST: flags of `D op S`, nothing written.
pub(crate) unsafe fn compare<T: Int, O: Alu, D: Source, S: Source>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    let b: T = t!(cpu, op, S::get(cpu, op));
    let a: T = t!(cpu, op, D::get(cpu, op));
    O::apply::<T, true>(cpu, a, b);
    Op::run_next(cpu, op)
}

/// CMP or TEST with the conditional jump that follows as the next operation.
pub(crate) unsafe fn compare_jump<T: Int, O: Alu, D: Source, S: Source, const CC: u8>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    let b: T = t!(cpu, op, S::get(cpu, op));
    let a: T = t!(cpu, op, D::get(cpu, op));
    O::apply::<T, true>(cpu, a, b);
    conditional::<CC>(cpu, Op::next(op))
}

/// The instances of [`compare_jump`] by condition code.
pub(crate) fn compare_jump_for<T: Int, O: Alu, D: Source, S: Source>(cc: u8) -> Handler {
    match cc {
        0 => compare_jump::<T, O, D, S, 0>,
        1 => compare_jump::<T, O, D, S, 1>,
        2 => compare_jump::<T, O, D, S, 2>,
        3 => compare_jump::<T, O, D, S, 3>,
        4 => compare_jump::<T, O, D, S, 4>,
        5 => compare_jump::<T, O, D, S, 5>,
        6 => compare_jump::<T, O, D, S, 6>,
        7 => compare_jump::<T, O, D, S, 7>,
        8 => compare_jump::<T, O, D, S, 8>,
        9 => compare_jump::<T, O, D, S, 9>,
        10 => compare_jump::<T, O, D, S, 10>,
        11 => compare_jump::<T, O, D, S, 11>,
        12 => compare_jump::<T, O, D, S, 12>,
        13 => compare_jump::<T, O, D, S, 13>,
        14 => compare_jump::<T, O, D, S, 14>,
        _ => compare_jump::<T, O, D, S, 15>,
    }
}

/// INC and DEC: as ADD or SUB of one, but CF keeps its value.
pub(crate) unsafe fn step<T: Int, O: Alu, D: Place, const F: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    t!(
        cpu,
        op,
        D::modify(cpu, op, |cpu, a: T| {
            let cf = cpu.fl.cf();
            let r = O::apply::<T, F>(cpu, a, T::from_u64(1));
            if F {
                cpu.fl.set_cf(cf);
            }
            r
        })
    );
    Op::run_next(cpu, op)
}

/// NEG.
pub(crate) unsafe fn neg<T: Int, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, D::modify(cpu, op, |cpu, a: T| Sub::apply::<T, true>(cpu, T::from_u64(0), a)));
    Op::run_next(cpu, op)
}

/// NOT.
pub(crate) unsafe fn not<T: Int, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, D::modify(cpu, op, |_, a: T| T::from_u64(!a.to_u64())));
    Op::run_next(cpu, op)
}

/// XADD: the register gets the old value, the place the sum.
pub(crate) unsafe fn xadd<T: Int, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let b: T = cpu.reg((*op).src);
    let mut old = b;
    t!(
        cpu,
        op,
        D::modify(cpu, op, |cpu, a: T| {
            old = a;
            // For XADD r, r the sum is written last.
            cpu.set_reg((*op).src, a);
            Add::apply::<T, true>(cpu, a, b)
        })
    );
    Op::run_next(cpu, op)
}

/// XCHG.
pub(crate) unsafe fn xchg<T: Int, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let b: T = cpu.reg((*op).src);
    t!(
        cpu,
        op,
        D::modify(cpu, op, |cpu, a: T| {
            cpu.set_reg((*op).src, a);
            b
        })
    );
    Op::run_next(cpu, op)
}

/// CMPXCHG of memory with the accumulator: a write in any case.
pub(crate) unsafe fn cmpxchg_mem<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let new: T = cpu.reg((*op).src);
    t!(
        cpu,
        op,
        Mem::modify(cpu, op, |cpu, old: T| {
            let acc: T = cpu.reg(crate::op::reg::RAX);
            Sub::apply::<T, true>(cpu, acc, old);
            if acc.to_u64() == old.to_u64() {
                new
            } else {
                cpu.set_reg(crate::op::reg::RAX, old);
                old
            }
        })
    );
    Op::run_next(cpu, op)
}

/// CMPXCHG of a register with the accumulator: one of the two is written (and cleared above 32 bits), not both.
pub(crate) unsafe fn cmpxchg_reg<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let (new, old, acc): (T, T, T) = (cpu.reg((*op).src), cpu.reg((*op).dst), cpu.reg(crate::op::reg::RAX));
    Sub::apply::<T, true>(cpu, acc, old);
    if acc.to_u64() == old.to_u64() {
        cpu.set_reg((*op).dst, new);
    } else {
        cpu.set_reg(crate::op::reg::RAX, old);
    }
    Op::run_next(cpu, op)
}

/// CMPXCHG8B and CMPXCHG16B: `T` is the half.
pub(crate) unsafe fn cmpxchg_pair<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    use crate::cpu::vector;
    use crate::op::reg::{RAX, RBX, RCX, RDX};
    let va = cpu.ea(op);
    if T::BYTES == 8 && va & 15 != 0 {
        cpu.raise(vector::GP, Some(0));
        return cpu.trap(op);
    }
    let hi_va = va.wrapping_add(T::BYTES);
    t!(cpu, op, cpu.probe_write(va, 2 * T::BYTES));
    let lo: T = t!(cpu, op, cpu.load(va));
    let hi: T = t!(cpu, op, cpu.load(hi_va));
    let equal = lo.to_u64() == cpu.reg::<T>(RAX).to_u64() && hi.to_u64() == cpu.reg::<T>(RDX).to_u64();
    if equal {
        let (new_lo, new_hi) = (cpu.reg::<T>(RBX), cpu.reg::<T>(RCX));
        t!(cpu, op, cpu.store(va, new_lo));
        t!(cpu, op, cpu.store(hi_va, new_hi));
    } else {
        cpu.set_reg(RAX, lo);
        cpu.set_reg(RDX, hi);
    }
    cpu.fl.set_zf(equal);
    Op::run_next(cpu, op)
}
