//! Delivery, returns, system calls, escalation; where the frames and stacks are.

use iced_x86::code_asm::*;

use super::{Escalation, escalate};
use crate::cpu::{Exit, seg, vector};
use crate::flags::bit;
use crate::system::rig::*;
use crate::system::{efer, msr};

#[test]
fn faults_in_the_same_ring() {
    let mut rig = Rig::new();
    rig.change(|s| s.gpr[4] = STACK - 5);
    let e = rig.fault(|a| a.ud2());
    assert_eq!((e.vector, e.error, e.rip), (6, None, CODE));
    assert_eq!((e.cs, e.ss, e.rsp), (KERNEL_CS, KERNEL_DS, STACK - 5));
    assert_eq!(e.flags & bit::RF, bit::RF);
    // The frame lies at a multiple of 16.
    assert_eq!(rig.gpr(4), ((STACK - 5) & !15) - 40);
    let e = rig.fault(|a| {
        a.xor(ecx, ecx)?;
        a.div(ecx)
    });
    assert_eq!((e.vector, e.rip), (0, CODE + 2));
    assert_eq!(rig.cpu.state().rflags & bit::RF, 0);
}

#[test]
fn stack_switch_and_return() {
    let mut rig = Rig::new();
    rig.change(|s| s.rflags |= bit::IF | bit::DF);
    let e = rig.user_fault(|a| a.hlt());
    assert_eq!((e.vector, e.error, e.rip), (13, Some(0), USER_CODE));
    assert_eq!((e.cs, e.ss, e.rsp), (USER_CS, USER_DS, USER_STACK));
    assert_eq!(rig.gpr(4), RSP0 - 48);
    let s = rig.cpu.state();
    assert_eq!((s.segments[seg::CS].selector, s.segments[seg::SS].selector), (KERNEL_CS, 0));
    // An interrupt gate clears IF; DF stays.
    assert_eq!(s.rflags & (bit::IF | bit::DF), bit::DF);
    assert_eq!(e.flags & (bit::IF | bit::DF), bit::IF | bit::DF);

    // The handler steps over HLT and returns.
    rig.code(CODE, |a| {
        a.add(rsp, 8)?;
        a.inc(qword_ptr(rsp))?;
        a.iretq()
    });
    rig.gate(13, CODE, 0, 0x8e);
    rig.code(USER_CODE, |a| {
        a.hlt()?;
        a.mov(ebx, 77)?;
        a.int(0x80)
    });
    rig.gate(0x80, STUBS + 0x800, 0, 0xef);
    rig.cpu.invalidate_all_code();
    rig.enter_user();
    rig.change(|s| s.rflags |= bit::IF);
    let e = rig.event();
    assert_eq!((e.vector, rig.gpr(3)), (0x80, 77));
    assert_eq!((e.cs, e.ss, e.rsp), (USER_CS, USER_DS, USER_STACK));
    // A trap gate leaves IF.
    assert_eq!(rig.cpu.state().rflags & bit::IF, bit::IF);
    assert_eq!(e.flags & bit::RF, 0);
}

#[test]
fn interrupt_stack_table() {
    let mut rig = Rig::new();
    rig.gate(14, STUBS + 14 * 16, 1, 0x8e);
    let e = rig.fault(|a| a.mov(al, byte_ptr(0x7000_0000)));
    assert_eq!(e.vector, 14);
    assert_eq!((rig.gpr(4), e.rsp, e.ss), (IST1 - 48, STACK, KERNEL_DS));
    // Without a change of ring SS stays.
    assert_eq!(rig.cpu.state().segments[seg::SS].selector, KERNEL_DS);
    let e = rig.user_fault(|a| a.mov(al, byte_ptr(0x7000_0000)));
    assert_eq!((rig.gpr(4), e.rsp, e.ss), (IST1 - 48, USER_STACK, USER_DS));
    assert_eq!(rig.cpu.state().segments[seg::SS].selector, 0);
}

#[test]
fn external_interrupts_wait_for_if_and_the_shadow() {
    let mut rig = Rig::new();
    rig.bus.interrupts.push_back(0x30);
    rig.code(CODE, |a| {
        a.mov(eax, 1)?;
        a.sti()?;
        a.mov(eax, 2)?;
        a.mov(eax, 3)?;
        a.hlt()
    });
    let e = rig.event();
    assert_eq!((e.vector, e.error), (0x30, None));
    // Not between STI and what follows.
    assert!(rig.gpr(0) >= 2, "{e:x?}");
    assert_eq!(e.flags & (bit::IF | bit::RF), bit::IF);
    assert_eq!(rig.cpu.diagnostics().interrupts, 1);
    // From HLT: the address behind it is saved.
    rig.code(CODE, |a| {
        a.sti()?;
        a.hlt()
    });
    rig.cpu.invalidate_all_code();
    rig.change(|s| {
        s.rip = CODE;
        s.rflags = 2;
    });
    assert_eq!(rig.run(), Exit::Halt);
    assert!(rig.cpu.state().halted);
    // Still nothing: it halts on.
    assert_eq!(rig.run(), Exit::Halt);
    assert_eq!(rig.cpu.rip(), CODE + 2);
    rig.bus.interrupts.push_back(0x31);
    let e = rig.event();
    assert_eq!((e.vector, e.rip), (0x31, CODE + 2));
}

#[test]
fn interrupts_are_taken_when_a_return_allows_them() {
    // With everything decoded and linked already, POPF, IRET and SYSRET must still look.
    for how in 0..3 {
        let mut rig = Rig::new();
        rig.change(|s| {
            s.msrs.push((msr::STAR, (0x23 << 48) | 0x10 << 32));
            s.msrs.push((msr::SFMASK, bit::IF));
        });
        // The user spins.
        rig.code(USER_CODE, |a| {
            let mut l = a.create_label();
            a.set_label(&mut l)?;
            a.jmp(l)
        });
        rig.code(CODE, |a| {
            a.mov(rax, dr0)?;
            match how {
                0 => {
                    let mut l = a.create_label();
                    a.push(0x202)?;
                    a.popfq()?;
                    a.set_label(&mut l)?;
                    a.jmp(l)
                }
                1 => {
                    a.push(i32::from(USER_DS))?;
                    a.mov(eax, USER_STACK as u32)?;
                    a.push(rax)?;
                    a.push(0x202)?;
                    a.push(i32::from(USER_CS))?;
                    a.mov(eax, USER_CODE as u32)?;
                    a.push(rax)?;
                    a.iretq()
                }
                _ => {
                    a.mov(ecx, USER_CODE as u32)?;
                    a.mov(r11d, 0x202)?;
                    a.sysretq()
                }
            }
        });
        for round in 0..3 {
            rig.bus.interrupts.push_back(0x40);
            rig.change(|s| {
                s.rip = CODE;
                s.rflags = 2;
                s.segments[seg::CS].selector = KERNEL_CS;
                s.segments[seg::CS].attributes = 0xa09b;
                s.segments[seg::SS].selector = KERNEL_DS;
                s.segments[seg::SS].attributes = 0xc093;
                s.gpr[4] = STACK;
            });
            let e = rig.event();
            assert_eq!(e.vector, 0x40, "way {how}, round {round}");
            assert_eq!(e.cs, if how == 0 { KERNEL_CS } else { USER_CS });
        }
    }
}

#[test]
fn software_interrupts_check_the_gate() {
    let mut rig = Rig::new();
    let e = rig.user_fault(|a| a.int(0x80));
    assert_eq!((e.vector, e.error, e.rip), (13, Some(0x80 * 8 + 2), USER_CODE));
    let e = rig.user_fault(|a| a.int3());
    assert_eq!((e.vector, e.error), (13, Some(3 * 8 + 2)));
    rig.gate(3, STUBS + 48, 0, 0xee);
    let e = rig.user_fault(|a| a.int3());
    assert_eq!((e.vector, e.rip), (3, USER_CODE + 1));
    // Absent, of another type, beyond the limit.
    rig.gate(0x80, STUBS, 0, 0x6e);
    let e = rig.user_fault(|a| a.int(0x80));
    assert_eq!((e.vector, e.error), (11, Some(0x80 * 8 + 2)));
    rig.gate(0x80, STUBS, 0, 0xec);
    let e = rig.user_fault(|a| a.int(0x80));
    assert_eq!((e.vector, e.error), (13, Some(0x80 * 8 + 2)));
    rig.change(|s| s.idtr.limit = 0x7ff);
    let e = rig.user_fault(|a| a.int(0x80));
    assert_eq!((e.vector, e.error), (13, Some(0x80 * 8 + 2)));
}

fn syscalls(rig: &mut Rig) {
    rig.change(|s| {
        s.msrs.push((msr::STAR, 0x23 << 48 | 0x10 << 32));
        s.msrs.push((msr::LSTAR, CODE));
        s.msrs.push((msr::SFMASK, bit::IF | bit::DF | bit::TF));
    });
}

#[test]
fn syscall_and_sysret() {
    let mut rig = Rig::new();
    syscalls(&mut rig);
    rig.code(USER_CODE, |a| {
        let mut again = a.create_label();
        a.std()?;
        a.mov(ebx, 5)?;
        a.set_label(&mut again)?;
        a.stc()?;
        a.syscall()?;
        a.dec(ebx)?;
        a.jne(again)?;
        a.ud2()
    });
    rig.code(CODE, |a| {
        a.mov(r14, rcx)?;
        a.mov(r15, r11)?;
        a.pushfq()?;
        a.pop(r13)?;
        a.mov(r12w, cs)?;
        a.mov(r9w, ss)?;
        a.inc(rbp)?;
        a.sysretq()
    });
    rig.enter_user();
    // SYSCALL leaves RSP alone: the kernel's PUSHF above goes to the user's stack.
    let e = rig.event();
    assert_eq!((e.vector, e.cs, e.ss, e.rsp), (6, USER_CS, USER_DS, USER_STACK));
    assert_eq!(rig.gpr(5), 5);
    assert_eq!(rig.gpr(14), e.rip - 4);
    assert_eq!(rig.gpr(15) & (bit::CF | bit::DF), bit::CF | bit::DF);
    assert_eq!(rig.gpr(13) & (bit::CF | bit::DF), bit::CF);
    assert_eq!((rig.gpr(12) as u16, rig.gpr(9) as u16), (0x10, 0x18));
    assert_eq!(e.flags & bit::DF, bit::DF);
}

#[test]
fn syscall_and_sysret_refusals() {
    let mut rig = Rig::new();
    syscalls(&mut rig);
    let e = rig.user_fault(|a| a.sysretq());
    assert_eq!((e.vector, e.error), (13, Some(0)));
    rig.change(|s| {
        s.segments[seg::CS].selector = KERNEL_CS;
        s.gpr[1] = 1 << 47;
    });
    let e = rig.fault(|a| a.sysretq());
    assert_eq!((e.vector, e.error, e.cs), (13, Some(0), KERNEL_CS));
    // 32-bit code is not to be had, and said so.
    let e = rig.fault(|a| a.sysret());
    assert_eq!((e.vector, e.error), (13, Some(0)));
    assert_eq!(rig.cpu.diagnostics().unimplemented.get("compatibility mode"), Some(&1));
    rig.change(|s| s.msrs.push((msr::EFER, efer::LME | efer::LMA | efer::NXE)));
    let e = rig.user_fault(|a| a.syscall());
    assert_eq!((e.vector, e.rip), (6, USER_CODE));
}

fn iret_frame(a: &mut CodeAssembler, words: [u64; 5]) -> Result<(), iced_x86::IcedError> {
    for w in words.iter().rev() {
        a.mov(rax, *w)?;
        a.push(rax)?;
    }
    a.iretq()
}

#[test]
fn iret_checks_and_restarts() {
    let mut rig = Rig::new();
    let (code, stack) = (u64::from(USER_CS), u64::from(USER_DS));
    let good = [USER_CODE, code, 2, USER_STACK, stack];
    let change = |i: usize, v: u64| {
        let mut f = good;
        f[i] = v;
        f
    };
    let bad = [
        (change(0, 1 << 47), 13, 0),
        (change(1, 0), 13, 0),
        (change(1, 0x18), 13, 0x18),
        (change(1, 0x32), 13, 0x30),
        (change(1, 0x73), 13, 0x70),
        (change(1, 0x54 | 3), 13, 0x54),
        (change(4, 0), 13, 0),
        (change(4, 3), 13, 0),
        (change(4, 0x33), 13, 0x30),
        (change(4, 0x28), 13, 0x28),
        (change(4, 0x1b), 13, 0x18),
    ];
    for (frame, vector, error) in bad {
        let e = rig.fault(|a| iret_frame(a, frame));
        assert_eq!((e.vector, e.error), (vector, Some(error)), "{frame:x?}");
        // Nothing has changed: the frame is still on the stack, the ring the same.
        assert_eq!((e.cs, e.rsp), (KERNEL_CS, STACK - 40), "{frame:x?}");
        rig.change(|s| s.gpr[4] = STACK);
    }
    // A segment that is not present.
    rig.write(GDT + 0x28, 0x00c0_7300_0000_ffffu64);
    let e = rig.fault(|a| iret_frame(a, good));
    assert_eq!((e.vector, e.error), (12, Some(0x28)));
    rig.write(GDT + 0x28, 0x00c0_f200_0000_ffffu64);
    rig.change(|s| s.gpr[4] = STACK);
    rig.code(USER_CODE, |a| a.ud2());
    let e = rig.fault(|a| iret_frame(a, good));
    assert_eq!((e.vector, e.cs, e.ss, e.rsp), (6, USER_CS, USER_DS, USER_STACK));
    // Loading it has marked the descriptor accessed.
    assert_eq!(rig.read::<u64>(GDT + 0x28), 0x00c0_f300_0000_ffff);
    // NT.
    rig.change(|s| {
        s.gpr[4] = STACK;
        s.segments[seg::CS].selector = KERNEL_CS;
    });
    let e = rig.fault(|a| {
        a.push(0x4002)?;
        a.popfq()?;
        iret_frame(a, good)
    });
    assert_eq!((e.vector, e.error), (13, Some(0)));
}

#[test]
fn iret_flags_follow_privilege() {
    let mut rig = Rig::new();
    let (code, stack) = (u64::from(USER_CS), u64::from(USER_DS));
    // From ring 0 all may be set.
    rig.code(USER_CODE, |a| {
        a.pushfq()?;
        a.pop(rbx)?;
        iret_frame(a, [USER_CODE + 0x100, code, 0x2, USER_STACK, stack])
    });
    rig.code(USER_CODE + 0x100, |a| a.ud2());
    let e = rig.fault(|a| iret_frame(a, [USER_CODE, code, 0x24_3a02, USER_STACK, stack]));
    assert_eq!(rig.gpr(3), 0x24_3a02);
    // From ring 3 with IOPL 3: IF may change, IOPL not.
    assert_eq!((e.vector, e.flags & !bit::RF), (6, 0x3002));
    rig.change(|s| {
        s.segments[seg::CS].selector = KERNEL_CS;
        s.rflags = 2;
    });
    rig.code(USER_CODE, |a| iret_frame(a, [USER_CODE + 0x100, code, 0x3002, USER_STACK, stack]));
    let e = rig.fault(|a| iret_frame(a, [USER_CODE, code, 0x202, USER_STACK, stack]));
    assert_eq!(e.flags & !bit::RF, 0x202);
}

#[test]
fn iret_drops_inner_data_segments() {
    let mut rig = Rig::new();
    rig.code(USER_CODE, |a| a.ud2());
    rig.fault(|a| {
        a.mov(eax, u32::from(KERNEL_DS))?;
        a.mov(ds, eax)?;
        a.mov(fs, eax)?;
        a.mov(eax, u32::from(USER_DS))?;
        a.mov(es, eax)?;
        a.mov(ecx, 0xc000_0100u32)?;
        a.mov(eax, 0x1234)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        iret_frame(a, [USER_CODE, u64::from(USER_CS), 2, USER_STACK, u64::from(USER_DS)])
    });
    let s = rig.cpu.state();
    assert_eq!([seg::DS, seg::ES, seg::FS].map(|i| s.segments[i].selector), [0, USER_DS, 0]);
    assert_eq!(s.segments[seg::FS].base, 0x1234);
}

#[test]
fn far_return_jump_and_call() {
    let mut rig = Rig::new();
    // As Linux does at boot: push CS, push address, LRETQ.
    rig.write(GDT + 0x38, 0x00af_9b00_0000_ffffu64);
    rig.code(DATA, |a| {
        a.mov(bx, cs)?;
        a.mov(rcx, rsp)?;
        a.db(&[0x48, 0xcb])
    });
    rig.code(CODE + 0x200, |a| a.ud2());
    let e = rig.fault(|a| {
        a.push(i32::from(KERNEL_CS))?;
        a.mov(eax, CODE as u32 + 0x200)?;
        a.push(rax)?;
        a.push(0x38)?;
        a.mov(eax, DATA as u32)?;
        a.push(rax)?;
        a.db(&[0x48, 0xcb])
    });
    assert_eq!((e.vector, e.rip, e.rsp, e.cs), (6, CODE + 0x200, STACK, KERNEL_CS));
    assert_eq!((rig.gpr(3) as u16, rig.gpr(1)), (0x38, STACK - 16));
    // CALL m16:64 and back, then JMP m16:32.
    rig.write(DATA + 0x100, DATA);
    rig.write(DATA + 0x108, 0x38u16);
    rig.write(DATA + 0x110, (CODE + 0x200) as u32);
    rig.write(DATA + 0x114, 0x38u16);
    rig.change(|s| s.rip = CODE);
    let start = [0x48, 0xff, 0x1c, 0x25, 0x00, 0x01, 0x40, 0x00, 0xff, 0x2c, 0x25, 0x10, 0x01, 0x40, 0x00];
    for (i, b) in start.into_iter().enumerate() {
        rig.write::<u8>(CODE + i as u64, b);
    }
    rig.cpu.invalidate_all_code();
    let e = rig.event();
    assert_eq!((e.vector, e.rip, e.cs), (6, CODE + 0x200, 0x38));
    assert_eq!((rig.gpr(3) as u16, rig.gpr(1)), (0x38, e.rsp - 16));
    // To user mode by a far return, and from there to nowhere.
    rig.change(|s| {
        s.gpr[4] = STACK;
        s.segments[seg::CS].selector = KERNEL_CS;
    });
    rig.code(USER_CODE, |a| {
        a.push(i32::from(KERNEL_CS))?;
        a.push(0)?;
        a.db(&[0x48, 0xcb])
    });
    let e = rig.fault(|a| {
        a.push(i32::from(USER_DS))?;
        a.mov(eax, USER_STACK as u32)?;
        a.push(rax)?;
        a.push(i32::from(USER_CS))?;
        a.mov(eax, USER_CODE as u32)?;
        a.push(rax)?;
        a.db(&[0x48, 0xcb])
    });
    assert_eq!((e.vector, e.error, e.cs, e.rsp), (13, Some(0x10), USER_CS, USER_STACK - 16));
}

#[test]
fn escalation_follows_the_table() {
    use Escalation::{Double, Serial, Triple};
    let classes = [vector::UD, vector::GP, vector::PF, vector::DF];
    let expected = [
        [Serial, Serial, Serial, Serial],
        [Serial, Double, Serial, Serial],
        [Serial, Double, Double, Serial],
        [Serial, Triple, Triple, Serial],
    ];
    for (first, row) in classes.into_iter().zip(expected) {
        for (second, want) in classes.into_iter().zip(row) {
            assert_eq!(escalate(first, second), want, "{first} then {second}");
        }
    }
    for v in [vector::DE, vector::TS, vector::NP, vector::SS] {
        assert_eq!(escalate(v, vector::GP), Double);
    }
}

#[test]
fn double_fault() {
    let mut rig = Rig::new();
    // #GP's gate is absent: #NP in its delivery makes a double fault, with error code 0 on its own stack.
    rig.gate(13, STUBS, 0, 0x0e);
    rig.gate(8, STUBS + 128, 1, 0x8e);
    let e = rig.fault(|a| {
        a.mov(rax, 1u64 << 47)?;
        a.mov(rbx, qword_ptr(rax))
    });
    assert_eq!((e.vector, e.error, e.rip, e.rsp), (8, Some(0), CODE + 10, STACK));
    assert_eq!(rig.gpr(4), IST1 - 48);
    // A page fault that cannot push its frame (a kernel stack overflow): CR2 is the stack's.
    rig.change(|s| s.gpr[4] = 0x7000_0000);
    let e = rig.fault(|a| a.push(rax));
    assert_eq!((e.vector, e.error, e.rip, e.rsp), (8, Some(0), CODE, 0x7000_0000));
    assert_eq!(rig.cpu.state().cr2, 0x7000_0000 - 8);
    // Benign first: the second one is delivered by itself.
    let mut rig = Rig::new();
    rig.gate(6, STUBS, 0, 0x0e);
    let e = rig.fault(|a| a.ud2());
    assert_eq!((e.vector, e.error, e.rip), (11, Some(6 * 8 + 3), CODE));
}

#[test]
fn triple_fault_tells_its_story() {
    let mut rig = Rig::new();
    rig.code(CODE, |a| a.mov(al, byte_ptr(0x7000_0000)));
    rig.change(|s| s.idtr.limit = 0);
    let Exit::Shutdown(story) = rig.run() else { panic!() };
    assert_eq!(
        story,
        "Triple fault: #PF(0x0) at 0x70000000, then #GP(0x73), then #DF(0x0), then #GP(0x43); RIP 0x100000, CS 0x10, \
         RSP 0x200000, CR3 0x1000, IDT 0x3000+0x0"
    );
}

#[test]
fn single_step() {
    let mut rig = Rig::new();
    // The handler notes each address; the program ends at the eighth.
    rig.code(CODE, |a| {
        let mut done = a.create_label();
        a.mov(r9, qword_ptr(rsp))?;
        a.mov(qword_ptr(r8 * 8 + DATA as i32), r9)?;
        a.inc(r8)?;
        a.cmp(r8, 8)?;
        a.je(done)?;
        a.iretq()?;
        a.set_label(&mut done)?;
        a.hlt()
    });
    rig.gate(1, CODE, 0, 0x8e);
    let target = USER_CODE as u32 + 4096;
    rig.code(USER_CODE, |a| {
        let mut far = a.create_label();
        // The first call makes the target known to the jump cache.
        a.mov(eax, target)?;
        a.call(rax)?;
        a.push(0x102)?;
        a.popfq()?;
        // The trap comes after the instruction that follows the one that set TF.
        a.nop()?;
        a.mov(ebx, 5)?;
        a.jmp(far)?;
        a.ud2()?;
        a.set_label(&mut far)?;
        a.inc(ebx)?;
        a.mov(eax, target)?;
        a.call(rax)?;
        a.ud2()
    });
    rig.code(USER_CODE + 4096, |a| {
        a.nop()?;
        a.ret()
    });
    rig.enter_user();
    assert_eq!(rig.run(), Exit::Halt);
    let seen: Vec<u64> = (0..8).map(|i| rig.read::<u64>(DATA + i * 8).wrapping_sub(USER_CODE)).collect();
    assert_eq!(seen, [14, 19, 23, 25, 30, 4096, 4097, 32]);
    assert_eq!(rig.cpu.state().dr6, 0xffff_4ff0);
}

#[test]
fn privileged_access_of_a_user_interrupt_is_the_supervisors() {
    let mut rig = Rig::new();
    // RSP0 lies in a page that the user may not touch; nor the GDT, the IDT, the TSS.
    let e = rig.user_fault(|a| a.cli());
    assert_eq!((e.vector, e.error, e.rip), (13, Some(0), USER_CODE));
    // A TSS too short for RSP0.
    rig.change(|s| s.tr.limit = 8);
    rig.gate(10, STUBS + 160, 0, 0x8e);
    rig.enter_user();
    let Exit::Shutdown(story) = rig.run() else { panic!() };
    assert!(
        story.starts_with("Triple fault: #GP(0x0), then #TS(0x41), then #DF(0x0), then #TS(0x41)"),
        "{story}"
    );
}

/// A small generator of test bytes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Runs random bytes in both rings, with handlers that step over what faults: whatever a guest does, the CPU comes
/// back, in a state that it would accept again.
#[test]
fn random_code_does_no_harm() {
    let rounds: u64 =
        std::env::var("AMBER_X86_RANDOM_ROUNDS").ok().and_then(|v| v.parse().ok()).unwrap_or(60);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..rounds {
        let mut rig = Rig::new();
        rig.code(DATA, |a| {
            a.inc(qword_ptr(rsp))?;
            a.iretq()
        });
        rig.code(DATA + 64, |a| {
            a.add(rsp, 8)?;
            a.inc(qword_ptr(rsp))?;
            a.iretq()
        });
        for v in 0..=255u8 {
            let with_error = matches!(v, 8 | 10..=14 | 17);
            rig.gate(v, if with_error { DATA + 64 } else { DATA }, u64::from(v == 8), 0xee);
        }
        for page in [CODE, USER_CODE] {
            for i in 0..1024 {
                // Half of it with prefixes and opcodes that are often valid.
                let v = random.next();
                let v = if v & 1 == 0 { v } else { v & 0x3f48_0f48_8b3f_483f };
                rig.write(page + i * 8, v);
            }
        }
        for page in [STACK - 4096, USER_STACK - 4096, DATA + 0x1000] {
            for i in 0..512 {
                let v = random.next();
                rig.write(
                    page + i * 8,
                    [v, CODE + (v & 0xfff), USER_STACK - (v & 0xfff)][(v >> 60) as usize % 3],
                );
            }
        }
        // Somewhere anything may be mapped: tables, devices, what does not exist.
        let wild = 0x7000_0000_0000;
        for i in 0..512 {
            let v = random.next();
            let pa = [v & 0x7f_f000, DEVICE, HIGH + (v & 0x1f_f000), v & !0xfff][(v >> 60) as usize & 3];
            rig.map(wild + i * 4096, pa, v & 0x17f | P);
        }
        if round % 2 == 0 {
            rig.enter_user();
        }
        rig.change(|s| {
            for (i, r) in s.gpr.iter_mut().enumerate().filter(|(i, _)| *i != 4) {
                let v = random.next();
                *r = [
                    v,
                    DATA + 0x1000 + (v & 0xfff),
                    USER_STACK - (v & 0xfff),
                    v & 0xff,
                    wild + (v & 0x1f_ffff),
                ][(v >> 60) as usize % 5];
                *r = if i % 4 == 1 { *r & 0xffff } else { *r };
            }
        });
        let exit = rig.cpu.run(&mut rig.bus, 30_000);
        let state = rig.cpu.state();
        match exit {
            Exit::RamFault(reason) => panic!("round {round}: {reason}"),
            Exit::Halt | Exit::Kicked | Exit::Shutdown(_) => {}
        }
        // An address that is not canonical is found out when it is fetched from.
        let fits = rig.cpu.set_state(&state);
        assert!(
            matches!(fits, Ok(()) | Err(crate::state::StateError::Register("RIP", _))),
            "round {round}: {fits:?}"
        );
    }
}
