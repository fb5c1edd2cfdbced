//! Channel 0 of the 8254 interval timer, and the mask registers of the interrupt controllers before it.
//!
//! Linux does not trust a local APIC timer that it had to calibrate (there is no TSC deadline mode in the platform, whose
//! rate would belong to one host) before it has seen it agree with another tick. That other tick is this timer; once
//! the local APIC's has passed, it is stopped for good. The two 8259s are not there, but a mask register that can
//! be read back makes the kernel set up the ISA interrupts, the timer's among them.

use serde::{Deserialize, Serialize};

/// Counts per second.
const HZ: u64 = 1_193_182;
const NANOS: u64 = 1_000_000_000;

/// Saved registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    mode: u8,
    access: u8,
    reload: u32,
    /// Guest time at which the current count was loaded.
    started: Option<u64>,
    next: Option<u64>,
    write_high: bool,
    read_high: bool,
    low: u8,
    latch: Option<u16>,
    masks: [u8; 2],
}

/// Saved registers that no timer can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Saved state of the interval timer is invalid")]
pub struct PitStateError;

/// What the guest has programmed, as a backend with a timer of its own sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::machine) struct Programmed {
    /// Counting mode, 0 to 5.
    pub(in crate::machine) mode: u8,
    /// Which bytes of the count are accessed, 1 to 3.
    pub(in crate::machine) access: u8,
    /// The count; 0 is the longest.
    pub(in crate::machine) count: u32,
}

impl PitState {
    /// A timer that began to count at guest time `now`, if it does, and the masks of the absent 8259s.
    pub(in crate::machine) fn running(programmed: Option<Programmed>, masks: [u8; 2], now: u64) -> PitState {
        let mut pit = Pit::new();
        if let Some(Programmed { mode, access, count }) = programmed {
            (pit.0.mode, pit.0.access) = (mode, access);
            pit.load(count as u16, now);
        }
        PitState { masks, ..pit.0 }
    }

    /// What it counts, unless it has come to its end.
    pub(in crate::machine) fn programmed(&self) -> Option<Programmed> {
        self.next.map(|_| Programmed { mode: self.mode, access: self.access, count: self.reload })
    }

    /// The mask registers of the absent 8259s.
    pub(in crate::machine) fn masks(&self) -> [u8; 2] {
        self.masks
    }
}

/// The interval timer.
#[derive(Debug, Clone, Default)]
pub struct Pit(PitState);

impl Pit {
    /// As after power-on: nothing counts.
    pub fn new() -> Pit {
        let mut state = PitState { access: 3, ..PitState::default() };
        state.masks = [0xff; 2];
        Pit(state)
    }

    /// Whether `port` is one of this device's.
    pub fn owns(port: u16) -> bool {
        matches!(port, 0x40..=0x43 | 0x20 | 0x21 | 0xa0 | 0xa1 | 0x61)
    }

    /// The guest reads a port.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            0x40 => {
                let count = self.0.latch.unwrap_or_else(|| self.count(now));
                let high = match self.0.access {
                    1 => false,
                    2 => true,
                    _ => {
                        self.0.read_high = !self.0.read_high;
                        !self.0.read_high
                    }
                };
                if high || self.0.access != 3 {
                    self.0.latch = None;
                }
                count.to_le_bytes()[usize::from(high)]
            }
            0x21 => self.0.masks[0],
            0xa1 => self.0.masks[1],
            0x20 | 0xa0 => 0,
            // Port 0x61: channel 2's output, always done, so that nobody waits for it.
            0x61 => 0x20,
            _ => 0xff,
        }
    }

    /// The guest writes a port.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        match port {
            0x21 => self.0.masks[0] = value,
            0xa1 => self.0.masks[1] = value,
            // Other channels have no effect here, and read-back commands are not used for channel 0.
            0x43 if value >> 6 == 0 => {
                let access = value >> 4 & 3;
                if access == 0 {
                    self.0.latch = Some(self.count(now));
                    return;
                }
                // Modes 6 and 7 are 2 and 3.
                let mode = value >> 1 & 7;
                self.0 = PitState {
                    mode: if mode > 5 { mode - 4 } else { mode },
                    access,
                    masks: self.0.masks,
                    ..PitState::default()
                };
            }
            0x40 => match self.0.access {
                1 => self.load(u16::from(value), now),
                2 => self.load(u16::from(value) << 8, now),
                _ if self.0.write_high => {
                    self.0.write_high = false;
                    self.load(u16::from_le_bytes([self.0.low, value]), now);
                }
                _ => {
                    self.0.low = value;
                    self.0.write_high = true;
                }
            },
            _ => {}
        }
    }

    fn load(&mut self, count: u16, now: u64) {
        self.0.reload = if count == 0 { 0x1_0000 } else { u32::from(count) };
        self.0.started = Some(now);
        // Modes 1 and 5 wait for a gate that is not there.
        self.0.next = (!matches!(self.0.mode, 1 | 5)).then(|| now.saturating_add(self.period()));
    }

    fn period(&self) -> u64 {
        (u64::from(self.0.reload) * NANOS / HZ).max(1)
    }

    fn periodic(&self) -> bool {
        matches!(self.0.mode, 2 | 3)
    }

    fn count(&self, now: u64) -> u16 {
        let Some(started) = self.0.started else { return 0 };
        let ticks = u128::from(now.saturating_sub(started)) * u128::from(HZ) / u128::from(NANOS);
        let reload = u128::from(self.0.reload);
        let left = if self.periodic() { reload - ticks % reload } else { reload.wrapping_sub(ticks) };
        left as u16
    }

    /// When the timer wants [`expire`](Self::expire) to be called.
    pub fn deadline(&self) -> Option<u64> {
        self.0.next
    }

    /// Whether a tick is due; its interrupt is an edge.
    pub fn expire(&mut self, now: u64) -> bool {
        let Some(next) = self.0.next.filter(|next| *next <= now) else { return false };
        self.0.next = self.periodic().then(|| {
            let period = self.period();
            next + ((now - next) / period + 1) * period
        });
        true
    }

    /// The registers to save.
    pub fn state(&self) -> PitState {
        self.0.clone()
    }

    /// A timer that goes on where `state` was saved.
    ///
    /// # Errors
    /// No timer can have these registers.
    pub fn restore(state: &PitState) -> Result<Pit, PitStateError> {
        let counting = state.started.is_some() || state.next.is_some();
        let count_ok = if counting { (1..=0x1_0000).contains(&state.reload) } else { state.reload == 0 };
        if state.mode > 5 || !(1..=3).contains(&state.access) || !count_ok {
            return Err(PitStateError);
        }
        Ok(Pit(state.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programmed(mode: u8, count: u16) -> Pit {
        let mut pit = Pit::new();
        pit.write(0x43, 0x30 | mode << 1, 0);
        let [low, high] = count.to_le_bytes();
        pit.write(0x40, low, 0);
        assert_eq!(pit.deadline(), None);
        pit.write(0x40, high, 0);
        pit
    }

    #[test]
    fn rate_generator_ticks_at_its_rate() {
        // 100 Hz, as Linux programs it.
        let mut pit = programmed(2, 11932);
        let mut ticks = 0;
        while let Some(next) = pit.deadline().filter(|next| *next <= 1_000_000_000) {
            assert!(!pit.expire(next - 1));
            assert!(pit.expire(next));
            ticks += 1;
        }
        assert_eq!(ticks, 99);
        // Missed ticks are one, and the phase stays.
        let phase = pit.deadline().unwrap() % pit.period();
        assert!(pit.expire(9_999_999_999) && !pit.expire(9_999_999_999));
        assert_eq!(pit.deadline().unwrap() % pit.period(), phase);
    }

    #[test]
    fn one_shot_ticks_once() {
        for mode in [0, 4] {
            let mut pit = programmed(mode, 1000);
            assert!(pit.expire(838_095));
            assert_eq!(pit.deadline(), None);
        }
        assert_eq!(programmed(1, 1000).deadline(), None);
    }

    #[test]
    fn the_count_can_be_latched_and_read() {
        let mut pit = programmed(2, 10_000);
        pit.write(0x43, 0, 1_000_000);
        let count = u16::from_le_bytes([pit.read(0x40, 5_000_000), pit.read(0x40, 6_000_000)]);
        assert_eq!(count, 10_000 - 1193);
    }

    #[test]
    fn reprogramming_stops_the_count() {
        let mut pit = programmed(2, 10_000);
        pit.write(0x43, 0x30, 0);
        assert_eq!((pit.deadline(), pit.expire(u64::MAX)), (None, false));
    }

    #[test]
    fn masks_read_back() {
        let mut pit = Pit::new();
        pit.write(0x21, 0xfb, 0);
        assert_eq!((pit.read(0x21, 0), pit.read(0xa1, 0)), (0xfb, 0xff));
    }

    #[test]
    fn state_survives_and_hostile_state_is_refused() {
        let state = programmed(3, 0).state();
        assert_eq!(Pit::restore(&state).unwrap().state(), state);
        assert!(Pit::restore(&PitState { reload: 0, ..state.clone() }).is_err());
        assert!(Pit::restore(&PitState { reload: 0x1_0001, ..state.clone() }).is_err());
        assert!(Pit::restore(&PitState { mode: 6, ..state.clone() }).is_err());
        assert!(Pit::restore(&PitState { access: 0, ..state }).is_err());
    }
}
