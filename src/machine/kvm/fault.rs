//! Bringing guest memory in as it is touched, with userfaultfd (Linux: Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! Restored RAM maps the image's memory file privately. Where the image has not decoded a page yet, the file has a hole, and
//! whoever touches it, be it KVM or one of our own threads, waits until this thread has decoded the page's frame
//! into the file. From then on the page is like any other: shared until it is written. While nobody waits, the thread decodes the
//! rest, and when all is there it ends. What one sandbox has decoded, no other of the process waits for.
//!
//! The host must let us see faults that its own kernel takes on our behalf: root may do that, others if
//! `vm.unprivileged_userfaultfd` is 1 or they may open `/dev/userfaultfd`.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use amber_x86::{GuestRam, PageFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::mm::{MprotectFlags, UserfaultfdFlags, mprotect, userfaultfd};

use crate::machine::platform::PAGE_SIZE;
use crate::machine::ram::Ram;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    done: i64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    more: u64,
}

const _: () =
    assert!(size_of::<Message>() == 32 && size_of::<Register>() == 32 && size_of::<ZeroPage>() == 32);

/// Requests, as `_IOWR(0xaa, ...)` and `_IOR(0xaa, ...)` make them.
const UFFDIO_API: libc::c_ulong = 3 << 30 | 24 << 16 | 0xaa << 8 | 0x3f;
const UFFDIO_REGISTER: libc::c_ulong = 3 << 30 | 32 << 16 | 0xaa << 8;
const UFFDIO_WAKE: libc::c_ulong = 2 << 30 | 16 << 16 | 0xaa << 8 | 2;
const UFFDIO_ZEROPAGE: libc::c_ulong = 3 << 30 | 32 << 16 | 0xaa << 8 | 4;
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`.
const UFFD_NEW: libc::c_ulong = 0xaa << 8;
const API_VERSION: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGE_FAULT: u8 = 0x12;

/// Fills the memory of one machine until it is dropped.
#[derive(Debug)]
pub(super) struct Filler {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// Why a page could not be had.
    failure: Arc<Mutex<Option<String>>>,
}

impl Filler {
    /// Fills `ram` as it is touched.
    ///
    /// # Errors
    /// The host does not permit it.
    pub(super) fn new(ram: &Arc<Ram>) -> io::Result<Filler> {
        let descriptor = open()?;
        for (first, count) in ram.mapped_runs() {
            let start = ram.host() as u64 + first * PAGE_SIZE;
            let range = Range { start, len: count * PAGE_SIZE };
            let mut register = Register { range, mode: MODE_MISSING, ioctls: 0 };
            // SAFETY: the structure is the one that this call reads and writes; the range lies within the mapping, whose
            // faults are answered from here on, or released when the descriptor is closed.
            unsafe { request(&descriptor, UFFDIO_REGISTER, &raw mut register) }?;
        }
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let failure = Arc::default();
        let worker = Worker {
            descriptor,
            stop: Arc::clone(&stop),
            data: ram.image_runs(),
            ram: Arc::clone(ram),
            failure: Arc::clone(&failure),
        };
        let thread = thread::Builder::new().name("amberbox-fill".into()).spawn(move || worker.serve())?;
        Ok(Filler { stop, thread: Some(thread), failure })
    }

    /// Why a page could not be had, if one could not: then whoever touches it gets an error.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // It fails only where the counter is about to overflow, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.stop, &[1, 0, 0, 0, 0, 0, 0, 0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A descriptor for faults of this process, those taken by the kernel included.
fn open() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: makes a descriptor; nothing is registered yet.
    let descriptor =
        unsafe { userfaultfd(flags) }.map_err(io::Error::from).or_else(|_| from_device(flags))?;
    let mut api = Api { api: API_VERSION, features: FEATURE_MISSING_SHMEM, ioctls: 0 };
    // SAFETY: the structure is the one that this call reads and writes.
    unsafe { request(&descriptor, UFFDIO_API, &raw mut api) }?;
    Ok(descriptor)
}

fn from_device(flags: UserfaultfdFlags) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the argument of this call is a number; it makes a new descriptor, which is ours.
    unsafe {
        let made = libc::ioctl(device.as_raw_fd(), UFFD_NEW, flags.bits() as libc::c_ulong);
        if made < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(made)) }
    }
}

/// # Safety
/// `argument` is what `code` takes.
unsafe fn request<T>(descriptor: &OwnedFd, code: libc::c_ulong, argument: *mut T) -> io::Result<()> {
    // SAFETY: as the caller says.
    let done = unsafe { libc::ioctl(descriptor.as_raw_fd(), code, argument) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

struct Worker {
    descriptor: OwnedFd,
    stop: Arc<OwnedFd>,
    ram: Arc<Ram>,
    /// Runs of pages that come from the image; what else is mapped is zeros.
    data: Vec<(u64, u64)>,
    failure: Arc<Mutex<Option<String>>>,
}

impl Worker {
    /// Answers faults, and brings in the rest meanwhile. At the end, closing the descriptor releases whoever still waits:
    /// everything is there, or the machine is no more.
    fn serve(&self) {
        let mut rest = self.data.iter().flat_map(|(first, count)| *first..first + count);
        loop {
            let mut polled =
                [PollFd::new(&*self.stop, PollFlags::IN), PollFd::new(&self.descriptor, PollFlags::IN)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            match poll(&mut polled, Some(&now)) {
                Ok(0) => {}
                Ok(_) if !polled[0].revents().is_empty() => return,
                Ok(_) => {
                    self.answer();
                    continue;
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            }
            let Some(next) = rest.find(|page| !self.is_present(*page)) else { return };
            // One that cannot be had is an error for whoever needs it; nobody may.
            if let Err(reason) = self.ram.fill(next) {
                self.give_up(next, reason);
            }
        }
    }

    fn is_present(&self, page: u64) -> bool {
        let flags = self.ram.flags().get(page as usize);
        flags.is_some_and(|flags| flags.load(Ordering::Acquire) & PageFlags::PRESENT != 0)
    }

    /// Whether a page comes from the image.
    fn is_data(&self, page: u64) -> bool {
        let at = self.data.partition_point(|(first, _)| *first <= page);
        at.checked_sub(1).and_then(|at| self.data.get(at)).is_some_and(|(first, count)| page - first < *count)
    }

    fn range(&self, page: u64) -> Range {
        Range { start: self.ram.host() as u64 + page * PAGE_SIZE, len: PAGE_SIZE }
    }

    /// Answers the faults that there are.
    fn answer(&self) {
        let mut message = [0u8; 32];
        while let Ok(32) = rustix::io::read(&self.descriptor, &mut message) {
            // SAFETY: 32 plain bytes of the kernel's are this structure, whose fields have no invalid values.
            let message: Message = unsafe { std::mem::transmute(message) };
            let offset = message.address.wrapping_sub(self.ram.host() as u64);
            if message.event == EVENT_PAGE_FAULT && offset / PAGE_SIZE < self.ram.pages() {
                self.provide(offset / PAGE_SIZE);
            }
        }
    }

    fn provide(&self, page: u64) {
        if !self.is_data(page) {
            let mut zero = ZeroPage { range: self.range(page), mode: 0, done: 0 };
            // SAFETY: the structure is the one that this call reads and writes; a page that is not there yet becomes
            // one of zeros, which it is in the image. If it has come meanwhile, there is nobody left but to wake.
            if unsafe { request(&self.descriptor, UFFDIO_ZEROPAGE, &raw mut zero) }.is_ok() {
                return;
            }
        } else if let Err(reason) = self.ram.fill(page) {
            self.give_up(page, reason);
        }
        let mut range = self.range(page);
        // SAFETY: the structure is the one that this call reads. Those who are woken look again: the file has the page.
        let _ = unsafe { request(&self.descriptor, UFFDIO_WAKE, &raw mut range) };
    }

    /// A page cannot be had: nobody must take the hole in its place for zeros.
    fn give_up(&self, page: u64, reason: String) {
        let range = self.range(page);
        // SAFETY: the page is absent, so nobody has read it, and devices ask for its flag before they would.
        let _ = unsafe { mprotect(range.start as *mut c_void, range.len as usize, MprotectFlags::empty()) };
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::platform::MemoryMap;
    use crate::machine::ram::tests::TestImage;

    fn filler(ram: &Arc<Ram>) -> Option<Filler> {
        match Filler::new(ram) {
            Ok(filler) => Some(filler),
            Err(error) => {
                eprintln!("skipped: this host does not permit userfaultfd ({error})");
                None
            }
        }
    }

    /// Reads through the mapping, as KVM does.
    fn peek(ram: &Ram, page: u64) -> u8 {
        // SAFETY: the page is within the mapping and nobody writes to it.
        unsafe { ram.host().add((page * PAGE_SIZE + 7) as usize).read_volatile() }
    }

    #[test]
    fn whoever_touches_a_page_gets_what_the_image_holds() {
        let image = Arc::new(TestImage::new(2048, &[(3, 40), (50, 10), (1000, 1), (2040, 8)]));
        let ram = Arc::new(Ram::restore(MemoryMap::with_pages(2048), image).unwrap());
        let Some(filler) = filler(&ram) else { return };
        std::thread::scope(|scope| {
            for start in [2047, 1000, 59, 42, 5] {
                let ram = &ram;
                scope.spawn(move || assert_eq!(peek(ram, start), TestImage::byte(start)));
            }
        });
        // Between two runs, mapped to the same file, and beyond.
        assert_eq!((peek(&ram, 45), peek(&ram, 999), peek(&ram, 1500)), (0, 0, 0));
        assert_eq!(filler.failure(), None);
        drop(filler);
        let last = (0..2048).filter(|page| peek(&ram, *page) != 0).count();
        assert!(last <= 59, "what is not in the image stays zero");
    }

    #[test]
    fn all_of_it_comes_by_itself_and_writes_stay_private() {
        let image = Arc::new(TestImage::new(512, &[(0, 300)]));
        let (a, b) = [(); 2]
            .map(|()| Arc::new(Ram::restore(MemoryMap::with_pages(512), image.clone()).unwrap()))
            .into();
        let Some(filler) = filler(&a) else { return };
        while a.counts().1 > 0 {
            std::thread::yield_now();
        }
        // SAFETY: the page is within the mapping and nobody else uses it.
        unsafe { a.host().add(PAGE_SIZE as usize).write_bytes(0xee, PAGE_SIZE as usize) };
        drop(filler);
        b.fill(1).unwrap();
        assert_eq!((peek(&a, 1), peek(&b, 1)), (0xee, TestImage::byte(1)));
        assert_eq!(peek(&a, 299), TestImage::byte(299));
    }

    #[test]
    fn a_machine_may_end_before_its_memory_is_there() {
        let image = Arc::new(TestImage::new(1 << 16, &[(0, 1 << 16)]));
        let ram = Arc::new(Ram::restore(MemoryMap::with_pages(1 << 16), image).unwrap());
        let Some(filler) = filler(&ram) else { return };
        drop(filler);
        assert_eq!(Arc::strong_count(&ram), 1);
    }

    #[test]
    fn a_page_that_cannot_be_had_is_an_error_for_the_kernel_and_has_its_reason() {
        let mut image = TestImage::new(512, &[(0, 512)]);
        image.broken = Some(0x100);
        let ram = Arc::new(Ram::restore(MemoryMap::with_pages(512), Arc::new(image)).unwrap());
        let Some(filler) = filler(&ram) else { return };
        let touch = |page: u64| {
            let (_reader, writer) = std::io::pipe().unwrap();
            // SAFETY: asks the kernel to read one byte of the mapping, as KVM does: a fault there is an error.
            unsafe { libc::write(writer.as_raw_fd(), ram.host().add((page * PAGE_SIZE) as usize).cast(), 1) }
        };
        assert_eq!(touch(0xff), 1);
        assert_eq!(touch(0x100), -1, "what is not there cannot be read");
        assert_eq!(filler.failure().as_deref(), Some("Broken"));
        assert_eq!(touch(0x1ff), 1, "the others can be had");
    }
}
