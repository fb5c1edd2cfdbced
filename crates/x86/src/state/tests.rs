//! Round trips of the state, and states that no CPU could have.

use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::{CpuState, SegmentState, StateError};
use crate::cpu::{Exit, seg};
use crate::flags::bit;
use crate::system::rig::*;
use crate::system::{cr0, cr4, efer, msr};

fn set_msr(s: &mut CpuState, index: u32, v: u64) {
    for m in &mut s.msrs {
        if m.0 == index {
            m.1 = v;
        }
    }
}

fn get_msr(s: &CpuState, index: u32) -> u64 {
    s.msrs.iter().find(|m| m.0 == index).map(|m| m.1).unwrap()
}

/// A state in which every field differs from its default.
fn rich(rig: &Rig) -> CpuState {
    let mut s = rig.cpu.state();
    for (i, r) in s.gpr.iter_mut().enumerate() {
        *r = 0x0101_0101_0101_0101 * (i as u64 + 1);
    }
    s.rip = 0xffff_8000_1234_5678;
    s.rflags = 2 | bit::ARITHMETIC | bit::IF | bit::DF | bit::AC | bit::ID | bit::IOPL;
    for i in [seg::ES, seg::DS, seg::FS, seg::GS] {
        s.segments[i] =
            SegmentState { selector: USER_DS, base: 0x1000 * i as u64, limit: 0xfffff, attributes: 0xc0f3 };
    }
    s.ldtr = SegmentState { selector: LDT, base: GDT + 0x800, limit: 15, attributes: 0x82 };
    s.cr0 |= cr0::TS;
    s.cr2 = 0xdead_beef_0000;
    s.cr3 = 0xab_cdef_0018;
    s.cr4 = cr4::OFFERED;
    s.dr = [1, 2, 3, 0xffff_8000_0000_0000];
    s.dr6 = 0xffff_4ff1;
    s.dr7 = 0x401;
    for (i, index) in [
        msr::STAR,
        msr::LSTAR,
        msr::CSTAR,
        msr::SFMASK,
        msr::KERNEL_GS_BASE,
        msr::TSC_AUX,
        msr::SYSENTER_CS,
        msr::SYSENTER_ESP,
        msr::SYSENTER_EIP,
        msr::MISC_ENABLE,
    ]
    .into_iter()
    .enumerate()
    {
        set_msr(&mut s, index, 0x1000 + i as u64);
    }
    set_msr(&mut s, msr::PAT, 0x0007_0406_0105_0406);
    for (i, b) in s.fxsave[160..416].iter_mut().enumerate() {
        *b = i as u8;
    }
    s.fxsave[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
    s.interrupt_shadow = true;
    s
}

#[test]
fn everything_survives() {
    let mut rig = Rig::new();
    for halted in [false, true] {
        let mut s = rich(&rig);
        s.halted = halted;
        rig.cpu.set_state(&s).unwrap();
        assert_eq!(rig.cpu.state(), s);
    }
    let mut other = Rig::new();
    let s = rich(&rig);
    other.cpu.set_state(&s).unwrap();
    assert_eq!(other.cpu.state(), s);
    assert!(s.msrs.is_sorted_by_key(|m| m.0));
    assert_eq!(get_msr(&s, msr::EFER), efer::SCE | efer::LME | efer::LMA | efer::NXE);
}

#[test]
fn a_program_goes_on_in_another_cpu() {
    let program = |a: &mut CodeAssembler| {
        let mut l = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut l)?;
        a.add(rax, rcx)?;
        a.mov(qword_ptr(rcx * 8 + DATA as i32), rax)?;
        a.rol(rax, 3)?;
        a.dec(ecx)?;
        a.jne(l)?;
        a.hlt()
    };
    let mut whole = Rig::new();
    whole.code(CODE, program);
    assert_eq!(whole.run(), Exit::Halt);

    let mut rig = Rig::new();
    rig.code(CODE, program);
    let mut moves = 0;
    loop {
        let exit = rig.cpu.run(&mut rig.bus, 137);
        if exit == Exit::Halt {
            break;
        }
        assert_eq!(exit, Exit::Kicked);
        // The same RAM under a new CPU.
        let state = rig.cpu.state();
        rig.cpu.invalidate_all_code();
        rig.cpu = crate::Cpu::new(rig.ram.clone());
        rig.cpu.set_state(&state).unwrap();
        moves += 1;
    }
    assert!(moves > 10);
    assert_eq!(rig.cpu.state(), whole.cpu.state());
    for i in 1..=1000 {
        assert_eq!(rig.read::<u64>(DATA + i * 8), whole.read::<u64>(DATA + i * 8));
    }
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let mut rig = Rig::new();
    let good = rich(&rig);
    rig.cpu.set_state(&good).unwrap();
    type Break = fn(&mut CpuState);
    let bad: [(&str, Break); 30] = [
        ("RIP", |s| s.rip = 1 << 47),
        ("RFLAGS", |s| s.rflags |= bit::VM),
        ("RFLAGS", |s| s.rflags = 0),
        ("CR0", |s| s.cr0 |= 1 << 32),
        ("CR0", |s| s.cr0 |= 1 << 6),
        ("CR0 without PE and PG", |s| s.cr0 &= !cr0::PG),
        ("CR0 without PE and PG", |s| s.cr0 &= !cr0::PE),
        ("CR0", |s| s.cr0 |= cr0::NW),
        ("CR3", |s| s.cr3 = 1 << 40),
        ("CR4", |s| s.cr4 &= !cr4::PAE),
        ("CR4", |s| s.cr4 |= 1 << 18),
        ("CR4", |s| s.cr4 |= 1 << 17),
        ("EFER", |s| set_msr(s, msr::EFER, efer::LME)),
        ("EFER", |s| set_msr(s, msr::EFER, efer::LMA)),
        ("EFER", |s| set_msr(s, msr::EFER, efer::LME | efer::LMA | 1 << 14)),
        ("LSTAR", |s| set_msr(s, msr::LSTAR, 1 << 63)),
        ("KERNEL_GS_BASE", |s| set_msr(s, msr::KERNEL_GS_BASE, 1 << 63)),
        ("TSC_AUX", |s| set_msr(s, msr::TSC_AUX, 1 << 32)),
        ("PAT", |s| set_msr(s, msr::PAT, 2)),
        ("DR0", |s| s.dr[0] = 1 << 50),
        ("DR7", |s| s.dr7 = 1 << 32),
        ("CS's access rights", |s| s.segments[seg::CS].attributes = 0xc09b),
        ("CS's access rights", |s| s.segments[seg::CS].attributes = 0xa01b),
        ("CS's access rights", |s| s.segments[seg::CS].attributes = 0xa093),
        ("CS's privilege level", |s| s.segments[seg::CS].selector |= 3),
        ("SS's privilege level", |s| s.segments[seg::SS].selector |= 3),
        ("GS.base", |s| s.segments[seg::GS].base = 1 << 48),
        ("TR.base", |s| s.tr.base = 1 << 48),
        ("IDTR.base", |s| s.idtr.base = 1 << 48),
        ("MXCSR", |s| s.fxsave[26] = 1),
    ];
    for (name, f) in bad {
        let mut s = good.clone();
        s.gpr[0] = 99;
        f(&mut s);
        match rig.cpu.set_state(&s) {
            Err(StateError::Register(register, _)) => assert_eq!(register, name),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(rig.cpu.state(), good);
    }
    let mut s = good.clone();
    s.fxsave.push(0);
    assert_eq!(rig.cpu.set_state(&s), Err(StateError::FxsaveLength(513)));
    let mut s = good.clone();
    s.msrs.push((0x1b, 0));
    assert_eq!(rig.cpu.set_state(&s), Err(StateError::UnknownMsr(0x1b)));
    assert_eq!(rig.cpu.state(), good);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is accepted is what is read back, and can run.
    #[test]
    fn accepted_states_are_kept(
        gpr in any::<[u64; 16]>(),
        rip in any::<u64>(),
        rflags in any::<u64>(),
        bits in any::<[u64; 4]>(),
        selectors in any::<[u16; 6]>(),
        attributes in any::<[u16; 6]>(),
        bases in any::<[u64; 10]>(),
        fxsave in proptest::collection::vec(any::<u8>(), 512),
        harmless in any::<bool>(),
    ) {
        let mut rig = Rig::new();
        let mut s = rig.cpu.state();
        s.gpr = gpr;
        s.rip = if harmless { rip >> 17 } else { rip };
        s.rflags = if harmless { rflags & 0x0024_4fd5 | 2 } else { rflags };
        if !harmless {
            s.cr0 = bits[0];
            s.cr4 = bits[1];
        }
        s.cr3 = if harmless { bits[2] & 0x7f_ffff } else { bits[2] };
        for i in 0..6 {
            if !harmless || i != seg::CS && i != seg::SS {
                s.segments[i].selector = selectors[i];
                s.segments[i].attributes = attributes[i];
            }
            s.segments[i].base = if harmless { bases[i] >> 17 } else { bases[i] };
        }
        s.gdtr.base = if harmless { bases[6] >> 17 } else { bases[6] };
        s.idtr.base = if harmless { bases[7] >> 17 } else { bases[7] };
        s.tr.base = if harmless { bases[8] >> 17 } else { bases[8] };
        s.ldtr.base = if harmless { bases[9] >> 17 } else { bases[9] };
        s.fxsave[160..416].copy_from_slice(&fxsave[160..416]);
        let accepted = rig.cpu.set_state(&s);
        prop_assert!(accepted.is_ok() || !harmless, "{accepted:?}");
        if accepted.is_ok() {
            prop_assert_eq!(&rig.cpu.state(), &s);
            // Nothing is there to run: any exit is fine, as long as it comes.
            let _ = rig.cpu.run(&mut rig.bus, 1000);
        }
    }
}
