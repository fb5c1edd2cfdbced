//! Where the agent listens: a vsock port of the machine, or a Unix socket in tests.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use tokio::io::unix::AsyncFd;

/// Connections that may wait to be accepted.
const BACKLOG: libc::c_int = 4096;

/// Bytes that the host may send ahead on a connection: what the guest works on while the host's threads wait for a processor.
static RECEIVE_BUFFER: u64 = 1 << 20;

/// `SO_VM_SOCKETS_BUFFER_SIZE`
const BUFFER_SIZE: libc::c_int = 0;
/// `SO_VM_SOCKETS_BUFFER_MAX_SIZE`
const BUFFER_MAX_SIZE: libc::c_int = 2;

/// Where to listen.
#[derive(Debug)]
pub(crate) enum Address {
    /// A vsock port, for the host only.
    Vsock(u32),
    /// A Unix socket.
    Unix(PathBuf),
}

/// A listening socket in the event loop.
pub(crate) struct Listener {
    fd: AsyncFd<OwnedFd>,
    vsock: bool,
}

impl Listener {
    pub(crate) fn bind(address: &Address) -> io::Result<Self> {
        let (fd, vsock) = match address {
            Address::Vsock(port) => (bind_vsock(*port)?, true),
            Address::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                (listener.into(), false)
            }
        };
        // SAFETY: an OwnedFd refers to the same open file for as long as the AsyncFd owns it.
        let fd = unsafe { AsyncFd::register(fd)? };
        Ok(Self { fd, vsock })
    }

    /// The next connection from the host. Connections from inside the guest (the vsock loopback) are dropped: the agent acts as root.
    pub(crate) async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            match self.try_accept() {
                Ok(Some(fd)) => return Ok(fd),
                Ok(None) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => self.fd.readable().await?.clear_ready(),
                    // The peer went away before it was accepted.
                    Some(libc::EINTR | libc::ECONNABORTED | libc::EPROTO | libc::ECONNRESET) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn try_accept(&self) -> io::Result<Option<OwnedFd>> {
        // SAFETY: sockaddr_vm is plain data, for which zero is a valid value.
        let mut peer: libc::sockaddr_vm = unsafe { mem::zeroed() };
        let mut length = address_length();
        // SAFETY: `peer` and `length` are valid for writes of the size that `length` says.
        let fd = unsafe {
            libc::accept4(
                self.fd.as_raw_fd(),
                (&raw mut peer).cast(),
                &raw mut length,
                libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let host = !self.vsock || peer.svm_cid == libc::VMADDR_CID_HOST;
        Ok(host.then_some(fd))
    }
}

fn bind_vsock(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = unsafe {
        libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_vm is plain data, for which zero is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    // SAFETY: `address` is a valid sockaddr_vm of the length passed.
    if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), address_length()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // Connections inherit it.
    for option in [BUFFER_MAX_SIZE, BUFFER_SIZE] {
        // SAFETY: the option's value is a u64 that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::AF_VSOCK,
                option,
                (&raw const RECEIVE_BUFFER).cast(),
                mem::size_of_val(&RECEIVE_BUFFER) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: no pointers are passed.
    if unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

fn address_length() -> libc::socklen_t {
    mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t
}
