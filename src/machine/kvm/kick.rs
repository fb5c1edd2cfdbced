//! Stopping a CPU that runs in the kernel, from any thread.
//!
//! `KVM_RUN` returns when a signal is pending for its thread. All signals are blocked in a thread that runs a CPU, so that
//! the host process' handlers never run there; inside `KVM_RUN`, and only there, one real-time signal is not
//! (`KVM_SET_SIGNAL_MASK`). It is sent to that thread alone, makes the call return, and is taken from the queue
//! without any handler: none is installed, and whatever the process does with that signal elsewhere is not touched.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::VcpuFd;

use crate::machine::vcpu::Kicker;

/// Signals that say that this thread itself has gone wrong: blocking them would end the process all the same, without
/// the host's handler having had its say.
const OWN_FAULTS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// `struct kvm_signal_mask` with the kernel's signal set of 64 bits behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    /// Two halves, as the structure's alignment is 4.
    set: [u32; 2],
}

/// `KVM_SET_SIGNAL_MASK`: `_IOW(0xae, 0x8b, struct kvm_signal_mask)`, whose size is that without the set.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 1 << 30 | 4 << 16 | 0xae << 8 | 0x8b;

/// The signal that kicks, chosen once per process: the highest real-time signal that nobody handles, or the highest of
/// all, which does no harm either.
pub(super) fn signal() -> libc::c_int {
    static CHOSEN: OnceLock<libc::c_int> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX());
        (first..=last).rev().find(|signal| !is_handled(*signal)).unwrap_or(last)
    })
}

fn is_handled(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks only; the structure is the one that the call fills.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: zeroed is a valid value, and the call has replaced it if it succeeded.
    asked != 0 || unsafe { action.assume_init() }.sa_sigaction != libc::SIG_DFL
}

/// Has `KVM_RUN` of this CPU let the kick through, and nothing else but what the thread itself does wrong.
pub(super) fn arm(vcpu: &VcpuFd) -> io::Result<()> {
    let open = OWN_FAULTS.into_iter().chain([signal()]);
    let blocked = open.fold(u64::MAX, |set, signal| set & !(1 << (signal - 1)));
    let mask = SignalMask { len: 8, set: [blocked as u32, (blocked >> 32) as u32] };
    // SAFETY: the descriptor is a CPU's and the structure the one that this call reads.
    let set = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[derive(Debug, Default)]
struct Target {
    /// The thread that runs the CPU, or 0.
    thread: libc::pid_t,
    /// Kicked while nobody ran it.
    pending: bool,
}

/// Kicks one CPU.
#[derive(Debug, Default)]
pub(super) struct Kick(Mutex<Target>);

impl Kick {
    fn lock(&self) -> MutexGuard<'_, Target> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes this thread the one to kick; `None` if the CPU has been kicked already.
    pub(super) fn enter(&self) -> Option<Running<'_>> {
        let mut target = self.lock();
        if std::mem::take(&mut target.pending) {
            return None;
        }
        let mask = block_all();
        // SAFETY: no arguments, cannot fail.
        target.thread = unsafe { libc::gettid() };
        Some(Running { kick: self, mask })
    }
}

impl Kicker for Kick {
    fn kick(&self) {
        let mut target = self.lock();
        target.pending = true;
        if target.thread != 0 {
            // SAFETY: the thread is one of ours and alive, for it clears its id under the lock; the signal is blocked in it.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), target.thread, signal()) };
        }
    }

    /// The kernel's interrupt controller wakes its CPUs itself.
    fn interrupt(&self) {}
}

/// A thread that runs a CPU. Its signal mask is restored at the end.
pub(super) struct Running<'a> {
    kick: &'a Kick,
    mask: libc::sigset_t,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut target = self.kick.lock();
        *target = Target::default();
        // Nobody sends any more: what was sent is taken before the mask lets it through.
        take_pending();
        // SAFETY: the mask is the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, std::ptr::null_mut()) };
    }
}

/// Blocks what can be blocked in this thread, and returns what was blocked before.
fn block_all() -> libc::sigset_t {
    let (mut all, mut old) = (MaybeUninit::uninit(), MaybeUninit::zeroed());
    // SAFETY: the first call initialises the set, the others change it; the last fills `old`, for which zeroed is valid.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        for fault in OWN_FAULTS {
            libc::sigdelset(all.as_mut_ptr(), fault);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
        old.assume_init()
    }
}

/// Takes the kicks that this thread has been sent.
fn take_pending() {
    let mut set = MaybeUninit::uninit();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set is initialised by the first call; waiting takes no time and fills nothing.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal());
        while libc::sigtimedwait(set.as_ptr(), std::ptr::null_mut(), &raw const now) > 0 {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn the_signal_is_a_real_time_signal_that_nobody_handles() {
        let signal = signal();
        assert!((libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&signal));
        assert!(!is_handled(signal));
        assert_eq!(signal, super::signal());
    }

    #[test]
    fn a_kick_before_the_run_is_not_lost_and_counts_once() {
        let kick = Kick::default();
        kick.kick();
        kick.kick();
        assert!(kick.enter().is_none());
        assert!(kick.enter().is_some());
    }

    #[test]
    fn a_kick_reaches_the_running_thread_and_leaves_nothing_behind() {
        let (kick, entered) = (Arc::new(Kick::default()), Arc::new(AtomicBool::new(false)));
        let runner = std::thread::spawn({
            let (kick, entered) = (Arc::clone(&kick), Arc::clone(&entered));
            move || {
                let running = kick.enter().unwrap();
                entered.store(true, Ordering::Release);
                let mut set = MaybeUninit::uninit();
                let mut got = 0;
                // SAFETY: a set of one signal, which is blocked in this thread.
                unsafe {
                    libc::sigemptyset(set.as_mut_ptr());
                    libc::sigaddset(set.as_mut_ptr(), signal());
                    libc::sigwait(set.as_ptr(), &raw mut got);
                }
                drop(running);
                // SAFETY: as above; zeroed is a valid set.
                let pending = unsafe {
                    let mut pending = MaybeUninit::zeroed();
                    libc::sigpending(pending.as_mut_ptr());
                    libc::sigismember(pending.as_ptr(), signal())
                };
                (got, pending)
            }
        });
        while !entered.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        kick.kick();
        kick.kick();
        assert_eq!(runner.join().unwrap(), (signal(), 0));
        // Its thread is gone: nobody is signalled, and the next run returns at once.
        kick.kick();
        assert!(kick.enter().is_none());
    }

    #[test]
    fn the_threads_own_mask_comes_back() {
        let kick = Kick::default();
        let usr1 = || {
            // SAFETY: asks for the mask only; zeroed is a valid set.
            unsafe {
                let mut mask = MaybeUninit::zeroed();
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), mask.as_mut_ptr());
                libc::sigismember(mask.as_ptr(), libc::SIGUSR1)
            }
        };
        assert_eq!(usr1(), 0);
        let running = kick.enter().unwrap();
        assert_eq!(usr1(), 1);
        drop(running);
        assert_eq!(usr1(), 0);
    }
}
