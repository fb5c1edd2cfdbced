//! Straight-line code with forward jumps, and loops around it: what decoding ahead, dead flags, fused compares and
//! branches, and linked sequences could get wrong.

use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::catalog::{exempt, forms, offered};
use super::generate::{Case, Operands, build};
use super::layout::{CODE, CODE_BYTES, DATA, PAGE};
use super::rng::Rng;

pub(crate) struct Sequence {
    pub(crate) insns: Vec<Instruction>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) offset: u64,
    /// RFLAGS bits that are undefined at its end, in iced's terms.
    pub(crate) undefined: u32,
}

/// Where R14 points.
pub(crate) const POINTER: u64 = DATA + PAGE + 0x800;

/// The forms that sequences are made of, by kind.
pub(crate) struct Pool {
    /// The most frequent integer instructions.
    common: Vec<Code>,
    integer: Vec<Code>,
    vector: Vec<Code>,
    x87: Vec<Code>,
    jumps: Vec<Code>,
}

fn usable(code: Code) -> bool {
    use Mnemonic as M;
    let insn = {
        let mut i = Instruction::default();
        i.set_code(code);
        i
    };
    if insn.flow_control() != FlowControl::Next
        || insn.is_string_instruction()
        || insn.is_save_restore_instruction()
    {
        return false;
    }
    !matches!(
        code.mnemonic(),
        M::Enter
            | M::Leave
            | M::Xlatb
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Popf
            | M::Popfq
            | M::Ldmxcsr
            | M::Fldcw
            | M::Fldenv
            | M::Fnstenv
            | M::Frstor
            | M::Fnsave
            | M::Shld
            | M::Shrd
            | M::Ud0
            | M::Ud1
            | M::Ud2
    )
}

impl Pool {
    pub(crate) fn new() -> Pool {
        use Mnemonic as M;
        let all: Vec<Code> = forms().into_iter().filter(|&c| offered(c) && exempt(c).is_none()).collect();
        let jumps = all
            .iter()
            .copied()
            .filter(|c| {
                let name = format!("{c:?}");
                name.starts_with('J') && name.contains("_rel") && !name.starts_with("Jmp")
            })
            .collect();
        let (mut common, mut integer, mut vector, mut x87) = (vec![], vec![], vec![], vec![]);
        for code in all.into_iter().filter(|&c| usable(c)) {
            let features = code.cpuid_features();
            if format!("{:?}", code.mnemonic()).starts_with('F')
                || features.contains(&CpuidFeature::FPU)
                || format!("{code:?}").contains("_mm")
            {
                x87.push(code);
            } else if features.iter().any(|f| {
                use CpuidFeature as F;
                matches!(f, F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 | F::MMX)
            }) {
                vector.push(code);
            } else {
                integer.push(code);
                if matches!(
                    code.mnemonic(),
                    M::Add
                        | M::Adc
                        | M::Sub
                        | M::Sbb
                        | M::Cmp
                        | M::Test
                        | M::And
                        | M::Or
                        | M::Xor
                        | M::Inc
                        | M::Dec
                        | M::Neg
                        | M::Mov
                        | M::Movzx
                        | M::Lea
                        | M::Shl
                        | M::Shr
                        | M::Sar
                ) {
                    common.push(code);
                }
            }
        }
        Pool { common, integer, vector, x87, jumps }
    }

    fn pick(&self, rng: &mut Rng) -> Code {
        match rng.below(20) {
            0..10 => rng.pick(&self.common),
            10..14 => rng.pick(&self.integer),
            14..18 => rng.pick(&self.vector),
            _ => rng.pick(&self.x87),
        }
    }
}

/// Whether the instruction leaves alone what sequences need: R14, R15 and, but for pushes and pops, RSP.
fn harmless(insn: &Instruction) -> bool {
    let stack =
        matches!(insn.mnemonic(), Mnemonic::Push | Mnemonic::Pop | Mnemonic::Pushf | Mnemonic::Pushfq);
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    let bit_string = matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register;
    let names_rsp =
        insn.op_count() > 0 && insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::RSP;
    let excluded = bit_string || stack && names_rsp;
    !excluded
        && info.used_registers().iter().all(|u| {
            let writes = !matches!(
                u.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            match u.register().full_register() {
                Register::R14 | Register::R15 => !writes,
                Register::RSP => !writes || stack,
                _ => true,
            }
        })
}

/// Shifts and rotates that may leave flags as they were.
fn conditional(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr)
}

const SUB_R15_1: [u8; 4] = [0x49, 0x83, 0xef, 0x01];

/// Builds a sequence of 5 to 20 instructions. With `times` above 1 it is a loop, counted in R15.
pub(crate) fn sequence(pool: &Pool, times: u64, rng: &mut Rng) -> Sequence {
    let count = 5 + rng.below(16) as usize;
    let offset = match rng.below(4) {
        // Across the page boundary.
        0 => PAGE - rng.below(80),
        _ => 0x40 + rng.below(CODE_BYTES as u64 - 0x400),
    };
    let mut insns: Vec<Instruction> = Vec::new();
    let mut bytes: Vec<u8> = Vec::new();
    let mut starts: Vec<usize> = Vec::new();
    // (instruction, instruction it jumps to)
    let mut jumps: Vec<(usize, usize)> = Vec::new();
    let mut pending = vec![0u32; count + 1];
    let mut undefined = 0u32;
    while insns.len() < count {
        let n = insns.len();
        let at = offset + bytes.len() as u64;
        let jump = rng.chance(15);
        let code = if jump { rng.pick(&pool.jumps) } else { pool.pick(rng) };
        let memory = rng.chance(35);
        let Some(Case { insn, bytes: code, .. }) = build(code, memory, at, Operands::Sequence, rng) else {
            continue;
        };
        undefined |= pending[n];
        if insn.rflags_read() & undefined != 0 || !harmless(&insn) {
            continue;
        }
        if jump {
            let to = n + 1 + rng.below((count - n) as u64) as usize;
            jumps.push((n, to));
            pending[to] |= undefined;
        }
        if !conditional(&insn) {
            undefined &= !(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
        }
        undefined |= insn.rflags_undefined();
        starts.push(bytes.len());
        bytes.extend(code);
        insns.push(insn);
    }
    starts.push(bytes.len());
    undefined |= pending[count];
    for (n, to) in jumps {
        let end = starts[n + 1];
        let distance = starts[to] as i64 - end as i64;
        let insn = &insns[n];
        if insn.len() - insn_prefixes(&bytes[starts[n]..end]) == 2 {
            // 20 instructions fit into what a byte reaches, but for rare giants: then it jumps to the next.
            bytes[end - 1] = i8::try_from(distance).unwrap_or(0) as u8;
        } else {
            bytes[end - 4..end].copy_from_slice(&(distance as i32).to_le_bytes());
        }
    }
    if times > 1 {
        bytes.extend(SUB_R15_1);
        let back = -(bytes.len() as i32 + 6);
        bytes.extend([0x0f, 0x85]);
        bytes.extend(back.to_le_bytes());
        undefined = 0;
    }
    bytes.push(0xcc);
    assert!(offset as usize + bytes.len() <= CODE_BYTES, "The code pages are too small");
    debug_assert_eq!(insns[0].ip(), CODE + offset);
    Sequence { insns, bytes, offset, undefined }
}

/// Prefix bytes in front of a jump's opcode.
fn insn_prefixes(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| matches!(b, 0x66 | 0x67 | 0x2e | 0x3e)).count()
}
