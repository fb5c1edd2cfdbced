//! Makes instructions out of iced's operand tables, and register states that suit them.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, MemorySize, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register,
};

use super::layout::{CODE, DATA, DATA_BYTES, GS, PAGE, State};
use super::rng::Rng;

/// An instruction to test.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) insn: Instruction,
    pub(crate) bytes: Vec<u8>,
    /// Where in the code page it starts.
    pub(crate) offset: u64,
}

/// What instructions in a sequence may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operands {
    /// Anything.
    Free,
    /// Memory through R14 without index, or RIP-relative, or absolute: R14 points into the data pages.
    Sequence,
}

const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

fn nth(first: Register, n: u64) -> Register {
    Register::try_from(first as usize + n as usize).unwrap()
}

fn gpr(size: u32, rng: &mut Rng) -> Register {
    let n = rng.below(16);
    match size {
        // AL, CL, DL, BL, AH, CH, DH, BH, SPL, ... in iced's order: 20 of them.
        1 => nth(Register::AL, rng.below(20)),
        2 => nth(Register::AX, n),
        4 => nth(Register::EAX, n),
        _ => nth(Register::RAX, n),
    }
}

/// An address for an operand: anywhere in the data pages, often across a page or at an aligned place.
pub(crate) fn target(size: u64, rng: &mut Rng) -> u64 {
    let around = DATA + PAGE * (1 + rng.below(2));
    match rng.below(8) {
        0 => around - rng.below(size.max(1)),
        1 | 2 => DATA + 0x700 + rng.below(0x1800),
        3 => (DATA + 0x800 + rng.below(0x1000)) & !0x3f,
        _ => (DATA + 0x700 + rng.below(0x1800)) & !(size.clamp(1, 64).next_power_of_two() - 1),
    }
}

fn set_memory(insn: &mut Instruction, size: u64, operands: Operands, rng: &mut Rng) {
    let t = target(size, rng);
    insn.set_memory_displ_size(0);
    let small = rng.next() as i8 as i64 as u64;
    if operands == Operands::Sequence {
        match rng.below(4) {
            0 => {
                insn.set_memory_base(Register::RIP);
                insn.set_memory_displacement64(t);
                insn.set_memory_displ_size(8);
            }
            1 => {
                insn.set_memory_displacement64(t);
                insn.set_memory_displ_size(4);
            }
            _ => {
                let aligned = if size >= 16 { small & !15 } else { small };
                insn.set_memory_base(Register::R14);
                insn.set_memory_displacement64(aligned);
                insn.set_memory_displ_size(1);
            }
        }
        return;
    }
    if rng.chance(8) {
        insn.set_segment_prefix(Register::GS);
    }
    let short = rng.chance(8);
    let base = nth(if short { Register::EAX } else { Register::RAX }, rng.below(16));
    let mut index = base;
    while index == base || matches!(index, Register::RSP | Register::ESP) {
        index = nth(if short { Register::EAX } else { Register::RAX }, rng.below(16));
    }
    match rng.below(8) {
        0 => {
            insn.set_memory_base(Register::RIP);
            insn.set_memory_displacement64(t);
            insn.set_memory_displ_size(8);
        }
        1 => {
            insn.set_memory_displacement64(t);
            insn.set_memory_displ_size(4);
        }
        2 => insn.set_memory_base(base),
        3 => {
            insn.set_memory_base(base);
            insn.set_memory_displacement64(small);
            insn.set_memory_displ_size(1);
        }
        4 => {
            insn.set_memory_base(base);
            insn.set_memory_displacement64(rng.next() as i32 as i64 as u64);
            insn.set_memory_displ_size(8);
        }
        5 => {
            insn.set_memory_index(index);
            insn.set_memory_index_scale(1 << rng.below(4));
            insn.set_memory_displacement64(t);
            insn.set_memory_displ_size(8);
        }
        _ => {
            insn.set_memory_base(base);
            insn.set_memory_index(index);
            insn.set_memory_index_scale(1 << rng.below(4));
            insn.set_memory_displacement64(small);
            insn.set_memory_displ_size(1);
        }
    }
    if short && insn.memory_displ_size() == 8 {
        insn.set_memory_displ_size(4);
        insn.set_memory_displacement64(insn.memory_displacement64() & 0xffff_ffff);
    }
}

/// Builds an instance of the form; `memory` chooses between register and memory where both are possible.
/// `None` when the dice made an impossible combination.
pub(crate) fn build(
    code: Code,
    memory: bool,
    offset: u64,
    operands: Operands,
    rng: &mut Rng,
) -> Option<Case> {
    let o = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    for n in 0..o.op_count() {
        let kind = o.op_kind(n);
        let mut register = None;
        let mut mem = false;
        let mut first_imm = true;
        for m in 0..n {
            first_imm &= insn.op_kind(m) != OpKind::Immediate8 && insn.op_kind(m) != OpKind::Immediate16;
        }
        match kind {
            K::mem | K::sibmem | K::mem_mib | K::mem_mpx => mem = true,
            K::mem_offs => {
                let t = target(8, rng);
                insn.set_op_kind(n, OpKind::Memory);
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(t);
            }
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mm_or_mem | K::xmm_or_mem
                if memory =>
            {
                mem = true;
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => register = Some(gpr(1, rng)),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                register = Some(gpr(2, rng))
            }
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_reg_mem => {
                register = Some(gpr(4, rng))
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_reg_mem => {
                register = Some(gpr(8, rng))
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => register = Some(nth(Register::MM0, rng.below(8))),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm => register = Some(nth(Register::XMM0, rng.below(16))),
            K::al => register = Some(Register::AL),
            K::cl => register = Some(Register::CL),
            K::ax => register = Some(Register::AX),
            K::dx => register = Some(Register::DX),
            K::eax => register = Some(Register::EAX),
            K::rax => register = Some(Register::RAX),
            K::es => register = Some(Register::ES),
            K::cs => register = Some(Register::CS),
            K::ss => register = Some(Register::SS),
            K::ds => register = Some(Register::DS),
            K::fs => register = Some(Register::FS),
            K::gs => register = Some(Register::GS),
            K::seg_reg => register = Some(nth(Register::ES, rng.below(6))),
            K::cr_reg => register = Some(Register::CR0),
            K::dr_reg => register = Some(Register::DR0),
            K::st0 => register = Some(Register::ST0),
            K::sti_opcode => register = Some(nth(Register::ST0, rng.below(8))),
            K::imm8_const_1 => {
                insn.set_op_kind(n, OpKind::Immediate8);
                insn.set_immediate8(1);
            }
            K::imm8 if first_imm => {
                insn.set_op_kind(n, OpKind::Immediate8);
                insn.set_immediate8(if rng.chance(50) { rng.next() as u8 } else { rng.below(72) as u8 });
            }
            K::imm8 => {
                insn.set_op_kind(n, OpKind::Immediate8_2nd);
                insn.set_immediate8_2nd(rng.below(4) as u8);
            }
            K::imm8sex16 => {
                insn.set_op_kind(n, OpKind::Immediate8to16);
                insn.set_immediate8to16(rng.next() as i8 as i16);
            }
            K::imm8sex32 => {
                insn.set_op_kind(n, OpKind::Immediate8to32);
                insn.set_immediate8to32(rng.next() as i8 as i32);
            }
            K::imm8sex64 => {
                insn.set_op_kind(n, OpKind::Immediate8to64);
                insn.set_immediate8to64(rng.next() as i8 as i64);
            }
            K::imm16 => {
                insn.set_op_kind(n, OpKind::Immediate16);
                let frame = matches!(code.mnemonic(), Mnemonic::Enter | Mnemonic::Ret);
                insn.set_immediate16(if frame { rng.below(256) as u16 } else { rng.value() as u16 });
            }
            K::imm32 => {
                insn.set_op_kind(n, OpKind::Immediate32);
                insn.set_immediate32(rng.value() as u32);
            }
            K::imm32sex64 => {
                insn.set_op_kind(n, OpKind::Immediate32to64);
                insn.set_immediate32to64(i64::from(rng.value() as i32));
            }
            K::imm64 => {
                insn.set_op_kind(n, OpKind::Immediate64);
                insn.set_immediate64(rng.value());
            }
            K::seg_rSI => insn.set_op_kind(n, OpKind::MemorySegRSI),
            K::es_rDI => insn.set_op_kind(n, OpKind::MemoryESRDI),
            K::seg_rDI => insn.set_op_kind(n, OpKind::MemorySegRDI),
            K::seg_rBX_al => {
                insn.set_op_kind(n, OpKind::Memory);
                insn.set_memory_base(Register::RBX);
                insn.set_memory_index(Register::AL);
            }
            K::br64_1 | K::br64_4 => {
                // One byte behind the instruction's end, which is at most 15 away: fixed up once its length is known.
                insn.set_op_kind(n, OpKind::NearBranch64);
                insn.set_near_branch64(CODE + offset + 16);
            }
            _ => return None,
        }
        if let Some(r) = register {
            insn.set_op_kind(n, OpKind::Register);
            insn.set_op_register(n, r);
        }
        if mem {
            insn.set_op_kind(n, OpKind::Memory);
            let size = operand_size(&insn).min(64);
            set_memory(&mut insn, size, operands, rng);
        }
    }
    if o.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && rng.chance(30) {
        insn.set_has_lock_prefix(true);
    }
    if o.can_use_rep_prefix() && o.op_count() > 0 && rng.chance(60) {
        insn.set_has_rep_prefix(true);
    } else if o.can_use_repne_prefix() && insn.is_string_instruction() && rng.chance(60) {
        insn.set_has_repne_prefix(true);
    }
    let mut encoder = Encoder::new(64);
    let mut len = encoder.encode(&insn, CODE + offset).ok()?;
    if insn.op_count() > 0 && insn.op0_kind() == OpKind::NearBranch64 {
        insn.set_near_branch64(CODE + offset + len as u64 + 1);
        encoder = Encoder::new(64);
        len = encoder.encode(&insn, CODE + offset).ok()?;
    }
    let bytes = encoder.take_buffer();
    // A call to where RSP points writes over the code it calls.
    if code == Code::Call_rm64 && insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::RSP
    {
        return None;
    }
    // A bit offset that is also the address may leave 32-bit addressing's range: nobody writes that.
    if matches!(code.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register
        && [insn.memory_base(), insn.memory_index()].iter().any(|r| r.is_gpr32())
    {
        return None;
    }
    // What counts is what the bytes say.
    let decoded = Decoder::with_ip(64, &bytes, CODE + offset, DecoderOptions::NONE).decode();
    if decoded.is_invalid() || decoded.len() != len || decoded.code() != code {
        return None;
    }
    Some(Case { insn: decoded, bytes, offset })
}

pub(crate) fn operand_size(insn: &Instruction) -> u64 {
    match insn.memory_size() {
        MemorySize::Unknown => 8,
        m => m.size().max(1) as u64,
    }
}

/// Index of a general register in encoding order.
fn number(r: Register) -> usize {
    r.full_register() as usize - Register::RAX as usize
}

fn write_bytes(image: &mut [u8; 512], at: usize, v: [u64; 2]) {
    image[at..at + 8].copy_from_slice(&v[0].to_le_bytes());
    image[at + 8..at + 16].copy_from_slice(&v[1].to_le_bytes());
}

/// A random floating-point state; `calm` leaves all exceptions masked and no x87 exception pending.
pub(crate) fn fx_state(calm: bool, rng: &mut Rng) -> Box<[u8; 512]> {
    let mut image = Box::new([0u8; 512]);
    let mut fcw = 0x37f_u16;
    if rng.chance(40) {
        fcw = fcw & !0xf00 | (rng.pick(&[0u16, 2, 3]) << 8) | (rng.below(4) as u16) << 10;
    }
    let mut fsw = (rng.below(8) as u16) << 11 | (rng.next() as u16 & 0x4700);
    if rng.chance(30) {
        fsw |= rng.next() as u16 & 0x7f;
    }
    if !calm {
        fcw = fcw & !0x3f | rng.next() as u16 & 0x3f;
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    let ftw = match rng.below(4) {
        0 => rng.next() as u8,
        1 => 0,
        _ => 0xff,
    };
    image[..2].copy_from_slice(&fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fsw.to_le_bytes());
    image[4] = ftw;
    let mut mxcsr = 0x1f80_u32;
    if rng.chance(40) {
        mxcsr |= rng.next() as u32 & 0xe07f & !0x1f80;
    }
    if !calm && rng.chance(70) {
        // All but overflow and underflow: unmasked, these are judged by the result before it is squeezed into the
        // format, which a CPU that computes with masked exceptions does not see.
        mxcsr &= !(rng.next() as u32 & 0x1380);
    }
    image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for i in 0..8 {
        let v = rng.extended();
        write_bytes(&mut image, 32 + 16 * i, v);
    }
    let same = rng.chance(20).then(|| rng.vector());
    for i in 0..16 {
        let v = match same {
            Some(v) if rng.chance(50) => v,
            _ => rng.vector(),
        };
        write_bytes(&mut image, 160 + 16 * i, v);
    }
    image
}

/// Random registers; RSP points into the data pages.
pub(crate) fn state(calm: bool, rng: &mut Rng) -> State {
    let mut gpr = [0; 16];
    let same = rng.value();
    for r in &mut gpr {
        *r = if rng.chance(15) { same } else { rng.value() };
    }
    gpr[4] = target(16, rng) & !7;
    const ARITHMETIC: u64 = 0x8d5;
    let mut rflags = 0x202 | rng.next() & ARITHMETIC;
    if rng.chance(20) {
        rflags |= 0x400;
    }
    State { gpr, rflags, rip: CODE, fx: fx_state(calm, rng) }
}

/// A state for a single instruction: registers that its operands want, and bytes to put at an offset of the data pages.
pub(crate) fn state_for(case: &Case, calm: bool, rng: &mut Rng) -> (State, usize, Vec<u8>) {
    let insn = &case.insn;
    let mut s = state(calm, rng);
    s.rip = CODE + case.offset;
    let size = operand_size(insn);
    let mut at = target(size, rng);
    if rng.chance(3) {
        // Beyond either end of the data pages, or across it.
        at = if rng.chance(50) {
            DATA - rng.below(size + 1)
        } else {
            DATA + DATA_BYTES as u64 - rng.below(size + 1)
        };
    }
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Div | M::Idiv => {
            let bits = 8 * match insn.op0_kind() {
                OpKind::Register => insn.op0_register().size() as u32,
                _ => size as u32,
            };
            // Quotients that fit, most of the time.
            match rng.below(4) {
                0 => {}
                1 => s.gpr[2] = 0,
                2 => s.gpr[2] = ((s.gpr[0] << (64 - bits)) as i64 >> 63) as u64,
                _ => s.gpr[2] = rng.below(16),
            }
            if bits == 8 && rng.chance(75) {
                s.gpr[0] = rng.below(512).wrapping_sub(256) & 0xffff;
            }
        }
        M::Leave | M::Enter => s.gpr[5] = target(8, rng),
        M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz if rng.chance(60) => s.gpr[1] = rng.below(3),
        M::Maskmovq | M::Maskmovdqu => s.gpr[7] = target(16, rng),
        _ => {}
    }
    if insn.is_string_instruction() {
        for r in [6, 7] {
            s.gpr[r] = target(size, rng);
        }
        if rng.chance(15) {
            s.gpr[7] = s.gpr[6].wrapping_add(rng.below(40)).wrapping_sub(20);
        }
        s.gpr[1] = match rng.below(10) {
            0 => 0,
            1 => rng.below(600),
            _ => rng.below(40),
        };
        if insn.segment_prefix() == Register::GS {
            s.gpr[6] = s.gpr[6].wrapping_sub(GS);
        }
        at = s.gpr[6];
    }
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if memory && insn.mnemonic() == M::Xlatb {
        s.gpr[3] = at.wrapping_sub(s.gpr[0] & 0xff);
    } else if memory {
        at = place(insn, at, &mut s, rng);
    }
    let bit_test = matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
    if bit_test && memory && insn.op1_kind() == OpKind::Register {
        let n = number(insn.op1_register());
        let pointer =
            |r: Register| r != Register::None && r != Register::RIP && r != Register::EIP && number(r) == n;
        if !pointer(insn.memory_base()) && !pointer(insn.memory_index()) {
            s.gpr[n] = rng.below(4096 * 8).wrapping_sub(4096 * 4);
            if insn.op1_register().size() == 2 {
                s.gpr[n] &= 0xffff;
            }
        }
    }
    // What the operand holds.
    let mut content = Vec::new();
    for _ in 0..4 {
        let v = if insn.mnemonic().is_x87() && rng.chance(60) { rng.extended() } else { rng.vector() };
        content.extend_from_slice(&v[0].to_le_bytes());
        content.extend_from_slice(&v[1].to_le_bytes());
    }
    match insn.mnemonic() {
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if rng.chance(60) => {
            let (a, d) = (s.gpr[0].to_le_bytes(), s.gpr[2].to_le_bytes());
            content[..8].copy_from_slice(&a);
            if insn.mnemonic() == M::Cmpxchg8b {
                content[4..8].copy_from_slice(&d[..4]);
            } else if insn.mnemonic() == M::Cmpxchg16b {
                content[8..16].copy_from_slice(&d);
            } else if insn.op0_kind() == OpKind::Register {
                let n = number(insn.op0_register());
                s.gpr[n] = s.gpr[0];
            }
        }
        M::Ret => {
            at = s.gpr[4];
            content[..8].copy_from_slice(
                &(CODE + case.offset + case.bytes.len() as u64 + rng.below(2)).to_le_bytes(),
            );
        }
        M::Jmp | M::Call if insn.op0_kind() == OpKind::Register || memory => {
            let to = CODE + case.offset + case.bytes.len() as u64 + rng.below(2);
            if memory {
                content[..8].copy_from_slice(&to.to_le_bytes());
            } else {
                s.gpr[number(insn.op0_register())] = to;
            }
        }
        M::Popf | M::Popfq => {
            at = s.gpr[4];
            // Neither single-stepping nor alignment checks nor nested tasks.
            let flags = rng.next() & 0x20_0ed5 | 2;
            content[..8].copy_from_slice(&flags.to_le_bytes());
        }
        M::Ldmxcsr if rng.chance(70) => {
            content[..4].copy_from_slice(&(rng.next() as u32 & 0xffff).to_le_bytes());
        }
        M::Fxrstor | M::Fxrstor64 => {
            content = fx_state(rng.chance(50), rng).to_vec();
        }
        _ => {}
    }
    let mut offset = at.wrapping_sub(DATA);
    if offset >= DATA_BYTES as u64 {
        offset = 0;
    }
    let offset = offset as usize;
    content.truncate(DATA_BYTES - offset);
    (s, offset, content)
}

trait IsX87 {
    fn is_x87(&self) -> bool;
}

impl IsX87 for Mnemonic {
    fn is_x87(&self) -> bool {
        format!("{self:?}").starts_with('F')
    }
}

/// Sets the operand's address registers so that it lies at `at`; returns where it really lies.
fn place(insn: &Instruction, at: u64, s: &mut State, rng: &mut Rng) -> u64 {
    let segment = if insn.segment_prefix() == Register::GS { GS } else { 0 };
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let disp = insn.memory_displacement64();
    if base == Register::RIP || base == Register::EIP {
        return insn.ip_rel_memory_address().wrapping_add(segment);
    }
    let short = base.is_gpr32() || index.is_gpr32();
    let mask = if short { 0xffff_ffff } else { u64::MAX };
    if base == Register::None && index == Register::None {
        return disp.wrapping_add(segment);
    }
    if base == Register::None {
        let n = number(index);
        let k = rng.below(32);
        s.gpr[n] = k | s.gpr[n] & !mask;
        return disp.wrapping_add(k.wrapping_mul(scale)).wrapping_add(segment);
    }
    let scaled = if index == Register::None { 0 } else { s.gpr[number(index)].wrapping_mul(scale) };
    let mut want = at.wrapping_sub(segment).wrapping_sub(disp).wrapping_sub(scaled) & mask;
    if short {
        want |= s.gpr[number(base)] & !mask;
    }
    s.gpr[number(base)] = want;
    at
}

/// The registers in encoding order, for messages.
pub(crate) fn names() -> impl Iterator<Item = Register> {
    GPR64.into_iter()
}
