//! The transport, seen through the entropy device: registers, negotiation, status machine, broken rings.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::devices::rng::{Entropy, EntropyState};
use crate::devices::testing::{Driver, Mem, RAM, TestIrq, into, memory, state_round_trips};

fn bare() -> Driver<Entropy> {
    let driver = Driver::new(Entropy::default());
    driver.set(reg::VIRTIO_MMIO_STATUS, 0);
    driver
}

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

#[test]
fn every_device_has_valid_queue_sizes() {
    fn check<D: VirtioDevice>() {
        for &size in D::QUEUE_SIZES {
            assert!(Queue::new(size).is_ok(), "{}", D::NAME);
        }
    }
    check::<Entropy>();
    check::<crate::devices::block::Block>();
    check::<crate::devices::vsock::Vsock>();
}

#[test]
fn identifies_itself() {
    let driver = bare();
    assert_eq!(driver.get(reg::VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_VENDOR_ID).to_le_bytes(), *b"ambr");
    assert_eq!(driver.offered(), TRANSPORT_FEATURES);
    driver.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    driver.set(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
}

#[test]
fn only_whole_registers_are_accessible() {
    let driver = bare();
    let mut byte = [0xff];
    driver.dev.read(0, &mut byte);
    assert_eq!(byte, [0]);
    let mut wide = [0xff; 8];
    driver.dev.read(0, &mut wide);
    assert_eq!(wide, [0; 8]);
    driver.dev.read(u64::MAX, &mut wide);
    driver.dev.write(u64::from(reg::VIRTIO_MMIO_STATUS), &[1]);
    driver.dev.write(u64::MAX, &[1, 2, 3, 4]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn features_must_be_offered_and_modern() {
    for (features, accepted) in [
        (VERSION_1, true),
        (TRANSPORT_FEATURES, true),
        (1 << VIRTIO_RING_F_EVENT_IDX, false),
        (0, false),
        (VERSION_1 | 1 << 34, false),
        (VERSION_1 | 1, false),
    ] {
        let driver = bare();
        driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER);
        driver.accept(features);
        driver.set(reg::VIRTIO_MMIO_STATUS, FEATURES_OK);
        assert_eq!(driver.status() & VIRTIO_CONFIG_S_FEATURES_OK != 0, accepted, "{features:#x}");
        // Without FEATURES_OK a driver gets no further.
        driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
        assert_eq!(driver.status() & VIRTIO_CONFIG_S_DRIVER_OK != 0, accepted);
    }
}

#[test]
fn features_are_fixed_once_accepted() {
    let driver = bare();
    driver.accept(VERSION_1);
    driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER);
    driver.set(reg::VIRTIO_MMIO_STATUS, FEATURES_OK);
    assert_eq!(driver.status(), DRIVER, "features chosen before DRIVER do not count");
    driver.accept(VERSION_1);
    driver.set(reg::VIRTIO_MMIO_STATUS, FEATURES_OK);
    assert_eq!(driver.status(), FEATURES_OK);
    driver.accept(TRANSPORT_FEATURES);
    assert_eq!(driver.dev.state().transport.driver_features, VERSION_1);
}

#[test]
fn status_bits_are_only_ever_added() {
    let driver = bare();
    driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER);
    driver.set(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(driver.status(), DRIVER);
    driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER | VIRTIO_CONFIG_S_NEEDS_RESET | 0xff00);
    assert_eq!(driver.status(), DRIVER);
    driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER | VIRTIO_CONFIG_S_FAILED);
    assert_eq!(driver.status(), DRIVER | VIRTIO_CONFIG_S_FAILED);
    driver.set(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn queues_are_configured_between_features_and_driver_ok() {
    let driver = bare();
    let size = |driver: &Driver<Entropy>| driver.dev.state().transport.queues[0].size;
    driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER);
    driver.set(reg::VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(size(&driver), 16);
    driver.accept(VERSION_1);
    driver.set(reg::VIRTIO_MMIO_STATUS, FEATURES_OK);
    for bad in [0, 3, 32, 0x1_0008] {
        driver.set(reg::VIRTIO_MMIO_QUEUE_NUM, bad);
        assert_eq!(size(&driver), 16);
    }
    driver.set(reg::VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(size(&driver), 8);
    driver.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
    driver.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
    driver.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, RAM as u32 - 4);
    driver.set(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_READY), 0, "the used ring is not in memory");
    driver.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
    driver.set(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_READY), 1);
    driver.set(reg::VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!(size(&driver), 8, "a ready queue is not changed");
    driver.set(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
    driver.set(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_READY), 1);
    driver.set(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn notifications_before_driver_ok_do_nothing() {
    let mut driver = Driver::new(Entropy::default());
    driver.probe(u64::MAX, u16::MAX);
    driver.set(reg::VIRTIO_MMIO_STATUS, 0);
    let buffer = driver.alloc(64);
    driver.add(0, &[into(buffer, 64)]);
    driver.notify(0);
    driver.notify(7);
    assert!(driver.used(0).is_none());
    assert_eq!(driver.interrupts(), 0);
}

#[test]
fn the_line_follows_the_interrupt_status() {
    let mut driver = Driver::new(Entropy::default());
    let buffer = driver.alloc(64);
    driver.add(0, &[into(buffer, 64)]);
    driver.kick(0);
    assert!(driver.irq.is_high());
    driver.set(reg::VIRTIO_MMIO_INTERRUPT_ACK, INT_CONFIG);
    assert!(driver.irq.is_high(), "another cause was acknowledged");
    driver.set(reg::VIRTIO_MMIO_INTERRUPT_ACK, INT_VRING);
    assert!(!driver.irq.is_high());
    assert_eq!(driver.irq.rises(), 1);
    driver.used(0);
    driver.add(0, &[into(buffer, 64)]);
    driver.kick(0);
    driver.set(reg::VIRTIO_MMIO_STATUS, 0);
    assert!(!driver.irq.is_high(), "a reset lowers the line");
}

#[test]
fn interrupts_are_suppressed_as_the_driver_asks() {
    for mask in [u64::MAX, !(1 << VIRTIO_RING_F_EVENT_IDX)] {
        let mut driver = Driver::with(Entropy::default(), mask, 16);
        let buffer = driver.alloc(64);
        driver.request(0, &[into(buffer, 64)]);
        // Event index: interrupt at the third buffer from here. Flag: not at all.
        let (avail, used_event) = (0x1_8000, 0x1_8000 + 4 + 2 * 16);
        if mask == u64::MAX {
            driver.poke(used_event, &3u16.to_le_bytes());
        } else {
            driver.poke(avail, &1u16.to_le_bytes());
        }
        for expected in [0, 0, INT_VRING] {
            driver.add(0, &[into(buffer, 64)]);
            assert!(driver.kick(0));
            assert_eq!(driver.interrupts(), if mask == u64::MAX { expected } else { 0 });
        }
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_reset() {
    let mut driver = Driver::new(Entropy::default());
    driver.set_avail_idx(0, 1000);
    driver.notify(0);
    assert_eq!(driver.status(), DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(driver.get(reg::VIRTIO_MMIO_CONFIG_GENERATION), 1);
    assert_eq!(driver.interrupts(), INT_CONFIG);
    driver.set_avail_idx(0, 0);
    let buffer = driver.alloc(64);
    driver.add(0, &[into(buffer, 64)]);
    driver.notify(0);
    assert!(driver.used(0).is_none());
    driver.probe(u64::MAX, u16::MAX);
    assert_eq!(driver.request(0, &[into(buffer, 64)]), 64);
}

#[test]
fn a_head_beyond_the_table_stops_the_device() {
    let mut driver = Driver::new(Entropy::default());
    driver.offer(0, 16);
    driver.notify(0);
    assert_ne!(driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}

#[test]
fn a_shut_down_device_is_harmless() {
    let mut driver = Driver::new(Entropy::default());
    let buffer = driver.alloc(64);
    driver.add(0, &[into(buffer, 64)]);
    driver.dev.shutdown();
    driver.notify(0);
    assert!(driver.used(0).is_none());
    assert_eq!(Arc::strong_count(&driver.mem), 1);
    driver.dev.resume();
}

fn restore(state: &MmioState<EntropyState>) -> Result<MmioTransport<Entropy, Mem>, RestoreError> {
    MmioTransport::restore((), memory(), Arc::new(TestIrq::default()), state)
}

#[test]
fn impossible_states_are_refused() {
    let good = Driver::new(Entropy::default()).dev.state();
    assert!(restore(&good).is_ok());
    let breakages: [fn(&mut TransportState); 12] = [
        |s| s.status |= 0x10,
        |s| s.status = VIRTIO_CONFIG_S_DRIVER_OK,
        |s| s.driver_features |= 1,
        |s| s.driver_features = 0,
        |s| s.interrupt_status = 4,
        |s| s.queues.clear(),
        |s| s.queues[0].size = 3,
        |s| s.queues[0].size = 0x8000,
        |s| s.queues[0].desc_table += 8,
        |s| s.queues[0].avail_ring += 1,
        |s| s.queues[0].used_ring = RAM - 8,
        |s| s.queues[0].desc_table = !15,
    ];
    for (index, breakage) in breakages.into_iter().enumerate() {
        let mut bad = good.clone();
        breakage(&mut bad.transport);
        assert!(restore(&bad).is_err(), "breakage {index} was accepted");
    }
}

state_round_trips! {
    state,
    device: bare(),
    mutate: |driver: &mut Driver<Entropy>| {
        driver.probe(u64::MAX, 8);
        let buffer = driver.alloc(64);
        driver.add(0, &[into(buffer, 64)]);
        driver.kick(0);
    },
    save: |driver: &Driver<Entropy>| driver.dev.state(),
    restore: |driver: &Driver<Entropy>, state: &MmioState<EntropyState>| driver.restore((), state),
}

#[test]
fn a_restored_device_goes_on_and_raises_a_pending_interrupt() {
    let mut driver = Driver::new(Entropy::default());
    let buffer = driver.alloc(64);
    let head = driver.add(0, &[into(buffer, 64)]);
    driver.kick(0);
    let state = driver.dev.state();
    driver.irq.set_level(false);
    let mut restored = driver.restore((), &state);
    restored.dev.resume();
    assert_eq!(restored.interrupts(), INT_VRING);
    assert_eq!(restored.used(0), Some((head, 64)));
    assert_eq!(restored.request(0, &[into(buffer, 32)]), 32);
}

proptest! {
    #[test]
    fn register_accesses_never_panic(
        accesses in proptest::collection::vec((any::<bool>(), 0u64..0x120, any::<u32>()), 1..200),
    ) {
        let driver = Driver::new(Entropy::default());
        for (write, offset, value) in accesses {
            if write {
                driver.dev.write(offset & !3, &(value & 0x00ff_ffff).to_le_bytes());
            } else {
                let mut data = [0; 4];
                driver.dev.read(offset, &mut data[..(value as usize % 4) + 1]);
            }
        }
    }

    #[test]
    fn arbitrary_saved_state_is_restored_or_refused(
        status in 0u32..0x100,
        features in any::<u64>(),
        modern in any::<bool>(),
        size in prop_oneof![Just(16u16), any::<u16>()],
        ready in any::<bool>(),
        addresses in any::<[u32; 3]>(),
        positions in any::<[u16; 2]>(),
    ) {
        let mut state = Driver::new(Entropy::default()).dev.state();
        state.transport.status = status;
        state.transport.driver_features = if modern { VERSION_1 } else { features };
        state.transport.queues[0] = SavedQueue {
            size,
            ready,
            next_avail: positions[0],
            next_used: positions[1],
            desc_table: u64::from(addresses[0] & !15),
            avail_ring: u64::from(addresses[1] & 0xff_fffe),
            used_ring: u64::from(addresses[2] & 0xff_fffc),
        };
        if let Ok(device) = restore(&state) {
            prop_assert_eq!(&device.state(), &state);
            device.resume();
            device.write(u64::from(reg::VIRTIO_MMIO_QUEUE_NOTIFY), &[0; 4]);
        }
    }
}
