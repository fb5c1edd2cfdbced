//! System instructions: flags, segments, descriptor tables, identification, time, random numbers (Intel SDM vol. 2,
//! and vol. 3 chapter 2). `control` has the control, debug and model-specific registers, `io` the ports, `segment`
//! the descriptors.

mod control;
mod io;
mod segment;

#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, OpKind};

pub(crate) use control::{CR3_RESERVED, cr0, cr4, efer, msr, valid_pat};
pub(crate) use segment::{FLAT_CODE, FLAT_DATA, attr, is_null};

use crate::cpu::{Cpu, Stop, Table, Trap, seg, vector};
use crate::decode::{Lowered, gpr};
use crate::flags::bit;
use crate::interrupt;
use crate::mem::Int;
use crate::mmu::canonical;
use crate::op::{Handler, Op, reg};
use crate::ops::t;

/// Random words drawn from the host at once.
const RANDOM_WORDS: usize = 32;

/// What the system instructions keep.
#[derive(Debug, Default)]
pub(crate) struct System {
    /// The instruction being stepped changed TF's meaning itself: no single-step trap.
    pub(crate) no_step: bool,
    /// `Cpu::inhibit` is from MOV SS or POP SS, which hold off debug traps as well.
    pub(crate) stack_shadow: bool,
    random: [u64; RANDOM_WORDS],
    random_left: usize,
}

/// Counts something that this CPU does not implement.
#[cold]
pub(crate) fn unsupported(cpu: &mut Cpu, what: &str) {
    match cpu.diagnostics.unimplemented.get_mut(what) {
        Some(n) => *n += 1,
        None => {
            cpu.diagnostics.unimplemented.insert(what.to_owned(), 1);
        }
    }
}

/// Lowers system instructions.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Lowered {
    for lower in [lower_here, interrupt::lower, control::lower, io::lower] {
        let lowered = lower(insn, op);
        if !matches!(lowered, Lowered::No) {
            return lowered;
        }
    }
    Lowered::No
}

/// The register that operand `n` names, as an `Op` field; 0 for memory.
fn operand(insn: &Instruction, n: u32) -> u8 {
    if insn.op_kind(n) == OpKind::Register { gpr(insn.op_register(n)) } else { 0 }
}

/// Picks a handler by whether operand `n` is a register.
fn by_place(insn: &Instruction, n: u32, register: Handler, memory: Handler) -> Handler {
    if insn.op_kind(n) == OpKind::Register { register } else { memory }
}

fn lower_here(insn: &Instruction, op: &mut Op) -> Lowered {
    use Code::*;
    // MOV to or from a segment register, and the instructions on selectors: register number, general operand.
    let (h, ends): (Handler, bool) = match insn.code() {
        Pushfq => (push_flags::<u64>, false),
        Pushfw => (push_flags::<u16>, false),
        Popfq => (pop_flags::<u64>, false),
        Popfw => (pop_flags::<u16>, false),
        Cli => (cli, false),
        Sti => (sti, false),
        Hlt => (hlt, true),
        Cpuid => (cpuid, false),
        Rdtsc => (rdtsc::<false>, false),
        Rdtscp => (rdtsc::<true>, false),
        Swapgs => (swapgs, false),
        Invd | Wbinvd | Wbnoinvd => (privileged_nop, false),

        Mov_rm16_Sreg | Mov_r32m16_Sreg | Mov_r64m16_Sreg => {
            op.dst = operand(insn, 0);
            op.aux = insn.op1_register().number() as u8;
            let register: Handler = match insn.code() {
                Mov_rm16_Sreg => store_selector::<u16>,
                _ => store_selector::<u64>,
            };
            (by_place(insn, 0, register, store_selector_mem), false)
        }
        Mov_Sreg_rm16 | Mov_Sreg_r32m16 | Mov_Sreg_r64m16 => {
            op.src = operand(insn, 1);
            op.aux = insn.op0_register().number() as u8;
            if usize::from(op.aux) == seg::CS {
                return Lowered::No;
            }
            (by_place(insn, 1, load_selector::<false>, load_selector::<true>), usize::from(op.aux) == seg::SS)
        }
        Pushq_FS | Pushq_GS | Pushw_FS | Pushw_GS => {
            op.aux = insn.op0_register().number() as u8;
            (
                if insn.code() == Pushq_FS || insn.code() == Pushq_GS {
                    push_selector::<u64>
                } else {
                    push_selector::<u16>
                },
                false,
            )
        }
        Popq_FS | Popq_GS | Popw_FS | Popw_GS => {
            op.aux = insn.op0_register().number() as u8;
            (
                if insn.code() == Popq_FS || insn.code() == Popq_GS {
                    pop_selector::<u64>
                } else {
                    pop_selector::<u16>
                },
                false,
            )
        }
        Lss_r16_m1616 | Lss_r32_m1632 | Lss_r64_m1664 | Lfs_r16_m1616 | Lfs_r32_m1632 | Lfs_r64_m1664
        | Lgs_r16_m1616 | Lgs_r32_m1632 | Lgs_r64_m1664 => {
            op.dst = operand(insn, 0);
            op.aux = match insn.code() {
                Lss_r16_m1616 | Lss_r32_m1632 | Lss_r64_m1664 => seg::SS,
                Lfs_r16_m1616 | Lfs_r32_m1632 | Lfs_r64_m1664 => seg::FS,
                _ => seg::GS,
            } as u8;
            let h: Handler = match insn.op0_register().size() {
                2 => load_far_pointer::<u16>,
                4 => load_far_pointer::<u32>,
                _ => load_far_pointer::<u64>,
            };
            (h, true)
        }

        Sgdt_m1664 => (store_table::<false>, false),
        Sidt_m1664 => (store_table::<true>, false),
        Lgdt_m1664 => (load_table::<false>, false),
        Lidt_m1664 => (load_table::<true>, false),
        Sldt_rm16 | Sldt_r32m16 | Sldt_r64m16 | Str_rm16 | Str_r32m16 | Str_r64m16 => {
            op.dst = operand(insn, 0);
            op.aux = u8::from(matches!(insn.code(), Str_rm16 | Str_r32m16 | Str_r64m16));
            let register: Handler = match insn.code() {
                Sldt_rm16 | Str_rm16 => store_system_selector::<u16>,
                _ => store_system_selector::<u64>,
            };
            (by_place(insn, 0, register, store_system_selector_mem), false)
        }
        Lldt_rm16 | Lldt_r32m16 | Lldt_r64m16 | Ltr_rm16 | Ltr_r32m16 | Ltr_r64m16 => {
            op.src = operand(insn, 0);
            op.aux = u8::from(matches!(insn.code(), Ltr_rm16 | Ltr_r32m16 | Ltr_r64m16));
            (by_place(insn, 0, load_system_selector::<false>, load_system_selector::<true>), false)
        }
        Verr_rm16 | Verr_r32m16 | Verr_r64m16 | Verw_rm16 | Verw_r32m16 | Verw_r64m16 => {
            op.src = operand(insn, 0);
            op.aux = u8::from(matches!(insn.code(), Verw_rm16 | Verw_r32m16 | Verw_r64m16));
            (by_place(insn, 0, verify::<false>, verify::<true>), false)
        }
        Lar_r16_rm16 | Lar_r32_r32m16 | Lar_r64_r64m16 | Lsl_r16_rm16 | Lsl_r32_r32m16 | Lsl_r64_r64m16 => {
            op.dst = operand(insn, 0);
            op.src = operand(insn, 1);
            op.aux = u8::from(matches!(insn.code(), Lsl_r16_rm16 | Lsl_r32_r32m16 | Lsl_r64_r64m16));
            let (register, memory): (Handler, Handler) = match insn.op0_register().size() {
                2 => (describe::<u16, false>, describe::<u16, true>),
                4 => (describe::<u32, false>, describe::<u32, true>),
                _ => (describe::<u64, false>, describe::<u64, true>),
            };
            (by_place(insn, 1, register, memory), false)
        }

        Rdfsbase_r32 | Rdfsbase_r64 | Rdgsbase_r32 | Rdgsbase_r64 => {
            op.dst = operand(insn, 0);
            op.aux = if matches!(insn.code(), Rdfsbase_r32 | Rdfsbase_r64) { reg::FS } else { reg::GS };
            (if insn.op0_register().is_gpr64() { read_base::<u64> } else { read_base::<u32> }, false)
        }
        Wrfsbase_r32 | Wrfsbase_r64 | Wrgsbase_r32 | Wrgsbase_r64 => {
            op.src = operand(insn, 0);
            op.aux = if matches!(insn.code(), Wrfsbase_r32 | Wrfsbase_r64) { reg::FS } else { reg::GS };
            (if insn.op0_register().is_gpr64() { write_base::<u64> } else { write_base::<u32> }, false)
        }
        Rdrand_r16 | Rdseed_r16 => {
            op.dst = operand(insn, 0);
            (random::<u16>, false)
        }
        Rdrand_r32 | Rdseed_r32 => {
            op.dst = operand(insn, 0);
            (random::<u32>, false)
        }
        Rdrand_r64 | Rdseed_r64 => {
            op.dst = operand(insn, 0);
            (random::<u64>, false)
        }
        _ => return Lowered::No,
    };
    op.h = h;
    if ends { Lowered::Ends } else { Lowered::Plain }
}

impl Cpu {
    /// #GP(0) unless in ring 0.
    #[inline(always)]
    pub(crate) fn need_ring0(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp0()) }
    }

    fn iopl(&self) -> u8 {
        (self.rflags >> 12 & 3) as u8
    }

    /// The next random word, from the host's generator.
    fn random_word(&mut self) -> Option<u64> {
        let s = &mut self.system;
        if s.random_left == 0 {
            let mut bytes = [0; RANDOM_WORDS * 8];
            getrandom::fill(&mut bytes).ok()?;
            for (word, bytes) in s.random.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            s.random_left = RANDOM_WORDS;
        }
        s.random_left -= 1;
        // Handed out once: nothing of it stays behind.
        Some(std::mem::take(&mut s.random[s.random_left]))
    }
}

/// PUSHF: VM and RF are pushed as zero.
unsafe fn push_flags<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let sp = cpu.slot(reg::RSP).wrapping_sub(T::BYTES);
    let flags = cpu.rflags() & !(bit::VM | bit::RF);
    t!(cpu, op, cpu.store(sp, T::from_u64(flags)));
    cpu.set_slot(reg::RSP, sp);
    Op::run_next(cpu, op)
}

/// POPF. A set IF or TF must be noticed, so the sequence ends there.
unsafe fn pop_flags<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let sp = cpu.slot(reg::RSP);
    let new = t!(cpu, op, cpu.load::<T>(sp)).to_u64();
    cpu.set_slot(reg::RSP, sp.wrapping_add(T::BYTES));
    let mut change = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT;
    if T::BYTES > 2 {
        change |= bit::AC | bit::ID;
    }
    if cpu.cpl <= cpu.iopl() {
        change |= bit::IF;
    }
    if cpu.cpl == 0 {
        change |= bit::IOPL;
    }
    let old = cpu.rflags;
    cpu.fl.set_bits(new);
    change &= !bit::ARITHMETIC;
    cpu.rflags = old & !change | new & change;
    if cpu.rflags & !old & (bit::IF | bit::TF) != 0 {
        cpu.end(op, cpu.next_rip(op))
    } else {
        Op::run_next(cpu, op)
    }
}

/// CLI.
unsafe fn cli(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.cpl > cpu.iopl() {
        cpu.gp0();
        return cpu.trap(op);
    }
    cpu.rflags &= !bit::IF;
    Op::run_next(cpu, op)
}

/// STI: interrupts are taken after the instruction that follows.
unsafe fn sti(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.cpl > cpu.iopl() {
        cpu.gp0();
        return cpu.trap(op);
    }
    if cpu.rflags & bit::IF != 0 {
        return Op::run_next(cpu, op);
    }
    cpu.rflags |= bit::IF;
    cpu.inhibit = true;
    cpu.system.stack_shadow = false;
    cpu.end(op, cpu.next_rip(op))
}

/// HLT.
unsafe fn hlt(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let next = cpu.next_rip(op);
    let p = cpu.end(op, next);
    cpu.stop = Stop::Halt;
    p
}

/// INVD, WBINVD: there is no cache to speak of.
unsafe fn privileged_nop(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    Op::run_next(cpu, op)
}

/// CPUID.
unsafe fn cpuid(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let (leaf, subleaf) = (cpu.reg(reg::RAX), cpu.reg(reg::RCX));
    if let Some(mut bus) = cpu.bus {
        let [a, b, c, d] = bus.as_mut().cpuid(leaf, subleaf);
        for (r, v) in [(reg::RAX, a), (reg::RBX, b), (reg::RCX, c), (reg::RDX, d)] {
            cpu.set_reg(r, v);
        }
    }
    Op::run_next(cpu, op)
}

/// RDTSC, RDTSCP.
unsafe fn rdtsc<const P: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.ctl.cr4 & cr4::TSD != 0 {
        t!(cpu, op, cpu.need_ring0());
    }
    let tsc = match cpu.bus {
        Some(mut bus) => bus.as_mut().tsc(),
        None => 0,
    };
    cpu.set_reg(reg::RAX, tsc as u32);
    cpu.set_reg(reg::RDX, (tsc >> 32) as u32);
    if P {
        cpu.set_reg(reg::RCX, cpu.ctl.tsc_aux as u32);
    }
    Op::run_next(cpu, op)
}

/// SWAPGS.
unsafe fn swapgs(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let base = cpu.slot(reg::GS);
    cpu.set_slot(reg::GS, cpu.ctl.kernel_gs_base);
    cpu.ctl.kernel_gs_base = base;
    Op::run_next(cpu, op)
}

/// MOV r, Sreg: `T` says whether the upper bits are cleared.
unsafe fn store_selector<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = cpu.segs[usize::from((*op).aux)].selector;
    cpu.set_reg((*op).dst, T::from_u64(u64::from(v)));
    Op::run_next(cpu, op)
}

/// MOV m16, Sreg.
unsafe fn store_selector_mem(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = cpu.segs[usize::from((*op).aux)].selector;
    let va = cpu.ea(op);
    t!(cpu, op, cpu.store(va, v));
    Op::run_next(cpu, op)
}

/// Reads a selector operand: `src`, or with `M` memory.
#[inline(always)]
unsafe fn selector<const M: bool>(cpu: &mut Cpu, op: *const Op) -> Result<u16, Trap> {
    if M {
        let va = cpu.ea(op);
        cpu.load(va)
    } else {
        Ok(cpu.reg((*op).src))
    }
}

/// Goes on after a load of the segment register in `aux`: a load of SS holds events off.
unsafe fn after_load(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if usize::from((*op).aux) != seg::SS {
        return Op::run_next(cpu, op);
    }
    cpu.inhibit = true;
    cpu.system.stack_shadow = true;
    cpu.end(op, cpu.next_rip(op))
}

/// MOV Sreg, r/m16.
unsafe fn load_selector<const M: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, selector::<M>(cpu, op));
    t!(cpu, op, cpu.load_segment(usize::from((*op).aux), v));
    after_load(cpu, op)
}

/// PUSH FS, PUSH GS.
unsafe fn push_selector<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = u64::from(cpu.segs[usize::from((*op).aux)].selector);
    let sp = cpu.slot(reg::RSP).wrapping_sub(T::BYTES);
    t!(cpu, op, cpu.store(sp, T::from_u64(v)));
    cpu.set_slot(reg::RSP, sp);
    Op::run_next(cpu, op)
}

/// POP FS, POP GS.
unsafe fn pop_selector<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let sp = cpu.slot(reg::RSP);
    let v = t!(cpu, op, cpu.load::<T>(sp)).to_u64() as u16;
    t!(cpu, op, cpu.load_segment(usize::from((*op).aux), v));
    cpu.set_slot(reg::RSP, sp.wrapping_add(T::BYTES));
    Op::run_next(cpu, op)
}

/// LSS, LFS, LGS.
unsafe fn load_far_pointer<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let va = cpu.ea(op);
    let offset: T = t!(cpu, op, cpu.load(va));
    let v: u16 = t!(cpu, op, cpu.load(va.wrapping_add(T::BYTES)));
    t!(cpu, op, cpu.load_segment(usize::from((*op).aux), v));
    cpu.set_reg((*op).dst, offset);
    cpu.end(op, cpu.next_rip(op))
}

/// SGDT, or with `I` SIDT.
unsafe fn store_table<const I: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let table = if I { cpu.idtr } else { cpu.gdtr };
    let va = cpu.ea(op);
    t!(cpu, op, cpu.probe_write(va, 10));
    t!(cpu, op, cpu.store(va, table.limit));
    t!(cpu, op, cpu.store(va.wrapping_add(2), table.base));
    Op::run_next(cpu, op)
}

/// LGDT, or with `I` LIDT.
unsafe fn load_table<const I: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let va = cpu.ea(op);
    let limit: u16 = t!(cpu, op, cpu.load(va));
    let base: u64 = t!(cpu, op, cpu.load(va.wrapping_add(2)));
    if !canonical(base) {
        cpu.gp0();
        return cpu.trap(op);
    }
    let table = Table { base, limit };
    if I {
        cpu.idtr = table;
    } else {
        cpu.gdtr = table;
    }
    Op::run_next(cpu, op)
}

/// SLDT, or with `aux` STR, to a register.
unsafe fn store_system_selector<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = if (*op).aux != 0 { cpu.tr.selector } else { cpu.ldtr.selector };
    cpu.set_reg((*op).dst, T::from_u64(u64::from(v)));
    Op::run_next(cpu, op)
}

/// SLDT, STR to memory.
unsafe fn store_system_selector_mem(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = if (*op).aux != 0 { cpu.tr.selector } else { cpu.ldtr.selector };
    let va = cpu.ea(op);
    t!(cpu, op, cpu.store(va, v));
    Op::run_next(cpu, op)
}

/// LLDT, or with `aux` LTR.
unsafe fn load_system_selector<const M: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    t!(cpu, op, cpu.need_ring0());
    let v = t!(cpu, op, selector::<M>(cpu, op));
    t!(cpu, op, if (*op).aux != 0 { cpu.load_tr(v) } else { cpu.load_ldtr(v) });
    Op::run_next(cpu, op)
}

/// VERR, or with `aux` VERW.
unsafe fn verify<const M: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, selector::<M>(cpu, op));
    let found = t!(cpu, op, cpu.visible_descriptor(v));
    let write = (*op).aux != 0;
    let ok = found.is_some_and(|(s, _)| match (s.is_code(), write) {
        (true, true) => false,
        (true, false) => s.has(attr::READ_WRITE),
        (false, true) => s.is_data() && s.has(attr::READ_WRITE),
        (false, false) => s.is_data(),
    });
    cpu.fl.set_zf(ok);
    Op::run_next(cpu, op)
}

/// LAR, or with `aux` LSL.
unsafe fn describe<T: Int, const M: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let v = t!(cpu, op, selector::<M>(cpu, op));
    let found = t!(cpu, op, cpu.visible_descriptor(v));
    let limit = (*op).aux != 0;
    let result = found.and_then(|(s, raw)| {
        let kind = s.attributes & attr::SYSTEM;
        // Of the system descriptors: LDT and TSS, and for LAR the call gate.
        let fits = kind & attr::S != 0 || matches!(kind, 2 | 9 | 11) || kind == 12 && !limit;
        fits.then(|| if limit { u64::from(s.limit) } else { raw >> 32 & 0x00f0_ff00 })
    });
    if let Some(r) = result {
        cpu.set_reg((*op).dst, T::from_u64(r));
    }
    cpu.fl.set_zf(result.is_some());
    Op::run_next(cpu, op)
}

/// RDFSBASE, RDGSBASE: `aux` is the slot.
unsafe fn read_base<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.ctl.cr4 & cr4::FSGSBASE == 0 {
        cpu.raise(vector::UD, None);
        return cpu.trap(op);
    }
    let v = cpu.slot((*op).aux);
    cpu.set_reg((*op).dst, T::from_u64(v));
    Op::run_next(cpu, op)
}

/// WRFSBASE, WRGSBASE.
unsafe fn write_base<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.ctl.cr4 & cr4::FSGSBASE == 0 {
        cpu.raise(vector::UD, None);
        return cpu.trap(op);
    }
    let v = cpu.reg::<T>((*op).src).to_u64();
    if !canonical(v) {
        cpu.gp0();
        return cpu.trap(op);
    }
    cpu.set_slot((*op).aux, v);
    Op::run_next(cpu, op)
}

/// RDRAND, RDSEED: CF says whether there was a number; the other flags are cleared.
unsafe fn random<T: Int>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let word = cpu.random_word();
    cpu.set_reg((*op).dst, T::from_u64(word.unwrap_or(0)));
    cpu.fl.set_bits(if word.is_some() { bit::CF } else { 0 });
    Op::run_next(cpu, op)
}
