//! virtio-mmio transport, register layout version 2 (virtio 1.2, section 4.2).
//!
//! One [`MmioTransport`] is one device on the memory bus: registers, feature negotiation, status machine,
//! queues and the interrupt line, around a [`VirtioDevice`]. A request on a queue is processed inside the
//! register write that announces it. When a ring is broken, the device stops with DEVICE_NEEDS_RESET and a
//! configuration interrupt, and waits for a reset, as section 2.1.2 asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemory;

use super::queue::{QueueError, Queues};
use super::{IrqLine, MmioDevice, RestoreError, VirtioDevice};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "ambr": there is no registry; drivers ignore it.
const VENDOR: u32 = 0x7262_6d61;
/// Size of a device's register window.
pub const WINDOW_SIZE: u64 = 0x200;

const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
const INT_VRING: u32 = reg::VIRTIO_MMIO_INT_VRING;
const INT_CONFIG: u32 = reg::VIRTIO_MMIO_INT_CONFIG;
/// Status bits that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// Saved layout and position of one queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// Saved transport registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<SavedQueue>,
}

/// Saved state of a whole device: transport and device proper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState<S> {
    /// Registers and queues.
    pub transport: TransportState,
    /// The device behind them.
    pub device: S,
}

struct Inner<D, M> {
    device: D,
    /// None once the machine has been shut down, so that open streams do not keep guest RAM alive.
    mem: Option<Arc<M>>,
    irq: Arc<dyn IrqLine>,
    queues: Vec<Queue>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
}

/// A virtio device on the memory bus.
pub struct MmioTransport<D, M> {
    inner: Mutex<Inner<D, M>>,
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync> MmioTransport<D, M> {
    /// A freshly reset device.
    pub fn new(device: D, mem: Arc<M>, irq: Arc<dyn IrqLine>) -> Self {
        // A size the crate refuses would be a bug in the device's table; `QUEUE_SIZES` is tested.
        let queues = D::QUEUE_SIZES.iter().filter_map(|&size| Queue::new(size).ok()).collect();
        MmioTransport {
            inner: Mutex::new(Inner {
                device,
                mem: Some(mem),
                irq,
                queues,
                device_features_sel: 0,
                driver_features_sel: 0,
                driver_features: 0,
                queue_sel: 0,
                status: 0,
                interrupt_status: 0,
                config_generation: 0,
            }),
        }
    }

    /// A device that goes on where `state` was saved. It starts paused; call [`resume`](Self::resume).
    /// The interrupt line is driven to its saved level, so the interrupt controller must exist already.
    pub fn restore(
        resources: D::Resources,
        mem: Arc<M>,
        irq: Arc<dyn IrqLine>,
        state: &MmioState<D::State>,
    ) -> Result<Self, RestoreError> {
        let device = D::restore(resources, &state.device)?;
        let transport = Self::new(device, mem, irq);
        {
            let mut inner = transport.lock();
            inner.load(&state.transport)?;
            inner.device.pause();
            inner.update_irq();
        }
        Ok(transport)
    }

    /// The state to save. The vCPUs must be stopped and the device paused.
    pub fn state(&self) -> MmioState<D::State> {
        let inner = self.lock();
        MmioState { transport: inner.save(), device: inner.device.state() }
    }

    /// Keeps host threads away from guest memory until [`resume`](Self::resume); data they send meanwhile
    /// is buffered. Called with the vCPUs stopped, before state and memory are captured.
    pub fn pause(&self) {
        self.lock().device.pause();
    }

    /// Lets the device work again; called before the vCPUs run.
    pub fn resume(&self) {
        self.with(|inner| inner.operate(|device, queues| device.resume(queues)));
    }

    /// Ends the device for good and lets go of guest memory. Register accesses are harmless afterwards.
    pub fn shutdown(&self) {
        self.with(|inner| {
            inner.device.shutdown();
            inner.mem = None;
        });
    }

    /// Runs `operation` on the device, with its queues if a driver has activated it.
    pub(super) fn with_device(
        &self,
        operation: impl FnOnce(&mut D, Option<&mut Queues<'_, M>>) -> Result<(), QueueError>,
    ) {
        self.with(|inner| inner.operate(operation));
    }

    /// Runs `f` under the lock and wakes tasks after it.
    fn with(&self, f: impl FnOnce(&mut Inner<D, M>)) {
        let wakers = {
            let mut inner = self.lock();
            f(&mut inner);
            inner.device.take_wakers()
        };
        wakers.into_iter().for_each(std::task::Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, Inner<D, M>> {
        // A panic under the lock ends the machine elsewhere; the registers themselves are always valid.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync> MmioDevice for MmioTransport<D, M> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if offset >= config {
            return inner.device.read_config(offset - config, data);
        }
        // Registers are 32 bits wide and aligned (4.2.2.2); anything else reads as zero.
        data.fill(0);
        if let (Ok(offset), Ok(out)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *out = inner.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Nothing in any of our configuration spaces is writable; partial register writes are ignored.
        if let (Ok(offset), Ok(bytes)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.with(|inner| inner.write_register(offset, u32::from_le_bytes(bytes)));
        }
    }
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync> Inner<D, M> {
    fn offered_features(&self) -> u64 {
        TRANSPORT_FEATURES | self.device.features()
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    fn running(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0
    }

    fn update_irq(&self) {
        self.irq.set_level(self.interrupt_status != 0);
    }

    fn raise(&mut self, bits: u32) {
        self.interrupt_status |= bits;
        self.update_irq();
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => D::DEVICE_ID,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected_queue().map_or(0, |q| u32::from(q.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => self.selected_queue().map_or(0, |q| u32::from(q.ready())),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.status,
            // No shared memory regions: a length of all ones says so (4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => self.configure_queue(|q| {
                if let Ok(size) = u16::try_from(value) {
                    q.set_size(size);
                }
            }),
            reg::VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                let queue = value as usize;
                if self.running() && self.queues.get(queue).is_some_and(QueueT::ready) {
                    self.operate(|device, queues| match queues {
                        Some(queues) => device.notify(queue, queues),
                        None => Ok(()),
                    });
                }
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt_status &= !value;
                self.update_irq();
            }
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.configure_queue(|q| q.set_desc_table_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.configure_queue(|q| q.set_desc_table_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.configure_queue(|q| q.set_avail_ring_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.configure_queue(|q| q.set_avail_ring_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.configure_queue(|q| q.set_used_ring_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.configure_queue(|q| q.set_used_ring_address(None, Some(value)));
            }
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        let negotiating = VIRTIO_CONFIG_S_DRIVER;
        if self.status & (negotiating | VIRTIO_CONFIG_S_FEATURES_OK) != negotiating {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK, and not while they are in use (4.2.3.2).
    fn may_configure(&self) -> bool {
        let mask = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status & mask == VIRTIO_CONFIG_S_FEATURES_OK
    }

    fn configure_queue(&mut self, configure: impl FnOnce(&mut Queue)) {
        if !self.may_configure() {
            return;
        }
        if let Some(queue) = self.queues.get_mut(self.queue_sel as usize)
            && !queue.ready()
        {
            configure(queue);
        }
    }

    fn set_queue_ready(&mut self, value: u32) {
        if !self.may_configure() {
            return;
        }
        let Some(mem) = &self.mem else { return };
        if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
            queue.set_ready(value == 1);
            // A layout outside guest memory is not accepted; the driver sees it when it reads back.
            if queue.ready() && !queue.is_valid(mem.as_ref()) {
                queue.set_ready(false);
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let mut added = value & DRIVER_STATUS & !self.status;
        if self.status & !VIRTIO_CONFIG_S_NEEDS_RESET & !value != 0 {
            // A driver must not clear bits other than by a reset (2.1.1).
            return;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let chosen = self.driver_features;
            let acceptable = chosen & !self.offered_features() == 0 && chosen & 1 << VIRTIO_F_VERSION_1 != 0;
            if !acceptable {
                added &= !VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        let features_ok = (self.status | added) & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !features_ok {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            self.queues.iter_mut().for_each(|q| q.set_event_idx(event_idx));
            self.device.activate(self.driver_features);
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(QueueT::reset);
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.status = 0;
        self.interrupt_status = 0;
        self.update_irq();
    }

    fn operate(
        &mut self,
        operation: impl FnOnce(&mut D, Option<&mut Queues<'_, M>>) -> Result<(), QueueError>,
    ) {
        let Some(mem) = self.mem.clone().filter(|_| self.running()) else {
            // Without queues there is nothing that can break.
            let _ = operation(&mut self.device, None);
            return;
        };
        let mut queues = Queues::new(mem.as_ref(), &mut self.queues);
        let result = operation(&mut self.device, Some(&mut queues));
        let mut bits = if queues.interrupt() { INT_VRING } else { 0 };
        if let Err(error) = result {
            tracing::warn!(device = D::NAME, %error, "Device stopped until the guest resets it");
            self.device.fail();
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.config_generation = self.config_generation.wrapping_add(1);
            bits |= INT_CONFIG;
        }
        if bits != 0 {
            self.raise(bits);
        }
    }

    fn save(&self) -> TransportState {
        TransportState {
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            status: self.status,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: self
                .queues
                .iter()
                .map(|q| {
                    let q = q.state();
                    SavedQueue {
                        size: q.size,
                        ready: q.ready,
                        next_avail: q.next_avail,
                        next_used: q.next_used,
                        desc_table: q.desc_table,
                        avail_ring: q.avail_ring,
                        used_ring: q.used_ring,
                    }
                })
                .collect(),
        }
    }

    fn load(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let invalid = |reason| RestoreError::Invalid { device: D::NAME, reason };
        let status = state.status;
        if status & !(DRIVER_STATUS | VIRTIO_CONFIG_S_NEEDS_RESET) != 0 {
            return Err(invalid("unknown status bits"));
        }
        if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return Err(invalid("running without negotiated features"));
        }
        let features_ok = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if features_ok
            && (state.driver_features & !self.offered_features() != 0
                || state.driver_features & 1 << VIRTIO_F_VERSION_1 == 0)
        {
            return Err(invalid("features this device does not offer"));
        }
        if state.interrupt_status & !(INT_VRING | INT_CONFIG) != 0 {
            return Err(invalid("unknown interrupt bits"));
        }
        if state.queues.len() != self.queues.len() {
            return Err(invalid("wrong number of queues"));
        }
        let event_idx = status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, (queue, saved)) in self.queues.iter_mut().zip(&state.queues).enumerate() {
            let invalid = RestoreError::Queue { device: D::NAME, index };
            let restored = Queue::try_from(QueueState {
                max_size: queue.max_size(),
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: event_idx,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.desc_table,
                avail_ring: saved.avail_ring,
                used_ring: saved.used_ring,
            });
            let Ok(restored) = restored else { return Err(invalid) };
            let in_memory = self.mem.as_ref().is_some_and(|mem| restored.is_valid(mem.as_ref()));
            if restored.ready() && (!features_ok || !in_memory) {
                return Err(invalid);
            }
            *queue = restored;
        }
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.status = status;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.device.activate(state.driver_features);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
