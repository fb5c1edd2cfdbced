//! Bit tests and bit scans.

use super::{Place, Source, t};
use crate::cpu::Cpu;
use crate::mem::Int;
use crate::op::Op;

/// What BT, BTS, BTR, BTC do to the tested bit.
const TEST: u8 = 0;
const SET: u8 = 1;
const RESET: u8 = 2;

#[inline(always)]
fn change<const KIND: u8>(v: u64, bit: u64) -> u64 {
    match KIND {
        TEST => v,
        SET => v | bit,
        RESET => v & !bit,
        _ => v ^ bit,
    }
}

/// BT, BTS, BTR, BTC on a register, or on memory with an immediate offset. `KIND` is 0 to 3.
pub(crate) unsafe fn bit_op<T: Int, D: Place, S: Source, const KIND: u8>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    let n: T = t!(cpu, op, S::get(cpu, op));
    let bit = 1u64 << (n.to_u64() & u64::from(T::BITS - 1));
    if KIND == TEST {
        let v: T = t!(cpu, op, D::get(cpu, op));
        cpu.fl.set_cf(v.to_u64() & bit != 0);
    } else {
        t!(
            cpu,
            op,
            D::modify(cpu, op, |cpu, v: T| {
                cpu.fl.set_cf(v.to_u64() & bit != 0);
                T::from_u64(change::<KIND>(v.to_u64(), bit))
            })
        );
    }
    Op::run_next(cpu, op)
}

/// The same on a bit string in memory: the register offset, a signed number, reaches beyond the operand.
pub(crate) unsafe fn bit_string<T: Int, const KIND: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let n: T = cpu.reg((*op).src);
    let n = n.sext() as i64;
    let word = n >> T::BITS.trailing_zeros();
    let va = cpu.ea(op).wrapping_add((word as u64).wrapping_mul(T::BYTES));
    let bit = 1u64 << (n as u64 & u64::from(T::BITS - 1));
    if KIND == TEST {
        let v: T = t!(cpu, op, cpu.load(va));
        cpu.fl.set_cf(v.to_u64() & bit != 0);
    } else {
        t!(
            cpu,
            op,
            cpu.modify(va, |cpu, v: T| {
                cpu.fl.set_cf(v.to_u64() & bit != 0);
                T::from_u64(change::<KIND>(v.to_u64(), bit))
            })
        );
    }
    Op::run_next(cpu, op)
}

/// BSF (`FORWARD`) and BSR: a source of zero leaves the destination alone.
pub(crate) unsafe fn scan<T: Int, S: Source, const FORWARD: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = t!(cpu, op, S::get(cpu, op));
    let v = v.to_u64();
    if v != 0 {
        let n = if FORWARD { v.trailing_zeros() } else { 63 - v.leading_zeros() };
        cpu.set_reg((*op).dst, T::from_u64(u64::from(n)));
    }
    // ZF tells; the others are undefined.
    cpu.fl.set_logic(v);
    Op::run_next(cpu, op)
}

/// POPCNT.
pub(crate) unsafe fn popcnt<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = t!(cpu, op, S::get(cpu, op));
    cpu.set_reg((*op).dst, T::from_u64(u64::from(v.to_u64().count_ones())));
    // ZF as of the source, all others clear, PF too.
    cpu.fl.set_bits(if v.to_u64() == 0 { crate::flags::bit::ZF } else { 0 });
    Op::run_next(cpu, op)
}
