//! An asynchronous file descriptor: socket, pipe or terminal. Reads and writes are tried first and wait only when the kernel has nothing, which
//! saves a wake-up in the usual case.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

/// A non-blocking file descriptor in the event loop.
#[derive(Debug)]
pub(crate) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes a descriptor over and makes it non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        // SAFETY: an OwnedFd refers to the same open file for as long as the AsyncFd owns it.
        Ok(Self(unsafe { AsyncFd::register(fd)? }))
    }

    /// Leaves the event loop: the same descriptor, blocking.
    pub(crate) fn into_blocking(self) -> io::Result<OwnedFd> {
        let fd = self.0.into_inner();
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
        Ok(fd)
    }

    /// Reads what is there; `None` when nothing is.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            return match rustix::io::read(&self.0, &mut *buffer) {
                Ok(count) => Ok(Some(count)),
                Err(Errno::AGAIN) => Ok(None),
                Err(Errno::INTR) => continue,
                // A terminal whose last program has closed it.
                Err(Errno::IO) => Ok(Some(0)),
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Reads at least one byte; 0 is the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(count) = self.try_read(buffer)? {
                return Ok(count);
            }
            self.0.readable().await?.clear_ready();
        }
    }

    /// Reads at least one byte, or arranges for the task to be woken; 0 is the end.
    pub(crate) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            match self.try_read(buffer) {
                Ok(None) => guard.clear_ready(),
                Ok(Some(count)) => return Poll::Ready(Ok(count)),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Writes what fits at once.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            return match rustix::io::write(&self.0, bytes) {
                Ok(count) => Ok(count),
                Err(Errno::AGAIN) => Ok(0),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Writes everything.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            let count = self.try_write(bytes)?;
            bytes = &bytes[count..];
            if bytes.is_empty() {
                return Ok(());
            }
            if count == 0 {
                self.0.writable().await?.clear_ready();
            }
        }
    }
}

impl Stream {
    /// Says that nothing more will be written. The other direction stays open.
    pub(crate) fn shutdown_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write)?)
    }

    /// Waits until something can be read.
    pub(crate) async fn wait_readable(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        Ok(())
    }

    /// Waits until something can be written: for a socket, until it is connected or has failed to.
    pub(crate) async fn wait_writable(&self) -> io::Result<()> {
        self.0.writable().await?.clear_ready();
        Ok(())
    }

    /// Resolves when the other side will not read any more either; only for a socket whose end has been read.
    pub(crate) async fn abandoned(&self) -> io::Error {
        loop {
            // Writes nothing, but only where something could be written.
            match rustix::net::send(&self.0, &[], rustix::net::SendFlags::NOSIGNAL) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return error.into(),
            }
            if let Err(error) = self.wait_writable().await {
                return error;
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
