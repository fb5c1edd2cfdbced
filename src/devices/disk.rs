//! The block device's backing: a private copy-on-write overlay over a sealed, read-only base.
//!
//! The overlay owns 4 KiB blocks. A block that was written lives in an unlinked sparse file (or a memfd) at its
//! own offset; a block that was discarded or overwritten with zeros is only a bit. Everything else is
//! read from the base, which many machines may share. So a machine's disk costs what it wrote, and the owned
//! blocks are what a snapshot has to store.
//!
//! [`Overlay::freeze`] captures the blocks that changed since the last snapshot in the time of a bitmap copy. While
//! the resulting [`FrozenDisk`] lives, a write to a captured block first copies the old content aside, so a
//! snapshot can be written out behind the running guest. Once it is written, [`FrozenDisk::commit`] makes it what the
//! next capture is compared with: the overlay goes on owning the blocks, but they count as clean.

mod sealed;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

/// Size of the unit of ownership, and of a page of a disk image.
pub const BLOCK_SIZE: usize = 4096;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// What a block device does to its disk. Ranges are within `len()`; offsets and lengths are multiples of 512.
pub trait Disk: Send {
    /// Size in bytes; a multiple of 512.
    fn len(&self) -> u64;
    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes `buf` at `offset`.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Makes writes durable, as far as this disk's life goes.
    fn flush(&self) -> io::Result<()>;
    /// Makes a range read as zeros and gives its storage back.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Content that the disk once had cannot be read any more. The machine is about to end for it: an I/O error would
    /// only make the guest report something else.
    fn lost(&self) -> bool {
        false
    }
}

/// A read-only image under an overlay.
pub trait Base: Send + Sync {
    /// Size in bytes.
    fn len(&self) -> u64;
    /// Whether the image has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `buf` from `offset`; the range is within `len()`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Whether a block is known to be zeros, without reading it.
    fn is_zero(&self, _block: u64) -> bool {
        false
    }
}

/// A plain file as the base: the file system image a machine first boots from.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    len: u64,
}

impl RawImage {
    /// Opens `path` for reading.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok(RawImage { file, len })
    }
}

impl Base for RawImage {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// Where an overlay keeps written blocks.
#[derive(Debug, Clone, Copy)]
pub enum Storage<'a> {
    /// In an unlinked file in this directory; gone when the process is, whatever ends it.
    Directory(&'a Path),
    /// In anonymous memory.
    Memory,
}

impl Storage<'_> {
    fn create(self, len: u64) -> io::Result<File> {
        let file = match self {
            Storage::Directory(dir) => tempfile::tempfile_in(dir)?,
            Storage::Memory => File::from(memfd_create("amberbox-disk", MemfdFlags::CLOEXEC)?),
        };
        file.set_len(len)?;
        Ok(file)
    }
}

/// A run of consecutive blocks that differ from the last snapshot (from the base, without one).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyRun {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
    /// All of it reads as zeros.
    pub zero: bool,
}

/// One bit per block. Allocated zeroed, so the parts never touched cost no memory.
#[derive(Clone)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(blocks: u64) -> Self {
        Bits(vec![0; blocks.div_ceil(64) as usize])
    }

    fn get(&self, block: u64) -> bool {
        self.0[(block / 64) as usize] & 1 << (block % 64) != 0
    }

    fn set(&mut self, block: u64) {
        self.0[(block / 64) as usize] |= 1 << (block % 64);
    }

    fn clear(&mut self, block: u64) {
        self.0[(block / 64) as usize] &= !(1 << (block % 64));
    }

    /// Sets what is set in `other`.
    fn add(&mut self, other: &Bits) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word |= other);
    }

    /// The first set bit at or after `from`.
    fn next_set(&self, from: u64) -> Option<u64> {
        let mut word = (from / 64) as usize;
        let mut bits = self.0.get(word)? & u64::MAX << (from % 64);
        while bits == 0 {
            word += 1;
            bits = *self.0.get(word)?;
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }
}

/// Which blocks the overlay owns, and which of these are zeros without storage.
#[derive(Clone)]
struct Ownership {
    owned: Bits,
    zero: Bits,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Base,
    Zero,
    Overlay,
}

impl Ownership {
    fn new(blocks: u64) -> Self {
        Ownership { owned: Bits::new(blocks), zero: Bits::new(blocks) }
    }

    fn source(&self, block: u64) -> Source {
        match (self.owned.get(block), self.zero.get(block)) {
            (false, _) => Source::Base,
            (true, true) => Source::Zero,
            (true, false) => Source::Overlay,
        }
    }

    /// The blocks in `changed`, in runs. One of these that is the base's has become zeros again.
    fn runs<'a>(&'a self, changed: &'a Bits, blocks: u64) -> impl Iterator<Item = DirtyRun> + 'a {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = changed.next_set(at).filter(|&b| b < blocks)?;
            let zero = |block| self.source(block) != Source::Overlay;
            let mut end = first + 1;
            while end < blocks && changed.get(end) && zero(end) == zero(first) {
                end += 1;
            }
            at = end;
            Some(DirtyRun { first, count: end - first, zero: zero(first) })
        })
    }
}

/// What a running freeze keeps of the past.
struct Frozen {
    then: Ownership,
    /// What it captures.
    captured: Bits,
    /// Captured blocks that were overwritten since; their old content is in `aside`.
    preserved: Bits,
    aside: File,
}

/// Where a capture will keep what the guest overwrites meanwhile. Made before the machine is stopped.
#[derive(Debug)]
pub struct Aside(File);

struct State {
    now: Ownership,
    /// Blocks that may differ from the last snapshot; from the base, before the first.
    changed: Bits,
    /// Blocks of which some snapshot holds something else than the base.
    sealed: Bits,
    file: File,
    frozen: Option<Frozen>,
    /// The first error of the host's storage or of the base image.
    fault: Option<String>,
}

struct Shared {
    base: Option<Arc<dyn Base>>,
    len: u64,
    blocks: u64,
    state: Mutex<State>,
    /// Why the base cannot be read, once that has happened.
    loss: OnceLock<String>,
    loss_listener: OnceLock<LossListener>,
}

/// Called once, when the base turns out to be unreadable, with the reason. Takes no lock.
pub type LossListener = Box<dyn Fn(&str) + Send + Sync>;

/// A writable disk: an overlay over an optional base. Clones are the same disk.
#[derive(Clone)]
pub struct Overlay(Arc<Shared>);

impl Overlay {
    /// A disk of `len` bytes that starts with the content of `base`, and zeros beyond it.
    pub fn new(base: Option<Arc<dyn Base>>, len: u64, storage: Storage<'_>) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(512) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "Disk size must be a positive multiple of 512",
            ));
        }
        let blocks = len.div_ceil(BLOCK);
        let state = State {
            now: Ownership::new(blocks),
            changed: Bits::new(blocks),
            sealed: Bits::new(blocks),
            file: storage.create(blocks * BLOCK)?,
            frozen: None,
            fault: None,
        };
        let (loss, loss_listener) = (OnceLock::new(), OnceLock::new());
        Ok(Overlay(Arc::new(Shared { base, len, blocks, state: Mutex::new(state), loss, loss_listener })))
    }

    /// The blocks that may differ from the last snapshot (from the base, without one) at this moment.
    pub fn dirty(&self) -> Vec<DirtyRun> {
        let state = self.0.lock();
        state.now.runs(&state.changed, self.0.blocks).collect()
    }

    /// Sets who is told when the base cannot be read any more. Only the first call counts.
    pub fn set_loss_listener(&self, listener: LossListener) {
        let _ = self.0.loss_listener.set(listener);
    }

    /// The first failure of the host's storage or of the base image.
    pub fn fault(&self) -> Option<String> {
        self.0.lock().fault.clone()
    }

    /// Makes room for a capture of this disk.
    ///
    /// # Errors
    /// The storage cannot be created.
    pub fn aside(&self, storage: Storage<'_>) -> io::Result<Aside> {
        storage.create(self.0.blocks * BLOCK).map(Aside)
    }

    /// Captures the changed blocks as they are now. `aside` takes what the guest overwrites while the capture
    /// lives. One capture at a time.
    ///
    /// # Errors
    /// There is another one.
    pub fn freeze(&self, aside: Aside) -> io::Result<FrozenDisk> {
        let mut state = self.0.lock();
        if state.frozen.is_some() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "Disk is being captured already"));
        }
        let clean = Bits::new(self.0.blocks);
        state.frozen = Some(Frozen {
            then: state.now.clone(),
            captured: std::mem::replace(&mut state.changed, clean),
            preserved: Bits::new(self.0.blocks),
            aside: aside.0,
        });
        Ok(FrozenDisk(Arc::clone(&self.0)))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "Disk access beyond its end")),
        }
    }

    fn noting<T>(&self, state: &mut State, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && state.fault.is_none()
        {
            tracing::warn!(%error, "Disk storage failed");
            state.fault = Some(with_causes(error));
        }
        result
    }

    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some(base) = &self.base else {
            buf.fill(0);
            return Ok(());
        };
        let inside = base.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(inside);
        tail.fill(0);
        if head.is_empty() {
            return Ok(());
        }
        base.read_at(offset, head).inspect_err(|error| {
            let reason = with_causes(error);
            if self.loss.set(format!("The disk image cannot be read: {reason}")).is_ok()
                && let (Some(listener), Some(reason)) = (self.loss_listener.get(), self.loss.get())
            {
                listener(reason);
            }
        })
    }

    /// Reads a range, one call per run of blocks with the same source.
    fn read(&self, state: &State, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let source = state.now.source(offset / BLOCK);
            let mut end = (offset / BLOCK + 1) * BLOCK;
            while end < offset + buf.len() as u64 && state.now.source(end / BLOCK) == source {
                end += BLOCK;
            }
            let (run, rest) = buf.split_at_mut(((end - offset) as usize).min(buf.len()));
            match source {
                Source::Base => self.read_base(offset, run)?,
                Source::Zero => run.fill(0),
                Source::Overlay => state.file.read_exact_at(run, offset)?,
            }
            offset = end;
            buf = rest;
        }
        Ok(())
    }

    fn write(&self, state: &mut State, mut offset: u64, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let within = (offset % BLOCK) as usize;
            let whole = if within == 0 { buf.len() / BLOCK_SIZE * BLOCK_SIZE } else { 0 };
            let done = if whole > 0 {
                self.write_blocks(state, offset / BLOCK, &buf[..whole])?;
                whole
            } else {
                let piece = buf.len().min(BLOCK_SIZE - within);
                let mut block = [0; BLOCK_SIZE];
                self.read(state, offset - within as u64, &mut block)?;
                block[within..within + piece].copy_from_slice(&buf[..piece]);
                self.write_blocks(state, offset / BLOCK, &block)?;
                piece
            };
            offset += done as u64;
            buf = &buf[done..];
        }
        Ok(())
    }

    /// Writes whole blocks. Blocks of zeros are noted and not stored.
    fn write_blocks(&self, state: &mut State, first: u64, data: &[u8]) -> io::Result<()> {
        let count = (data.len() / BLOCK_SIZE) as u64;
        let is_zero = |index: u64| {
            let start = index as usize * BLOCK_SIZE;
            is_zero(&data[start..start + BLOCK_SIZE])
        };
        let mut index = 0;
        while index < count {
            let zero = is_zero(index);
            let mut end = index + 1;
            while end < count && is_zero(end) == zero {
                end += 1;
            }
            if zero {
                self.zero_blocks(state, first + index, end - index)?;
            } else {
                let bytes = &data[index as usize * BLOCK_SIZE..end as usize * BLOCK_SIZE];
                for block in first + index..first + end {
                    state.preserve(block)?;
                }
                state.file.write_all_at(bytes, (first + index) * BLOCK)?;
                // Only now, so that a failed write leaves the old content in place.
                (first + index..first + end).for_each(|block| state.set_data(block));
            }
            index = end;
        }
        Ok(())
    }

    fn zero_blocks(&self, state: &mut State, first: u64, count: u64) -> io::Result<()> {
        let mut stored = false;
        for block in first..first + count {
            let (source, base_is_zero) = (state.now.source(block), self.base_is_zero(block));
            if source == Source::Zero || source == Source::Base && base_is_zero {
                continue;
            }
            state.preserve(block)?;
            stored |= source == Source::Overlay;
            if base_is_zero {
                state.set_base(block);
            } else {
                state.set_zero(block);
            }
        }
        if stored {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Giving storage back is a courtesy: file systems that cannot punch holes merely keep it.
            let _ = fallocate(&state.file, flags, first * BLOCK, count * BLOCK);
        }
        Ok(())
    }

    fn base_is_zero(&self, block: u64) -> bool {
        self.base.as_ref().is_none_or(|base| block * BLOCK >= base.len() || base.is_zero(block))
    }

    fn zero(&self, state: &mut State, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let first = offset.div_ceil(BLOCK);
        // The disk's last block may be shorter than a block.
        let last = if end == self.len { self.blocks } else { end / BLOCK };
        if first >= last {
            return self.write(state, offset, &[0; 2 * BLOCK_SIZE][..len as usize]);
        }
        let head = first * BLOCK - offset;
        self.write(state, offset, &[0; BLOCK_SIZE][..head as usize])?;
        self.zero_blocks(state, first, last - first)?;
        let tail = end.saturating_sub(last * BLOCK);
        self.write(state, last * BLOCK, &[0; BLOCK_SIZE][..tail as usize])
    }
}

impl State {
    fn set_data(&mut self, block: u64) {
        self.now.owned.set(block);
        self.now.zero.clear(block);
        self.changed.set(block);
    }

    fn set_zero(&mut self, block: u64) {
        self.now.owned.set(block);
        self.now.zero.set(block);
        self.changed.set(block);
    }

    fn set_base(&mut self, block: u64) {
        self.now.owned.clear(block);
        self.now.zero.clear(block);
        // A snapshot, or one in the making, has other content.
        if self.sealed.get(block) || self.frozen.as_ref().is_some_and(|frozen| frozen.captured.get(block)) {
            self.changed.set(block);
        } else {
            self.changed.clear(block);
        }
    }

    /// Copies a captured block aside before it changes.
    fn preserve(&mut self, block: u64) -> io::Result<()> {
        let Some(frozen) = &mut self.frozen else { return Ok(()) };
        let captured = frozen.captured.get(block) && frozen.then.source(block) == Source::Overlay;
        if captured && !frozen.preserved.get(block) {
            let mut data = [0; BLOCK_SIZE];
            self.file.read_exact_at(&mut data, block * BLOCK)?;
            frozen.aside.write_all_at(&data, block * BLOCK)?;
            frozen.preserved.set(block);
        }
        Ok(())
    }
}

/// An error's message with those of its causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn is_zero(block: &[u8]) -> bool {
    // Blocks of the file system's data rarely start with 16 zero bytes; the rest is one vectorised pass.
    let (head, tail) = block.split_at(16.min(block.len()));
    head.iter().all(|&b| b == 0) && tail.chunks(256).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

impl Disk for Overlay {
    fn len(&self) -> u64 {
        self.0.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.check(offset, buf.len() as u64)?;
        let mut state = self.0.lock();
        let result = self.0.read(&state, offset, buf);
        self.0.noting(&mut state, result)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.0.check(offset, buf.len() as u64)?;
        let mut state = self.0.lock();
        let result = self.0.write(&mut state, offset, buf);
        self.0.noting(&mut state, result)
    }

    fn flush(&self) -> io::Result<()> {
        // The overlay dies with the process; what has to outlive it goes into a snapshot.
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.check(offset, len)?;
        let mut state = self.0.lock();
        let result = self.0.zero(&mut state, offset, len);
        self.0.noting(&mut state, result)
    }

    fn lost(&self) -> bool {
        self.0.loss.get().is_some()
    }
}

/// The changed blocks of an [`Overlay`] as they were when it was frozen. Dropping it ends the capture, and the blocks
/// count as changed again.
pub struct FrozenDisk(Arc<Shared>);

impl FrozenDisk {
    /// Number of blocks of the whole disk.
    pub fn blocks(&self) -> u64 {
        self.0.blocks
    }

    /// The numbers of the captured blocks, ascending.
    pub fn dirty_blocks(&self) -> impl Iterator<Item = u64> + use<> {
        self.dirty().into_iter().flat_map(|run| run.first..run.first + run.count)
    }

    /// The captured blocks, ascending.
    pub fn dirty(&self) -> Vec<DirtyRun> {
        let state = self.0.lock();
        let frozen = state.frozen.iter();
        frozen.flat_map(|frozen| frozen.then.runs(&frozen.captured, self.0.blocks)).collect()
    }

    /// Reads one captured block, or one that the overlay did not own.
    ///
    /// # Errors
    /// The block is neither, or storage or base cannot be read.
    pub fn read_block(&self, block: u64, buf: &mut [u8; BLOCK_SIZE]) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::InvalidInput, "No such block in the capture");
        if block >= self.0.blocks {
            return Err(missing());
        }
        let state = self.0.lock();
        let frozen = state.frozen.as_ref().ok_or_else(missing)?;
        match frozen.then.source(block) {
            Source::Base => {
                drop(state);
                self.0.read_base(block * BLOCK, buf)
            }
            Source::Zero => {
                buf.fill(0);
                Ok(())
            }
            Source::Overlay if !frozen.captured.get(block) => Err(missing()),
            Source::Overlay if frozen.preserved.get(block) => frozen.aside.read_exact_at(buf, block * BLOCK),
            Source::Overlay => state.file.read_exact_at(buf, block * BLOCK),
        }
    }

    /// Ends the capture: what it captured is in a snapshot, with which the next capture is compared.
    pub fn commit(self) {
        let mut state = self.0.lock();
        if let Some(frozen) = state.frozen.take() {
            state.sealed.add(&frozen.captured);
        }
    }
}

impl Drop for FrozenDisk {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        // Still there: it was not committed.
        if let Some(frozen) = state.frozen.take() {
            state.changed.add(&frozen.captured);
        }
    }
}

#[cfg(test)]
mod tests;
