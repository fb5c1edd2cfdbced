//! Bringing guest memory in before the first instruction.
//!
//! KVM reaches RAM through the mapping alone, where a page of a snapshot that is not decoded yet reads as zeros. So all of
//! them are decoded ahead, on all of the host's CPUs. They go to the image's memory file, which all sandboxes of a process
//! share: this is paid once per snapshot and process.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use amber_x86::{GuestRam, PageFlags};

use crate::machine::ram::Ram;

/// Pages that a thread looks after at a time.
const PIECE: u64 = 256;
/// More threads would wait for memory, not for a CPU.
const MAX_THREADS: usize = 8;

/// Makes every page of RAM present.
///
/// # Errors
/// Why a page cannot be had.
pub(super) fn bring_in(ram: &Ram) -> Result<(), String> {
    let absent = |flags: &AtomicU8| flags.load(Ordering::Acquire) & PageFlags::PRESENT == 0;
    let Some(first) = ram.flags().iter().position(absent) else { return Ok(()) };
    let (next, failed) = (AtomicU64::new(first as u64 / PIECE), AtomicBool::new(false));
    let error = Mutex::new(None);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let from = next.fetch_add(1, Ordering::Relaxed) * PIECE;
            if from >= ram.pages() {
                break;
            }
            for page in from..(from + PIECE).min(ram.pages()) {
                if absent(&ram.flags()[page as usize])
                    && let Err(reason) = ram.fill(page)
                {
                    failed.store(true, Ordering::Relaxed);
                    *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                    break;
                }
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without a thread more, those that there are do all of it.
            let _ = thread::Builder::new().name("amberbox-fill".into()).spawn_scoped(scope, work);
        }
        work();
    });
    match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(reason) => Err(reason),
        None => Ok(()),
    }
}
