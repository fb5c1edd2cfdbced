//! One connection to the agent: frames in, frames out. While it sends it also listens, because the agent may refuse an operation (disk
//! full, no such user) long before the last byte of its data is sent.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use amber_proto::{CHUNK, Decoder, Kind, RemoteError, Request, decode_cbor, decode_reply, header};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{AgentError, AsyncStream};

/// Read buffer: holds the frames of ordinary output whole.
const READ_BUFFER: usize = 64 << 10;

/// Frames over a byte stream. All methods are cancel safe for reading; a cancelled send leaves the connection unusable.
pub(super) struct Conn {
    stream: Box<dyn AsyncStream>,
    decoder: Decoder,
    /// The peer has closed its side.
    closed: bool,
}

/// A frame on its way to the caller.
pub(super) struct OwnedFrame {
    pub(super) kind: Kind,
    pub(super) payload: Vec<u8>,
}

impl Conn {
    pub(super) fn new(stream: Box<dyn AsyncStream>) -> Self {
        Self { stream, decoder: Decoder::new(READ_BUFFER), closed: false }
    }

    /// The end of frames: the stream as it is, and what has already been read of it.
    pub(super) fn into_raw(self) -> (Box<dyn AsyncStream>, Vec<u8>) {
        let early = self.decoder.rest().to_vec();
        (self.stream, early)
    }

    /// Reads once into the decoder.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut space = ReadBuf::new(self.decoder.space());
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut space))?;
        let count = space.filled().len();
        self.closed |= count == 0;
        self.decoder.filled(count);
        Poll::Ready(Ok(()))
    }

    /// The next frame. `None` when the peer has closed the connection between two frames.
    pub(super) async fn next(&mut self) -> Result<Option<OwnedFrame>, AgentError> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(AgentError::protocol)? {
                return Ok(Some(OwnedFrame { kind: frame.kind, payload: frame.payload.to_vec() }));
            }
            if self.closed {
                return if self.decoder.is_empty() {
                    Ok(None)
                } else {
                    Err(AgentError::ConnectionLost(None))
                };
            }
            poll_fn(|cx| self.poll_fill(cx)).await.map_err(AgentError::lost)?;
        }
    }

    /// The next frame if all of it has been read already. An error frame stays an error.
    pub(super) fn buffered(&mut self) -> Result<Option<OwnedFrame>, AgentError> {
        match self.decoder.next_frame().map_err(AgentError::protocol)? {
            Some(frame) if frame.kind == Kind::ERROR => Err(refusal(frame.payload)),
            Some(frame) => Ok(Some(OwnedFrame { kind: frame.kind, payload: frame.payload.to_vec() })),
            None => Ok(None),
        }
    }

    /// The next frame of an operation that is not over: an error frame becomes its error, an end is a lost connection.
    pub(super) async fn expect(&mut self) -> Result<OwnedFrame, AgentError> {
        match self.next().await? {
            Some(frame) if frame.kind == Kind::ERROR => Err(refusal(&frame.payload)),
            Some(frame) => Ok(frame),
            None => Err(AgentError::ConnectionLost(None)),
        }
    }

    /// The reply to a request; frames of unknown kinds are skipped.
    pub(super) async fn reply<R: Request>(&mut self) -> Result<R::Reply, AgentError> {
        loop {
            let frame = self.expect().await?;
            if frame.kind == Kind::REPLY {
                return decode_reply::<R>(&frame.payload).map_err(AgentError::protocol);
            }
        }
    }

    /// Sends bytes that are whole frames.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match poll_fn(|cx| self.poll_send(cx, rest)).await {
                Ok(count) => rest = &rest[count..],
                // The agent may have said why before it closed the connection.
                Err(error) => return Err(self.last_words(error).await),
            }
            if self.decoder.is_empty() {
                continue;
            }
            match self.decoder.next_frame().map_err(AgentError::protocol)? {
                Some(frame) if frame.kind == Kind::ERROR => return Err(refusal(frame.payload)),
                Some(frame) if frame.kind == Kind::REPLY => {
                    return Err(AgentError::protocol("Reply before the request was complete"));
                }
                _ => {}
            }
        }
        poll_fn(|cx| Pin::new(&mut self.stream).poll_flush(cx)).await.map_err(AgentError::lost)
    }

    /// Sends bulk data as frames.
    pub(super) async fn send_data(&mut self, data: &[u8]) -> Result<(), AgentError> {
        let mut frame = Vec::with_capacity(data.len().min(CHUNK) + 5);
        for chunk in data.chunks(CHUNK) {
            frame.clear();
            frame.extend_from_slice(&header(Kind::DATA, chunk.len()));
            frame.extend_from_slice(chunk);
            self.send(&frame).await?;
        }
        Ok(())
    }

    /// Writes what the stream takes; while it takes nothing, watches for a frame from the agent. 0 means that one may have come.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, bytes) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Poll::Pending if !self.closed => {
                ready!(self.poll_fill(cx))?;
                Poll::Ready(Ok(0))
            }
            other => other,
        }
    }

    /// The error frame that the agent left before it closed the connection, or else the failure of the connection.
    async fn last_words(&mut self, error: io::Error) -> AgentError {
        while let Ok(Some(frame)) = self.next().await {
            if frame.kind == Kind::ERROR {
                return refusal(&frame.payload);
            }
        }
        AgentError::lost(error)
    }
}

/// The content of an error frame.
fn refusal(payload: &[u8]) -> AgentError {
    match decode_cbor::<RemoteError>(payload) {
        Ok(error) => error.into(),
        Err(error) => AgentError::protocol(error),
    }
}
