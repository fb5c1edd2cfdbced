//! Picks the handler of an integer instruction.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{Dst, Imm, Mem, Src, alu, bits, branch, mov, muldiv, shift, string};
use crate::decode::{Lowered, gpr, has_memory};
use crate::op::{Handler, Op, reg};

/// What is known of an instruction's surroundings.
#[derive(Clone, Copy)]
pub(crate) struct Context {
    /// Whether anything may read the flags it writes.
    pub(crate) flags_live: bool,
    /// The condition code of the Jcc that follows it, in the same sequence.
    pub(crate) jcc: Option<u8>,
}

/// Evaluates an expression with `$T` as the integer type of `$size` bytes.
macro_rules! sized {
    ($size:expr, $T:ident, $e:expr) => {
        match $size {
            1 => {
                type $T = u8;
                $e
            }
            2 => {
                type $T = u16;
                $e
            }
            4 => {
                type $T = u32;
                $e
            }
            _ => {
                type $T = u64;
                $e
            }
        }
    };
}

/// Where the first two operands are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    RegReg,
    RegMem,
    MemReg,
    RegImm,
    MemImm,
    Other,
}

fn is_imm(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn form(insn: &Instruction) -> Form {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Form::RegReg,
        (OpKind::Register, OpKind::Memory) => Form::RegMem,
        (OpKind::Memory, OpKind::Register) => Form::MemReg,
        (OpKind::Register, k) if is_imm(k) => Form::RegImm,
        (OpKind::Memory, k) if is_imm(k) => Form::MemImm,
        _ => Form::Other,
    }
}

/// Size in bytes of the first operand.
fn size0(insn: &Instruction) -> usize {
    match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        _ => insn.memory_size().size(),
    }
}

/// Size in bytes of the second operand.
fn size1(insn: &Instruction) -> usize {
    match insn.op1_kind() {
        OpKind::Register => insn.op1_register().size(),
        _ => insn.memory_size().size(),
    }
}

/// Base + displacement alone.
fn is_simple(op: &Op) -> bool {
    op.index == reg::ZERO && op.seg == reg::ZERO
}

fn alu_for<O: alu::Alu>(insn: &Instruction, live: bool) -> Option<Handler> {
    macro_rules! h {
        ($D:ty, $S:ty) => {
            sized!(
                size0(insn),
                T,
                if live {
                    alu::alu::<T, O, $D, $S, true> as Handler
                } else {
                    alu::alu::<T, O, $D, $S, false>
                }
            )
        };
    }
    Some(match form(insn) {
        Form::RegReg => h!(Dst, Src),
        Form::RegMem => h!(Dst, Mem),
        Form::MemReg => h!(Mem, Src),
        Form::RegImm => h!(Dst, Imm),
        Form::MemImm => h!(Mem, Imm),
        Form::Other => return None,
    })
}

fn compare_for<O: alu::Alu>(insn: &Instruction, jcc: Option<u8>) -> Option<Handler> {
    macro_rules! h {
        ($D:ty, $S:ty) => {
            sized!(
                size0(insn),
                T,
                match jcc {
                    Some(cc) => alu::compare_jump_for::<T, O, $D, $S>(cc),
                    None => alu::compare::<T, O, $D, $S> as Handler,
                }
            )
        };
    }
    Some(match form(insn) {
        Form::RegReg => h!(Dst, Src),
        Form::RegMem => h!(Dst, Mem),
        Form::MemReg => h!(Mem, Src),
        Form::RegImm => h!(Dst, Imm),
        Form::MemImm => h!(Mem, Imm),
        Form::Other => return None,
    })
}

fn mov_for(insn: &Instruction, op: &Op) -> Option<Handler> {
    let simple = is_simple(op);
    Some(sized!(
        size0(insn),
        T,
        match form(insn) {
            Form::RegReg => mov::mov::<T, Dst, Src> as Handler,
            Form::RegMem => mov::load_for::<T>(simple),
            Form::MemReg => mov::store_for::<T>(simple),
            Form::RegImm => mov::mov::<T, Dst, Imm>,
            Form::MemImm => mov::mov::<T, Mem, Imm>,
            Form::Other => return None,
        }
    ))
}

fn extend_for(insn: &Instruction, signed: bool) -> Option<Handler> {
    let mem = has_memory(insn);
    macro_rules! h {
        ($D:ty, $S:ty) => {
            match (signed, mem) {
                (false, false) => mov::movzx::<$D, $S, Src> as Handler,
                (false, true) => mov::movzx::<$D, $S, Mem>,
                (true, false) => mov::movsx::<$D, $S, Src>,
                (true, true) => mov::movsx::<$D, $S, Mem>,
            }
        };
    }
    Some(match (size0(insn), size1(insn)) {
        (2, 1) => h!(u16, u8),
        (4, 1) => h!(u32, u8),
        (8, 1) => h!(u64, u8),
        (2, 2) => h!(u16, u16),
        (4, 2) => h!(u32, u16),
        (8, 2) => h!(u64, u16),
        (4, 4) => h!(u32, u32),
        (8, 4) => h!(u64, u32),
        _ => return None,
    })
}

/// Handler for a one-operand instruction in register or memory.
macro_rules! unary {
    ($insn:expr, |$T:ident, $D:ident| $e:expr) => {
        if $insn.op0_kind() == OpKind::Register {
            type $D = Dst;
            sized!(size0($insn), $T, $e)
        } else {
            type $D = Mem;
            sized!(size0($insn), $T, $e)
        }
    };
}

/// Handler for a one-operand instruction that only reads it (its register goes to `src`).
macro_rules! unary_source {
    ($insn:expr, |$T:ident, $S:ident| $e:expr) => {
        if $insn.op0_kind() == OpKind::Register {
            type $S = Src;
            sized!(size0($insn), $T, $e)
        } else {
            type $S = Mem;
            sized!(size0($insn), $T, $e)
        }
    };
}

fn shift_for<O: shift::Shift>(insn: &Instruction, op: &mut Op) -> Handler {
    let mask = if size0(insn) == 8 { 63 } else { 31 };
    if insn.op1_kind() == OpKind::Register {
        return unary!(insn, |T, D| shift::by_cl::<T, O, D> as Handler);
    }
    op.aux = insn.immediate8() & mask;
    if op.aux == 0 {
        // A 32-bit register is written, and so extended, all the same; and memory is written, and may fault.
        return unary!(insn, |T, D| shift::by_zero::<T, D> as Handler);
    }
    unary!(insn, |T, D| shift::by_imm::<T, O, D> as Handler)
}

fn bits_for<const KIND: u8>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let size = size0(insn);
    Some(match form(insn) {
        Form::RegReg => sized!(size, T, bits::bit_op::<T, Dst, Src, KIND> as Handler),
        Form::RegImm => sized!(size, T, bits::bit_op::<T, Dst, Imm, KIND> as Handler),
        Form::MemImm => sized!(size, T, bits::bit_op::<T, Mem, Imm, KIND> as Handler),
        Form::MemReg => sized!(size1(insn), T, bits::bit_string::<T, KIND> as Handler),
        _ => {
            op.aux = 0;
            return None;
        }
    })
}

fn prefix_of(insn: &Instruction) -> u8 {
    if insn.has_repne_prefix() { 2 } else { u8::from(insn.has_rep_prefix()) }
}

/// Fills `op` for an integer instruction, or says that it is none of ours.
pub(crate) fn lower(insn: &Instruction, op: &mut Op, context: Context) -> Lowered {
    use Mnemonic as M;
    // Registers go where the forms expect them.
    if insn.op0_kind() == OpKind::Register && insn.op0_register().is_gpr() {
        op.dst = gpr(insn.op0_register());
    }
    if insn.op_count() > 1 && insn.op1_kind() == OpKind::Register && insn.op1_register().is_gpr() {
        op.src = gpr(insn.op1_register());
    } else if insn.op_count() == 1 && insn.op0_kind() == OpKind::Register && insn.op0_register().is_gpr() {
        op.src = op.dst;
    }
    let live = context.flags_live;
    let mnemonic = insn.mnemonic();
    let handler: Option<Handler> = match mnemonic {
        M::Add => alu_for::<alu::Add>(insn, live),
        M::Adc => alu_for::<alu::Adc>(insn, live),
        M::Sub => alu_for::<alu::Sub>(insn, live),
        M::Sbb => alu_for::<alu::Sbb>(insn, live),
        M::And => alu_for::<alu::And>(insn, live),
        M::Or => alu_for::<alu::Or>(insn, live),
        M::Xor => alu_for::<alu::Xor>(insn, live),
        M::Cmp => compare_for::<alu::Sub>(insn, context.jcc),
        M::Test => compare_for::<alu::And>(insn, context.jcc),
        M::Inc => Some(unary!(insn, |T, D| if live {
            alu::step::<T, alu::Add, D, true> as Handler
        } else {
            alu::step::<T, alu::Add, D, false>
        })),
        M::Dec => Some(unary!(insn, |T, D| if live {
            alu::step::<T, alu::Sub, D, true> as Handler
        } else {
            alu::step::<T, alu::Sub, D, false>
        })),
        M::Neg => Some(unary!(insn, |T, D| alu::neg::<T, D> as Handler)),
        M::Not => Some(unary!(insn, |T, D| alu::not::<T, D> as Handler)),
        M::Mov if is_general(insn) => mov_for(insn, op),
        M::Movnti => mov_for(insn, op),
        M::Movzx => extend_for(insn, false),
        M::Movsx | M::Movsxd => extend_for(insn, true),
        M::Lea => {
            op.seg = reg::ZERO;
            Some(sized!(
                size0(insn),
                T,
                if is_simple(op) { mov::lea_base::<T> as Handler } else { mov::lea::<T> }
            ))
        }
        M::Xchg => {
            if insn.op0_kind() == OpKind::Register && insn.op1_kind() == OpKind::Memory {
                op.src = op.dst;
            }
            if has_memory(insn) {
                Some(sized!(size0(insn), T, alu::xchg::<T, Mem> as Handler))
            } else {
                Some(sized!(size0(insn), T, alu::xchg::<T, Dst> as Handler))
            }
        }
        M::Xadd => Some(unary!(insn, |T, D| alu::xadd::<T, D> as Handler)),
        M::Cmpxchg if insn.op0_kind() == OpKind::Register => {
            Some(sized!(size0(insn), T, alu::cmpxchg_reg::<T> as Handler))
        }
        M::Cmpxchg => Some(sized!(size0(insn), T, alu::cmpxchg_mem::<T> as Handler)),
        M::Cmpxchg8b => Some(alu::cmpxchg_pair::<u32>),
        M::Cmpxchg16b => Some(alu::cmpxchg_pair::<u64>),
        M::Bswap => Some(sized!(size0(insn), T, mov::bswap::<T> as Handler)),
        M::Shl | M::Sal | M::Shr | M::Sar
            if !live
                && insn.op0_kind() == OpKind::Register
                && insn.op1_kind() != OpKind::Register
                && insn.immediate8() & 31 != 0 =>
        {
            op.aux = insn.immediate8() & if size0(insn) == 8 { 63 } else { 31 };
            Some(sized!(
                size0(insn),
                T,
                match mnemonic {
                    M::Shr => shift::by_imm_quiet::<T, 1> as Handler,
                    M::Sar => shift::by_imm_quiet::<T, 2>,
                    _ => shift::by_imm_quiet::<T, 0>,
                }
            ))
        }
        M::Shl | M::Sal => Some(shift_for::<shift::Shl>(insn, op)),
        M::Shr => Some(shift_for::<shift::Shr>(insn, op)),
        M::Sar => Some(shift_for::<shift::Sar>(insn, op)),
        M::Rol => Some(shift_for::<shift::Rol>(insn, op)),
        M::Ror => Some(shift_for::<shift::Ror>(insn, op)),
        M::Rcl => Some(shift_for::<shift::Rcl>(insn, op)),
        M::Rcr => Some(shift_for::<shift::Rcr>(insn, op)),
        M::Shld | M::Shrd => {
            op.aux = if insn.op2_kind() == OpKind::Register { 0xff } else { insn.immediate8() & 0x3f };
            Some(if mnemonic == M::Shld {
                unary!(insn, |T, D| shift::double::<T, D, true> as Handler)
            } else {
                unary!(insn, |T, D| shift::double::<T, D, false> as Handler)
            })
        }
        M::Mul => Some(unary_source!(insn, |T, S| muldiv::mul::<T, S> as Handler)),
        M::Div => Some(unary_source!(insn, |T, S| muldiv::div::<T, S> as Handler)),
        M::Idiv => Some(unary_source!(insn, |T, S| muldiv::idiv::<T, S> as Handler)),
        M::Imul => Some(match (insn.op_count(), has_memory(insn)) {
            (1, _) => unary_source!(insn, |T, S| muldiv::imul::<T, S> as Handler),
            (2, false) => sized!(size0(insn), T, muldiv::imul2::<T, Dst, Src> as Handler),
            (2, true) => sized!(size0(insn), T, muldiv::imul2::<T, Dst, Mem> as Handler),
            (_, false) => sized!(size0(insn), T, muldiv::imul2::<T, Src, Imm> as Handler),
            (_, true) => sized!(size0(insn), T, muldiv::imul2::<T, Mem, Imm> as Handler),
        }),
        M::Bt => bits_for::<0>(insn, op),
        M::Bts => bits_for::<1>(insn, op),
        M::Btr => bits_for::<2>(insn, op),
        M::Btc => bits_for::<3>(insn, op),
        // Without BMI1 and LZCNT, which the baseline does not offer, these are BSF and BSR (Intel SDM vol. 2).
        M::Bsf | M::Tzcnt => Some(scan_for::<true>(insn)),
        M::Bsr | M::Lzcnt => Some(scan_for::<false>(insn)),
        M::Popcnt => Some(if has_memory(insn) {
            sized!(size0(insn), T, bits::popcnt::<T, Mem> as Handler)
        } else {
            sized!(size0(insn), T, bits::popcnt::<T, Src> as Handler)
        }),
        M::Push if is_general_or_imm(insn) => {
            let wide = insn.stack_pointer_increment() == -8;
            Some(match (insn.op0_kind(), wide) {
                (OpKind::Register, true) => mov::push::<u64, Src>,
                (OpKind::Register, false) => mov::push::<u16, Src>,
                (OpKind::Memory, true) => mov::push::<u64, Mem>,
                (OpKind::Memory, false) => mov::push::<u16, Mem>,
                (_, true) => mov::push::<u64, Imm>,
                (_, false) => mov::push::<u16, Imm>,
            })
        }
        M::Pop if is_general_or_imm(insn) => {
            let wide = insn.stack_pointer_increment() == 8;
            Some(match (insn.op0_kind(), wide) {
                (OpKind::Register, true) => mov::pop::<u64>,
                (OpKind::Register, false) => mov::pop::<u16>,
                (_, true) => mov::pop_mem::<u64>,
                (_, false) => mov::pop_mem::<u16>,
            })
        }
        M::Leave => Some(if insn.code() == Code::Leavew { mov::leave::<u16> } else { mov::leave::<u64> }),
        M::Enter => {
            op.imm = u64::from(insn.immediate16());
            op.aux = insn.immediate8_2nd() & 31;
            let short = insn.code() == Code::Enterw_imm16_imm8;
            Some(if short { mov::enter::<u16> } else { mov::enter::<u64> })
        }
        M::Cbw => Some(mov::extend_acc::<u16, u8>),
        M::Cwde => Some(mov::extend_acc::<u32, u16>),
        M::Cdqe => Some(mov::extend_acc::<u64, u32>),
        M::Cwd => Some(mov::extend_pair::<u16>),
        M::Cdq => Some(mov::extend_pair::<u32>),
        M::Cqo => Some(mov::extend_pair::<u64>),
        M::Xlatb => Some(mov::xlat),
        M::Lahf => Some(mov::lahf),
        M::Sahf => Some(mov::sahf),
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std => {
            op.aux = match mnemonic {
                M::Clc => 0,
                M::Stc => 1,
                M::Cmc => 2,
                M::Cld => 3,
                _ => 4,
            };
            Some(mov::flag)
        }
        M::Nop | M::Pause | M::Endbr64 | M::Endbr32 | M::Lfence | M::Sfence | M::Mfence => Some(mov::nop),
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw | M::Prefetch => {
            Some(mov::nop)
        }
        M::Prefetchwt1 | M::Reservednop | M::Cldemote => Some(mov::nop),
        M::Clflush => Some(mov::touch),
        M::Ud0 | M::Ud1 | M::Ud2 => {
            op.aux = 0;
            Some(mov::undefined)
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            op.aux = prefix_of(insn);
            Some(sized!(string_size(mnemonic), T, string::stos::<T> as Handler))
        }
        M::Movsb | M::Movsw | M::Movsd | M::Movsq if insn.is_string_instruction() => {
            op.aux = prefix_of(insn);
            op.seg = crate::decode::segment(insn);
            Some(sized!(string_size(mnemonic), T, string::movs::<T> as Handler))
        }
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
            op.aux = prefix_of(insn);
            op.seg = crate::decode::segment(insn);
            Some(sized!(string_size(mnemonic), T, string::lods::<T> as Handler))
        }
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            op.aux = prefix_of(insn);
            Some(sized!(string_size(mnemonic), T, string::compare::<T, true> as Handler))
        }
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq if insn.is_string_instruction() => {
            op.aux = prefix_of(insn);
            op.seg = crate::decode::segment(insn);
            Some(sized!(string_size(mnemonic), T, string::compare::<T, false> as Handler))
        }
        _ if insn.is_jcc_short_or_near() => return lower_jcc(insn, op),
        M::Jmp | M::Call | M::Ret | M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz => {
            return lower_branch(insn, op);
        }
        _ => match condition_of(insn) {
            Some((cc, true)) => {
                op.aux = cc;
                Some(if has_memory(insn) { mov::setcc::<Mem> } else { mov::setcc::<Dst> })
            }
            Some((cc, false)) => {
                op.aux = cc;
                Some(if has_memory(insn) {
                    sized!(size0(insn), T, mov::cmov::<T, Mem> as Handler)
                } else {
                    sized!(size0(insn), T, mov::cmov::<T, Src> as Handler)
                })
            }
            None => None,
        },
    };
    match handler {
        Some(h) => {
            op.h = h;
            Lowered::Plain
        }
        None => Lowered::No,
    }
}

fn string_size(m: Mnemonic) -> usize {
    use Mnemonic as M;
    match m {
        M::Stosb | M::Movsb | M::Lodsb | M::Scasb | M::Cmpsb => 1,
        M::Stosw | M::Movsw | M::Lodsw | M::Scasw | M::Cmpsw => 2,
        M::Stosd | M::Movsd | M::Lodsd | M::Scasd | M::Cmpsd => 4,
        _ => 8,
    }
}

fn scan_for<const FORWARD: bool>(insn: &Instruction) -> Handler {
    if has_memory(insn) {
        sized!(size0(insn), T, bits::scan::<T, Mem, FORWARD> as Handler)
    } else {
        sized!(size0(insn), T, bits::scan::<T, Src, FORWARD> as Handler)
    }
}

/// MOV without segment, control or debug registers.
fn is_general(insn: &Instruction) -> bool {
    let general = |k: OpKind, r: Register| k != OpKind::Register || r.is_gpr();
    general(insn.op0_kind(), insn.op0_register()) && general(insn.op1_kind(), insn.op1_register())
}

/// PUSH or POP of anything but a segment register.
fn is_general_or_imm(insn: &Instruction) -> bool {
    insn.op0_kind() != OpKind::Register || insn.op0_register().is_gpr()
}

/// The condition code of SETcc (true) or CMOVcc (false).
fn condition_of(insn: &Instruction) -> Option<(u8, bool)> {
    use iced_x86::ConditionCode as C;
    let set = match insn.mnemonic() {
        m if (Mnemonic::Seta..=Mnemonic::Sets).contains(&m) && insn.is_setcc() => true,
        _ if insn.is_cmovcc() => false,
        _ => return None,
    };
    Some((cc_number(insn.condition_code()), set)).filter(|_| insn.condition_code() != C::None)
}

trait ConditionKind {
    fn is_setcc(&self) -> bool;
    fn is_cmovcc(&self) -> bool;
}

impl ConditionKind for Instruction {
    fn is_setcc(&self) -> bool {
        self.op_count() == 1 && size0(self) == 1 && self.condition_code() != iced_x86::ConditionCode::None
    }
    fn is_cmovcc(&self) -> bool {
        self.op_count() == 2
            && self.op0_kind() == OpKind::Register
            && self.op0_register().is_gpr()
            && self.condition_code() != iced_x86::ConditionCode::None
    }
}

/// The hardware number of a condition.
pub(crate) fn cc_number(cc: iced_x86::ConditionCode) -> u8 {
    use iced_x86::ConditionCode as C;
    match cc {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        C::None => 16,
    }
}

/// The page-relative target fits `disp`.
fn set_target(insn: &Instruction, op: &mut Op) -> bool {
    op.imm = 0;
    match i32::try_from(insn.near_branch_target() as i64) {
        Ok(rel) => {
            op.disp = rel;
            true
        }
        Err(_) => false,
    }
}

fn lower_jcc(insn: &Instruction, op: &mut Op) -> Lowered {
    if !set_target(insn, op) {
        return Lowered::No;
    }
    op.h = branch::jcc_for(cc_number(insn.condition_code()));
    Lowered::Plain
}

fn lower_branch(insn: &Instruction, op: &mut Op) -> Lowered {
    use Mnemonic as M;
    let near = insn.op_count() == 1 && insn.op0_kind() == OpKind::NearBranch64;
    // A 66 prefix (16-bit operand) on near branches is ignored by Intel's CPUs in 64-bit mode, and iced follows.
    op.h = match insn.mnemonic() {
        M::Ret => {
            op.imm = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
            branch::ret
        }
        M::Jmp | M::Call if near => {
            if !set_target(insn, op) {
                return Lowered::No;
            }
            if insn.mnemonic() == M::Jmp { branch::jump } else { branch::call }
        }
        M::Jmp if insn.is_jmp_near_indirect() => {
            if has_memory(insn) {
                branch::jump_to::<Mem>
            } else {
                branch::jump_to::<Src>
            }
        }
        M::Call if insn.is_call_near_indirect() => {
            if has_memory(insn) {
                branch::call_to::<Mem>
            } else {
                branch::call_to::<Src>
            }
        }
        M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz if near => {
            if !set_target(insn, op) {
                return Lowered::No;
            }
            let by_ecx = insn.is_loop_with_ecx() || insn.mnemonic() == M::Jecxz;
            op.aux = match insn.mnemonic() {
                M::Loop => 0,
                M::Loope => 1,
                M::Loopne => 2,
                _ => 3,
            } | if by_ecx { 4 } else { 0 };
            op.h = branch::count_jump;
            return Lowered::Plain;
        }
        _ => return Lowered::No,
    };
    Lowered::Ends
}

trait LoopSize {
    fn is_loop_with_ecx(&self) -> bool;
}

impl LoopSize for Instruction {
    fn is_loop_with_ecx(&self) -> bool {
        use iced_x86::Code as C;
        matches!(self.code(), C::Loop_rel8_64_ECX | C::Loope_rel8_64_ECX | C::Loopne_rel8_64_ECX)
    }
}
