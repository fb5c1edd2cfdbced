//! The interrupt controllers and timers of a machine, behind one lock, and the news of them to the CPU.
//!
//! A backend may have its own instead ([`HostChips`]): then only the levels of the lines are kept here, and they are
//! never pending as far as the machine is concerned.
//!
//! **Lock order:** devices drive their lines with their own locks held ([`Line`]); this lock is always the inner one, and
//! nothing is called with it held but the CPU's notifier, which takes none.

pub mod ioapic;
pub mod lapic;
pub mod pit;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use self::ioapic::{Ioapic, IoapicState, IoapicStateError};
use self::lapic::{Lapic, LapicState, LapicStateError};
use self::pit::{Pit, PitState, PitStateError};
use super::platform::PIT_PIN;
use super::vcpu::HostChips;

/// No deadline.
const NEVER: u64 = u64::MAX;

/// Saved state of all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipState {
    /// The local APIC.
    pub lapic: LapicState,
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The interval timer.
    pub pit: PitState,
}

/// Saved state that no machine can have.
#[derive(Debug, thiserror::Error)]
pub enum IrqchipStateError {
    /// The local APIC's.
    #[error(transparent)]
    Lapic(#[from] LapicStateError),
    /// The I/O APIC's.
    #[error(transparent)]
    Ioapic(#[from] IoapicStateError),
    /// The interval timer's.
    #[error(transparent)]
    Pit(#[from] PitStateError),
}

#[derive(Debug, Default)]
struct Chips {
    lapic: Lapic,
    ioapic: Ioapic,
    pit: Pit,
}

/// Tells the CPU that an interrupt is deliverable; takes no lock, may be called from any thread.
pub type Notifier = Box<dyn Fn() + Send + Sync>;

/// The interrupt controllers of one machine.
#[derive(Default)]
pub struct Irqchip {
    chips: Mutex<Chips>,
    /// Whether a vector is deliverable; changes only with the lock held.
    pending: AtomicBool,
    /// The earliest timer in guest time, or [`NEVER`]; changes only with the lock held.
    deadline: AtomicU64,
    /// The level of each input, so that a device which repeats itself costs nothing.
    levels: AtomicU32,
    notifier: OnceLock<Notifier>,
    /// The backend's own controllers, which then take the place of `chips`. They belong to the CPUs and end with them, as guest memory
    /// does, though handles of the machine are left.
    host: Option<Weak<dyn HostChips>>,
}

impl std::fmt::Debug for Irqchip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Irqchip").field("chips", &*self.lock()).finish_non_exhaustive()
    }
}

impl Irqchip {
    /// Everything as after reset, in a machine with so many CPUs.
    pub fn new(cpus: u8) -> Irqchip {
        let chips = Chips { lapic: Lapic::new(), ioapic: Ioapic::new(cpus), pit: Pit::new() };
        Irqchip { chips: Mutex::new(chips), deadline: AtomicU64::new(NEVER), ..Irqchip::default() }
    }

    /// Goes on where `state` was saved; timers run on from guest time `now`.
    ///
    /// # Errors
    /// No machine can have this state.
    pub fn restore(state: &IrqchipState, now: u64) -> Result<Irqchip, IrqchipStateError> {
        let chips = Chips {
            lapic: Lapic::restore(&state.lapic, now)?,
            ioapic: Ioapic::restore(&state.ioapic)?,
            pit: Pit::restore(&state.pit)?,
        };
        let irqchip = Irqchip {
            levels: AtomicU32::new(state.ioapic.irr),
            deadline: AtomicU64::new(NEVER),
            ..Irqchip::default()
        };
        irqchip.with(|own| *own = chips);
        Ok(irqchip)
    }

    /// Hands this state over to the backend's own controllers, which all interrupts go through from now on.
    ///
    /// # Errors
    /// The backend refuses it.
    pub fn hosted(self, now: u64, host: &Arc<dyn HostChips>) -> Result<Irqchip, String> {
        host.set_irqchip(&self.state(now)?)?;
        Ok(Irqchip {
            levels: self.levels,
            host: Some(Arc::downgrade(host)),
            deadline: AtomicU64::new(NEVER),
            ..Irqchip::default()
        })
    }

    /// The state to save, at guest time `now`. Timers that are due fire first: a count that has run out looks like one
    /// that never ran. With controllers of the backend's own, no CPU runs.
    ///
    /// # Errors
    /// The backend cannot tell.
    pub fn state(&self, now: u64) -> Result<IrqchipState, String> {
        if let Some(host) = &self.host {
            let host = host.upgrade().ok_or("The machine has ended")?;
            let mut state = host.irqchip()?;
            state.ioapic.irr = self.levels.load(Ordering::Acquire);
            return Ok(state);
        }
        self.expire(now);
        let chips = self.lock();
        Ok(IrqchipState {
            lapic: chips.lapic.state(now),
            ioapic: chips.ioapic.state(),
            pit: chips.pit.state(),
        })
    }

    /// Sets who is told of deliverable interrupts. Only the first call counts.
    pub fn set_notifier(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
        if self.pending() {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(notifier) = self.notifier.get() {
            notifier();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Chips> {
        // The registers are valid at any point; a panic elsewhere ends the machine.
        self.chips.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` under the lock and publishes what it changed.
    fn with<R>(&self, f: impl FnOnce(&mut Chips) -> R) -> R {
        let mut chips = self.lock();
        let result = f(&mut chips);
        let pending = chips.lapic.pending().is_some();
        let deadline = [chips.lapic.deadline(), chips.pit.deadline()].into_iter().flatten().min();
        self.deadline.store(deadline.unwrap_or(NEVER), Ordering::Release);
        self.pending.store(pending, Ordering::Release);
        drop(chips);
        // Also when it was pending before: the CPU looks only after a hint.
        if pending {
            self.notify();
        }
        result
    }

    /// Whether the CPU would get an interrupt now.
    pub fn pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// The CPU takes the highest pending vector.
    pub fn acknowledge(&self) -> Option<u8> {
        self.with(|chips| chips.lapic.acknowledge())
    }

    /// CR8.
    pub fn task_priority(&self) -> u8 {
        self.lock().lapic.task_priority()
    }

    /// Sets CR8.
    pub fn set_task_priority(&self, priority: u8) {
        self.with(|chips| chips.lapic.set_task_priority(priority));
    }

    /// The next guest time at which [`expire`](Self::expire) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        Some(self.deadline.load(Ordering::Acquire)).filter(|deadline| *deadline != NEVER)
    }

    /// Lets timers fire that are due.
    pub fn expire(&self, now: u64) {
        if self.deadline.load(Ordering::Relaxed) > now {
            return;
        }
        self.with(|Chips { lapic, ioapic, pit }| {
            lapic.expire(now);
            if pit.expire(now) {
                ioapic.set_line(PIT_PIN, true, lapic);
                ioapic.set_line(PIT_PIN, false, lapic);
            }
        });
    }

    /// Reads a local APIC register.
    pub fn read_lapic(&self, offset: u64, now: u64) -> u32 {
        self.lock().lapic.read(offset, now)
    }

    /// Writes a local APIC register.
    pub fn write_lapic(&self, offset: u64, value: u32, now: u64) {
        self.with(|Chips { lapic, ioapic, .. }| {
            if let Some(vector) = lapic.write(offset, value, now) {
                ioapic.end_of_interrupt(vector, lapic);
            }
        });
    }

    /// Reads an I/O APIC register.
    pub fn read_ioapic(&self, offset: u64) -> u32 {
        self.lock().ioapic.read(offset)
    }

    /// Writes an I/O APIC register.
    pub fn write_ioapic(&self, offset: u64, value: u32) {
        self.with(|Chips { lapic, ioapic, .. }| ioapic.write(offset, value, lapic));
    }

    /// Reads a port of the interval timer or of the absent 8259s.
    pub fn read_pit(&self, port: u16, now: u64) -> u8 {
        self.lock().pit.read(port, now)
    }

    /// Writes a port of the interval timer or of the absent 8259s.
    pub fn write_pit(&self, port: u16, value: u8, now: u64) {
        self.with(|chips| chips.pit.write(port, value, now));
    }

    fn set_line(&self, pin: u8, high: bool) {
        let bit = 1u32.checked_shl(u32::from(pin)).unwrap_or(0);
        let before = if high {
            self.levels.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.levels.fetch_and(!bit, Ordering::AcqRel)
        };
        if (before & bit != 0) == high {
            return;
        }
        if let Some(host) = &self.host {
            if let Some(host) = host.upgrade() {
                host.set_line(pin, high);
            }
        } else {
            self.with(|Chips { lapic, ioapic, .. }| ioapic.set_line(pin, high, lapic));
        }
    }
}

/// One input of the I/O APIC, as a device drives it. The device serialises its own calls.
#[derive(Debug, Clone)]
pub struct Line {
    irqchip: Arc<Irqchip>,
    pin: u8,
}

impl Line {
    /// Pin `pin` of `irqchip`.
    pub fn new(irqchip: &Arc<Irqchip>, pin: u8) -> Line {
        Line { irqchip: Arc::clone(irqchip), pin }
    }

    /// Drives the line.
    pub fn set(&self, high: bool) {
        self.irqchip.set_line(self.pin, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unmask(chip: &Irqchip, pin: u32, vector: u32) {
        chip.write_ioapic(0, 0x10 + pin * 2);
        chip.write_ioapic(0x10, vector);
    }

    #[test]
    fn a_line_reaches_the_cpu_once_per_rise() {
        let chip = Arc::new(Irqchip::new(1));
        let told = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&told);
        chip.set_notifier(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        chip.write_lapic(0xf0, 0x1ff, 0);
        unmask(&chip, 5, 0x35);
        let line = Line::new(&chip, 5);
        line.set(true);
        line.set(true);
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert!(chip.pending());
        assert_eq!(chip.acknowledge(), Some(0x35));
        assert!(!chip.pending());
        line.set(false);
        chip.write_lapic(0xb0, 0, 0);
        assert!(!chip.pending());
        Line::new(&chip, 200).set(true);
    }

    #[test]
    fn the_earliest_timer_is_the_deadline() {
        let chip = Irqchip::new(1);
        chip.write_lapic(0xf0, 0x1ff, 0);
        chip.write_lapic(0x3e0, 11, 0);
        chip.write_lapic(0x320, 0xec, 0);
        chip.write_lapic(0x380, 50_000_000, 0);
        assert_eq!(chip.deadline(), Some(50_000_000));
        for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
            chip.write_pit(port, value, 0);
        }
        unmask(&chip, u32::from(PIT_PIN), 0x30);
        assert_eq!(chip.deadline(), Some(10_000_150));
        chip.expire(10_000_150);
        assert_eq!(chip.acknowledge(), Some(0x30));
        assert_eq!(chip.deadline(), Some(20_000_300));
        // Both go on after a restore: the interval timer's is earlier.
        let restored = Irqchip::restore(&chip.state(15_000_000).unwrap(), 15_000_000).unwrap();
        assert_eq!(restored.deadline(), Some(20_000_300));
        restored.write_pit(0x43, 0x30, 15_000_000);
        assert_eq!(restored.deadline(), Some(50_000_000));
    }

    #[test]
    fn a_timer_that_is_due_when_saved_is_not_lost() {
        let chip = Irqchip::new(1);
        chip.write_lapic(0xf0, 0x1ff, 0);
        chip.write_lapic(0x320, 0xec, 0);
        chip.write_lapic(0x380, 1000, 0);
        let restored = Irqchip::restore(&chip.state(1_000_000).unwrap(), 1_000_000).unwrap();
        assert_eq!(restored.acknowledge(), Some(0xec));
    }

    #[test]
    fn a_saved_pending_interrupt_is_pending_again() {
        let chip = Arc::new(Irqchip::new(1));
        chip.write_lapic(0xf0, 0x1ff, 0);
        unmask(&chip, 7, 0x37);
        Line::new(&chip, 7).set(true);
        let state = chip.state(9).unwrap();
        let restored = Arc::new(Irqchip::restore(&state, 9).unwrap());
        assert_eq!(restored.state(9).unwrap(), state);
        assert!(restored.pending());
        assert_eq!(restored.acknowledge(), Some(0x37));
        // The line was high already: driving it again is no rise.
        Line::new(&restored, 7).set(true);
        restored.write_lapic(0xb0, 0, 9);
        assert!(!restored.pending());
    }
}
