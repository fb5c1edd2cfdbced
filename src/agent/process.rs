//! A process in the guest: its output as events, in the order in which the agent read it, then its end.

use amber_proto::{Exit, Kind, decode_cbor};

use super::AgentError;
use super::conn::{Conn, OwnedFrame};

/// What a process does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Standard output; not split at character or line boundaries.
    Stdout(Vec<u8>),
    /// Standard error.
    Stderr(Vec<u8>),
    /// Output of the terminal.
    Pty(Vec<u8>),
    /// The end; the last event.
    End(Exit),
}

/// A handle on the output of a process. Reading slowly holds the process back; dropping the handle disconnects it, and the process goes on with
/// its output discarded. Signals and input go through [`super::Agent`] by process id.
pub struct Process {
    conn: Conn,
    pid: u32,
    ended: bool,
}

impl Process {
    pub(super) fn new(conn: Conn, pid: u32) -> Self {
        Self { conn, pid, ended: false }
    }

    /// Process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The next event; `None` after [`Event::End`]. Cancel safe: no event is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Option<Event>, AgentError> {
        if self.ended {
            return Ok(None);
        }
        loop {
            let frame = self.conn.expect().await.inspect_err(|_| self.ended = true)?;
            if let Some(event) = self.event(frame)? {
                return Ok(Some(event));
            }
        }
    }

    /// The next event if it has arrived completely; never waits.
    pub fn ready(&mut self) -> Result<Option<Event>, AgentError> {
        while !self.ended {
            let Some(frame) = self.conn.buffered()? else { return Ok(None) };
            if let Some(event) = self.event(frame)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// The event of a frame; `None` for what only a newer agent tells.
    fn event(&mut self, frame: OwnedFrame) -> Result<Option<Event>, AgentError> {
        Ok(Some(match frame.kind {
            Kind::STDOUT => Event::Stdout(frame.payload),
            Kind::STDERR => Event::Stderr(frame.payload),
            Kind::PTY => Event::Pty(frame.payload),
            Kind::EXIT => {
                self.ended = true;
                Event::End(decode_cbor(&frame.payload).map_err(AgentError::protocol)?)
            }
            _ => return Ok(None),
        }))
    }

    /// Discards the output and waits for the end.
    pub async fn wait(&mut self) -> Result<Exit, AgentError> {
        while let Some(event) = self.next().await? {
            if let Event::End(exit) = event {
                return Ok(exit);
            }
        }
        Err(AgentError::ConnectionLost(None))
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("pid", &self.pid).field("ended", &self.ended).finish_non_exhaustive()
    }
}
