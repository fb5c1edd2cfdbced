//! Guest RAM: one contiguous host mapping, one flag byte per page, pages brought in when they are first touched.
//!
//! The mapping is laid out by page index ([`MemoryMap`]). RAM restored from a sealed image maps the runs of pages that
//! the image holds privately (copy on write) from the image's memfd, so that all copies of a snapshot share what none
//! of them has written; long runs of zeros are anonymous memory. A page is *present* when its content can be read
//! through the mapping: a page of the image is so only once the image has decoded it ([`PageSource::ensure`]), for
//! until then the memfd holds zeros there, and a write would lose what should have been beneath it.
//!
//! Two users see it: the CPU ([`amber_x86::GuestRam`]), which folds the flags into its TLB, and the devices
//! (`vm-memory`, see [`view`]), which pay for a look at the flags with every access. What a snapshot needs of the pages
//! is kept behind the running guest ([`capture`]).

pub mod capture;
pub mod view;

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use amber_x86::{GuestRam, PageFlags, SharedCode};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use self::capture::Aside;
use super::platform::{MemoryMap, PAGE_SIZE};

/// A run of zero pages at least this long is anonymous memory; a shorter one is left to the memfd, whose holes read
/// as zeros too, so that the number of mappings stays small.
const MIN_ZERO_RUN: u64 = 256;

/// Where the content of restored RAM comes from: a sealed image.
pub trait PageSource: Send + Sync {
    /// Number of pages.
    fn pages(&self) -> u64;
    /// A memory file with page p at offset p * 4096, filled by [`ensure`](Self::ensure); its size is that of all pages.
    fn backing(&self) -> BorrowedFd<'_>;
    /// Runs of pages that are not known to be zero, as (first, count), ascending, not overlapping.
    fn data_runs(&self) -> Vec<(u64, u64)>;
    /// Brings `page` into the backing file, and returns the pages around it that came with it.
    ///
    /// # Errors
    /// Why the page cannot be had.
    fn ensure(&self, page: u64) -> Result<Range<u64>, String>;
    /// What software CPUs have decoded of the image, to share it.
    fn shared_code(&self) -> Option<Arc<SharedCode>> {
        None
    }
}

/// Guest RAM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host refused a mapping.
    #[error("Cannot map {bytes} bytes of guest RAM; free memory or ask for less")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The image is of another size.
    #[error("The memory image has {image} pages where the machine has {machine}")]
    Size {
        /// Pages of the image.
        image: u64,
        /// Pages of the machine.
        machine: u64,
    },
    /// The image's list of runs is not a list of runs.
    #[error("The memory image's page runs are out of order or out of range")]
    Runs,
}

/// The host mapping; unmapped when dropped.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that any thread may reach; synchronisation is the business of those who access
// it (the CPU and the devices treat it as memory that changes under them).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are those of a mapping that we made and that nobody uses any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Called after a device wrote to a page that holds decoded code; takes no lock.
pub type CodeListener = Box<dyn Fn() + Send + Sync>;

/// Guest RAM.
pub struct Ram {
    map: MemoryMap,
    mapping: Mapping,
    flags: Box<[AtomicU8]>,
    source: Option<Arc<dyn PageSource>>,
    shared_code: Option<Arc<SharedCode>>,
    /// Pages that are not dirty may differ from `source`: they were sealed in another image since.
    resealed: AtomicBool,
    code_writes: Mutex<Vec<u64>>,
    code_listener: OnceLock<CodeListener>,
    /// What the guest overwrote of pages that a capture has not read yet.
    aside: Mutex<Aside>,
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("map", &self.map).field("restored", &self.source.is_some()).finish()
    }
}

impl Ram {
    /// RAM full of zeros.
    ///
    /// # Errors
    /// The host has no room for it.
    pub fn new(map: MemoryMap) -> Result<Ram, RamError> {
        Self::build(map, None)
    }

    /// RAM with the content of `source`, none of which is read yet.
    ///
    /// # Errors
    /// The host has no room for it, or the source does not fit the map.
    pub fn restore(map: MemoryMap, source: Arc<dyn PageSource>) -> Result<Ram, RamError> {
        if source.pages() != map.pages() {
            return Err(RamError::Size { image: source.pages(), machine: map.pages() });
        }
        Self::build(map, Some(source))
    }

    fn build(map: MemoryMap, source: Option<Arc<dyn PageSource>>) -> Result<Ram, RamError> {
        let failed = |e: rustix::io::Errno| RamError::Map { bytes: map.bytes(), source: e.into() };
        let len = usize::try_from(map.bytes()).map_err(|_| RamError::Map {
            bytes: map.bytes(),
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the host's choice touches nothing that exists.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE | MapFlags::NORESERVE) }
                .map_err(failed)?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(failed(rustix::io::Errno::NOMEM))?;
        let mapping = Mapping { start, len };

        // Zero pages are present; a fresh flag array is one memset.
        let flags: Box<[AtomicU8]> = (0..map.pages()).map(|_| AtomicU8::new(PageFlags::PRESENT)).collect();
        if let Some(source) = &source {
            let runs = source.data_runs();
            check_runs(&runs, map.pages())?;
            for &(first, count) in &runs {
                for flag in &flags[first as usize..(first + count) as usize] {
                    flag.store(0, Ordering::Relaxed);
                }
            }
            for (first, count) in merge_runs(&runs) {
                let offset = first * PAGE_SIZE;
                // SAFETY: the range lies within `mapping` (checked above), which nobody else has seen yet, so
                // replacing part of it invalidates no pointer.
                unsafe {
                    mmap(
                        mapping.start.as_ptr().add(offset as usize).cast(),
                        (count * PAGE_SIZE) as usize,
                        prot,
                        MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                        source.backing(),
                        offset,
                    )
                }
                .map_err(failed)?;
            }
        }
        // A child process of the host has no business with guest RAM: without this, each fork would copy its page
        // tables and make every guest page copy-on-write. Both are advice only.
        // SAFETY: advice on our own mapping that does not change its content.
        unsafe {
            let _ = madvise(mapping.start.as_ptr().cast(), len, Advice::LinuxDontFork);
            let _ = madvise(mapping.start.as_ptr().cast(), len, Advice::LinuxDontDump);
        }
        let shared_code = source.as_ref().and_then(|source| source.shared_code());
        Ok(Ram {
            map,
            mapping,
            flags,
            source,
            shared_code,
            resealed: AtomicBool::new(false),
            code_writes: Mutex::default(),
            code_listener: OnceLock::new(),
            aside: Mutex::default(),
        })
    }

    /// Where this RAM is in the guest's physical address space.
    pub fn map(&self) -> MemoryMap {
        self.map
    }

    /// The runs of pages whose content comes from the image, as (first, count), ascending; empty without an image.
    pub(super) fn image_runs(&self) -> Vec<(u64, u64)> {
        self.source.as_ref().map_or_else(Vec::new, |source| source.data_runs())
    }

    /// The runs of pages that the image's memory file is mapped at: those of [`image_runs`](Self::image_runs), and short
    /// runs of zeros between them.
    pub(super) fn mapped_runs(&self) -> Vec<(u64, u64)> {
        merge_runs(&self.image_runs())
    }

    /// Sets who is told of device writes to pages that hold decoded code. Only the first call counts.
    pub fn set_code_listener(&self, listener: CodeListener) {
        let _ = self.code_listener.set(listener);
    }

    /// Writes what the machine itself puts into guest memory (a clock record), as a device would.
    ///
    /// # Errors
    /// The range is not in RAM, or its pages cannot be had.
    pub fn write(&self, pa: u64, bytes: &[u8]) -> Result<(), String> {
        let mut rest = bytes;
        let mut pa = pa;
        while !rest.is_empty() {
            let page = self.map.page_of(pa).ok_or_else(|| format!("Address {pa:#x} is not in RAM"))?;
            self.ready(page, page)?;
            let offset = pa % PAGE_SIZE;
            let (now, later) = rest.split_at(rest.len().min((PAGE_SIZE - offset) as usize));
            // SAFETY: the page lies within the mapping and the piece within the page; no reference to guest memory
            // is made, so a guest that looks at it meanwhile sees at worst a torn record.
            unsafe {
                let to = self.mapping.start.as_ptr().add((page * PAGE_SIZE + offset) as usize);
                ptr::copy_nonoverlapping(now.as_ptr(), to, now.len());
            }
            self.device_wrote(page);
            pa += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// Makes sure that all of a range of pages is present and may be written. The range must be within RAM.
    fn ready(&self, first: u64, last: u64) -> Result<(), String> {
        for page in first..=last {
            let flags = self.flags[page as usize].load(Ordering::Acquire);
            if flags & PageFlags::PRESENT == 0 {
                self.fill(page)?;
            }
            // Devices do not say whether they will write; keeping a page that is only read costs a copy.
            if flags & PageFlags::CAPTURE != 0 {
                self.preserve(page);
            }
        }
        Ok(())
    }

    /// Notes that a device wrote to a page.
    fn device_wrote(&self, page: u64) {
        let Some(flag) = self.flags.get(page as usize) else { return };
        if flag.fetch_or(PageFlags::DIRTY, Ordering::AcqRel) & PageFlags::CODE != 0 {
            self.code_writes.lock().unwrap_or_else(PoisonError::into_inner).push(page);
            if let Some(listener) = self.code_listener.get() {
                listener();
            }
        }
    }

    /// Number of pages that are dirty, and of those not brought in yet.
    pub fn counts(&self) -> (u64, u64) {
        let (mut dirty, mut absent) = (0, 0);
        for flag in &self.flags {
            let flag = flag.load(Ordering::Relaxed);
            dirty += u64::from(flag & PageFlags::DIRTY != 0);
            absent += u64::from(flag & PageFlags::PRESENT == 0);
        }
        (dirty, absent)
    }

    /// Copies the content of a page that is present; a page beyond RAM reads as zeros.
    pub fn copy_page(&self, page: u64, out: &mut [u8; PAGE_SIZE as usize]) {
        if page >= self.map.pages() {
            return out.fill(0);
        }
        // SAFETY: the page lies within the mapping and `out` has its size. The guest may write meanwhile: then the copy
        // is torn, as it would be for a device that reads; no reference to guest memory is made.
        unsafe {
            let from = self.mapping.start.as_ptr().add((page * PAGE_SIZE) as usize);
            ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len());
        }
    }
}

// SAFETY: the mapping has `map.pages()` pages, is never moved and lives as long as the object; there is a flag for each.
unsafe impl GuestRam for Ram {
    fn host(&self) -> *mut u8 {
        self.mapping.start.as_ptr()
    }

    fn pages(&self) -> u64 {
        self.map.pages()
    }

    fn flags(&self) -> &[AtomicU8] {
        &self.flags
    }

    fn page_of(&self, pa: u64) -> Option<u64> {
        self.map.page_of(pa)
    }

    fn address_of(&self, page: u64) -> u64 {
        self.map.address_of(page)
    }

    fn fill(&self, page: u64) -> Result<(), String> {
        let Some(flag) = self.flags.get(page as usize) else {
            return Err(format!("Page {page} is beyond RAM"));
        };
        let Some(source) = &self.source else {
            flag.fetch_or(PageFlags::PRESENT, Ordering::AcqRel);
            return Ok(());
        };
        let came = source.ensure(page)?;
        if !came.contains(&page) || came.end > self.map.pages() {
            return Err(format!("The memory image did not deliver page {page}"));
        }
        // Release: whoever sees PRESENT sees the page's content.
        for flag in &self.flags[came.start as usize..came.end as usize] {
            flag.fetch_or(PageFlags::PRESENT, Ordering::Release);
        }
        Ok(())
    }

    fn preserve(&self, page: u64) {
        self.set_aside(page);
    }

    fn take_code_writes(&self, out: &mut Vec<u64>) {
        out.append(&mut self.code_writes.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn shared_code(&self) -> Option<&SharedCode> {
        if self.resealed.load(Ordering::Acquire) { None } else { self.shared_code.as_deref() }
    }

    fn sealed(&self, page: u64, offset: usize, out: &mut [u8]) -> bool {
        let Some(source) = self.source.as_ref().filter(|_| page < self.map.pages()) else { return false };
        let wanted = out.len();
        rustix::io::pread(source.backing(), out, page * PAGE_SIZE + offset as u64).is_ok_and(|n| n == wanted)
    }
}

/// Runs must ascend, not overlap, not be empty, and lie within RAM.
fn check_runs(runs: &[(u64, u64)], pages: u64) -> Result<(), RamError> {
    let mut end = 0;
    for &(first, count) in runs {
        let next = first.checked_add(count).ok_or(RamError::Runs)?;
        if count == 0 || first < end || next > pages {
            return Err(RamError::Runs);
        }
        end = next;
    }
    Ok(())
}

/// Joins runs that are separated by few zero pages.
fn merge_runs(runs: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for &(first, count) in runs {
        match merged.last_mut() {
            Some(last) if first - (last.0 + last.1) < MIN_ZERO_RUN => last.1 = first + count - last.0,
            _ => merged.push((first, count)),
        }
    }
    merged
}

#[cfg(test)]
pub(crate) mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// An image whose page p, where it is not zero, is full of `byte(p)`; frames of 16 pages.
    pub(crate) struct TestImage {
        file: File,
        pages: u64,
        runs: Vec<(u64, u64)>,
        pub(crate) asked: Mutex<Vec<u64>>,
        pub(crate) broken: Option<u64>,
    }

    impl TestImage {
        pub(crate) fn new(pages: u64, runs: &[(u64, u64)]) -> TestImage {
            let file = File::from(memfd_create("test-image", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(pages * PAGE_SIZE).unwrap();
            TestImage { file, pages, runs: runs.to_vec(), asked: Mutex::default(), broken: None }
        }

        pub(crate) fn byte(page: u64) -> u8 {
            (page % 255) as u8 + 1
        }
    }

    impl PageSource for TestImage {
        fn pages(&self) -> u64 {
            self.pages
        }
        fn backing(&self) -> BorrowedFd<'_> {
            self.file.as_fd()
        }
        fn data_runs(&self) -> Vec<(u64, u64)> {
            self.runs.clone()
        }
        fn ensure(&self, page: u64) -> Result<Range<u64>, String> {
            if self.broken == Some(page) {
                return Err("Broken".into());
            }
            self.asked.lock().unwrap().push(page);
            let &(first, count) = self.runs.iter().find(|r| (r.0..r.0 + r.1).contains(&page)).unwrap();
            let from = first + (page - first) / 16 * 16;
            let to = (from + 16).min(first + count);
            for p in from..to {
                self.file.write_all_at(&[Self::byte(p); 4096], p * PAGE_SIZE).unwrap();
            }
            Ok(from..to)
        }
    }

    fn first_byte(ram: &Ram, page: u64) -> u8 {
        let mut out = [0; 4096];
        ram.copy_page(page, &mut out);
        assert!(out.iter().all(|b| *b == out[0]));
        out[0]
    }

    #[test]
    fn fresh_ram_is_zero_present_and_clean() {
        let ram = Ram::new(MemoryMap::with_pages(64)).unwrap();
        assert_eq!(ram.counts(), (0, 0));
        assert_eq!(first_byte(&ram, 63), 0);
    }

    #[test]
    fn restored_pages_come_a_frame_at_a_time_and_are_private() {
        let image = Arc::new(TestImage::new(4096, &[(3, 40), (1000, 1), (4090, 6)]));
        let a = Ram::restore(MemoryMap::with_pages(4096), image.clone()).unwrap();
        let b = Ram::restore(MemoryMap::with_pages(4096), image.clone()).unwrap();
        assert_eq!(a.counts(), (0, 47));
        a.fill(20).unwrap();
        assert_eq!(a.counts(), (0, 31));
        assert_eq!(b.counts(), (0, 47));
        a.fill(4095).unwrap();
        for page in 19..35 {
            assert_eq!(first_byte(&a, page), TestImage::byte(page));
        }
        assert_eq!(first_byte(&a, 999), 0);

        // A write in one copy is not seen by the other, nor by the image.
        // SAFETY: page 20 is within the mapping and nobody else uses it.
        unsafe { ptr::write_bytes(a.host().add(20 * 4096), 0xee, 4096) };
        b.fill(20).unwrap();
        assert_eq!(first_byte(&a, 20), 0xee);
        assert_eq!(first_byte(&b, 20), TestImage::byte(20));
    }

    #[test]
    fn a_page_that_cannot_be_had_stays_absent() {
        let mut image = TestImage::new(64, &[(0, 64)]);
        image.broken = Some(7);
        let ram = Ram::restore(MemoryMap::with_pages(64), Arc::new(image)).unwrap();
        assert_eq!(ram.fill(7), Err("Broken".into()));
        assert_eq!(ram.counts(), (0, 64));
        assert!(ram.fill(64).is_err());
    }

    #[test]
    fn hostile_runs_are_refused() {
        for runs in [&[(0, 0)][..], &[(5, 2), (6, 1)], &[(8, 1), (2, 1)], &[(60, 5)], &[(u64::MAX, 2)]] {
            let image = Arc::new(TestImage::new(64, runs));
            let map = MemoryMap::with_pages(64);
            assert!(matches!(Ram::restore(map, image), Err(RamError::Runs)), "{runs:?}");
        }
        let image = Arc::new(TestImage::new(65, &[]));
        assert!(matches!(Ram::restore(MemoryMap::with_pages(64), image), Err(RamError::Size { .. })));
    }

    #[test]
    fn short_zero_runs_do_not_split_the_mapping() {
        assert_eq!(merge_runs(&[(0, 4), (5, 1), (261, 1), (1000, 2)]), [(0, 262), (1000, 2)]);
        assert_eq!(merge_runs(&[(0, 1), (1 + MIN_ZERO_RUN, 1)]), [(0, 1), (1 + MIN_ZERO_RUN, 1)]);
    }
}
