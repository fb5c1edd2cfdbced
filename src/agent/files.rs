//! Files of the guest: metadata operations, and contents as streams that never hold more than one chunk.

use std::collections::BTreeMap;

use amber_proto::{EntryInfo, Kind, List, MakeDir, Read, ReadStart, Remove, Rename, Stat, Write, header};

use super::conn::Conn;
use super::{Agent, AgentError};

impl Agent {
    /// One directory entry; links are not followed.
    pub async fn stat(&self, path: &str, user: Option<&str>) -> Result<EntryInfo, AgentError> {
        self.call(&Stat { path: path.into(), user: user.map(Into::into) }).await
    }

    /// The entries of a directory, depth first in the order of names.
    pub async fn list(
        &self,
        path: &str,
        user: Option<&str>,
        depth: u32,
    ) -> Result<Vec<EntryInfo>, AgentError> {
        let mut conn = self.open(&List { path: path.into(), user: user.map(Into::into), depth }).await?;
        let mut entries = Vec::new();
        loop {
            let reply = conn.reply::<List>().await?;
            entries.extend(reply.entries);
            if !reply.more {
                return Ok(entries);
            }
        }
    }

    /// Opens a regular file for reading.
    pub async fn read(&self, read: &Read) -> Result<FileReader, AgentError> {
        let mut conn = self.open(read).await?;
        let start = conn.reply::<Read>().await?;
        Ok(FileReader { conn, start, ended: false })
    }

    /// Writes a file from one buffer.
    pub async fn write(&self, write: &Write, data: &[u8]) -> Result<EntryInfo, AgentError> {
        let write = Write { length: u64::try_from(data.len()).ok(), ..write.clone() };
        let mut conn = self.open_with(&write, data).await?;
        conn.reply::<Write>().await
    }

    /// Writes a file piece by piece. Nothing changes under its name before [`FileWriter::finish`], unless the file is new.
    pub async fn write_stream(&self, write: &Write) -> Result<FileWriter, AgentError> {
        Ok(FileWriter { conn: self.open(write).await? })
    }

    /// Creates a directory with its parents. [`AgentError::AlreadyExists`] if it is there.
    pub async fn make_dir(&self, path: &str, user: Option<&str>) -> Result<EntryInfo, AgentError> {
        self.call(&MakeDir { path: path.into(), user: user.map(Into::into) }).await
    }

    /// Renames a file or directory; creates the parents of the new path.
    pub async fn rename(&self, from: &str, to: &str, user: Option<&str>) -> Result<EntryInfo, AgentError> {
        self.call(&Rename { from: from.into(), to: to.into(), user: user.map(Into::into) }).await
    }

    /// Removes a file, or a directory with its content. A missing path is no error.
    pub async fn remove(&self, path: &str, user: Option<&str>) -> Result<(), AgentError> {
        self.call(&Remove { path: path.into(), user: user.map(Into::into) }).await.map(drop)
    }

    /// Writes a file with metadata and defaults for everything else.
    pub async fn write_file(
        &self,
        path: &str,
        user: Option<&str>,
        metadata: BTreeMap<String, String>,
        data: &[u8],
    ) -> Result<EntryInfo, AgentError> {
        let write = Write { path: path.into(), user: user.map(Into::into), metadata, ..Write::default() };
        self.write(&write, data).await
    }

    /// Reads a whole file. The caller bounds it by `limit`: a longer file is [`AgentError::InvalidArgument`].
    pub async fn read_file(&self, path: &str, user: Option<&str>, limit: u64) -> Result<Vec<u8>, AgentError> {
        let mut reader =
            self.read(&Read { path: path.into(), user: user.map(Into::into), ..Read::default() }).await?;
        let mut content = Vec::new();
        while let Some(chunk) = reader.next().await? {
            if content.len() as u64 + chunk.len() as u64 > limit {
                return Err(AgentError::InvalidArgument(format!(
                    "File '{path}' is larger than {limit} bytes, read it as a stream"
                )));
            }
            if content.is_empty() {
                content = chunk;
            } else {
                content.extend_from_slice(&chunk);
            }
        }
        Ok(content)
    }
}

/// The contents of a file on their way. Dropping it ends the transfer.
pub struct FileReader {
    conn: Conn,
    start: ReadStart,
    ended: bool,
}

impl FileReader {
    /// Size of the file when it was opened; files of `/proc` say 0 and have content all the same.
    pub fn size(&self) -> u64 {
        self.start.size
    }

    /// Last change of the content, nanoseconds since the epoch.
    pub fn modified_ns(&self) -> i64 {
        self.start.modified_ns
    }

    /// The next piece; `None` at the end. A connection that is cut is an error, never a short file. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, AgentError> {
        while !self.ended {
            let frame = self.conn.expect().await?;
            match frame.kind {
                Kind::DATA => return Ok(Some(frame.payload)),
                Kind::END => self.ended = true,
                _ => {}
            }
        }
        Ok(None)
    }
}

impl std::fmt::Debug for FileReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileReader")
            .field("start", &self.start)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// A file being written. Dropping it before [`FileWriter::finish`] leaves what was there before.
pub struct FileWriter {
    conn: Conn,
}

impl FileWriter {
    /// Sends a piece; returns when it is on its way, and with the guest's error as soon as the guest refuses. Not cancel safe: after
    /// a cancelled send the writer must be dropped.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), AgentError> {
        self.conn.send_data(data).await
    }

    /// Declares the file complete and waits until it is in place.
    pub async fn finish(mut self) -> Result<EntryInfo, AgentError> {
        self.conn.send(&header(Kind::END, 0)).await?;
        self.conn.reply::<Write>().await
    }
}

impl std::fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWriter").finish_non_exhaustive()
    }
}
