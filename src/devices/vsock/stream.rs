//! The host program's side of vsock: connecting, listening, and streams for tokio.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Hub;
use super::mux::{Id, Mux, RxRing};

/// How long [`VsockConnector::connect`] waits for the guest to answer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs `f` on the multiplexer. `otherwise` is never returned; it spares an impossible error.
fn call<R>(hub: &dyn Hub, otherwise: R, f: impl FnOnce(&mut Mux, Option<&mut dyn RxRing>) -> R) -> R {
    let mut f = Some(f);
    let mut result = otherwise;
    hub.run(&mut |mux, rx| {
        if let Some(f) = f.take() {
            result = f(mux, rx);
        }
    });
    result
}

/// Connects host programs with guest ports. Cheap to clone.
#[derive(Clone)]
pub struct VsockConnector {
    hub: Arc<dyn Hub>,
}

impl VsockConnector {
    pub(super) fn new(hub: Arc<dyn Hub>) -> Self {
        VsockConnector { hub }
    }

    /// Connects to a port of the guest. `ConnectionRefused` when nobody listens there, `TimedOut` when the guest
    /// does not answer within [`CONNECT_TIMEOUT`] (it may have no driver yet, or be paused), `NotConnected`
    /// when the machine is gone. Runs inside a tokio runtime with time enabled.
    pub async fn connect(&self, port: u32) -> io::Result<VsockStream> {
        self.connect_timeout(port, CONNECT_TIMEOUT).await
    }

    /// Like [`connect`](Self::connect), with a limit of the caller's.
    pub async fn connect_timeout(&self, port: u32, limit: Duration) -> io::Result<VsockStream> {
        let (id, host_port) =
            call(self.hub.as_ref(), Err(io::ErrorKind::NotConnected.into()), |mux, _| mux.connect(port))?;
        // From here on, giving up drops the stream, which takes the request back.
        let stream = VsockStream { hub: Arc::clone(&self.hub), id, host_port, guest_port: port };
        let answer =
            poll_fn(|cx| call(stream.hub.as_ref(), Poll::Pending, |mux, _| mux.poll_connect(id, cx.waker())));
        match tokio::time::timeout(limit, answer).await {
            Ok(answer) => answer.map(|()| stream),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "Guest did not answer the connection")),
        }
    }

    /// Lets the guest connect to a port of the host. `AddrInUse` when somebody listens there already.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        call(self.hub.as_ref(), Err(io::ErrorKind::NotConnected.into()), |mux, _| mux.listen(port))?;
        Ok(VsockListener { hub: Arc::clone(&self.hub), port })
    }
}

impl fmt::Debug for VsockConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VsockConnector")
    }
}

/// Receives the guest's connections to one port of the host. Dropping it refuses further ones.
pub struct VsockListener {
    hub: Arc<dyn Hub>,
    port: u32,
}

impl VsockListener {
    /// The next connection. `NotConnected` when the machine is gone.
    pub async fn accept(&mut self) -> io::Result<VsockStream> {
        let (id, guest_port) = poll_fn(|cx| {
            call(self.hub.as_ref(), Poll::Pending, |mux, _| mux.poll_accept(self.port, cx.waker()))
        })
        .await?;
        Ok(VsockStream { hub: Arc::clone(&self.hub), id, host_port: self.port, guest_port })
    }

    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        call(self.hub.as_ref(), (), |mux, _| mux.unlisten(self.port));
    }
}

impl fmt::Debug for VsockListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockListener").field("port", &self.port).finish()
    }
}

/// A connection between a host program and a guest program.
///
/// Written bytes count as sent once they are buffered; there is nothing to flush. `shutdown` tells the
/// guest that no more comes and leaves the other direction open. Dropping the stream delivers what was
/// written and then closes.
pub struct VsockStream {
    hub: Arc<dyn Hub>,
    id: Id,
    host_port: u32,
    guest_port: u32,
}

impl VsockStream {
    /// The port on the host's side.
    pub fn host_port(&self) -> u32 {
        self.host_port
    }

    /// The port on the guest's side.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        call(self.hub.as_ref(), Poll::Pending, |mux, _| {
            let room = buf.remaining();
            mux.poll_read(self.id, cx.waker(), room, |bytes| buf.put_slice(bytes)).map_ok(|_| ())
        })
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        call(self.hub.as_ref(), Poll::Pending, |mux, rx| mux.poll_write(self.id, cx.waker(), data, rx))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        call(self.hub.as_ref(), (), |mux, _| mux.shut_send(self.id));
        Poll::Ready(Ok(()))
    }
}

impl Drop for VsockStream {
    fn drop(&mut self) {
        call(self.hub.as_ref(), (), |mux, _| mux.abandon(self.id));
    }
}

impl fmt::Debug for VsockStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockStream")
            .field("host_port", &self.host_port)
            .field("guest_port", &self.guest_port)
            .finish()
    }
}
