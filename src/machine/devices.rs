//! The devices of one machine, in the slots that the platform gives them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::irq::{Irqchip, Line};
use super::platform::{SERIAL_PIN, Slot};
use super::ram::view::GuestMemory;
use crate::devices::block::{Block, BlockResources, BlockState};
use crate::devices::disk::Overlay;
use crate::devices::mmio::{MmioState, MmioTransport};
use crate::devices::rng::{Entropy, EntropyState};
use crate::devices::serial::{ConsoleLog, Serial, SerialState};
use crate::devices::vsock::{Vsock, VsockConnector, VsockState};
use crate::devices::{IrqLine, MmioDevice, RestoreError};

impl IrqLine for Line {
    fn set_level(&self, high: bool) {
        self.set(high);
    }
}

/// Saved state of all devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DevicesState {
    /// The root disk's.
    pub(super) block: MmioState<BlockState>,
    /// That of the way to the agent.
    pub(super) vsock: MmioState<VsockState>,
    /// The entropy device's.
    pub(super) entropy: MmioState<EntropyState>,
    /// The console's.
    pub(super) serial: SerialState,
}

/// The devices of one machine.
pub(super) struct Devices {
    block: Arc<MmioTransport<Block, GuestMemory>>,
    vsock: Arc<MmioTransport<Vsock, GuestMemory>>,
    entropy: Arc<MmioTransport<Entropy, GuestMemory>>,
    serial: Serial,
    disk: Overlay,
}

/// What the devices are made of.
pub(super) struct Parts<'a> {
    pub(super) memory: GuestMemory,
    pub(super) irqchip: &'a Arc<Irqchip>,
    pub(super) disk: Overlay,
    pub(super) console: ConsoleLog,
}

impl Parts<'_> {
    fn line(&self, slot: Slot) -> Arc<dyn IrqLine> {
        Arc::new(Line::new(self.irqchip, slot.pin()))
    }

    fn block(&self) -> BlockResources {
        BlockResources { disk: Box::new(self.disk.clone()), id: "amberbox-root".into() }
    }
}

impl Devices {
    /// All devices as after reset.
    pub(super) fn new(parts: Parts<'_>) -> Devices {
        let memory = Arc::new(parts.memory.clone());
        let block = Block::new(parts.block());
        Devices {
            block: Arc::new(MmioTransport::new(block, Arc::clone(&memory), parts.line(Slot::Block))),
            vsock: Arc::new(MmioTransport::new(Vsock::new(), Arc::clone(&memory), parts.line(Slot::Vsock))),
            entropy: Arc::new(MmioTransport::new(Entropy::default(), memory, parts.line(Slot::Entropy))),
            serial: Serial::new(parts.console, Arc::new(Line::new(parts.irqchip, SERIAL_PIN))),
            disk: parts.disk,
        }
    }

    /// Devices that go on where `state` was saved. They are paused.
    pub(super) fn restore(parts: Parts<'_>, state: &DevicesState) -> Result<Devices, RestoreError> {
        let memory = Arc::new(parts.memory.clone());
        let block = MmioTransport::restore(
            parts.block(),
            Arc::clone(&memory),
            parts.line(Slot::Block),
            &state.block,
        )?;
        let vsock = MmioTransport::restore((), Arc::clone(&memory), parts.line(Slot::Vsock), &state.vsock)?;
        let entropy = MmioTransport::restore((), memory, parts.line(Slot::Entropy), &state.entropy)?;
        let line = Arc::new(Line::new(parts.irqchip, SERIAL_PIN));
        let serial = Serial::restore(parts.console, line, &state.serial)?;
        Ok(Devices {
            block: Arc::new(block),
            vsock: Arc::new(vsock),
            entropy: Arc::new(entropy),
            serial,
            disk: parts.disk,
        })
    }

    /// The state to save; the devices are paused and no CPU runs.
    pub(super) fn state(&self) -> DevicesState {
        DevicesState {
            block: self.block.state(),
            vsock: self.vsock.state(),
            entropy: self.entropy.state(),
            serial: self.serial.state(),
        }
    }

    /// The device in a slot.
    pub(super) fn slot(&self, slot: Slot) -> Option<&dyn MmioDevice> {
        match slot {
            Slot::Block => Some(&*self.block),
            Slot::Vsock => Some(&*self.vsock),
            Slot::Entropy => Some(&*self.entropy),
            Slot::Balloon | Slot::Net => None,
        }
    }

    pub(super) fn serial(&self) -> &Serial {
        &self.serial
    }

    pub(super) fn disk(&self) -> &Overlay {
        &self.disk
    }

    pub(super) fn connector(&self) -> VsockConnector {
        self.vsock.connector()
    }

    /// Keeps host threads away from guest memory.
    pub(super) fn pause(&self) {
        self.block.pause();
        self.vsock.pause();
        self.entropy.pause();
    }

    /// Undoes [`pause`](Self::pause); before the CPU runs.
    pub(super) fn resume(&self) {
        self.block.resume();
        self.vsock.resume();
        self.entropy.resume();
    }

    /// Ends all connections and lets go of guest memory.
    pub(super) fn shutdown(&self) {
        self.block.shutdown();
        self.vsock.shutdown();
        self.entropy.shutdown();
    }
}
