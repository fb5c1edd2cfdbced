//! A connection from the host: frames over a stream, in the event loop ([`Conn`]) or on a blocking thread ([`BlockingConn`]).

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::task::{Context, Poll};

use amber_proto::{
    Decoder, ErrorCode, Kind, RemoteError, Request, decode_args, encode_error, encode_reply, header,
};
use rustix::io::Errno;

use crate::stream::Stream;

/// What an operation fails with.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Why an operation ends early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The host is told.
    Remote(RemoteError),
    /// The host is gone or broke the protocol; there is nobody to tell.
    Gone,
}

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Self {
        Self::Remote(error)
    }
}

/// A failure that the host is told.
pub(crate) fn failure(code: ErrorCode, message: impl Into<String>) -> Failure {
    Failure::Remote(RemoteError::new(code, message))
}

/// Read buffer of a connection: enough for any ordinary request.
const READ_BUFFER: usize = 4 << 10;

/// A connection in the event loop.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: Stream,
    decoder: Decoder,
}

impl Conn {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { stream: Stream::new(fd)?, decoder: Decoder::new(READ_BUFFER) })
    }

    /// The next frame of a kind that this version knows how to handle at this place; others are skipped.
    pub(crate) async fn frame(&mut self, wanted: &[Kind]) -> Result<(Kind, Vec<u8>)> {
        loop {
            while let Some(frame) = self.decoder.next_frame().map_err(|_| Failure::Gone)? {
                if wanted.contains(&frame.kind) {
                    return Ok((frame.kind, frame.payload.to_vec()));
                }
            }
            match self.stream.read(self.decoder.space()).await {
                Ok(count) if count > 0 => self.decoder.filled(count),
                _ => return Err(Failure::Gone),
            }
        }
    }

    /// Sends bytes that are whole frames.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(|_| Failure::Gone)
    }

    /// Sends what fits at once, for the rest see [`Conn::send`].
    pub(crate) fn try_send(&self, bytes: &[u8]) -> Result<usize> {
        self.stream.try_write(bytes).map_err(|_| Failure::Gone)
    }

    /// Sends the reply of an operation.
    pub(crate) async fn reply<R: Request>(&self, reply: &R::Reply) -> Result<()> {
        self.send(&encoded::<R>(reply)?).await
    }

    /// Ready when the host has closed the connection. What it still sends is discarded.
    pub(crate) fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = [0; 256];
        loop {
            match self.stream.poll_read(cx, &mut scratch) {
                Poll::Ready(Ok(count)) if count > 0 => {}
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Reports an error and waits for the host to close, so that a host in the middle of sending still reads it.
    pub(crate) async fn refuse(self, error: &RemoteError) {
        if self.send(&encode_error(error)).await.is_ok() {
            poll_fn(|cx| self.poll_closed(cx)).await;
        }
    }

    /// The end of frames: the stream as it is, and what has already been read of it.
    pub(crate) fn into_raw(self) -> (Stream, Vec<u8>) {
        let early = self.decoder.rest().to_vec();
        (self.stream, early)
    }

    /// Moves the connection out of the event loop.
    pub(crate) fn into_blocking(self) -> Result<BlockingConn> {
        let fd = self.stream.into_blocking().map_err(|_| Failure::Gone)?;
        Ok(BlockingConn { fd, decoder: self.decoder })
    }
}

/// A connection on a blocking thread.
#[derive(Debug)]
pub(crate) struct BlockingConn {
    fd: OwnedFd,
    decoder: Decoder,
}

/// Where bulk data goes.
pub(crate) trait Sink {
    /// Takes a piece.
    fn add(&mut self, data: &[u8]) -> Result<()>;
    /// Room for some of the next `wanted` bytes, at least one.
    fn space(&mut self, wanted: usize) -> Result<&mut [u8]>;
    /// Says that `count` bytes have been put at the front of the last space.
    fn filled(&mut self, count: usize) -> Result<()>;
}

impl BlockingConn {
    /// Sends a frame without copying its payload.
    pub(crate) fn send_frame(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        let head = header(kind, payload.len());
        let sent = loop {
            match rustix::io::writev(&self.fd, &[io::IoSlice::new(&head), io::IoSlice::new(payload)]) {
                Ok(count) => break count,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Failure::Gone),
            }
        };
        match sent.checked_sub(head.len()) {
            Some(sent) => self.send(&payload[sent..]),
            None => {
                self.send(&head[sent..])?;
                self.send(payload)
            }
        }
    }

    /// Hands all data to a sink, until its end. `Gone` when the host closes the connection before.
    pub(crate) fn receive(&mut self, sink: &mut impl Sink) -> Result<()> {
        loop {
            while let Some((frame, mut left)) = self.decoder.next_piece().map_err(|_| Failure::Gone)? {
                match frame.kind {
                    Kind::DATA => sink.add(frame.payload)?,
                    Kind::END => return Ok(()),
                    _ => {}
                }
                // The rest of a large frame goes straight to its place.
                while left > 0 {
                    let space = sink.space(left)?;
                    let room = space.len().min(left);
                    let count = read(&self.fd, &mut space[..room])?;
                    sink.filled(count)?;
                    left -= count;
                }
            }
            let count = read(&self.fd, self.decoder.space())?;
            self.decoder.filled(count);
        }
    }

    /// Sends bytes that are whole frames.
    pub(crate) fn send(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.fd, bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(_) => return Err(Failure::Gone),
            }
        }
        Ok(())
    }

    /// Sends the reply of an operation.
    pub(crate) fn reply<R: Request>(&self, reply: &R::Reply) -> Result<()> {
        self.send(&encoded::<R>(reply)?)
    }

    /// Reports an error and waits for the host to close, so that a host in the middle of sending still reads it.
    pub(crate) fn refuse(self, error: &RemoteError) {
        if self.send(&encode_error(error)).is_err() {
            return;
        }
        let mut scratch = [0; 4096];
        while matches!(rustix::io::read(self.fd.as_fd(), &mut scratch), Ok(1..) | Err(Errno::INTR)) {}
    }
}

/// Reads at least one byte.
fn read(fd: &OwnedFd, space: &mut [u8]) -> Result<usize> {
    loop {
        match rustix::io::read(fd, &mut *space) {
            Ok(count) if count > 0 => return Ok(count),
            Err(Errno::INTR) => {}
            _ => return Err(Failure::Gone),
        }
    }
}

/// The reply frame, or an error if it does not fit into one.
pub(crate) fn encoded<R: Request>(reply: &R::Reply) -> Result<Vec<u8>> {
    encode_reply::<R>(reply).map_err(|error| failure(ErrorCode::Internal, error.to_string()))
}

/// The arguments of a request.
pub(crate) fn args<R: Request>(payload: &[u8]) -> Result<R> {
    decode_args(payload).map_err(|error| failure(ErrorCode::InvalidArgument, error.to_string()))
}
