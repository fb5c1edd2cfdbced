//! Creating a sandbox: find the snapshot, restore its machine, tell the copy who it is, and only then let anyone see it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use amber_proto::{Exec, Identify};

use super::instance::{Identity, end_behind};
use super::registry::registry;
use super::stores::{self, Places};
use super::vm::{Orphan, Vm};
use super::{Error, Sandbox, blocking, id, machine, template};
use crate::agent::Agent;

/// How long a restored agent may take to answer. It was running when the snapshot was taken, so this is only for a guest that is broken
/// or a host that is far too busy.
const IDENTIFY_LIMIT: Duration = Duration::from_secs(60);

/// How long each program of the guest's `/etc/amberbox/restore.d` may take, and how many are run.
const HOOK_LIMIT: Duration = Duration::from_secs(10);
const MAX_HOOKS: usize = 64;

/// Entropy for each copy: more than the kernel's pool holds.
const ENTROPY_BYTES: usize = 128;

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
    /// Life, after which the sandbox is killed.
    pub life: Duration,
}

/// Creates a sandbox. Dropping the future leaves nothing behind.
pub async fn create(request: CreateRequest) -> Result<Arc<Sandbox>, Error> {
    let id = id::sandbox_id()?;
    let CreateRequest { places, template, metadata, envs, life } = request;
    let home = places.home.clone();
    let (store, meta, snapshot, orphan) = blocking(move || {
        let store = stores::open(&places.home)?;
        let meta = template::resolve(&store, &places, &template)?;
        let snapshot = store.open_tagged(&meta.id, &meta.tag)?;
        let vm = machine::restore(&snapshot, store.dir())?;
        Ok((store, meta, snapshot, Orphan::new(vm)))
    })
    .await?;
    stores::keep_warm(&snapshot);
    identify(&**orphan.vm(), &id, envs).await?;
    let vm = orphan.adopt();
    let identity = Identity {
        id,
        store,
        home,
        template: meta.id.clone(),
        template_name: meta.names.first().cloned(),
        metadata,
        access_token: id::hex_token(32)?,
        life,
    };
    let sandbox = Sandbox::new(identity, vm);
    registry().insert(&sandbox);
    sandbox.watch();
    Ok(sandbox)
}

/// Tells a copy who it is: id, host name, machine id, entropy, wall clock, environment. The agent holds user processes until then.
pub(super) async fn identify(vm: &dyn Vm, id: &str, envs: BTreeMap<String, String>) -> Result<(), Error> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    id::fill_random(&mut entropy)?;
    let agent = Agent::new(vm.connector());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let request = Identify {
        sandbox_id: id.to_owned(),
        hostname: Some(id.to_owned()),
        wall_clock_ns: u64::try_from(now.as_nanos()).ok(),
        entropy,
        machine_id: Some(id::hex_token(16)?),
        envs,
        ..Identify::default()
    };
    let failure = tokio::select! {
        identified = agent.identify(&request) => match identified {
            Ok(identified) => {
                for warning in identified.warnings {
                    tracing::warn!(sandbox = id, "{warning}");
                }
                for hook in identified.hooks.into_iter().take(MAX_HOOKS) {
                    run_hook(&agent, id, hook).await;
                }
                return Ok(());
            }
            Err(failure) => failure,
        },
        ended = vm.ended() => return Err(Error::from(&ended)),
        () = tokio::time::sleep(IDENTIFY_LIMIT) => return Err(Error::Machine(format!(
            "The guest's agent did not answer within {} s of the restore",
            IDENTIFY_LIMIT.as_secs()
        ))),
    };
    match end_behind(&failure, vm.ended()).await {
        Some(ended) => Err(Error::from(&ended)),
        None => Err(failure.into()),
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
