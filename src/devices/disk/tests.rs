//! The overlay against a model, and what it costs.

use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;

const LEN: u64 = 40 * BLOCK + 1536;

struct Pattern {
    len: u64,
    /// It knows its blocks of zeros.
    mapped: bool,
}

fn pattern(at: u64) -> u8 {
    // Some blocks of the base are zeros.
    if at / BLOCK % 5 == 2 { 0 } else { (at % 251) as u8 ^ (at / BLOCK) as u8 }
}

impl Base for Pattern {
    fn len(&self) -> u64 {
        self.len
    }
    fn is_zero(&self, block: u64) -> bool {
        self.mapped && block % 5 == 2
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(offset + buf.len() as u64 <= self.len, "read beyond the base");
        buf.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = pattern(at));
        Ok(())
    }
}

fn overlay(len: u64, storage: Storage<'_>) -> Overlay {
    Overlay::new(Some(Arc::new(Pattern { len, mapped: false })), LEN, storage).unwrap()
}

fn content(disk: &Overlay) -> Vec<u8> {
    let mut data = vec![0xee; LEN as usize];
    disk.read_at(0, &mut data).unwrap();
    data
}

fn stored(disk: &Overlay) -> u64 {
    disk.0.lock().file.metadata().unwrap().blocks() * 512
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, u64, u8),
    Discard(u64, u64),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let sectors = LEN / 512;
    let range = (0..sectors).prop_flat_map(move |first| (Just(first), 0..=(sectors - first).min(60)));
    let change = (range, any::<bool>(), 0u8..3).prop_map(|((first, count), write, fill)| {
        if write { Change::Write(first, count, fill) } else { Change::Discard(first, count) }
    });
    proptest::collection::vec(change, 1..30)
}

fn apply(disk: &Overlay, model: &mut [u8], change: &Change) {
    match *change {
        Change::Write(first, count, fill) => {
            let data: Vec<u8> = (0..count * 512).map(|i| fill * (i % 13) as u8).collect();
            disk.write_at(first * 512, &data).unwrap();
            model[(first * 512) as usize..][..data.len()].copy_from_slice(&data);
        }
        Change::Discard(first, count) => {
            disk.discard(first * 512, count * 512).unwrap();
            model[(first * 512) as usize..((first + count) * 512) as usize].fill(0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn behaves_like_bytes_and_captures_hold_still(
        base in prop_oneof![Just(LEN), 0..LEN],
        mapped in any::<bool>(),
        before in changes(),
        during in changes(),
    ) {
        let base_image = Arc::new(Pattern { len: base, mapped });
        let disk = Overlay::new(Some(base_image), LEN, Storage::Memory).unwrap();
        let mut model: Vec<u8> = (0..LEN).map(|at| if at < base { pattern(at) } else { 0 }).collect();
        before.iter().for_each(|change| apply(&disk, &mut model, change));
        prop_assert!(content(&disk) == model);

        let mut captured = model.clone();
        captured.resize((disk.0.blocks * BLOCK) as usize, 0);
        let before = disk.dirty();
        let frozen = disk.freeze(disk.aside(Storage::Memory).unwrap()).unwrap();
        let dirty = frozen.dirty();
        prop_assert_eq!(&dirty, &before);
        prop_assert!(disk.dirty().is_empty());
        for change in &during {
            apply(&disk, &mut model, change);
            prop_assert!(content(&disk) == model);
        }
        prop_assert_eq!(frozen.dirty(), dirty.clone());
        for block in 0..disk.0.blocks {
            let mut data = [0xee; BLOCK_SIZE];
            let read = frozen.read_block(block, &mut data);
            prop_assert!(read.is_ok());
            prop_assert!(data[..] == captured[block as usize * BLOCK_SIZE..][..BLOCK_SIZE], "block {}", block);
            if dirty.iter().any(|run| run.zero && (run.first..run.first + run.count).contains(&block)) {
                prop_assert!(data.iter().all(|&b| b == 0));
            }
        }
        drop(frozen);
        prop_assert!(content(&disk) == model);
        // What is not owned is the base's.
        let owned = disk.dirty();
        for (at, &byte) in (0..base).zip(&model) {
            if !owned.iter().any(|run| (run.first..run.first + run.count).contains(&(at / BLOCK))) {
                prop_assert_eq!(byte, pattern(at));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn captures_in_a_row_each_hold_what_changed(
        mapped in any::<bool>(),
        rounds in proptest::collection::vec((changes(), changes(), any::<bool>()), 1..6),
    ) {
        let base = Arc::new(Pattern { len: LEN, mapped });
        let disk = Overlay::new(Some(base), LEN, Storage::Memory).unwrap();
        let mut model: Vec<u8> = (0..LEN).map(pattern).collect();
        let mut snapshot = model.clone();
        snapshot.resize((disk.0.blocks * BLOCK) as usize, 0);
        for (before, during, commit) in rounds {
            before.iter().for_each(|change| apply(&disk, &mut model, change));
            let mut want = model.clone();
            want.resize(snapshot.len(), 0);
            let frozen = disk.freeze(disk.aside(Storage::Memory).unwrap()).unwrap();
            during.iter().for_each(|change| apply(&disk, &mut model, change));
            let mut next = snapshot.clone();
            for block in frozen.dirty_blocks() {
                let mut data = [0xee; BLOCK_SIZE];
                frozen.read_block(block, &mut data).unwrap();
                next[block as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&data);
            }
            prop_assert!(next == want);
            if commit {
                frozen.commit();
                snapshot = next;
            }
            prop_assert!(content(&disk) == model);
        }
    }
}

#[test]
fn what_a_snapshot_holds_is_not_captured_again() {
    let disk = overlay(LEN, Storage::Memory);
    let capture = || disk.freeze(disk.aside(Storage::Memory).unwrap()).unwrap();
    disk.write_at(0, &[1; 8 * BLOCK_SIZE]).unwrap();
    let first = capture();
    disk.write_at(BLOCK, &[2; BLOCK_SIZE]).unwrap();
    first.commit();
    let second = capture();
    assert_eq!(second.dirty(), [DirtyRun { first: 1, count: 1, zero: false }]);
    assert!(second.read_block(0, &mut [0; BLOCK_SIZE]).is_err(), "owned, and not captured");
    drop(second);
    disk.discard(0, BLOCK).unwrap();
    let third = capture();
    assert_eq!(
        third.dirty(),
        [DirtyRun { first: 0, count: 1, zero: true }, DirtyRun { first: 1, count: 1, zero: false }]
    );
    third.commit();
    assert_eq!(capture().dirty(), []);
}

#[test]
fn zeros_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for storage in [Storage::Memory, Storage::Directory(dir.path())] {
        let disk = overlay(LEN, storage);
        disk.write_at(0, &[0; 16 * BLOCK_SIZE]).unwrap();
        assert_eq!(stored(&disk), 0);
        assert_eq!(disk.dirty(), [DirtyRun { first: 0, count: 16, zero: true }]);
        disk.write_at(0, &[1; 16 * BLOCK_SIZE]).unwrap();
        assert_eq!(disk.dirty(), [DirtyRun { first: 0, count: 16, zero: false }]);
        assert!(stored(&disk) >= 16 * BLOCK);
        disk.discard(BLOCK, 15 * BLOCK).unwrap();
        assert!(stored(&disk) < 16 * BLOCK, "discarded blocks are given back");
        assert_eq!(
            disk.dirty(),
            [DirtyRun { first: 0, count: 1, zero: false }, DirtyRun { first: 1, count: 15, zero: true }]
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the overlay's file has no name");
}

#[test]
fn an_empty_overlay_is_the_base() {
    let disk = overlay(LEN, Storage::Memory);
    assert!(disk.dirty().is_empty());
    assert!(content(&disk).iter().zip(0..).all(|(&byte, at)| byte == pattern(at)));
    assert_eq!(stored(&disk), 0);
}

#[test]
fn accesses_beyond_the_end_are_refused() {
    let disk = overlay(LEN, Storage::Memory);
    let mut data = [0; 1024];
    assert!(disk.read_at(LEN - 512, &mut data).is_err());
    assert!(disk.read_at(u64::MAX - 512, &mut data).is_err());
    assert!(disk.write_at(LEN - 512, &data).is_err());
    assert!(disk.discard(LEN - 512, 1024).is_err());
    assert!(disk.discard(0, u64::MAX).is_err());
    assert!(disk.dirty().is_empty());
    assert!(Overlay::new(None, 0, Storage::Memory).is_err());
    assert!(Overlay::new(None, 1000, Storage::Memory).is_err());
}

#[test]
fn a_failed_write_leaves_the_old_content() {
    let disk = overlay(LEN, Storage::Memory);
    disk.write_at(0, &[1; BLOCK_SIZE]).unwrap();
    // A file that cannot be written stands for a full file system.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("read-only");
    std::fs::write(&path, [1; BLOCK_SIZE]).unwrap();
    disk.0.lock().file = File::open(&path).unwrap();
    assert!(disk.write_at(0, &[2; BLOCK_SIZE]).is_err());
    assert!(disk.write_at(BLOCK, &[2; BLOCK_SIZE]).is_err());
    assert!(disk.fault().is_some());
    let mut data = [0; BLOCK_SIZE];
    disk.read_at(0, &mut data).unwrap();
    assert_eq!(data, [1; BLOCK_SIZE]);
    disk.read_at(BLOCK, &mut data).unwrap();
    assert!(data.iter().zip(BLOCK..).all(|(&byte, at)| byte == pattern(at)));
    assert_eq!(disk.dirty(), [DirtyRun { first: 0, count: 1, zero: false }]);
}

#[test]
fn one_capture_at_a_time() {
    let disk = overlay(LEN, Storage::Memory);
    let aside = || disk.aside(Storage::Memory).unwrap();
    let frozen = disk.freeze(aside()).unwrap();
    assert_eq!(disk.freeze(aside()).err().unwrap().kind(), io::ErrorKind::ResourceBusy);
    assert_eq!(frozen.blocks(), LEN.div_ceil(BLOCK));
    assert!(frozen.read_block(frozen.blocks(), &mut [0; BLOCK_SIZE]).is_err());
    drop(frozen);
    assert!(disk.freeze(aside()).is_ok());
}

#[test]
fn a_raw_file_serves_as_base() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs");
    std::fs::write(&path, [9; 5000]).unwrap();
    let disk = Overlay::new(Some(Arc::new(RawImage::open(&path).unwrap())), LEN, Storage::Memory).unwrap();
    disk.write_at(0, &[8; 512]).unwrap();
    let content = content(&disk);
    assert!(content[..512].iter().all(|&b| b == 8));
    assert!(content[512..5000].iter().all(|&b| b == 9));
    assert!(content[5000..].iter().all(|&b| b == 0));
    assert!(std::fs::read(&path).unwrap().iter().all(|&b| b == 9), "the base is never written");
    assert!(RawImage::open(&dir.path().join("missing")).is_err());
}
