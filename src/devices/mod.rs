//! The machine's devices: virtio 1.2 over MMIO (block, vsock, entropy) and a 16550 serial console.
//!
//! A device is a plain state machine behind one lock. The guest drives it by register accesses
//! ([`MmioDevice`]) on the vCPU thread, which also does the work of a queue notification: there is no device
//! thread. Only vsock is driven from host threads too; they take the same lock.
//!
//! Everything a device reads from the guest (registers, descriptors, request headers) or from saved state is
//! untrusted. Guest memory is reached through `vm-memory` alone, so that a page is filled before it is read
//! and marked dirty when it is written.
//!
//! **Lock order:** a device calls [`IrqLine::set_level`] while it holds its own lock. The interrupt
//! controller must therefore never call into a device while it holds its lock. Task wakers are called after
//! the device's lock is released.

pub mod block;
pub mod disk;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod serial;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;

use std::task::Waker;

use vm_memory::GuestMemory;

use queue::{QueueError, Queues};

/// One input of the interrupt controller. The device keeps it equal to its pending condition (a level); an
/// input that the guest programmed as edge-triggered acts on the rise.
pub trait IrqLine: Send + Sync {
    /// Drives the line. Called with the device's lock held, also when the level does not change.
    fn set_level(&self, high: bool);
}

/// A device on the memory bus, as the machine sees it.
pub trait MmioDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` of the device's window.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` of the device's window.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Saved state that a device cannot be built from.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A field holds a value no running device can have.
    #[error("Saved state of the {device} device is invalid: {reason}")]
    Invalid {
        /// Which device.
        device: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A queue's saved layout is impossible or lies outside guest memory.
    #[error("Saved state of queue {index} of the {device} device is invalid")]
    Queue {
        /// Which device.
        device: &'static str,
        /// Which of its queues.
        index: usize,
    },
}

/// What a virtio device is beyond its transport.
///
/// The transport ([`mmio::MmioTransport`]) owns the queues and the status machine:
///
/// ```text
///   reset ──▶ features negotiated ──activate──▶ running ──notify──▶ running
///     ▲                                            │ pause / resume (host)
///     └──────────────── reset ◀────────────────────┘
/// ```
pub trait VirtioDevice: Send + Sized {
    /// Saved state: plain data, untrusted when it comes back.
    type State;
    /// What the host gives the device: a disk, an identity.
    type Resources;

    /// Name in error messages.
    const NAME: &'static str;
    /// Virtio device id.
    const DEVICE_ID: u32;
    /// Maximum size of each queue; each a power of two.
    const QUEUE_SIZES: &'static [u16];

    /// Feature bits of the device type. The transport adds its own.
    fn features(&self) -> u64;

    /// Reads the configuration space; bytes beyond it read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver is ready, with these features.
    fn activate(&mut self, _features: u64) {}

    /// The driver reset the device: forget everything about the guest.
    fn reset(&mut self);

    /// The driver has made buffers available on `queue`. An error stops the device until it is reset.
    fn notify<M: GuestMemory>(&mut self, queue: usize, queues: &mut Queues<'_, M>) -> Result<(), QueueError>;

    /// A ring was broken; the device does nothing more until the driver resets it.
    fn fail(&mut self) {}

    /// From here on the host must not touch guest memory, until `resume`.
    fn pause(&mut self) {}

    /// The machine runs (again, or for the first time after a restore). `queues` is absent as long as no
    /// driver has activated the device.
    fn resume<M: GuestMemory>(&mut self, _queues: Option<&mut Queues<'_, M>>) -> Result<(), QueueError> {
        Ok(())
    }

    /// The machine is gone for good.
    fn shutdown(&mut self) {}

    /// Tasks to wake once the device's lock is released.
    fn take_wakers(&mut self) -> Vec<Waker> {
        Vec::new()
    }

    /// The state to save; meaningful while paused.
    fn state(&self) -> Self::State;

    /// Builds the device from saved state.
    fn restore(resources: Self::Resources, state: &Self::State) -> Result<Self, RestoreError>;
}

/// Copies from a configuration space laid out as `config`; what lies beyond reads as zero.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let count = data.len().min(config.len() - start);
    data[..count].copy_from_slice(&config[start..start + count]);
}
