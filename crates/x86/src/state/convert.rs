//! [`Cpu::state`] and [`Cpu::set_state`]: between the CPU's working state and the neutral one.
//!
//! A state to load may come from anywhere. What is checked: whatever could bring the CPU into a mode that it does not
//! have (anything but 64-bit code with paging), or that an instruction could not have written.

use super::{CpuState, SegmentState, StateError, TableState};
use crate::cpu::{Control, Cpu, Segment, Stop, Table, seg};
use crate::flags::bit;
use crate::mmu::canonical;
use crate::op::reg;
use crate::system::{CR3_RESERVED, attr, cr0, cr4, efer, msr, valid_pat};

/// RFLAGS bits that exist.
const RFLAGS: u64 = bit::ARITHMETIC
    | bit::TF
    | bit::IF
    | bit::DF
    | bit::IOPL
    | bit::NT
    | bit::RF
    | bit::AC
    | bit::VIF
    | bit::VIP
    | bit::ID
    | 2;
/// MXCSR bits that exist.
const MXCSR: u32 = 0xffff;
/// Bytes of the FXSAVE image.
const FXSAVE: usize = 512;

fn segment_state(s: &Segment, base: u64) -> SegmentState {
    SegmentState { selector: s.selector, base, limit: s.limit, attributes: s.attributes }
}

fn segment(s: &SegmentState) -> Segment {
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes: s.attributes }
}

fn table_state(t: Table) -> TableState {
    TableState { base: t.base, limit: t.limit }
}

fn table(t: TableState) -> Table {
    Table { base: t.base, limit: t.limit }
}

/// An error unless the condition holds.
fn need(holds: bool, register: &'static str, value: u64) -> Result<(), StateError> {
    if holds { Ok(()) } else { Err(StateError::Register(register, value)) }
}

/// The fields of [`Control`] that are model-specific registers, by index, ascending.
fn msrs(c: &mut Control) -> [(u32, &mut u64); 12] {
    [
        (msr::SYSENTER_CS, &mut c.sysenter_cs),
        (msr::SYSENTER_ESP, &mut c.sysenter_esp),
        (msr::SYSENTER_EIP, &mut c.sysenter_eip),
        (msr::MISC_ENABLE, &mut c.misc_enable),
        (msr::PAT, &mut c.pat),
        (msr::EFER, &mut c.efer),
        (msr::STAR, &mut c.star),
        (msr::LSTAR, &mut c.lstar),
        (msr::CSTAR, &mut c.cstar),
        (msr::SFMASK, &mut c.sfmask),
        (msr::KERNEL_GS_BASE, &mut c.kernel_gs_base),
        (msr::TSC_AUX, &mut c.tsc_aux),
    ]
}

impl Cpu {
    /// The architectural state, between two instructions.
    pub fn state(&self) -> CpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.r[..16]);
        let mut segments = [SegmentState::default(); 6];
        for (i, (state, s)) in segments.iter_mut().zip(&self.segs).enumerate() {
            let base = match i {
                seg::FS => self.r[usize::from(reg::FS) / 8],
                seg::GS => self.r[usize::from(reg::GS) / 8],
                _ => s.base,
            };
            *state = segment_state(s, base);
        }
        let mut ctl = self.ctl;
        CpuState {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segments,
            ldtr: segment_state(&self.ldtr, self.ldtr.base),
            tr: segment_state(&self.tr, self.tr.base),
            gdtr: table_state(self.gdtr),
            idtr: table_state(self.idtr),
            cr0: ctl.cr0,
            cr2: ctl.cr2,
            cr3: ctl.cr3,
            cr4: ctl.cr4,
            dr: ctl.dr,
            dr6: ctl.dr6,
            dr7: ctl.dr7,
            msrs: msrs(&mut ctl).into_iter().map(|(index, v)| (index, *v)).collect(),
            fxsave: self.fxsave_image().to_vec(),
            halted: self.halted,
            interrupt_shadow: self.inhibit,
        }
    }

    /// Loads an architectural state. Every MSR that it does not name keeps its value.
    ///
    /// # Errors
    /// The first register that holds what this CPU could not have; nothing is changed then.
    pub fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let mut ctl = self.ctl;
        for &(index, v) in &state.msrs {
            match msrs(&mut ctl).into_iter().find(|(i, _)| *i == index) {
                Some((_, place)) => *place = v,
                None => return Err(StateError::UnknownMsr(index)),
            }
        }
        ctl.cr0 = state.cr0;
        ctl.cr2 = state.cr2;
        ctl.cr3 = state.cr3;
        ctl.cr4 = state.cr4;
        ctl.dr = state.dr;
        ctl.dr6 = state.dr6;
        ctl.dr7 = state.dr7;
        check_control(&ctl)?;
        check_segments(state)?;
        need(canonical(state.rip), "RIP", state.rip)?;
        need(state.rflags & !RFLAGS == 0 && state.rflags & 2 != 0, "RFLAGS", state.rflags)?;
        let image: &[u8; FXSAVE] =
            state.fxsave.as_slice().try_into().map_err(|_| StateError::FxsaveLength(state.fxsave.len()))?;
        let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
        need(mxcsr & !MXCSR == 0, "MXCSR", u64::from(mxcsr))?;

        self.r[..16].copy_from_slice(&state.gpr);
        self.r[usize::from(reg::FS) / 8] = state.segments[seg::FS].base;
        self.r[usize::from(reg::GS) / 8] = state.segments[seg::GS].base;
        for (s, state) in self.segs.iter_mut().zip(&state.segments) {
            *s = segment(state);
        }
        self.ldtr = segment(&state.ldtr);
        self.tr = segment(&state.tr);
        self.gdtr = table(state.gdtr);
        self.idtr = table(state.idtr);
        self.ctl = ctl;
        self.rip = state.rip;
        self.set_rflags(state.rflags);
        self.inhibit = state.interrupt_shadow;
        self.halted = state.halted;
        self.stop = Stop::Next;
        self.set_fxsave_image(image);
        self.cpl = (state.segments[seg::CS].selector & 3) as u8;
        self.flush_tlb(true);
        self.update_fp_gate();
        Ok(())
    }
}

fn check_control(c: &Control) -> Result<(), StateError> {
    const LONG: u64 = efer::LME | efer::LMA;
    need(c.cr0 & !cr0::DEFINED == 0, "CR0", c.cr0)?;
    need(c.cr0 & (cr0::PE | cr0::PG) == cr0::PE | cr0::PG, "CR0 without PE and PG", c.cr0)?;
    need(c.cr0 & (cr0::CD | cr0::NW) != cr0::NW, "CR0", c.cr0)?;
    need(c.cr3 & CR3_RESERVED == 0, "CR3", c.cr3)?;
    need(c.cr4 & !cr4::OFFERED == 0 && c.cr4 & cr4::PAE != 0, "CR4", c.cr4)?;
    need(c.efer & !efer::OFFERED == 0 && c.efer & LONG == LONG, "EFER", c.efer)?;
    for (name, v) in [
        ("LSTAR", c.lstar),
        ("CSTAR", c.cstar),
        ("KERNEL_GS_BASE", c.kernel_gs_base),
        ("SYSENTER_ESP", c.sysenter_esp),
        ("SYSENTER_EIP", c.sysenter_eip),
        ("DR0", c.dr[0]),
        ("DR1", c.dr[1]),
        ("DR2", c.dr[2]),
        ("DR3", c.dr[3]),
    ] {
        need(canonical(v), name, v)?;
    }
    for (name, v) in [
        ("SFMASK", c.sfmask),
        ("TSC_AUX", c.tsc_aux),
        ("SYSENTER_CS", c.sysenter_cs),
        ("DR6", c.dr6),
        ("DR7", c.dr7),
    ] {
        need(v >> 32 == 0, name, v)?;
    }
    need(valid_pat(c.pat), "PAT", c.pat)
}

fn check_segments(state: &CpuState) -> Result<(), StateError> {
    let cs = &state.segments[seg::CS];
    let attributes = u64::from(cs.attributes);
    let code = segment(cs);
    need(code.is_code() && code.is_long() && code.present(), "CS's access rights", attributes)?;
    let cpl = (cs.selector & 3) as u8;
    let dpl_fits = if code.has(attr::CONFORMING) { code.dpl() <= cpl } else { code.dpl() == cpl };
    need(dpl_fits, "CS's privilege level", attributes)?;
    let ss = &state.segments[seg::SS];
    need(ss.selector & 3 == u16::from(cpl), "SS's privilege level", u64::from(ss.selector))?;
    for (name, base) in [
        ("FS.base", state.segments[seg::FS].base),
        ("GS.base", state.segments[seg::GS].base),
        ("LDTR.base", state.ldtr.base),
        ("TR.base", state.tr.base),
        ("GDTR.base", state.gdtr.base),
        ("IDTR.base", state.idtr.base),
    ] {
        need(canonical(base), name, base)?;
    }
    Ok(())
}
