//! The guest's side for tests: a driver that works a device through its registers and rings, as Linux does,
//! including both forms of notification suppression. Nothing here knows the device's insides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::mmio::{MmioState, MmioTransport};
use super::{IrqLine, MmioDevice, VirtioDevice};

pub(crate) type Mem = GuestMemoryMmap<AtomicBitmap>;

/// Guest RAM of the tests.
pub(crate) const RAM: u64 = 16 << 20;
/// Rings live below, buffers above.
const BUFFERS: u64 = 1 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// An interrupt line that remembers.
#[derive(Default)]
pub(crate) struct TestIrq {
    high: AtomicBool,
    rises: AtomicUsize,
}

impl TestIrq {
    pub(crate) fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    pub(crate) fn rises(&self) -> usize {
        self.rises.load(Ordering::SeqCst)
    }
}

impl IrqLine for TestIrq {
    fn set_level(&self, high: bool) {
        if !self.high.swap(high, Ordering::SeqCst) && high {
            self.rises.fetch_add(1, Ordering::SeqCst);
        }
    }
}

pub(crate) fn memory() -> Arc<Mem> {
    Arc::new(Mem::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap())
}

/// One buffer of a chain, as the driver describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buf {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

/// Readable by the device.
pub(crate) fn out(addr: u64, len: usize) -> Buf {
    Buf { addr, len: len as u32, write: false }
}

/// Writable by the device.
pub(crate) fn into(addr: u64, len: usize) -> Buf {
    Buf { addr, len: len as u32, write: true }
}

#[derive(Clone, Debug)]
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    free: Vec<u16>,
    /// Length of the chain that starts at each descriptor.
    chains: Vec<Vec<u16>>,
    avail_idx: u16,
    /// `avail_idx` at the last kick.
    kicked: u16,
    last_used: u16,
}

pub(crate) struct Driver<D> {
    pub(crate) dev: Arc<MmioTransport<D, Mem>>,
    pub(crate) mem: Arc<Mem>,
    pub(crate) irq: Arc<TestIrq>,
    event_idx: bool,
    rings: Vec<Ring>,
    next_buffer: u64,
}

impl<D: VirtioDevice> Driver<D> {
    /// A device with a driver that has set up all queues and accepted all features.
    pub(crate) fn new(device: D) -> Self {
        Self::with(device, u64::MAX, u16::MAX)
    }

    /// Accepts only features in `mask`, and makes queues no larger than `size`.
    pub(crate) fn with(device: D, mask: u64, size: u16) -> Self {
        let mem = memory();
        let irq = Arc::new(TestIrq::default());
        let dev = Arc::new(MmioTransport::new(device, Arc::clone(&mem), irq.clone()));
        let mut driver = Driver { dev, mem, irq, event_idx: false, rings: Vec::new(), next_buffer: BUFFERS };
        driver.probe(mask, size);
        driver
    }

    /// What a driver does from reset to DRIVER_OK.
    pub(crate) fn probe(&mut self, mask: u64, max_size: u16) {
        assert_eq!(self.get(reg::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(self.get(reg::VIRTIO_MMIO_VERSION), 2);
        self.set(reg::VIRTIO_MMIO_STATUS, 0);
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        self.set(reg::VIRTIO_MMIO_STATUS, status);
        status |= VIRTIO_CONFIG_S_DRIVER;
        self.set(reg::VIRTIO_MMIO_STATUS, status);
        let features = self.offered() & mask;
        self.event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        self.accept(features);
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        self.set(reg::VIRTIO_MMIO_STATUS, status);
        assert_eq!(self.get(reg::VIRTIO_MMIO_STATUS), status);
        self.rings.clear();
        for (index, &max) in D::QUEUE_SIZES.iter().enumerate() {
            self.set(reg::VIRTIO_MMIO_QUEUE_SEL, index as u32);
            assert_eq!(self.get(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(max));
            assert_eq!(self.get(reg::VIRTIO_MMIO_QUEUE_READY), 0);
            let size = max.min(max_size);
            let base = 0x1_0000 * (index as u64 + 1);
            let ring = Ring {
                size,
                desc: base,
                avail: base + 0x8000,
                used: base + 0xa000,
                free: (0..size).rev().collect(),
                chains: vec![Vec::new(); size.into()],
                avail_idx: 0,
                kicked: 0,
                last_used: 0,
            };
            self.mem.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
            self.set(reg::VIRTIO_MMIO_QUEUE_NUM, size.into());
            self.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, ring.desc as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, (ring.desc >> 32) as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.avail as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH, (ring.avail >> 32) as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, ring.used as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_USED_HIGH, (ring.used >> 32) as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(self.get(reg::VIRTIO_MMIO_QUEUE_READY), 1);
            self.rings.push(ring);
        }
        self.set(reg::VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK);
    }

    /// The same guest over a device restored from its state.
    pub(crate) fn onto(&self, dev: MmioTransport<D, Mem>) -> Self {
        Driver {
            dev: Arc::new(dev),
            mem: Arc::clone(&self.mem),
            irq: Arc::clone(&self.irq),
            event_idx: self.event_idx,
            rings: self.rings.clone(),
            next_buffer: self.next_buffer,
        }
    }

    pub(crate) fn restore(&self, resources: D::Resources, state: &MmioState<D::State>) -> Self {
        self.onto(MmioTransport::restore(resources, self.mem.clone(), self.irq.clone(), state).unwrap())
    }

    pub(crate) fn get(&self, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        self.dev.read(offset.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn set(&self, offset: u32, value: u32) {
        self.dev.write(offset.into(), &value.to_le_bytes());
    }

    pub(crate) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0xff; N];
        self.dev.read(u64::from(reg::VIRTIO_MMIO_CONFIG) + offset, &mut bytes);
        bytes
    }

    pub(crate) fn status(&self) -> u32 {
        self.get(reg::VIRTIO_MMIO_STATUS)
    }

    pub(crate) fn offered(&self) -> u64 {
        self.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.get(reg::VIRTIO_MMIO_DEVICE_FEATURES));
        self.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        high << 32 | u64::from(self.get(reg::VIRTIO_MMIO_DEVICE_FEATURES))
    }

    pub(crate) fn accept(&self, features: u64) {
        self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
        self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
    }

    /// Guest memory for a buffer; never reused.
    pub(crate) fn alloc(&mut self, len: usize) -> u64 {
        let addr = self.next_buffer;
        self.next_buffer += (len as u64).next_multiple_of(64);
        assert!(self.next_buffer <= RAM);
        addr
    }

    /// Guest memory that holds `data`.
    pub(crate) fn place(&mut self, data: &[u8]) -> u64 {
        let addr = self.alloc(data.len());
        self.poke(addr, data);
        addr
    }

    pub(crate) fn poke(&self, addr: u64, data: &[u8]) {
        self.mem.write_slice(data, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(addr)).unwrap();
        data
    }

    pub(crate) fn free(&self, queue: usize) -> usize {
        self.rings[queue].free.len()
    }

    /// Writes one descriptor, unchecked.
    pub(crate) fn descriptor(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.rings[queue].desc + 16 * u64::from(index);
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.poke(at, &bytes);
    }

    /// Makes the chain at `head` available, unchecked.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        let (avail, idx) = (ring.avail, ring.avail_idx);
        self.poke(slot, &head.to_le_bytes());
        self.poke(avail + 2, &idx.to_le_bytes());
    }

    /// Sets the available index without offering anything.
    pub(crate) fn set_avail_idx(&mut self, queue: usize, idx: u16) {
        self.poke(self.rings[queue].avail + 2, &idx.to_le_bytes());
    }

    /// Adds a chain and makes it available.
    pub(crate) fn add(&mut self, queue: usize, bufs: &[Buf]) -> u16 {
        let ring = &mut self.rings[queue];
        let chain: Vec<u16> = bufs.iter().map(|_| ring.free.pop().expect("ring has room")).collect();
        let head = chain[0];
        for (position, buf) in bufs.iter().enumerate() {
            let next = chain.get(position + 1).copied();
            let flags = if next.is_some() { NEXT } else { 0 } | if buf.write { WRITE } else { 0 };
            self.descriptor(queue, chain[position], buf.addr, buf.len, flags, next.unwrap_or(0));
        }
        self.rings[queue].chains[usize::from(head)] = chain;
        self.offer(queue, head);
        head
    }

    fn word(&self, addr: u64) -> u16 {
        self.mem.read_obj::<u16>(GuestAddress(addr)).unwrap()
    }

    /// Notifies the device if it wants to know, as virtqueue_kick does.
    pub(crate) fn kick(&mut self, queue: usize) -> bool {
        let ring = &self.rings[queue];
        let (old, new) = (ring.kicked, ring.avail_idx);
        let wanted = if self.event_idx {
            let event = self.word(ring.used + 4 + 8 * u64::from(ring.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.word(ring.used) & 1 == 0
        };
        self.rings[queue].kicked = new;
        if wanted {
            self.notify(queue);
        }
        wanted
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.set(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// Takes a used chain, and asks for an interrupt for the next one.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &self.rings[queue];
        if self.word(ring.used + 2) == ring.last_used {
            return None;
        }
        let at = ring.used + 4 + 8 * u64::from(ring.last_used % ring.size);
        let entry = self.peek(at, 8);
        let head = u32::from_le_bytes(entry[..4].try_into().unwrap()) as u16;
        let len = u32::from_le_bytes(entry[4..].try_into().unwrap());
        let ring = &mut self.rings[queue];
        ring.last_used = ring.last_used.wrapping_add(1);
        let chain = std::mem::take(&mut ring.chains[usize::from(head)]);
        ring.free.extend(chain);
        let (at, value) = (ring.avail + 4 + 2 * u64::from(ring.size), ring.last_used);
        self.poke(at, &value.to_le_bytes());
        Some((head, len))
    }

    /// The interrupt handler: reads and acknowledges what is pending.
    pub(crate) fn interrupts(&self) -> u32 {
        let status = self.get(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_eq!(self.irq.is_high(), status != 0);
        self.set(reg::VIRTIO_MMIO_INTERRUPT_ACK, status);
        assert!(!self.irq.is_high());
        status
    }

    /// One request, start to end: the used length.
    pub(crate) fn request(&mut self, queue: usize, bufs: &[Buf]) -> u32 {
        let head = self.add(queue, bufs);
        assert!(self.kick(queue));
        assert_eq!(self.interrupts(), reg::VIRTIO_MMIO_INT_VRING);
        let (used, len) = self.used(queue).expect("request completed");
        assert_eq!(used, head);
        len
    }

    /// Forgets which pages are dirty.
    pub(crate) fn clean(&self) {
        self.mem.iter().for_each(|region| (**region).bitmap().reset());
    }

    /// Whether any byte of the page at `addr` was written since.
    pub(crate) fn dirty(&self, addr: u64) -> bool {
        let (region, at) = self.mem.to_region_addr(GuestAddress(addr)).unwrap();
        region.bitmap().dirty_at(at.0 as usize)
    }

    pub(crate) fn any_dirty(&self) -> bool {
        (0..RAM).step_by(4096).any(|addr| self.dirty(addr))
    }
}

/// The one test of every device's saved state: saving tells two states apart, restoring brings back either,
/// also through an encoding, and the original is not disturbed by being saved.
macro_rules! state_round_trips {
    ($name:ident, device: $device:expr, mutate: $mutate:expr, save: $save:expr, restore: $restore:expr $(,)?) => {
        #[test]
        fn $name() {
            let mut device = $device;
            let (mutate, save, restore) = ($mutate, $save, $restore);
            let before = save(&device);
            mutate(&mut device);
            let after = save(&device);
            assert_ne!(before, after, "the mutation does not show in the state");
            assert_eq!(save(&device), after, "saving disturbs the device");
            for state in [before, after] {
                let encoded = serde_json::to_vec(&state).unwrap();
                let decoded = serde_json::from_slice(&encoded).unwrap();
                assert_eq!(state, decoded);
                assert_eq!(save(&restore(&device, &decoded)), state);
            }
        }
    };
}
pub(crate) use state_round_trips;
