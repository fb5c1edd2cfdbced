//! Pause and resume. A paused sandbox is a snapshot of kind *sandbox* whose id is the sandbox's own: its machine is gone from memory, and
//! any process that opens the store can let it go on. It exists once: whoever resumes it takes it out of the store (a claim), and what it
//! was paused as is deleted when it ends or is paused again.
//!
//! Changes of one sandbox's state in this process take turns ([`turn`]); between processes the claim decides.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use amber_layers::{Claim, Kind, NewSnapshot, Snapshot, SnapshotId, SnapshotMeta, Store, StoreError};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::create::{self, Introduction};
use super::instance::Identity;
use super::profile::{Profile, SandboxInfo, State};
use super::registry::{Asleep, registry};
use super::snapshots::{go_on, stand_still};
use super::stores::{self, Places};
use super::vm::{Facts, Orphan};
use super::{Ended, Error, Sandbox, blocking};
use crate::machine::Content;

/// How long a guest may take to write its files back before it is paused with its memory.
const SYNC_LIMIT: Duration = Duration::from_secs(5);

/// What a resumed sandbox goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnResume {
    /// Its memory, if it was kept.
    #[default]
    Restore,
    /// Its disk alone: it boots.
    Reboot,
}

type Turns = HashMap<String, Weak<Mutex<()>>>;
static TURNS: LazyLock<std::sync::Mutex<Turns>> = LazyLock::new(Default::default);

/// Waits until nobody else changes the state of this sandbox.
pub(super) async fn turn(id: &str) -> OwnedMutexGuard<()> {
    let lock = {
        let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        let known = turns.get(id).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            turns.retain(|_, lock| lock.strong_count() > 0);
            let lock = Arc::default();
            turns.insert(id.to_owned(), Arc::downgrade(&lock));
            lock
        })
    };
    lock.lock_owned().await
}

/// Runs a change of state to its end even if its caller gives up.
async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(change).await.map_err(Error::panicked)?
}

/// No sandbox with this id runs here or is paused.
fn not_paused(id: &str) -> Error {
    Error::SandboxNotFound(format!("Paused sandbox {id} not found"))
}

/// The state of a paused sandbox, if there is one. Blocks.
fn find(home: &Path, id: &str) -> Result<Option<(Arc<Store>, SnapshotMeta)>, Error> {
    let Some(store) = stores::existing(home)? else { return Ok(None) };
    let Ok(key) = SnapshotId::parse(id) else { return Ok(None) };
    let meta = store.meta(&key, amber_layers::DEFAULT_TAG)?;
    let own = |meta: &SnapshotMeta| meta.kind == Kind::Sandbox && meta.source.as_deref() == Some(id);
    Ok(meta.filter(own).map(|meta| (store, meta)))
}

/// What is known about a paused sandbox.
pub(super) fn info(meta: &SnapshotMeta) -> Result<SandboxInfo, Error> {
    let profile = Profile::from_json(&meta.metadata)?;
    let facts = Facts {
        cpu_count: profile.cpu_count,
        memory_mb: profile.memory_mb,
        backend: "none",
        backend_reason: "the sandbox is paused".to_owned(),
    };
    Ok(SandboxInfo {
        id: meta.source.clone().unwrap_or_default(),
        end_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(meta.created_ns),
        state: State::Paused,
        profile,
        facts,
    })
}

/// The paused sandboxes of a store. Blocks.
pub(super) fn list(home: &Path) -> Result<Vec<SandboxInfo>, Error> {
    let Some(store) = stores::existing(home)? else { return Ok(Vec::new()) };
    let filter = amber_layers::ListFilter { kind: Some(Kind::Sandbox), ..Default::default() };
    let all = store.list(&filter)?;
    let own = all.iter().filter(|meta| meta.source.as_deref() == Some(meta.id.as_str()));
    // A damaged one is left out here; resuming it says what is wrong.
    Ok(own.filter_map(|meta| info(meta).ok()).collect())
}

/// What is known about a sandbox of this process, or a paused one.
pub async fn get_info(id: String, places: Places) -> Result<SandboxInfo, Error> {
    match registry().find_live(&id) {
        Ok(sandbox) => return Ok(sandbox.info()),
        Err(error @ Error::SandboxCrashed { .. }) => return Err(error),
        Err(_) => {}
    }
    blocking(move || match find(&places.home, &id)? {
        Some((_, meta)) => info(&meta),
        None => Err(Error::no_sandbox(&id)),
    })
    .await
}

/// Whether a sandbox is paused.
pub(super) async fn is_paused(id: String, places: Places) -> Result<bool, Error> {
    blocking(move || Ok(find(&places.home, &id)?.is_some())).await
}

/// Pauses a sandbox of this process. `false` if it is paused already.
pub async fn pause(id: String, places: Places, keep_memory: bool) -> Result<bool, Error> {
    to_its_end(async move {
        let _turn = turn(&id).await;
        match registry().find_live(&id) {
            Ok(sandbox) => pause_running(&sandbox, keep_memory).await.map(|()| true),
            Err(error @ Error::SandboxCrashed { .. }) => Err(error),
            Err(_) if is_paused(id.clone(), places).await? => Ok(false),
            Err(_) => Err(Error::no_sandbox(&id)),
        }
    })
    .await
}

/// Pauses a sandbox at the end of its time. The caller is the task that watches it.
pub(super) async fn pause_overdue(sandbox: &Arc<Sandbox>, keep_memory: bool) -> Result<(), Error> {
    let _turn = turn(sandbox.id()).await;
    if sandbox.ended().is_some() || !sandbox.overdue() {
        return Ok(());
    }
    pause_running(sandbox, keep_memory).await
}

/// The caller has the turn.
async fn pause_running(sandbox: &Arc<Sandbox>, keep_memory: bool) -> Result<(), Error> {
    let gone = |ended: Ended| match Error::from(&ended) {
        Error::SandboxKilled(_) => Error::no_sandbox(sandbox.id()),
        other => other,
    };
    // Snapshots in progress come first.
    let exclusive = sandbox.exclusive().await;
    if let Some(ended) = sandbox.ended() {
        return Err(gone(ended));
    }
    let exclusive = exclusive?;
    let content = if keep_memory { Content::Full } else { Content::Disk };
    stand_still(sandbox, content).await?;
    if keep_memory {
        // So that it can also boot from what is on its disk. Memory holds what is not there yet.
        let _ = tokio::time::timeout(SYNC_LIMIT, sandbox.agent_call(sandbox.agent.sync())).await;
    }
    let snapshot = NewSnapshot {
        kind: Kind::Sandbox,
        id: Some(SnapshotId::parse(sandbox.id())?),
        source: Some(sandbox.id().to_owned()),
        metadata: sandbox.profile().to_json()?,
        ..NewSnapshot::default()
    };
    let owner = Arc::clone(sandbox);
    let taken = blocking(move || owner.vm().suspend(owner.store(), snapshot, content)).await;
    if let Err(error) = taken {
        go_on(sandbox).await;
        // A machine that stopped meanwhile is the cause, whatever the capture made of it.
        return Err(match sandbox.ended() {
            Some(ended) => gone(ended),
            None => error,
        });
    }
    let asleep = sandbox.sleep(keep_memory);
    let stopped = sandbox.stop_machine().await;
    drop(exclusive);
    if !asleep && let Some(ended) = sandbox.ended() {
        // It came to another end meanwhile, and that counts.
        let (home, id) = (sandbox.places().home.clone(), sandbox.id().to_owned());
        blocking(move || discard(&home, &id)).await?;
        return Err(gone(ended));
    }
    stopped
}

/// Deletes a paused sandbox. `false` if there is none. Blocks.
fn discard(home: &Path, id: &str) -> Result<bool, Error> {
    let Some((store, meta)) = find(home, id)? else { return Ok(false) };
    // Dropping the claim deletes what was claimed.
    Ok(store.claim(&meta.id)?.is_some())
}

/// Gives a sandbox of this process, whose end moves to `life` from now unless it is later already; or resumes a paused one, with that life.
pub async fn connect(
    id: String,
    places: Places,
    life: Duration,
    on_resume: OnResume,
) -> Result<Arc<Sandbox>, Error> {
    to_its_end(async move {
        let _turn = turn(&id).await;
        match registry().find_live(&id) {
            Ok(sandbox) => {
                sandbox.extend(life);
                Ok(sandbox)
            }
            Err(error @ Error::SandboxCrashed { .. }) => Err(error),
            Err(_) => resume(id, places, life, on_resume).await,
        }
    })
    .await
}

/// The sandbox, for an operation inside it: a paused one is resumed first if it was created so.
pub async fn awake(id: &str) -> Result<Arc<Sandbox>, Error> {
    let found = registry().find(id);
    match (&found, registry().asleep(id)) {
        (Err(Error::SandboxPaused), Some(asleep)) if asleep.auto_resume => {
            connect(id.to_owned(), asleep.places, asleep.life, OnResume::Restore).await
        }
        _ => found,
    }
}

/// A paused sandbox that has been taken out of the store.
struct Taken {
    store: Arc<Store>,
    profile: Profile,
    claim: Claim,
    vm: Orphan,
    booted: bool,
}

/// The caller has the turn.
async fn resume(
    id: String,
    places: Places,
    life: Duration,
    on_resume: OnResume,
) -> Result<Arc<Sandbox>, Error> {
    let (wanted, from) = (id.clone(), places.clone());
    let Taken { store, profile, claim, vm, booted } =
        match blocking(move || take(&from, &wanted, on_resume)).await {
            Err(error @ Error::SandboxNotFound(_)) => {
                registry().forget(&id);
                return Err(error);
            }
            taken => taken?,
        };
    let introduction = if booted {
        Introduction::Booted { id: &id, envs: profile.envs.clone(), machine_id: None }
    } else {
        Introduction::Resumed { id: &id }
    };
    if let Err(error) = create::introduce(&**vm.vm(), introduction).await {
        // It stays paused. Its machine lets go of the layers by itself.
        blocking(move || Ok(claim.put_back()?)).await?;
        return Err(error);
    }
    let identity = Identity { id, store, places, profile, life, claim: Some(Arc::new(claim)) };
    Ok(Sandbox::launch(identity, vm.adopt()))
}

/// Blocks.
fn take(places: &Places, id: &str, on_resume: OnResume) -> Result<Taken, Error> {
    let (store, meta) = find(&places.home, id)?.ok_or_else(|| not_paused(id))?;
    let profile = Profile::from_json(&meta.metadata)?;
    // Opened first: from then on its layers stay, whoever collects.
    let snapshot: Arc<Snapshot> = match store.open_tagged(&meta.id, &meta.tag) {
        Err(StoreError::NotFound { .. }) => return Err(not_paused(id)),
        opened => opened?,
    };
    let claim = store.claim(&meta.id)?.ok_or_else(|| not_paused(id))?;
    let booted = on_resume == OnResume::Reboot || Content::of(&snapshot) == Content::Disk;
    match create::start(&store, places, &snapshot, booted) {
        Ok(vm) => Ok(Taken { store, profile, claim, vm, booted }),
        Err(error) => {
            claim.put_back()?;
            Err(error)
        }
    }
}

/// Ends a sandbox of this process, or deletes a paused one. `false` if there is none.
pub async fn kill(id: String, places: Places) -> Result<bool, Error> {
    to_its_end(async move {
        let _turn = turn(&id).await;
        if let Ok(sandbox) = registry().find(&id) {
            return sandbox.kill().await;
        }
        let wanted = id.clone();
        let deleted = blocking(move || discard(&places.home, &wanted)).await?;
        registry().forget(&id);
        Ok(deleted)
    })
    .await
}

impl Sandbox {
    /// Records that it is paused, so that calls in this process find it. `false` if it has ended before.
    fn sleep(&self, keep_memory: bool) -> bool {
        let asleep = Asleep {
            places: self.places().clone(),
            life: Duration::from_millis(self.profile().life_ms),
            // What booted anew is not what the request was meant for.
            auto_resume: self.profile().lifecycle.auto_resume && keep_memory,
        };
        self.finish(Ended::Paused, Some(asleep))
    }
}
