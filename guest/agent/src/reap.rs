//! Reaps every process that ends: ours, and the orphans that process 1 inherits.
//!
//! This is the only place that waits for processes (except for a child whose exec failed, which its maker reaps on the spot), so
//! no exit is ever taken by somebody else.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;

use rustix::process::{WaitOptions, wait};

use crate::process::{Ending, Finished};
use crate::state::State;
use crate::stream::Stream;

/// A descriptor that becomes readable when a child has ended. To be made before any thread is started: it blocks SIGCHLD for the threads
/// to come.
pub(crate) fn signals() -> io::Result<Stream> {
    // SAFETY: sigset_t is plain data, and is initialised by sigemptyset before use.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Stream::new(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reaps for ever.
pub(crate) async fn run(state: Rc<State>, signals: Stream) -> io::Result<()> {
    // Room for several signalfd_siginfo; what they say does not matter.
    let mut buffer = [0; 1024];
    loop {
        signals.read(&mut buffer).await?;
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let ending = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Code(code),
                (None, Some(signal)) => Ending::Signal(signal),
                (None, None) => continue,
            };
            let process = u32::try_from(pid.as_raw_nonzero().get()).ok().and_then(|pid| state.remove(pid));
            if let Some(process) = process {
                let exit = process.exit(ending);
                state.keep(Finished { pid: process.pid, tag: process.info.tag.clone(), exit });
                process.input.borrow_mut().take();
                process.ending.send_replace(Some(ending));
            }
        }
    }
}
