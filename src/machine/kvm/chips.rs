//! The interrupt controllers' state in KVM's terms, and back. Pure conversions.
//!
//! KVM's local APIC page is the neutral one. Two things happen to it on the way out. An interrupt that the CPU has
//! accepted and not yet begun to handle goes back from "in service" to "requested". And the interrupt of a timer that has
//! run out counts as requested too: KVM may have noted that only outside the page, and a guest minds one timer interrupt
//! too many far less than one that never comes.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state, kvm_irqchip,
    kvm_lapic_state, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};

use crate::machine::irq::ioapic::{ENTRY, IoapicState, LEVEL, REMOTE_IRR};
use crate::machine::irq::lapic::LapicState;
use crate::machine::irq::pit::{PitState, Programmed};
use crate::machine::platform::{IOAPIC_BASE, IOAPIC_PINS};

/// Offsets in the local APIC's page.
const ISR: usize = 0x100;
const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const TMICT: usize = 0x380;
const TMCCT: usize = 0x390;
/// LVT bits.
const MASKED: u32 = 1 << 16;
const TIMER_MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;
/// A counter channel in no mode: nothing counts.
const NO_MODE: u8 = 0xff;

/// A local APIC's register page.
struct Registers(Vec<u8>);

impl Registers {
    fn get(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn set_bit(&mut self, first: usize, vector: u8, on: bool) {
        let at = first + usize::from(vector / 32) * 16;
        let (bit, old) = (1 << (vector % 32), self.get(at));
        self.set(at, if on { old | bit } else { old & !bit });
    }

    /// The timer has an initial count and nothing left of it.
    fn timer_ran_out(&self) -> bool {
        self.get(TMICT) != 0 && self.get(TMCCT) == 0
    }

    fn timer_mode(&self) -> u32 {
        self.get(LVT_TIMER) & TIMER_MODE
    }
}

/// The neutral local APIC. `accepted` is the external interrupt that the CPU has accepted and not begun to handle.
pub(super) fn from_lapic(lapic: &kvm_lapic_state, accepted: Option<u8>) -> LapicState {
    let mut regs = Registers(lapic.regs.iter().map(|byte| byte.cast_unsigned()).collect());
    if let Some(vector) = accepted {
        regs.set_bit(ISR, vector, false);
        regs.set_bit(IRR, vector, true);
    }
    if regs.timer_ran_out() {
        let lvt = regs.get(LVT_TIMER);
        if lvt & MASKED == 0 && lvt as u8 >= 16 {
            regs.set_bit(IRR, lvt as u8, true);
        }
        if regs.timer_mode() == PERIODIC {
            regs.set(TMCCT, regs.get(TMICT));
        } else {
            regs.set(TMICT, 0);
        }
    }
    LapicState { page: regs.0 }
}

/// A validated local APIC in KVM's terms.
pub(super) fn to_lapic(state: &LapicState) -> kvm_lapic_state {
    let mut regs = Registers(state.page.clone());
    // KVM starts a timer that has nothing left: it would fire once more.
    if regs.timer_ran_out() && regs.timer_mode() != PERIODIC {
        regs.set(TMICT, 0);
    }
    let mut lapic = kvm_lapic_state::default();
    for (register, byte) in lapic.regs.iter_mut().zip(&regs.0) {
        *register = byte.cast_signed();
    }
    lapic
}

/// The neutral I/O APIC; the levels of its lines are the machine's to tell.
pub(super) fn from_ioapic(chip: &kvm_irqchip) -> IoapicState {
    // SAFETY: the chip is the I/O APIC, which the caller has asked for; all members are plain integers.
    let ioapic = unsafe { chip.chip.ioapic };
    let entry = |entry: &kvm_bindings::kvm_ioapic_state__bindgen_ty_1| {
        // SAFETY: both members of the union are 64 plain bits.
        let bits = unsafe { entry.bits } & ENTRY;
        if bits & LEVEL == 0 { bits & !REMOTE_IRR } else { bits }
    };
    IoapicState {
        base: IOAPIC_BASE,
        select: ioapic.ioregsel & 0xff,
        id: ioapic.id & 0xf,
        irr: 0,
        entries: ioapic.redirtbl.iter().map(entry).collect(),
    }
}

/// A validated I/O APIC in KVM's terms.
pub(super) fn to_ioapic(state: &IoapicState) -> kvm_irqchip {
    let mut ioapic = kvm_ioapic_state {
        base_address: state.base,
        ioregsel: state.select,
        id: state.id,
        ..kvm_ioapic_state::default()
    };
    for (pin, (slot, bits)) in ioapic.redirtbl.iter_mut().zip(&state.entries).enumerate() {
        slot.bits = *bits;
        // KVM delivers what is requested here. The rise of an edge-triggered line has been delivered.
        if bits & LEVEL != 0 {
            ioapic.irr |= state.irr & 1 << pin;
        }
    }
    debug_assert_eq!(state.entries.len(), IOAPIC_PINS);
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..kvm_irqchip::default() };
    chip.chip.ioapic = ioapic;
    chip
}

/// The neutral interval timer, with the mask registers of the interrupt controllers at guest time `now`.
pub(super) fn from_pit(pit: &kvm_pit_state2, masters: [&kvm_irqchip; 2], now: u64) -> PitState {
    // SAFETY: the chips are 8259s, which the caller has asked for; all members are plain integers.
    let masks = masters.map(|chip| unsafe { chip.chip.pic }.imr);
    let channel = &pit.channels[0];
    let programmed = (channel.mode <= 5).then(|| Programmed {
        mode: channel.mode,
        access: if (1..=3).contains(&channel.rw_mode) { channel.rw_mode } else { 3 },
        // 0 is KVM's too for the longest count.
        count: channel.count,
    });
    PitState::running(programmed, masks, now)
}

/// A validated interval timer in KVM's terms: a count begins anew.
pub(super) fn to_pit(state: &PitState) -> kvm_pit_state2 {
    let mut pit = kvm_pit_state2::default();
    for channel in &mut pit.channels {
        *channel = kvm_pit_channel_state { mode: NO_MODE, gate: 1, rw_mode: 3, ..Default::default() };
    }
    if let Some(Programmed { mode, access, count }) = state.programmed() {
        let channel = &mut pit.channels[0];
        (channel.mode, channel.rw_mode, channel.count) = (mode, access, count);
    }
    pit
}

/// The 8259s that the platform does not have: nothing reaches them, but their mask registers can be read back.
pub(super) fn to_pics(state: &PitState) -> [kvm_irqchip; 2] {
    let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];
    let mut chips = ids.map(|chip_id| kvm_irqchip { chip_id, ..kvm_irqchip::default() });
    for (chip, imr) in chips.iter_mut().zip(state.masks()) {
        chip.chip.pic = kvm_pic_state { imr, ..kvm_pic_state::default() };
    }
    chips
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::irq::Irqchip;

    /// A local APIC with its timer at vector 0xec, as after `count` was written at time 0, at time `now`.
    fn lapic(count: u32, now: u64) -> LapicState {
        let chip = Irqchip::new(1);
        chip.write_lapic(0xf0, 0x1ff, 0);
        chip.write_lapic(0x3e0, 0xb, 0);
        chip.write_lapic(0x320, 0xec, 0);
        chip.write_lapic(0x380, count, 0);
        let state = chip.state(now).unwrap().lapic;
        chip.acknowledge();
        state
    }

    fn requested(state: &LapicState, vector: u8) -> bool {
        state.page[IRR + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8)] & 1 << (vector % 8)
            != 0
    }

    #[test]
    fn a_running_timer_goes_on_with_what_it_has_left() {
        let state = lapic(5000, 2000);
        let there = to_lapic(&state);
        assert_eq!(Registers(from_lapic(&there, None).page).get(TMCCT), 3000);
        assert_eq!(from_lapic(&there, None), state);
    }

    #[test]
    fn a_timer_that_ran_out_in_kvm_has_its_interrupt_requested_once() {
        let mut there = to_lapic(&lapic(5000, 2000));
        there.regs[TMCCT..TMCCT + 4].fill(0);
        let back = from_lapic(&there, None);
        assert!(requested(&back, 0xec));
        assert_eq!(Registers(back.page.clone()).get(TMICT), 0);
        // A masked one asks for nothing.
        there.regs[LVT_TIMER + 2] = 1;
        assert!(!requested(&from_lapic(&there, None), 0xec));
        // A periodic one starts its next period.
        there.regs[LVT_TIMER + 2] = 2;
        let periodic = from_lapic(&there, None);
        assert!(requested(&periodic, 0xec));
        assert_eq!(Registers(periodic.page).get(TMCCT), 5000);
        // Nor does KVM start a timer anew that the software CPU has let run out.
        let done = to_lapic(&lapic(5000, 9000));
        assert!(done.regs[TMICT..TMICT + 4].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_interrupt_accepted_and_not_handled_is_requested_again() {
        let mut regs = Registers(lapic(0, 0).page);
        regs.set_bit(ISR, 0x31, true);
        let back = from_lapic(&to_lapic(&LapicState { page: regs.0 }), Some(0x31));
        assert!(requested(&back, 0x31));
        let mut regs = Registers(back.page);
        assert_eq!(regs.get(ISR + 16) & 1 << 17, 0);
        regs.set_bit(IRR, 0x31, false);
        assert_eq!(regs.get(IRR + 16), 0);
    }

    #[test]
    fn the_io_apic_comes_back_but_for_the_levels_of_its_lines() {
        let chip = Irqchip::new(3);
        for (pin, low) in [(5, 0x35), (9, 0x8039)] {
            chip.write_ioapic(0, 0x10 + pin * 2);
            chip.write_ioapic(0x10, low);
        }
        let state = IoapicState { irr: 1 << 5 | 1 << 9, ..chip.state(0).unwrap().ioapic };
        let there = to_ioapic(&state);
        // SAFETY: all members of the union are plain integers.
        let requested = unsafe { there.chip.ioapic }.irr;
        assert_eq!(requested, 1 << 9, "the rise of the edge-triggered line has been delivered");
        assert_eq!(from_ioapic(&there), IoapicState { irr: 0, ..state });
    }

    #[test]
    fn the_interval_timer_goes_on_in_its_mode_or_stays_stopped() {
        let chip = Irqchip::new(1);
        chip.write_pit(0x21, 0xfb, 0);
        let masks = |state: &PitState| state.masks();
        let back = |state: &PitState| {
            let pics = to_pics(state);
            from_pit(&to_pit(state), [&pics[0], &pics[1]], 7)
        };
        let stopped = chip.state(0).unwrap().pit;
        assert_eq!((back(&stopped).programmed(), masks(&back(&stopped))), (None, [0xfb, 0xff]));
        for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
            chip.write_pit(port, value, 0);
        }
        let running = chip.state(0).unwrap().pit;
        let programmed = Some(Programmed { mode: 2, access: 3, count: 11932 });
        assert_eq!((running.programmed(), back(&running).programmed()), (programmed, programmed));
    }
}
