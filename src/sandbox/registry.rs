//! The sandboxes of this process. One registry per process, not per JavaScript realm: every module registry, context and worker thread
//! that loads the addon sees the same sandboxes, as E2B's users expect of an account.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use amber_layers::SnapshotId;

use super::stores::Places;
use super::{Ended, Error, Sandbox, ports};

/// How many ended sandboxes are remembered, so that later calls fail with the reason instead of "not found".
const REMEMBERED: usize = 4096;

static REGISTRY: LazyLock<Registry> = LazyLock::new(Registry::default);

/// The registry of this process.
pub fn registry() -> &'static Registry {
    &REGISTRY
}

/// What this process knows of a sandbox that was paused in it. Whether it still is, the store knows.
#[derive(Debug, Clone)]
pub(super) struct Asleep {
    /// Where its store is.
    pub(super) places: Places,
    /// Its life when a request resumes it.
    pub(super) life: Duration,
    /// Whether a request resumes it.
    pub(super) auto_resume: bool,
}

/// Live sandboxes, the paused ones that were live here, and the recent dead.
#[derive(Debug, Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    live: HashMap<String, Arc<Sandbox>>,
    asleep: HashMap<String, Asleep>,
    ended: HashMap<String, Ended>,
    order: VecDeque<String>,
}

impl Registry {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is one insertion or removal: a panic elsewhere cannot have left the maps half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a sandbox known.
    pub(super) fn insert(&self, sandbox: &Arc<Sandbox>) {
        let mut inner = self.inner();
        inner.asleep.remove(sandbox.id());
        inner.ended.remove(sandbox.id());
        inner.live.insert(sandbox.id().to_owned(), Arc::clone(sandbox));
    }

    /// Takes a sandbox that has ended out of the live ones.
    pub(super) fn retire(&self, id: &str, reason: Ended, asleep: Option<Asleep>) {
        let mut inner = self.inner();
        if inner.live.remove(id).is_none() {
            return;
        }
        match asleep {
            Some(asleep) => {
                inner.asleep.insert(id.to_owned(), asleep);
            }
            None => {
                inner.remember(id, reason);
                drop(inner);
                ports::close(id);
            }
        }
    }

    /// What is known of a sandbox that was paused here.
    pub(super) fn asleep(&self, id: &str) -> Option<Asleep> {
        self.inner().asleep.get(id).cloned()
    }

    /// A paused sandbox is not there any more.
    pub(super) fn forget(&self, id: &str) {
        let mut inner = self.inner();
        if inner.asleep.remove(id).is_some() {
            inner.remember(id, Ended::Killed);
            drop(inner);
            ports::close(id);
        }
    }

    /// The live sandboxes of a store.
    pub(super) fn live_in(&self, home: &Path) -> Vec<Arc<Sandbox>> {
        self.inner().live.values().filter(|sandbox| sandbox.places().home == home).cloned().collect()
    }

    /// A sandbox, for operations inside it: one that has ended fails with the reason.
    pub fn find(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        let inner = self.inner();
        if let Some(sandbox) = inner.live.get(id) {
            return Ok(Arc::clone(sandbox));
        }
        if inner.asleep.contains_key(id) {
            return Err(Error::SandboxPaused);
        }
        Err(inner.ended.get(id).map_or_else(|| Error::no_sandbox(id), Error::from))
    }

    /// A sandbox, for operations on it: one that was killed does not exist any more, nor does one that is paused; one that crashed says
    /// so.
    pub fn find_live(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        match self.find(id) {
            Err(Error::SandboxKilled(_)) => Err(Error::no_sandbox(id)),
            Err(Error::SandboxPaused) => {
                Err(Error::SandboxNotFound(format!("Sandbox '{id}' is paused: connect to it first")))
            }
            other => other,
        }
    }

    /// Every live sandbox of a store that was created from `template`.
    pub(super) fn users_of(&self, home: &Path, template: &SnapshotId) -> Vec<String> {
        let live = self.live_in(home);
        let mut users: Vec<String> =
            live.iter().filter(|sandbox| sandbox.is_from(template)).map(|s| s.id().to_owned()).collect();
        users.sort_unstable();
        users
    }
}

impl Inner {
    /// Remembers why a sandbox ended.
    fn remember(&mut self, id: &str, reason: Ended) {
        if self.ended.insert(id.to_owned(), reason).is_none() {
            self.order.push_back(id.to_owned());
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }
}
