//! Control, debug and model-specific registers (Intel SDM vol. 3, 2.5, 2.2.1, 17.2, and vol. 4).
//!
//! What CPUID does not offer cannot be switched on: such bits are reserved and raise #GP.

use iced_x86::{Code, Instruction};

use super::{by_place, operand, unsupported};
use crate::cpu::{Cpu, Trap, vector};
use crate::decode::Lowered;
use crate::mmu::canonical;
use crate::op::{Handler, Op, reg};
use crate::ops::t;

/// CR0 bits.
pub(crate) mod cr0 {
    pub(crate) const PE: u64 = 1;
    pub(crate) const TS: u64 = 1 << 3;
    pub(crate) const ET: u64 = 1 << 4;
    pub(crate) const WP: u64 = 1 << 16;
    pub(crate) const NW: u64 = 1 << 29;
    pub(crate) const CD: u64 = 1 << 30;
    pub(crate) const PG: u64 = 1 << 31;
    /// PE MP EM TS ET NE WP AM NW CD PG.
    pub(crate) const DEFINED: u64 = 0xe005_003f;
}

/// CR4 bits.
pub(crate) mod cr4 {
    pub(crate) const TSD: u64 = 1 << 2;
    pub(crate) const DE: u64 = 1 << 3;
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const MCE: u64 = 1 << 6;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const PCE: u64 = 1 << 8;
    pub(crate) const OSFXSR: u64 = 1 << 9;
    pub(crate) const OSXMMEXCPT: u64 = 1 << 10;
    pub(crate) const FSGSBASE: u64 = 1 << 16;
    /// All that may be set.
    pub(crate) const OFFERED: u64 = TSD | DE | PSE | PAE | MCE | PGE | PCE | OSFXSR | OSXMMEXCPT | FSGSBASE;
}

/// EFER bits.
pub(crate) mod efer {
    pub(crate) const SCE: u64 = 1;
    pub(crate) const LME: u64 = 1 << 8;
    pub(crate) const LMA: u64 = 1 << 10;
    pub(crate) const NXE: u64 = 1 << 11;
    pub(crate) const OFFERED: u64 = SCE | LME | LMA | NXE;
}

/// Model-specific registers that the CPU itself holds.
pub(crate) mod msr {
    pub(crate) const TSC: u32 = 0x10;
    pub(crate) const SYSENTER_CS: u32 = 0x174;
    pub(crate) const SYSENTER_ESP: u32 = 0x175;
    pub(crate) const SYSENTER_EIP: u32 = 0x176;
    pub(crate) const MISC_ENABLE: u32 = 0x1a0;
    pub(crate) const PAT: u32 = 0x277;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const CSTAR: u32 = 0xc000_0083;
    pub(crate) const SFMASK: u32 = 0xc000_0084;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
}

/// CR3: bits 40 and up are beyond MAXPHYADDR.
pub(crate) const CR3_RESERVED: u64 = !0x00ff_ffff_ffff;
/// DR6 as it reads with nothing set.
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_FIXED: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_GD: u64 = 1 << 13;
const DR6_BD: u64 = 1 << 13;

/// Whether each of PAT's eight types exists.
pub(crate) fn valid_pat(v: u64) -> bool {
    v.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
}

/// Lowers moves to and from control and debug registers, and what else changes them.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    use Code::*;
    let (h, ends): (Handler, bool) = match insn.code() {
        Mov_r64_cr => {
            op.dst = operand(insn, 0);
            op.aux = insn.op1_register().number() as u8;
            (read_cr, false)
        }
        Mov_cr_r64 => {
            op.src = operand(insn, 1);
            op.aux = insn.op0_register().number() as u8;
            (write_cr, true)
        }
        Mov_r64_dr => {
            op.dst = operand(insn, 0);
            op.aux = insn.op1_register().number() as u8;
            (read_dr, false)
        }
        Mov_dr_r64 => {
            op.src = operand(insn, 1);
            op.aux = insn.op0_register().number() as u8;
            (write_dr, true)
        }
        Clts => (clts, true),
        Smsw_rm16 | Smsw_r32m16 | Smsw_r64m16 => {
            op.dst = operand(insn, 0);
            let register: Handler = match insn.code() {
                Smsw_rm16 => store_status_word::<u16>,
                Smsw_r32m16 => store_status_word::<u32>,
                _ => store_status_word::<u64>,
            };
            (by_place(insn, 0, register, store_status_word_mem), false)
        }
        Lmsw_rm16 | Lmsw_r32m16 | Lmsw_r64m16 => {
            op.src = operand(insn, 0);
            (by_place(insn, 0, load_status_word::<false>, load_status_word::<true>), true)
        }
        Invlpg_m => (invlpg, true),
        Rdmsr => (rdmsr, false),
        Wrmsr => (wrmsr, true),
        Rdpmc => (rdpmc, false),
        _ => return Lowered::No,
    };
    op.h = h;
    if ends { Lowered::Ends } else { Lowered::Plain }
}

impl Cpu {
    /// MOV to CR0.
    fn set_cr0(&mut self, v: u64) -> Result<(), Trap> {
        let v = v | cr0::ET;
        // Long mode stays: without PG it would be 32-bit protected mode, which this CPU does not have.
        let legacy = v & (cr0::PE | cr0::PG) != cr0::PE | cr0::PG;
        if v >> 32 != 0 || v & (cr0::CD | cr0::NW) == cr0::NW || legacy {
            return Err(self.gp0());
        }
        let changed = self.ctl.cr0 ^ v;
        self.ctl.cr0 = v & cr0::DEFINED;
        if changed & cr0::WP != 0 {
            self.flush_tlb(true);
        }
        self.update_fp_gate();
        Ok(())
    }

    fn set_cr3(&mut self, v: u64) -> Result<(), Trap> {
        if v & CR3_RESERVED != 0 {
            return Err(self.gp0());
        }
        self.ctl.cr3 = v;
        self.flush_tlb(false);
        Ok(())
    }

    fn set_cr4(&mut self, v: u64) -> Result<(), Trap> {
        if v & !cr4::OFFERED != 0 || v & cr4::PAE == 0 {
            return Err(self.gp0());
        }
        let changed = self.ctl.cr4 ^ v;
        self.ctl.cr4 = v;
        if changed & (cr4::PGE | cr4::PSE) != 0 {
            self.flush_tlb(true);
        }
        self.update_fp_gate();
        Ok(())
    }

    fn set_efer(&mut self, v: u64) -> Result<(), Trap> {
        // LMA follows LME and PG, and PG never changes here; so neither does LME.
        if v & !efer::OFFERED != 0 || (self.ctl.efer ^ v) & efer::LME != 0 {
            return Err(self.gp0());
        }
        let v = v & !efer::LMA | self.ctl.efer & efer::LMA;
        let changed = self.ctl.efer ^ v;
        self.ctl.efer = v;
        if changed & efer::NXE != 0 {
            self.flush_tlb(true);
        }
        Ok(())
    }

    /// RDMSR; `None` is #GP.
    unsafe fn read_msr(&mut self, index: u32) -> Option<u64> {
        let c = &self.ctl;
        Some(match index {
            msr::EFER => c.efer,
            msr::STAR => c.star,
            msr::LSTAR => c.lstar,
            msr::CSTAR => c.cstar,
            msr::SFMASK => c.sfmask,
            msr::FS_BASE => self.slot(reg::FS),
            msr::GS_BASE => self.slot(reg::GS),
            msr::KERNEL_GS_BASE => c.kernel_gs_base,
            msr::TSC_AUX => c.tsc_aux,
            msr::SYSENTER_CS => c.sysenter_cs,
            msr::SYSENTER_ESP => c.sysenter_esp,
            msr::SYSENTER_EIP => c.sysenter_eip,
            msr::PAT => c.pat,
            msr::MISC_ENABLE => c.misc_enable,
            msr::TSC => self.bus?.as_mut().tsc(),
            _ => return self.bus?.as_mut().rdmsr(index),
        })
    }

    /// WRMSR; an error is #GP.
    unsafe fn write_msr(&mut self, index: u32, v: u64) -> Result<(), Trap> {
        let valid = match index {
            msr::LSTAR
            | msr::CSTAR
            | msr::FS_BASE
            | msr::GS_BASE
            | msr::KERNEL_GS_BASE
            | msr::SYSENTER_ESP
            | msr::SYSENTER_EIP => canonical(v),
            msr::TSC_AUX | msr::SFMASK => v >> 32 == 0,
            msr::PAT => valid_pat(v),
            _ => true,
        };
        if !valid {
            return Err(self.gp0());
        }
        let c = &mut self.ctl;
        match index {
            msr::EFER => return self.set_efer(v),
            msr::STAR => c.star = v,
            msr::LSTAR => c.lstar = v,
            msr::CSTAR => c.cstar = v,
            msr::SFMASK => c.sfmask = v,
            msr::FS_BASE => self.set_slot(reg::FS, v),
            msr::GS_BASE => self.set_slot(reg::GS, v),
            msr::KERNEL_GS_BASE => c.kernel_gs_base = v,
            msr::TSC_AUX => c.tsc_aux = v,
            msr::SYSENTER_CS => c.sysenter_cs = v & 0xffff_ffff,
            msr::SYSENTER_ESP => c.sysenter_esp = v,
            msr::SYSENTER_EIP => c.sysenter_eip = v,
            msr::PAT => c.pat = v,
            msr::MISC_ENABLE => c.misc_enable = v,
            _ => {
                let done = self.bus.is_some_and(|mut bus| bus.as_mut().wrmsr(index, v));
                if !done {
                    return Err(self.gp0());
                }
            }
        }
        Ok(())
    }

    /// The debug register that a number names: 4 and 5 are 6 and 7, or with CR4.DE undefined.
    fn debug_register(&mut self, n: u8) -> Result<u8, Trap> {
        if matches!(n, 4 | 5) && self.ctl.cr4 & cr4::DE != 0 || n > 7 {
            return Err(self.raise(vector::UD, None));
        }
        self.need_ring0()?;
        if self.ctl.dr7 & DR7_GD != 0 {
            self.ctl.dr6 |= DR6_BD;
            self.ctl.dr7 &= !DR7_GD;
            return Err(self.raise(vector::DB, None));
        }
        Ok(if matches!(n, 4 | 5) { n + 2 } else { n })
    }
}

/// MOV r64, CRn.
unsafe fn read_cr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let n = (*op).aux;
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        cpu.raise(vector::UD, None);
        return cpu.trap(op);
    }
    t!(cpu, op, cpu.need_ring0());
    let v = match n {
        0 => cpu.ctl.cr0,
        2 => cpu.ctl.cr2,
        3 => cpu.ctl.cr3,
        4 => cpu.ctl.cr4,
        _ => cpu.bus.map_or(0, |mut bus| u64::from(bus.as_mut().task_priority())),
    };
    cpu.set_slot((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOV CRn, r64.
unsafe fn write_cr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let n = (*op).aux;
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        cpu.raise(vector::UD, None);
        return cpu.trap(op);
    }
    t!(cpu, op, cpu.need_ring0());
    let v = cpu.slot((*op).src);
    let done = match n {
        0 => cpu.set_cr0(v),
        2 => {
            cpu.ctl.cr2 = v;
            Ok(())
        }
        3 => cpu.set_cr3(v),
        4 => cpu.set_cr4(v),
        _ if v > 15 => Err(cpu.gp0()),
        _ => {
            if let Some(mut bus) = cpu.bus {
                bus.as_mut().set_task_priority(v as u8);
            }
            Ok(())
        }
    };
    t!(cpu, op, done);
    cpu.end(op, cpu.next_rip(op))
}

/// MOV r64, DRn.
unsafe fn read_dr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let n = t!(cpu, op, cpu.debug_register((*op).aux));
    let v = match n {
        6 => cpu.ctl.dr6 | DR6_FIXED,
        7 => cpu.ctl.dr7 | DR7_FIXED,
        n => cpu.ctl.dr[usize::from(n & 3)],
    };
    cpu.set_slot((*op).dst, v);
    Op::run_next(cpu, op)
}

/// MOV DRn, r64.
unsafe fn write_dr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let n = t!(cpu, op, cpu.debug_register((*op).aux));
    let v = cpu.slot((*op).src);
    if n >= 6 && v >> 32 != 0 || n < 4 && !canonical(v) {
        cpu.gp0();
        return cpu.trap(op);
    }
    match n {
        6 => cpu.ctl.dr6 = v & DR6_WRITABLE | DR6_FIXED,
        7 => cpu.ctl.dr7 = v & DR7_WRITABLE | DR7_FIXED,
        n => cpu.ctl.dr[usize::from(n & 3)] = v,
    }
    cpu.end(op, cpu.next_rip(op))
}

/// CLTS.
unsafe fn clts(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    cpu.ctl.cr0 &= !cr0::TS;
    cpu.update_fp_gate();
    cpu.end(op, cpu.next_rip(op))
}

/// SMSW to a register.
unsafe fn store_status_word<T: crate::mem::Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    cpu.set_reg((*op).dst, T::from_u64(cpu.ctl.cr0));
    Op::run_next(cpu, op)
}

/// SMSW to memory.
unsafe fn store_status_word_mem(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea(op);
    t!(cpu, op, cpu.store(va, cpu.ctl.cr0 as u16));
    Op::run_next(cpu, op)
}

/// LMSW: MP, EM and TS; PE can only be set, and is.
unsafe fn load_status_word<const M: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let v = u64::from(t!(cpu, op, super::selector::<M>(cpu, op)));
    t!(cpu, op, cpu.set_cr0(cpu.ctl.cr0 & !0xe | v & 0xe));
    cpu.end(op, cpu.next_rip(op))
}

/// INVLPG.
unsafe fn invlpg(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let va = cpu.ea(op);
    cpu.invlpg(va);
    cpu.end(op, cpu.next_rip(op))
}

/// RDMSR.
unsafe fn rdmsr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let Some(v) = cpu.read_msr(cpu.reg(reg::RCX)) else {
        cpu.gp0();
        return cpu.trap(op);
    };
    cpu.set_reg(reg::RAX, v as u32);
    cpu.set_reg(reg::RDX, (v >> 32) as u32);
    Op::run_next(cpu, op)
}

/// WRMSR.
unsafe fn wrmsr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let v = u64::from(cpu.reg::<u32>(reg::RAX)) | u64::from(cpu.reg::<u32>(reg::RDX)) << 32;
    t!(cpu, op, cpu.write_msr(cpu.reg(reg::RCX), v));
    cpu.end(op, cpu.next_rip(op))
}

/// RDPMC: there are no counters.
unsafe fn rdpmc(cpu: &mut Cpu, op: *const Op) -> *const Op {
    unsupported(cpu, "rdpmc");
    cpu.gp0();
    cpu.trap(op)
}
