//! The block device as a driver meets it, well-behaved and hostile.

use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::virtio_blk as blk;

use super::*;
use crate::devices::disk::{Base, Overlay, Storage};
use crate::devices::mmio::MmioState;
use crate::devices::testing::{Buf, Driver, RAM, into, out, state_round_trips};

const DISK: u64 = 8 << 20;

fn resources(disk: &Overlay) -> BlockResources {
    BlockResources { disk: Box::new(disk.clone()), id: "amberbox-root".into() }
}

fn disk() -> Overlay {
    Overlay::new(None, DISK, Storage::Memory).unwrap()
}

fn driver() -> (Driver<Block>, Overlay) {
    let disk = disk();
    (Driver::new(Block::new(resources(&disk))), disk)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Performs one request; returns the status and the used length.
fn request(driver: &mut Driver<Block>, kind: u32, sector: u64, data: &[Buf]) -> (u8, u32) {
    let head = driver.place(&header(kind, sector));
    let status = driver.place(&[0xee]);
    let bufs = [&[out(head, 16)], data, &[into(status, 1)]].concat();
    let len = driver.request(0, &bufs);
    (driver.peek(status, 1)[0], len)
}

const OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

#[test]
fn describes_the_disk() {
    let (driver, _) = driver();
    assert_eq!(u64::from_le_bytes(driver.config(0)), DISK / 512);
    assert_eq!(u32::from_le_bytes(driver.config(12)), 254);
    assert_eq!(u32::from_le_bytes(driver.config(20)), 512);
    assert_eq!(driver.config(24), [3u8]);
    assert_eq!(driver.config::<8>(1 << 40), [0; 8]);
    assert_eq!(driver.config::<8>(56), [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn writes_and_reads_back_through_scattered_buffers() {
    for mask in [u64::MAX, !(1 << 29)] {
        let disk = disk();
        let mut driver = Driver::with(Block::new(resources(&disk)), mask, 64);
        let data: Vec<u8> = (0..200_192u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let source = driver.place(&data);
        let bufs = [out(source, 1000), out(source + 1000, 0), out(source + 1000, 199_192)];
        assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 3, &bufs), (OK, 1));
        let mut stored = vec![0; data.len()];
        disk.read_at(3 * 512, &mut stored).unwrap();
        assert_eq!(stored, data);
        let target = driver.alloc(data.len());
        let bufs = [into(target, 511), into(target + 511, data.len() - 511)];
        driver.clean();
        let (status, len) = request(&mut driver, blk::VIRTIO_BLK_T_IN, 3, &bufs);
        assert_eq!((status, len as usize), (OK, data.len() + 1));
        assert_eq!(driver.peek(target, data.len()), data);
        assert!((target..target + data.len() as u64).step_by(4096).all(|page| driver.dirty(page)));
    }
}

#[test]
fn header_and_status_may_share_buffers_with_data() {
    let (mut driver, disk) = driver();
    disk.write_at(0, &[0x5a; 512]).unwrap();
    let head = driver.place(&header(blk::VIRTIO_BLK_T_IN, 0));
    let target = driver.alloc(513);
    let len = driver.request(0, &[out(head, 7), out(head + 7, 9), into(target, 513)]);
    assert_eq!(len, 513);
    assert_eq!(driver.peek(target, 513), [&[0x5a; 512][..], &[OK]].concat());
}

#[test]
fn tells_its_serial_number() {
    let (mut driver, _) = driver();
    let target = driver.alloc(20);
    let (status, len) = request(&mut driver, blk::VIRTIO_BLK_T_GET_ID, 0, &[into(target, 20)]);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(driver.peek(target, 20), b"amberbox-root\0\0\0\0\0\0\0");
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_GET_ID, 0, &[into(target, 4)]), (OK, 5));
}

#[test]
fn flush_and_unknown_requests() {
    let (mut driver, _) = driver();
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_SECURE_ERASE, 0, &[]), (UNSUPP, 1));
    assert_eq!(request(&mut driver, u32::MAX, 0, &[]), (UNSUPP, 1));
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn discard_and_write_zeroes_release_storage() {
    for kind in [blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES] {
        let (mut driver, disk) = driver();
        disk.write_at(0, &[7; 64 * 1024]).unwrap();
        let ranges = driver.place(&[range(4, 20, 0), range(64, 8, 0)].concat());
        assert_eq!(request(&mut driver, kind, 0, &[out(ranges, 32)]), (OK, 1));
        let mut data = vec![0; 64 * 1024];
        disk.read_at(0, &mut data).unwrap();
        for (sector, chunk) in data.chunks(512).enumerate() {
            let zero = (4..24).contains(&sector) || (64..72).contains(&sector);
            assert!(chunk.iter().all(|&b| b == if zero { 0 } else { 7 }), "sector {sector}");
        }
        // Blocks that are zeros without the overlay are not even noted: of 16, three are gone.
        assert_eq!(disk.dirty().iter().map(|run| run.count).sum::<u64>(), 13);
    }
}

#[test]
fn bad_ranges_are_refused() {
    let (mut driver, disk) = driver();
    disk.write_at(0, &[7; 4096]).unwrap();
    let dirty = disk.dirty();
    let sectors = DISK / 512;
    let cases = [
        (blk::VIRTIO_BLK_T_DISCARD, range(0, 8, 1), UNSUPP),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, range(0, 8, 2), UNSUPP),
        (blk::VIRTIO_BLK_T_DISCARD, range(sectors, 1, 0), IOERR),
        (blk::VIRTIO_BLK_T_DISCARD, range(u64::MAX, 2, 0), IOERR),
        (blk::VIRTIO_BLK_T_DISCARD, range(0, u32::MAX, 0), IOERR),
        (blk::VIRTIO_BLK_T_DISCARD, vec![0; 17], IOERR),
        (blk::VIRTIO_BLK_T_DISCARD, vec![0; 16 * 17], IOERR),
        (blk::VIRTIO_BLK_T_DISCARD, vec![], IOERR),
    ];
    for (kind, data, expected) in cases {
        let place = driver.place(&data);
        assert_eq!(request(&mut driver, kind, 0, &[out(place, data.len())]).0, expected, "{data:?}");
    }
    assert_eq!(disk.dirty(), dirty);
}

#[test]
fn transfers_stay_on_the_disk_and_in_memory() {
    let (mut driver, disk) = driver();
    let buffer = driver.alloc(4096);
    let last = DISK / 512 - 1;
    let cases = [
        (last, into(buffer, 512), OK),
        (last, into(buffer, 1024), IOERR),
        (last + 1, into(buffer, 512), IOERR),
        (u64::MAX, into(buffer, 512), IOERR),
        (u64::MAX / 512, into(buffer, 512), IOERR),
        (0, into(buffer, 100), IOERR),
        (0, into(buffer, 0), OK),
        (0, into(RAM - 256, 512), IOERR),
        (0, into(u64::MAX - 100, 512), IOERR),
        (0, into(0, 0xffff_fe00), IOERR),
        // The device reads what it should write.
        (0, out(buffer, 512), OK),
    ];
    for (sector, buf, expected) in cases {
        let (status, len) = request(&mut driver, blk::VIRTIO_BLK_T_IN, sector, &[buf]);
        assert_eq!(status, expected, "{sector} {buf:?}");
        let data = if expected == OK && buf.write { buf.len } else { 0 };
        assert_eq!(len, 1 + data);
        let out_buf = Buf { write: false, ..buf };
        let (status, _) = request(&mut driver, blk::VIRTIO_BLK_T_OUT, sector, &[out_buf]);
        assert_eq!(status, expected, "{sector} {buf:?}");
    }
    assert!(disk.fault().is_none(), "the guest's mistakes are not the host's faults");
}

#[test]
fn malformed_chains_come_back_empty() {
    let (mut driver, _) = driver();
    let head = driver.place(&header(blk::VIRTIO_BLK_T_IN, 0));
    let buffer = driver.alloc(1024);
    // No status, no header, a short header, data before the header's direction allows it.
    for bufs in [
        vec![out(head, 16)],
        vec![into(buffer, 513)],
        vec![out(head, 15), into(buffer, 513)],
        vec![into(buffer, 513), out(head, 16)],
        vec![out(head, 16), into(buffer, 0)],
        vec![out(RAM, 16), into(buffer, 513)],
        vec![out(head, 16), into(RAM, 1)],
    ] {
        assert_eq!(driver.request(0, &bufs), 0, "{bufs:?}");
    }
    // A loop, and a chain that leaves the table.
    for next in [0, 256] {
        driver.descriptor(0, 0, head, 16, 1, next);
        driver.offer(0, 0);
        driver.notify(0);
        assert_eq!(driver.used(0).unwrap(), (0, 0));
    }
    assert_eq!(driver.status() & 0x40, 0, "one bad request does not stop the device");
}

#[test]
fn indices_wrap_around() {
    let disk = disk();
    let mut driver = Driver::with(Block::new(resources(&disk)), u64::MAX, 4);
    let head = driver.place(&header(blk::VIRTIO_BLK_T_GET_ID, 0));
    let target = driver.alloc(5);
    for round in 0..70_000u32 {
        driver.poke(target, &[0xee; 5]);
        assert_eq!(driver.request(0, &[out(head, 16), into(target, 5)]), 5, "round {round}");
    }
    assert_eq!(driver.peek(target, 5), b"ambe\0");
}

#[test]
fn several_requests_per_notification() {
    let (mut driver, disk) = driver();
    let heads: Vec<u16> = (0..40)
        .map(|i| {
            let data = driver.place(&[i + 1; 512]);
            let head = driver.place(&header(blk::VIRTIO_BLK_T_OUT, i.into()));
            let status = driver.alloc(1);
            driver.add(0, &[out(head, 16), out(data, 512), into(status, 1)])
        })
        .collect();
    assert!(driver.kick(0));
    assert_eq!(driver.interrupts(), 1);
    for head in heads {
        assert_eq!(driver.used(0), Some((head, 1)));
    }
    let mut data = [0; 512 * 40];
    disk.read_at(0, &mut data).unwrap();
    assert!(data.chunks(512).enumerate().all(|(i, chunk)| chunk.iter().all(|&b| usize::from(b) == i + 1)));
}

/// A disk on a host that has run out of space.
struct Failing;

impl Disk for Failing {
    fn len(&self) -> u64 {
        DISK
    }
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::InvalidData.into())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
    fn flush(&self) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
}

#[test]
fn failures_of_the_host_are_io_errors() {
    let mut driver = Driver::new(Block::new(BlockResources { disk: Box::new(Failing), id: "x".repeat(40) }));
    let buffer = driver.place(&range(0, 8, 0));
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 0, &[into(buffer, 512)]), (IOERR, 1));
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &[out(buffer, 512)]), (IOERR, 1));
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), (IOERR, 1));
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_DISCARD, 0, &[out(buffer, 16)]), (IOERR, 1));
    let id = driver.alloc(20);
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_GET_ID, 0, &[into(id, 20)]), (OK, 21));
    assert_eq!(driver.peek(id, 20), [b'x'; 20]);
}

struct Corrupt;

impl Base for Corrupt {
    fn len(&self) -> u64 {
        DISK
    }
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::InvalidData, "Frame hash does not match"))
    }
}

#[test]
fn a_corrupt_image_is_noted_told_and_not_answered() {
    let disk = Overlay::new(Some(Arc::new(Corrupt)), DISK, Storage::Memory).unwrap();
    let mut driver = Driver::new(Block::new(resources(&disk)));
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&told);
    disk.set_loss_listener(Box::new(move |reason| hears.lock().unwrap().push(reason.to_owned())));
    let buffer = driver.alloc(4096);
    // A whole block does not need the old content.
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 8, &[out(buffer, 4096)]), (OK, 1));
    assert!(!disk.lost());
    let head = driver.place(&header(blk::VIRTIO_BLK_T_IN, 0));
    let status = driver.place(&[0xee]);
    driver.add(0, &[out(head, 16), into(buffer, 512), into(status, 1)]);
    driver.kick(0);
    assert_eq!(driver.used(0), None);
    assert!(disk.lost());
    assert_eq!(disk.fault().as_deref(), Some("Frame hash does not match"));
    disk.read_at(0, &mut [0; 512]).unwrap_err();
    let reason = "The disk image cannot be read: Frame hash does not match";
    assert_eq!(told.lock().unwrap().as_slice(), [reason]);
}

#[test]
fn a_disk_of_another_size_is_refused() {
    let (driver, _) = driver();
    let state = driver.dev.state();
    let other = Overlay::new(None, DISK / 2, Storage::Memory).unwrap();
    assert!(Block::restore(resources(&other), &state.device).is_err());
}

state_round_trips! {
    state,
    device: driver().0,
    mutate: |driver: &mut Driver<Block>| {
        let buffer = driver.alloc(512);
        request(driver, blk::VIRTIO_BLK_T_IN, 0, &[into(buffer, 512)]);
    },
    save: |driver: &Driver<Block>| driver.dev.state(),
    restore: |driver: &Driver<Block>, state: &MmioState<BlockState>| {
        driver.restore(resources(&disk()), state)
    },
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn random_descriptor_tables_never_panic(
        descriptors in proptest::collection::vec(
            (prop_oneof![0..RAM + 0x1000, Just(0x1_0000u64), any::<u64>()], 0u32..0x3000, 0u16..8, 0u16..40),
            32,
        ),
        heads in proptest::collection::vec(0u16..32, 1..40),
        headers in proptest::collection::vec((0u32..15, 0u64..DISK / 512 + 10), 8),
    ) {
        let (mut driver, _) = driver();
        for (index, (kind, sector)) in headers.into_iter().enumerate() {
            driver.poke(0x1000 * index as u64, &header(kind, sector));
        }
        for (index, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            driver.descriptor(0, index as u16, addr, len, flags, next);
        }
        for head in heads {
            driver.offer(0, head);
            driver.notify(0);
        }
    }
}
