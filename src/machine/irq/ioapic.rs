//! The I/O APIC: 24 pins, edge and level (Intel 82093AA datasheet; state as in KVM's `struct kvm_ioapic_state`).
//!
//! An edge-triggered pin sends its message when its line rises; a level-triggered one sends it whenever its line is
//! high, it is not masked and its last message has ended (remote IRR clear).

use serde::{Deserialize, Serialize};

use super::lapic::{Delivery, Lapic};
use crate::machine::platform::{IOAPIC_BASE, IOAPIC_PINS, ioapic_id};

const VERSION: u32 = 0x11 | (IOAPIC_PINS as u32 - 1) << 16;
/// Redirection entry bits.
const LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
/// A level-triggered message has been sent and not ended.
pub(in crate::machine) const REMOTE_IRR: u64 = 1 << 14;
/// Level-triggered.
pub(in crate::machine) const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// Bits of an entry that exist.
pub(in crate::machine) const ENTRY: u64 = 0xff00_0000_0001_ffff;

/// Saved registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Address of the registers.
    pub base: u64,
    /// Index register.
    pub select: u32,
    /// Identification register's id.
    pub id: u32,
    /// Lines that are high.
    pub irr: u32,
    /// Redirection table.
    pub entries: Vec<u64>,
}

/// Saved registers that no I/O APIC can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Saved state of the I/O APIC is invalid: {0}")]
pub struct IoapicStateError(&'static str);

/// The I/O APIC.
#[derive(Debug, Clone)]
pub struct Ioapic {
    select: u32,
    id: u32,
    /// Lines that are high.
    lines: u32,
    entries: [u64; IOAPIC_PINS],
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new(1)
    }
}

impl Ioapic {
    /// As after reset, in a machine with so many CPUs: everything masked.
    pub fn new(cpus: u8) -> Ioapic {
        Ioapic { select: 0, id: u32::from(ioapic_id(cpus)), lines: 0, entries: [MASKED; IOAPIC_PINS] }
    }

    /// Reads the register at `offset` of the window.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.select,
            0x10 => match self.select {
                0 | 2 => self.id << 24,
                1 => VERSION,
                select => self.entry_of(select).map_or(0, |(pin, shift)| (self.entries[pin] >> shift) as u32),
            },
            _ => 0,
        }
    }

    /// Writes the register at `offset` of the window.
    pub fn write(&mut self, offset: u64, value: u32, lapic: &mut Lapic) {
        match (offset, self.select) {
            (0x00, _) => self.select = value & 0xff,
            (0x10, 0) => self.id = value >> 24 & 0xf,
            (0x10, select) => {
                let Some((pin, shift)) = self.entry_of(select) else { return };
                let old = self.entries[pin];
                let mut new = old & !(0xffff_ffff << shift) | u64::from(value) << shift;
                new = new & ENTRY & !READ_ONLY | old & READ_ONLY;
                if new & LEVEL == 0 {
                    new &= !REMOTE_IRR;
                }
                self.entries[pin] = new;
                if new & LEVEL != 0 && self.lines & 1 << pin != 0 {
                    self.deliver(pin, lapic);
                }
            }
            _ => {}
        }
    }

    /// Which half of which entry a register index names.
    fn entry_of(&self, select: u32) -> Option<(usize, u32)> {
        let index = select.checked_sub(0x10)?;
        let pin = (index / 2) as usize;
        (pin < IOAPIC_PINS).then_some((pin, index % 2 * 32))
    }

    /// A device drives a line.
    pub fn set_line(&mut self, pin: u8, high: bool, lapic: &mut Lapic) {
        let pin = usize::from(pin);
        if pin >= IOAPIC_PINS {
            return;
        }
        let rose = high && self.lines & 1 << pin == 0;
        self.lines = if high { self.lines | 1 << pin } else { self.lines & !(1 << pin) };
        if rose {
            self.deliver(pin, lapic);
        }
    }

    /// The local APIC announces the end of a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8, lapic: &mut Lapic) {
        for pin in 0..IOAPIC_PINS {
            let entry = self.entries[pin];
            if entry as u8 == vector && entry & LEVEL != 0 && entry & REMOTE_IRR != 0 {
                self.entries[pin] &= !REMOTE_IRR;
                if self.lines & 1 << pin != 0 {
                    self.deliver(pin, lapic);
                }
            }
        }
    }

    fn deliver(&mut self, pin: usize, lapic: &mut Lapic) {
        let entry = self.entries[pin];
        let level = entry & LEVEL != 0;
        if entry & MASKED != 0 || level && entry & REMOTE_IRR != 0 {
            return;
        }
        if Delivery::from_bits((entry >> 8) as u32) == Delivery::Other
            || !lapic.matches(entry & LOGICAL != 0, (entry >> 56) as u8)
        {
            return;
        }
        lapic.accept(entry as u8, level);
        if level {
            self.entries[pin] |= REMOTE_IRR;
        }
    }

    /// The registers to save.
    pub fn state(&self) -> IoapicState {
        IoapicState {
            base: IOAPIC_BASE,
            select: self.select,
            id: self.id,
            irr: self.lines,
            entries: self.entries.to_vec(),
        }
    }

    /// An I/O APIC that goes on where `state` was saved.
    ///
    /// # Errors
    /// No I/O APIC can have these registers.
    pub fn restore(state: &IoapicState) -> Result<Ioapic, IoapicStateError> {
        let entries: [u64; IOAPIC_PINS] = state
            .entries
            .as_slice()
            .try_into()
            .map_err(|_| IoapicStateError("the redirection table has another size"))?;
        if state.base != IOAPIC_BASE {
            return Err(IoapicStateError("the registers are elsewhere"));
        }
        if state.select > 0xff || state.id > 0xf || state.irr >> IOAPIC_PINS != 0 {
            return Err(IoapicStateError("a register is out of range"));
        }
        if entries.iter().any(|entry| entry & !ENTRY != 0 || entry & (LEVEL | REMOTE_IRR) == REMOTE_IRR) {
            return Err(IoapicStateError("a redirection entry is impossible"));
        }
        Ok(Ioapic { select: state.select, id: state.id, lines: state.irr, entries })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts() -> (Ioapic, Lapic) {
        let mut lapic = Lapic::new();
        lapic.write(0xf0, 0x1ff, 0);
        (Ioapic::new(1), lapic)
    }

    fn program(ioapic: &mut Ioapic, lapic: &mut Lapic, pin: u32, entry: u64) {
        ioapic.write(0, 0x11 + pin * 2, lapic);
        ioapic.write(0x10, (entry >> 32) as u32, lapic);
        ioapic.write(0, 0x10 + pin * 2, lapic);
        ioapic.write(0x10, entry as u32, lapic);
    }

    /// Acknowledges and ends one interrupt.
    fn serve(ioapic: &mut Ioapic, lapic: &mut Lapic) -> Option<u8> {
        let vector = lapic.acknowledge();
        if let Some(ended) = lapic.write(0xb0, 0, 0) {
            ioapic.end_of_interrupt(ended, lapic);
        }
        vector
    }

    #[test]
    fn edge_interrupts_come_once_per_rise() {
        let (mut ioapic, mut lapic) = parts();
        program(&mut ioapic, &mut lapic, 5, 0x35);
        ioapic.set_line(5, true, &mut lapic);
        ioapic.set_line(5, true, &mut lapic);
        assert_eq!(serve(&mut ioapic, &mut lapic), Some(0x35));
        assert_eq!(serve(&mut ioapic, &mut lapic), None);
        ioapic.set_line(5, false, &mut lapic);
        ioapic.set_line(5, true, &mut lapic);
        assert_eq!(serve(&mut ioapic, &mut lapic), Some(0x35));
    }

    #[test]
    fn level_interrupts_come_again_until_the_line_falls() {
        let (mut ioapic, mut lapic) = parts();
        program(&mut ioapic, &mut lapic, 6, 0x36 | LEVEL);
        ioapic.set_line(6, true, &mut lapic);
        assert_eq!(serve(&mut ioapic, &mut lapic), Some(0x36));
        // Still high: again, but not before the end of the first.
        assert_eq!(lapic.acknowledge(), Some(0x36));
        ioapic.set_line(6, false, &mut lapic);
        ioapic.set_line(6, true, &mut lapic);
        assert_eq!(lapic.pending(), None);
        ioapic.set_line(6, false, &mut lapic);
        assert_eq!(serve(&mut ioapic, &mut lapic), None);
        assert_eq!(serve(&mut ioapic, &mut lapic), None);
        assert_eq!(ioapic.entries[6] & REMOTE_IRR, 0);
    }

    #[test]
    fn unmasking_a_high_level_line_delivers() {
        let (mut ioapic, mut lapic) = parts();
        program(&mut ioapic, &mut lapic, 7, 0x37 | LEVEL | MASKED);
        ioapic.set_line(7, true, &mut lapic);
        assert_eq!(lapic.pending(), None);
        program(&mut ioapic, &mut lapic, 7, 0x37 | LEVEL);
        assert_eq!(serve(&mut ioapic, &mut lapic), Some(0x37));
    }

    #[test]
    fn messages_for_others_and_strange_modes_go_nowhere() {
        let (mut ioapic, mut lapic) = parts();
        for entry in [0x35 | 1 << 56, 0x35 | 7 << 8, 0x35 | LOGICAL | 1 << 56] {
            program(&mut ioapic, &mut lapic, 5, entry);
            ioapic.set_line(5, false, &mut lapic);
            ioapic.set_line(5, true, &mut lapic);
            assert_eq!(lapic.pending(), None);
        }
        ioapic.set_line(24, true, &mut lapic);
        assert_eq!(ioapic.lines, 1 << 5);
    }

    #[test]
    fn registers_read_back() {
        let (mut ioapic, mut lapic) = parts();
        ioapic.write(0, 1, &mut lapic);
        assert_eq!(ioapic.read(0x10), 0x0017_0011);
        ioapic.write(0, 0, &mut lapic);
        ioapic.write(0x10, 0x0300_0000, &mut lapic);
        assert_eq!(ioapic.read(0x10), 0x0300_0000);
        ioapic.write(0, 0x40, &mut lapic);
        ioapic.write(0x10, u32::MAX, &mut lapic);
        assert_eq!(ioapic.read(0x10), 0);
    }

    #[test]
    fn hostile_state_is_refused() {
        let good = Ioapic::new(1).state();
        assert!(Ioapic::restore(&good).is_ok());
        let bad = |change: fn(&mut IoapicState)| {
            let mut state = good.clone();
            change(&mut state);
            Ioapic::restore(&state).is_err()
        };
        assert!(bad(|s| s.entries.truncate(23)));
        assert!(bad(|s| s.entries[3] = REMOTE_IRR));
        assert!(bad(|s| s.entries[3] = 1 << 40));
        assert!(bad(|s| s.irr = 1 << 24));
        assert!(bad(|s| s.select = 0x100));
        assert!(bad(|s| s.base = 0));
    }

    proptest! {
        #[test]
        fn save_and_restore_change_nothing(
            writes in prop::collection::vec((any::<u8>(), any::<u32>()), 0..60),
            lines in prop::collection::vec((any::<u8>(), any::<bool>()), 0..40),
        ) {
            let (mut ioapic, mut lapic) = parts();
            for (select, value) in writes {
                ioapic.write(0, u32::from(select) % 0x40, &mut lapic);
                ioapic.write(0x10, value, &mut lapic);
            }
            for (pin, high) in lines {
                ioapic.set_line(pin, high, &mut lapic);
                serve(&mut ioapic, &mut lapic);
            }
            let state = ioapic.state();
            prop_assert_eq!(Ioapic::restore(&state).unwrap().state(), state);
        }
    }
}
