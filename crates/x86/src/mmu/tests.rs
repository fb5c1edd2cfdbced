//! Page faults of each kind, A and D, TLB invalidation, large pages, page crossings, MMIO, absent pages, code writes.

use iced_x86::code_asm::*;

use crate::bus::PageFlags;
use crate::cpu::Exit;
use crate::system::rig::*;
use crate::system::{cr0, cr4, efer, msr};

/// An address that the rig does not map; nor its neighbours.
const HOLE: u64 = 0x7000_0000_0000;
const UPPER: u64 = 0xffff_8000_0000_0000;

#[test]
fn page_that_is_not_present() {
    let mut rig = Rig::new();
    let e = rig.fault(|a| {
        a.mov(rax, HOLE + 0x123)?;
        a.mov(rbx, qword_ptr(rax))
    });
    rig.assert_page_fault(&e, 0, HOLE + 0x123);
    assert_eq!(e.rip, CODE + 10);
    assert_eq!((e.cs, e.ss, e.rsp), (KERNEL_CS, KERNEL_DS, STACK));
    let e = rig.fault(|a| {
        a.mov(rax, HOLE)?;
        a.mov(byte_ptr(rax), bl)
    });
    rig.assert_page_fault(&e, WRITE, HOLE);
    let e = rig.user_fault(|a| {
        a.mov(rax, HOLE)?;
        a.add(dword_ptr(rax), ebx)
    });
    rig.assert_page_fault(&e, WRITE | USER, HOLE);
    let e = rig.user_fault(|a| {
        a.mov(rax, HOLE)?;
        a.jmp(rax)
    });
    rig.assert_page_fault(&e, USER | FETCH, HOLE);
    assert_eq!(e.rip, HOLE);
}

#[test]
fn user_and_supervisor() {
    let mut rig = Rig::new();
    let e = rig.user_fault(|a| a.mov(rbx, qword_ptr(DATA)));
    rig.assert_page_fault(&e, PRESENT | USER, DATA);
    let e = rig.user_fault(|a| a.mov(qword_ptr(DATA), rbx));
    rig.assert_page_fault(&e, PRESENT | USER | WRITE, DATA);
    let e = rig.user_fault(|a| {
        a.mov(rax, CODE)?;
        a.jmp(rax)
    });
    rig.assert_page_fault(&e, PRESENT | USER | FETCH, CODE);
    // A page the kernel has just used is no more the user's for that.
    rig.run_kernel(|a| a.mov(qword_ptr(DATA), rbx));
    let e = rig.user_fault(|a| a.mov(rbx, qword_ptr(DATA)));
    rig.assert_page_fault(&e, PRESENT | USER, DATA);
    // U must be set at every level.
    let pde = rig.entry(PML4, USER_STACK, 1);
    let old: u64 = rig.read(pde);
    rig.write(pde, old & !U);
    let e = rig.user_fault(|a| a.push(rax));
    rig.assert_page_fault(&e, PRESENT | USER | FETCH, USER_CODE);
}

#[test]
fn write_protection_and_cr0_wp() {
    let mut rig = Rig::new();
    rig.map(DATA, DATA, P);
    let e = rig.fault(|a| a.mov(dword_ptr(DATA + 8), 1));
    rig.assert_page_fault(&e, PRESENT | WRITE, DATA + 8);
    rig.change(|s| s.cr0 &= !cr0::WP);
    rig.run_kernel(|a| a.mov(dword_ptr(DATA + 8), 7));
    assert_eq!(rig.read::<u32>(DATA + 8), 7);
    assert_eq!(rig.pte(DATA) & (A | D), A | D);
    // Setting WP by MOV CR0 takes effect at once.
    let e = rig.fault(|a| {
        a.mov(dword_ptr(DATA + 8), 8)?;
        a.mov(rax, cr0)?;
        a.bts(rax, 16)?;
        a.mov(cr0, rax)?;
        a.mov(dword_ptr(DATA + 8), 9)
    });
    rig.assert_page_fault(&e, PRESENT | WRITE, DATA + 8);
    assert_eq!(rig.read::<u32>(DATA + 8), 8);
    // A user's write is refused whatever WP says.
    rig.map(USER_STACK - 4096, USER_STACK - 4096, P | U);
    rig.change(|s| s.cr0 &= !cr0::WP);
    let e = rig.user_fault(|a| a.push(rax));
    rig.assert_page_fault(&e, PRESENT | WRITE | USER, USER_STACK - 8);
}

#[test]
fn no_execute() {
    let mut rig = Rig::new();
    rig.code(DATA, |a| a.hlt());
    rig.map(DATA, DATA, P | W | NX);
    let jump = |a: &mut CodeAssembler| {
        a.mov(rax, DATA)?;
        a.jmp(rax)
    };
    let e = rig.fault(jump);
    rig.assert_page_fault(&e, PRESENT | FETCH, DATA);
    rig.run_kernel(|a| a.mov(rbx, qword_ptr(DATA)));
    // Without EFER.NXE the bit is reserved, and I/D is not reported.
    rig.change(|s| s.msrs = vec![(msr::EFER, efer::SCE | efer::LME | efer::LMA)]);
    let e = rig.fault(jump);
    rig.assert_page_fault(&e, PRESENT | RESERVED, DATA);
    let e = rig.fault(|a| a.mov(rbx, qword_ptr(DATA)));
    rig.assert_page_fault(&e, PRESENT | RESERVED, DATA);
}

#[test]
fn reserved_bits() {
    let mut rig = Rig::new();
    rig.map(DATA, DATA, P | W | 1 << 40);
    let e = rig.fault(|a| a.mov(dword_ptr(DATA), 1));
    rig.assert_page_fault(&e, PRESENT | RESERVED | WRITE, DATA);
    // Bits 52 to 62 are free.
    rig.map(DATA, DATA, P | W | 0x7ff << 52);
    rig.run_kernel(|a| a.mov(dword_ptr(DATA), 1));
    // PS: reserved in a PML4E and, without 1 GiB pages, in a PDPTE; bits 13 to 20 below a large page.
    let va = HOLE;
    for level in [3, 2] {
        let at = rig.entry(PML4, va, level);
        rig.write(at, P | W | PS);
        let e = rig.fault(|a| {
            a.mov(rax, va)?;
            a.mov(ebx, dword_ptr(rax))
        });
        rig.assert_page_fault(&e, PRESENT | RESERVED, va);
        rig.write(at, 0u64);
    }
    let at = rig.entry(PML4, va, 1);
    rig.write(at, DATA | 0x2000 | P | W | PS);
    let e = rig.fault(|a| {
        a.mov(rax, va)?;
        a.mov(ebx, dword_ptr(rax))
    });
    rig.assert_page_fault(&e, PRESENT | RESERVED, va);
}

#[test]
fn accessed_and_dirty() {
    let mut rig = Rig::new();
    let levels: Vec<u64> = (1..4).map(|l| rig.entry(PML4, HOLE, l)).collect();
    let pte = rig.entry(PML4, HOLE, 0);
    rig.write(pte, DATA | P | W);
    let table_flags = rig.flags(pte);
    assert_eq!(table_flags & PageFlags::DIRTY, 0);
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        a.mov(ebx, dword_ptr(rax))
    });
    for at in levels {
        assert_eq!(rig.read::<u64>(at) & (A | D), A);
    }
    assert_eq!(rig.read::<u64>(pte) & (A | D), A);
    assert_eq!(rig.flags(pte) & PageFlags::DIRTY, PageFlags::DIRTY);
    // D is set by the first write even when the translation is cached for reading.
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        a.mov(ebx, dword_ptr(rax))?;
        a.mov(dword_ptr(rax), ebx)
    });
    assert_eq!(rig.read::<u64>(pte) & (A | D), A | D);
    // A refused access sets neither in the leaf.
    rig.write(pte, DATA | P);
    rig.fault(|a| {
        a.mov(rax, HOLE)?;
        a.mov(dword_ptr(rax), ebx)
    });
    assert_eq!(rig.read::<u64>(pte) & (A | D), 0);
}

#[test]
fn cr3_write_keeps_global_translations() {
    let mut rig = Rig::new();
    rig.map(HOLE, DATA, P | W);
    rig.map(HOLE + 4096, DATA + 4096, P | W | G);
    rig.write(DATA, 1u64);
    rig.write(DATA + 4096, 2u64);
    rig.write(DATA + 8192, 3u64);
    let (local, global) = (rig.entry(PML4, HOLE, 0), rig.entry(PML4, HOLE + 4096, 0));
    let program = |a: &mut CodeAssembler| {
        a.mov(rax, HOLE)?;
        a.mov(rbx, qword_ptr(rax))?;
        a.mov(rcx, qword_ptr(rax + 4096))?;
        // Both PTEs now say another page.
        a.mov(rsi, DATA + 8192 + 3)?;
        a.mov(qword_ptr(local), rsi)?;
        a.mov(qword_ptr(global), rsi)?;
        a.mov(rdx, cr3)?;
        a.mov(cr3, rdx)?;
        a.mov(r8, qword_ptr(rax))?;
        a.mov(r9, qword_ptr(rax + 4096))?;
        // Toggling PGE drops the global one too.
        a.mov(rdx, cr4)?;
        a.btc(rdx, 7)?;
        a.mov(cr4, rdx)?;
        a.btc(rdx, 7)?;
        a.mov(cr4, rdx)?;
        a.mov(r10, qword_ptr(rax + 4096))
    };
    rig.run_kernel(program);
    assert_eq!([3, 1, 8, 9, 10].map(|n| rig.gpr(n)), [1, 2, 3, 2, 3]);
    // Without CR4.PGE no translation is global.
    rig.map(HOLE, DATA, P | W);
    rig.map(HOLE + 4096, DATA + 4096, P | W | G);
    rig.change(|s| s.cr4 &= !cr4::PGE);
    rig.run_kernel(program);
    assert_eq!([3, 1, 8, 9].map(|n| rig.gpr(n)), [1, 2, 3, 3]);
}

#[test]
fn cr3_switch_changes_user_code_and_data() {
    let mut rig = Rig::new();
    // A second address space: another page at USER_CODE; all else the same.
    let root = rig.new_table();
    for i in 0..512 {
        let e: u64 = rig.read(PML4 + i * 8);
        rig.write(root + i * 8, e);
    }
    rig.write(root, 0u64);
    for page in 0..LOW_END >> 12 {
        let va = page << 12;
        let at = rig.entry(root, va, 0);
        let e = rig.pte(va);
        rig.write(at, e);
    }
    let at = rig.entry(root, USER_CODE, 0);
    rig.write(at, (USER_CODE + 4096) | P | W | U);
    let program = |n: u64| {
        move |a: &mut CodeAssembler| {
            a.mov(rbx, n)?;
            a.add(rbx, qword_ptr(USER_CODE + 0x800))?;
            a.int(0x80)
        }
    };
    rig.code(USER_CODE, program(1));
    rig.code(USER_CODE + 4096, program(2));
    rig.write(USER_CODE + 0x800, 10u64);
    rig.write(USER_CODE + 4096 + 0x800, 20u64);
    // The handler counts in RBP; it returns through the other space until three rounds are done.
    rig.gate(0x80, CODE, 0, 0xee);
    rig.code(CODE, |a| {
        let mut done = a.create_label();
        a.shl(r12, 8)?;
        a.or(r12, rbx)?;
        a.inc(rbp)?;
        a.cmp(rbp, 4)?;
        a.je(done)?;
        a.xchg(r14, r15)?;
        a.mov(cr3, r14)?;
        a.mov(rax, USER_CODE)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.iretq()?;
        a.set_label(&mut done)?;
        a.hlt()
    });
    rig.enter_user();
    rig.change(|s| {
        s.gpr[14] = PML4;
        s.gpr[15] = root;
    });
    assert_eq!(rig.run(), Exit::Halt);
    assert_eq!(rig.gpr(12), 0x0b16_0b16);
}

#[test]
fn invlpg_drops_small_and_large_pages() {
    let mut rig = Rig::new();
    rig.write(DATA, 1u64);
    rig.write(DATA + 4096, 2u64);
    rig.map(HOLE, DATA, P | W | G);
    let pte = rig.entry(PML4, HOLE, 0);
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        a.mov(rbx, qword_ptr(rax))?;
        a.mov(rcx, DATA + 4096 + 3)?;
        a.mov(qword_ptr(pte), rcx)?;
        a.mov(rdx, qword_ptr(rax))?;
        a.invlpg(byte_ptr(rax + 0x234))?;
        a.mov(rsi, qword_ptr(rax))
    });
    assert_eq!((rig.gpr(3), rig.gpr(2), rig.gpr(6)), (1, 1, 2));

    // A large page is dropped as a whole, by any address inside.
    let va = UPPER + 0x4000_0000;
    let pde = rig.entry(PML4, va, 1);
    rig.write(pde, 0x40_0000 | P | W | PS | G);
    rig.write(0x40_5000, 5u64);
    rig.write(5u64 << 12, 0u64);
    rig.write(0x20_5000, 6u64);
    rig.run_kernel(|a| {
        a.mov(rax, va)?;
        a.mov(rbx, qword_ptr(rax + 0x5000))?;
        a.mov(rcx, 0x20_0083u64)?;
        a.mov(qword_ptr(pde), rcx)?;
        a.mov(rdx, qword_ptr(rax + 0x5000))?;
        a.invlpg(byte_ptr(rax + 0x9000))?;
        a.mov(rsi, qword_ptr(rax + 0x5000))
    });
    assert_eq!((rig.gpr(3), rig.gpr(2), rig.gpr(6)), (5, 5, 6));
}

#[test]
fn invlpg_drops_code() {
    let mut rig = Rig::new();
    let load = |n: u64| {
        move |a: &mut CodeAssembler| {
            a.mov(rbx, n)?;
            a.ret()
        }
    };
    rig.code(DATA, load(1));
    rig.code(DATA + 4096, load(2));
    rig.map(HOLE, DATA, P | W | G);
    let pte = rig.entry(PML4, HOLE, 0);
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        a.call(rax)?;
        a.call(rax)?;
        a.mov(rdx, rbx)?;
        a.mov(rcx, DATA + 4096 + 3)?;
        a.mov(qword_ptr(pte), rcx)?;
        a.invlpg(byte_ptr(rax))?;
        a.call(rax)
    });
    assert_eq!((rig.gpr(2), rig.gpr(3)), (1, 2));
}

#[test]
fn invlpg_drops_user_code() {
    let mut rig = Rig::new();
    // The user runs a page; the kernel puts another in its place and invalidates.
    rig.code(USER_CODE, |a| {
        a.mov(ebx, 1)?;
        a.int(0x80)
    });
    rig.code(USER_CODE + 4096, |a| {
        a.mov(ebx, 2)?;
        a.ud2()
    });
    let pte = rig.entry(PML4, USER_CODE, 0);
    rig.gate(0x80, CODE, 0, 0xee);
    rig.code(CODE, |a| {
        a.mov(ebp, ebx)?;
        a.mov(rax, (USER_CODE + 4096) | P | W | U)?;
        a.mov(qword_ptr(pte), rax)?;
        a.mov(eax, USER_CODE as u32)?;
        a.invlpg(byte_ptr(rax))?;
        a.mov(qword_ptr(rsp), rax)?;
        a.iretq()
    });
    rig.enter_user();
    let e = rig.event();
    assert_eq!((e.vector, rig.gpr(5), rig.gpr(3)), (6, 1, 2));
}

#[test]
fn many_address_spaces() {
    // More CR3 writes than there are generations of user code, each with another page of code in the same place.
    let mut rig = Rig::new();
    for i in 0..2 {
        rig.code(USER_CODE + i * 4096, |a| {
            a.add(rbx, i as i32 + 1)?;
            a.int(0x80)
        });
    }
    let pte = rig.entry(PML4, USER_CODE, 0);
    rig.gate(0x80, CODE, 0, 0xee);
    rig.code(CODE, |a| {
        let mut done = a.create_label();
        a.dec(ecx)?;
        a.je(done)?;
        a.xor(qword_ptr(pte), 0x1000)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(eax, USER_CODE as u32)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.iretq()?;
        a.set_label(&mut done)?;
        a.hlt()
    });
    rig.enter_user();
    rig.change(|s| s.gpr[1] = 10_000);
    assert_eq!(rig.run(), Exit::Halt);
    assert_eq!(rig.gpr(3), 15_000);
}

#[test]
fn large_page() {
    let mut rig = Rig::new();
    let va = UPPER + 0x20_0000;
    let pde = rig.entry(PML4, va, 1);
    rig.write(pde, 0x40_0000 | P | W | PS | 1 << 12);
    rig.run_kernel(|a| {
        a.mov(rax, va)?;
        a.mov(rbx, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rax + 0x1f_0ffc), rbx)?;
        a.mov(rcx, qword_ptr(rax + 0x1f_0ffc))
    });
    assert_eq!(rig.read::<u64>(0x5f_0ffc), 0x1122_3344_5566_7788);
    assert_eq!(rig.gpr(1), 0x1122_3344_5566_7788);
    assert_eq!(rig.read::<u64>(pde) & (A | D), A | D);
}

#[test]
fn addresses_that_are_not_canonical() {
    let mut rig = Rig::new();
    for va in [1u64 << 47, 0x5555 << 48, UPPER - 1, (1 << 47) - 4] {
        let e = rig.fault(|a| {
            a.mov(rax, va)?;
            a.mov(qword_ptr(rax), rbx)
        });
        // The last one begins at a good address that is not mapped; the page fault comes first.
        if va == (1 << 47) - 4 {
            rig.assert_page_fault(&e, WRITE, va);
        } else {
            assert_eq!((e.vector, e.error), (13, Some(0)), "{va:#x}");
        }
    }
    let e = rig.fault(|a| {
        a.mov(rax, 1u64 << 47)?;
        a.jmp(rax)
    });
    assert_eq!((e.vector, e.error), (13, Some(0)));
}

#[test]
fn data_across_pages() {
    let mut rig = Rig::new();
    // Neighbours in the address space, apart in memory, the second one high.
    rig.map(HOLE, DATA + 8192, P | W);
    rig.map(HOLE + 4096, HIGH + 4096, P | W);
    rig.run_kernel(|a| {
        a.mov(rax, HOLE + 4096)?;
        a.mov(rbx, 0x8877_6655_4433_2211u64)?;
        a.mov(qword_ptr(rax - 3), rbx)?;
        a.mov(rcx, qword_ptr(rax - 3))?;
        a.add(dword_ptr(rax - 2), 0x100)?;
        a.mov(edx, dword_ptr(rax - 2))?;
        a.mov(word_ptr(rax - 1), 0x7172)?;
        a.movzx(esi, word_ptr(rax - 1))
    });
    assert_eq!(rig.gpr(1), 0x8877_6655_4433_2211);
    assert_eq!(rig.gpr(2), 0x5544_3422);
    assert_eq!(rig.gpr(6), 0x7172);
    assert_eq!(rig.read::<u8>(DATA + 8192 + 4095), 0x72);
    assert_eq!(rig.read::<u8>(HIGH + 4096), 0x71);
    // When the second page is missing nothing of the first is written, and the fault tells the second's address.
    let before: u64 = rig.read(DATA + 8192 + 4088);
    rig.map(HOLE + 4096, 0, 0);
    let e = rig.fault(|a| {
        a.mov(rax, HOLE + 4093)?;
        a.mov(qword_ptr(rax), rbx)
    });
    rig.assert_page_fault(&e, WRITE, HOLE + 4096);
    assert_eq!(rig.read::<u64>(DATA + 8192 + 4088), before);
}

#[test]
fn instructions_across_pages() {
    let mut rig = Rig::new();
    rig.map(HOLE, DATA, P | W);
    rig.map(HOLE + 4096, DATA + 0x5000, P | W);
    let bytes = assemble(HOLE + 4096 - 5, |a| {
        a.mov(rbx, 0x1122_3344_5566_7788u64)?;
        a.ret()
    });
    for (i, b) in bytes.iter().enumerate() {
        rig.write(if i < 5 { DATA + 4091 + i as u64 } else { DATA + 0x5000 - 5 + i as u64 }, *b);
    }
    let call = |a: &mut CodeAssembler| {
        a.mov(rax, HOLE + 4091)?;
        a.call(rax)
    };
    rig.run_kernel(call);
    assert_eq!(rig.gpr(3), 0x1122_3344_5566_7788);
    // The second half replaced by mapping another page, then by a write.
    let pte = rig.entry(PML4, HOLE + 4096, 0);
    for (i, b) in bytes.iter().enumerate().skip(5) {
        rig.write(DATA + 0x6000 - 5 + i as u64, if i == 9 { 0xaa } else { *b });
    }
    rig.run_kernel(|a| {
        a.mov(rax, HOLE + 4091)?;
        a.call(rax)?;
        a.mov(rcx, DATA + 0x6003)?;
        a.mov(qword_ptr(pte), rcx)?;
        a.invlpg(byte_ptr(rax + 5))?;
        a.call(rax)?;
        a.mov(rdx, rbx)?;
        a.mov(byte_ptr(DATA + 0x6004), 0xbb)?;
        a.call(rax)
    });
    assert_eq!(rig.gpr(2), 0xaa22_3344_5566_7788);
    assert_eq!(rig.gpr(3), 0xbb22_3344_5566_7788);
    // And missing: the fault is a fetch of the second page, RIP the instruction.
    rig.map(HOLE + 4096, 0, 0);
    let e = rig.fault(call);
    rig.assert_page_fault(&e, FETCH, HOLE + 4096);
    assert_eq!(e.rip, HOLE + 4091);
}

#[test]
fn devices_see_aligned_accesses() {
    let mut rig = Rig::new();
    rig.map(HOLE, DEVICE, P | W);
    rig.map(HOLE + 4096, DEVICE + 4096, P | W);
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        a.mov(ebx, dword_ptr(rax + 0x20))?;
        a.mov(rcx, qword_ptr(rax + 8))?;
        a.mov(dl, byte_ptr(rax + 3))?;
        a.mov(word_ptr(rax + 6), 0x1234)?;
        a.mov(dword_ptr(rax + 0x1002), 0x1122_3344)
    });
    assert_eq!((rig.gpr(3), rig.gpr(1), rig.gpr(2) & 0xff), (0x2322_2120, 0x0f0e_0d0c_0b0a_0908, 3));
    let d = DEVICE;
    assert_eq!(
        rig.bus.mmio,
        [
            (d + 0x20, 4, None),
            (d + 8, 8, None),
            (d + 3, 1, None),
            (d + 6, 2, Some(0x1234)),
            (d + 0x1002, 2, Some(0x3344)),
            (d + 0x1004, 2, Some(0x1122)),
        ]
    );
    rig.bus.mmio.clear();
    // Across pages, a fault in the second keeps the device from seeing the first.
    rig.map(HOLE + 4096, 0, 0);
    rig.fault(|a| {
        a.mov(rax, HOLE + 4094)?;
        a.mov(ebx, dword_ptr(rax))
    });
    assert_eq!(rig.bus.mmio, []);
    // Read, modify, write.
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        a.add(dword_ptr(rax), 1)
    });
    assert_eq!(rig.bus.mmio, [(d, 4, None), (d, 4, Some(0x0302_0101))]);
}

#[test]
fn absent_pages_are_filled_on_first_use() {
    let mut rig = Rig::new();
    let before = rig.ram.fills.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(rig.flags(DATA), 0);
    rig.run_kernel(|a| a.mov(rbx, qword_ptr(DATA)));
    assert_eq!(rig.flags(DATA), PageFlags::PRESENT);
    // The code page, four levels of tables (of which the rig has made some present before), the data.
    assert!(rig.ram.fills.load(std::sync::atomic::Ordering::Relaxed) > before);
    rig.run_kernel(|a| a.mov(qword_ptr(DATA), rbx));
    assert_eq!(rig.flags(DATA), PageFlags::PRESENT | PageFlags::DIRTY);
    // A page that cannot be had stops the machine, with the instruction still to do.
    rig.ram.broken.store((DATA >> 12) + 7, std::sync::atomic::Ordering::Relaxed);
    rig.code(CODE, |a| a.mov(qword_ptr(DATA + 0x7000), rbx));
    rig.cpu.invalidate_all_code();
    rig.change(|s| s.rip = CODE);
    assert_eq!(rig.run(), Exit::RamFault(format!("Page {} is lost", (DATA >> 12) + 7)));
    assert_eq!(rig.cpu.rip(), CODE);
}

#[test]
fn dirty_flag_comes_back_after_a_capture() {
    let mut rig = Rig::new();
    rig.run_kernel(|a| a.mov(qword_ptr(DATA), rbx));
    rig.set_flags(DATA, PageFlags::PRESENT);
    rig.cpu.forget_all_writable();
    assert_eq!(rig.flags(DATA) & PageFlags::DIRTY, 0);
    // No flush of the TLB in between: straight into the loop of a running guest.
    rig.cpu.rip = CODE;
    rig.cpu.halted = false;
    assert_eq!(rig.run(), Exit::Halt);
    assert_eq!(rig.flags(DATA), PageFlags::PRESENT | PageFlags::DIRTY);
}

#[test]
fn code_that_writes_itself() {
    let mut rig = Rig::new();
    // The immediate of the next instruction but one, in the same sequence.
    let patch = assemble(CODE, |a| {
        a.mov(byte_ptr(CODE), 0x77)?;
        a.nop()
    });
    let target = CODE + patch.len() as u64 + 1;
    rig.run_kernel(|a| {
        a.mov(byte_ptr(target), 0x77)?;
        a.nop()?;
        a.mov(bl, 0x11)
    });
    assert_eq!(rig.gpr(3) & 0xff, 0x77);
    // Another page, called before and after.
    rig.code(DATA, |a| {
        a.mov(cl, 1)?;
        a.ret()
    });
    rig.run_kernel(|a| {
        a.mov(eax, DATA as u32)?;
        a.call(rax)?;
        a.mov(dl, cl)?;
        a.mov(byte_ptr(DATA + 1), 2)?;
        a.call(rax)
    });
    assert_eq!((rig.gpr(2) & 0xff, rig.gpr(1) & 0xff), (1, 2));
    // Data in a line without code leaves the code alone, and is written.
    let decoded = rig.cpu.diagnostics().sequences_decoded;
    rig.change(|s| s.rip = CODE);
    assert_eq!(rig.run(), Exit::Halt);
    rig.change(|s| s.halted = false);
    let again = rig.cpu.diagnostics().sequences_decoded;
    rig.run_kernel(|a| {
        a.mov(eax, DATA as u32)?;
        a.call(rax)?;
        a.mov(dword_ptr(DATA + 0x800), 5)?;
        a.call(rax)
    });
    assert_eq!(rig.read::<u32>(DATA + 0x800), 5);
    assert!(again > decoded);
}

#[test]
fn code_written_through_another_address() {
    let mut rig = Rig::new();
    rig.map(HOLE, DATA, P | W);
    rig.code(DATA, |a| {
        a.mov(cl, 1)?;
        a.ret()
    });
    rig.run_kernel(|a| {
        a.mov(rax, HOLE)?;
        // The alias is writable in the TLB before there is code.
        a.mov(byte_ptr(rax + 0x100), 1)?;
        a.mov(edx, DATA as u32)?;
        a.call(rdx)?;
        a.mov(byte_ptr(rax + 1), 9)?;
        a.call(rdx)
    });
    assert_eq!(rig.gpr(1) & 0xff, 9);
}

#[test]
fn a_push_into_the_running_page() {
    let mut rig = Rig::new();
    // The stack is in the code page, right behind the code; an interrupt frame overwrites code that ran.
    rig.code(CODE + 0x100, |a| {
        a.nop()?;
        a.ret()
    });
    rig.run_kernel(|a| {
        a.mov(rbp, rsp)?;
        a.mov(eax, (CODE + 0x100) as u32)?;
        a.call(rax)?;
        a.mov(rsp, CODE + 0x108)?;
        // RET's opcode over the NOP: the pushed word's low byte.
        a.mov(ecx, 0xc3)?;
        a.push(rcx)?;
        a.mov(rsp, rbp)?;
        a.call(rax)?;
        a.mov(bl, 0x42)
    });
    assert_eq!(rig.gpr(3) & 0xff, 0x42);
    assert_eq!(rig.read::<u64>(CODE + 0x100), 0xc3);
}
