//! A watched directory of a sandbox as its caller sees it, with the deadline and the end of the sandbox folded in.

use std::sync::Arc;
use std::time::Duration;

use amber_proto::{Watch, WatchEvent};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::process::sleep_until;
use super::{Error, Sandbox};
use crate::agent;

/// A watched directory.
pub struct Watcher {
    sandbox: Arc<Sandbox>,
    inner: Mutex<Option<agent::Watched>>,
    stopped: watch::Sender<bool>,
    deadline: Option<Instant>,
}

impl Sandbox {
    /// Watches a directory for at most `timeout_ms`; 0 means no limit.
    pub async fn watch_dir(self: &Arc<Self>, request: Watch, timeout_ms: u64) -> Result<Watcher, Error> {
        let watched = self.file_call(self.agent.watch(&request)).await?;
        let deadline =
            (timeout_ms > 0).then(|| Instant::now().checked_add(Duration::from_millis(timeout_ms))).flatten();
        Ok(Watcher {
            sandbox: Arc::clone(self),
            inner: Mutex::new(Some(watched)),
            stopped: watch::Sender::new(false),
            deadline,
        })
    }
}

impl Watcher {
    /// The next changes, at least one; `None` when the directory is gone and after [`Watcher::stop`].
    pub async fn next(&self) -> Result<Option<Vec<WatchEvent>>, Error> {
        let mut inner = self.inner.lock().await;
        let Some(watched) = inner.as_mut() else { return Ok(None) };
        let mut stopped = self.stopped.subscribe();
        let events = tokio::select! {
            events = self.sandbox.file_call(watched.next()) => events,
            _ = stopped.wait_for(|yes| *yes) => Ok(None),
            () = sleep_until(self.deadline) => Err(Error::Timeout(
                "The directory was watched longer than the 'timeoutMs' of the watch: pass a larger value, or 0 for no limit".to_owned(),
            )),
        };
        if !matches!(events, Ok(Some(_))) {
            *inner = None;
        }
        events
    }

    /// Ends the watch.
    pub fn stop(&self) {
        self.stopped.send_replace(true);
        // A pending `next` holds the lock and sees the flag.
        if let Ok(mut inner) = self.inner.try_lock() {
            *inner = None;
        }
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").field("sandbox", &self.sandbox.id()).finish_non_exhaustive()
    }
}
