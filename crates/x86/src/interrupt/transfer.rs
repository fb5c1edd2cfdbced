//! Far control transfers: INT n, IRET, SYSCALL, SYSRET, SYSENTER, SYSEXIT, far CALL, JMP and RET.

use iced_x86::{Code, Instruction};

use super::Source;
use crate::cpu::{Cpu, Segment, Trap, seg, vector};
use crate::decode::Lowered;
use crate::flags::bit;
use crate::mem::Int;
use crate::mmu::canonical;
use crate::op::{Handler, Op, reg};
use crate::ops::t;
use crate::system::{FLAT_CODE, FLAT_DATA, attr, efer, is_null, unsupported};

/// RFLAGS bits that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

/// Lowers far control transfers.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    let h: Handler = match insn.code() {
        Code::Int_imm8 => {
            op.aux = insn.immediate8();
            interrupt
        }
        Code::Int3 => {
            op.aux = vector::BP;
            interrupt
        }
        Code::Int1 => debug_interrupt,
        Code::Iretw => interrupt_return::<u16>,
        Code::Iretd => interrupt_return::<u32>,
        Code::Iretq => interrupt_return::<u64>,
        Code::Syscall => syscall,
        Code::Sysretq => sysret,
        Code::Sysretd => compatibility_return,
        Code::Sysenter => sysenter,
        Code::Sysexitq => sysexit,
        Code::Sysexitd => compatibility_return,
        Code::Retfw | Code::Retfw_imm16 => far_return::<u16>,
        Code::Retfd | Code::Retfd_imm16 => far_return::<u32>,
        Code::Retfq | Code::Retfq_imm16 => far_return::<u64>,
        Code::Jmp_m1616 => far_jump::<u16>,
        Code::Jmp_m1632 => far_jump::<u32>,
        Code::Jmp_m1664 => far_jump::<u64>,
        Code::Call_m1616 => far_call::<u16>,
        Code::Call_m1632 => far_call::<u32>,
        Code::Call_m1664 => far_call::<u64>,
        _ => return Lowered::No,
    };
    if matches!(insn.code(), Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16) {
        op.imm = u64::from(insn.immediate16());
    } else {
        op.imm = 0;
    }
    op.h = h;
    Lowered::Ends
}

/// Goes to the place that a completed transfer leads to; by the run loop when an interrupt may have waited for IF or
/// TF asks for single steps.
#[inline(always)]
unsafe fn arrive(cpu: &mut Cpu, op: *const Op, target: u64) -> *const Op {
    if cpu.rflags & bit::TF != 0 || cpu.irq_hint && cpu.rflags & bit::IF != 0 {
        return cpu.end(op, target);
    }
    cpu.icount += u64::from((*op).n);
    cpu.goto(target)
}

/// INT n and INT3: the vector is in `aux`.
unsafe fn interrupt(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let next = cpu.next_rip(op);
    t!(cpu, op, cpu.deliver((*op).aux, None, Source::Software, next));
    cpu.system.no_step = true;
    let target = cpu.rip;
    arrive(cpu, op, target)
}

/// INT1: #DB without the privilege check of INT n.
unsafe fn debug_interrupt(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let next = cpu.next_rip(op);
    t!(cpu, op, cpu.deliver(vector::DB, None, Source::Exception, next));
    cpu.system.no_step = true;
    let target = cpu.rip;
    arrive(cpu, op, target)
}

/// What an outer privilege level may not keep in its data segment registers.
fn drop_inner_segments(cpu: &mut Cpu, cpl: u8) {
    for i in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = &mut cpu.segs[i];
        let conforming = s.is_code() && s.has(attr::CONFORMING);
        if !is_null(s.selector) && s.dpl() < cpl && !conforming {
            // FS and GS keep their bases, which live elsewhere.
            *s = Segment { base: s.base, ..Segment::null(0) };
        }
    }
}

/// IRET; `T` is the size of what it pops.
unsafe fn interrupt_return<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let target = t!(cpu, op, return_from_interrupt::<T>(cpu));
    arrive(cpu, op, target)
}

unsafe fn return_from_interrupt<T: Int>(cpu: &mut Cpu) -> Result<u64, Trap> {
    if cpu.rflags & bit::NT != 0 {
        return Err(cpu.gp0());
    }
    let sp = cpu.slot(reg::RSP);
    let mut pop = [0; 5];
    for (i, v) in pop.iter_mut().enumerate() {
        *v = cpu.load::<T>(sp.wrapping_add(i as u64 * T::BYTES))?.to_u64();
    }
    let [rip, cs, flags, new_sp, ss] = pop;
    let (cs, ss) = (cs as u16, ss as u16);
    let code = cpu.code_segment(cs, true)?;
    if !canonical(rip) {
        return Err(cpu.gp0());
    }
    let cpl = (cs & 3) as u8;
    let stack = cpu.stack_segment(ss, cpl)?;

    let mut change = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT;
    if T::BYTES > 2 {
        change |= bit::AC | bit::ID;
    }
    if u64::from(cpu.cpl) <= (cpu.rflags & bit::IOPL) >> 12 {
        change |= bit::IF;
    }
    if cpu.cpl == 0 {
        change |= bit::IOPL;
        if T::BYTES > 2 {
            change |= bit::VIF | bit::VIP;
        }
    }
    let flags = cpu.rflags() & !change | flags & change;
    cpu.set_rflags(flags);
    cpu.segs[seg::CS] = code;
    cpu.segs[seg::SS] = stack;
    cpu.set_slot(reg::RSP, new_sp);
    if cpl != cpu.cpl {
        drop_inner_segments(cpu, cpl);
        cpu.set_cpl(cpl);
    }
    Ok(rip)
}

/// SYSCALL.
unsafe fn syscall(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.ctl.efer & efer::SCE == 0 {
        cpu.raise(vector::UD, None);
        return cpu.trap(op);
    }
    let flags = cpu.rflags();
    cpu.set_slot(reg::RCX, cpu.next_rip(op));
    cpu.set_slot(reg::R11, flags);
    cpu.set_rflags(flags & !cpu.ctl.sfmask & !bit::VM);
    let selector = (cpu.ctl.star >> 32) as u16 & 0xfffc;
    cpu.segs[seg::CS] = Segment { selector, ..FLAT_CODE };
    cpu.segs[seg::SS] = Segment { selector: selector.wrapping_add(8), ..FLAT_DATA };
    cpu.set_cpl(0);
    // A trap is due only when the mask left TF set.
    cpu.system.no_step = cpu.rflags & bit::TF == 0;
    let target = cpu.ctl.lstar;
    arrive(cpu, op, target)
}

/// SYSRET to 64-bit mode.
unsafe fn sysret(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.ctl.efer & efer::SCE == 0 {
        cpu.raise(vector::UD, None);
        return cpu.trap(op);
    }
    let target = cpu.slot(reg::RCX);
    if cpu.cpl != 0 || !canonical(target) {
        cpu.gp0();
        return cpu.trap(op);
    }
    cpu.set_rflags(cpu.slot(reg::R11) & SYSRET_FLAGS);
    let selector = (cpu.ctl.star >> 48) as u16;
    cpu.segs[seg::CS] = FLAT_CODE.with_dpl(selector.wrapping_add(16) | 3, 3);
    cpu.segs[seg::SS] = FLAT_DATA.with_dpl(selector.wrapping_add(8) | 3, 3);
    cpu.set_cpl(3);
    arrive(cpu, op, target)
}

/// SYSRET and SYSEXIT to 32-bit code.
unsafe fn compatibility_return(cpu: &mut Cpu, op: *const Op) -> *const Op {
    unsupported(cpu, "compatibility mode");
    cpu.gp0();
    cpu.trap(op)
}

/// SYSENTER.
unsafe fn sysenter(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let selector = cpu.ctl.sysenter_cs as u16 & 0xfffc;
    if selector == 0 {
        cpu.gp0();
        return cpu.trap(op);
    }
    cpu.rflags &= !(bit::IF | bit::VM | bit::RF);
    cpu.segs[seg::CS] = Segment { selector, ..FLAT_CODE };
    cpu.segs[seg::SS] = Segment { selector: selector.wrapping_add(8), ..FLAT_DATA };
    cpu.set_slot(reg::RSP, cpu.ctl.sysenter_esp);
    cpu.set_cpl(0);
    let target = cpu.ctl.sysenter_eip;
    arrive(cpu, op, target)
}

/// SYSEXIT to 64-bit mode.
unsafe fn sysexit(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let selector = cpu.ctl.sysenter_cs as u16 & 0xfffc;
    let (target, sp) = (cpu.slot(reg::RDX), cpu.slot(reg::RCX));
    if selector == 0 || cpu.cpl != 0 || !canonical(target) || !canonical(sp) {
        cpu.gp0();
        return cpu.trap(op);
    }
    cpu.segs[seg::CS] = FLAT_CODE.with_dpl(selector.wrapping_add(32) | 3, 3);
    cpu.segs[seg::SS] = FLAT_DATA.with_dpl(selector.wrapping_add(40) | 3, 3);
    cpu.set_slot(reg::RSP, sp);
    cpu.set_cpl(3);
    arrive(cpu, op, target)
}

/// Far RET; `imm` is what else comes off the stack.
unsafe fn far_return<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let target = t!(cpu, op, return_far::<T>(cpu, (*op).imm));
    arrive(cpu, op, target)
}

unsafe fn return_far<T: Int>(cpu: &mut Cpu, extra: u64) -> Result<u64, Trap> {
    let sp = cpu.slot(reg::RSP);
    let rip = cpu.load::<T>(sp)?.to_u64();
    let cs = cpu.load::<T>(sp.wrapping_add(T::BYTES))?.to_u64() as u16;
    let code = cpu.code_segment(cs, true)?;
    if !canonical(rip) {
        return Err(cpu.gp0());
    }
    let cpl = (cs & 3) as u8;
    let after = sp.wrapping_add(2 * T::BYTES).wrapping_add(extra);
    if cpl == cpu.cpl {
        cpu.set_slot(reg::RSP, after);
    } else {
        let new_sp = cpu.load::<T>(after)?.to_u64();
        let ss = cpu.load::<T>(after.wrapping_add(T::BYTES))?.to_u64() as u16;
        let stack = cpu.stack_segment(ss, cpl)?;
        cpu.segs[seg::SS] = stack;
        cpu.set_slot(reg::RSP, new_sp.wrapping_add(extra));
        drop_inner_segments(cpu, cpl);
        cpu.set_cpl(cpl);
    }
    cpu.segs[seg::CS] = code;
    Ok(rip)
}

/// Reads and checks the far pointer of a jump or call.
unsafe fn far_target<T: Int>(cpu: &mut Cpu, op: *const Op) -> Result<(u64, Segment), Trap> {
    let at = cpu.ea(op);
    let rip = cpu.load::<T>(at)?.to_u64();
    let selector: u16 = cpu.load(at.wrapping_add(T::BYTES))?;
    let code = cpu.code_segment(selector, false)?;
    if !canonical(rip) {
        return Err(cpu.gp0());
    }
    Ok((rip, code))
}

/// Far JMP to a code segment.
unsafe fn far_jump<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let (target, code) = t!(cpu, op, far_target::<T>(cpu, op));
    cpu.segs[seg::CS] = code;
    arrive(cpu, op, target)
}

/// Far CALL to a code segment.
unsafe fn far_call<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let (target, code) = t!(cpu, op, far_target::<T>(cpu, op));
    let sp = cpu.slot(reg::RSP).wrapping_sub(2 * T::BYTES);
    t!(cpu, op, cpu.probe_write(sp, 2 * T::BYTES));
    let old = T::from_u64(u64::from(cpu.segs[seg::CS].selector));
    let back = T::from_u64(cpu.next_rip(op));
    t!(cpu, op, cpu.store(sp.wrapping_add(T::BYTES), old));
    t!(cpu, op, cpu.store(sp, back));
    cpu.set_slot(reg::RSP, sp);
    cpu.segs[seg::CS] = code;
    arrive(cpu, op, target)
}
