//! Data movement: MOV, extensions, LEA, the stack, SETcc, CMOVcc, and flag-free register shuffling.

use super::{Place, Source, t};
use crate::cpu::Cpu;
use crate::flags::bit;
use crate::mem::Int;
use crate::op::{Handler, Op, reg};

/// MOV between any two places.
pub(crate) unsafe fn mov<T: Int, D: Place, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = t!(cpu, op, S::get(cpu, op));
    t!(cpu, op, D::put(cpu, op, v));
    Op::run_next(cpu, op)
}

/// MOV to a register from a base + displacement operand, the most frequent load.
pub(crate) unsafe fn load_base<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea_base(op);
    let v: T = t!(cpu, op, cpu.load(va));
    cpu.set_reg((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOV of a register to a base + displacement operand.
pub(crate) unsafe fn store_base<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea_base(op);
    let v: T = cpu.reg((*op).src);
    t!(cpu, op, cpu.store(va, v));
    Op::run_next(cpu, op)
}

/// MOVZX.
pub(crate) unsafe fn movzx<D: Int, S: Int, P: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: S = t!(cpu, op, P::get(cpu, op));
    cpu.set_reg((*op).dst, D::from_u64(v.to_u64()));
    Op::run_next(cpu, op)
}

/// MOVSX, MOVSXD.
pub(crate) unsafe fn movsx<D: Int, S: Int, P: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: S = t!(cpu, op, P::get(cpu, op));
    cpu.set_reg((*op).dst, D::from_u64(v.sext()));
    Op::run_next(cpu, op)
}

/// LEA; segments do not count.
pub(crate) unsafe fn lea<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea(op);
    cpu.set_reg((*op).dst, T::from_u64(va));
    Op::run_next(cpu, op)
}

/// LEA of base + displacement.
pub(crate) unsafe fn lea_base<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea_base(op);
    cpu.set_reg((*op).dst, T::from_u64(va));
    Op::run_next(cpu, op)
}

/// First half of an instruction with 32-bit addressing: its address goes to the scratch slot, which the second half
/// uses as its base. `aux` holds the segment slot, which counts after the truncation.
pub(crate) unsafe fn address32(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = u64::from(cpu.ea(op) as u32).wrapping_add(cpu.slot((*op).aux));
    cpu.set_slot(reg::TMP, va);
    Op::run_next(cpu, op)
}

/// First half of MOV with a 64-bit absolute address, which is in `imm`.
pub(crate) unsafe fn address64(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = (*op).imm.wrapping_add(cpu.slot((*op).aux));
    cpu.set_slot(reg::TMP, va);
    Op::run_next(cpu, op)
}

/// PUSH.
pub(crate) unsafe fn push<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = t!(cpu, op, S::get(cpu, op));
    let sp = cpu.slot(reg::RSP).wrapping_sub(T::BYTES);
    t!(cpu, op, cpu.store(sp, v));
    cpu.set_slot(reg::RSP, sp);
    Op::run_next(cpu, op)
}

/// POP to a register.
pub(crate) unsafe fn pop<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let sp = cpu.slot(reg::RSP);
    let v: T = t!(cpu, op, cpu.load(sp));
    cpu.set_slot(reg::RSP, sp.wrapping_add(T::BYTES));
    cpu.set_reg((*op).dst, v);
    Op::run_next(cpu, op)
}

/// POP to memory: an address that uses RSP sees it incremented.
pub(crate) unsafe fn pop_mem<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let sp = cpu.slot(reg::RSP);
    let v: T = t!(cpu, op, cpu.load(sp));
    cpu.set_slot(reg::RSP, sp.wrapping_add(T::BYTES));
    let va = cpu.ea(op);
    if cpu.store(va, v).is_err() {
        cpu.set_slot(reg::RSP, sp);
        return cpu.trap(op);
    }
    Op::run_next(cpu, op)
}

/// LEAVE.
pub(crate) unsafe fn leave<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let bp = cpu.slot(reg::RBP);
    let v: T = t!(cpu, op, cpu.load(bp));
    cpu.set_slot(reg::RSP, bp.wrapping_add(T::BYTES));
    cpu.set_reg(reg::RBP, v);
    Op::run_next(cpu, op)
}

/// ENTER: `imm` is the frame size, `aux` the nesting level, 0 to 31.
pub(crate) unsafe fn enter<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let level = u64::from((*op).aux);
    let mut sp = cpu.slot(reg::RSP);
    let mut bp = cpu.slot(reg::RBP);
    sp = sp.wrapping_sub(T::BYTES);
    t!(cpu, op, cpu.store(sp, T::from_u64(bp)));
    let frame = sp;
    if level > 0 {
        for _ in 1..level {
            bp = bp.wrapping_sub(T::BYTES);
            sp = sp.wrapping_sub(T::BYTES);
            let v: T = t!(cpu, op, cpu.load(bp));
            t!(cpu, op, cpu.store(sp, v));
        }
        sp = sp.wrapping_sub(T::BYTES);
        t!(cpu, op, cpu.store(sp, T::from_u64(frame)));
    }
    sp = sp.wrapping_sub((*op).imm);
    t!(cpu, op, cpu.probe_write(sp, T::BYTES));
    cpu.set_reg(reg::RBP, T::from_u64(frame));
    cpu.set_slot(reg::RSP, sp);
    Op::run_next(cpu, op)
}

/// SETcc; the condition is in `aux`.
pub(crate) unsafe fn setcc<D: Place>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = u8::from(cpu.fl.condition((*op).aux));
    t!(cpu, op, D::put(cpu, op, v));
    Op::run_next(cpu, op)
}

/// CMOVcc; the condition is in `aux`. The source is read, and a 32-bit destination cleared above, in any case.
pub(crate) unsafe fn cmov<T: Int, S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let new: T = t!(cpu, op, S::get(cpu, op));
    let old: T = cpu.reg((*op).dst);
    let v = if cpu.fl.condition((*op).aux) { new } else { old };
    cpu.set_reg((*op).dst, v);
    Op::run_next(cpu, op)
}

/// CBW, CWDE, CDQE: `S` sign-extends to `D` in the accumulator.
pub(crate) unsafe fn extend_acc<D: Int, S: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: S = cpu.reg(reg::RAX);
    cpu.set_reg(reg::RAX, D::from_u64(v.sext()));
    Op::run_next(cpu, op)
}

/// CWD, CDQ, CQO: the accumulator's sign fills the data register.
pub(crate) unsafe fn extend_pair<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = cpu.reg(reg::RAX);
    cpu.set_reg(reg::RDX, T::from_u64(((v.sext() as i64) >> 63) as u64));
    Op::run_next(cpu, op)
}

/// BSWAP of 32 or 64 bits (16 is undefined: the register's low word becomes zero, as hardware does).
pub(crate) unsafe fn bswap<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = cpu.reg((*op).dst);
    let r = match T::BYTES {
        8 => v.to_u64().swap_bytes(),
        4 => u64::from((v.to_u64() as u32).swap_bytes()),
        _ => 0,
    };
    cpu.set_reg((*op).dst, T::from_u64(r));
    Op::run_next(cpu, op)
}

/// XLATB.
pub(crate) unsafe fn xlat(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va =
        cpu.slot(reg::RBX).wrapping_add(u64::from(cpu.reg::<u8>(reg::RAX))).wrapping_add(cpu.slot((*op).seg));
    let v: u8 = t!(cpu, op, cpu.load(va));
    cpu.set_reg(reg::RAX, v);
    Op::run_next(cpu, op)
}

/// LAHF.
pub(crate) unsafe fn lahf(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let f = cpu.fl.bits() as u8 | 2;
    cpu.set_reg(reg::RAX + 1, f);
    Op::run_next(cpu, op)
}

/// SAHF: OF keeps its value.
pub(crate) unsafe fn sahf(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let f = u64::from(cpu.reg::<u8>(reg::RAX + 1));
    let of = cpu.fl.bits() & bit::OF;
    cpu.fl.set_bits((f & (bit::ARITHMETIC & 0xff)) | of);
    Op::run_next(cpu, op)
}

/// CLC, STC, CMC, CLD, STD: `aux` is 0, 1, 2, 3, 4.
pub(crate) unsafe fn flag(cpu: &mut Cpu, op: *const Op) -> *const Op {
    match (*op).aux {
        0 => cpu.fl.set_cf(false),
        1 => cpu.fl.set_cf(true),
        2 => {
            let cf = cpu.fl.cf();
            cpu.fl.set_cf(!cf);
        }
        3 => cpu.rflags &= !bit::DF,
        _ => cpu.rflags |= bit::DF,
    }
    Op::run_next(cpu, op)
}

/// NOP, PAUSE, fences, prefetches, ENDBR.
pub(crate) unsafe fn nop(cpu: &mut Cpu, op: *const Op) -> *const Op {
    Op::run_next(cpu, op)
}

/// CLFLUSH and kin: the address must be readable.
pub(crate) unsafe fn touch(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let _: u8 = t!(cpu, op, super::Mem::get(cpu, op));
    Op::run_next(cpu, op)
}

/// An instruction that is not there: #UD, counted under the mnemonic in `imm` when `aux` is set.
pub(crate) unsafe fn undefined(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if (*op).aux != 0 {
        cpu.count_unimplemented((*op).imm as u16);
    }
    cpu.raise(crate::cpu::vector::UD, None);
    cpu.trap(op)
}

/// MOV for size and places, preferring the base + displacement forms where `simple`.
pub(crate) fn load_for<T: Int>(simple: bool) -> Handler {
    if simple { load_base::<T> } else { mov::<T, super::Dst, super::Mem> }
}
/// As [`load_for`], for stores of a register.
pub(crate) fn store_for<T: Int>(simple: bool) -> Handler {
    if simple { store_base::<T> } else { mov::<T, super::Mem, super::Src> }
}
