//! Decoding: guest bytes to sequences of operations, by iced-x86.
//!
//! Instructions are decoded as if their page lay at address 0, so that branch targets and RIP-relative displacements
//! come out relative to the page; the operations add the page's virtual address when they run. So one decoded sequence
//! serves every address the page is mapped at.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::op::{Op, reg};
use crate::ops::{self, Context, fall_through};
use crate::{simd, system, x87};

/// Longest sequence.
pub(crate) const MAX_INSTRUCTIONS: usize = 64;

/// Bytes of the longest instruction (Intel SDM volume 2, section 2.3.11).
pub(crate) const MAX_LENGTH: usize = 15;

/// What a lowering made of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lowered {
    /// Not one of the asked room's.
    No,
    /// An operation that goes on to the next.
    Plain,
    /// An operation that ends its sequence.
    Ends,
}

/// A decoded sequence.
pub(crate) struct Sequence {
    pub(crate) ops: Vec<Op>,
    /// Bytes of guest code it was decoded from.
    pub(crate) bytes: u64,
    /// The page index in which its only instruction ends, if that is another.
    pub(crate) second_page: Option<u64>,
}

/// The register's place in `Cpu::r`.
pub(crate) fn gpr(r: Register) -> u8 {
    match r {
        Register::AH => 1,
        Register::CH => 9,
        Register::DH => 17,
        Register::BH => 25,
        _ => (r.full_register().number() * 8) as u8,
    }
}

/// The register's place in `Cpu::xmm`.
pub(crate) fn xmm(r: Register) -> u8 {
    (r.number() * 16) as u8
}

/// Whether the instruction has an explicit memory operand.
pub(crate) fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// The slot of the segment base that counts for the instruction's memory operand.
pub(crate) fn segment(insn: &Instruction) -> u8 {
    match insn.memory_segment() {
        Register::FS => reg::FS,
        Register::GS => reg::GS,
        _ => reg::ZERO,
    }
}

fn blank(insn: &Instruction, offset: usize, n: usize) -> Op {
    Op {
        h: ops::undefined,
        dst: reg::ZERO,
        src: reg::ZERO,
        base: reg::ZERO,
        index: reg::ZERO,
        scale: 0,
        seg: reg::ZERO,
        len: insn.len() as u8,
        aux: 0,
        off: offset as u16,
        n: n as u16,
        disp: 0,
        imm: 0,
    }
}

/// Fills the memory operand's fields. Returns whether it has 32-bit addressing.
fn address(insn: &Instruction, op: &mut Op) -> bool {
    op.seg = segment(insn);
    op.disp = insn.memory_displacement64() as i32;
    let mut short = false;
    match insn.memory_base() {
        Register::None => {}
        Register::RIP => op.base = reg::PAGE,
        Register::EIP => {
            op.base = reg::PAGE;
            short = true;
        }
        r => {
            op.base = gpr(r);
            short = r.is_gpr32();
        }
    }
    match insn.memory_index() {
        Register::None => {}
        r => {
            op.index = gpr(r);
            op.scale = insn.memory_index_scale().trailing_zeros() as u8;
            short |= r.is_gpr32();
        }
    }
    if insn.memory_base() == Register::None && insn.memory_index() == Register::None {
        // Absolute; iced reports 32-bit addressing by the displacement's size.
        short = insn.memory_displ_size() == 4
            && insn.memory_displacement64() > i32::MAX as u64
            && insn.memory_displacement64() <= u64::from(u32::MAX);
    }
    short
}

/// MOV between the accumulator and an absolute 64-bit address.
fn wide_address(insn: &Instruction) -> bool {
    insn.memory_displ_size() == 8
        && insn.memory_base() == Register::None
        && insn.memory_index() == Register::None
        && i32::try_from(insn.memory_displacement64() as i64).is_err()
}

fn immediate(insn: &Instruction) -> u64 {
    (0..insn.op_count())
        .find(|&i| {
            matches!(
                insn.op_kind(i),
                OpKind::Immediate8
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
            )
        })
        .map_or(0, |i| insn.immediate(i))
}

/// String operands addressed by 16- or 32-bit registers: nothing on this platform makes them.
fn short_string(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        matches!(
            insn.op_kind(i),
            OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegDI
                | OpKind::MemorySegEDI
                | OpKind::MemoryESDI
                | OpKind::MemoryESEDI
        )
    })
}

/// Appends the operations of one instruction. Returns whether the sequence ends with it.
fn push(ops: &mut Vec<Op>, insn: &Instruction, offset: usize, n: usize, context: Context) -> bool {
    let mut op = blank(insn, offset, n);
    op.imm = immediate(insn);
    let mut lowered = Lowered::No;
    if !insn.is_invalid() && !short_string(insn) {
        if has_memory(insn) {
            let short = address(insn, &mut op);
            let lea = insn.mnemonic() == iced_x86::Mnemonic::Lea;
            if short || wide_address(insn) {
                let mut first = op;
                first.h = if short { ops::address32 } else { ops::address64 };
                first.aux = if lea { reg::ZERO } else { op.seg };
                first.seg = reg::ZERO;
                first.imm = insn.memory_displacement64();
                ops.push(first);
                op.base = reg::TMP;
                op.index = reg::ZERO;
                op.scale = 0;
                op.seg = reg::ZERO;
                op.disp = 0;
            }
        }
        lowered = ops::lower(insn, &mut op, context);
        if lowered == Lowered::No {
            lowered = simd::lower(insn, &mut op);
        }
        if lowered == Lowered::No {
            lowered = x87::lower(insn, &mut op);
        }
        if lowered == Lowered::No {
            lowered = system::lower(insn, &mut op);
        }
    }
    if lowered == Lowered::No {
        op.h = ops::undefined;
        op.aux = u8::from(!insn.is_invalid());
        op.imm = insn.mnemonic() as u64;
        lowered = Lowered::Ends;
    }
    ops.push(op);
    lowered == Lowered::Ends
}

/// Whether an instruction may leave flags alone that it is said to write.
fn writes_conditionally(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    match insn.mnemonic() {
        // Rotating through CF by a multiple of the size and one leaves everything as it is.
        M::Rcl | M::Rcr => true,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror => {
            insn.op1_kind() == OpKind::Register || insn.immediate8() & 31 == 0
        }
        M::Shld | M::Shrd => insn.op2_kind() == OpKind::Register || insn.immediate8() & 31 == 0,
        _ => insn.is_string_instruction(),
    }
}

/// Decodes a sequence from `bytes`, which start at `offset` in their page and end with it. `None` when the first
/// instruction needs bytes of the next page.
pub(crate) fn sequence(bytes: &[u8], offset: usize, max: usize) -> Option<Sequence> {
    let mut decoder = Decoder::with_ip(64, bytes, offset as u64, DecoderOptions::NONE);
    let mut insns: Vec<Instruction> = Vec::with_capacity(16);
    let mut cut = false;
    while insns.len() < max && decoder.can_decode() {
        let insn = decoder.decode();
        if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
            cut = true;
            break;
        }
        let ends = insn.is_invalid()
            || matches!(
                insn.flow_control(),
                iced_x86::FlowControl::UnconditionalBranch
                    | iced_x86::FlowControl::IndirectBranch
                    | iced_x86::FlowControl::Return
                    | iced_x86::FlowControl::Call
                    | iced_x86::FlowControl::IndirectCall
                    | iced_x86::FlowControl::Interrupt
                    | iced_x86::FlowControl::Exception
            );
        insns.push(insn);
        if ends {
            break;
        }
    }
    if insns.is_empty() {
        debug_assert!(cut);
        return None;
    }
    Some(build(&insns, offset))
}

/// Builds the one-instruction sequence whose bytes reach into the next page, expected at `second_pa`.
pub(crate) fn crossing(bytes: &[u8], offset: usize, second_pa: u64) -> Sequence {
    let mut decoder = Decoder::with_ip(64, bytes, offset as u64, DecoderOptions::NONE);
    let insn = decoder.decode();
    let mut sequence = build(&[insn], offset);
    let mut check = blank(&insn, offset, 1);
    check.h = check_second_page;
    check.imm = second_pa;
    sequence.ops.insert(0, check);
    sequence
}

fn build(insns: &[Instruction], offset: usize) -> Sequence {
    // Backwards: which flags does anyone read after each instruction?
    const ALL: u32 = u32::MAX;
    let mut live = ALL;
    let mut contexts = [Context { flags_live: true, jcc: None }; MAX_INSTRUCTIONS];
    for (i, insn) in insns.iter().enumerate().rev() {
        let written = insn.rflags_modified();
        contexts[i].flags_live = written & live != 0;
        if i + 1 < insns.len() && ops::is_conditional_jump(&insns[i + 1]) {
            contexts[i].jcc = Some(ops::cc_number(insns[i + 1].condition_code()));
        }
        if insn.flow_control() != iced_x86::FlowControl::Next {
            // The flags live on where it goes.
            live = ALL;
        } else {
            if !writes_conditionally(insn) {
                live &= !written;
            }
            live |= insn.rflags_read();
        }
    }
    let mut ops = Vec::with_capacity(insns.len() + 2);
    let mut at = offset;
    let mut ended = false;
    let mut last = 0;
    for (i, insn) in insns.iter().enumerate() {
        last = i + 1;
        ended = push(&mut ops, insn, at, last, contexts[i]);
        at += insn.len();
        if ended {
            break;
        }
    }
    if !ended {
        let mut end = ops[ops.len() - 1];
        end.h = fall_through;
        end.n = last as u16;
        end.disp = at as i32;
        end.imm = 0;
        ops.push(end);
    } else if let Some(jump) = ops.len().checked_sub(2).map(|i| ops[i]) {
        debug_assert!(usize::from(jump.n) <= last);
    }
    Sequence { ops, bytes: (at - offset) as u64, second_page: None }
}

/// First operation of a sequence whose instruction crosses into another page: is that page still the one?
unsafe fn check_second_page(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.slot(reg::PAGE).wrapping_add(4096);
    match cpu.fetch(va) {
        Ok(pa) if pa == (*op).imm || cpu.alone => Op::next(op),
        Ok(_) => {
            // Mapped beside another page here: run it from its own bytes.
            cpu.rip = cpu.this_rip(op);
            cpu.stop = crate::cpu::Stop::SelfModifying;
            std::ptr::null()
        }
        Err(crate::cpu::Trap) => cpu.trap(op),
    }
}
