//! Overlays and the layer store: a sealed image as an overlay's base, and a captured overlay as what a snapshot
//! stores on top of it. A block of a disk is a page of its image.

use std::io;

use amber_layers::{Image, PAGE_SIZE, Page, PageSource};

use super::{BLOCK, BLOCK_SIZE, Base, FrozenDisk};

const _: () = assert!(BLOCK_SIZE == PAGE_SIZE);

impl Base for Image {
    fn len(&self) -> u64 {
        self.pages() * BLOCK
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some(last) = (buf.len() as u64).checked_sub(1).and_then(|len| offset.checked_add(len)) else {
            return Ok(());
        };
        let first = offset / BLOCK;
        self.ensure(first, last / BLOCK - first + 1).map_err(io::Error::other)?;
        read_backing(self, offset, buf)
    }

    fn is_zero(&self, block: u64) -> bool {
        Image::is_zero(self, block)
    }
}

fn read_backing(image: &Image, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match rustix::io::pread(image.backing(), &mut *buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                offset += count as u64;
                buf = &mut buf[count..];
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl PageSource for FrozenDisk {
    fn read(&self, page: u64, out: &mut Page) -> io::Result<()> {
        self.read_block(page, out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use amber_layers::{NewSnapshot, Store};

    use super::super::{DirtyRun, Disk, Overlay, Storage};
    use super::*;

    const PAGES: u64 = 64;

    fn content(disk: &Overlay) -> Vec<u8> {
        let mut data = vec![0; disk.len() as usize];
        disk.read_at(0, &mut data).unwrap();
        data
    }

    #[test]
    fn a_raw_image_reads_like_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rootfs");
        let data: Vec<u8> = (0..30_000u32).map(|i| (i % 253) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let image = Image::from_raw_file(&path, PAGES).unwrap();
        assert_eq!(image.len(), PAGES * BLOCK);
        let mut read = vec![0; 10_000];
        image.read_at(123, &mut read).unwrap();
        assert_eq!(read, data[123..10_123]);
        image.read_at(29_000, &mut read).unwrap();
        assert_eq!(read[..1000], data[29_000..]);
        assert!(read[1000..].iter().all(|&b| b == 0));
        image.read_at(0, &mut []).unwrap();
        assert!(image.read_at(PAGES * BLOCK - 1, &mut read).is_err());
    }

    #[test]
    fn zeros_over_zeros_are_nothing() {
        let disk = Overlay::new(Some(Arc::new(Image::zero(PAGES).unwrap())), PAGES * BLOCK, Storage::Memory)
            .unwrap();
        disk.write_at(0, &[0; 4 * BLOCK_SIZE]).unwrap();
        disk.discard(0, disk.len()).unwrap();
        assert_eq!(disk.dirty(), []);
        disk.write_at(BLOCK, &[1; BLOCK_SIZE]).unwrap();
        assert_eq!(disk.dirty(), [DirtyRun { first: 1, count: 1, zero: false }]);
        disk.discard(BLOCK, BLOCK).unwrap();
        assert_eq!(disk.dirty(), []);
    }

    #[test]
    fn a_captured_disk_becomes_the_base_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        let base = Arc::new(Image::zero(PAGES).unwrap());
        let disk = Overlay::new(Some(base.clone()), PAGES * BLOCK, Storage::Memory).unwrap();
        let data: Vec<u8> = (0..20_480u32).map(|i| ((i * 31) >> 4) as u8).collect();
        disk.write_at(7 * 512, &data).unwrap();
        disk.write_at(40 * BLOCK, &data[..BLOCK_SIZE]).unwrap();
        disk.discard(40 * BLOCK, BLOCK).unwrap();
        let expected = content(&disk);

        let frozen = disk.freeze(disk.aside(Storage::Memory).unwrap()).unwrap();
        disk.write_at(0, &[0xff; 8 * BLOCK_SIZE]).unwrap();
        let mut writer = store.writer();
        writer.disk(Some(base.as_ref()), PAGES, frozen.dirty_blocks(), &frozen).unwrap();
        let meta = writer
            .publish(NewSnapshot { platform: 1, metadata: "{}".into(), ..NewSnapshot::default() })
            .unwrap();
        drop(frozen);

        let snapshot = store.open_snapshot(&meta.id).unwrap();
        let copy = Overlay::new(Some(snapshot.disk().clone()), PAGES * BLOCK, Storage::Memory).unwrap();
        assert!(content(&copy) == expected);
        assert_eq!(copy.dirty(), []);
        copy.write_at(0, &[1; 512]).unwrap();
        assert!(content(&copy)[512..] == expected[512..]);
    }
}
