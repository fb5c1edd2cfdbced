//! What the comparison with the host CPU cannot show: availability by CR0 and CR4, and what the host thread is left with.

use std::arch::asm;
use std::panic::{AssertUnwindSafe, catch_unwind};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::{CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT};
use crate::system::rig::{DATA, Rig, STACK};

type Asm<'a> = &'a mut CodeAssembler;
type Build = fn(Asm<'_>) -> Result<(), IcedError>;

/// The vector that one instruction raises under the given CR0 bits and without the given CR4 bits.
fn vector(build: Build, with_cr0: u64, without_cr4: u64) -> Option<u8> {
    let mut rig = Rig::new();
    rig.change(|s| {
        s.cr0 = s.cr0 & !(CR0_EM | CR0_TS | CR0_MP) | with_cr0;
        s.cr4 = (s.cr4 | CR4_OSFXSR | CR4_OSXMMEXCPT) & !without_cr4;
        s.gpr[4] = STACK;
        s.gpr[6] = DATA;
    });
    let event = rig.fault(|a| {
        build(a)?;
        a.int3()
    });
    (event.vector != 3).then_some(event.vector)
}

#[test]
fn availability() {
    const UD: Option<u8> = Some(6);
    const NM: Option<u8> = Some(7);
    // With CR0.TS, with CR0.EM, without CR4.OSFXSR.
    let sse: [(&str, Build); 14] = [
        ("movaps", |a| a.movaps(xmm0, xmm1)),
        ("movdqu", |a| a.movdqu(xmm0, xmmword_ptr(rsi))),
        ("movdqa store", |a| a.movdqa(xmmword_ptr(rsi), xmm0)),
        ("movq", |a| a.movq(xmm0, rax)),
        ("movss", |a| a.movss(dword_ptr(rsi), xmm0)),
        ("paddb", |a| a.paddb(xmm0, xmm1)),
        ("addsd", |a| a.addsd(xmm0, qword_ptr(rsi))),
        ("pshufd", |a| a.pshufd(xmm0, xmm1, 7)),
        ("palignr", |a| a.palignr(xmm0, xmm1, 7)),
        ("cvttsd2si", |a| a.cvttsd2si(eax, xmm1)),
        ("ucomisd", |a| a.ucomisd(xmm0, xmm1)),
        ("pcmpistri", |a| a.pcmpistri(xmm0, xmm1, 7)),
        ("pblendvb", |a| a.pblendvb(xmm0, xmm1)),
        ("ldmxcsr", |a| a.ldmxcsr(dword_ptr(rsi))),
    ];
    for (name, build) in sse {
        assert_eq!(vector(build, 0, 0), None, "{name}");
        assert_eq!(vector(build, CR0_TS, 0), NM, "{name}");
        assert_eq!(vector(build, CR0_EM, 0), UD, "{name}");
        assert_eq!(vector(build, CR0_TS | CR0_EM, 0), UD, "{name}");
        assert_eq!(vector(build, 0, CR4_OSFXSR), UD, "{name}");
    }
    let mmx: [(&str, Build); 4] = [
        ("paddb", |a| a.paddb(mm0, mm1)),
        ("movq", |a| a.movq(mm0, qword_ptr(rsi))),
        ("psllw", |a| a.psllw(mm0, 3)),
        ("emms", |a| a.emms()),
    ];
    for (name, build) in mmx {
        assert_eq!(vector(build, CR0_TS, 0), NM, "{name}");
        assert_eq!(vector(build, CR0_EM, 0), UD, "{name}");
        assert_eq!(vector(build, 0, CR4_OSFXSR), None, "{name}");
    }
    let x87: [(&str, Build); 7] = [
        ("fld1", |a| a.fld1()),
        ("fstp", |a| a.fstp(qword_ptr(rsi))),
        ("fnstcw", |a| a.fnstcw(word_ptr(rsi))),
        ("fninit", |a| a.fninit()),
        ("fnstsw", |a| a.fnstsw(ax)),
        ("fxsave", |a| a.fxsave(ptr(rsi))),
        ("fxrstor64", |a| a.fxrstor64(ptr(rsi))),
    ];
    for (name, build) in x87 {
        assert_eq!(vector(build, CR0_TS, 0), NM, "{name}");
        assert_eq!(vector(build, CR0_EM, 0), NM, "{name}");
        assert_eq!(vector(build, 0, CR4_OSFXSR), None, "{name}");
    }
    let wait: Build = |a| a.wait();
    assert_eq!(vector(wait, CR0_TS, 0), None);
    assert_eq!(vector(wait, CR0_MP, 0), None);
    assert_eq!(vector(wait, CR0_EM | CR0_MP, 0), None);
    assert_eq!(vector(wait, CR0_TS | CR0_MP, 0), NM);
    let integer: [(&str, Build); 2] =
        [("crc32", |a| a.crc32(eax, ecx)), ("movnti", |a| a.movnti(dword_ptr(rsi), eax))];
    for (name, build) in integer {
        assert_eq!(vector(build, CR0_TS | CR0_EM, CR4_OSFXSR), None, "{name}");
    }
}

#[test]
fn unmasked_exceptions_need_osxmmexcpt() {
    let divide: Build = |a| {
        a.mov(dword_ptr(rsi), 0x1d80)?; // divide-by-zero unmasked
        a.ldmxcsr(dword_ptr(rsi))?;
        a.mov(eax, 1)?;
        a.cvtsi2sd(xmm0, eax)?;
        a.xorps(xmm1, xmm1)?;
        a.divsd(xmm0, xmm1)
    };
    assert_eq!(vector(divide, 0, 0), Some(19));
    assert_eq!(vector(divide, 0, CR4_OSXMMEXCPT), Some(6));
}

#[test]
fn reserved_mxcsr_bits() {
    let load: Build = |a| {
        a.mov(dword_ptr(rsi), 0x1_1f80)?;
        a.ldmxcsr(dword_ptr(rsi))
    };
    assert_eq!(vector(load, 0, 0), Some(13));
    let restore: Build = |a| {
        a.fxsave(ptr(rsi))?;
        a.mov(dword_ptr(rsi + 24), 0x8000_1f80u32 as i32)?;
        a.fxrstor(ptr(rsi))
    };
    assert_eq!(vector(restore, 0, 0), Some(13));
    let misaligned: Build = |a| a.fxsave(ptr(rsi + 8));
    assert_eq!(vector(misaligned, 0, 0), Some(13));
}

/// CR0.TS takes a live x87 state away, and CLTS brings it back.
#[test]
fn lazy_switching() {
    let mut rig = Rig::new();
    rig.change(|s| s.gpr[6] = DATA);
    rig.write(DATA, 2.5f64);
    let event = rig.fault(|a| {
        a.fninit()?;
        a.fld(qword_ptr(rsi))?;
        a.fld1()?;
        a.mov(rax, cr0)?;
        a.or(rax, CR0_TS as i32)?;
        a.mov(cr0, rax)?;
        a.faddp(st1, st0)
    });
    assert_eq!(event.vector, 7);
    rig.change(|s| s.gpr[4] = STACK);
    rig.run_kernel(|a| {
        a.clts()?;
        a.faddp(st1, st0)?;
        a.fstp(qword_ptr(rsi))
    });
    assert_eq!(rig.read::<f64>(DATA), 3.5);
}

/// MXCSR, FCW and the tag byte of the thread.
fn host_environment() -> (u32, u16, u8) {
    #[repr(C, align(16))]
    struct Image([u8; 512]);
    let mut image = Image([0; 512]);
    // SAFETY: FXSAVE64 writes 512 bytes to an aligned local.
    unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut image, options(nostack, preserves_flags)) };
    let i = &image.0;
    let mxcsr = u32::from_le_bytes([i[24], i[25], i[26], i[27]]);
    (mxcsr & !0x3f, u16::from_le_bytes([i[0], i[1]]), i[4])
}

fn dirty(a: Asm<'_>) -> Result<(), IcedError> {
    a.mov(dword_ptr(rsi), 0xff80)?; // round towards zero, flush, denormals are zero
    a.ldmxcsr(dword_ptr(rsi))?;
    a.mov(word_ptr(rsi), 0xc7f)?; // the same for the x87 unit
    a.fldcw(word_ptr(rsi))?;
    a.fld1()?;
    a.fldpi()
}

#[test]
fn the_host_gets_its_environment_back() {
    const CLEAN: (u32, u16, u8) = (0x1f80, 0x37f, 0);
    assert_eq!(host_environment(), CLEAN);
    let mut rig = Rig::new();
    rig.change(|s| s.gpr[6] = DATA);
    rig.run_kernel(dirty);
    assert_eq!(host_environment(), CLEAN);
    let image = rig.cpu.state().fxsave;
    assert_eq!((&image[..2], image[4]), (&0xc7fu16.to_le_bytes()[..], 0xc0));
    assert_eq!(image[24..28], 0xff80u32.to_le_bytes());

    // A device that panics unwinds through `run`.
    rig.change(|s| s.gpr[6] = DATA);
    rig.code(crate::system::rig::CODE, |a| {
        dirty(a)?;
        a.mov(edx, 0xdeadu32)?;
        a.out(dx, al)
    });
    rig.change(|s| s.rip = crate::system::rig::CODE);
    rig.cpu.invalidate_all_code();
    let result = catch_unwind(AssertUnwindSafe(|| rig.cpu.run(&mut Panics, 1000)));
    assert!(result.is_err());
    assert_eq!(host_environment(), CLEAN);
}

/// A bus whose devices all panic.
struct Panics;

impl crate::Bus for Panics {
    fn mmio_read(&mut self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn io_read(&mut self, _: u16, _: &mut [u8]) {}
    fn io_write(&mut self, _: u16, _: &[u8]) {
        panic!("a device's bug");
    }
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
