//! What the CPU reaches outside RAM: register windows, ports, the platform's MSRs, CPUID, time.
//!
//! Accesses to addresses where nothing is read as all ones and are otherwise ignored, as on hardware.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use amber_x86::Bus;

use super::clock::Clock;
use super::devices::Devices;
use super::irq::Irqchip;
use super::irq::pit::Pit;
use super::platform::{
    self, APIC_BASE, IOAPIC_BASE, LAPIC_BASE, MSR_APIC_BASE, MSR_UCODE_REV, PAGE_SIZE, SERIAL_PORT, Slot,
    VIRTIO_BASE, VIRTIO_SIZE, VIRTIO_STRIDE,
};
use super::ram::Ram;
use super::vcpu::Kicker;
use crate::devices::MmioDevice;

/// Oddities to remember at most.
const MAX_ODDITIES: usize = 64;

/// The bus of one machine's CPU, for the time of one run.
pub(super) struct MachineBus {
    pub(super) ram: Arc<Ram>,
    pub(super) irqchip: Arc<Irqchip>,
    pub(super) clock: Arc<Clock>,
    pub(super) devices: Arc<Devices>,
    pub(super) kicker: Arc<dyn Kicker>,
    /// Set when the guest pulls the reset line.
    pub(super) reset: Arc<AtomicBool>,
    /// MSRs that the guest asked for and did not get, with the value written, if it was a write.
    pub(super) unknown_msrs: Vec<(u32, Option<u64>)>,
}

impl MachineBus {
    /// The device of a register window and the offset in it.
    fn window(&self, pa: u64) -> Option<(&dyn MmioDevice, u64)> {
        let offset = pa.checked_sub(VIRTIO_BASE)?;
        if offset % VIRTIO_STRIDE >= VIRTIO_SIZE {
            return None;
        }
        let slot = Slot::ALL.get(usize::try_from(offset / VIRTIO_STRIDE).ok()?)?;
        Some((self.devices.slot(*slot)?, offset % VIRTIO_STRIDE))
    }

    fn unknown(&mut self, index: u32, value: Option<u64>) {
        if self.unknown_msrs.len() < MAX_ODDITIES && !self.unknown_msrs.iter().any(|(i, _)| *i == index) {
            self.unknown_msrs.push((index, value));
        }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        match port {
            SERIAL_PORT..=0x3ff => self.devices.serial().read((port - SERIAL_PORT) as u8),
            port if Pit::owns(port) => self.irqchip.read_pit(port, self.clock.now()),
            // Keyboard controller: no data, ready for a command (the reset). CMOS: no update in progress.
            0x64 | 0x71 => 0,
            _ => 0xff,
        }
    }

    fn write_port(&mut self, port: u16, value: u8) {
        match port {
            SERIAL_PORT..=0x3ff => self.devices.serial().write((port - SERIAL_PORT) as u8, value),
            port if Pit::owns(port) => self.irqchip.write_pit(port, value, self.clock.now()),
            0x64 if value == 0xfe => {
                self.reset.store(true, Ordering::Release);
                self.kicker.kick();
            }
            _ => {}
        }
    }
}

/// The page of an interrupt controller's register window, and the offset in it, which must be that of a whole register.
fn register(pa: u64, data: &[u8]) -> Option<(u64, u64)> {
    (data.len() == 4 && pa.is_multiple_of(4)).then_some((pa & !(PAGE_SIZE - 1), pa & (PAGE_SIZE - 1)))
}

impl Bus for MachineBus {
    fn mmio_read(&mut self, pa: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.window(pa) {
            return device.read(offset, data);
        }
        let value = match register(pa, data) {
            Some((LAPIC_BASE, offset)) => self.irqchip.read_lapic(offset, self.clock.now()),
            Some((IOAPIC_BASE, offset)) => self.irqchip.read_ioapic(offset),
            _ => return data.fill(0xff),
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn mmio_write(&mut self, pa: u64, data: &[u8]) {
        if let Some((device, offset)) = self.window(pa) {
            return device.write(offset, data);
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match register(pa, data) {
            Some((LAPIC_BASE, offset)) => self.irqchip.write_lapic(offset, value, self.clock.now()),
            Some((IOAPIC_BASE, offset)) => self.irqchip.write_ioapic(offset, value),
            _ => {}
        }
    }

    fn io_read(&mut self, port: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_port(port.wrapping_add(i as u16));
        }
    }

    fn io_write(&mut self, port: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.write_port(port.wrapping_add(i as u16), *byte);
        }
    }

    fn rdmsr(&mut self, index: u32) -> Option<u64> {
        let value = match index {
            MSR_APIC_BASE => Some(APIC_BASE),
            index => self.clock.rdmsr(index).or_else(|| platform::constant_msr(index)),
        };
        if value.is_none() {
            self.unknown(index, None);
        }
        value
    }

    fn wrmsr(&mut self, index: u32, value: u64) -> bool {
        let accepted = match index {
            // The local APIC can be neither moved nor turned off here.
            MSR_APIC_BASE => value == APIC_BASE,
            MSR_UCODE_REV => true,
            index => match self.clock.wrmsr(index, value) {
                Some(Ok(Some(page))) => self.ram.write(page.address, &page.bytes).is_ok(),
                Some(Ok(None)) => true,
                Some(Err(_)) => false,
                None => platform::constant_msr(index) == Some(value),
            },
        };
        if !accepted {
            self.unknown(index, Some(value));
        }
        accepted
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        platform::cpuid(leaf, subleaf)
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.irqchip.acknowledge()
    }

    fn task_priority(&mut self) -> u8 {
        self.irqchip.task_priority()
    }

    fn set_task_priority(&mut self, priority: u8) {
        self.irqchip.set_task_priority(priority);
    }

    fn tsc(&mut self) -> u64 {
        self.clock.tsc()
    }

    fn poll(&mut self) -> bool {
        self.irqchip.expire(self.clock.now());
        self.irqchip.pending()
    }
}
