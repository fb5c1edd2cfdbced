//! Multiplication and division.

use super::{Source, t};
use crate::cpu::{Cpu, vector};
use crate::mem::Int;
use crate::op::{Op, reg};

/// Writes a double-width result to AX, DX:AX, EDX:EAX or RDX:RAX.
#[inline(always)]
unsafe fn put_pair<T: Int>(cpu: &mut Cpu, lo: T, hi: T) {
    if T::BYTES == 1 {
        cpu.set_reg(reg::RAX, lo);
        cpu.set_reg(reg::RAX + 1, hi);
    } else {
        cpu.set_reg(reg::RAX, lo);
        cpu.set_reg(reg::RDX, hi);
    }
}

#[inline(always)]
unsafe fn get_high<T: Int>(cpu: &Cpu) -> T {
    cpu.reg(if T::BYTES == 1 { reg::RAX + 1 } else { reg::RDX })
}

#[inline(always)]
fn set_overflow<T: Int>(cpu: &mut Cpu, lo: T, overflow: bool) {
    // SF, ZF, AF and PF are undefined.
    let res = lo.sext();
    cpu.fl.set_arith(res, res, overflow, overflow);
}

/// MUL.
pub(crate) unsafe fn mul<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let b: T = t!(cpu, op, S::get(cpu, op));
    let a: T = cpu.reg(reg::RAX);
    let wide = u128::from(a.to_u64()) * u128::from(b.to_u64());
    let (lo, hi) = (T::from_u64(wide as u64), T::from_u64((wide >> T::BITS) as u64));
    put_pair(cpu, lo, hi);
    set_overflow(cpu, lo, hi.to_u64() != 0);
    Op::run_next(cpu, op)
}

/// IMUL, one operand.
pub(crate) unsafe fn imul<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let b: T = t!(cpu, op, S::get(cpu, op));
    let a: T = cpu.reg(reg::RAX);
    let wide = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
    let (lo, hi) = (T::from_u64(wide as u64), T::from_u64((wide >> T::BITS) as u64));
    put_pair(cpu, lo, hi);
    set_overflow(cpu, lo, i128::from(lo.sext() as i64) != wide);
    Op::run_next(cpu, op)
}

/// IMUL, two operands (`A` is the destination) or three (`A` is the source, `B` the immediate).
pub(crate) unsafe fn imul2<T: Int, A: Source, B: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let a: T = t!(cpu, op, A::get(cpu, op));
    let b: T = t!(cpu, op, B::get(cpu, op));
    let wide = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
    let lo = T::from_u64(wide as u64);
    cpu.set_reg((*op).dst, lo);
    set_overflow(cpu, lo, i128::from(lo.sext() as i64) != wide);
    Op::run_next(cpu, op)
}

/// DIV.
pub(crate) unsafe fn div<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let d: T = t!(cpu, op, S::get(cpu, op));
    let d = d.to_u64();
    let (lo, hi) = (cpu.reg::<T>(reg::RAX).to_u64(), get_high::<T>(cpu).to_u64());
    if d == 0 || hi >= d {
        cpu.raise(vector::DE, None);
        return cpu.trap(op);
    }
    let (q, r) = if T::BITS < 64 {
        let n = hi << T::BITS | lo;
        (n / d, n % d)
    } else if hi == 0 {
        (lo / d, lo % d)
    } else {
        let n = u128::from(hi) << 64 | u128::from(lo);
        ((n / u128::from(d)) as u64, (n % u128::from(d)) as u64)
    };
    put_pair(cpu, T::from_u64(q), T::from_u64(r));
    Op::run_next(cpu, op)
}

/// IDIV.
pub(crate) unsafe fn idiv<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let d: T = t!(cpu, op, S::get(cpu, op));
    let d = i128::from(d.sext() as i64);
    let lo: T = cpu.reg(reg::RAX);
    let hi: T = get_high(cpu);
    let n = i128::from(hi.sext() as i64) << T::BITS | i128::from(lo.to_u64());
    // The quotient of small operands, which is nearly all of them, does without 128-bit division.
    let quotient = match (i64::try_from(n), i64::try_from(d)) {
        (_, Ok(0)) => None,
        (Ok(n), Ok(d)) => n.checked_div(d).map(|q| (i128::from(q), i128::from(n.wrapping_rem(d)))),
        _ => n.checked_div(d).map(|q| (q, n % d)),
    };
    match quotient {
        Some((q, r)) if i128::from(T::from_u64(q as u64).sext() as i64) == q => {
            put_pair(cpu, T::from_u64(q as u64), T::from_u64(r as u64));
            Op::run_next(cpu, op)
        }
        _ => {
            cpu.raise(vector::DE, None);
            cpu.trap(op)
        }
    }
}
