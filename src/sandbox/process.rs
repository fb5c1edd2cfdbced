//! A process of a sandbox as its caller sees it: events pulled one at a time, with the deadline and the end of the sandbox folded in.

use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::{Error, Sandbox};
use crate::agent::{self, AgentError, Event};
use std::sync::Arc;

/// How much longer than the guest the host waits before it ends an overdue command itself. The agent kills on time; this is for a guest that
/// does not get to run its agent any more.
const GRACE: Duration = Duration::from_secs(5);

/// `SIGKILL`
const SIGKILL: i32 = 9;

/// What happens when a stream's time is up.
#[derive(Debug, Clone, Copy)]
pub(super) enum Overdue {
    /// The process is killed: it was started with this limit.
    Kill,
    /// The stream ends, the process goes on: it was connected to with this limit.
    Disconnect,
}

/// Events handed over at once: fewer crossings into JavaScript while a process writes many small pieces.
const BATCH: usize = 64;

/// A process while somebody listens.
struct Live {
    process: agent::Process,
    /// What was read ahead and is not output.
    held: Option<Result<Option<Event>, AgentError>>,
}

/// A started or connected process.
pub struct Process {
    sandbox: Arc<Sandbox>,
    pid: u32,
    inner: Mutex<Option<Live>>,
    disconnected: watch::Sender<bool>,
    deadline: Option<Instant>,
    overdue: Overdue,
}

impl Process {
    /// `timeout_ms` 0 means no limit.
    pub(super) fn new(
        sandbox: Arc<Sandbox>,
        inner: agent::Process,
        timeout_ms: u64,
        overdue: Overdue,
    ) -> Self {
        let grace = match overdue {
            Overdue::Kill => GRACE,
            Overdue::Disconnect => Duration::ZERO,
        };
        let deadline = (timeout_ms > 0)
            .then(|| Instant::now().checked_add(Duration::from_millis(timeout_ms).saturating_add(grace)))
            .flatten();
        Self {
            sandbox,
            pid: inner.pid(),
            inner: Mutex::new(Some(Live { process: inner, held: None })),
            disconnected: watch::Sender::new(false),
            deadline,
            overdue,
        }
    }

    /// Process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The next events: waits for one, and adds those that have arrived with it. `None` after the end and after
    /// [`Process::disconnect`].
    pub async fn next(&self) -> Result<Option<Vec<Event>>, Error> {
        let mut inner = self.inner.lock().await;
        let Some(live) = inner.as_mut() else { return Ok(None) };
        let mut disconnected = self.disconnected.subscribe();
        let event = match live.held.take() {
            Some(held) => self.sandbox.agent_call(std::future::ready(held)).await,
            None => tokio::select! {
                event = self.sandbox.agent_call(live.process.next()) => event,
                _ = disconnected.wait_for(|yes| *yes) => Ok(None),
                () = sleep_until(self.deadline) => {
                    if matches!(self.overdue, Overdue::Kill) {
                        // The guest is beyond its own deadline: it may not answer at all, so nobody waits for it.
                        let sandbox = Arc::clone(&self.sandbox);
                        let pid = self.pid;
                        tokio::spawn(async move { sandbox.signal(pid, SIGKILL).await });
                    }
                    Err(self.timeout())
                }
            },
        };
        match event {
            Ok(Some(Event::End(exit))) => {
                *inner = None;
                if exit.timed_out { Err(self.timeout()) } else { Ok(Some(vec![Event::End(exit)])) }
            }
            Ok(Some(event)) => {
                let mut events = vec![event];
                while events.len() < BATCH {
                    match live.process.ready() {
                        Ok(Some(event @ (Event::Stdout(_) | Event::Stderr(_) | Event::Pty(_)))) => {
                            events.push(event)
                        }
                        Ok(None) => break,
                        // The end, or a failure: the next call's.
                        last => {
                            live.held = Some(last);
                            break;
                        }
                    }
                }
                Ok(Some(events))
            }
            other => {
                *inner = None;
                other.map(|_| None)
            }
        }
    }

    /// Stops listening: the process goes on.
    pub fn disconnect(&self) {
        self.disconnected.send_replace(true);
        // A pending `next` holds the lock and sees the flag; otherwise nobody would drop the connection.
        if let Ok(mut inner) = self.inner.try_lock() {
            *inner = None;
        }
    }

    fn timeout(&self) -> Error {
        let what = match self.overdue {
            Overdue::Kill => "The command was killed because it ran longer than its 'timeoutMs'",
            Overdue::Disconnect => "The connection to the command was open longer than its 'timeoutMs'",
        };
        Error::Timeout(format!("{what}: pass a larger value, or 0 for no limit"))
    }
}

/// Never returns without a deadline.
pub(super) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process")
            .field("sandbox", &self.sandbox.id())
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}
