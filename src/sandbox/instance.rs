//! One sandbox: a machine with an identity and a lifetime. A task of its own watches for the end, whichever comes first: the deadline, a
//! crash, or a kill. From then on every pending and later operation fails with the reason.

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use amber_layers::{Claim, SnapshotId, Store};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::time::Instant;

use super::metrics::History;
use super::paused;
use super::profile::{OnTimeout, Profile, SandboxInfo, State};
use super::registry::{Asleep, registry};
use super::stores::Places;
use super::vm::Vm;
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

/// How long a sandbox lives on that should have been paused and could not be.
const SECOND_TRY: Duration = Duration::from_secs(60);

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
    pub(super) places: Places,
    pub(super) profile: Profile,
    pub(super) life: Duration,
    /// What it goes on from, if nobody else shall: deleted at its end.
    pub(super) claim: Option<Arc<Claim>>,
}

/// One sandbox of this process.
pub struct Sandbox {
    id: String,
    store: Arc<Store>,
    places: Places,
    profile: RwLock<Profile>,
    template: Option<SnapshotId>,
    vm: Arc<dyn Vm>,
    pub(super) agent: Agent,
    lifetime: watch::Sender<Lifetime>,
    ended: watch::Sender<Option<Ended>>,
    claim: std::sync::Mutex<Option<Arc<Claim>>>,
    pub(super) history: History,
    /// Held by a snapshot, and by a kill, which waits for a snapshot in progress.
    pub(super) exclusive: Arc<Mutex<()>>,
}

impl Sandbox {
    /// Takes a machine whose agent has been identified. The caller registers and watches it.
    pub(super) fn new(identity: Identity, vm: Arc<dyn Vm>) -> Arc<Self> {
        let Identity { id, store, places, mut profile, life, claim } = identity;
        let facts = vm.facts();
        (profile.cpu_count, profile.memory_mb) = (facts.cpu_count, facts.memory_mb);
        let lifetime = Lifetime::from_now(life);
        profile.life_ms = millis(life);
        Arc::new(Self {
            template: profile.template_id().ok(),
            id,
            store,
            places,
            profile: RwLock::new(profile),
            agent: Agent::new(vm.connector()),
            history: History::new(vm.cpu_time()),
            vm,
            lifetime: watch::Sender::new(lifetime),
            ended: watch::Sender::new(None),
            claim: std::sync::Mutex::new(claim),
            exclusive: Arc::default(),
        })
    }

    /// A sandbox that is known in this process and ends in its time.
    pub(super) fn launch(identity: Identity, vm: Arc<dyn Vm>) -> Arc<Self> {
        let sandbox = Self::new(identity, vm);
        registry().insert(&sandbox);
        sandbox.watch();
        sandbox.sample();
        sandbox
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
                        sandbox.finish(reason, None);
                        let _joined = sandbox.stop_machine().await;
                        return;
                    }
                    () = tokio::time::sleep_until(deadline) => {
                        // `setTimeout` may have moved the end in the same instant.
                        if sandbox.overdue() && sandbox.end_of_life().await {
                            return;
                        }
                    }
                    _ = lifetime.changed() => {}
                }
            }
        });
    }

    /// Whether its time is up.
    pub(super) fn overdue(&self) -> bool {
        self.lifetime.borrow().deadline <= Instant::now()
    }

    /// Does what is to be done when its time is up. `false` if it goes on.
    async fn end_of_life(self: &Arc<Self>) -> bool {
        let OnTimeout::Pause { keep_memory } = self.profile().lifecycle.on_timeout else {
            // A pause that has begun comes first.
            let _turn = paused::turn(self.id()).await;
            if self.overdue() {
                let _ended = self.terminate(Ended::TimedOut).await;
            }
            return self.ended().is_some();
        };
        if let Err(error) = paused::pause_overdue(self, keep_memory).await
            && self.ended().is_none()
        {
            // Its user wanted nothing to be lost: better a sandbox too many than one that cannot be found again.
            tracing::warn!(sandbox = self.id(), "The sandbox could not be paused at its end: {error}");
            self.extend(SECOND_TRY);
        }
        self.ended().is_some()
    }

    /// Id of the sandbox.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its store and the base template are.
    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// The store it belongs to.
    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The machine that runs it.
    pub(super) fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// What it was created with, and what was changed since.
    pub fn profile(&self) -> Profile {
        self.profile.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what a pause keeps of it.
    pub fn change_profile(&self, change: impl FnOnce(&mut Profile)) {
        change(&mut self.profile.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether it was created from this template or snapshot.
    pub(super) fn is_from(&self, template: &SnapshotId) -> bool {
        self.template.as_ref() == Some(template)
    }

    /// What is known about it.
    pub fn info(&self) -> SandboxInfo {
        SandboxInfo {
            id: self.id.clone(),
            profile: self.profile(),
            end_at: self.end_at(),
            state: State::Running,
            facts: self.vm.facts(),
        }
    }

    /// When its life will end.
    pub fn end_at(&self) -> SystemTime {
        self.lifetime.borrow().end_at
    }

    /// Why it is not there any more, if so.
    pub fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Resolves when it is not there any more.
    pub(super) async fn end(&self) -> Ended {
        wait_end(&mut self.ended.subscribe()).await
    }

    /// Sets the end of its life to `life` from now, earlier or later than it was.
    pub fn set_timeout(&self, life: Duration) {
        self.change_profile(|profile| profile.life_ms = millis(life));
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
        let first = self.finish(reason, None);
        let _exclusive = self.exclusive.lock().await;
        self.stop_machine().await?;
        Ok(first)
    }

    /// Records the end, once, and takes the sandbox out of the registry.
    pub(super) fn finish(&self, reason: Ended, asleep: Option<Asleep>) -> bool {
        let first = self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(reason.clone());
            }
            first
        });
        if first {
            registry().retire(self.id(), reason, asleep);
        }
        first
    }

    /// Stops the machine; what it went on from is deleted when nobody has it any more.
    pub(super) async fn stop_machine(&self) -> Result<(), Error> {
        let vm = Arc::clone(&self.vm);
        let claim = self.claim.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stop = move || {
            vm.kill();
            drop(claim);
        };
        tokio::task::spawn_blocking(stop).await.map_err(Error::panicked)
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
        // Nothing starts on a sandbox that has ended, even where its machine would still answer.
        if let Some(reason) = self.ended() {
            return Err(Error::from(&reason));
        }
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

fn millis(life: Duration) -> u64 {
    u64::try_from(life.min(LONGEST).as_millis()).unwrap_or(u64::MAX)
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
        f.debug_struct("Sandbox").field("id", &self.id).field("ended", &self.ended()).finish_non_exhaustive()
    }
}
