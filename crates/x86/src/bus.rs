//! What the CPU needs of its surroundings: guest RAM as host memory, and a bus for everything else.

use std::sync::atomic::AtomicU8;

use crate::shared::SharedCode;

/// Bits of one guest page's flag byte, shared between the CPU, the devices and snapshots.
#[derive(Debug, Clone, Copy)]
pub struct PageFlags;

impl PageFlags {
    /// The page's content is in the host mapping; without it, [`GuestRam::fill`] must run before the first access.
    pub const PRESENT: u8 = 1;
    /// The page may differ from the sealed image it was restored from.
    pub const DIRTY: u8 = 2;
    /// The CPU holds decoded instructions of this page: writers must report it (see
    /// [`GuestRam::take_code_writes`]).
    pub const CODE: u8 = 4;
    /// A snapshot in the making still needs the page's present content: whoever is about to write must have
    /// [`GuestRam::preserve`] done first. Never together with `DIRTY`, so that asking costs nothing where writes are
    /// quick.
    pub const CAPTURE: u8 = 8;
}

/// Guest RAM as the CPU sees it: one contiguous host mapping, addressed by page index.
///
/// # Safety
/// `host()` must point to `pages() * 4096` readable and writable bytes that stay mapped at the same address as long
/// as the object lives; `flags()` must always be the same slice, of `pages()` elements; addresses must grow with page
/// indices.
pub unsafe trait GuestRam: Send + Sync {
    /// First byte of page index 0.
    fn host(&self) -> *mut u8;
    /// Number of 4 KiB pages.
    fn pages(&self) -> u64;
    /// One flag byte per page ([`PageFlags`]).
    fn flags(&self) -> &[AtomicU8];
    /// Maps a guest-physical address to its page index, or `None` where there is no RAM.
    fn page_of(&self, pa: u64) -> Option<u64>;
    /// Maps a page index back to the guest-physical address of its first byte.
    fn address_of(&self, page: u64) -> u64;
    /// Brings an absent page's content into the mapping and sets [`PageFlags::PRESENT`].
    ///
    /// # Errors
    /// A description of why the page cannot be had; the CPU then stops with [`Exit::RamFault`](crate::Exit).
    fn fill(&self, page: u64) -> Result<(), String>;
    /// Before the first write to a page with [`PageFlags::CAPTURE`]: keeps its content for the snapshot and clears the flag.
    fn preserve(&self, _page: u64) {}
    /// Moves the page indices that devices wrote while they had [`PageFlags::CODE`] to `out`; called by the CPU after
    /// [`Kick::code_written`](crate::Kick::code_written).
    fn take_code_writes(&self, out: &mut Vec<u64>);
    /// Decoded code of the sealed image that this RAM was restored from, by page index. There as long as every page
    /// without [`PageFlags::DIRTY`] equals that image's.
    fn shared_code(&self) -> Option<&SharedCode> {
        None
    }
    /// Reads part of a page of that image, whatever this RAM holds there. False if it cannot be had.
    fn sealed(&self, _page: u64, _offset: usize, _out: &mut [u8]) -> bool {
        false
    }
}

/// Everything outside the CPU and RAM: memory-mapped and port devices, the local APIC, platform MSRs, CPUID, time.
pub trait Bus {
    /// Reads guest-physical memory that is not RAM. `data` has 1, 2, 4 or 8 bytes.
    fn mmio_read(&mut self, pa: u64, data: &mut [u8]);
    /// Writes guest-physical memory that is not RAM. `data` has 1, 2, 4 or 8 bytes.
    fn mmio_write(&mut self, pa: u64, data: &[u8]);
    /// IN: `data` has 1, 2 or 4 bytes.
    fn io_read(&mut self, port: u16, data: &mut [u8]);
    /// OUT: `data` has 1, 2 or 4 bytes.
    fn io_write(&mut self, port: u16, data: &[u8]);
    /// RDMSR of a register that the CPU itself does not hold (APIC base, kvm-clock, ...). `None` raises #GP.
    fn rdmsr(&mut self, index: u32) -> Option<u64>;
    /// WRMSR of a register that the CPU itself does not hold. `false` raises #GP.
    fn wrmsr(&mut self, index: u32, value: u64) -> bool;
    /// CPUID. Bits that mirror CPU state (OSXSAVE) are the CPU's own business.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Acknowledges the highest pending interrupt above the task priority and returns its vector, if there is one. Asked
    /// only after a hint: whoever may have made an interrupt deliverable (a device, an EOI, a lowered task priority)
    /// calls [`Kick::interrupt`](crate::Kick::interrupt), or [`Bus::poll`] returned true.
    fn acknowledge_interrupt(&mut self) -> Option<u8>;
    /// Task priority (CR8), 0 to 15.
    fn task_priority(&mut self) -> u8;
    /// Sets the task priority (CR8), 0 to 15.
    fn set_task_priority(&mut self, priority: u8);
    /// The time-stamp counter.
    fn tsc(&mut self) -> u64;
    /// Called between operation sequences every 10 000 instructions or so, for timers.
    /// Returns whether an interrupt is now deliverable.
    fn poll(&mut self) -> bool;
}
