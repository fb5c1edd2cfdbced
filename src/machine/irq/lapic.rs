//! The local APIC in xAPIC mode (Intel SDM vol. 3, chapter 11).
//!
//! One CPU: there is nobody to send INIT or SIPI to, and inter-processor interrupts reach the sender itself or nobody.
//! The registers are kept as the register page that KVM's `struct kvm_lapic_state` holds, so that both backends load
//! the same bytes. Time is guest time in nanoseconds, which is the timer's clock ([`LAPIC_TIMER_HZ`]).

use serde::{Deserialize, Serialize};

use crate::machine::platform::LAPIC_TIMER_HZ;

const _: () = assert!(LAPIC_TIMER_HZ == 1_000_000_000, "the timer counts nanoseconds");

/// Register offsets divided by 16.
mod reg {
    pub(super) const ID: usize = 0x02;
    pub(super) const VER: usize = 0x03;
    pub(super) const TPR: usize = 0x08;
    pub(super) const APR: usize = 0x09;
    pub(super) const PPR: usize = 0x0a;
    pub(super) const EOI: usize = 0x0b;
    pub(super) const RRD: usize = 0x0c;
    pub(super) const LDR: usize = 0x0d;
    pub(super) const DFR: usize = 0x0e;
    pub(super) const SVR: usize = 0x0f;
    pub(super) const ISR: usize = 0x10;
    pub(super) const TMR: usize = 0x18;
    pub(super) const IRR: usize = 0x20;
    pub(super) const ESR: usize = 0x28;
    pub(super) const ICR: usize = 0x30;
    pub(super) const ICR2: usize = 0x31;
    pub(super) const LVT_TIMER: usize = 0x32;
    pub(super) const LVT_LINT0: usize = 0x35;
    pub(super) const LVT_ERROR: usize = 0x37;
    pub(super) const TMICT: usize = 0x38;
    pub(super) const TMCCT: usize = 0x39;
    pub(super) const TDCR: usize = 0x3e;
    pub(super) const COUNT: usize = 0x40;
}

/// Version 0x14, six LVT entries, no EOI-broadcast suppression: what KVM reports.
const VERSION: u32 = 0x0005_0014;
const SVR_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const TIMER_PERIODIC: u32 = 1 << 17;
/// Error status: an illegal vector was sent or received.
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// A periodic timer faster than this would do nothing but interrupt; KVM has the same kind of floor.
const MIN_PERIOD: u64 = 100_000;

/// Saved registers: KVM's register page, 64 registers of 32 bits of which each has 16 bytes in the page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// The 1 KiB register page; TMCCT holds what the timer has left.
    #[serde(with = "serde_bytes")]
    pub page: Vec<u8>,
}

/// Saved registers that no local APIC can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Saved state of the local APIC is invalid: {0}")]
pub struct LapicStateError(&'static str);

/// How an interrupt message is to be delivered (ICR and I/O APIC redirection entries, bits 8-10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// To all that match.
    Fixed,
    /// To one that matches: the same, with one CPU.
    LowestPriority,
    /// Anything that this platform has no use for: SMI, NMI, INIT, SIPI, ExtINT.
    Other,
}

impl Delivery {
    /// Decodes the three mode bits.
    pub fn from_bits(bits: u32) -> Delivery {
        match bits & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            _ => Delivery::Other,
        }
    }
}

/// The local APIC of the one CPU.
#[derive(Debug, Clone)]
pub struct Lapic {
    regs: [u32; reg::COUNT],
    /// When the timer expires next, in guest time; `None` when it does not run.
    deadline: Option<u64>,
    /// Errors seen since the guest last wrote ESR.
    errors: u32,
}

impl Default for Lapic {
    fn default() -> Self {
        Self::new()
    }
}

impl Lapic {
    /// As after reset.
    pub fn new() -> Lapic {
        let mut regs = [0; reg::COUNT];
        regs[reg::VER] = VERSION;
        regs[reg::DFR] = u32::MAX;
        regs[reg::SVR] = 0xff;
        regs[reg::LVT_TIMER..=reg::LVT_ERROR].fill(LVT_MASKED);
        Lapic { regs, deadline: None, errors: 0 }
    }

    /// Reads the register at `offset` of the page.
    pub fn read(&self, offset: u64, now: u64) -> u32 {
        let index = (offset >> 4) as usize;
        match index {
            reg::PPR => u32::from(self.processor_priority()),
            reg::TMCCT => self.remaining(now),
            reg::EOI | reg::RRD => 0,
            index => self.regs.get(index).copied().unwrap_or(0),
        }
    }

    /// Writes the register at `offset` of the page. Returns the vector whose end of interrupt must be announced to the
    /// I/O APIC, if this was one of a level-triggered interrupt.
    pub fn write(&mut self, offset: u64, value: u32, now: u64) -> Option<u8> {
        let index = (offset >> 4) as usize;
        match index {
            reg::ID => self.regs[index] = value & 0xff00_0000,
            reg::TPR => self.regs[index] = value & 0xff,
            reg::EOI => return self.end_of_interrupt(),
            reg::LDR => self.regs[index] = value & 0xff00_0000,
            reg::DFR => self.regs[index] = value | 0x0fff_ffff,
            reg::SVR => {
                self.regs[index] = value & 0x1ff;
                if value & SVR_ENABLE == 0 {
                    for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
                        self.regs[lvt] |= LVT_MASKED;
                    }
                }
            }
            reg::ESR => {
                // A write latches what has gathered since the last one (11.5.3).
                self.regs[index] = self.errors;
                self.errors = 0;
            }
            reg::ICR => {
                // The delivery status bit reads as idle: a message is delivered at once.
                self.regs[index] = value & !(1 << 12);
                self.send(value);
            }
            reg::ICR2 => self.regs[index] = value & 0xff00_0000,
            reg::LVT_TIMER => {
                let was = self.regs[index];
                self.regs[index] = self.lvt_value(value, 0x0003_00ff);
                if (was ^ value) & TIMER_PERIODIC != 0 {
                    // Changing the mode disarms the timer.
                    self.deadline = None;
                    self.regs[reg::TMICT] = 0;
                }
            }
            reg::LVT_LINT0..reg::LVT_ERROR => self.regs[index] = self.lvt_value(value, 0x0001_a7ff),
            0x33 | 0x34 => self.regs[index] = self.lvt_value(value, 0x0001_07ff),
            reg::LVT_ERROR => self.regs[index] = self.lvt_value(value, 0x0001_00ff),
            reg::TMICT => {
                self.regs[index] = value;
                self.arm(now, u64::from(value));
            }
            reg::TDCR => {
                let left = self.remaining(now);
                self.regs[index] = value & 0xb;
                if self.deadline.is_some() {
                    self.arm(now, u64::from(left));
                }
            }
            // Read-only or reserved.
            _ => {}
        }
        None
    }

    fn lvt_value(&self, value: u32, mask: u32) -> u32 {
        let value = value & mask;
        if self.enabled() { value } else { value | LVT_MASKED }
    }

    /// Whether the spurious-interrupt register's enable bit is set.
    pub fn enabled(&self) -> bool {
        self.regs[reg::SVR] & SVR_ENABLE != 0
    }

    /// Whether a message with this destination reaches the CPU (11.6.2).
    pub fn matches(&self, logical: bool, destination: u8) -> bool {
        if destination == 0xff {
            return true;
        }
        if !logical {
            return destination == (self.regs[reg::ID] >> 24) as u8;
        }
        let own = (self.regs[reg::LDR] >> 24) as u8;
        if self.regs[reg::DFR] >> 28 == 0xf {
            destination & own != 0
        } else {
            // Cluster model: cluster in the high nibble, members in the low one.
            (destination >> 4 == own >> 4 || destination >> 4 == 0xf) && destination & own & 0xf != 0
        }
    }

    /// An interrupt message arrives.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.enabled() {
            return;
        }
        if vector < 16 {
            self.errors |= ESR_RECEIVE_ILLEGAL;
            return;
        }
        self.set_bit(reg::IRR, vector, true);
        self.set_bit(reg::TMR, vector, level);
    }

    /// Self-IPIs are delivered; everything else has no receiver.
    fn send(&mut self, icr: u32) {
        let shorthand = icr >> 18 & 3;
        let destination = (self.regs[reg::ICR2] >> 24) as u8;
        let reaches_self = match shorthand {
            0 => self.matches(icr & 1 << 11 != 0, destination),
            1 | 2 => true,
            _ => false,
        };
        let vector = icr as u8;
        match Delivery::from_bits(icr >> 8) {
            Delivery::Other => {}
            _ if vector < 16 => self.errors |= ESR_SEND_ILLEGAL,
            _ if reaches_self => self.accept(vector, false),
            _ => {}
        }
    }

    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.highest(reg::ISR)?;
        self.set_bit(reg::ISR, vector, false);
        self.bit(reg::TMR, vector).then_some(vector)
    }

    /// Task or in-service priority, whichever is higher (11.8.3.1).
    fn processor_priority(&self) -> u8 {
        let task = self.regs[reg::TPR] as u8;
        let service = self.highest(reg::ISR).unwrap_or(0) & 0xf0;
        if task & 0xf0 >= service { task } else { service }
    }

    /// The vector that the CPU would get now.
    pub fn pending(&self) -> Option<u8> {
        let vector = self.highest(reg::IRR)?;
        (vector & 0xf0 > self.processor_priority() & 0xf0).then_some(vector)
    }

    /// The CPU takes the highest pending vector into service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.set_bit(reg::IRR, vector, false);
        self.set_bit(reg::ISR, vector, true);
        Some(vector)
    }

    /// CR8: bits 4 to 7 of the task priority register.
    pub fn task_priority(&self) -> u8 {
        (self.regs[reg::TPR] >> 4) as u8 & 0xf
    }

    /// Sets CR8.
    pub fn set_task_priority(&mut self, priority: u8) {
        self.regs[reg::TPR] = u32::from(priority & 0xf) << 4;
    }

    /// When the timer wants [`expire`](Self::expire) to be called.
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Lets the timer fire if it is due.
    pub fn expire(&mut self, now: u64) {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now) else { return };
        let lvt = self.regs[reg::LVT_TIMER];
        if lvt & TIMER_PERIODIC != 0 {
            // Periods that passed unseen are one interrupt: that is all the IRR can hold.
            let period = self.period(u64::from(self.regs[reg::TMICT]));
            let missed = (now - deadline) / period;
            self.deadline = Some(deadline + (missed + 1) * period);
        } else {
            self.deadline = None;
        }
        if lvt & LVT_MASKED == 0 {
            self.accept(lvt as u8, false);
        }
    }

    /// Nanoseconds per count: the divide configuration's bits 0, 1 and 3 encode 2, 4, ... 128, 1.
    fn divider(&self) -> u64 {
        let code = self.regs[reg::TDCR];
        1 << ((((code & 3) | (code & 8) >> 1) + 1) & 7)
    }

    fn period(&self, count: u64) -> u64 {
        let period = count * self.divider();
        if self.regs[reg::LVT_TIMER] & TIMER_PERIODIC != 0 { period.max(MIN_PERIOD) } else { period }
    }

    fn arm(&mut self, now: u64, count: u64) {
        // At most 2^39 ns ahead: cannot overflow within the guest's first five centuries.
        self.deadline = (count != 0).then(|| now.saturating_add(self.period(count)));
    }

    fn remaining(&self, now: u64) -> u32 {
        let left = self.deadline.map_or(0, |deadline| deadline.saturating_sub(now)).div_ceil(self.divider());
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    fn highest(&self, first: usize) -> Option<u8> {
        (0..8).rev().find_map(|word| {
            let bits = self.regs[first + word];
            bits.checked_ilog2().map(|bit| (word * 32) as u8 + bit as u8)
        })
    }

    fn bit(&self, first: usize, vector: u8) -> bool {
        self.regs[first + usize::from(vector / 32)] & 1 << (vector % 32) != 0
    }

    fn set_bit(&mut self, first: usize, vector: u8, on: bool) {
        let word = &mut self.regs[first + usize::from(vector / 32)];
        let mask = 1 << (vector % 32);
        *word = if on { *word | mask } else { *word & !mask };
    }

    /// The registers to save.
    pub fn state(&self, now: u64) -> LapicState {
        let mut regs = self.regs;
        regs[reg::TMCCT] = self.remaining(now);
        regs[reg::PPR] = u32::from(self.processor_priority());
        let page = regs.iter().flat_map(|value| {
            let mut slot = [0; 16];
            slot[..4].copy_from_slice(&value.to_le_bytes());
            slot
        });
        LapicState { page: page.collect() }
    }

    /// A local APIC that goes on where `state` was saved; its timer runs on from guest time `now`.
    ///
    /// # Errors
    /// No local APIC can have these registers.
    pub fn restore(state: &LapicState, now: u64) -> Result<Lapic, LapicStateError> {
        if state.page.len() != reg::COUNT * 16 {
            return Err(LapicStateError("the register page is not 1024 bytes"));
        }
        let mut lapic = Lapic::new();
        for (value, slot) in lapic.regs.iter_mut().zip(state.page.as_chunks::<16>().0) {
            *value = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
        }
        let regs = &mut lapic.regs;
        if regs[reg::ISR] & 0xffff != 0 || regs[reg::IRR] & 0xffff != 0 {
            return Err(LapicStateError("a reserved vector is pending"));
        }
        // What a guest could not have written itself is not taken over.
        regs[reg::VER] = VERSION;
        regs[reg::APR] = 0;
        regs[reg::SVR] &= 0x1ff;
        regs[reg::TPR] &= 0xff;
        regs[reg::TDCR] &= 0xb;
        regs[reg::LVT_TIMER] &= 0x0003_00ff;
        let left = regs[reg::TMCCT];
        regs[reg::TMCCT] = 0;
        if left != 0 && regs[reg::TMICT] == 0 {
            return Err(LapicStateError("the timer runs without an initial count"));
        }
        // Not `arm`: what is left of a period may be shorter than the shortest period.
        lapic.deadline = (left != 0).then(|| now.saturating_add(u64::from(left) * lapic.divider()));
        Ok(lapic)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn enabled() -> Lapic {
        let mut lapic = Lapic::new();
        lapic.write(0xf0, 0x1ff, 0);
        lapic
    }

    #[test]
    fn a_disabled_apic_takes_nothing() {
        let mut lapic = Lapic::new();
        lapic.accept(0x40, false);
        assert_eq!(lapic.pending(), None);
        // LVT entries cannot be unmasked either.
        lapic.write(0x320, 0x40, 0);
        assert_eq!(lapic.read(0x320, 0), 0x1_0040);
    }

    #[test]
    fn priorities_nest() {
        let mut lapic = enabled();
        lapic.accept(0x41, false);
        lapic.accept(0x52, false);
        assert_eq!(lapic.acknowledge(), Some(0x52));
        // 0x41 is below what is in service, 0x5f is of the same class, 0x60 interrupts.
        lapic.accept(0x5f, false);
        assert_eq!(lapic.pending(), None);
        lapic.accept(0x60, false);
        assert_eq!(lapic.acknowledge(), Some(0x60));
        assert_eq!(lapic.read(0xa0, 0), 0x60);
        lapic.write(0xb0, 0, 0);
        assert_eq!(lapic.read(0xa0, 0), 0x50);
        lapic.write(0xb0, 0, 0);
        assert_eq!(lapic.acknowledge(), Some(0x5f));
        lapic.write(0xb0, 0, 0);
        lapic.set_task_priority(4);
        assert_eq!(lapic.pending(), None);
        lapic.set_task_priority(3);
        assert_eq!(lapic.pending(), Some(0x41));
        assert_eq!(lapic.read(0x80, 0), 0x30);
    }

    #[test]
    fn only_level_interrupts_announce_their_end() {
        let mut lapic = enabled();
        lapic.accept(0x30, true);
        lapic.acknowledge();
        assert_eq!(lapic.write(0xb0, 0, 0), Some(0x30));
        lapic.accept(0x30, false);
        lapic.acknowledge();
        assert_eq!(lapic.write(0xb0, 0, 0), None);
        // An end of nothing is harmless.
        assert_eq!(lapic.write(0xb0, 0, 0), None);
    }

    #[test]
    fn one_shot_timer_counts_down_at_the_divided_rate_and_fires_once() {
        for (code, divider) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            let mut lapic = enabled();
            lapic.write(0x3e0, code, 0);
            lapic.write(0x320, 0xec, 0);
            lapic.write(0x380, 1000, 5_000);
            let deadline = 5_000 + 1000 * divider;
            assert_eq!(lapic.deadline(), Some(deadline));
            assert_eq!(lapic.read(0x390, 5_000), 1000);
            assert_eq!(lapic.read(0x390, 5_000 + 500 * divider), 500);
            lapic.expire(deadline - 1);
            assert_eq!(lapic.pending(), None);
            lapic.expire(deadline);
            assert_eq!(lapic.acknowledge(), Some(0xec));
            assert_eq!((lapic.deadline(), lapic.read(0x390, deadline)), (None, 0));
        }
    }

    #[test]
    fn periodic_timer_keeps_its_phase_and_merges_what_was_missed() {
        let mut lapic = enabled();
        lapic.write(0x3e0, 11, 0);
        lapic.write(0x320, 0x2_0030, 0);
        lapic.write(0x380, 1_000_000, 0);
        lapic.expire(3_500_000);
        assert_eq!(lapic.acknowledge(), Some(0x30));
        assert_eq!(lapic.pending(), None);
        assert_eq!(lapic.deadline(), Some(4_000_000));
        // Writing 0 stops it.
        lapic.write(0x380, 0, 3_600_000);
        assert_eq!(lapic.deadline(), None);
    }

    #[test]
    fn a_masked_timer_runs_silently() {
        let mut lapic = enabled();
        lapic.write(0x3e0, 11, 0);
        lapic.write(0x320, 0x1_0030, 0);
        lapic.write(0x380, 100, 0);
        lapic.expire(100);
        assert_eq!((lapic.pending(), lapic.deadline()), (None, None));
    }

    #[test]
    fn messages_to_oneself_arrive_and_others_do_not() {
        let mut lapic = enabled();
        lapic.write(0x300, 1 << 18 | 0x50, 0); // Self.
        assert_eq!(lapic.acknowledge(), Some(0x50));
        lapic.write(0xb0, 0, 0);
        lapic.write(0x300, 3 << 18 | 0x51, 0); // All but self.
        assert_eq!(lapic.pending(), None);
        lapic.write(0x310, 0, 0);
        lapic.write(0x300, 0x52, 0); // Physical id 0.
        assert_eq!(lapic.acknowledge(), Some(0x52));
        lapic.write(0xb0, 0, 0);
        lapic.write(0x310, 1 << 24, 0);
        lapic.write(0x300, 0x53, 0); // Physical id 1.
        lapic.write(0x300, 5 << 8, 0); // INIT.
        lapic.write(0x300, 6 << 8 | 0x9f, 0); // SIPI.
        assert_eq!(lapic.pending(), None);
        lapic.write(0x300, 1 << 18 | 5, 0); // Illegal vector.
        lapic.write(0x280, 0, 0);
        assert_eq!(lapic.read(0x280, 0), ESR_SEND_ILLEGAL);
    }

    #[test]
    fn logical_destinations() {
        let mut lapic = enabled();
        lapic.write(0xd0, 0x2100_0000, 0);
        assert!(lapic.matches(true, 0x01) && lapic.matches(true, 0x20) && !lapic.matches(true, 0x02));
        lapic.write(0xe0, 0x0fff_ffff, 0);
        assert!(lapic.matches(true, 0x21) && lapic.matches(true, 0xf1) && !lapic.matches(true, 0x31));
        assert!(!lapic.matches(true, 0x22) && lapic.matches(false, 0) && lapic.matches(false, 0xff));
    }

    #[test]
    fn hostile_state_is_refused() {
        let good = enabled().state(0);
        assert!(Lapic::restore(&good, 0).is_ok());
        let with = |offset: usize, value: u8| {
            let mut bad = good.clone();
            bad.page[offset] = value;
            Lapic::restore(&bad, 0)
        };
        assert!(with(0x200, 1).is_err());
        assert!(with(0x101, 0x80).is_err());
        assert!(with(0x390, 1).is_err());
        let short = LapicState { page: vec![0; 1023] };
        assert!(Lapic::restore(&short, 0).is_err());
    }

    proptest! {
        /// Whatever a guest does, the state survives saving, and time moved on by the same amount does not matter.
        #[test]
        fn save_and_restore_change_nothing(
            writes in prop::collection::vec((0u64..0x40, any::<u32>()), 0..60),
            vectors in prop::collection::vec((any::<u8>(), any::<bool>()), 0..20),
            later in 0u64..1 << 40,
        ) {
            let mut lapic = enabled();
            for (index, value) in writes {
                lapic.write(index << 4, value, 1_000);
            }
            for (vector, level) in vectors {
                lapic.accept(vector, level);
                if level {
                    lapic.acknowledge();
                }
            }
            let state = lapic.state(1_000);
            let restored = Lapic::restore(&state, later).unwrap();
            prop_assert_eq!(restored.state(later), state);
            prop_assert_eq!(restored.pending(), lapic.pending());
        }

        /// The timer never fires early, whatever was programmed.
        #[test]
        fn deadlines_lie_ahead(code in any::<u32>(), lvt in any::<u32>(), count in 1u32.., now in 0u64..1 << 50) {
            let mut lapic = enabled();
            lapic.write(0x3e0, code, now);
            lapic.write(0x320, lvt, now);
            lapic.write(0x380, count, now);
            let deadline = lapic.deadline().unwrap();
            prop_assert!(deadline > now);
            lapic.expire(deadline);
            prop_assert!(lapic.deadline().is_none_or(|next| next > deadline));
        }
    }
}
