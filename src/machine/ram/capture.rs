//! What a snapshot needs of RAM, kept while the guest runs on.
//!
//! There are two ways, and the backend decides ([`LiveCapture`](crate::machine::vcpu::LiveCapture)):
//!
//! - *Copy on write.* While the machine stands, its dirty pages get the flag CAPTURE instead of DIRTY, which takes the
//!   time of a pass over the flags. Behind the running guest the snapshot reads them one after the other; a page that
//!   is written before its turn is set aside first ([`preserve`](amber_x86::GuestRam::preserve)). The guest pays one copy for each such page.
//! - *Pre-copy*, where writes cannot be intercepted. The dirty pages are copied while the guest runs, those that it wrote
//!   meanwhile once more, and the few of the last round while it stands ([`PreCopy`]).
//!
//! Either way the captured pages are clean from then on. A capture that is dropped before it is committed makes them dirty
//! again, so a snapshot that fails loses nothing.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use amber_x86::PageFlags;

use super::Ram;
use crate::machine::platform::PAGE_SIZE;

/// A page's content.
type Content = [u8; PAGE_SIZE as usize];

/// Content of captured pages that is not in RAM any more.
pub(super) type Aside = HashMap<u64, Box<Content>>;

impl Ram {
    fn aside(&self) -> MutexGuard<'_, Aside> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn content(&self, page: u64) -> Box<Content> {
        let mut content = Box::new([0; PAGE_SIZE as usize]);
        self.copy_page(page, &mut content);
        content
    }

    /// Keeps the content of a page that a capture has not read yet. The page may be written afterwards.
    pub(super) fn set_aside(&self, page: u64) {
        let Some(flag) = self.flags.get(page as usize) else { return };
        let mut aside = self.aside();
        // Under the lock, because the capture may just be reading the page, or ending.
        if flag.load(Ordering::Acquire) & PageFlags::CAPTURE != 0 {
            aside.insert(page, self.content(page));
            flag.fetch_and(!PageFlags::CAPTURE, Ordering::Release);
        }
    }

    /// The pages that differ from the image that RAM was restored from (from zeros, without one), ascending, and
    /// resets that knowledge. Nobody may write meanwhile, and the CPU must forget which pages it may write before it
    /// runs again.
    pub(super) fn take_dirty(&self, mark: u8) -> Vec<u64> {
        self.resealed.store(true, Ordering::Release);
        let mut dirty = Vec::new();
        for (page, flag) in self.flags.iter().enumerate() {
            // Most are clean: look before touching the cache line.
            let flags = flag.load(Ordering::Relaxed);
            if flags & PageFlags::DIRTY != 0 {
                flag.store(flags & !PageFlags::DIRTY | mark, Ordering::Release);
                dirty.push(page as u64);
            }
        }
        dirty
    }

    fn mark_again(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            if let Some(flag) = self.flags.get(page as usize) {
                flag.fetch_or(PageFlags::DIRTY, Ordering::AcqRel);
            }
        }
    }
}

/// Copies of dirty pages, made while the guest may still be writing to them. Dropped, it makes them dirty again.
#[derive(Debug)]
pub struct PreCopy {
    ram: Arc<Ram>,
    copies: Aside,
}

impl PreCopy {
    /// Nothing is copied yet.
    pub fn new(ram: &Arc<Ram>) -> PreCopy {
        PreCopy { ram: Arc::clone(ram), copies: Aside::new() }
    }

    /// What is dirty at this moment and counts as clean from now on. The machine stands still, and its CPU has to forget
    /// what it may write.
    pub fn begin_round(&self) -> Vec<u64> {
        self.ram.take_dirty(0)
    }

    /// Copies the pages of a round; the guest may be running, for what it writes meanwhile is dirty in the next round.
    pub fn copy(&mut self, pages: &[u64]) {
        self.copies.extend(pages.iter().map(|page| (*page, self.ram.content(*page))));
    }
}

impl Drop for PreCopy {
    fn drop(&mut self) {
        self.ram.mark_again(self.copies.keys().copied());
    }
}

/// The dirty pages of RAM as they were at one moment. Each can be read once. Dropping it makes them dirty again.
#[derive(Debug)]
pub struct MemoryCapture {
    ram: Arc<Ram>,
    /// Ascending.
    pages: Vec<u64>,
}

impl MemoryCapture {
    /// Captures the dirty pages behind the running guest. The machine stands still, and the CPU has to forget what
    /// it may write; it asks before the first write to each page. One capture at a time.
    pub fn on_write(ram: &Arc<Ram>) -> MemoryCapture {
        MemoryCapture { pages: ram.take_dirty(PageFlags::CAPTURE), ram: Arc::clone(ram) }
    }

    /// Captures the dirty pages by copying those that `copies` does not hold as they are. The machine stands still, and the
    /// CPU has to forget what it may write. One capture at a time.
    pub fn copied(mut copies: PreCopy) -> MemoryCapture {
        let last = copies.begin_round();
        copies.copy(&last);
        let ram = Arc::clone(&copies.ram);
        let content = std::mem::take(&mut copies.copies);
        let mut pages: Vec<u64> = content.keys().copied().collect();
        pages.sort_unstable();
        *ram.aside() = content;
        MemoryCapture { ram, pages }
    }

    /// The captured pages, ascending.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// Takes the content of a captured page.
    ///
    /// # Errors
    /// It was not captured, or it has been read before.
    pub fn read(&self, page: u64, out: &mut Content) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "The page is not in the capture");
        let mut aside = self.ram.aside();
        if let Some(content) = aside.remove(&page) {
            drop(aside);
            out.copy_from_slice(&content[..]);
            return Ok(());
        }
        let flag = self.ram.flags.get(page as usize).ok_or_else(missing)?;
        if flag.load(Ordering::Acquire) & PageFlags::CAPTURE == 0 {
            return Err(missing());
        }
        // The lock keeps writers waiting, for as long as copying a page takes.
        self.ram.copy_page(page, out);
        flag.fetch_and(!PageFlags::CAPTURE, Ordering::Release);
        Ok(())
    }

    /// Ends the capture: the image made of it is what RAM is compared with from now on.
    pub fn commit(mut self) {
        self.end();
        self.pages.clear();
    }

    fn end(&self) {
        for page in &self.pages {
            self.ram.flags[*page as usize].fetch_and(!PageFlags::CAPTURE, Ordering::AcqRel);
        }
        // Afterwards, so that nobody sets anything aside any more.
        *self.ram.aside() = Aside::new();
    }
}

impl Drop for MemoryCapture {
    fn drop(&mut self) {
        self.end();
        self.ram.mark_again(self.pages.iter().copied());
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use amber_x86::GuestRam;

    use super::*;
    use crate::machine::platform::MemoryMap;

    fn ram() -> Arc<Ram> {
        Arc::new(Ram::new(MemoryMap::with_pages(64)).unwrap())
    }

    /// Writes as a device does: after asking, and telling afterwards.
    fn fill(ram: &Ram, page: u64, byte: u8) {
        ram.ready(page, page).unwrap();
        // SAFETY: the page is within the mapping and only this test uses it.
        unsafe { ptr::write_bytes(ram.host().add((page * PAGE_SIZE) as usize), byte, PAGE_SIZE as usize) };
        ram.device_wrote(page);
    }

    fn read(capture: &MemoryCapture, page: u64) -> io::Result<u8> {
        let mut out = [0xee; PAGE_SIZE as usize];
        capture.read(page, &mut out)?;
        assert!(out.iter().all(|byte| *byte == out[0]));
        Ok(out[0])
    }

    #[test]
    fn a_capture_holds_still_while_the_guest_writes() {
        let ram = ram();
        (1..=4).for_each(|page| fill(&ram, page, page as u8));
        let capture = MemoryCapture::on_write(&ram);
        assert_eq!(capture.pages(), [1, 2, 3, 4]);
        assert_eq!(ram.counts(), (0, 0));
        assert_eq!(read(&capture, 3).unwrap(), 3);
        for page in [1, 3, 9] {
            fill(&ram, page, 0xaa);
            fill(&ram, page, 0xbb);
        }
        assert_eq!(ram.aside().len(), 1, "page 3 was read before, page 9 is not captured");
        assert_eq!((read(&capture, 1).unwrap(), read(&capture, 2).unwrap()), (1, 2));
        assert!(read(&capture, 9).is_err() && read(&capture, 1).is_err() && read(&capture, 99).is_err());
        capture.commit();
        assert_eq!(ram.take_dirty(0), [1, 3, 9]);
    }

    #[test]
    fn a_capture_that_is_given_up_leaves_its_pages_dirty() {
        let ram = ram();
        (1..=4).for_each(|page| fill(&ram, page, 1));
        let capture = MemoryCapture::on_write(&ram);
        fill(&ram, 2, 2);
        fill(&ram, 7, 2);
        read(&capture, 1).unwrap();
        drop(capture);
        assert!(ram.aside().is_empty());
        assert!(ram.flags().iter().all(|flag| flag.load(Ordering::Relaxed) & PageFlags::CAPTURE == 0));
        assert_eq!(ram.take_dirty(0), [1, 2, 3, 4, 7]);
    }

    #[test]
    fn pre_copy_has_the_content_of_the_last_moment() {
        let ram = ram();
        (1..=4).for_each(|page| fill(&ram, page, 1));
        let mut copies = PreCopy::new(&ram);
        let round = copies.begin_round();
        assert_eq!(round, [1, 2, 3, 4]);
        copies.copy(&round);
        fill(&ram, 2, 2);
        fill(&ram, 9, 2);
        let capture = MemoryCapture::copied(copies);
        assert_eq!(capture.pages(), [1, 2, 3, 4, 9]);
        (1..=4).for_each(|page| fill(&ram, page, 3));
        let content: Vec<u8> = [1, 2, 3, 4, 9].map(|page| read(&capture, page).unwrap()).into();
        assert_eq!(content, [1, 2, 1, 1, 2]);
        drop(capture);
        assert_eq!(ram.take_dirty(0), [1, 2, 3, 4, 9]);
        let mut copies = PreCopy::new(&ram);
        copies.copy(&[5]);
        drop(copies);
        assert_eq!(ram.take_dirty(0), [5], "given up between the rounds");
    }

    #[test]
    fn readers_and_a_writer_never_meet_in_the_middle_of_a_page() {
        let ram = Arc::new(Ram::new(MemoryMap::with_pages(2048)).unwrap());
        for round in 1..20u8 {
            (0..2048).for_each(|page| fill(&ram, page, round));
            let capture = MemoryCapture::on_write(&ram);
            std::thread::scope(|scope| {
                scope.spawn(|| (0..2048).for_each(|page| fill(&ram, page, 0xff)));
                for half in 0..2 {
                    let capture = &capture;
                    scope.spawn(move || {
                        for page in (0..2048).filter(|page| page % 2 == half) {
                            assert_eq!(read(capture, page).unwrap(), round);
                        }
                    });
                }
            });
            assert!(ram.aside().is_empty());
            capture.commit();
        }
    }
}
