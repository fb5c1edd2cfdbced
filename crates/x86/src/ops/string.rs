//! String instructions, as block operations on host memory wherever a page allows it.
//!
//! Registers advance with every chunk, so a fault or an interrupt in the middle leaves exactly the state that the
//! architecture describes, and the instruction restarts where it was.

use super::t;
use crate::cpu::{Cpu, Trap};
use crate::flags::bit;
use crate::mem::Int;
use crate::op::{Op, reg};

/// No REP prefix, REP (or REPE), REPNE.
const ONCE: u8 = 0;
const REPNE: u8 = 2;

impl Cpu {
    #[inline(always)]
    fn backwards(&self) -> bool {
        self.rflags & bit::DF != 0
    }

    #[inline(always)]
    fn stride<T: Int>(&self) -> u64 {
        if self.backwards() { T::BYTES.wrapping_neg() } else { T::BYTES }
    }

    #[inline(always)]
    unsafe fn advance(&mut self, register: u8, by: u64) {
        let v = self.slot(register).wrapping_add(by);
        self.set_slot(register, v);
    }

    /// Host memory at `va` for reading, and how many bytes of it (to the page's end).
    #[inline(always)]
    unsafe fn read_run(&mut self, va: u64) -> Result<Option<(*const u8, u64)>, Trap> {
        let left = 4096 - (va & 0xfff);
        if let Some(p) = self.read_ptr(va, 1) {
            return Ok(Some((p, left)));
        }
        Ok(self.translate_ptr(va, false)?.map(|p| (p.cast_const(), left)))
    }

    /// Host memory at `va` for writing, and how many bytes of it (to the page's end).
    #[inline(always)]
    unsafe fn write_run(&mut self, va: u64) -> Result<Option<(*mut u8, u64)>, Trap> {
        let left = 4096 - (va & 0xfff);
        if let Some(p) = self.write_ptr(va, 1) {
            return Ok(Some((p, left)));
        }
        Ok(self.translate_ptr(va, true)?.map(|p| (p, left)))
    }
}

/// STOS; `aux` is the prefix.
pub(crate) unsafe fn stos<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v: T = cpu.reg(reg::RAX);
    let stride = cpu.stride::<T>();
    if (*op).aux == ONCE {
        let va = cpu.slot(reg::RDI);
        t!(cpu, op, cpu.store(va, v));
        cpu.advance(reg::RDI, stride);
        return Op::run_next(cpu, op);
    }
    loop {
        let count = cpu.slot(reg::RCX);
        if count == 0 {
            return Op::run_next(cpu, op);
        }
        let va = cpu.slot(reg::RDI);
        let mut done = 0;
        if !cpu.backwards()
            && let Some((p, left)) = t!(cpu, op, cpu.write_run(va))
        {
            done = count.min(left / T::BYTES);
            fill(p, v, done);
        }
        if done == 0 {
            t!(cpu, op, cpu.store(va, v));
            done = 1;
        }
        cpu.advance(reg::RDI, done.wrapping_mul(stride));
        cpu.set_slot(reg::RCX, count - done);
        if count > done && cpu.must_leave() {
            let rip = cpu.this_rip(op);
            return cpu.end(op, rip);
        }
    }
}

#[inline(always)]
unsafe fn fill<T: Int>(p: *mut u8, v: T, count: u64) {
    let byte = v.to_u64() as u8;
    if v.to_u64() == T::from_u64(u64::from(byte).wrapping_mul(0x0101_0101_0101_0101)).to_u64() {
        std::ptr::write_bytes(p, byte, (count * T::BYTES) as usize);
    } else {
        for i in 0..count as usize {
            p.cast::<T>().add(i).write_unaligned(v);
        }
    }
}

/// MOVS; `aux` is the prefix, `seg` the source's segment.
pub(crate) unsafe fn movs<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let stride = cpu.stride::<T>();
    let base = cpu.slot((*op).seg);
    if (*op).aux == ONCE {
        let (from, to) = (cpu.slot(reg::RSI).wrapping_add(base), cpu.slot(reg::RDI));
        let v: T = t!(cpu, op, cpu.load(from));
        t!(cpu, op, cpu.store(to, v));
        cpu.advance(reg::RSI, stride);
        cpu.advance(reg::RDI, stride);
        return Op::run_next(cpu, op);
    }
    loop {
        let count = cpu.slot(reg::RCX);
        if count == 0 {
            return Op::run_next(cpu, op);
        }
        let (from, to) = (cpu.slot(reg::RSI).wrapping_add(base), cpu.slot(reg::RDI));
        let mut done = 0;
        if !cpu.backwards()
            && let Some((s, s_left)) = t!(cpu, op, cpu.read_run(from))
            && let Some((d, d_left)) = t!(cpu, op, cpu.write_run(to))
        {
            // Filling the second translation may have evicted nothing that `s` needs: host memory stays mapped.
            done = count.min(s_left / T::BYTES).min(d_left / T::BYTES);
            copy_forward::<T>(s, d, done);
        }
        if done == 0 {
            let v: T = t!(cpu, op, cpu.load(from));
            t!(cpu, op, cpu.store(to, v));
            done = 1;
        }
        cpu.advance(reg::RSI, done.wrapping_mul(stride));
        cpu.advance(reg::RDI, done.wrapping_mul(stride));
        cpu.set_slot(reg::RCX, count - done);
        if count > done && cpu.must_leave() {
            let rip = cpu.this_rip(op);
            return cpu.end(op, rip);
        }
    }
}

/// Copies element by element in ascending order, in bulk where the difference cannot be seen.
#[inline(always)]
unsafe fn copy_forward<T: Int>(s: *const u8, d: *mut u8, count: u64) {
    let bytes = (count * T::BYTES) as usize;
    let distance = (d as usize).wrapping_sub(s as usize);
    if distance >= bytes {
        std::ptr::copy(s, d, bytes);
    } else {
        // The destination starts inside the source: what was written is read again.
        for i in 0..count as usize {
            let v = s.cast::<T>().add(i).read_unaligned();
            d.cast::<T>().add(i).write_unaligned(v);
        }
    }
}

/// LODS; `aux` is the prefix.
pub(crate) unsafe fn lods<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let stride = cpu.stride::<T>();
    let base = cpu.slot((*op).seg);
    loop {
        let count = if (*op).aux == ONCE { 1 } else { cpu.slot(reg::RCX) };
        if count == 0 {
            return Op::run_next(cpu, op);
        }
        let va = cpu.slot(reg::RSI).wrapping_add(base);
        let v: T = t!(cpu, op, cpu.load(va));
        cpu.set_reg(reg::RAX, v);
        cpu.advance(reg::RSI, stride);
        if (*op).aux == ONCE {
            return Op::run_next(cpu, op);
        }
        cpu.set_slot(reg::RCX, count - 1);
        if count > 1 && cpu.must_leave() {
            let rip = cpu.this_rip(op);
            return cpu.end(op, rip);
        }
    }
}

/// SCAS (`SCAN`) and CMPS; `aux` is the prefix.
pub(crate) unsafe fn compare<T: Int, const SCAN: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    use super::alu::{Alu, Sub};
    let stride = cpu.stride::<T>();
    let base = cpu.slot((*op).seg);
    let prefix = (*op).aux;
    loop {
        let count = if prefix == ONCE { 1 } else { cpu.slot(reg::RCX) };
        if count == 0 {
            return Op::run_next(cpu, op);
        }
        let to = cpu.slot(reg::RDI);
        let a: T = if SCAN {
            cpu.reg(reg::RAX)
        } else {
            let from = cpu.slot(reg::RSI).wrapping_add(base);
            t!(cpu, op, cpu.load(from))
        };
        let b: T = t!(cpu, op, cpu.load(to));
        Sub::apply::<T, true>(cpu, a, b);
        if !SCAN {
            cpu.advance(reg::RSI, stride);
        }
        cpu.advance(reg::RDI, stride);
        if prefix == ONCE {
            return Op::run_next(cpu, op);
        }
        cpu.set_slot(reg::RCX, count - 1);
        if cpu.fl.zf() == (prefix == REPNE) {
            return Op::run_next(cpu, op);
        }
        if count > 1 && cpu.must_leave() {
            let rip = cpu.this_rip(op);
            return cpu.end(op, rip);
        }
    }
}
