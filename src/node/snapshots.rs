//! Snapshots and templates: freeze, list, delete, build.

use std::time::Duration;

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::call::{Call, duration};
use super::sandboxes::JsPlaces;
use crate::machine::Content;
use crate::sandbox::{self, SnapshotQuery, TemplateRequest, registry};

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

/// Freezes a sandbox into a snapshot: all of it, or its disk alone.
#[napi]
pub fn create_snapshot(
    env: &Env,
    id: String,
    name: Option<String>,
    disk_alone: bool,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsSnapshot>> {
    call.run(env, async move {
        let sandbox = registry().find_live(&id)?;
        let content = if disk_alone { Content::Disk } else { Content::Full };
        Ok(sandbox::create_snapshot(&sandbox, name.as_deref(), content).await?.into())
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
    /// Number of CPUs; 1 if absent.
    pub cpu_count: Option<u32>,
    /// `host` for what the host's CPU can do instead of the baseline.
    pub cpu: Option<String>,
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
            cpus: request.cpu_count.unwrap_or(1),
            cpu: request.cpu,
            boot_timeout: duration(request.boot_timeout_ms),
        })
        .await?;
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Ok(JsTemplate { template_id: built.id, boot_ms: ms(built.boot), capture_ms: ms(built.capture) })
    })
}
