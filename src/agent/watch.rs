//! A watched directory: its changes, in batches as the agent sends them.

use amber_proto::{Kind, Watch, WatchEvent, WatchEvents, decode_cbor};

use super::conn::Conn;
use super::{Agent, AgentError};

impl Agent {
    /// Watches a directory: everything that changes after this returns is told.
    pub async fn watch(&self, watch: &Watch) -> Result<Watched, AgentError> {
        let mut conn = self.open(watch).await?;
        conn.reply::<Watch>().await?;
        Ok(Watched { conn, ended: false })
    }
}

/// A watched directory. Dropping it ends the watch. Reading slowly lets the guest's kernel queue up to its limit; then the watch fails.
pub struct Watched {
    conn: Conn,
    ended: bool,
}

impl Watched {
    /// The next changes, at least one; `None` when the directory is gone. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Vec<WatchEvent>>, AgentError> {
        while !self.ended {
            let frame = self.conn.expect().await.inspect_err(|_| self.ended = true)?;
            match frame.kind {
                Kind::EVENTS => {
                    let WatchEvents { events } = decode_cbor(&frame.payload).map_err(AgentError::protocol)?;
                    if !events.is_empty() {
                        return Ok(Some(events));
                    }
                }
                Kind::END => self.ended = true,
                // A newer agent may tell more.
                _ => {}
            }
        }
        Ok(None)
    }
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").field("ended", &self.ended).finish_non_exhaustive()
    }
}
