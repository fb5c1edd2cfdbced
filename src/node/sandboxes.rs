//! Sandboxes and snapshots: create, find, list, end, freeze, delete.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::call::{Call, duration};
use crate::sandbox::{
    self, CreateRequest, Error, ListQuery, Places, Sandbox, SnapshotQuery, TemplateRequest, registry,
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

/// Arguments of `createSandbox`.
#[napi(object)]
pub struct JsCreate {
    /// Directory of the store.
    pub home: String,
    /// Directories in which the base template may lie.
    pub guest: Vec<String>,
    /// Template, snapshot id or snapshot name.
    pub template: String,
    /// Metadata.
    pub metadata: HashMap<String, String>,
    /// Environment of every command.
    pub envs: HashMap<String, String>,
    /// Life in milliseconds.
    pub timeout_ms: f64,
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
    /// `running`
    pub state: &'static str,
    /// Processors.
    pub cpu_count: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Version of E2B's guest daemon whose behaviour the agent follows.
    pub envd_version: &'static str,
    /// `kvm` or `soft`.
    pub backend: &'static str,
    /// Why this backend was chosen.
    pub backend_reason: String,
}

impl From<&Sandbox> for JsSandboxInfo {
    fn from(sandbox: &Sandbox) -> Self {
        let facts = sandbox.facts();
        Self {
            sandbox_id: sandbox.id().to_owned(),
            template_id: sandbox.template().to_string(),
            name: sandbox.template_name().map(str::to_owned),
            metadata: sandbox.metadata().clone().into_iter().collect(),
            started_at_ms: to_ms(sandbox.started_at()),
            end_at_ms: to_ms(sandbox.end_at()),
            state: "running",
            cpu_count: facts.cpu_count,
            memory_mb: facts.memory_mb,
            envd_version: ENVD_VERSION,
            backend: facts.backend,
            backend_reason: facts.backend_reason,
        }
    }
}

fn to_ms(time: SystemTime) -> f64 {
    (time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0).floor()
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
            places: JsPlaces { home: request.home, guest: request.guest }.into(),
            template: request.template,
            metadata: request.metadata.into_iter().collect(),
            envs: request.envs.into_iter().collect(),
            life: duration(request.timeout_ms),
        })
        .await?;
        Ok(JsSandboxInfo::from(&*sandbox))
    })
}

/// Extends the life of a sandbox that exists.
#[napi]
pub fn connect_sandbox(
    env: &Env,
    id: String,
    timeout_ms: f64,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSandboxInfo>> {
    call.run(env, async move {
        let sandbox = registry().find_live(&id).map_err(|error| match error {
            Error::SandboxNotFound(_) => Error::SandboxNotFound(format!("Paused sandbox {id} not found")),
            other => other,
        })?;
        sandbox.extend(duration(timeout_ms));
        Ok(JsSandboxInfo::from(&*sandbox))
    })
}

/// What is known about a sandbox.
#[napi]
pub fn sandbox_info(env: &Env, id: String, call: Call) -> napi::Result<PromiseRaw<'_, JsSandboxInfo>> {
    call.run(env, async move { Ok(JsSandboxInfo::from(&*registry().find_live(&id)?)) })
}

/// Whether a sandbox is live.
#[napi]
pub fn is_running(env: &Env, id: String, call: Call) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move { Ok(registry().find(&id).is_ok_and(|sandbox| sandbox.ended().is_none())) })
}

/// Ends a sandbox. `false` if there is none, or it has ended already.
#[napi]
pub fn kill_sandbox(env: &Env, id: String, call: Call) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move {
        match registry().find(&id) {
            Ok(sandbox) => sandbox.kill().await,
            Err(_) => Ok(false),
        }
    })
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

/// Lists the live sandboxes of a store in this process.
#[napi]
pub fn list_sandboxes(
    env: &Env,
    query: JsListQuery,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSandboxPage>> {
    call.run(env, async move {
        let page = registry().list(&ListQuery {
            home: query.home.into(),
            metadata: query.metadata.into_iter().collect(),
            running: query.states.iter().any(|state| state == "running"),
            started_after: query.started_after_ms.map(|ms| SystemTime::UNIX_EPOCH + duration(ms)),
            template: query.template,
            ascending: query.order == "asc",
            limit: usize::try_from(query.limit).unwrap_or(usize::MAX),
            next_token: query.next_token,
        })?;
        Ok(JsSandboxPage {
            items: page.items.iter().map(|sandbox| JsSandboxInfo::from(&**sandbox)).collect(),
            next_token: page.next_token,
        })
    })
}

/// A snapshot.
#[napi(object)]
pub struct JsSnapshot {
    /// Its id.
    pub snapshot_id: String,
    /// Its names, without tags.
    pub names: Vec<String>,
    /// Its tag.
    pub tag: String,
    /// Milliseconds since the epoch.
    pub created_at_ms: f64,
    /// Bytes on disk of all that it needs.
    pub size: f64,
    /// Bytes on disk that it added.
    pub own_size: f64,
    /// What its sandbox was created from.
    pub parent_id: Option<String>,
    /// The sandbox it was taken from.
    pub sandbox_id: Option<String>,
    /// That sandbox's metadata, as JSON.
    pub metadata: String,
}

impl From<sandbox::SnapshotInfo> for JsSnapshot {
    fn from(info: sandbox::SnapshotInfo) -> Self {
        Self {
            snapshot_id: info.id,
            names: info.names,
            tag: info.tag,
            created_at_ms: info.created_ms as f64,
            size: info.size as f64,
            own_size: info.own_size as f64,
            parent_id: info.parent,
            sandbox_id: info.source,
            metadata: info.metadata,
        }
    }
}

/// Freezes a sandbox into a snapshot.
#[napi]
pub fn create_snapshot(
    env: &Env,
    id: String,
    name: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSnapshot>> {
    call.run(env, async move {
        let sandbox = registry().find_live(&id)?;
        Ok(sandbox::create_snapshot(&sandbox, name.as_deref()).await?.into())
    })
}

/// Arguments of `listSnapshots`.
#[napi(object)]
pub struct JsSnapshotQuery {
    /// Directory of the store.
    pub home: String,
    /// Only those made from this sandbox.
    pub sandbox_id: Option<String>,
    /// Only the one with this name, `name:tag` or id.
    pub name: Option<String>,
    /// Items per page.
    pub limit: u32,
    /// Where to go on.
    pub next_token: Option<String>,
}

/// One page of snapshots.
#[napi(object)]
pub struct JsSnapshotPage {
    /// The snapshots.
    pub items: Vec<JsSnapshot>,
    /// Where the next page starts.
    pub next_token: Option<String>,
}

/// Lists the snapshots of a store.
#[napi]
pub fn list_snapshots(
    env: &Env,
    query: JsSnapshotQuery,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSnapshotPage>> {
    call.run(env, async move {
        let page = sandbox::list_snapshots(SnapshotQuery {
            home: query.home.into(),
            sandbox_id: query.sandbox_id,
            name: query.name,
            limit: usize::try_from(query.limit).unwrap_or(usize::MAX),
            next_token: query.next_token,
        })
        .await?;
        Ok(JsSnapshotPage {
            items: page.items.into_iter().map(JsSnapshot::from).collect(),
            next_token: page.next_token,
        })
    })
}

/// Deletes a snapshot, even one in use with `force`. `false` if it does not exist.
#[napi]
pub fn delete_snapshot(
    env: &Env,
    places: JsPlaces,
    id: String,
    force: bool,
    call: Call,
) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move { sandbox::delete_snapshot(places.home.into(), id, force).await })
}

/// Arguments of `buildTemplate`.
#[napi(object)]
pub struct JsTemplateRequest {
    /// The kernel: an ELF file.
    pub kernel: String,
    /// The root file system with the agent.
    pub rootfs: String,
    /// Directory to create: the template.
    pub out: String,
    /// Memory of the guest in MiB.
    pub memory_mb: u32,
    /// Longest time to wait for the agent, in milliseconds.
    pub boot_timeout_ms: f64,
}

/// What was built.
#[napi(object)]
pub struct JsTemplate {
    /// Id of the template.
    pub template_id: String,
    /// From the kernel's first instruction to the agent's first answer.
    pub boot_ms: f64,
    /// From the pause to the published template.
    pub capture_ms: f64,
}

/// Boots a guest and freezes it into the base template.
#[napi]
pub fn build_template(
    env: &Env,
    request: JsTemplateRequest,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsTemplate>> {
    call.run(env, async move {
        let built = sandbox::build_template(TemplateRequest {
            kernel: request.kernel.into(),
            rootfs: request.rootfs.into(),
            out: request.out.into(),
            memory_mb: request.memory_mb,
            boot_timeout: duration(request.boot_timeout_ms),
        })
        .await?;
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Ok(JsTemplate { template_id: built.id, boot_ms: ms(built.boot), capture_ms: ms(built.capture) })
    })
}
