//! Creating a sandbox: find the snapshot, restore its machine (or boot one from its disk), tell it who it is, and only then let anyone
//! see it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use amber_layers::{Claim, Snapshot, Store};
use amber_proto::{Exec, Identify};

use super::instance::{Identity, end_behind};
use super::profile::{Lifecycle, Profile, micros};
use super::stores::{self, Places};
use super::vm::{Orphan, Vm};
use super::{Error, Sandbox, blocking, id, machine, template};
use crate::agent::Agent;
use crate::machine::Content;

/// How long a restored agent may take to answer. It was running when the snapshot was taken, so this is only for a guest that is broken
/// or a host that is far too busy.
const IDENTIFY_LIMIT: Duration = Duration::from_secs(60);

/// How long a guest may take to boot on a very busy host.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Entropy for each copy: more than the kernel's pool holds.
const ENTROPY_BYTES: usize = 128;

/// How long each program of the guest's `/etc/amberbox/restore.d` may take, and how many are run.
const HOOK_LIMIT: Duration = Duration::from_secs(10);
const MAX_HOOKS: usize = 64;

/// What to create.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    /// Where the store and the base template are.
    pub places: Places,
    /// Template, snapshot id or snapshot name.
    pub template: String,
    /// Free key-value pairs.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every command.
    pub envs: BTreeMap<String, String>,
    /// Life, after which happens what `lifecycle` says.
    pub life: Duration,
    /// What happens to it by itself.
    pub lifecycle: Lifecycle,
    /// Rules of its network, as JSON text, for its user to see.
    pub network: Option<String>,
    /// Whether it was allowed to reach the internet, if anything was said.
    pub allow_internet_access: Option<bool>,
    /// Whether HTTP requests to its ports must show a token.
    pub private_ports: bool,
    /// What servers in it see as the `Host` of HTTP requests to its ports, `${PORT}` standing for the port.
    pub mask_request_host: Option<String>,
}

/// What a sandbox starts from.
pub(super) struct Origin {
    pub(super) store: Arc<Store>,
    pub(super) places: Places,
    pub(super) snapshot: Arc<Snapshot>,
    /// The snapshot is deleted with the last sandbox that was made from it.
    pub(super) claim: Option<Arc<Claim>>,
}

/// Creates a sandbox. Dropping the future leaves nothing behind.
pub async fn create(request: CreateRequest) -> Result<Arc<Sandbox>, Error> {
    let CreateRequest { places, template, metadata, envs, life, .. } = request;
    let from = places.clone();
    let (store, meta, snapshot) = blocking(move || {
        let store = stores::open(&from.home)?;
        let meta = template::resolve(&store, &from, &template)?;
        let snapshot = store.open_tagged(&meta.id, &meta.tag)?;
        Ok((store, meta, snapshot))
    })
    .await?;
    let profile = Profile {
        template: meta.id.to_string(),
        template_name: meta.names.first().cloned(),
        metadata,
        envs,
        traffic_token: request.private_ports.then(|| id::hex_token(32)).transpose()?,
        mask_request_host: request.mask_request_host,
        lifecycle: request.lifecycle,
        network: request.network,
        allow_internet_access: request.allow_internet_access,
        ..Profile::default()
    };
    stores::keep_warm(&snapshot);
    copy(Origin { store, places, snapshot, claim: None }, profile, life).await
}

/// A new sandbox that starts as a copy of a snapshot. Its tokens and its time of creation are its own.
pub(super) async fn copy(
    origin: Origin,
    mut profile: Profile,
    life: Duration,
) -> Result<Arc<Sandbox>, Error> {
    let id = id::sandbox_id()?;
    let Origin { store, places, snapshot, claim } = origin;
    let booted = Content::of(&snapshot) == Content::Disk;
    let (from, at) = (Arc::clone(&store), places.clone());
    let vm = blocking(move || start(&from, &at, &snapshot, booted)).await?;
    let machine_id = Some(id::hex_token(16)?);
    let envs = profile.envs.clone();
    let introduction = if booted {
        Introduction::Booted { id: &id, envs, machine_id }
    } else {
        Introduction::Copied { id: &id, envs, machine_id }
    };
    introduce(&**vm.vm(), introduction).await?;
    profile.access_token = id::hex_token(32)?;
    profile.started_us = micros(SystemTime::now());
    let identity = Identity { id, store, places, profile, life, claim };
    Ok(Sandbox::launch(identity, vm.adopt()))
}

/// The machine of a snapshot, running: restored, or booted from its disk. Blocks.
pub(super) fn start(
    store: &Arc<Store>,
    places: &Places,
    snapshot: &Arc<Snapshot>,
    boot: bool,
) -> Result<Orphan, Error> {
    if boot {
        let kernel = template::kernel(store, places)?;
        Ok(Orphan::new(machine::reboot(snapshot, &kernel, store.dir())?))
    } else {
        Ok(Orphan::new(machine::restore(snapshot, store.dir())?))
    }
}

/// What a guest has to be told before anyone else speaks to it.
pub(super) enum Introduction<'a> {
    /// It is a copy of another one.
    Copied {
        /// Its id, and its host name.
        id: &'a str,
        /// Environment of every command.
        envs: BTreeMap<String, String>,
        /// Its machine id.
        machine_id: Option<String>,
    },
    /// It is the same as before, at a later time.
    Resumed {
        /// Its id.
        id: &'a str,
    },
    /// It has booted.
    Booted {
        /// Its id, and its host name.
        id: &'a str,
        /// Environment of every command.
        envs: BTreeMap<String, String>,
        /// Its machine id, if the one on its disk is not its own.
        machine_id: Option<String>,
    },
}

impl Introduction<'_> {
    fn id(&self) -> &str {
        match self {
            Self::Copied { id, .. } | Self::Resumed { id } | Self::Booted { id, .. } => id,
        }
    }

    fn limit(&self) -> Duration {
        match self {
            Self::Copied { .. } | Self::Resumed { .. } => IDENTIFY_LIMIT,
            Self::Booted { .. } => BOOT_LIMIT,
        }
    }

    fn request(&self) -> Result<Identify, Error> {
        let mut entropy = vec![0; ENTROPY_BYTES];
        id::fill_random(&mut entropy)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let request =
            Identify { wall_clock_ns: u64::try_from(now.as_nanos()).ok(), entropy, ..Identify::default() };
        Ok(match self {
            Self::Resumed { id } => Identify { sandbox_id: (*id).to_owned(), ..request },
            Self::Copied { id, envs, machine_id } | Self::Booted { id, envs, machine_id } => Identify {
                sandbox_id: (*id).to_owned(),
                hostname: Some((*id).to_owned()),
                machine_id: machine_id.clone(),
                envs: envs.clone(),
                ..request
            },
        })
    }
}

/// Tells a guest who it is, what time it is, and gives it entropy of its own.
pub(super) async fn introduce(vm: &dyn Vm, introduction: Introduction<'_>) -> Result<(), Error> {
    let agent = Agent::new(vm.connector());
    let limit = introduction.limit();
    let told = async {
        if matches!(introduction, Introduction::Booted { .. }) {
            template::answering(&agent).await;
        }
        Ok::<_, Error>(match agent.identify(&introduction.request()?).await {
            Ok(identified) => Ok(identified),
            Err(failure) => match end_behind(&failure, vm.ended()).await {
                Some(ended) => return Err(Error::from(&ended)),
                None => Err(failure),
            },
        }?)
    };
    tokio::select! {
        identified = told => {
            let identified = identified?;
            for warning in identified.warnings {
                tracing::warn!(sandbox = introduction.id(), "{warning}");
            }
            // They mend what a copy has too much of; a sandbox that goes on or has booted is no copy.
            let copied = matches!(introduction, Introduction::Copied { .. });
            for hook in identified.hooks.into_iter().filter(|_| copied).take(MAX_HOOKS) {
                run_hook(&agent, introduction.id(), hook).await;
            }
            Ok(())
        }
        ended = vm.ended() => Err(Error::from(&ended)),
        () = tokio::time::sleep(limit) => Err(Error::Machine(format!(
            "The guest's agent did not answer within {} s. Its console ends with:\n{}", limit.as_secs(), vm.console()
        ))),
    }
}

/// Runs a program that the guest wants run after a restore. That it fails is the guest's own business.
async fn run_hook(agent: &Agent, id: &str, program: String) {
    let exec = Exec {
        cmd: program.clone(),
        user: Some("root".to_owned()),
        cwd: Some("/".to_owned()),
        timeout_ms: u64::try_from(HOOK_LIMIT.as_millis()).ok(),
        ..Exec::default()
    };
    let ran = async { agent.exec(&exec).await?.wait().await };
    // The guest kills it in time, unless nothing works there any more.
    match tokio::time::timeout(2 * HOOK_LIMIT, ran).await {
        Ok(Ok(exit)) if exit.exit_code == 0 => {}
        Ok(Ok(exit)) => tracing::warn!(sandbox = id, "{program}: {}", exit.status),
        Ok(Err(error)) => tracing::warn!(sandbox = id, %error, "{program}"),
        Err(_) => tracing::warn!(sandbox = id, "{program} did not end"),
    }
}
