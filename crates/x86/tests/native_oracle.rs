//! Every unprivileged instruction form, and sequences of them, compared with the host CPU.
//!
//! `AMBER_ORACLE_RUNS` sets how many register states each form is tried with, `AMBER_ORACLE_SEQUENCES` how many
//! sequences, `AMBER_ORACLE_SEED` the seed, and
//! `AMBER_ORACLE_ONLY` restricts the run to forms whose iced name contains it.
#![allow(
    clippy::panic,
    clippy::precedence,
    clippy::single_range_in_vec_init,
    clippy::unwrap_used,
    reason = "a test: it fails by panicking, and writes encodings as shifts and masks"
)]
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod oracle;

use std::collections::BTreeMap;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use oracle::catalog::{exempt, forms, offered};
use oracle::generate::{self, Case, Operands, build, state_for};
use oracle::layout::{CODE, DATA};
use oracle::rng::Rng;
use oracle::sequence::{POINTER, Pool, sequence};
use oracle::{Compare, Oracle, describe, disassemble, flag_bits, own_fields, undefined_flags};

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn seed() -> u64 {
    variable("AMBER_ORACLE_SEED").unwrap_or(20)
}

/// Instances of one form: registers and memory, where both exist.
fn instances(code: Code, rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for memory in [false, true] {
        let mut made = 0;
        for _ in 0..40 {
            let offset = if rng.chance(10) { 0xff8 } else { 0x40 + rng.below(0x1e00) };
            if let Some(case) = build(code, memory, offset, Operands::Free, rng) {
                let has = (0..case.insn.op_count()).any(|i| case.insn.op_kind(i) == OpKind::Memory);
                if memory && !has {
                    break;
                }
                cases.push(case);
                made += 1;
                if made == 6 {
                    break;
                }
            }
        }
    }
    cases
}

/// Whether the host's result for this input says nothing.
fn undefined_result(insn: &Instruction, gpr: &[u64; 16]) -> bool {
    match insn.mnemonic() {
        // A count beyond the operand's size.
        Mnemonic::Shld | Mnemonic::Shrd if insn.code().op_code().operand_size() == 16 => {
            let count = if insn.op2_kind() == OpKind::Register { gpr[1] as u8 } else { insn.immediate8() };
            count & 31 > 16
        }
        _ => false,
    }
}

fn failure(case: &Case, state: &oracle::layout::State, differs: &str) -> String {
    let hex: String = case.bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "{:?} {hex} {}\n differs:\n{differs} from:{}\n",
        case.insn.code(),
        disassemble(&case.insn),
        describe(state)
    )
}

#[test]
fn single_instructions_do_what_the_host_does() {
    let runs = variable("AMBER_ORACLE_RUNS").unwrap_or(150);
    let only = std::env::var("AMBER_ORACLE_ONLY").unwrap_or_default();
    let mut rng = Rng::new(seed());
    let mut oracle = Oracle::new();
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    for code in forms().into_iter().filter(|&c| offered(c) && exempt(c).is_none()) {
        if !format!("{code:?}").contains(&only) {
            continue;
        }
        let cases = instances(code, &mut rng);
        assert!(!cases.is_empty(), "No instance of {code:?} could be made");
        for case in &cases {
            let mut bytes = case.bytes.clone();
            bytes.extend([0xcc; 4]);
            oracle.set_code(case.offset, &bytes);
            for _ in 0..runs.div_ceil(cases.len() as u64 / 2 + 1) {
                // Dot products compute in steps, each of which may stop at an unmasked exception.
                let steps = matches!(case.insn.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd);
                let calm = steps || rng.chance(80);
                let (state, at, content) = state_for(case, calm, &mut rng);
                if undefined_result(&case.insn, &state.gpr) {
                    continue;
                }
                oracle.set_data(at, &content);
                let ignore = own_fields(&case.insn, at);
                let compare = Compare {
                    undefined: undefined_flags(&case.insn, &state),
                    flags_of_faults: !case.insn.is_string_instruction(),
                    wide: !matches!(generate::operand_size(&case.insn), 1 | 2 | 4 | 8 | 16),
                    ignore: &ignore,
                };
                if let Err(differs) = oracle.run(&state, &compare) {
                    let entry = failures
                        .entry(format!("{code:?}"))
                        .or_insert_with(|| (0, failure(case, &state, &differs)));
                    entry.0 += 1;
                    let same = oracle.native.data().to_vec();
                    oracle.soft.set_data(0, &same);
                }
            }
        }
    }
    report(failures);
}

fn report(failures: BTreeMap<String, (u64, String)>) {
    if failures.is_empty() {
        return;
    }
    let mut text = String::new();
    for (count, first) in failures.values() {
        text.push_str(&format!("{count} failures, first: {first}\n"));
    }
    let names: Vec<_> = failures.keys().cloned().collect();
    panic!("{text}\n{} forms differ from the host: {}", names.len(), names.join(" "));
}

/// Forms beyond x86-64-v2 that the CPU has all the same.
fn extra(code: Code) -> Option<&'static str> {
    use iced_x86::CpuidFeature as F;
    let features = code.cpuid_features();
    Some(match code.mnemonic() {
        Mnemonic::Tzcnt | Mnemonic::Lzcnt => "executes as BSF and BSR, see below",
        Mnemonic::Endbr64 | Mnemonic::Endbr32 | Mnemonic::Rdsspd | Mnemonic::Rdsspq => {
            "a reserved NOP without CET"
        }
        Mnemonic::Prefetch | Mnemonic::Prefetchw | Mnemonic::Prefetchwt1 | Mnemonic::Cldemote => {
            "hints: NOPs where they are not known"
        }
        _ if features
            .iter()
            .any(|f| matches!(f, F::FSGSBASE | F::RDRAND | F::RDSEED | F::RDTSCP | F::SYSCALL)) =>
        {
            "offered by the platform's CPUID"
        }
        _ => return None,
    })
}

#[test]
fn every_form_is_tested_or_exempt_for_a_reason() {
    let mut rng = Rng::new(3);
    let mut oracle = Oracle::new();
    let mut missing = Vec::new();
    let mut surplus = Vec::new();
    for code in forms() {
        if exempt(code).is_some() {
            continue;
        }
        let Some(case) = instances(code, &mut rng).into_iter().next() else {
            if offered(code) {
                missing.push(format!("{code:?} (no instance)"));
            }
            continue;
        };
        let before = oracle.soft.unimplemented();
        let mut bytes = case.bytes.clone();
        bytes.extend([0xcc; 4]);
        oracle.soft.set_code(case.offset, &bytes);
        let (state, at, content) = state_for(&case, true, &mut rng);
        oracle.soft.set_data(at, &content);
        let outcome = oracle.soft.run(&state);
        let undefined = oracle.soft.unimplemented() != before
            || outcome.is_ok_and(|o| o.vector == 6)
                && !matches!(case.insn.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2);
        if offered(code) && undefined {
            missing.push(format!("{code:?}"));
        }
        if !offered(code) && !undefined && extra(code).is_none() {
            surplus.push(format!("{code:?}"));
        }
    }
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "Offered but not implemented: {}\nImplemented but not offered, so never compared: {}",
        missing.join(" "),
        surplus.join(" ")
    );
}

/// Sequences of instructions, with jumps and in loops.
#[test]
fn sequences_do_what_the_host_does() {
    let count = variable("AMBER_ORACLE_SEQUENCES").unwrap_or(10_000);
    let mut rng = Rng::new(seed());
    let mut oracle = Oracle::new();
    let pool = Pool::new();
    let mut failed = Vec::new();
    let (mut ran, mut ended) = (0, 0);
    for _ in 0..count {
        let times = if rng.chance(50) { 2 + rng.below(3) } else { 1 };
        let sequence = sequence(&pool, times, &mut rng);
        oracle.set_code(sequence.offset, &sequence.bytes);
        for _ in 0..4 {
            let mut state = generate::state(true, &mut rng);
            state.rip = CODE + sequence.offset;
            state.gpr[14] = POINTER;
            state.gpr[15] = times;
            let data: Vec<u8> = (0..16).flat_map(|_| rng.vector()).flat_map(u64::to_le_bytes).collect();
            oracle.set_data((POINTER - DATA) as usize - 128, &data);
            let compare = Compare {
                undefined: flag_bits(sequence.undefined),
                flags_of_faults: false,
                wide: true,
                ignore: &[],
            };
            let result = oracle.run(&state, &compare);
            ran += 1;
            ended += u64::from(result.as_ref().is_ok_and(|outcome| outcome.vector == 3));
            if let Err(differs) = result {
                let listing: String =
                    sequence.insns.iter().map(|i| format!("    {:x} {}\n", i.ip(), disassemble(i))).collect();
                failed.push(format!(
                    "{times} times\n{listing} differs:\n{differs} from:{}\n code: {:02x?}\n",
                    describe(&state),
                    sequence.bytes
                ));
                let same = oracle.native.data().to_vec();
                oracle.soft.set_data(0, &same);
                break;
            }
        }
    }
    assert!(ended * 2 > ran, "Only {ended} of {ran} runs reached their sequence's end");
    // The shortest is the easiest to read.
    let shortest = failed.iter().min_by_key(|f| f.lines().count());
    assert!(failed.is_empty(), "{} sequences differ, the shortest: {}", failed.len(), shortest.unwrap());
}

/// A CPU without BMI1 and LZCNT ignores their prefix.
#[test]
fn tzcnt_and_lzcnt_are_bsf_and_bsr() {
    let mut rng = Rng::new(seed());
    let mut oracle = Oracle::new();
    for code in [Code::Bsf_r32_rm32, Code::Bsf_r64_rm64, Code::Bsr_r32_rm32, Code::Bsr_r64_rm64] {
        for case in instances(code, &mut rng).into_iter().filter(|c| !c.insn.is_ip_rel_memory_operand()) {
            // A NOP instead of the prefix keeps addresses equal.
            let prefixed: Vec<u8> = [0xf3].iter().chain(&case.bytes).chain(&[0xcc]).copied().collect();
            let plain: Vec<u8> = [0x90].iter().chain(&case.bytes).chain(&[0xcc]).copied().collect();
            oracle.native.set_code(case.offset, &plain);
            oracle.soft.set_code(case.offset, &prefixed);
            for _ in 0..20 {
                let (state, at, content) = state_for(&case, true, &mut rng);
                oracle.set_data(at, &content);
                let compare = Compare {
                    undefined: undefined_flags(&case.insn, &state),
                    flags_of_faults: true,
                    wide: false,
                    ignore: &[],
                };
                let result = oracle.run(&state, &compare);
                // A faulting operand faults one byte later natively.
                if let Err(differs) = result {
                    assert!(
                        differs.starts_with("  rip:") && differs.lines().count() == 1,
                        "{}",
                        failure(&case, &state, &differs)
                    );
                }
            }
        }
    }
}
