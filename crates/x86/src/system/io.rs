//! Port input and output: IN, OUT, INS, OUTS and the I/O permission map (Intel SDM vol. 1, chapter 18).

use iced_x86::{Code, Instruction, Register};

use crate::cpu::{Cpu, Trap};
use crate::decode::Lowered;
use crate::flags::bit;
use crate::mem::Int;
use crate::op::{Handler, Op, reg};
use crate::ops::t;
use crate::system::attr;

/// `Op::aux` of string instructions: repeat ...
const REPEAT: u8 = 1;
/// ... and 32-bit addresses.
const ADDRESS32: u8 = 2;

/// Lowers port instructions.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    use Code::*;
    let h: Handler = match insn.code() {
        In_AL_imm8 | In_AL_DX => input::<u8>,
        In_AX_imm8 | In_AX_DX => input::<u16>,
        In_EAX_imm8 | In_EAX_DX => input::<u32>,
        Out_imm8_AL | Out_DX_AL => output::<u8>,
        Out_imm8_AX | Out_DX_AX => output::<u16>,
        Out_imm8_EAX | Out_DX_EAX => output::<u32>,
        Insb_m8_DX => input_string::<u8>,
        Insw_m16_DX => input_string::<u16>,
        Insd_m32_DX => input_string::<u32>,
        Outsb_DX_m8 => output_string::<u8>,
        Outsw_DX_m16 => output_string::<u16>,
        Outsd_DX_m32 => output_string::<u32>,
        _ => return Lowered::No,
    };
    op.h = h;
    match insn.code() {
        In_AL_imm8 | In_AX_imm8 | In_EAX_imm8 | Out_imm8_AL | Out_imm8_AX | Out_imm8_EAX => {
            op.aux = 1;
            op.imm = u64::from(insn.immediate8());
        }
        In_AL_DX | In_AX_DX | In_EAX_DX | Out_DX_AL | Out_DX_AX | Out_DX_EAX => op.aux = 0,
        _ => {
            op.aux = if insn.has_rep_prefix() || insn.has_repne_prefix() { REPEAT } else { 0 };
            if (0..insn.op_count()).any(|i| {
                matches!(insn.op_kind(i), iced_x86::OpKind::MemoryESEDI | iced_x86::OpKind::MemorySegESI)
            }) {
                op.aux |= ADDRESS32;
            }
            op.seg = match insn.memory_segment() {
                Register::FS => reg::FS,
                Register::GS => reg::GS,
                _ => reg::ZERO,
            };
        }
    }
    // The sequence ends: a device may have raised an interrupt or stopped the machine.
    Lowered::Ends
}

impl Cpu {
    /// Checks the right to use `bytes` ports from `port` on.
    unsafe fn may_use_ports(&mut self, port: u16, bytes: u64) -> Result<(), Trap> {
        if self.cpl <= self.iopl() { Ok(()) } else { self.port_map(port, bytes) }
    }

    #[cold]
    unsafe fn port_map(&mut self, port: u16, bytes: u64) -> Result<(), Trap> {
        let limit = u64::from(self.tr.limit);
        if self.tr.attributes & attr::P == 0 || limit < 0x67 {
            return Err(self.gp0());
        }
        let map: u16 = self.load_sys(self.tr.base.wrapping_add(0x66))?;
        let at = u64::from(map) + u64::from(port) / 8;
        // Two bytes are read always, so that a range may cross a byte.
        if at + 1 > limit {
            return Err(self.gp0());
        }
        let bits: u16 = self.load_sys(self.tr.base.wrapping_add(at))?;
        if bits >> (port & 7) & ((1 << bytes) - 1) != 0 {
            return Err(self.gp0());
        }
        Ok(())
    }

    unsafe fn port_read<T: Int>(&mut self, port: u16) -> T {
        let mut data = [0xff; 8];
        if let Some(mut bus) = self.bus {
            bus.as_mut().io_read(port, &mut data[..T::BYTES as usize]);
        }
        T::from_u64(u64::from_le_bytes(data))
    }

    unsafe fn port_write<T: Int>(&mut self, port: u16, v: T) {
        if let Some(mut bus) = self.bus {
            bus.as_mut().io_write(port, &v.to_u64().to_le_bytes()[..T::BYTES as usize]);
        }
    }
}

#[inline(always)]
unsafe fn port_operand(cpu: &Cpu, op: *const Op) -> u16 {
    if (*op).aux != 0 { (*op).imm as u16 } else { cpu.reg(reg::RDX) }
}

/// IN: the port is `imm` or, with `aux` 0, DX.
unsafe fn input<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let port = port_operand(cpu, op);
    t!(cpu, op, cpu.may_use_ports(port, T::BYTES));
    let v: T = cpu.port_read(port);
    cpu.set_reg(reg::RAX, v);
    cpu.end(op, cpu.next_rip(op))
}

/// OUT.
unsafe fn output<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let port = port_operand(cpu, op);
    t!(cpu, op, cpu.may_use_ports(port, T::BYTES));
    cpu.port_write(port, cpu.reg::<T>(reg::RAX));
    cpu.end(op, cpu.next_rip(op))
}

/// Runs the iterations of INS or OUTS: `step` does one with the index register's value. A fault leaves the registers
/// at the iteration that failed.
#[inline(always)]
unsafe fn repeat<T: Int>(
    cpu: &mut Cpu,
    op: *const Op,
    index: u8,
    step: unsafe fn(&mut Cpu, *const Op, u16, u64) -> Result<(), Trap>,
) -> *const Op {
    let port: u16 = cpu.reg(reg::RDX);
    let short = (*op).aux & ADDRESS32 != 0;
    let mask = if short { 0xffff_ffff } else { u64::MAX };
    let delta = if cpu.rflags & bit::DF != 0 { T::BYTES.wrapping_neg() } else { T::BYTES };
    loop {
        let count = cpu.slot(reg::RCX) & mask;
        if (*op).aux & REPEAT != 0 && count == 0 {
            break;
        }
        t!(cpu, op, cpu.may_use_ports(port, T::BYTES));
        let at = cpu.slot(index) & mask;
        t!(cpu, op, step(cpu, op, port, at));
        cpu.set_slot(index, at.wrapping_add(delta) & mask);
        if (*op).aux & REPEAT == 0 {
            break;
        }
        cpu.set_slot(reg::RCX, count.wrapping_sub(1));
    }
    cpu.end(op, cpu.next_rip(op))
}

/// INS.
unsafe fn input_string<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    repeat::<T>(cpu, op, reg::RDI, |cpu, _, port, at| {
        // The device must not see a read whose result cannot be stored.
        cpu.probe_write(at, T::BYTES)?;
        let v: T = cpu.port_read(port);
        cpu.store(at, v)
    })
}

/// OUTS.
unsafe fn output_string<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    repeat::<T>(cpu, op, reg::RSI, |cpu, op, port, at| {
        let v: T = cpu.load(at.wrapping_add(cpu.slot((*op).seg)))?;
        cpu.port_write(port, v);
        Ok(())
    })
}
