//! Queue access for devices: bounded walks over descriptor chains and used-ring bookkeeping (virtio 1.2,
//! section 2.7, split virtqueues). The ring arithmetic is `virtio-queue`'s; this adds what every device
//! needs on top: a chain split into its readable and writable parts with the spec's ordering rules checked,
//! byte-addressed copies, and interrupt suppression for both forms (flag and event index).

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// A ring is broken beyond one request; the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Ring indices or addresses make no sense.
    #[error("Virtqueue is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A ring cannot be reached in guest memory.
    #[error("Virtqueue memory is not accessible: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The device has no such queue.
    #[error("Virtqueue does not exist")]
    NoSuchQueue,
}

/// A buffer could not be copied: it is too short, or its address is not guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Descriptor buffer is too short or not in guest memory")]
pub struct BufferError;

#[derive(Debug, Clone, Copy)]
struct Segment {
    addr: GuestAddress,
    len: u32,
}

/// One descriptor chain, parsed. Reused from request to request to spare the allocations.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    well_formed: bool,
}

impl Chain {
    /// Index to hand to [`Queues::add_used`].
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Whether the chain ended properly: no loop, no index out of range, no readable buffer after a
    /// writable one.
    pub fn well_formed(&self) -> bool {
        self.well_formed
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|s| u64::from(s.len)).sum()
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|s| u64::from(s.len)).sum()
    }

    fn load<M: GuestMemory>(&mut self, chain: DescriptorChain<&M>) {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        // The iterator stops silently at a loop, a bad index or an unreadable table; all of these leave the
        // last descriptor it gave with its "next" flag set, or give none at all.
        let mut complete = false;
        let mut ordered = true;
        for desc in chain {
            complete = !desc.has_next();
            let segment = Segment { addr: desc.addr(), len: desc.len() };
            if desc.is_write_only() {
                self.writable.push(segment);
            } else {
                ordered &= self.writable.is_empty();
                self.readable.push(segment);
            }
        }
        self.well_formed = complete && ordered;
    }

    /// Fills `buf` from the readable part, starting `offset` bytes into it.
    pub fn read<M: GuestMemory>(&self, mem: &M, offset: u64, buf: &mut [u8]) -> Result<(), BufferError> {
        let mut done = 0;
        walk(&self.readable, offset, buf.len(), |addr, len| {
            mem.read_slice(&mut buf[done..done + len], addr).map_err(|_| BufferError)?;
            done += len;
            Ok(())
        })
    }

    /// Writes `buf` to the writable part, starting `offset` bytes into it.
    pub fn write<M: GuestMemory>(&self, mem: &M, offset: u64, buf: &[u8]) -> Result<(), BufferError> {
        let mut done = 0;
        walk(&self.writable, offset, buf.len(), |addr, len| {
            mem.write_slice(&buf[done..done + len], addr).map_err(|_| BufferError)?;
            done += len;
            Ok(())
        })
    }
}

/// Calls `copy` for the pieces of guest memory that make up `len` bytes at `offset`.
fn walk(
    segments: &[Segment],
    mut offset: u64,
    mut len: usize,
    mut copy: impl FnMut(GuestAddress, usize) -> Result<(), BufferError>,
) -> Result<(), BufferError> {
    for segment in segments {
        if len == 0 {
            break;
        }
        let size = u64::from(segment.len);
        if offset >= size {
            offset -= size;
            continue;
        }
        // A u32 minus something: fits usize.
        let piece = len.min((size - offset) as usize);
        let addr = segment.addr.0.checked_add(offset).ok_or(BufferError)?;
        copy(GuestAddress(addr), piece)?;
        len -= piece;
        offset = 0;
    }
    if len == 0 { Ok(()) } else { Err(BufferError) }
}

/// A running device's queues together with guest memory, for the time of one operation.
#[derive(Debug)]
pub struct Queues<'a, M> {
    mem: &'a M,
    queues: &'a mut [Queue],
    interrupt: bool,
}

impl<'a, M: GuestMemory> Queues<'a, M> {
    pub(super) fn new(mem: &'a M, queues: &'a mut [Queue]) -> Self {
        Queues { mem, queues, interrupt: false }
    }

    /// Guest memory.
    pub fn mem(&self) -> &'a M {
        self.mem
    }

    /// Whether a used-buffer interrupt is due.
    pub(super) fn interrupt(&self) -> bool {
        self.interrupt
    }

    fn queue(&mut self, index: usize) -> Result<&mut Queue, QueueError> {
        self.queues.get_mut(index).ok_or(QueueError::NoSuchQueue)
    }

    /// Whether the driver has set this queue up.
    pub fn ready(&self, index: usize) -> bool {
        self.queues.get(index).is_some_and(QueueT::ready)
    }

    /// The driver's running count of buffers it has made available.
    pub fn avail_idx(&mut self, index: usize) -> Result<u16, QueueError> {
        let mem = self.mem;
        Ok(self.queue(index)?.avail_idx(mem, std::sync::atomic::Ordering::Acquire)?.0)
    }

    /// Takes the next available chain. False when there is none.
    pub fn pop(&mut self, index: usize, chain: &mut Chain) -> Result<bool, QueueError> {
        let mem = self.mem;
        match self.queue(index)?.iter(mem)?.next() {
            Some(next) => {
                chain.load(next);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Gives a chain back, `len` bytes of its writable part written.
    pub fn add_used(&mut self, index: usize, head: u16, len: u32) -> Result<(), QueueError> {
        let mem = self.mem;
        Ok(self.queue(index)?.add_used(mem, head, len)?)
    }

    /// Undoes the last [`pop`](Self::pop).
    pub fn unpop(&mut self, index: usize) -> Result<(), QueueError> {
        self.queue(index)?.go_to_previous_position();
        Ok(())
    }

    /// Asks for an interrupt for the buffers used since the last call, unless the driver suppresses it.
    pub fn signal(&mut self, index: usize) -> Result<(), QueueError> {
        let mem = self.mem;
        let queue = self.queue(index)?;
        let due = if queue.event_idx_enabled() {
            queue.needs_notification(mem)?
        } else {
            // The flags word heads the available ring; virtio-queue leaves it to the device.
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let flags = mem.read_obj::<u16>(GuestAddress(queue.avail_ring()))?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.interrupt |= due;
        Ok(())
    }

    /// Asks the driver to notify when it adds buffers. True when some are there already.
    pub fn enable_notification(&mut self, index: usize) -> Result<bool, QueueError> {
        let mem = self.mem;
        Ok(self.queue(index)?.enable_notification(mem)?)
    }

    /// Asks the driver to notify when it adds a buffer to those it had made available at `avail_idx`, although
    /// the device has not taken all of them. True when it has added some already.
    pub fn enable_notification_beyond(&mut self, index: usize, avail_idx: u16) -> Result<bool, QueueError> {
        let mem = self.mem;
        let queue = self.queue(index)?;
        // The event index that this writes is the queue's position.
        let position = queue.next_avail();
        queue.set_next_avail(avail_idx);
        let result = queue.enable_notification(mem);
        queue.set_next_avail(position);
        Ok(result?)
    }

    /// Tells the driver that notifications are not needed for now.
    pub fn disable_notification(&mut self, index: usize) -> Result<(), QueueError> {
        let mem = self.mem;
        Ok(self.queue(index)?.disable_notification(mem)?)
    }
}
