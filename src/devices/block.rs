//! virtio-blk (virtio 1.2, section 5.2) over a [`Disk`].
//!
//! Requests are processed one after the other inside the notification. Every field of a request is checked
//! against the disk and against limits of ours before anything happens; a failure of the host's storage is an
//! I/O error to the guest, unless content is lost for good: then the machine ends, and the request stays unanswered.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemory;

use super::disk::Disk;
use super::queue::{BufferError, Chain, QueueError, Queues};
use super::{RestoreError, VirtioDevice, read_config_bytes};

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
const HEADER_LEN: u64 = 16;
const ID_LEN: usize = blk::VIRTIO_BLK_ID_BYTES as usize;
/// log2 of the 512-byte sectors in a physical block.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// The most data of one request; Linux stays below 2 MiB.
const MAX_REQUEST: u64 = 32 << 20;
/// Limits of discard and write-zeroes: segments per request, and sectors per segment (1 GiB).
const MAX_RANGES: u32 = 16;
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const RANGE_LEN: u64 = 16;
/// Data moves between disk and guest in pieces of this size.
const PIECE: usize = 128 * 1024;

const FEATURES: u64 = 1 << blk::VIRTIO_BLK_F_SEG_MAX
    | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
    | 1 << blk::VIRTIO_BLK_F_FLUSH
    | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
    | 1 << blk::VIRTIO_BLK_F_DISCARD
    | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// What a block device is made of.
pub struct BlockResources {
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// Serial number that the guest can ask for; at most 20 bytes are used.
    pub id: String,
}

/// Saved state of a block device. The disk's content is saved elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    sectors: u64,
}

/// The block device.
pub struct Block {
    disk: Box<dyn Disk>,
    id: [u8; ID_LEN],
    chain: Chain,
    buffer: Vec<u8>,
}

/// How a request ends, as the status byte says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Failure {
    Io = blk::VIRTIO_BLK_S_IOERR as u8,
    Unsupported = blk::VIRTIO_BLK_S_UNSUPP as u8,
}

impl From<BufferError> for Failure {
    fn from(_: BufferError) -> Self {
        Failure::Io
    }
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Self {
        Failure::Io
    }
}

impl Block {
    /// A block device of the disk's size.
    pub fn new(resources: BlockResources) -> Self {
        let mut id = [0; ID_LEN];
        let len = resources.id.len().min(ID_LEN);
        id[..len].copy_from_slice(&resources.id.as_bytes()[..len]);
        Block { disk: resources.disk, id, chain: Chain::default(), buffer: vec![0; PIECE] }
    }

    fn sectors(&self) -> u64 {
        self.disk.len() / SECTOR
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        // Header and status take a descriptor each.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP, 0]);
        put(26, &(1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        put(34, &1u16.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(1u32 << PHYSICAL_BLOCK_EXP).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Processes the request in `self.chain`; returns the length for the used ring.
    fn process<M: GuestMemory>(&mut self, mem: &M) -> u32 {
        let mut header = [0; HEADER_LEN as usize];
        let writable = self.chain.writable_len();
        if !self.chain.well_formed() || writable == 0 || self.chain.read(mem, 0, &mut header).is_err() {
            // There is no place for a status.
            return 0;
        }
        let [kind, _priority, sector @ ..] = header_words(&header);
        let sector = u64::from(sector[0]) | u64::from(sector[1]) << 32;
        let result = match kind {
            blk::VIRTIO_BLK_T_IN => self.read(mem, sector, writable - 1),
            blk::VIRTIO_BLK_T_OUT => self.write(mem, sector),
            blk::VIRTIO_BLK_T_FLUSH => self.disk.flush().map(|()| 0).map_err(Failure::from),
            blk::VIRTIO_BLK_T_GET_ID => self.get_id(mem, writable - 1),
            blk::VIRTIO_BLK_T_DISCARD => self.zero_ranges(mem, 0),
            blk::VIRTIO_BLK_T_WRITE_ZEROES => self.zero_ranges(mem, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
            _ => Err(Failure::Unsupported),
        };
        let (status, written) = match result {
            Ok(written) => (blk::VIRTIO_BLK_S_OK as u8, written),
            Err(failure) => (failure as u8, 0),
        };
        match self.chain.write(mem, writable - 1, &[status]) {
            // Requests are limited to MAX_REQUEST, so this fits.
            Ok(()) => written as u32 + 1,
            Err(BufferError) => 0,
        }
    }

    /// Checks a data transfer and returns its byte offset.
    fn transfer(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if len > MAX_REQUEST || !len.is_multiple_of(SECTOR) {
            return Err(Failure::Io);
        }
        self.range(sector, len / SECTOR)
    }

    fn range(&self, sector: u64, sectors: u64) -> Result<u64, Failure> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.sectors() => Ok(sector * SECTOR),
            _ => Err(Failure::Io),
        }
    }

    fn read<M: GuestMemory>(&mut self, mem: &M, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = self.transfer(sector, len)?;
        let mut done = 0;
        while done < len {
            let piece = &mut self.buffer[..(len - done).min(PIECE as u64) as usize];
            self.disk.read_at(offset + done, piece)?;
            self.chain.write(mem, done, piece)?;
            done += piece.len() as u64;
        }
        Ok(len)
    }

    fn write<M: GuestMemory>(&mut self, mem: &M, sector: u64) -> Result<u64, Failure> {
        let len = self.chain.readable_len() - HEADER_LEN;
        let offset = self.transfer(sector, len)?;
        let mut done = 0;
        while done < len {
            let piece = &mut self.buffer[..(len - done).min(PIECE as u64) as usize];
            self.chain.read(mem, HEADER_LEN + done, piece)?;
            self.disk.write_at(offset + done, piece)?;
            done += piece.len() as u64;
        }
        Ok(0)
    }

    fn get_id<M: GuestMemory>(&self, mem: &M, room: u64) -> Result<u64, Failure> {
        let len = room.min(ID_LEN as u64);
        self.chain.write(mem, 0, &self.id[..len as usize])?;
        Ok(len)
    }

    /// Discard and write-zeroes: both leave zeros and no storage behind.
    fn zero_ranges<M: GuestMemory>(&self, mem: &M, allowed_flags: u32) -> Result<u64, Failure> {
        let len = self.chain.readable_len() - HEADER_LEN;
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > u64::from(MAX_RANGES) {
            return Err(Failure::Io);
        }
        for index in 0..len / RANGE_LEN {
            let mut range = [0; RANGE_LEN as usize];
            self.chain.read(mem, HEADER_LEN + index * RANGE_LEN, &mut range)?;
            let [low, high, sectors, flags] = header_words(&range);
            if flags & !allowed_flags != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Failure::Io);
            }
            let offset = self.range(u64::from(low) | u64::from(high) << 32, u64::from(sectors))?;
            self.disk.discard(offset, u64::from(sectors) * SECTOR)?;
        }
        Ok(0)
    }
}

fn header_words(bytes: &[u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}

impl VirtioDevice for Block {
    type State = BlockState;
    type Resources = BlockResources;

    const NAME: &'static str = "block";
    const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn reset(&mut self) {}

    fn notify<M: GuestMemory>(&mut self, queue: usize, queues: &mut Queues<'_, M>) -> Result<(), QueueError> {
        loop {
            queues.disable_notification(queue)?;
            while queues.pop(queue, &mut self.chain)? {
                let len = self.process(queues.mem());
                if self.disk.lost() {
                    return Ok(());
                }
                queues.add_used(queue, self.chain.head(), len)?;
            }
            queues.signal(queue)?;
            if !queues.enable_notification(queue)? {
                return Ok(());
            }
        }
    }

    fn state(&self) -> BlockState {
        BlockState { sectors: self.sectors() }
    }

    fn restore(resources: BlockResources, state: &BlockState) -> Result<Self, RestoreError> {
        let block = Block::new(resources);
        if block.sectors() != state.sectors {
            return Err(RestoreError::Invalid { device: Self::NAME, reason: "disk has another size" });
        }
        Ok(block)
    }
}

#[cfg(test)]
mod tests;
