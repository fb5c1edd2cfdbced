//! Turns dirty pages into frames on all cores, in an order that keeps consecutive pages together.
//!
//! Workers take chunks of the dirty list, read and classify pages (zero, equal to the parent, own) and compress the own
//! ones; the calling thread writes the results in order. Workers stay within a window ahead of the writer, so memory is
//! bounded even when one page source is slow.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::codec::Encoder;
use crate::error::StoreError;
use crate::extent::{Extent, ZERO_LAYER};
use crate::format::{FRAME_BYTES, FRAME_PAGES, Hash, PAGE_SIZE, Page, ZERO_PAGE, hash};
use crate::image::Image;
use crate::known::{Known, Stored, print};
use crate::layer::{EncodedFrame, LayerWriter};

/// Dirty pages per chunk: at most 1 MiB of content in a worker's hands.
const CHUNK: usize = 256;
/// How much nicer than their process the threads that compress are.
const NICE: i32 = 10;
/// Chunks that may be under way per worker.
const WINDOW_PER_WORKER: usize = 4;

/// Where the content of dirty pages comes from while a snapshot is taken.
///
/// Each dirty page is read exactly once, from any thread, roughly in ascending order: a source that copies
/// behind a running guest may release a page as soon as it was read.
pub trait PageSource: Sync {
    /// Copies one page.
    fn read(&self, page: u64, out: &mut Page) -> io::Result<()>;

    /// Copies consecutive pages; `out` is a whole number of pages.
    fn read_run(&self, first: u64, out: &mut [u8]) -> io::Result<()> {
        let (pages, _) = out.as_chunks_mut::<PAGE_SIZE>();
        pages.iter_mut().zip(first..).try_for_each(|(out, page)| self.read(page, out))
    }
}

/// What became of the dirty pages of one image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CaptureStats {
    /// Pages that were given.
    pub dirty: u64,
    /// Of these, pages of zeros.
    pub zero: u64,
    /// Of these, pages equal to the parent's.
    pub same: u64,
    /// Of these, pages whose content is stored elsewhere: in another image, or for another page.
    pub shared: u64,
    /// Of these, pages that were stored.
    pub own: u64,
}

pub(crate) struct Capture<'a> {
    pub(crate) parent: Option<&'a Image>,
    /// Ascending, without repetition.
    pub(crate) dirty: &'a [u32],
    pub(crate) source: &'a dyn PageSource,
    pub(crate) level: i32,
    pub(crate) threads: usize,
    /// The number that the new layer has in the writer's table.
    pub(crate) own_layer: u16,
    /// Content that need not be stored again.
    pub(crate) known: &'a Known,
    /// Remember what is stored.
    pub(crate) remember: bool,
}

/// One chunk, ready to be written.
#[derive(Default)]
struct Chunk {
    /// Frames with the pages that they hold, in slot order.
    frames: Vec<(EncodedFrame, Vec<u32>)>,
    /// Prints and hashes of the pages in `frames`, in their order, if they are to be remembered.
    prints: Vec<(u64, Hash)>,
    zero: Vec<u32>,
    shared: Vec<Extent>,
    same: u64,
}

struct Progress {
    next: usize,
    written: usize,
    done: BTreeMap<usize, Result<Chunk, StoreError>>,
    stop: bool,
}

struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Progress>) -> MutexGuard<'a, Progress> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }
}

/// Ends the whole capture when a worker unwinds: a panicking page source must not leave the others waiting.
struct StopOnPanic<'a>(&'a Shared);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

impl Capture<'_> {
    /// Writes the own pages to `sink`; returns how the dirty pages change the parent's map, and what was stored if that
    /// is to be remembered.
    pub(crate) fn run(
        &self,
        sink: &mut LayerWriter,
    ) -> Result<(Vec<Extent>, CaptureStats, Stored), StoreError> {
        let chunks: Vec<&[u32]> = self.dirty.chunks(CHUNK).collect();
        let mut out = Output {
            sink,
            own_layer: self.own_layer,
            changes: Vec::new(),
            stats: CaptureStats::default(),
            stored: Stored::default(),
        };
        let workers = self.threads.min(chunks.len());
        if chunks.len() == 1 {
            let mut worker = Worker::new(self)?;
            chunks.iter().try_for_each(|chunk| out.take(worker.chunk(chunk)?))?;
        } else if workers > 0 {
            self.run_parallel(&chunks, workers, &mut out)?;
        }
        out.stats.dirty = self.dirty.len() as u64;
        Ok((out.changes, out.stats, out.stored))
    }

    fn run_parallel(
        &self,
        chunks: &[&[u32]],
        workers: usize,
        out: &mut Output<'_>,
    ) -> Result<(), StoreError> {
        let progress = Progress { next: 0, written: 0, done: BTreeMap::new(), stop: false };
        let shared = Shared { progress: Mutex::new(progress), changed: Condvar::new() };
        let window = workers * WINDOW_PER_WORKER;
        std::thread::scope(|scope| {
            let work = || {
                step_back();
                let _stop_on_panic = StopOnPanic(&shared);
                let mut worker = Worker::new(self);
                loop {
                    let mut guard = shared.lock();
                    while !guard.stop && guard.next < chunks.len() && guard.next >= guard.written + window {
                        guard = shared.wait(guard);
                    }
                    let number = guard.next;
                    if guard.stop || number >= chunks.len() {
                        return;
                    }
                    guard.next += 1;
                    drop(guard);
                    let result = match &mut worker {
                        Ok(worker) => worker.chunk(chunks[number]),
                        Err(_) => Worker::new(self).and_then(|mut w| w.chunk(chunks[number])),
                    };
                    shared.lock().done.insert(number, result);
                    shared.changed.notify_all();
                }
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            let result = (0..chunks.len()).try_for_each(|number| {
                let mut guard = shared.lock();
                let chunk = loop {
                    if let Some(chunk) = guard.done.remove(&number) {
                        break chunk;
                    }
                    if guard.stop {
                        break Err(source_panicked(chunks[number]));
                    }
                    guard = shared.wait(guard);
                };
                drop(guard);
                out.take(chunk?)?;
                shared.lock().written = number + 1;
                shared.changed.notify_all();
                Ok(())
            });
            shared.stop();
            // Joining here, not at the end of the scope, turns a worker's panic into an error.
            let panicked = threads.into_iter().filter_map(|t| t.join().err()).count() > 0;
            if panicked && result.is_ok() { Err(source_panicked(self.dirty)) } else { result }
        })
    }
}

fn source_panicked(pages: &[u32]) -> StoreError {
    let page = pages.first().copied().unwrap_or(0);
    StoreError::Source { page: u64::from(page), source: io::Error::other("the source of pages panicked") }
}

struct Output<'a> {
    sink: &'a mut LayerWriter,
    own_layer: u16,
    changes: Vec<Extent>,
    stats: CaptureStats,
    stored: Stored,
}

impl Output<'_> {
    fn take(&mut self, chunk: Chunk) -> Result<(), StoreError> {
        let from = self.changes.len();
        let changed = |start, layer, slot| Extent { start, count: 1, layer, slot };
        let mut prints = chunk.prints.iter();
        for (frame, pages) in &chunk.frames {
            let slot = self.sink.next_slot();
            self.sink.push(frame)?;
            for (slot, (print, hash)) in (slot..).zip(prints.by_ref().take(pages.len())) {
                self.stored.insert(*print, *hash, slot);
            }
            self.changes
                .extend(pages.iter().zip(slot..).map(|(page, slot)| changed(*page, self.own_layer, slot)));
            self.stats.own += pages.len() as u64;
        }
        self.changes.extend(chunk.zero.iter().map(|page| changed(*page, ZERO_LAYER, 0)));
        self.stats.zero += chunk.zero.len() as u64;
        self.stats.shared += chunk.shared.len() as u64;
        self.changes.extend(chunk.shared);
        self.stats.same += chunk.same;
        self.changes[from..].sort_unstable_by_key(|e| e.start);
        Ok(())
    }
}

struct Worker<'a> {
    capture: &'a Capture<'a>,
    encoder: Encoder,
    /// Pages as they were read.
    incoming: Box<[u8]>,
    /// Own pages of the frame that is being filled.
    own: Vec<u8>,
    own_pages: Vec<u32>,
}

impl<'a> Worker<'a> {
    fn new(capture: &'a Capture<'a>) -> Result<Worker<'a>, StoreError> {
        let encoder = Encoder::new(capture.level);
        Ok(Worker {
            capture,
            encoder: encoder.map_err(|_| StoreError::InvalidInput { reason: "unknown compression level" })?,
            incoming: vec![0; FRAME_BYTES].into_boxed_slice(),
            own: Vec::with_capacity(FRAME_BYTES),
            own_pages: Vec::with_capacity(FRAME_PAGES),
        })
    }

    fn chunk(&mut self, mut dirty: &[u32]) -> Result<Chunk, StoreError> {
        let mut out = Chunk::default();
        while let Some(&first) = dirty.first() {
            let run =
                dirty.iter().zip(first..).take(FRAME_PAGES).take_while(|(page, want)| *page == want).count();
            dirty = &dirty[run..];
            let source = self.capture.source;
            let pages = &mut self.incoming[..run * PAGE_SIZE];
            let read = source.read_run(u64::from(first), pages);
            read.map_err(|source| StoreError::Source { page: u64::from(first), source })?;
            for i in 0..run {
                self.page(first + i as u32, i, &mut out);
            }
        }
        self.flush(&mut out);
        Ok(out)
    }

    fn page(&mut self, page: u32, at: usize, out: &mut Chunk) {
        let content = &self.incoming[at * PAGE_SIZE..(at + 1) * PAGE_SIZE];
        if content == ZERO_PAGE {
            out.zero.push(page);
        } else if same_as_parent(self.capture.parent, page, content) {
            out.same += 1;
        } else if let Some(known) = self.capture.known.find(page, content) {
            out.shared.push(known);
        } else {
            if self.capture.remember {
                out.prints.push((print(content), hash(content)));
            }
            self.own.extend_from_slice(content);
            self.own_pages.push(page);
            if self.own_pages.len() == FRAME_PAGES {
                self.flush(out);
            }
        }
    }

    fn flush(&mut self, out: &mut Chunk) {
        if self.own_pages.is_empty() {
            return;
        }
        let mut stored = Vec::new();
        let codec = self.encoder.encode(&self.own, &mut stored);
        stored.shrink_to_fit();
        // At most FRAME_PAGES.
        let pages = self.own_pages.len() as u8;
        out.frames.push((EncodedFrame { hash: hash(&stored), stored, pages, codec }, self.own_pages.clone()));
        self.own.clear();
        self.own_pages.clear();
    }
}

/// Makes this thread give way to others, the guest's CPU among them: a snapshot is not in a hurry. Its own threads only; a
/// thread's niceness is its own on Linux. Without effect where that is not permitted.
fn step_back() {
    let _ = rustix::process::nice(NICE);
}

/// Compares with the parent only when its page is decoded already, as it is for nearly every page that a guest wrote
/// to after reading. Decoding a frame to find out would cost about as much as compressing the page, and would
/// keep memory that nobody asked for.
fn same_as_parent(parent: Option<&Image>, page: u32, content: &[u8]) -> bool {
    let page = u64::from(page);
    let Some(parent) = parent.filter(|p| p.is_present(page) && !p.is_zero(page)) else { return false };
    let mut old = ZERO_PAGE;
    parent.read_page(page, &mut old).is_ok() && old == content
}
