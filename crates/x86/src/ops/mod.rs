//! Integer operations: what a decoded instruction does.
//!
//! Handlers are generic over operand size and operand places, so that one body serves every form of an instruction;
//! `lower` picks the instance when an instruction is decoded. All are unsafe as [`crate::op::Handler`] says.

mod alu;
mod bits;
mod branch;
mod lower;
mod mov;
mod muldiv;
mod shift;
mod string;

pub(crate) use branch::{fall_through, is_conditional_jump};
pub(crate) use lower::{Context, cc_number, lower};
pub(crate) use mov::{address32, address64, undefined};

use crate::cpu::{Cpu, Stop, Trap, TrapInfo};
use crate::mem::Int;
use crate::op::Op;

/// Unwraps an access's result, or leaves the handler by its trap.
macro_rules! t {
    ($cpu:expr, $op:expr, $e:expr) => {
        match $e {
            Ok(v) => v,
            Err($crate::cpu::Trap) => return $cpu.trap($op),
        }
    };
}
pub(crate) use t;

impl Cpu {
    /// Reads a slot of the register file as a whole.
    #[inline(always)]
    pub(crate) unsafe fn slot(&self, off: u8) -> u64 {
        self.r.as_ptr().cast::<u8>().add(off as usize).cast::<u64>().read()
    }

    #[inline(always)]
    pub(crate) unsafe fn set_slot(&mut self, off: u8, v: u64) {
        self.r.as_mut_ptr().cast::<u8>().add(off as usize).cast::<u64>().write(v);
    }

    /// Reads a general register, or the part of it that has the size.
    #[inline(always)]
    pub(crate) unsafe fn reg<T: Int>(&self, off: u8) -> T {
        self.r.as_ptr().cast::<u8>().add(off as usize).cast::<T>().read_unaligned()
    }

    /// Writes a general register: 32-bit writes clear the upper half, smaller ones leave the rest alone.
    #[inline(always)]
    pub(crate) unsafe fn set_reg<T: Int>(&mut self, off: u8, v: T) {
        let p = self.r.as_mut_ptr().cast::<u8>().add(off as usize);
        if T::BYTES == 4 {
            p.cast::<u64>().write(v.to_u64());
        } else {
            p.cast::<T>().write_unaligned(v);
        }
    }

    /// The linear address of the memory operand.
    #[inline(always)]
    pub(crate) unsafe fn ea(&self, op: *const Op) -> u64 {
        let o = &*op;
        self.slot(o.base)
            .wrapping_add(self.slot(o.index) << o.scale)
            .wrapping_add(self.slot(o.seg))
            .wrapping_add(o.disp as i64 as u64)
    }

    /// The address of a base + displacement operand.
    #[inline(always)]
    pub(crate) unsafe fn ea_base(&self, op: *const Op) -> u64 {
        self.slot((*op).base).wrapping_add((*op).disp as i64 as u64)
    }

    /// The instruction's own address.
    #[inline(always)]
    pub(crate) unsafe fn this_rip(&self, op: *const Op) -> u64 {
        self.slot(crate::op::reg::PAGE).wrapping_add(u64::from((*op).off))
    }

    /// The address behind the instruction.
    #[inline(always)]
    pub(crate) unsafe fn next_rip(&self, op: *const Op) -> u64 {
        self.this_rip(op).wrapping_add(u64::from((*op).len))
    }

    /// Prepares an exception; the handler then leaves through [`Cpu::trap`].
    #[cold]
    #[inline(never)]
    pub(crate) fn raise(&mut self, vector: u8, error: Option<u32>) -> Trap {
        self.trap = TrapInfo { vector, error, address: 0 };
        self.stop = Stop::Exception;
        Trap
    }

    /// Leaves the sequence at an instruction that did not complete: RIP stays on it.
    #[cold]
    #[inline(never)]
    pub(crate) unsafe fn trap(&mut self, op: *const Op) -> *const Op {
        self.rip = self.this_rip(op);
        self.icount += u64::from((*op).n) - 1;
        std::ptr::null()
    }

    /// Leaves the sequence after an instruction that completed.
    #[inline]
    pub(crate) unsafe fn end(&mut self, op: *const Op, next_rip: u64) -> *const Op {
        self.rip = next_rip;
        self.stop = Stop::Next;
        self.icount += u64::from((*op).n);
        std::ptr::null()
    }
}

/// An operand that can be read.
pub(crate) trait Source {
    unsafe fn get<T: Int>(cpu: &mut Cpu, op: *const Op) -> Result<T, Trap>;
}

/// An operand that can be changed in place.
pub(crate) trait Place: Source {
    unsafe fn modify<T: Int>(
        cpu: &mut Cpu,
        op: *const Op,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap>;
    unsafe fn put<T: Int>(cpu: &mut Cpu, op: *const Op, v: T) -> Result<(), Trap>;
}

/// The register in `Op::dst`.
pub(crate) struct Dst;
/// The register in `Op::src`.
pub(crate) struct Src;
/// The immediate.
pub(crate) struct Imm;
/// The memory operand.
pub(crate) struct Mem;

impl Source for Dst {
    #[inline(always)]
    unsafe fn get<T: Int>(cpu: &mut Cpu, op: *const Op) -> Result<T, Trap> {
        Ok(cpu.reg((*op).dst))
    }
}
impl Place for Dst {
    #[inline(always)]
    unsafe fn modify<T: Int>(
        cpu: &mut Cpu,
        op: *const Op,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap> {
        let old = cpu.reg((*op).dst);
        let new = f(cpu, old);
        cpu.set_reg((*op).dst, new);
        Ok(())
    }
    #[inline(always)]
    unsafe fn put<T: Int>(cpu: &mut Cpu, op: *const Op, v: T) -> Result<(), Trap> {
        cpu.set_reg((*op).dst, v);
        Ok(())
    }
}
impl Source for Src {
    #[inline(always)]
    unsafe fn get<T: Int>(cpu: &mut Cpu, op: *const Op) -> Result<T, Trap> {
        Ok(cpu.reg((*op).src))
    }
}
impl Source for Imm {
    #[inline(always)]
    unsafe fn get<T: Int>(_: &mut Cpu, op: *const Op) -> Result<T, Trap> {
        Ok(T::from_u64((*op).imm))
    }
}
impl Source for Mem {
    #[inline(always)]
    unsafe fn get<T: Int>(cpu: &mut Cpu, op: *const Op) -> Result<T, Trap> {
        let va = cpu.ea(op);
        cpu.load(va)
    }
}
impl Place for Mem {
    #[inline(always)]
    unsafe fn modify<T: Int>(
        cpu: &mut Cpu,
        op: *const Op,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap> {
        let va = cpu.ea(op);
        cpu.modify(va, f)
    }
    #[inline(always)]
    unsafe fn put<T: Int>(cpu: &mut Cpu, op: *const Op, v: T) -> Result<(), Trap> {
        let va = cpu.ea(op);
        cpu.store(va, v)
    }
}
