//! Shifts and rotates, by immediate or CL.

use super::{Place, t};
use crate::cpu::Cpu;
use crate::mem::Int;
use crate::op::{Op, reg};

/// A shift: value, masked count (never zero), flags where defined.
pub(crate) trait Shift {
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, count: u32) -> T;
}

pub(crate) struct Shl;
pub(crate) struct Shr;
pub(crate) struct Sar;
pub(crate) struct Rol;
pub(crate) struct Ror;
pub(crate) struct Rcl;
pub(crate) struct Rcr;

#[inline(always)]
fn set<T: Int>(cpu: &mut Cpu, r: T, cf: bool, of: bool) -> T {
    let res = r.sext();
    cpu.fl.set_arith(res, res, cf, of);
    r
}

impl Shift for Shl {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        let wide = u128::from(a.to_u64()) << c;
        let r = T::from_u64(wide as u64);
        let cf = wide >> T::BITS & 1 != 0;
        set(cpu, r, cf, (r.sext() >> 63 != 0) != cf)
    }
}
impl Shift for Shr {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        let r = T::from_u64(a.to_u64() >> c);
        let cf = a.to_u64() >> (c - 1) & 1 != 0;
        set(cpu, r, cf, a.sext() >> 63 != 0)
    }
}
impl Shift for Sar {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        let r = T::from_u64((a.sext() as i64 >> c) as u64);
        let cf = (a.sext() as i64 >> (c - 1)) & 1 != 0;
        set(cpu, r, cf, false)
    }
}
impl Shift for Rol {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        let c = c % T::BITS;
        let v = a.to_u64();
        let r = if c == 0 { a } else { T::from_u64(v << c | v >> (T::BITS - c)) };
        let cf = r.to_u64() & 1 != 0;
        cpu.fl.set_cf_of(cf, (r.sext() >> 63 != 0) != cf);
        r
    }
}
impl Shift for Ror {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        let c = c % T::BITS;
        let v = a.to_u64();
        let r = if c == 0 { a } else { T::from_u64(v >> c | v << (T::BITS - c)) };
        let top = r.sext() >> 63 != 0;
        let second = r.to_u64() >> (T::BITS - 2) & 1 != 0;
        cpu.fl.set_cf_of(top, top != second);
        r
    }
}
impl Shift for Rcl {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        // BITS + 1 bits rotate: CF above the operand.
        let bits = T::BITS + 1;
        let c = c % bits;
        if c == 0 {
            return a;
        }
        let v = u128::from(a.to_u64()) | u128::from(cpu.fl.cf()) << T::BITS;
        let w = v << c | v >> (bits - c);
        let r = T::from_u64(w as u64);
        let cf = w >> T::BITS & 1 != 0;
        cpu.fl.set_cf_of(cf, (r.sext() >> 63 != 0) != cf);
        r
    }
}
impl Shift for Rcr {
    #[inline(always)]
    unsafe fn apply<T: Int>(cpu: &mut Cpu, a: T, c: u32) -> T {
        let bits = T::BITS + 1;
        let c = c % bits;
        if c == 0 {
            return a;
        }
        let v = u128::from(a.to_u64()) | u128::from(cpu.fl.cf()) << T::BITS;
        let w = v >> c | v << (bits - c);
        let r = T::from_u64(w as u64);
        let cf = w >> T::BITS & 1 != 0;
        let second = r.to_u64() >> (T::BITS - 2) & 1 != 0;
        cpu.fl.set_cf_of(cf, (r.sext() >> 63 != 0) != second);
        r
    }
}

#[inline(always)]
fn mask<T: Int>() -> u32 {
    if T::BITS == 64 { 63 } else { 31 }
}

/// By an immediate: `aux` holds the masked count, not zero.
pub(crate) unsafe fn by_imm<T: Int, O: Shift, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let c = u32::from((*op).aux);
    t!(cpu, op, D::modify(cpu, op, |cpu, a: T| O::apply(cpu, a, c)));
    Op::run_next(cpu, op)
}

/// By an immediate that the mask makes zero: no flag changes.
pub(crate) unsafe fn by_zero<T: Int, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, D::modify(cpu, op, |_, a: T| a));
    Op::run_next(cpu, op)
}

/// SHL, SHR, SAR of a register by an immediate when nobody reads the flags: `KIND` is 0, 1, 2.
pub(crate) unsafe fn by_imm_quiet<T: Int, const KIND: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let c = u32::from((*op).aux);
    let a: T = cpu.reg((*op).dst);
    let r = match KIND {
        0 => a.to_u64() << c,
        1 => a.to_u64() >> c,
        _ => (a.sext() as i64 >> c) as u64,
    };
    cpu.set_reg((*op).dst, T::from_u64(r));
    Op::run_next(cpu, op)
}

/// By CL: a count of zero changes no flag (but is still a write).
pub(crate) unsafe fn by_cl<T: Int, O: Shift, D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let c = u32::from(cpu.reg::<u8>(reg::RCX)) & mask::<T>();
    t!(cpu, op, D::modify(cpu, op, |cpu, a: T| if c == 0 { a } else { O::apply(cpu, a, c) }));
    Op::run_next(cpu, op)
}

/// SHLD (`LEFT`) and SHRD; the count is `aux`, or CL when `aux` is 0xff.
pub(crate) unsafe fn double<T: Int, D: Place, const LEFT: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let raw = if (*op).aux == 0xff { cpu.reg::<u8>(reg::RCX) } else { (*op).aux };
    let c = u32::from(raw) & mask::<T>();
    let b: T = cpu.reg((*op).src);
    t!(
        cpu,
        op,
        D::modify(cpu, op, |cpu, a: T| {
            if c == 0 {
                return a;
            }
            let (a_, b_) = (u128::from(a.to_u64()), u128::from(b.to_u64()));
            let (r, cf) = if LEFT {
                // A 16-bit operand takes counts up to 31: behind `b` comes `a` again, as hardware does.
                let wide =
                    if T::BITS == 64 { a_ << 64 | b_ } else { a_ << (2 * T::BITS) | b_ << T::BITS | a_ };
                let width = if T::BITS == 64 { 128 } else { 3 * T::BITS };
                let r = wide >> (width - T::BITS - c);
                (r, wide >> (width - c) & 1 != 0)
            } else {
                let wide =
                    if T::BITS == 64 { b_ << 64 | a_ } else { a_ << (2 * T::BITS) | b_ << T::BITS | a_ };
                (wide >> c, wide >> (c - 1) & 1 != 0)
            };
            let r = T::from_u64(r as u64);
            let of = (r.sext() ^ a.sext()) >> 63 != 0;
            set(cpu, r, cf, of)
        })
    );
    Op::run_next(cpu, op)
}
