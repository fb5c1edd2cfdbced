//! The store: verify, collect, measure; snapshots as files.

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::call::Call;
use crate::sandbox;

/// Numbers of JavaScript are exact up to 2^53; no store is larger.
fn number(value: u64) -> f64 {
    value as f64
}

/// Damage in the store.
#[napi(object, object_from_js = false)]
pub struct JsStoreProblem {
    /// The snapshots that are affected, as `id:tag`.
    pub snapshots: Vec<String>,
    /// What is wrong and where.
    pub message: String,
}

/// The result of `verifyStore`.
#[napi(object, object_from_js = false)]
pub struct JsStoreReport {
    /// Snapshots checked.
    pub snapshots: f64,
    /// Layers checked.
    pub layers: f64,
    /// Frames checked.
    pub frames: f64,
    /// What is wrong.
    pub problems: Vec<JsStoreProblem>,
}

/// Reads and checks all of the store.
#[napi]
pub fn verify_store(env: &Env, home: String, call: Call) -> napi::Result<PromiseRaw<'_, JsStoreReport>> {
    call.run(env, async move {
        let report = sandbox::verify_store(home.into()).await?;
        let problem = |problem: sandbox::StoreProblem| JsStoreProblem {
            snapshots: problem.snapshots,
            message: problem.message,
        };
        Ok(JsStoreReport {
            snapshots: number(report.snapshots),
            layers: number(report.layers),
            frames: number(report.frames),
            problems: report.problems.into_iter().map(problem).collect(),
        })
    })
}

/// The result of `collectStore`.
#[napi(object, object_from_js = false)]
pub struct JsCollected {
    /// Layers removed.
    pub layers: f64,
    /// Their bytes.
    pub bytes: f64,
    /// Manifests that could not be read: while there are any, nothing is removed.
    pub unreadable: f64,
}

/// Removes what no snapshot needs.
#[napi]
pub fn collect_store(env: &Env, home: String, call: Call) -> napi::Result<PromiseRaw<'_, JsCollected>> {
    call.run(env, async move {
        let done = sandbox::collect_store(home.into()).await?;
        Ok(JsCollected {
            layers: number(done.layers),
            bytes: number(done.bytes),
            unreadable: number(done.unreadable),
        })
    })
}

/// What one snapshot uses alone.
#[napi(object, object_from_js = false)]
pub struct JsSnapshotUsage {
    /// Its id.
    pub snapshot_id: String,
    /// Its tag.
    pub tag: String,
    /// Bytes that deleting it would free.
    pub bytes: f64,
}

/// The result of `storeUsage`.
#[napi(object, object_from_js = false)]
pub struct JsUsage {
    /// Bytes of all layers.
    pub layer_bytes: f64,
    /// Bytes of all manifests.
    pub manifest_bytes: f64,
    /// Bytes of layers that no snapshot names.
    pub unreferenced_bytes: f64,
    /// Per snapshot.
    pub snapshots: Vec<JsSnapshotUsage>,
}

/// How much disk the store and each snapshot use.
#[napi]
pub fn store_usage(env: &Env, home: String, call: Call) -> napi::Result<PromiseRaw<'_, JsUsage>> {
    call.run(env, async move {
        let usage = sandbox::store_usage(home.into()).await?;
        let one = |(id, tag, bytes): (amber_layers::SnapshotId, String, u64)| JsSnapshotUsage {
            snapshot_id: id.to_string(),
            tag,
            bytes: number(bytes),
        };
        Ok(JsUsage {
            layer_bytes: number(usage.layer_bytes),
            manifest_bytes: number(usage.manifest_bytes),
            unreferenced_bytes: number(usage.unreferenced_bytes),
            snapshots: usage.snapshots.into_iter().map(one).collect(),
        })
    })
}

/// The ids of the layers that the store has.
#[napi]
pub fn store_layers(env: &Env, home: String, call: Call) -> napi::Result<PromiseRaw<'_, Vec<String>>> {
    call.run(env, async move { sandbox::store_layers(home.into()).await })
}

/// The result of `exportSnapshot`.
#[napi(object, object_from_js = false)]
pub struct JsExported {
    /// The snapshot.
    pub snapshot_id: String,
    /// Length of the file.
    pub bytes: f64,
    /// Layers in the file.
    pub layers: f64,
    /// Layers that were left out.
    pub left_out: f64,
}

/// Writes a snapshot to a new file.
#[napi]
pub fn export_snapshot(
    env: &Env,
    home: String,
    id: String,
    path: String,
    without: Vec<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsExported>> {
    call.run(env, async move {
        let done = sandbox::export_snapshot(home.into(), id, path.into(), without).await?;
        Ok(JsExported {
            snapshot_id: done.snapshot.id,
            bytes: number(done.bytes),
            layers: done.layers as f64,
            left_out: done.left_out as f64,
        })
    })
}

/// The result of `importSnapshot`.
#[napi(object, object_from_js = false)]
pub struct JsImported {
    /// The snapshot.
    pub snapshot_id: String,
    /// Its names, without tags.
    pub names: Vec<String>,
}

/// Takes over a snapshot from a file.
#[napi]
pub fn import_snapshot(
    env: &Env,
    home: String,
    path: String,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsImported>> {
    call.run(env, async move {
        let info = sandbox::import_snapshot(home.into(), path.into()).await?;
        Ok(JsImported { snapshot_id: info.id, names: info.names })
    })
}
