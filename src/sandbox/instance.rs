//! One sandbox: a machine with an identity and a lifetime. A task of its own watches for the end, whichever comes first: the deadline, a
//! crash, or a kill. From then on every pending and later operation fails with the reason.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use amber_layers::{SnapshotId, Store};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::time::Instant;

use super::registry::registry;
use super::vm::{Facts, Vm};
use super::{Ended, Error};
use crate::agent::{Agent, AgentError};

/// How long a lost connection waits for the news of the machine's end before it is reported as such. Ending takes some
/// milliseconds, and longer on a busy host; an agent that loses connections without a machine that ends is broken anyway.
const NEWS: Duration = Duration::from_secs(10);

/// Why the machine ended, if `failure` is what its end looks like from a connection: connections break a moment before the
/// end is known.
pub(super) async fn end_behind(failure: &AgentError, ended: impl Future<Output = Ended>) -> Option<Ended> {
    if !matches!(failure, AgentError::ConnectionLost(_) | AgentError::Unreachable(_)) {
        return None;
    }
    tokio::time::timeout(NEWS, ended).await.ok()
}

/// Longest life: far beyond any use, and safe in all arithmetic of clocks.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// When a sandbox's life ends, on both clocks.
#[derive(Debug, Clone, Copy)]
struct Lifetime {
    deadline: Instant,
    end_at: SystemTime,
}

impl Lifetime {
    fn from_now(life: Duration) -> Self {
        let life = life.min(LONGEST);
        Self { deadline: Instant::now() + life, end_at: SystemTime::now() + life }
    }
}

/// What a new sandbox is made of, beyond its machine.
pub(super) struct Identity {
    pub(super) id: String,
    pub(super) store: Arc<Store>,
    pub(super) home: PathBuf,
    pub(super) template: SnapshotId,
    pub(super) template_name: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) access_token: String,
    pub(super) life: Duration,
}

/// One sandbox of this process.
pub struct Sandbox {
    identity: Identity,
    started_at: SystemTime,
    vm: Arc<dyn Vm>,
    pub(super) agent: Agent,
    lifetime: watch::Sender<Lifetime>,
    ended: watch::Sender<Option<Ended>>,
    /// Held by a snapshot, and by a kill, which waits for a snapshot in progress.
    pub(super) exclusive: Arc<Mutex<()>>,
}

impl Sandbox {
    /// Takes a machine whose agent has been identified. The caller registers and watches it.
    pub(super) fn new(identity: Identity, vm: Arc<dyn Vm>) -> Arc<Self> {
        let agent = Agent::new(vm.connector());
        let lifetime = watch::Sender::new(Lifetime::from_now(identity.life));
        Arc::new(Self {
            identity,
            started_at: SystemTime::now(),
            vm,
            agent,
            lifetime,
            ended: watch::Sender::new(None),
            exclusive: Arc::default(),
        })
    }

    /// Starts the task that ends the sandbox when its time has come or its machine has stopped.
    pub(super) fn watch(self: &Arc<Self>) {
        let sandbox = Arc::clone(self);
        tokio::spawn(async move {
            let mut lifetime = sandbox.lifetime.subscribe();
            let mut ended = sandbox.ended.subscribe();
            let crashed = sandbox.vm.ended();
            tokio::pin!(crashed);
            loop {
                let deadline = lifetime.borrow_and_update().deadline;
                tokio::select! {
                    _ = wait_end(&mut ended) => return,
                    reason = &mut crashed => {
                        sandbox.finish(reason);
                        let _joined = sandbox.stop_machine().await;
                        return;
                    }
                    () = tokio::time::sleep_until(deadline) => {
                        // `setTimeout` may have moved the end in the same instant.
                        if lifetime.borrow().deadline <= Instant::now() {
                            let _ended = sandbox.terminate(Ended::TimedOut).await;
                            return;
                        }
                    }
                    _ = lifetime.changed() => {}
                }
            }
        });
    }

    /// Id of the sandbox.
    pub fn id(&self) -> &str {
        &self.identity.id
    }

    /// Directory of the store it belongs to.
    pub(super) fn home(&self) -> &PathBuf {
        &self.identity.home
    }

    /// The store it belongs to.
    pub(super) fn store(&self) -> &Arc<Store> {
        &self.identity.store
    }

    /// The machine that runs it.
    pub(super) fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// Template or snapshot it was created from.
    pub fn template(&self) -> &SnapshotId {
        &self.identity.template
    }

    /// Name of the template or snapshot it was created from.
    pub fn template_name(&self) -> Option<&str> {
        self.identity.template_name.as_deref()
    }

    /// Metadata given when it was created.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.identity.metadata
    }

    /// Secret that tells this sandbox's requests from those of its copies; different even in copies of one snapshot.
    pub fn access_token(&self) -> &str {
        &self.identity.access_token
    }

    /// When it was created.
    pub fn started_at(&self) -> SystemTime {
        self.started_at
    }

    /// When its life will end.
    pub fn end_at(&self) -> SystemTime {
        self.lifetime.borrow().end_at
    }

    /// What its machine says about itself.
    pub fn facts(&self) -> Facts {
        self.vm.facts()
    }

    /// Why it is not there any more, if so.
    pub fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Sets the end of its life to `life` from now, earlier or later than it was.
    pub fn set_timeout(&self, life: Duration) {
        self.lifetime.send_replace(Lifetime::from_now(life));
    }

    /// Moves the end of its life to `life` from now unless it is later already.
    pub fn extend(&self, life: Duration) {
        let wanted = Lifetime::from_now(life);
        self.lifetime.send_if_modified(|lifetime| {
            let later = wanted.deadline > lifetime.deadline;
            if later {
                *lifetime = wanted;
            }
            later
        });
    }

    /// Waits until nobody else takes a snapshot of it or ends it, and keeps others from it.
    ///
    /// # Errors
    /// The sandbox has ended meanwhile.
    pub(super) async fn exclusive(&self) -> Result<OwnedMutexGuard<()>, Error> {
        let mut ended = self.ended.subscribe();
        tokio::select! {
            biased;
            reason = wait_end(&mut ended) => Err(Error::from(&reason)),
            guard = Arc::clone(&self.exclusive).lock_owned() => Ok(guard),
        }
    }

    /// Ends the sandbox; waits for a snapshot in progress and for the machine's threads. `false` if it had ended before.
    pub async fn kill(&self) -> Result<bool, Error> {
        self.terminate(Ended::Killed).await
    }

    async fn terminate(&self, reason: Ended) -> Result<bool, Error> {
        // First of all, so that snapshots that wait for their turn fail instead of being waited for.
        let first = self.finish(reason);
        let _exclusive = self.exclusive.lock().await;
        self.stop_machine().await?;
        Ok(first)
    }

    /// Records the end, once, and takes the sandbox out of the registry.
    fn finish(&self, reason: Ended) -> bool {
        let first = self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(reason.clone());
            }
            first
        });
        if first {
            registry().retire(self.id(), reason);
        }
        first
    }

    async fn stop_machine(&self) -> Result<(), Error> {
        let vm = Arc::clone(&self.vm);
        tokio::task::spawn_blocking(move || vm.kill()).await.map_err(Error::panicked)
    }

    /// Carries out an operation of the agent, unless and until the sandbox ends.
    pub(super) async fn agent_call<T>(
        &self,
        operation: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, Error> {
        self.guarded(operation, Error::from).await
    }

    /// Carries out an operation of the agent on files: "not found" then means a file.
    pub(super) async fn file_call<T>(
        &self,
        operation: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, Error> {
        self.guarded(operation, Error::of_file).await
    }

    async fn guarded<T>(
        &self,
        operation: impl Future<Output = Result<T, AgentError>>,
        map: impl FnOnce(AgentError) -> Error,
    ) -> Result<T, Error> {
        let mut ended = self.ended.subscribe();
        let failure = tokio::select! {
            biased;
            result = operation => match result {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            },
            reason = wait_end(&mut ended) => return Err(Error::from(&reason)),
        };
        match end_behind(&failure, wait_end(&mut ended)).await {
            Some(reason) => Err(Error::from(&reason)),
            None => Err(map(failure)),
        }
    }
}

/// Waits for the end of a sandbox.
async fn wait_end(ended: &mut watch::Receiver<Option<Ended>>) -> Ended {
    match ended.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or(Ended::Killed),
        // The sender lives in the sandbox that is borrowed meanwhile.
        Err(_) => Ended::Killed,
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.identity.id)
            .field("ended", &self.ended())
            .finish_non_exhaustive()
    }
}
