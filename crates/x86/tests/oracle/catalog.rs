//! Which instruction forms there are (iced's own table), and which of them the host cannot judge, with the reason.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// Every form that exists in 64-bit mode and is not VEX, EVEX or the like.
pub(crate) fn forms() -> Vec<Code> {
    Code::values()
        .filter(|c| {
            let o = c.op_code();
            o.is_instruction()
                && o.encoding() == EncodingKind::Legacy
                && o.mode64()
                && !o.fwait()
                && o.decoder_option() == 0
                && !(0..o.op_count()).any(|i| {
                    use OpCodeOperandKind as K;
                    matches!(
                        o.op_kind(i),
                        K::br16_1 | K::br16_2 | K::br32_1 | K::br32_4 | K::brdisp_2 | K::brdisp_4
                    ) || matches!(o.op_kind(i), K::xbegin_2 | K::xbegin_4)
                })
        })
        .collect()
}

/// Whether the form is part of the instruction set that the CPU offers (x86-64-v2).
pub(crate) fn offered(code: Code) -> bool {
    use CpuidFeature as F;
    code.cpuid_features().iter().all(|f| {
        matches!(
            *f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CLFSH
                | F::CMOV
                | F::CMPXCHG16B
                | F::CPUID
                | F::CX8
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::POPCNT
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSSE3
        )
    })
}

/// Why the host is not asked about a form, if it is not.
pub(crate) fn exempt(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let o = code.op_code();
    if o.must_be_cpl0() || o.is_privileged() {
        return Some("privileged: tested by the system and interrupt modules");
    }
    Some(match code.mnemonic() {
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Rdrand | M::Rdseed | M::Rdpid => {
            "its result is the machine's own"
        }
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
            "needs I/O privilege"
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Smsw | M::Str => "shows the host's tables, or faults there (UMIP)",
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            "depends on the descriptor tables"
        }
        M::Syscall | M::Sysenter | M::Int | M::Int1 | M::Int3 | M::Into | M::Sysexit | M::Sysret => {
            "enters the kernel"
        }
        M::Iret | M::Iretd | M::Iretq | M::Retf => "loads segments: tested by the interrupt module",
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => "the test's own thread pointer",
        M::Call | M::Jmp if o.op_kind(0) == OpCodeOperandKind::mem => {
            return (!matches!(code, Code::Call_rm64 | Code::Jmp_rm64)).then_some("far transfer");
        }
        M::Mov | M::Push | M::Pop
            if (0..o.op_count()).any(|i| {
                use OpCodeOperandKind as K;
                matches!(
                    o.op_kind(i),
                    K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs | K::cr_reg | K::dr_reg
                )
            }) =>
        {
            "segment, control or debug register"
        }
        M::Cli | M::Sti => "needs I/O privilege",
        M::Ud0 if o.op_count() == 0 => "another length of the same opcode",
        M::Ud0 | M::Ud1 | M::Ud2 => return None,
        M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx => "not offered",
        M::Jmpe | M::Loadall => "not of this architecture",
        M::Xabort | M::Xbegin | M::Xend | M::Xtest => "transactional memory",
        _ => {
            return match code {
                // AMD and Intel differ: Intel ignores the operand size prefix.
                Code::Retnw
                | Code::Retnw_imm16
                | Code::Jmp_rm16
                | Code::Call_rm16
                | Code::Jmp_rm32
                | Code::Call_rm32 => Some("16-bit near transfers differ between makers"),
                Code::Fnsetpm | Code::Fneni | Code::Fndisi | Code::Frstpm => Some("8087 and 80287 leftovers"),
                _ => None,
            };
        }
    })
}
