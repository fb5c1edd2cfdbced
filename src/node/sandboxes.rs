//! Sandboxes: create, find, list, pause, resume, copy, end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::SystemTime;

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::call::{Call, duration};
use super::to_js;
use crate::sandbox::{
    self, CreateRequest, Error, Lifecycle, ListQuery, OnResume, OnTimeout, Places, SandboxInfo, State,
    registry,
};

/// Version of E2B's guest daemon whose behaviour the agent follows; clients switch features by it.
const ENVD_VERSION: &str = "0.6.13";

/// Where this process keeps and finds things.
#[napi(object)]
pub struct JsPlaces {
    /// Directory of the store.
    pub home: String,
    /// Directories in which the base template may lie.
    pub guest: Vec<String>,
}

impl From<JsPlaces> for Places {
    fn from(places: JsPlaces) -> Self {
        Self { home: places.home.into(), guest: places.guest.into_iter().map(PathBuf::from).collect() }
    }
}

/// What happens to a sandbox by itself.
#[napi(object)]
pub struct JsLifecycle {
    /// Pause it at the end of its time instead of killing it.
    pub pause: bool,
    /// With its memory.
    pub keep_memory: bool,
    /// Resume it when a request comes.
    pub auto_resume: bool,
}

impl From<JsLifecycle> for Lifecycle {
    fn from(lifecycle: JsLifecycle) -> Self {
        let JsLifecycle { pause, keep_memory, auto_resume } = lifecycle;
        Self {
            on_timeout: if pause { OnTimeout::Pause { keep_memory } } else { OnTimeout::Kill },
            auto_resume,
        }
    }
}

impl From<Lifecycle> for JsLifecycle {
    fn from(lifecycle: Lifecycle) -> Self {
        let (pause, keep_memory) = match lifecycle.on_timeout {
            OnTimeout::Kill => (false, true),
            OnTimeout::Pause { keep_memory } => (true, keep_memory),
        };
        Self { pause, keep_memory, auto_resume: lifecycle.auto_resume }
    }
}

/// Arguments of `createSandbox`.
#[napi(object)]
pub struct JsCreate {
    /// Where the store and the base template are.
    pub places: JsPlaces,
    /// Template, snapshot id or snapshot name.
    pub template: String,
    /// Metadata.
    pub metadata: HashMap<String, String>,
    /// Environment of every command.
    pub envs: HashMap<String, String>,
    /// Life in milliseconds.
    pub timeout_ms: f64,
    /// What happens to it by itself.
    pub lifecycle: JsLifecycle,
    /// Rules of its network, as JSON text.
    pub network: Option<String>,
    /// Whether it was allowed to reach the internet.
    pub allow_internet_access: Option<bool>,
    /// Whether HTTP requests to its ports must show a token.
    pub private_ports: bool,
    /// What servers in it see as the `Host` of HTTP requests to its ports.
    pub mask_request_host: Option<String>,
}

/// What is known about a sandbox.
#[napi(object, object_from_js = false)]
pub struct JsSandboxInfo {
    /// Id.
    pub sandbox_id: String,
    /// Template or snapshot it was created from.
    pub template_id: String,
    /// Name of it.
    pub name: Option<String>,
    /// Metadata.
    pub metadata: HashMap<String, String>,
    /// Milliseconds since the epoch.
    pub started_at_ms: f64,
    /// Milliseconds since the epoch.
    pub end_at_ms: f64,
    /// `running` or `paused`.
    pub state: &'static str,
    /// Processors.
    pub cpu_count: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Version of E2B's guest daemon whose behaviour the agent follows.
    pub envd_version: &'static str,
    /// What happens to it by itself.
    pub lifecycle: JsLifecycle,
    /// Rules of its network, as JSON text.
    pub network: Option<String>,
    /// Whether it was allowed to reach the internet.
    pub allow_internet_access: Option<bool>,
    /// What HTTP requests to its ports must show.
    pub traffic_access_token: Option<String>,
    /// `kvm`, `soft`, or `none`.
    pub backend: &'static str,
    /// Why this backend was chosen.
    pub backend_reason: String,
}

impl From<SandboxInfo> for JsSandboxInfo {
    fn from(info: SandboxInfo) -> Self {
        let SandboxInfo { id, profile, end_at, state, facts } = info;
        Self {
            sandbox_id: id,
            started_at_ms: to_ms(profile.started_at()),
            template_id: profile.template,
            name: profile.template_name,
            metadata: profile.metadata.into_iter().collect(),
            end_at_ms: to_ms(end_at),
            state: match state {
                State::Running => "running",
                State::Paused => "paused",
            },
            cpu_count: facts.cpu_count,
            memory_mb: facts.memory_mb,
            envd_version: ENVD_VERSION,
            lifecycle: profile.lifecycle.into(),
            network: profile.network,
            allow_internet_access: profile.allow_internet_access,
            traffic_access_token: profile.traffic_token,
            backend: facts.backend,
            backend_reason: facts.backend_reason,
        }
    }
}

fn to_ms(time: SystemTime) -> f64 {
    (time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0).floor()
}

/// A number of things as the library counts them.
pub(super) fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Creates a sandbox.
#[napi]
pub fn create_sandbox(
    env: &Env,
    request: JsCreate,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSandboxInfo>> {
    call.run(env, async move {
        let sandbox = sandbox::create(CreateRequest {
            places: request.places.into(),
            template: request.template,
            metadata: request.metadata.into_iter().collect(),
            envs: request.envs.into_iter().collect(),
            life: duration(request.timeout_ms),
            lifecycle: request.lifecycle.into(),
            network: request.network,
            allow_internet_access: request.allow_internet_access,
            private_ports: request.private_ports,
            mask_request_host: request.mask_request_host,
        })
        .await?;
        Ok(sandbox.info().into())
    })
}

/// Extends the life of a sandbox that runs in this process, or resumes a paused one: from its disk alone if `reboot`.
#[napi]
pub fn connect_sandbox(
    env: &Env,
    places: JsPlaces,
    id: String,
    timeout_ms: f64,
    reboot: bool,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSandboxInfo>> {
    call.run(env, async move {
        let on_resume = if reboot { OnResume::Reboot } else { OnResume::Restore };
        Ok(sandbox::connect(id, places.into(), duration(timeout_ms), on_resume).await?.info().into())
    })
}

/// Pauses a sandbox. `false` if it is paused already.
#[napi]
pub fn pause_sandbox(
    env: &Env,
    places: JsPlaces,
    id: String,
    keep_memory: bool,
    call: Call,
) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, sandbox::pause(id, places.into(), keep_memory))
}

/// One copy: a sandbox, or why there is none.
#[napi(object, object_from_js = false)]
pub struct JsCopy {
    /// The sandbox.
    pub sandbox: Option<JsSandboxInfo>,
    /// The error, as a failed call would carry it.
    pub error: Option<String>,
}

/// Copies a sandbox.
#[napi]
pub fn fork_sandbox(
    env: &Env,
    places: JsPlaces,
    id: String,
    copies: u32,
    timeout_ms: f64,
    call: Call,
) -> napi::Result<PromiseRaw<'_, Vec<JsCopy>>> {
    call.run(env, async move {
        let made = sandbox::fork(&id, places.into(), count(copies), duration(timeout_ms)).await?;
        let copy = |copy: sandbox::Copy| match copy {
            Ok(sandbox) => JsCopy { sandbox: Some(sandbox.info().into()), error: None },
            Err(error) => JsCopy { sandbox: None, error: Some(to_js(&error).reason.clone()) },
        };
        Ok(made.into_iter().map(copy).collect())
    })
}

/// The address on the host, at the interface `bind`, that leads to a port of a sandbox.
#[napi]
pub fn forward_port(id: String, port: u16, bind: String) -> napi::Result<String> {
    let bind = bind.parse().map_err(|_| Error::InvalidArgument(format!("'{bind}' is not an IP address")));
    let forwarded = bind.and_then(|bind| sandbox::forward(&id, port, bind));
    Ok(forwarded.map_err(|error| to_js(&error))?.to_string())
}

/// What is known about a sandbox.
#[napi]
pub fn sandbox_info(
    env: &Env,
    places: JsPlaces,
    id: String,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSandboxInfo>> {
    call.run(env, async move { Ok(sandbox::get_info(id, places.into()).await?.into()) })
}

/// Whether a sandbox runs.
#[napi]
pub fn is_running(env: &Env, id: String, call: Call) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move { Ok(registry().find(&id).is_ok_and(|sandbox| sandbox.ended().is_none())) })
}

/// Ends a sandbox, or deletes a paused one. `false` if there is none, or it has ended already.
#[napi]
pub fn kill_sandbox(
    env: &Env,
    places: JsPlaces,
    id: String,
    call: Call,
) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, sandbox::kill(id, places.into()))
}

/// Sets the end of a sandbox's life to some time from now.
#[napi]
pub fn set_sandbox_timeout(
    env: &Env,
    id: String,
    timeout_ms: f64,
    call: Call,
) -> napi::Result<PromiseRaw<'_, ()>> {
    call.run(env, async move {
        registry().find_live(&id)?.set_timeout(duration(timeout_ms));
        Ok(())
    })
}

/// Resource use at one moment.
#[napi(object, object_from_js = false)]
pub struct JsSample {
    /// Milliseconds since the epoch.
    pub at_ms: f64,
    /// Percent of one processor.
    pub cpu_used_pct: f64,
    /// Processors.
    pub cpu_count: u32,
    /// Bytes.
    pub mem_used: f64,
    /// Bytes.
    pub mem_total: f64,
    /// Bytes.
    pub mem_cache: f64,
    /// Bytes.
    pub disk_used: f64,
    /// Bytes.
    pub disk_total: f64,
}

impl From<sandbox::Sample> for JsSample {
    fn from(sample: sandbox::Sample) -> Self {
        // Sizes beyond 2^53 do not occur in a guest.
        Self {
            at_ms: to_ms(sample.at),
            cpu_used_pct: sample.cpu_used_pct,
            cpu_count: sample.cpu_count,
            mem_used: sample.mem_used as f64,
            mem_total: sample.mem_total as f64,
            mem_cache: sample.mem_cache as f64,
            disk_used: sample.disk_used as f64,
            disk_total: sample.disk_total as f64,
        }
    }
}

/// Resource use of a sandbox between two moments, in milliseconds since the epoch.
#[napi]
pub fn sandbox_metrics(
    env: &Env,
    id: String,
    start_ms: Option<f64>,
    end_ms: Option<f64>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, Vec<JsSample>>> {
    call.run(env, async move {
        let time = |ms: f64| SystemTime::UNIX_EPOCH + duration(ms);
        let samples = registry().find_live(&id)?.metrics(start_ms.map(time), end_ms.map(time)).await?;
        Ok(samples.into_iter().map(JsSample::from).collect())
    })
}

/// Replaces the rules of a sandbox's network.
#[napi]
pub fn update_network(
    env: &Env,
    id: String,
    network: Option<String>,
    allow_internet_access: Option<bool>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, ()>> {
    call.run(env, async move {
        registry().find_live(&id)?.change_profile(|profile| {
            profile.network = network;
            profile.allow_internet_access = allow_internet_access;
        });
        Ok(())
    })
}

/// Arguments of `listSandboxes`.
#[napi(object)]
pub struct JsListQuery {
    /// Directory of the store.
    pub home: String,
    /// Pairs that the metadata must contain.
    pub metadata: HashMap<String, String>,
    /// Wanted states.
    pub states: Vec<String>,
    /// Milliseconds since the epoch.
    pub started_after_ms: Option<f64>,
    /// Template or snapshot, by id or name.
    pub template: Option<String>,
    /// `asc` or `desc`.
    pub order: String,
    /// Items per page.
    pub limit: u32,
    /// Where to go on.
    pub next_token: Option<String>,
}

/// One page of sandboxes.
#[napi(object, object_from_js = false)]
pub struct JsSandboxPage {
    /// The sandboxes.
    pub items: Vec<JsSandboxInfo>,
    /// Where the next page starts.
    pub next_token: Option<String>,
}

/// Lists the sandboxes that run in this process with a store, and those that are paused in it.
#[napi]
pub fn list_sandboxes(
    env: &Env,
    query: JsListQuery,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSandboxPage>> {
    call.run(env, async move {
        let wanted = |state: &str| query.states.iter().any(|wanted| wanted == state);
        let page = sandbox::list(ListQuery {
            running: wanted("running"),
            paused: wanted("paused"),
            home: query.home.into(),
            metadata: query.metadata.into_iter().collect(),
            started_after: query.started_after_ms.map(|ms| SystemTime::UNIX_EPOCH + duration(ms)),
            template: query.template,
            ascending: query.order == "asc",
            limit: count(query.limit),
            next_token: query.next_token,
        })
        .await?;
        Ok(JsSandboxPage {
            items: page.items.into_iter().map(JsSandboxInfo::from).collect(),
            next_token: page.next_token,
        })
    })
}
