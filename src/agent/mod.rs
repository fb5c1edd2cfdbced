//! The host's side of the guest agent: one method per operation of `amber-proto`, over any byte stream.
//!
//! An [`Agent`] opens one connection per operation through a [`Connect`] (the machine's vsock device; a Unix socket in tests) and holds no
//! connection in between, so it is cheap to clone and indifferent to pauses. Whatever the guest sends is checked; it can fail an
//! operation but not the host. Dropping the future or handle of an operation closes its connection, which ends the operation, except
//! that a started process goes on.

mod conn;
mod error;
mod files;
mod process;
mod watch;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

pub use amber_proto::{
    EntryInfo, Exec, Exit, FileType, Identified, Identify, Info, List, Metrics, ProcessInfo, PtySize, Read,
    ReadStart, Target, Write,
};
pub use error::AgentError;
pub use files::{FileReader, FileWriter};
pub use process::{Event, Process};
pub use watch::Watched;

use amber_proto as proto;
use conn::Conn;

/// A connection to a port of the guest.
pub trait AsyncStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> AsyncStream for T {}

/// A connection that is being made.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<Box<dyn AsyncStream>>> + Send>>;

/// Something that reaches the ports of one guest.
pub trait Connect: Send + Sync + 'static {
    /// Connects to a port. `ConnectionRefused` means that nobody listens there.
    fn connect(&self, port: u32) -> Connecting;
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent {
    connect: Arc<dyn Connect>,
}

impl Agent {
    /// The agent that `connect` leads to.
    pub fn new(connect: Arc<dyn Connect>) -> Self {
        Self { connect }
    }

    /// Asks who the agent is.
    pub async fn info(&self) -> Result<Info, AgentError> {
        self.call(&proto::GetInfo {}).await
    }

    /// Tells a fresh or copied guest who it is; to be called before anything else.
    pub async fn identify(&self, identify: &Identify) -> Result<Identified, AgentError> {
        self.call(identify).await
    }

    /// Starts a process. Returns when it runs.
    pub async fn exec(&self, exec: &Exec) -> Result<Process, AgentError> {
        let mut conn = self.open(exec).await?;
        let started = conn.reply::<Exec>().await?;
        Ok(Process::new(conn, started.pid))
    }

    /// Attaches to a running process: its output from now on. A process that ended less than 30 s ago still gives its exit.
    pub async fn attach(&self, process: impl Into<Target>) -> Result<Process, AgentError> {
        let mut conn = self.open(&proto::Connect { process: process.into() }).await?;
        let started = conn.reply::<proto::Connect>().await?;
        Ok(Process::new(conn, started.pid))
    }

    /// The processes that were started through the agent and still run, oldest first.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, AgentError> {
        let mut conn = self.open(&proto::ListProcesses {}).await?;
        let mut processes = Vec::new();
        loop {
            let reply = conn.reply::<proto::ListProcesses>().await?;
            processes.extend(reply.processes);
            if !reply.more {
                return Ok(processes);
            }
        }
    }

    /// Sends a signal to a process and its group. [`AgentError::NotFound`] if it does not run (any more).
    pub async fn signal(&self, process: impl Into<Target>, signal: i32) -> Result<(), AgentError> {
        self.call(&proto::Signal { process: process.into(), signal }).await.map(drop)
    }

    /// Writes to a process's standard input or terminal; returns when its pipe has taken everything.
    pub async fn send_stdin(&self, process: impl Into<Target>, data: &[u8]) -> Result<(), AgentError> {
        let mut conn = self.open_with(&proto::SendStdin { process: process.into() }, data).await?;
        conn.reply::<proto::SendStdin>().await.map(drop)
    }

    /// Closes a process's standard input; on a terminal it sends the end-of-file character.
    pub async fn close_stdin(&self, process: impl Into<Target>) -> Result<(), AgentError> {
        self.call(&proto::CloseStdin { process: process.into() }).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize_pty(&self, process: impl Into<Target>, size: PtySize) -> Result<(), AgentError> {
        self.call(&proto::PtyResize { process: process.into(), size }).await.map(drop)
    }

    /// Connects to a TCP port of the guest, on its loopback. What the server has said by then is in front of the stream.
    /// [`AgentError::NotFound`] if nobody listens there, [`AgentError::Unsupported`] if the agent is too old.
    pub async fn forward(&self, port: u16) -> Result<(Box<dyn AsyncStream>, Vec<u8>), AgentError> {
        let mut conn = self.open(&proto::Forward { port }).await?;
        conn.reply::<proto::Forward>().await?;
        Ok(conn.into_raw())
    }

    /// The guest's resource use.
    pub async fn metrics(&self) -> Result<Metrics, AgentError> {
        self.call(&proto::GetMetrics {}).await
    }

    /// Writes the guest's file systems back to its disk.
    pub async fn sync(&self) -> Result<(), AgentError> {
        self.call(&proto::Sync {}).await.map(drop)
    }

    /// Stops all processes and holds new ones back until [`Agent::thaw`] or [`Agent::identify`]; to be called before a snapshot, so that
    /// nothing runs in a copy before it has been identified.
    pub async fn freeze(&self) -> Result<(), AgentError> {
        self.call(&proto::Freeze {}).await.map(drop)
    }

    /// Lets the processes go on.
    pub async fn thaw(&self) -> Result<(), AgentError> {
        self.call(&proto::Thaw {}).await.map(drop)
    }

    /// Ends the guest in good order; the machine resets soon after the reply.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        self.call(&proto::Shutdown {}).await.map(drop)
    }

    /// Carries out an operation of one request and one reply.
    async fn call<R: proto::Request>(&self, request: &R) -> Result<R::Reply, AgentError> {
        let mut conn = self.open(request).await?;
        conn.reply::<R>().await
    }

    /// Connects and sends the request.
    async fn open<R: proto::Request>(&self, request: &R) -> Result<Conn, AgentError> {
        let frame = proto::encode_request(request).map_err(AgentError::request)?;
        let mut conn = self.dial().await?;
        conn.send(&frame).await?;
        Ok(conn)
    }

    /// Connects and sends the request with all its data.
    async fn open_with<R: proto::Request>(&self, request: &R, data: &[u8]) -> Result<Conn, AgentError> {
        let mut frame = proto::encode_request(request).map_err(AgentError::request)?;
        let mut conn = self.dial().await?;
        if data.len() <= proto::CHUNK {
            if !data.is_empty() {
                frame.extend_from_slice(&proto::header(proto::Kind::DATA, data.len()));
                frame.extend_from_slice(data);
            }
            frame.extend_from_slice(&proto::header(proto::Kind::END, 0));
            conn.send(&frame).await?;
        } else {
            conn.send(&frame).await?;
            conn.send_data(data).await?;
            conn.send(&proto::header(proto::Kind::END, 0)).await?;
        }
        Ok(conn)
    }

    async fn dial(&self) -> Result<Conn, AgentError> {
        let stream = self.connect.connect(proto::PORT).await.map_err(AgentError::connect)?;
        Ok(Conn::new(stream))
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
