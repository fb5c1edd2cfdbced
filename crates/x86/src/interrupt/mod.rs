//! Event delivery: exceptions, external interrupts and INT n through the IDT (Intel SDM vol. 3, 6.8 to 6.15).
//!
//! A fault on the way becomes the next event: by itself, as a double fault, or as the triple fault that ends the
//! machine; then a text tells which events led there.

mod transfer;

#[cfg(test)]
mod tests;

use std::fmt::Write;

pub(crate) use transfer::lower;

use crate::cpu::{Cpu, Segment, Stop, Trap, TrapInfo, seg, vector};
use crate::flags::bit;
use crate::mmu::canonical;
use crate::op::reg;
use crate::system::attr;

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Exception,
    External,
    /// INT n, INT3.
    Software,
}

/// DR6.BS: a single-step trap.
const DR6_BS: u64 = 1 << 14;

/// What becomes of an exception during the delivery of another (SDM vol. 3, tables 6-4 and 6-5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escalation {
    Serial,
    Double,
    Triple,
}

fn escalate(first: u8, second: u8) -> Escalation {
    let contributory = |v| matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP);
    match first {
        vector::DF if contributory(second) || second == vector::PF => Escalation::Triple,
        vector::PF if contributory(second) || second == vector::PF => Escalation::Double,
        _ if contributory(first) && contributory(second) => Escalation::Double,
        _ => Escalation::Serial,
    }
}

impl Cpu {
    /// RFLAGS as a whole.
    #[inline(always)]
    pub(crate) fn rflags(&self) -> u64 {
        self.rflags | self.fl.bits()
    }

    /// Sets RFLAGS as a whole; RF is not kept, as there are no instruction breakpoints.
    #[inline(always)]
    pub(crate) fn set_rflags(&mut self, v: u64) {
        self.fl.set_bits(v);
        self.rflags = v & !(bit::ARITHMETIC | bit::RF) | 2;
    }

    /// A 64-bit stack pointer of the TSS, at byte `offset`.
    unsafe fn tss_stack(&mut self, offset: u64, ext: u32) -> Result<u64, Trap> {
        if offset + 7 > u64::from(self.tr.limit) || self.tr.attributes & attr::P == 0 {
            let error = u32::from(self.tr.selector & 0xfffc) | ext;
            return Err(self.raise(vector::TS, Some(error)));
        }
        let at = self.tr.base.wrapping_add(offset);
        self.load_sys(at)
    }

    /// Enters an event's handler; `rip` is the address to save. Nothing but memory has changed on failure.
    unsafe fn deliver(
        &mut self,
        number: u8,
        error: Option<u32>,
        source: Source,
        rip: u64,
    ) -> Result<(), Trap> {
        let ext = u32::from(source != Source::Software);
        let bad_gate = u32::from(number) << 3 | 2 | ext;
        if u32::from(number) * 16 + 15 > u32::from(self.idtr.limit) {
            return Err(self.raise(vector::GP, Some(bad_gate)));
        }
        let at = self.idtr.base.wrapping_add(u64::from(number) * 16);
        let low: u64 = self.load_sys(at)?;
        let high: u64 = self.load_sys(at.wrapping_add(8))?;
        let kind = low >> 40 & 0x1f;
        if kind & 0x1e != 0xe || source == Source::Software && (low >> 45 & 3) < u64::from(self.cpl) {
            return Err(
                self.raise(vector::GP, Some(if kind & 0x1e != 0xe { bad_gate } else { bad_gate & !1 }))
            );
        }
        if low >> 47 & 1 == 0 {
            return Err(self.raise(vector::NP, Some(bad_gate)));
        }
        let selector = (low >> 16) as u16;
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        if selector & 0xfffc == 0 {
            return Err(self.raise(vector::GP, Some(ext)));
        }
        let (mut cs, cs_at) = self.read_descriptor(selector, ext)?;
        let bad_selector = u32::from(selector & 0xfffc) | ext;
        if !cs.is_code() || !cs.is_long() || cs.dpl() > self.cpl {
            return Err(self.raise(vector::GP, Some(bad_selector)));
        }
        if !cs.present() {
            return Err(self.raise(vector::NP, Some(bad_selector)));
        }
        let cpl = if cs.has(attr::CONFORMING) { self.cpl } else { cs.dpl() };
        let ist = low >> 32 & 7;
        let stack = if ist != 0 {
            self.tss_stack(0x1c + ist * 8, ext)?
        } else if cpl != self.cpl {
            self.tss_stack(4 + u64::from(cpl) * 8, ext)?
        } else {
            self.slot(reg::RSP)
        } & !15;

        let mut flags = self.rflags();
        if source == Source::Exception && !matches!(number, vector::DB | vector::BP | vector::OF | vector::DF)
        {
            // Faults are saved so that a breakpoint on the instruction does not fire again.
            flags |= bit::RF;
        }
        let frame = [
            u64::from(error.unwrap_or(0)),
            rip,
            u64::from(self.segs[seg::CS].selector),
            flags,
            self.slot(reg::RSP),
            u64::from(self.segs[seg::SS].selector),
        ];
        let frame = if error.is_some() { &frame[..] } else { &frame[1..] };
        let sp = stack.wrapping_sub(frame.len() as u64 * 8);
        if !canonical(sp) || !canonical(stack.wrapping_sub(1)) {
            return Err(self.raise(vector::SS, Some(ext)));
        }
        if !canonical(target) {
            return Err(self.raise(vector::GP, Some(ext)));
        }
        self.set_accessed(&mut cs, cs_at)?;
        self.store_frame(sp, frame, cpl == 3)?;

        cs.selector = selector & 0xfffc | u16::from(cpl);
        self.segs[seg::CS] = cs;
        if cpl != self.cpl {
            self.segs[seg::SS] = Segment::null(u16::from(cpl));
            self.set_cpl(cpl);
        }
        self.set_slot(reg::RSP, sp);
        let clear = bit::TF | bit::NT | bit::VM | bit::RF | if kind == 0xe { bit::IF } else { 0 };
        self.rflags &= !clear;
        self.inhibit = false;
        self.rip = target;
        self.stop = Stop::Next;
        Ok(())
    }

    /// Delivers the exception in `trap`, to be taken at `rip`.
    ///
    /// # Errors
    /// A triple fault (`stop` is `Shutdown`) or absent RAM (`RamFault`), with a text.
    pub(crate) unsafe fn deliver_exception(&mut self) -> Result<(), String> {
        // A guest that does nothing but fault must use up its budget, too.
        self.icount += 1;
        let mut event = self.trap;
        let mut history = [event; 4];
        let mut events = 0;
        // Outside sequences: what it writes may be code, even of the page that was running.
        let alone = std::mem::replace(&mut self.alone, true);
        let result = loop {
            if let Some(count) = self.diagnostics.exceptions.get_mut(usize::from(event.vector)) {
                *count += 1;
            }
            if event.vector == vector::PF {
                self.ctl.cr2 = event.address;
            }
            history[events & 3] = event;
            events += 1;
            if self.deliver(event.vector, event.error, Source::Exception, self.rip).is_ok() {
                break Ok(());
            }
            if self.stop != Stop::Exception {
                break Err(self.ram_error.clone());
            }
            match escalate(event.vector, self.trap.vector) {
                Escalation::Serial => event = self.trap,
                Escalation::Double => {
                    history[events & 3] = self.trap;
                    events += 1;
                    event = TrapInfo { vector: vector::DF, error: Some(0), address: 0 };
                }
                Escalation::Triple => {
                    self.stop = Stop::Shutdown;
                    break Err(self.triple_fault_story(&history[..events.min(4)]));
                }
            }
        };
        self.alone = alone;
        result
    }

    /// Delivers an external interrupt at `rip`.
    ///
    /// # Errors
    /// As [`Cpu::deliver_exception`].
    pub(crate) unsafe fn deliver_interrupt(&mut self, number: u8) -> Result<(), String> {
        self.diagnostics.interrupts += 1;
        let alone = std::mem::replace(&mut self.alone, true);
        let result = self.deliver(number, None, Source::External, self.rip);
        self.alone = alone;
        match result {
            Ok(()) => Ok(()),
            Err(Trap) if self.stop == Stop::Exception => self.deliver_exception(),
            Err(Trap) => Err(self.ram_error.clone()),
        }
    }

    /// After an instruction that began with TF set: whether a single-step trap is due; then `trap` holds it.
    pub(crate) fn single_step_trap(&mut self) -> bool {
        if std::mem::take(&mut self.system.no_step) || self.inhibit && self.system.stack_shadow {
            return false;
        }
        self.ctl.dr6 |= DR6_BS;
        self.trap = TrapInfo { vector: vector::DB, error: None, address: 0 };
        self.stop = Stop::Exception;
        true
    }

    #[cold]
    fn triple_fault_story(&self, history: &[TrapInfo]) -> String {
        let mut s = String::from("Triple fault: ");
        for (i, t) in history.iter().chain([&self.trap]).enumerate() {
            if i > 0 {
                s.push_str(", then ");
            }
            s.push_str(name(t.vector));
            if let Some(e) = t.error {
                let _ = write!(s, "({e:#x})");
            }
            if t.vector == vector::PF {
                let _ = write!(s, " at {:#x}", t.address);
            }
        }
        let _ = write!(
            s,
            "; RIP {:#x}, CS {:#x}, RSP {:#x}, CR3 {:#x}, IDT {:#x}+{:#x}",
            self.rip,
            self.segs[seg::CS].selector,
            self.r[usize::from(reg::RSP) / 8],
            self.ctl.cr3,
            self.idtr.base,
            self.idtr.limit
        );
        s
    }
}

fn name(v: u8) -> &'static str {
    const NAMES: [&str; 20] = [
        "#DE",
        "#DB",
        "NMI",
        "#BP",
        "#OF",
        "#BR",
        "#UD",
        "#NM",
        "#DF",
        "exception 9",
        "#TS",
        "#NP",
        "#SS",
        "#GP",
        "#PF",
        "exception 15",
        "#MF",
        "#AC",
        "#MC",
        "#XM",
    ];
    NAMES.get(usize::from(v)).copied().unwrap_or("an exception")
}
