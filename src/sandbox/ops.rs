//! Operations inside a sandbox: processes and files. Thin over the agent; the sandbox's end and E2B's answers for "not there" are added here.

use std::sync::Arc;

use amber_proto::{EntryInfo, Exec, ProcessInfo, PtySize, Read, Write};
use tokio::sync::{Mutex, watch};

use super::process::{Overdue, Process};
use super::{Error, Sandbox};
use crate::agent::{self, AgentError};

/// Turns "not there" into `false`.
fn unless_missing(result: Result<(), Error>) -> Result<bool, Error> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::NotFound(_) | Error::FileNotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Sandbox {
    /// Starts a process.
    pub async fn start_process(self: &Arc<Self>, exec: Exec) -> Result<Process, Error> {
        let process = self.agent_call(self.agent.exec(&exec)).await?;
        Ok(Process::new(Arc::clone(self), process, exec.timeout_ms.unwrap_or(0), Overdue::Kill))
    }

    /// Listens to a process that runs, or ended a moment ago.
    pub async fn connect_process(self: &Arc<Self>, pid: u32, timeout_ms: u64) -> Result<Process, Error> {
        let process = self.agent_call(self.agent.attach(pid)).await?;
        Ok(Process::new(Arc::clone(self), process, timeout_ms, Overdue::Disconnect))
    }

    /// The processes that were started through the API and still run.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, Error> {
        self.agent_call(self.agent.processes()).await
    }

    /// Sends a signal. `false` if there is no such process.
    pub async fn signal(&self, pid: u32, signal: i32) -> Result<bool, Error> {
        unless_missing(self.agent_call(self.agent.signal(pid, signal)).await)
    }

    /// Writes to the standard input or terminal of a process.
    pub async fn send_stdin(&self, pid: u32, data: &[u8]) -> Result<(), Error> {
        self.agent_call(self.agent.send_stdin(pid, data)).await
    }

    /// Closes the standard input of a process.
    pub async fn close_stdin(&self, pid: u32) -> Result<(), Error> {
        self.agent_call(self.agent.close_stdin(pid)).await
    }

    /// Sets the size of a terminal.
    pub async fn resize_pty(&self, pid: u32, size: PtySize) -> Result<(), Error> {
        self.agent_call(self.agent.resize_pty(pid, size)).await
    }

    /// One directory entry.
    pub async fn stat(&self, path: &str, user: Option<&str>) -> Result<EntryInfo, Error> {
        self.file_call(self.agent.stat(path, user)).await
    }

    /// Whether a path exists.
    pub async fn exists(&self, path: &str, user: Option<&str>) -> Result<bool, Error> {
        unless_missing(self.stat(path, user).await.map(drop))
    }

    /// The entries of a directory.
    pub async fn list_dir(
        &self,
        path: &str,
        user: Option<&str>,
        depth: u32,
    ) -> Result<Vec<EntryInfo>, Error> {
        self.file_call(self.agent.list(path, user, depth)).await
    }

    /// Creates a directory. `false` if it exists.
    pub async fn make_dir(&self, path: &str, user: Option<&str>) -> Result<bool, Error> {
        self.file_call(async {
            match self.agent.make_dir(path, user).await {
                Ok(_) => Ok(true),
                Err(AgentError::AlreadyExists(_)) => Ok(false),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Renames a file or directory.
    pub async fn rename(&self, from: &str, to: &str, user: Option<&str>) -> Result<EntryInfo, Error> {
        self.file_call(self.agent.rename(from, to, user)).await
    }

    /// Removes a file or directory. A missing one is no error.
    pub async fn remove(&self, path: &str, user: Option<&str>) -> Result<(), Error> {
        self.file_call(self.agent.remove(path, user)).await
    }

    /// Opens a file for reading.
    pub async fn open_file(self: &Arc<Self>, read: Read) -> Result<FileReader, Error> {
        let reader = self.file_call(self.agent.read(&read)).await?;
        Ok(FileReader { sandbox: Arc::clone(self), inner: Transfer::new(reader) })
    }

    /// Writes a whole file.
    pub async fn write_file(&self, write: &Write, data: &[u8]) -> Result<EntryInfo, Error> {
        self.file_call(self.agent.write(write, data)).await
    }

    /// Opens a file for writing.
    pub async fn create_file(self: &Arc<Self>, write: Write) -> Result<FileWriter, Error> {
        let writer = self.file_call(self.agent.write_stream(&write)).await?;
        Ok(FileWriter { sandbox: Arc::clone(self), inner: Transfer::new(writer) })
    }
}

/// A transfer that its caller may end at any time, also while a piece of it is on the way.
struct Transfer<T> {
    inner: Mutex<Option<T>>,
    closed: watch::Sender<bool>,
}

impl<T> Transfer<T> {
    fn new(inner: T) -> Self {
        Self { inner: Mutex::new(Some(inner)), closed: watch::Sender::new(false) }
    }

    fn close(&self) {
        self.closed.send_replace(true);
        // A pending operation holds the lock and sees the flag.
        if let Ok(mut inner) = self.inner.try_lock() {
            *inner = None;
        }
    }
}

/// Resolves when the transfer was closed.
async fn closed(mut flag: watch::Receiver<bool>) -> Error {
    let _dropped = flag.wait_for(|yes| *yes).await;
    Error::Cancelled
}

/// The content of a file on its way to the caller.
pub struct FileReader {
    sandbox: Arc<Sandbox>,
    inner: Transfer<agent::FileReader>,
}

impl FileReader {
    /// The next piece; `None` at the end.
    pub async fn next(&self) -> Result<Option<Vec<u8>>, Error> {
        let mut inner = self.inner.inner.lock().await;
        let Some(reader) = inner.as_mut() else { return Ok(None) };
        let piece = tokio::select! {
            piece = self.sandbox.file_call(reader.next()) => piece,
            cancelled = closed(self.inner.closed.subscribe()) => Err(cancelled),
        };
        if !matches!(piece, Ok(Some(_))) {
            *inner = None;
        }
        piece
    }

    /// Ends the transfer.
    pub fn close(&self) {
        self.inner.close();
    }
}

/// The content of a file on its way to the guest.
pub struct FileWriter {
    sandbox: Arc<Sandbox>,
    inner: Transfer<agent::FileWriter>,
}

impl FileWriter {
    /// Sends a piece; resolves when it is on its way.
    pub async fn send(&self, data: &[u8]) -> Result<(), Error> {
        let mut inner = self.inner.inner.lock().await;
        let writer = inner.as_mut().ok_or(Error::Cancelled)?;
        let sent = tokio::select! {
            sent = self.sandbox.file_call(writer.send(data)) => sent,
            cancelled = closed(self.inner.closed.subscribe()) => Err(cancelled),
        };
        if sent.is_err() {
            *inner = None;
        }
        sent
    }

    /// Declares the file complete; resolves when it is in place.
    pub async fn finish(&self) -> Result<EntryInfo, Error> {
        let writer = self.inner.inner.lock().await.take().ok_or(Error::Cancelled)?;
        tokio::select! {
            entry = self.sandbox.file_call(writer.finish()) => entry,
            cancelled = closed(self.inner.closed.subscribe()) => Err(cancelled),
        }
    }

    /// Gives the file up: what was there before stays.
    pub fn abort(&self) {
        self.inner.close();
    }
}

impl std::fmt::Debug for FileReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileReader").field("sandbox", &self.sandbox.id()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWriter").field("sandbox", &self.sandbox.id()).finish_non_exhaustive()
    }
}
