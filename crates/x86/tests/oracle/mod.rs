//! The host CPU as the oracle: the same code from the same registers, natively and in the software CPU.

pub(crate) mod catalog;
pub(crate) mod generate;
pub(crate) mod layout;
pub(crate) mod native;
pub(crate) mod rng;
pub(crate) mod sequence;
pub(crate) mod soft;

use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use iced_x86::{Formatter, Instruction, IntelFormatter, Mnemonic, RflagsBits};

use layout::{Outcome, State};
use native::Native;
use soft::Soft;

/// Native runs need fixed addresses and the process's signal handlers: one test at a time.
static ONE: Mutex<()> = Mutex::new(());

/// Both sides.
pub(crate) struct Oracle {
    pub(crate) native: Native,
    pub(crate) soft: Soft,
    _one: MutexGuard<'static, ()>,
}

/// What may differ, and why a comparison ran.
pub(crate) struct Compare<'a> {
    /// RFLAGS bits that are undefined.
    pub(crate) undefined: u64,
    /// Flags are not compared when the code faulted.
    pub(crate) flags_of_faults: bool,
    /// Of a faulting operand's address only the page is compared: wide ones are accessed in parts, in any order.
    pub(crate) wide: bool,
    /// Byte ranges of the data pages that hold the machine's own pointers.
    pub(crate) ignore: &'a [std::ops::Range<usize>],
}

pub(crate) fn disassemble(insn: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(insn, &mut text);
    text
}

/// RFLAGS bits of iced's flag set.
pub(crate) fn flag_bits(set: u32) -> u64 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::DF, 10),
        (RflagsBits::OF, 11),
    ]
    .iter()
    .filter(|(bit, _)| set & bit != 0)
    .fold(0, |f, (_, at)| f | 1 << at)
}

/// Parts of the data pages that an instruction with its operand at `at` fills with pointers or host properties.
pub(crate) fn own_fields(insn: &Instruction, at: usize) -> Vec<std::ops::Range<usize>> {
    use iced_x86::Code as C;
    match insn.code() {
        C::Fxsave_m512byte | C::Fxsave64_m512byte => vec![at + 6..at + 24, at + 28..at + 32],
        C::Fnstenv_m14byte | C::Fnsave_m94byte => vec![at + 6..at + 14],
        C::Fnstenv_m28byte | C::Fnsave_m108byte => vec![at + 12..at + 28],
        _ => vec![],
    }
}

impl Oracle {
    pub(crate) fn new() -> Oracle {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut oracle = Oracle { native: Native::new(), soft: Soft::new(), _one: one };
        let mut rng = rng::Rng::new(1);
        let fill: Vec<u8> =
            (0..layout::DATA_BYTES / 16).flat_map(|_| rng.vector()).flat_map(u64::to_le_bytes).collect();
        oracle.set_data(0, &fill);
        oracle
    }

    pub(crate) fn set_code(&mut self, offset: u64, bytes: &[u8]) {
        self.native.set_code(offset, bytes);
        self.soft.set_code(offset, bytes);
    }

    pub(crate) fn set_data(&mut self, offset: usize, bytes: &[u8]) {
        self.native.data()[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.soft.set_data(offset, bytes);
    }

    /// Runs both from `state`; `Err` says what differs.
    pub(crate) fn run(&mut self, state: &State, compare: &Compare<'_>) -> Result<Outcome, String> {
        let native = self.native.run(state);
        let soft = self.soft.run(state)?;
        let mut text = differences(&native, &soft, compare);
        let mut theirs = self.soft.data();
        for range in compare.ignore {
            let range = range.start.min(theirs.len())..range.end.min(theirs.len());
            theirs[range.clone()].copy_from_slice(&self.native.data()[range.clone()]);
            let bytes = self.native.data()[range.clone()].to_vec();
            self.soft.set_data(range.start, &bytes);
        }
        if compare.wide && native.vector == 14 {
            // Parts of a store may have reached memory before the fault.
            self.soft.set_data(0, self.native.data());
            theirs = self.soft.data();
        }
        let ours = self.native.data();
        if theirs != ours {
            for (i, (a, b)) in ours.iter().zip(&theirs).enumerate().filter(|(_, (a, b))| a != b).take(32) {
                let _ =
                    writeln!(text, "  memory {:#x}: native {a:02x}, soft {b:02x}", layout::DATA + i as u64);
            }
        }
        if text.is_empty() { Ok(native) } else { Err(text) }
    }
}

fn differences(native: &Outcome, soft: &Outcome, compare: &Compare<'_>) -> String {
    let mut text = String::new();
    let mut check = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(text, "  {name}: native {a:#x}, soft {b:#x}");
        }
    };
    // Stack faults for addresses that are not canonical are #GP in the software CPU; Linux treats both alike.
    let vector = |o: &Outcome| if o.vector == 12 { 13 } else { o.vector };
    check("vector", vector(native), vector(soft));
    // The upper half of the address space is the host kernel's, and present.
    let kernel = u64::from(native.vector == 14 && native.cr2 >> 63 != 0);
    check("error code", native.error & !kernel, soft.error & !kernel);
    if native.vector == 14 && soft.vector == 14 {
        let part = if compare.wide { !0xfff } else { u64::MAX };
        check("CR2", native.cr2 & part, soft.cr2 & part);
    }
    check("rip", native.state.rip, soft.state.rip);
    for (i, r) in generate::names().enumerate() {
        check(&format!("{r:?}"), native.state.gpr[i], soft.state.gpr[i]);
    }
    let mut mask = 0x20_0ed5 & !compare.undefined;
    if native.vector != 3 && !compare.flags_of_faults {
        mask &= !0x8d5;
    }
    check("rflags", native.state.rflags & mask, soft.state.rflags & mask);
    let (a, b) = (&native.state.fx, &soft.state.fx);
    let word = |image: &[u8; 512], at: usize, n: usize| {
        (0..n).fold(0, |v, i| v | u64::from(image[at + i]) << (8 * i))
    };
    for (name, at, n) in [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("mxcsr", 24, 4)] {
        check(name, word(a, at, n), word(b, at, n));
    }
    for i in 0..8 {
        check(&format!("st{i}.significand"), word(a, 32 + 16 * i, 8), word(b, 32 + 16 * i, 8));
        check(&format!("st{i}.exponent"), word(a, 40 + 16 * i, 2), word(b, 40 + 16 * i, 2));
    }
    for i in 0..16 {
        check(&format!("xmm{i}.low"), word(a, 160 + 16 * i, 8), word(b, 160 + 16 * i, 8));
        check(&format!("xmm{i}.high"), word(a, 168 + 16 * i, 8), word(b, 168 + 16 * i, 8));
    }
    text
}

/// The inputs, for messages.
pub(crate) fn describe(state: &State) -> String {
    let mut text = String::new();
    for (i, r) in generate::names().enumerate() {
        let _ = write!(text, "{}{r:?}={:#x}", if i % 4 == 0 { "\n  " } else { " " }, state.gpr[i]);
    }
    let _ = write!(text, "\n  rflags={:#x} rip={:#x}", state.rflags, state.rip);
    let fx = &state.fx;
    let _ = write!(
        text,
        " fcw={:02x}{:02x} fsw={:02x}{:02x} ftw={:02x} mxcsr={:02x}{:02x}",
        fx[1], fx[0], fx[3], fx[2], fx[4], fx[25], fx[24]
    );
    for i in 0..8 {
        let hex: String = fx[32 + 16 * i..42 + 16 * i].iter().rev().map(|b| format!("{b:02x}")).collect();
        let _ = write!(text, "{}st{i}={hex}", if i % 4 == 0 { "\n  " } else { " " });
    }
    for i in 0..16 {
        let hex: String = fx[160 + 16 * i..176 + 16 * i].iter().rev().map(|b| format!("{b:02x}")).collect();
        let _ = write!(text, "{}xmm{i}={hex}", if i % 2 == 0 { "\n  " } else { " " });
    }
    text
}

/// Flags that an instruction leaves undefined, from a given state.
pub(crate) fn undefined_flags(insn: &Instruction, state: &State) -> u64 {
    let by_cl = matches!(
        insn.mnemonic(),
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Shld | Mnemonic::Shrd
    ) && insn.op_register(insn.op_count() - 1) == iced_x86::Register::CL;
    if by_cl && state.gpr[1] & if insn.code().op_code().operand_size() == 64 { 63 } else { 31 } == 0 {
        return 0;
    }
    flag_bits(insn.rflags_undefined())
}
