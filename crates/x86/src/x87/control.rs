//! x87 control instructions: control and status words, environment and state images (Intel SDM vol. 1, 8.1.10).

use std::arch::asm;

use iced_x86::{Code, Instruction};

use super::{FCW_MASKS, X87, host_status};
use crate::cpu::{Cpu, Trap, vector};
use crate::decode::Lowered;
use crate::op::{Op, reg};
use crate::ops::t;
use crate::simd::{CR0_MP, CR0_TS};

unsafe fn fldcw(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_begin());
    let v = t!(cpu, op, cpu.load::<u16>(cpu.ea(op)));
    asm!("fldcw [{}]", in(reg) &raw const v, options(nostack, preserves_flags, readonly));
    cpu.x87.unmasked = v & FCW_MASKS != FCW_MASKS;
    if cpu.x87.unmasked {
        cpu.x87_check();
    }
    Op::run_next(cpu, op)
}

unsafe fn fnstcw(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    let mut v = cpu.x87.fcw;
    if cpu.x87.live {
        asm!("fnstcw [{}]", in(reg) &raw mut v, options(nostack, preserves_flags));
    }
    t!(cpu, op, cpu.store::<u16>(cpu.ea(op), v));
    Op::run_next(cpu, op)
}

unsafe fn status(cpu: &Cpu) -> u16 {
    if cpu.x87.live { host_status() } else { cpu.x87.fsw }
}

unsafe fn fnstsw(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    let v = status(cpu);
    t!(cpu, op, cpu.store::<u16>(cpu.ea(op), v));
    Op::run_next(cpu, op)
}

unsafe fn fnstsw_ax(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    let v = status(cpu);
    cpu.set_reg::<u16>(reg::RAX, v);
    Op::run_next(cpu, op)
}

unsafe fn fnclex(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    if cpu.x87.live {
        asm!("fnclex", options(nomem, nostack, preserves_flags));
    } else {
        cpu.x87.fsw &= 0x7f00;
    }
    Op::run_next(cpu, op)
}

unsafe fn fninit(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    cpu.x87_save();
    cpu.x87.initialise();
    Op::run_next(cpu, op)
}

/// WAIT: raises what is pending.
unsafe fn wait(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.ctl.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        cpu.raise(vector::NM, None);
        return cpu.trap(op);
    }
    if cpu.x87.pending() {
        cpu.raise(vector::MF, None);
        return cpu.trap(op);
    }
    Op::run_next(cpu, op)
}

/// FNSTENV: stores the environment and masks all exceptions.
unsafe fn fnstenv<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    let va = cpu.ea(op);
    t!(cpu, op, cpu.probe_write(va, X87::env_bytes(WIDE) as u64));
    cpu.x87_save();
    let mut image = [0; 108];
    cpu.x87.to_env(&mut image, WIDE);
    t!(cpu, op, write_bytes(cpu, va, &image[..X87::env_bytes(WIDE)]));
    let fsw = cpu.x87.fsw;
    cpu.x87.set_words(cpu.x87.fcw | FCW_MASKS, fsw);
    Op::run_next(cpu, op)
}

/// FNSAVE: stores environment and registers and initialises the unit.
unsafe fn fnsave<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.x87_available());
    let va = cpu.ea(op);
    let env = X87::env_bytes(WIDE);
    t!(cpu, op, cpu.probe_write(va, env as u64 + 80));
    cpu.x87_save();
    let mut image = [0; 108];
    cpu.x87.to_env(&mut image, WIDE);
    for (st, part) in cpu.x87.st.iter().zip(image[env..].chunks_exact_mut(10)) {
        part[..8].copy_from_slice(&st[0].to_le_bytes());
        part[8..].copy_from_slice(&(st[1] as u16).to_le_bytes());
    }
    t!(cpu, op, write_bytes(cpu, va, &image[..env + 80]));
    cpu.x87.initialise();
    Op::run_next(cpu, op)
}

unsafe fn fldenv<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, before_load(cpu));
    let mut image = [0; 108];
    let va = cpu.ea(op);
    t!(cpu, op, read_bytes(cpu, va, &mut image[..X87::env_bytes(WIDE)]));
    cpu.x87.set_env(&image, WIDE);
    Op::run_next(cpu, op)
}

unsafe fn frstor<const WIDE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, before_load(cpu));
    let env = X87::env_bytes(WIDE);
    let mut image = [0; 108];
    let va = cpu.ea(op);
    t!(cpu, op, read_bytes(cpu, va, &mut image[..env + 80]));
    cpu.x87.set_env(&image, WIDE);
    for (st, part) in cpu.x87.st.iter_mut().zip(image[env..].chunks_exact(10)) {
        let mut low = [0; 8];
        low.copy_from_slice(&part[..8]);
        *st = [u64::from_le_bytes(low), u64::from(u16::from_le_bytes([part[8], part[9]]))];
    }
    Op::run_next(cpu, op)
}

/// FLDENV and FRSTOR wait.
unsafe fn before_load(cpu: &mut Cpu) -> Result<(), Trap> {
    cpu.x87_available()?;
    cpu.x87_save();
    if cpu.x87.pending() { Err(cpu.raise(vector::MF, None)) } else { Ok(()) }
}

unsafe fn write_bytes(cpu: &mut Cpu, va: u64, bytes: &[u8]) -> Result<(), Trap> {
    for (i, pair) in bytes.chunks_exact(2).enumerate() {
        cpu.store::<u16>(va.wrapping_add(2 * i as u64), u16::from_le_bytes([pair[0], pair[1]]))?;
    }
    Ok(())
}

unsafe fn read_bytes(cpu: &mut Cpu, va: u64, bytes: &mut [u8]) -> Result<(), Trap> {
    for (i, pair) in bytes.chunks_exact_mut(2).enumerate() {
        pair.copy_from_slice(&cpu.load::<u16>(va.wrapping_add(2 * i as u64))?.to_le_bytes());
    }
    Ok(())
}

impl X87 {
    /// FNINIT: registers keep their bits but become empty.
    fn initialise(&mut self) {
        self.turn_to(0x37f, 0);
        *self = X87 { st: self.st, gate: self.gate, ..X87::default() };
    }

    /// Length of the environment: 16-bit or 32-bit protected-mode format.
    fn env_bytes(wide: bool) -> usize {
        if wide { 28 } else { 14 }
    }

    /// The two-bit tags, which FXSAVE's format does not hold but derives from the registers.
    fn tags(&self) -> u16 {
        (0..8usize).fold(0, |tags, i| {
            let [significand, exponent] = self.st[i.wrapping_sub(self.top()) & 7];
            let tag = match exponent & 0x7fff {
                _ if self.ftw >> i & 1 == 0 => 3,
                0 if significand == 0 => 1,
                0 | 0x7fff => 2,
                _ if significand >> 63 == 0 => 2,
                _ => 0,
            };
            tags | tag << (2 * i)
        })
    }

    /// The environment. Selectors are not kept, as on CPUs that have given them up.
    fn to_env(self, image: &mut [u8; 108], wide: bool) {
        let words = if wide {
            let (fip, fdp) = (self.fip as u32, self.fdp as u32);
            [
                self.fcw,
                0xffff,
                self.fsw,
                0xffff,
                self.tags(),
                0xffff,
                fip as u16,
                (fip >> 16) as u16,
                0,
                self.fop,
                fdp as u16,
                (fdp >> 16) as u16,
                0,
                0xffff,
            ]
        } else {
            [self.fcw, self.fsw, self.tags(), self.fip as u16, 0, self.fdp as u16, 0, 0, 0, 0, 0, 0, 0, 0]
        };
        for (word, part) in words.iter().zip(image[..Self::env_bytes(wide)].chunks_exact_mut(2)) {
            part.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn set_env(&mut self, image: &[u8; 108], wide: bool) {
        let word = |i: usize| {
            let at = if wide { 4 * i } else { 2 * i };
            u16::from_le_bytes([image[at], image[at + 1]])
        };
        let high = |i: usize| {
            if wide { u64::from(u16::from_le_bytes([image[4 * i + 2], image[4 * i + 3]])) } else { 0 }
        };
        self.turn_to(word(0), word(1));
        let tags = word(2);
        self.ftw = (0..8).fold(0, |f, i| f | u8::from(tags >> (2 * i) & 3 != 3) << i);
        self.fip = u64::from(word(3)) | high(3) << 16;
        self.fop = high(4) as u16 & 0x7ff;
        self.fdp = u64::from(word(5)) | high(5) << 16;
    }
}

/// Lowers the instructions of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    op.h = match insn.code() {
        Code::Fldcw_m2byte => fldcw,
        Code::Fnstcw_m2byte => fnstcw,
        Code::Fnstsw_m2byte => fnstsw,
        Code::Fnstsw_AX => fnstsw_ax,
        Code::Fnclex => fnclex,
        Code::Fninit => fninit,
        Code::Wait => wait,
        Code::Fnstenv_m14byte => fnstenv::<false>,
        Code::Fnstenv_m28byte => fnstenv::<true>,
        Code::Fnsave_m94byte => fnsave::<false>,
        Code::Fnsave_m108byte => fnsave::<true>,
        Code::Fldenv_m14byte => fldenv::<false>,
        Code::Fldenv_m28byte => fldenv::<true>,
        Code::Frstor_m94byte => frstor::<false>,
        Code::Frstor_m108byte => frstor::<true>,
        _ => return Lowered::No,
    };
    Lowered::Plain
}
