//! Speed of the software CPU on small loops: millions of guest instructions per second.
//!
//! `cargo bench -p amber-x86`. The figures are for orientation and for A/B comparison of changes; the workloads that
//! matter (boot, fork+exec, Python) are in the project's own bench.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::Instant;

use amber_x86::state::{CpuState, SegmentState};
use amber_x86::{Bus, Cpu, Exit, GuestRam, PageFlags};
use iced_x86::code_asm::*;

struct Ram(Box<[u8]>, Vec<AtomicU8>);

// SAFETY: the box does not move or change its size.
unsafe impl GuestRam for Ram {
    fn host(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut()
    }
    fn pages(&self) -> u64 {
        self.1.len() as u64
    }
    fn flags(&self) -> &[AtomicU8] {
        &self.1
    }
    fn page_of(&self, pa: u64) -> Option<u64> {
        Some(pa >> 12).filter(|p| *p < self.pages())
    }
    fn address_of(&self, page: u64) -> u64 {
        page << 12
    }
    fn fill(&self, _: u64) -> Result<(), String> {
        Ok(())
    }
    fn take_code_writes(&self, _: &mut Vec<u64>) {}
}

struct NoBus;

impl Bus for NoBus {
    fn mmio_read(&mut self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn io_read(&mut self, _: u16, _: &mut [u8]) {}
    fn io_write(&mut self, _: u16, _: &[u8]) {}
    fn rdmsr(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn wrmsr(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn cpuid(&mut self, _: u32, _: u32) -> [u32; 4] {
        [0; 4]
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: u8) {}
    fn tsc(&mut self) -> u64 {
        0
    }
    fn poll(&mut self) -> bool {
        false
    }
}

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

fn machine(code: &[u8]) -> Box<Cpu> {
    let mut ram = vec![0u8; 16 << 20];
    let mut put = |at: usize, v: u64| ram[at..at + 8].copy_from_slice(&v.to_le_bytes());
    put(0x1000, 0x2003);
    put(0x2000, 0x3003);
    for i in 0..8 {
        put(0x3000 + i * 8, (i as u64) << 21 | 0x83);
    }
    ram[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
    let pages = ram.len() / 4096;
    let flags = (0..pages).map(|_| AtomicU8::new(PageFlags::PRESENT | PageFlags::DIRTY)).collect();
    let mut cpu = Cpu::new(Arc::new(Ram(ram.into_boxed_slice(), flags)));
    let data = SegmentState { selector: 0x18, base: 0, limit: u32::MAX, attributes: 0xc093 };
    let code = SegmentState { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xa09b };
    let mut fxsave = vec![0; 512];
    fxsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    let mut gpr = [0; 16];
    gpr[4] = 0x80_0000;
    let state = CpuState {
        gpr,
        rip: CODE,
        rflags: 2,
        segments: [data, code, data, data, data, data],
        ldtr: SegmentState { attributes: 0x82, ..Default::default() },
        tr: SegmentState { attributes: 0x8b, limit: 0x67, ..Default::default() },
        gdtr: Default::default(),
        idtr: Default::default(),
        cr0: 0x8005_0033,
        cr2: 0,
        cr3: 0x1000,
        cr4: 0x6a0,
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        msrs: vec![(0xc000_0080, 0xd01)],
        fxsave,
        halted: false,
        interrupt_shadow: false,
    };
    cpu.set_state(&state).unwrap();
    cpu
}

fn bench(name: &str, build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.hlt().unwrap();
    let code = a.assemble(CODE).unwrap();
    let mut best = 0.0f64;
    for _ in 0..3 {
        let mut cpu = machine(&code);
        let start = Instant::now();
        let exit = cpu.run(&mut NoBus, u64::MAX);
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(exit, Exit::Halt);
        best = best.max(cpu.diagnostics().instructions as f64 / seconds / 1e6);
    }
    println!("{name:<28} {best:8.0} M instructions/s");
}

fn main() {
    const N: u64 = 20_000_000;
    bench("register loop", |a| {
        let mut top = a.create_label();
        a.mov(rcx, N)?;
        a.set_label(&mut top)?;
        a.add(rax, rcx)?;
        a.lea(rdx, qword_ptr(rax + rcx * 2 + 5))?;
        a.xor(rbx, rdx)?;
        a.sub(rcx, 1)?;
        a.jne(top)
    });
    bench("loads and stores", |a| {
        let mut top = a.create_label();
        a.mov(rcx, N)?;
        a.mov(rsi, DATA)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rsi + 8))?;
        a.add(rax, 3)?;
        a.mov(qword_ptr(rsi + 16), rax)?;
        a.mov(edx, ecx)?;
        a.and(edx, 0xff)?;
        a.movzx(edx, byte_ptr(rsi + rdx))?;
        a.add(qword_ptr(rsi + 24), rdx)?;
        a.sub(rcx, 1)?;
        a.jne(top)
    });
    bench("calls and branches", |a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut odd = a.create_label();
        let mut done = a.create_label();
        a.mov(rcx, N)?;
        a.jmp(top)?;
        a.set_label(&mut f)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.test(cl, 1)?;
        a.jne(odd)?;
        a.add(rax, 1)?;
        a.set_label(&mut odd)?;
        a.pop(rbp)?;
        a.ret()?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.cmp(rax, rcx)?;
        a.jg(done)?;
        a.sub(rcx, 1)?;
        a.jne(top)?;
        a.set_label(&mut done)?;
        a.nop()
    });
    bench("xorshift and hash", |a| {
        let mut top = a.create_label();
        a.mov(rcx, N)?;
        a.mov(rax, 88172645463325252u64)?;
        a.mov(rsi, DATA)?;
        a.set_label(&mut top)?;
        a.mov(rdx, rax)?;
        a.shl(rdx, 13)?;
        a.xor(rax, rdx)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 7)?;
        a.xor(rax, rdx)?;
        a.mov(rdx, rax)?;
        a.shl(rdx, 17)?;
        a.xor(rax, rdx)?;
        a.mov(rdx, rax)?;
        a.and(edx, 0xffff8)?;
        a.add(qword_ptr(rsi + rdx), rcx)?;
        a.imul_3(rdx, rax, 31)?;
        a.sub(rcx, 1)?;
        a.jne(top)
    });
    bench("byte search", |a| {
        let mut top = a.create_label();
        a.mov(rcx, N)?;
        a.mov(rsi, DATA)?;
        a.pxor(xmm0, xmm0)?;
        a.set_label(&mut top)?;
        a.movdqu(xmm1, xmmword_ptr(rsi + 1))?;
        a.movdqa(xmm2, xmmword_ptr(rsi + 16))?;
        a.pcmpeqb(xmm1, xmm0)?;
        a.pminub(xmm2, xmm1)?;
        a.pmovmskb(eax, xmm2)?;
        a.movdqa(xmmword_ptr(rsi + 64), xmm1)?;
        a.sub(rcx, 1)?;
        a.jne(top)
    });
    bench("floating point", |a| {
        let mut top = a.create_label();
        a.mov(rcx, N)?;
        a.mov(rsi, DATA)?;
        a.set_label(&mut top)?;
        a.cvtsi2sd(xmm0, ecx)?;
        a.movsd_2(xmm1, qword_ptr(rsi + 8))?;
        a.addsd(xmm1, xmm0)?;
        a.mulsd(xmm1, xmm0)?;
        a.divsd(xmm1, qword_ptr(rsi + 16))?;
        a.ucomisd(xmm1, xmm0)?;
        a.cvttsd2si(rax, xmm0)?;
        a.movsd_2(qword_ptr(rsi + 24), xmm1)?;
        a.sub(rcx, 1)?;
        a.jne(top)
    });
    bench("x87", |a| {
        let mut top = a.create_label();
        a.mov(rcx, N)?;
        a.mov(rsi, DATA)?;
        a.set_label(&mut top)?;
        a.fld(qword_ptr(rsi + 8))?;
        a.fadd(qword_ptr(rsi + 16))?;
        a.fchs()?;
        a.fstp(qword_ptr(rsi + 24))?;
        a.sub(rcx, 1)?;
        a.jne(top)
    });
}
