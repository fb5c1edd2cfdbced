//! One sealed address space, memory or disk, decoded on demand into one memory file per process.
//!
//! All sandboxes of a snapshot share the [`Image`]: each maps its memory file `MAP_PRIVATE` or reads it. A page is there
//! after [`Image::ensure`]; a bitmap says so with one load. Frames are decoded once: whoever needs one takes the
//! lock of its shard, and those who come later find the pages in place. Zero pages stay holes.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::codec::Scratch;
use crate::error::{FormatError, ImageError, Part};
use crate::extent::{Extent, ExtentMap, FrameIndex, ZERO_LAYER};
use crate::format::{FRAME_BYTES, FRAME_PAGES, MAX_PAGES, PAGE_SIZE, Page, ZERO_PAGE};
use crate::known::Prints;
use crate::layer::Layer;

/// Locks that decoding is spread over.
const SHARDS: usize = 32;
/// First touches remembered per image.
const TOUCHES_MAX: usize = 1 << 16;

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

/// What a run of pages of an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// Zeros, known without reading anything.
    Zero,
    /// Stored content (which may happen to be zeros).
    Data,
}

/// One sealed address space of 4 KiB pages.
#[derive(Debug)]
pub struct Image {
    pages: u32,
    source: Source,
    memory: File,
    /// One bit per page: its content is in `memory`.
    present: Box<[AtomicU64]>,
    shards: [Mutex<()>; SHARDS],
    frames_decoded: AtomicU64,
    touches: Mutex<Vec<PageRange>>,
    prints: Mutex<Prints>,
    derived: OnceLock<Arc<dyn Any + Send + Sync>>,
}

#[derive(Debug)]
enum Source {
    Layers { map: ExtentMap, layers: Box<[Arc<Layer>]>, index: OnceLock<FrameIndex> },
    Raw { path: PathBuf, file: File },
}

impl Image {
    pub(crate) fn from_layers(map: ExtentMap, layers: Box<[Arc<Layer>]>) -> Result<Image, ImageError> {
        Image::new(map.pages(), Source::Layers { map, layers, index: OnceLock::new() })
    }

    /// An image of zeros, the memory of a machine that boots.
    pub fn zero(pages: u64) -> Result<Image, ImageError> {
        let count = checked_pages(pages)?;
        Image::from_layers(ExtentMap::zero(count), Box::new([]))
    }

    /// An image over a plain file, for instance a root file system that was just built. Bytes behind the end of the
    /// file are zeros. The file must not change while the image exists.
    pub fn from_raw_file(path: &Path, pages: u64) -> Result<Image, ImageError> {
        let file = File::open(path).map_err(|source| ImageError::Read { path: path.to_owned(), source })?;
        Image::new(checked_pages(pages)?, Source::Raw { path: path.to_owned(), file })
    }

    fn new(pages: u32, source: Source) -> Result<Image, ImageError> {
        let memory = memory_file(u64::from(pages) * PAGE_SIZE as u64).map_err(ImageError::Memory)?;
        let words = (pages as usize).div_ceil(64);
        Ok(Image {
            pages,
            source,
            memory,
            present: (0..words).map(|_| AtomicU64::new(0)).collect(),
            shards: [const { Mutex::new(()) }; SHARDS],
            frames_decoded: AtomicU64::new(0),
            touches: Mutex::new(Vec::new()),
            prints: Mutex::default(),
            derived: OnceLock::new(),
        })
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        u64::from(self.pages)
    }

    /// The memory file: page `p` is at offset `p * PAGE_SIZE` once it was ensured. Its size is sealed. Map it private:
    /// writing to it would change all sandboxes that share it. Zero pages are holes; touching a hole through a
    /// mapping makes the kernel allocate it, so where [`Image::is_zero`] says so anonymous memory is cheaper.
    pub fn backing(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Whether a page is known to be zeros without reading anything.
    pub fn is_zero(&self, page: u64) -> bool {
        match (&self.source, u32::try_from(page)) {
            (Source::Layers { map, .. }, Ok(page)) if page < self.pages => {
                map.get(map.find(page)).layer == ZERO_LAYER
            }
            _ => false,
        }
    }

    /// Whether a page's content is in the memory file already. One atomic load.
    #[inline]
    pub fn is_present(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|i| self.present.get(i));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// All pages in order, as runs of zeros and of data.
    pub fn extents(&self) -> impl Iterator<Item = (PageRange, PageKind)> + '_ {
        let (map, raw) = match &self.source {
            Source::Layers { map, .. } => (Some(map), None),
            Source::Raw { .. } => {
                (None, (self.pages > 0).then_some(Extent { start: 0, count: self.pages, layer: 1, slot: 0 }))
            }
        };
        let mut extents = map.into_iter().flat_map(ExtentMap::iter).chain(raw).peekable();
        std::iter::from_fn(move || {
            let head = extents.next()?;
            let kind = |e: &Extent| if e.layer == ZERO_LAYER { PageKind::Zero } else { PageKind::Data };
            let mut range = PageRange { first: u64::from(head.start), count: u64::from(head.count) };
            while let Some(next) = extents.next_if(|e| kind(e) == kind(&head)) {
                range.count += u64::from(next.count);
            }
            Some((range, kind(&head)))
        })
    }

    /// Brings pages into the memory file. Any thread may call this at any time; each frame is decoded once.
    #[inline]
    pub fn ensure(&self, first: u64, count: u64) -> Result<(), ImageError> {
        if count == 1 && self.is_present(first) {
            return Ok(());
        }
        self.ensure_slow(first, count)
    }

    #[cold]
    fn ensure_slow(&self, first: u64, count: u64) -> Result<(), ImageError> {
        let end = first.checked_add(count).filter(|end| *end <= self.pages());
        let Some(end) = end else {
            return Err(ImageError::OutOfRange { first, count, pages: self.pages() });
        };
        let mut page = first;
        while page < end {
            if self.is_present(page) {
                page += 1;
                continue;
            }
            // Both fit: `end` is at most `pages`.
            let (at, left) = (page as u32, (end - page) as u32);
            page += u64::from(self.fill(at, left)?);
        }
        Ok(())
    }

    /// Makes `page` present and returns how many pages from there on need no further look.
    fn fill(&self, page: u32, left: u32) -> Result<u32, ImageError> {
        match &self.source {
            Source::Raw { path, file } => {
                let chunk = page / FRAME_PAGES as u32;
                let guard = self.shard(0, chunk);
                if !self.is_present(u64::from(page)) {
                    self.fill_raw(path, file, chunk)?;
                    self.touched(page, left.min(FRAME_PAGES as u32));
                }
                drop(guard);
                Ok(1)
            }
            Source::Layers { map, layers, index } => {
                let extent = map.get(map.find(page));
                let run = (extent.start + extent.count - page).min(left);
                if extent.layer == ZERO_LAYER {
                    self.mark(page, run);
                    return Ok(run);
                }
                let frame = (extent.slot + (page - extent.start)) / FRAME_PAGES as u32;
                let guard = self.shard(extent.layer, frame);
                if !self.is_present(u64::from(page)) {
                    let index = index.get_or_init(|| FrameIndex::new(map));
                    self.fill_frame(&layers[usize::from(extent.layer) - 1], index, extent.layer, frame)?;
                    self.touched(page, run.min(FRAME_PAGES as u32));
                }
                drop(guard);
                Ok(1)
            }
        }
    }

    fn fill_frame(
        &self,
        layer: &Layer,
        index: &FrameIndex,
        number: u16,
        frame: u32,
    ) -> Result<(), ImageError> {
        let place = |scratch: &mut Scratch| {
            let content = layer.read_frame(frame, scratch)?;
            self.frames_decoded.fetch_add(1, Ordering::Relaxed);
            for extent in index.pages_of(number, frame) {
                let from = (extent.slot % FRAME_PAGES as u32) as usize * PAGE_SIZE;
                let Some(bytes) = content.get(from..from + extent.count as usize * PAGE_SIZE) else {
                    let part = Part::Frame(frame);
                    return Err(FormatError::corrupt(layer.path(), part, "map refers behind its end").into());
                };
                self.place(extent.start, bytes)?;
                self.mark(extent.start, extent.count);
            }
            Ok(())
        };
        Scratch::with(place).map_err(ImageError::Memory)?
    }

    fn fill_raw(&self, path: &Path, file: &File, chunk: u32) -> Result<(), ImageError> {
        let mut content = [0; FRAME_BYTES];
        let first = chunk * FRAME_PAGES as u32;
        let count = (self.pages - first).min(FRAME_PAGES as u32);
        read_padded(path, file, u64::from(first), &mut content)?;
        for (i, page) in content.chunks_exact(PAGE_SIZE).take(count as usize).enumerate() {
            if page != ZERO_PAGE {
                self.place(first + i as u32, page)?;
            }
        }
        self.mark(first, count);
        Ok(())
    }

    fn place(&self, first: u32, bytes: &[u8]) -> Result<(), ImageError> {
        self.memory.write_all_at(bytes, u64::from(first) * PAGE_SIZE as u64).map_err(ImageError::Memory)
    }

    /// Publishes pages whose content is in place.
    fn mark(&self, first: u32, count: u32) {
        let (mut page, end) = (first as usize, (first + count) as usize);
        while page < end {
            let (word, bit) = (page / 64, page % 64);
            let run = (64 - bit).min(end - page);
            let mask = if run == 64 { u64::MAX } else { ((1 << run) - 1) << bit };
            self.present[word].fetch_or(mask, Ordering::Release);
            page += run;
        }
    }

    fn shard(&self, layer: u16, frame: u32) -> MutexGuard<'_, ()> {
        let shard = (usize::from(layer) * 7 + frame as usize) % SHARDS;
        // A panic while the lock was held leaves nothing half done that is marked present.
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touched(&self, first: u32, count: u32) {
        let mut touches = self.touches.lock().unwrap_or_else(PoisonError::into_inner);
        if touches.len() < TOUCHES_MAX {
            touches.push(PageRange { first: u64::from(first), count: u64::from(count) });
        }
    }

    /// What was decoded so far, in the order of first need: what a prefetch list is made of.
    pub fn first_touches(&self) -> Vec<PageRange> {
        self.touches.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the image's users derive from its content and share: made by the first who asks, and there as long as the image.
    /// `None` if there is something of another type already.
    pub fn derived<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Option<Arc<T>> {
        Arc::clone(self.derived.get_or_init(|| Arc::new(make()))).downcast().ok()
    }

    /// Frames decoded so far.
    pub fn frames_decoded(&self) -> u64 {
        self.frames_decoded.load(Ordering::Relaxed)
    }

    /// Pages that hold (possibly) non-zero content, that is, the memory file's size when all is decoded.
    pub fn data_pages(&self) -> u64 {
        match &self.source {
            Source::Layers { map, .. } => map.data_pages(),
            Source::Raw { .. } => self.pages(),
        }
    }

    /// The number of layers that pages are taken from.
    pub fn layer_count(&self) -> usize {
        self.layers().len()
    }

    /// Copies one page.
    pub fn read_page(&self, page: u64, out: &mut Page) -> Result<(), ImageError> {
        self.read(page, out)
    }

    /// Copies pages from `first` on; `out` is a whole number of pages long.
    pub fn read(&self, first: u64, out: &mut [u8]) -> Result<(), ImageError> {
        self.ensure(first, out.len().div_ceil(PAGE_SIZE) as u64)?;
        self.memory.read_exact_at(out, first * PAGE_SIZE as u64).map_err(ImageError::Memory)
    }

    /// Copies pages of a plain file without keeping them decoded: for storing all of it.
    pub(crate) fn read_raw(&self, first: u64, out: &mut [u8]) -> Result<(), ImageError> {
        match &self.source {
            Source::Raw { path, file } => read_padded(path, file, first, out),
            Source::Layers { .. } => self.read(first, out),
        }
    }

    /// Makes [`Image::find_equal`] know the pages that are decoded at this moment.
    pub(crate) fn learn_prints(&self) {
        let mut prints = self.prints.lock().unwrap_or_else(PoisonError::into_inner);
        let present = |i: usize| self.present[i].load(Ordering::Acquire);
        prints.update(self.present.len(), present, |page, content| {
            !self.is_zero(u64::from(page)) && self.read_page(u64::from(page), content).is_ok()
        });
    }

    /// A page with this content, of those that are known.
    pub(crate) fn find_equal(&self, print: u64, content: &[u8]) -> Option<u32> {
        let page = self.prints.lock().unwrap_or_else(PoisonError::into_inner).get(print)?;
        let mut known = ZERO_PAGE;
        (self.read_page(u64::from(page), &mut known).is_ok() && known == content).then_some(page)
    }

    /// The map and layers, or nothing for an image that is not made of layers.
    pub(crate) fn map(&self) -> Option<&ExtentMap> {
        match &self.source {
            Source::Layers { map, .. } => Some(map),
            Source::Raw { .. } => None,
        }
    }

    pub(crate) fn layers(&self) -> &[Arc<Layer>] {
        match &self.source {
            Source::Layers { layers, .. } => layers,
            Source::Raw { .. } => &[],
        }
    }
}

/// Reads pages of a file; what lies behind its end is zero.
fn read_padded(path: &Path, file: &File, first: u64, out: &mut [u8]) -> Result<(), ImageError> {
    let mut filled = 0;
    while filled < out.len() {
        match file.read_at(&mut out[filled..], first * PAGE_SIZE as u64 + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(ImageError::Read { path: path.to_owned(), source }),
        }
    }
    out[filled..].fill(0);
    Ok(())
}

fn checked_pages(pages: u64) -> Result<u32, ImageError> {
    u32::try_from(pages).ok().filter(|_| pages <= MAX_PAGES).ok_or(ImageError::OutOfRange {
        first: 0,
        count: pages,
        pages: MAX_PAGES,
    })
}

/// A close-on-exec memory file whose size cannot change, so that no mapping of it can fault.
fn memory_file(len: u64) -> io::Result<File> {
    let fd = memfd_create("amberbox-image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, len)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(fd))
}
