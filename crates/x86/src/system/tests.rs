//! Control registers, MSRs, segments, flags, ports and the small system instructions.

use iced_x86::code_asm::*;

use super::rig::*;
use super::{cr0, cr4, efer, msr};
use crate::cpu::seg;
use crate::flags::bit;

type Asm<'a> = &'a mut CodeAssembler;
type Result = std::result::Result<(), iced_x86::IcedError>;
type Case = (&'static str, fn(Asm<'_>) -> Result);

/// (vector, error) of kernel code that must fault at its last instruction.
fn fault(rig: &mut Rig, f: impl FnOnce(Asm<'_>) -> Result) -> (u8, Option<u64>) {
    rig.change(|s| s.gpr[4] = STACK);
    let e = rig.fault(f);
    (e.vector, e.error)
}

const GP0: (u8, Option<u64>) = (13, Some(0));
const UD: (u8, Option<u64>) = (6, None);

#[test]
fn control_registers() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.mov(rax, cr0)?;
        a.mov(rbx, cr3)?;
        a.mov(rcx, cr4)?;
        a.mov(edx, 0x123)?;
        a.mov(cr2, rdx)?;
        a.mov(rdx, cr2)?;
        a.mov(esi, 7)?;
        a.mov(cr8, rsi)?;
        a.mov(rdi, cr8)
    });
    let s = rig.cpu.state();
    assert_eq!((rig.gpr(0), rig.gpr(3), rig.gpr(1)), (s.cr0, PML4, s.cr4));
    assert_eq!((rig.gpr(2), rig.gpr(7), rig.bus.priority), (0x123, 7, 7));
    // What may be set, all at once.
    rig.run_kernel(|a| {
        a.mov(rax, cr4::OFFERED)?;
        a.mov(cr4, rax)?;
        a.mov(rbx, cr4)?;
        a.mov(rax, s.cr0 | cr0::TS | 1 << 18 | 1 << 5 | 2)?;
        a.mov(cr0, rax)?;
        a.mov(rcx, cr0)?;
        a.clts()?;
        a.smsw(edx)
    });
    assert_eq!((rig.gpr(3), rig.gpr(1)), (cr4::OFFERED, rig.gpr(0)));
    assert_eq!(rig.gpr(2), (rig.gpr(0) & !cr0::TS) & 0xffff_ffff);

    let cr4_now = rig.cpu.state().cr4;
    for bit in (0..64).filter(|b| cr4::OFFERED >> b & 1 == 0) {
        assert_eq!(
            fault(&mut rig, |a| {
                a.mov(rax, cr4_now | 1 << bit)?;
                a.mov(cr4, rax)
            }),
            GP0,
            "CR4 bit {bit}"
        );
    }
    let cr0_now = rig.cpu.state().cr0;
    for v in [cr0_now & !cr0::PG, cr0_now & !cr0::PE & !cr0::PG, cr0_now | cr0::NW, cr0_now | 1 << 32] {
        assert_eq!(
            fault(&mut rig, |a| {
                a.mov(rax, v)?;
                a.mov(cr0, rax)
            }),
            GP0
        );
    }
    assert_eq!(
        fault(&mut rig, |a| {
            a.mov(rax, cr4_now & !cr4::PAE)?;
            a.mov(cr4, rax)
        }),
        GP0
    );
    assert_eq!(
        fault(&mut rig, |a| {
            a.mov(rax, 1u64 << 40)?;
            a.mov(cr3, rax)
        }),
        GP0
    );
    assert_eq!(
        fault(&mut rig, |a| {
            a.mov(eax, 16)?;
            a.mov(cr8, rax)
        }),
        GP0
    );
    assert_eq!(fault(&mut rig, |a| a.mov(rax, cr1)), UD);
    let s = rig.cpu.state();
    assert_eq!((s.cr0, s.cr4, s.cr3), (cr0_now, cr4_now, PML4));
}

#[test]
fn debug_registers() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.mov(eax, 0x1234)?;
        a.mov(dr0, rax)?;
        a.mov(dr3, rax)?;
        a.mov(ecx, 0xffff_ffffu32)?;
        a.mov(dr6, rcx)?;
        a.mov(rbx, dr6)?;
        a.xor(ecx, ecx)?;
        a.mov(dr7, rcx)?;
        a.mov(rdx, dr7)?;
        a.mov(rsi, dr0)?;
        a.mov(rdi, dr4)
    });
    assert_eq!((rig.gpr(3), rig.gpr(2), rig.gpr(6), rig.gpr(7)), (0xffff_efff, 0x400, 0x1234, 0xffff_efff));
    rig.change(|s| s.cr4 |= cr4::DE);
    assert_eq!(fault(&mut rig, |a| a.mov(rdi, dr5)), UD);
    assert_eq!(
        fault(&mut rig, |a| {
            a.mov(rax, 1u64 << 32)?;
            a.mov(dr7, rax)
        }),
        GP0
    );
    // General detect: the access traps once.
    let e = rig.fault(|a| {
        a.mov(eax, 0x2400)?;
        a.mov(dr7, rax)?;
        a.mov(rbx, dr0)
    });
    assert_eq!(e.vector, 1);
    let s = rig.cpu.state();
    assert_eq!((s.dr6 >> 13 & 1, s.dr7), (1, 0x400));
}

#[test]
fn model_specific_registers() {
    let mut rig = Rig::new();
    rig.bus.msrs.insert(0x4b56_4d00, 5);
    rig.bus.tsc = 0x1_2345_6789;
    let held = [
        (msr::STAR, 0x0023_0010_0000_0000),
        (msr::LSTAR, 0xffff_ffff_8000_0000),
        (msr::CSTAR, 0x1000),
        (msr::SFMASK, 0x4_7700),
        (msr::FS_BASE, 0x7fff_1234_5678),
        (msr::GS_BASE, 0xffff_8880_0000_0000),
        (msr::KERNEL_GS_BASE, 0x7fff_0000_0000),
        (msr::TSC_AUX, 3),
        (msr::SYSENTER_CS, 0x10),
        (msr::SYSENTER_ESP, 0x2000),
        (msr::SYSENTER_EIP, 0x3000),
        (msr::PAT, 0x0007_0406_0007_0406),
        (0x4b56_4d00, 0x77),
    ];
    for (index, v) in held {
        rig.run_kernel(|a| {
            a.mov(rax, v)?;
            a.mov(rdx, v >> 32)?;
            a.mov(ecx, index)?;
            a.wrmsr()?;
            a.mov(rax, -1i64)?;
            a.mov(rdx, -1i64)?;
            a.rdmsr()
        });
        assert_eq!((rig.gpr(0), rig.gpr(2)), (v & 0xffff_ffff, v >> 32), "{index:#x}");
    }
    rig.run_kernel(|a| {
        a.mov(ecx, 0x10)?;
        a.rdmsr()?;
        a.mov(rsi, rax)?;
        a.rdtscp()
    });
    assert_eq!((rig.gpr(6), rig.gpr(0), rig.gpr(2), rig.gpr(1)), (0x2345_6789, 0x2345_6789, 1, 3));
    for (index, v) in [
        (msr::LSTAR, 1u64 << 47),
        (msr::FS_BASE, 1 << 47),
        (msr::GS_BASE, 1 << 47),
        (msr::KERNEL_GS_BASE, 1 << 47),
        (msr::TSC_AUX, 1 << 32),
        (msr::PAT, 2),
        (msr::EFER, efer::LMA | efer::NXE),
        (msr::EFER, efer::LME | efer::LMA | 1 << 14),
        (0x1234, 0),
    ] {
        let got = fault(&mut rig, |a| {
            a.mov(rax, v)?;
            a.mov(rdx, v >> 32)?;
            a.mov(ecx, index)?;
            a.wrmsr()
        });
        assert_eq!(got, GP0, "{index:#x}");
    }
    assert_eq!(
        fault(&mut rig, |a| {
            a.mov(ecx, 0x1234)?;
            a.rdmsr()
        }),
        GP0
    );
    // LMA cannot be changed by writing it.
    rig.run_kernel(|a| {
        a.mov(ecx, msr::EFER)?;
        a.mov(eax, (efer::LME | efer::NXE) as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.rdmsr()
    });
    assert_eq!(rig.gpr(0), efer::LME | efer::LMA | efer::NXE);
}

#[test]
fn ring_3_may_not() {
    let mut rig = Rig::new();
    let all: [Case; 19] = [
        ("hlt", |a| a.hlt()),
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("clts", |a| a.clts()),
        ("mov cr3", |a| a.mov(cr3, rax)),
        ("mov from cr0", |a| a.mov(rax, cr0)),
        ("mov from dr7", |a| a.mov(rax, dr7)),
        ("rdmsr", |a| a.rdmsr()),
        ("wrmsr", |a| a.wrmsr()),
        ("lgdt", |a| a.lgdt(ptr(USER_STACK as i32 - 64))),
        ("lidt", |a| a.lidt(ptr(USER_STACK as i32 - 64))),
        ("lldt", |a| a.lldt(ax)),
        ("ltr", |a| a.ltr(ax)),
        ("lmsw", |a| a.lmsw(ax)),
        ("invlpg", |a| a.invlpg(byte_ptr(rsp))),
        ("wbinvd", |a| a.wbinvd()),
        ("swapgs", |a| a.swapgs()),
        ("in", |a| a.in_(al, dx)),
        ("rdpmc", |a| a.rdpmc()),
    ];
    for (name, f) in all {
        let e = rig.user_fault(f);
        assert_eq!((e.vector, e.error, e.rip, e.cs), (13, Some(0), USER_CODE, USER_CS), "{name}");
    }
    // Not implemented, in either ring.
    let all: [Case; 6] = [
        ("xgetbv", |a| a.xgetbv()),
        ("monitor", |a| a.monitor()),
        ("mwait", |a| a.mwait()),
        ("vmcall", |a| a.vmcall()),
        ("invpcid", |a| a.invpcid(rax, xmmword_ptr(rsp))),
        ("stac", |a| a.stac()),
    ];
    for (name, f) in all {
        assert_eq!(rig.user_fault(f).vector, 6, "{name}");
        assert_eq!(rig.fault(f).vector, 6, "{name}");
        assert_eq!(rig.cpu.diagnostics().unimplemented.get(name), Some(&2), "{name}");
    }
}

#[test]
fn time_stamp_disable() {
    let mut rig = Rig::new();
    rig.bus.tsc = 5;
    rig.change(|s| s.cr4 |= cr4::TSD);
    let e = rig.user_fault(|a| a.rdtsc());
    assert_eq!((e.vector, e.error), (13, Some(0)));
    rig.run_kernel(|a| a.rdtsc());
    assert_eq!((rig.gpr(0), rig.gpr(2)), (5, 0));
}

#[test]
fn flags_on_the_stack() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.push(0x24_4ed7)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.push(2)?;
        a.popfq()?;
        // 16 bits: the upper half stays.
        a.push(0x20_0002)?;
        a.popfq()?;
        a.sub(rsp, 2)?;
        a.mov(word_ptr(rsp), 0x8d7)?;
        a.popf()?;
        a.pushf()?;
        a.movzx(ecx, word_ptr(rsp))?;
        a.add(rsp, 2)?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.push(2)?;
        a.popfq()
    });
    assert_eq!(rig.gpr(3), 0x24_4ed7);
    assert_eq!(rig.gpr(1), 0x8d7);
    assert_eq!(rig.gpr(2) & bit::ID, bit::ID);
    // Ring 3, IOPL 0: IF and IOPL stay.
    rig.change(|s| s.rflags |= bit::IF);
    let e = rig.user_fault(|a| {
        a.push(0x3002)?;
        a.popfq()?;
        a.ud2()
    });
    assert_eq!(e.flags & (bit::IF | bit::IOPL), bit::IF);
    // IOPL 3: CLI is allowed, and POPF changes IF.
    rig.change(|s| s.rflags |= bit::IOPL | bit::IF);
    let e = rig.user_fault(|a| {
        a.cli()?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.push(0x202)?;
        a.popfq()?;
        a.ud2()
    });
    assert_eq!(rig.gpr(3) & bit::IF, 0);
    assert_eq!(e.flags & (bit::IF | bit::IOPL), bit::IF | bit::IOPL);
}

#[test]
fn segment_registers() {
    let mut rig = Rig::new();
    // A data segment with a base, in GDT and LDT.
    rig.write(GDT + 0x38, 0x1240_f234_5678_ffffu64);
    rig.write(GDT + 0x800 + 8, 0x0040_f200_1000_0fffu64);
    rig.run_kernel(|a| {
        a.mov(eax, i32::from(LDT))?;
        a.lldt(ax)?;
        a.sldt(ebx)?;
        a.mov(eax, 0x3b)?;
        a.mov(fs, eax)?;
        a.mov(ecx, fs)?;
        a.push(0xf)?;
        a.pop(gs)?;
        a.push(gs)?;
        a.pop(rdx)?;
        a.str(esi)?;
        a.mov(word_ptr(DATA), fs)
    });
    assert_eq!([3, 1, 2, 6].map(|n| rig.gpr(n)), [u64::from(LDT), 0x3b, 0xf, u64::from(TSS)]);
    assert_eq!(rig.read::<u32>(DATA), 0x3b);
    let s = rig.cpu.state();
    assert_eq!((s.segments[seg::FS].base, s.segments[seg::FS].attributes), (0x1234_5678, 0x40f3));
    assert_eq!((s.segments[seg::GS].base, s.segments[seg::GS].limit), (0x1000, 0xfff));
    assert_eq!((s.ldtr.selector, s.ldtr.base, s.ldtr.limit), (LDT, GDT + 0x800, 15));
    // Loading marks the descriptor accessed.
    assert_eq!(rig.read::<u64>(GDT + 0x38), 0x1240_f334_5678_ffff);
    // A null selector clears the base.
    rig.run_kernel(|a| {
        a.xor(eax, eax)?;
        a.mov(fs, eax)
    });
    assert_eq!(rig.cpu.state().segments[seg::FS].base, 0);

    let load_ds = |v: u32| {
        move |a: Asm<'_>| {
            a.mov(eax, v)?;
            a.mov(ds, eax)
        }
    };
    let load_ss = |v: u32| {
        move |a: Asm<'_>| {
            a.mov(eax, v)?;
            a.mov(ss, eax)
        }
    };
    assert_eq!(fault(&mut rig, load_ds(0x60)), (13, Some(0x60)));
    assert_eq!(fault(&mut rig, load_ds(0x40)), (13, Some(0x40)));
    assert_eq!(fault(&mut rig, load_ds(0x14)), (13, Some(0x14)));
    rig.write(GDT + 0x38, 0x1240_7234_5678_ffffu64);
    assert_eq!(fault(&mut rig, load_ds(0x38)), (11, Some(0x38)));
    assert_eq!(fault(&mut rig, load_ss(0x2b)), (13, Some(0x28)));
    assert_eq!(fault(&mut rig, load_ss(0x10)), (13, Some(0x10)));
    rig.run_kernel(load_ss(0));
    rig.run_kernel(load_ss(0x18));
    assert_eq!(fault(&mut rig, |a| a.db(&[0x8e, 0xc8])), UD);
    // Ring 3 may load what has its DPL only.
    let e = rig.user_fault(load_ds(u32::from(KERNEL_DS)));
    assert_eq!((e.vector, e.error), (13, Some(u64::from(KERNEL_DS))));
    let e = rig.user_fault(|a| {
        a.mov(eax, u32::from(USER_DS))?;
        a.mov(ds, eax)?;
        a.ud2()
    });
    assert_eq!(e.vector, 6);
}

#[test]
fn task_register() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.mov(eax, u32::from(TSS))?;
        a.ltr(ax)
    });
    // Busy in the table now, and so not to be loaded again.
    assert_eq!(rig.read::<u8>(GDT + 0x45), 0x8b);
    assert_eq!(rig.cpu.state().tr.attributes, 0x8b);
    let ltr = |v: u32| {
        move |a: Asm<'_>| {
            a.mov(eax, v)?;
            a.ltr(ax)
        }
    };
    assert_eq!(fault(&mut rig, ltr(u32::from(TSS))), (13, Some(u64::from(TSS))));
    assert_eq!(fault(&mut rig, ltr(0)), GP0);
    assert_eq!(fault(&mut rig, ltr(0x58)), (13, Some(0x58)));
    assert_eq!(fault(&mut rig, ltr(0x44)), (13, Some(0x44)));
    rig.write(GDT + 0x45, 0x09u8);
    assert_eq!(fault(&mut rig, ltr(u32::from(TSS))), (11, Some(u64::from(TSS))));
}

#[test]
fn descriptor_tables() {
    let mut rig = Rig::new();
    rig.write(DATA, 0x1fu16);
    rig.write(DATA + 2, GDT);
    rig.run_kernel(|a| {
        a.sgdt(ptr(DATA as i32 + 0x20))?;
        a.sidt(ptr(DATA as i32 + 0x30))?;
        a.lgdt(ptr(DATA as i32))
    });
    assert_eq!((rig.read::<u16>(DATA + 0x20), rig.read::<u64>(DATA + 0x22)), (0x5f, GDT));
    assert_eq!((rig.read::<u16>(DATA + 0x30), rig.read::<u64>(DATA + 0x32)), (0xfff, IDT));
    assert_eq!(rig.cpu.state().gdtr.limit, 0x1f);
    rig.write(DATA + 2, 1u64 << 47);
    assert_eq!(fault(&mut rig, |a| a.lidt(ptr(DATA as i32))), GP0);
}

#[test]
fn questions_about_descriptors() {
    let mut rig = Rig::new();
    let mut ask = |selector: u16| {
        rig.run_kernel(|a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(ebx, -1)?;
            a.mov(ecx, -1)?;
            a.verr(ax)?;
            a.setz(dl)?;
            a.verw(ax)?;
            a.setz(dh)?;
            a.lar(ebx, eax)?;
            a.lsl(ecx, eax)?;
            a.setz(sil)
        });
        let ok = [rig.gpr(2) & 1, rig.gpr(2) >> 8 & 1, rig.gpr(6) & 1].map(|v| v != 0);
        (ok, rig.gpr(3), rig.gpr(1))
    };
    assert_eq!(ask(KERNEL_CS), ([true, false, true], 0x00a0_9b00, 0xffff_ffff));
    assert_eq!(ask(USER_DS), ([true, true, true], 0x00c0_f300, 0xffff_ffff));
    assert_eq!(ask(TSS), ([false, false, true], 0x8900, 0x67));
    assert_eq!(ask(0), ([false, false, false], 0xffff_ffff, 0xffff_ffff));
    assert_eq!(ask(0x60), ([false, false, false], 0xffff_ffff, 0xffff_ffff));
    // Linux reads the CPU number from a segment's limit, in ring 3.
    let e = rig.user_fault(|a| {
        a.mov(eax, u32::from(KERNEL_DS))?;
        a.lsl(ebx, eax)?;
        a.setz(dl)?;
        a.ud2()
    });
    assert_eq!((e.vector, rig.gpr(2) & 1), (6, 0));
}

#[test]
fn segment_bases() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.mov(rax, 0x7fff_0000_1000u64)?;
        a.wrfsbase(rax)?;
        a.rdfsbase(rbx)?;
        a.rdfsbase(ecx)?;
        a.mov(eax, 0x8765_4321u32)?;
        a.wrgsbase(eax)?;
        a.swapgs()?;
        a.rdgsbase(rdx)?;
        a.swapgs()?;
        a.rdgsbase(rsi)
    });
    assert_eq!([3, 1, 2, 6].map(|n| rig.gpr(n)), [0x7fff_0000_1000, 0x1000, 0, 0x8765_4321]);
    assert_eq!(
        fault(&mut rig, |a| {
            a.mov(rax, 1u64 << 47)?;
            a.wrgsbase(rax)
        }),
        GP0
    );
    rig.change(|s| s.cr4 &= !cr4::FSGSBASE);
    assert_eq!(fault(&mut rig, |a| a.rdfsbase(rax)), UD);
}

#[test]
fn ports() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.mov(rax, -1i64)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.mov(rbx, rax)?;
        a.in_(eax, 0x71)?;
        a.mov(ecx, eax)?;
        a.mov(eax, 0x1234_5678)?;
        a.out(dx, ax)?;
        a.out(0x80, al)
    });
    assert_eq!((rig.gpr(3), rig.gpr(1)), (0xffff_ffff_ffff_ff5a, 0x5a5a_5a5a));
    assert_eq!(
        rig.bus.ports,
        [(0x3f8, 1, None), (0x71, 4, None), (0x3f8, 2, Some(0x5678)), (0x80, 1, Some(0x78))]
    );
    rig.bus.ports.clear();
    // Strings, the second one running into a page that is not there.
    rig.write(DATA, 0x4433_2211u32);
    rig.run_kernel(|a| {
        a.mov(edx, 0x10)?;
        a.mov(esi, DATA as u32)?;
        a.mov(ecx, 2)?;
        a.rep().outsw()?;
        a.mov(edi, DATA as u32 + 16)?;
        a.insb()
    });
    assert_eq!((rig.gpr(6), rig.gpr(1), rig.gpr(7)), (DATA + 4, 0, DATA + 17));
    assert_eq!(rig.read::<u16>(DATA + 16), 0x5a);
    assert_eq!(rig.bus.ports, [(0x10, 2, Some(0x2211)), (0x10, 2, Some(0x4433)), (0x10, 1, None)]);
    rig.bus.ports.clear();
    rig.map(DATA + 4096, 0, 0);
    let e = rig.fault(|a| {
        a.mov(edi, DATA as u32 + 4094)?;
        a.mov(ecx, 5)?;
        a.rep().insb()
    });
    rig.assert_page_fault(&e, WRITE, DATA + 4096);
    assert_eq!((rig.gpr(7), rig.gpr(1), rig.bus.ports.len()), (DATA + 4096, 3, 2));
}

#[test]
fn port_permissions() {
    let mut rig = Rig::new();
    let input = |port: u32| {
        move |a: Asm<'_>| {
            a.mov(edx, port)?;
            a.in_(ax, dx)?;
            a.ud2()
        }
    };
    // Ports 8 to 15 are open, the map ends after 0x20.
    rig.change(|s| s.tr.limit = 0x6c);
    rig.write(TSS_BASE + 0x68, 0xffff_00ffu32);
    rig.write(TSS_BASE + 0x6c, 0xffu8);
    for (port, vector) in [(7, 13), (8, 6), (14, 6), (15, 13), (0x20, 13), (0x3f8, 13)] {
        assert_eq!(rig.user_fault(input(port)).vector, vector, "port {port:#x}");
    }
    rig.change(|s| s.rflags |= bit::IOPL);
    assert_eq!(rig.user_fault(input(0x3f8)).vector, 6);
}

#[test]
fn identification_and_random_numbers() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| {
        a.mov(eax, 7)?;
        a.mov(ecx, 1)?;
        a.cpuid()
    });
    assert_eq!([0, 3, 1, 2].map(|n| rig.gpr(n)), [7, 1, 0x1234, 0x5678]);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        rig.run_kernel(|a| {
            a.mov(rbx, -1i64)?;
            a.rdrand(rax)?;
            a.setc(cl)?;
            a.rdrand(bx)?;
            a.rdseed(edx)
        });
        assert_eq!((rig.gpr(1) & 1, rig.gpr(3) >> 16, rig.gpr(2) >> 32), (1, 0xffff_ffff_ffff, 0));
        seen.insert(rig.gpr(0));
    }
    assert_eq!(seen.len(), 40);
}
