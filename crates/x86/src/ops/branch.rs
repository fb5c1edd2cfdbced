//! Control flow, and how one sequence leads to the next.
//!
//! A taken branch inside its page is linked: the operation remembers the target's first operation. That is always
//! right, because both live and die with the page. Everything else goes through the jump cache, by virtual address.

use std::sync::atomic::Ordering;

use super::{Source, t};
use crate::cpu::{Cpu, JUMP_CACHE, Stop};
use crate::op::{Handler, Op, reg};

impl Cpu {
    /// Whether something outside wants the CPU's attention.
    #[inline(always)]
    pub(crate) unsafe fn must_leave(&self) -> bool {
        self.icount >= self.icount_limit || (*self.kick).load(Ordering::Relaxed) != 0
    }

    /// The jump cache's index of an address.
    #[inline(always)]
    pub(crate) fn jump_index(va: u64) -> usize {
        (va ^ va >> 12) as usize & (JUMP_CACHE - 1)
    }

    /// Goes to any address: by the jump cache, else by the run loop.
    #[inline(always)]
    pub(crate) unsafe fn goto(&mut self, va: u64) -> *const Op {
        if !self.must_leave() {
            let e = *self.jump_cache.get_unchecked(Self::jump_index(va));
            if e.key == va ^ self.mode_key {
                self.set_slot(reg::PAGE, va & !0xfff);
                return e.op;
            }
        }
        self.rip = va;
        self.stop = Stop::Next;
        std::ptr::null()
    }
}

/// Takes the branch whose page-relative target is in `disp` and whose link is in `imm`.
#[inline(always)]
unsafe fn take(cpu: &mut Cpu, op: *const Op) -> *const Op {
    cpu.icount += u64::from((*op).n);
    let link = (*op).imm as *const Op;
    if !link.is_null() && !cpu.must_leave() {
        return link;
    }
    take_unlinked(cpu, op)
}

#[inline(never)]
unsafe fn take_unlinked(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let rel = i64::from((*op).disp);
    let va = cpu.slot(reg::PAGE).wrapping_add(rel as u64);
    if (0..4096).contains(&rel) {
        // The run loop finds the target and links it.
        cpu.rip = va;
        cpu.stop = Stop::Next;
        if (*op).imm == 0 && !cpu.alone {
            cpu.link_from = op.cast_mut();
        }
        return std::ptr::null();
    }
    cpu.goto(va)
}

/// Jcc's work, for the jump itself and for what fuses with it: `op` is the jump's operation.
#[inline(always)]
pub(crate) unsafe fn conditional<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.fl.condition(CC) { take(cpu, op) } else { Op::run_next(cpu, op) }
}

unsafe fn jcc<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    conditional::<CC>(cpu, op)
}

/// The Jcc handler of a condition code.
pub(crate) fn jcc_for(cc: u8) -> Handler {
    const TABLE: [Handler; 16] = [
        jcc::<0>, jcc::<1>, jcc::<2>, jcc::<3>, jcc::<4>, jcc::<5>, jcc::<6>, jcc::<7>, jcc::<8>, jcc::<9>,
        jcc::<10>, jcc::<11>, jcc::<12>, jcc::<13>, jcc::<14>, jcc::<15>,
    ];
    TABLE[usize::from(cc & 15)]
}

/// Whether an instruction can fuse with a comparison before it.
pub(crate) fn is_conditional_jump(insn: &iced_x86::Instruction) -> bool {
    insn.is_jcc_short_or_near()
}

/// JMP rel.
pub(crate) unsafe fn jump(cpu: &mut Cpu, op: *const Op) -> *const Op {
    take(cpu, op)
}

/// Ends a sequence that has no branch: `disp` is where it goes on. Counts no instruction of its own.
pub(crate) unsafe fn fall_through(cpu: &mut Cpu, op: *const Op) -> *const Op {
    take(cpu, op)
}

/// JMP to a register or memory operand.
pub(crate) unsafe fn jump_to<S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va: u64 = t!(cpu, op, S::get(cpu, op));
    cpu.icount += u64::from((*op).n);
    cpu.goto(va)
}

#[inline(always)]
unsafe fn push_return(cpu: &mut Cpu, op: *const Op) -> Result<(), crate::cpu::Trap> {
    let back = cpu.next_rip(op);
    let sp = cpu.slot(reg::RSP).wrapping_sub(8);
    cpu.store(sp, back)?;
    cpu.set_slot(reg::RSP, sp);
    Ok(())
}

/// CALL rel.
pub(crate) unsafe fn call(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, push_return(cpu, op));
    take(cpu, op)
}

/// CALL of a register or memory operand.
pub(crate) unsafe fn call_to<S: Source>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va: u64 = t!(cpu, op, S::get(cpu, op));
    t!(cpu, op, push_return(cpu, op));
    cpu.icount += u64::from((*op).n);
    cpu.goto(va)
}

/// RET; `imm` is what else comes off the stack.
pub(crate) unsafe fn ret(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let sp = cpu.slot(reg::RSP);
    let va: u64 = t!(cpu, op, cpu.load(sp));
    cpu.set_slot(reg::RSP, sp.wrapping_add(8).wrapping_add((*op).imm));
    cpu.icount += u64::from((*op).n);
    cpu.goto(va)
}

/// LOOP (`aux` 0), LOOPE (1), LOOPNE (2), JRCXZ (3), with RCX; bit 2 of `aux` says ECX.
pub(crate) unsafe fn count_jump(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let short = (*op).aux & 4 != 0;
    let kind = (*op).aux & 3;
    let mut count = if short { u64::from(cpu.reg::<u32>(reg::RCX)) } else { cpu.slot(reg::RCX) };
    if kind == 3 {
        return if count == 0 { take(cpu, op) } else { Op::run_next(cpu, op) };
    }
    count = count.wrapping_sub(1);
    if short {
        cpu.set_reg(reg::RCX, count as u32);
        count &= 0xffff_ffff;
    } else {
        cpu.set_slot(reg::RCX, count);
    }
    let go = count != 0
        && match kind {
            1 => cpu.fl.zf(),
            2 => !cpu.fl.zf(),
            _ => true,
        };
    if go { take(cpu, op) } else { Op::run_next(cpu, op) }
}
