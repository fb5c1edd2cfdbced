//! Carries the bytes of a connection from the host to a TCP server in the guest, and back.
//!
//! Each direction is one loop that reads into the event loop's scratch buffer and writes at once; only what the other side does not take
//! is copied and waited for. So an idle connection costs two sockets and no buffer, and a side that does not read holds the other one
//! back through the kernel's own buffers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use amber_proto::{Done, ErrorCode, Forward};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use tokio::sync::oneshot;

use crate::conn::{Conn, Failure, Result, failure};
use crate::state::State;
use crate::stream::Stream;

/// How long a server whose backlog is full may leave a connection waiting.
const CONNECT: Duration = Duration::from_secs(10);

/// Connects to a port of the guest and relays until both directions have ended, or one is broken.
pub(crate) async fn run(state: &State, slot: &mut Option<Conn>, request: Forward) -> Result<()> {
    let server = connect(request.port).await?;
    let Some(conn) = slot.take() else { return Err(Failure::Gone) };
    conn.reply::<Forward>(&Done {}).await?;
    let (host, early) = conn.into_raw();
    let (sender, over) = oneshot::channel::<()>();
    let inward = async {
        server.write_all(&early).await?;
        carry(state, &host, &server).await?;
        // Broken connections are noticed by reading; a host that has ended its direction and then gives the other one up, too, by this.
        tokio::select! {
            error = host.abandoned() => Err(error),
            _ = over => Ok(()),
        }
    };
    let outward = async {
        carry(state, &server, &host).await?;
        drop(sender);
        Ok(())
    };
    // Whichever side is broken, dropping both sockets tells the other one.
    tokio::try_join!(inward, outward).map(drop).map_err(|_| Failure::Gone)
}

/// Copies until the end of `from`, and passes the end on.
async fn carry(state: &State, from: &Stream, to: &Stream) -> io::Result<()> {
    loop {
        let (count, rest) = {
            let mut scratch = state.scratch.borrow_mut();
            match from.try_read(&mut scratch)? {
                None => (None, Vec::new()),
                Some(count) => {
                    let written = if count == 0 { 0 } else { to.try_write(&scratch[..count])? };
                    (Some(count), scratch[written..count].to_vec())
                }
            }
        };
        match count {
            Some(0) => return to.shutdown_write(),
            Some(_) => to.write_all(&rest).await?,
            None => from.wait_readable().await?,
        }
    }
}

async fn connect(port: u16) -> Result<Stream> {
    let mut last = Errno::CONNREFUSED;
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        match tokio::time::timeout(CONNECT, connect_to(SocketAddr::new(address, port))).await {
            Ok(Ok(stream)) => return Ok(stream),
            // A guest without IPv6 refuses ::1 in its own way; what 127.0.0.1 said counts.
            Ok(Err(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT | Errno::NETUNREACH)) => {}
            Ok(Err(error)) => last = error,
            Err(_) => last = Errno::TIMEDOUT,
        }
    }
    let code = if last == Errno::CONNREFUSED { ErrorCode::NotFound } else { ErrorCode::Internal };
    Err(failure(code, format!("port {port} cannot be connected to: {}", io::Error::from(last))))
}

async fn connect_to(address: SocketAddr) -> std::result::Result<Stream, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(family, SocketType::STREAM, flags, None)?;
    // Latency counts, and whoever wrote small pieces wanted them small.
    sockopt::set_tcp_nodelay(&socket, true)?;
    let pending = match rustix::net::connect(&socket, &address) {
        Ok(()) => false,
        Err(Errno::INPROGRESS) => true,
        Err(error) => return Err(error),
    };
    let stream = Stream::new(socket).map_err(errno)?;
    if pending {
        stream.wait_writable().await.map_err(errno)?;
        sockopt::socket_error(&stream)??;
    }
    Ok(stream)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
