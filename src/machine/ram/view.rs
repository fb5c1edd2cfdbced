//! Guest RAM for the devices, in `vm-memory`'s terms.
//!
//! A slice of guest memory can be had only through [`RamRegion::get_slice`], which first brings its pages in; what is
//! written through it marks pages dirty, and tells the CPU when it held decoded code of one ([`PageBitmap`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use amber_x86::GuestRam;
use vm_memory::bitmap::{BS, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::guest_memory::Result;
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestRegionCollection,
    GuestUsize, MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile,
};

use super::Ram;
use crate::machine::platform::PAGE_SIZE;

/// All of guest RAM, as a device uses it.
pub type GuestMemory = GuestRegionCollection<RamRegion>;

/// The devices' view of `ram`.
///
/// # Errors
/// Never for a map of the platform.
pub fn view(ram: &Arc<Ram>) -> std::result::Result<GuestMemory, vm_memory::GuestRegionCollectionError> {
    let map = ram.map();
    let region = |(start, len)| RamRegion {
        start: GuestAddress(start),
        len,
        bitmap: PageBitmap { ram: Arc::clone(ram), first: map.page_of(start).unwrap_or(0) },
    };
    GuestRegionCollection::from_regions(map.ranges().into_iter().map(region).collect())
}

/// One contiguous piece of guest RAM.
#[derive(Debug)]
pub struct RamRegion {
    start: GuestAddress,
    len: u64,
    bitmap: PageBitmap,
}

/// What happens to the flags of pages that a device writes. Offsets are relative to page index `first`.
#[derive(Debug)]
pub struct PageBitmap {
    ram: Arc<Ram>,
    first: u64,
}

impl<'a> WithBitmapSlice<'a> for PageBitmap {
    type S = RefSlice<'a, PageBitmap>;
}

impl Bitmap for PageBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset as u64 / PAGE_SIZE;
        let last = offset.saturating_add(len - 1) as u64 / PAGE_SIZE;
        for page in first..=last {
            self.ram.device_wrote(self.first + page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.first + offset as u64 / PAGE_SIZE;
        let flags = self.ram.flags().get(page as usize);
        flags.is_some_and(|f| f.load(Ordering::Acquire) & amber_x86::PageFlags::DIRTY != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, PageBitmap> {
        RefSlice::new(self, offset)
    }
}

impl GuestMemoryRegion for RamRegion {
    type B = PageBitmap;

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, PageBitmap> {
        self.bitmap.slice_at(0)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, PageBitmap>>> {
        let end = offset.0.checked_add(count as u64).filter(|end| *end <= self.len);
        if end.is_none() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let ram = &self.bitmap.ram;
        if count > 0 {
            let page = |offset: u64| self.bitmap.first + offset / PAGE_SIZE;
            ram.ready(page(offset.0), page(offset.0 + count as u64 - 1))
                .map_err(|reason| GuestMemoryError::IOError(std::io::Error::other(reason)))?;
        }
        let start = self.bitmap.first * PAGE_SIZE + offset.0;
        // SAFETY: the region lies within the mapping and `offset + count` within the region; the mapping lives as
        // long as `ram`, which `self` holds. Volatile access is what VolatileSlice is for.
        Ok(unsafe {
            VolatileSlice::with_bitmap(
                ram.host().add(start as usize),
                count,
                self.bitmap.slice_at(offset.0 as usize),
                None,
            )
        })
    }
}

/// Accesses to a region as a whole. Not vm-memory's own default, which begins by taking a slice of everything: that
/// would bring all of RAM in.
impl Bytes<MemoryRegionAddress> for RamRegion {
    type E = GuestMemoryError;

    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        let count = buf.len().min(self.len.saturating_sub(addr.0) as usize);
        Ok(self.get_slice(addr, count)?.write(&buf[..count], 0)?)
    }

    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        let count = buf.len().min(self.len.saturating_sub(addr.0) as usize);
        Ok(self.get_slice(addr, count)?.read(&mut buf[..count], 0)?)
    }

    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(addr, buf.len())?.write_slice(buf, 0)?)
    }

    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(addr, buf.len())?.read_slice(buf, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.get_slice(addr, count)?.read_volatile_from(0, src, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.get_slice(addr, count)?.read_exact_volatile_from(0, src, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.get_slice(addr, count)?.write_volatile_to(0, dst, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.get_slice(addr, count)?.write_all_volatile_to(0, dst, count)?)
    }

    fn store<T: AtomicAccess>(&self, val: T, addr: MemoryRegionAddress, order: Ordering) -> Result<()> {
        Ok(self.get_slice(addr, size_of::<T>())?.store(val, 0, order)?)
    }

    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(self.get_slice(addr, size_of::<T>())?.load(0, order)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use amber_x86::PageFlags;
    use vm_memory::GuestMemoryBackend;

    use super::*;
    use crate::machine::platform::{HIGH_RAM, LOW_RAM_END, MemoryMap};
    use crate::machine::ram::tests::TestImage;

    #[test]
    fn device_reads_bring_in_only_what_they_touch() {
        let image = Arc::new(TestImage::new(256, &[(0, 200)]));
        let ram = Arc::new(Ram::restore(MemoryMap::with_pages(256), image.clone()).unwrap());
        let mem = view(&ram).unwrap();
        let value: u32 = mem.read_obj(GuestAddress(33 * 4096 - 2)).unwrap();
        assert_eq!(value.to_le_bytes(), [33, 33, 34, 34]);
        assert_eq!(*image.asked.lock().unwrap(), [32]);
        assert_eq!(ram.counts(), (0, 184));
    }

    #[test]
    fn device_writes_keep_the_rest_of_the_page_and_mark_it() {
        let image = Arc::new(TestImage::new(256, &[(0, 200)]));
        let ram = Arc::new(Ram::restore(MemoryMap::with_pages(256), image).unwrap());
        let told = Arc::new(AtomicBool::new(false));
        let listener = Arc::clone(&told);
        ram.set_code_listener(Box::new(move || listener.store(true, Ordering::Relaxed)));
        ram.flags()[50].fetch_or(PageFlags::CODE, Ordering::Relaxed);
        let mem = view(&ram).unwrap();
        mem.write_slice(&[1; 8192], GuestAddress(49 * 4096 + 1)).unwrap();
        let page: [u8; 2] = mem.read_obj(GuestAddress(51 * 4096)).unwrap();
        assert_eq!(page, [1, TestImage::byte(51)]);
        assert_eq!(ram.take_dirty(0), [49, 50, 51]);
        let mut code = Vec::new();
        ram.take_code_writes(&mut code);
        assert_eq!(code, [50]);
        assert!(told.load(Ordering::Relaxed));
    }

    #[test]
    fn nothing_outside_ram_can_be_reached() {
        let ram = Arc::new(Ram::new(MemoryMap::with_pages(16)).unwrap());
        let mem = view(&ram).unwrap();
        assert!(mem.write_slice(&[0; 8], GuestAddress(16 * 4096 - 4)).is_err());
        assert!(mem.read_obj::<u8>(GuestAddress(u64::MAX)).is_err());
        let region = mem.iter().next().unwrap();
        assert!(region.get_slice(MemoryRegionAddress(u64::MAX), 2).is_err());
        assert!(region.get_slice(MemoryRegionAddress(0), usize::MAX).is_err());
        assert_eq!(region.write(&[7; 10], MemoryRegionAddress(16 * 4096 - 4)).unwrap(), 4);
    }

    #[test]
    fn ram_above_the_hole_is_the_same_mapping() {
        // 1 MiB above 4 GiB; the mapping is sparse, so this costs nothing.
        let map = MemoryMap::with_pages((LOW_RAM_END + (1 << 20)) / PAGE_SIZE);
        let ram = Arc::new(Ram::new(map).unwrap());
        let mem = view(&ram).unwrap();
        assert_eq!(mem.num_regions(), 2);
        mem.write_obj(0x5au8, GuestAddress(HIGH_RAM + 5)).unwrap();
        assert_eq!(ram.take_dirty(0), [LOW_RAM_END / PAGE_SIZE]);
        let mut page = [0; 4096];
        ram.copy_page(LOW_RAM_END / PAGE_SIZE, &mut page);
        assert_eq!(page[5], 0x5a);
    }
}
