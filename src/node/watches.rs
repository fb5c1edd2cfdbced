//! Watched directories: pulled batch by batch.

use std::sync::Arc;

use amber_proto::{ChangeKind, Watch, WatchEvent};
use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::call::{Call, promise, whole_ms};
use super::files::JsEntry;
use crate::sandbox::{self, awake};

/// What to watch.
#[napi(object)]
pub struct JsWatch {
    /// Path of the directory.
    pub path: String,
    /// User.
    pub user: Option<String>,
    /// Whether directories below are watched, too.
    pub recursive: bool,
    /// Whether events come with their entries.
    pub include_entry: bool,
    /// Whether directories on network file systems may be watched.
    pub allow_network_mounts: bool,
    /// Limit in milliseconds; 0 for none.
    pub timeout_ms: f64,
}

/// A change.
#[napi(object, object_from_js = false)]
pub struct JsChange {
    /// Path relative to the watched directory.
    pub name: String,
    /// `create`, `write`, `remove`, `rename` or `chmod`.
    pub kind: &'static str,
    /// The entry.
    pub entry: Option<JsEntry>,
}

/// The change as JavaScript sees it; `None` for what only a newer agent tells.
fn change(event: WatchEvent) -> Option<JsChange> {
    let kind = match event.kind {
        ChangeKind::Create => "create",
        ChangeKind::Write => "write",
        ChangeKind::Remove => "remove",
        ChangeKind::Rename => "rename",
        ChangeKind::Chmod => "chmod",
        ChangeKind::Unknown => return None,
    };
    Some(JsChange { name: event.name, kind, entry: event.entry.map(JsEntry::from) })
}

/// A watched directory.
#[napi]
pub struct Watcher {
    inner: Arc<sandbox::Watcher>,
}

#[napi]
impl Watcher {
    /// The next changes; `null` when the directory is gone or the watch has been stopped. Waiting for them keeps Node alive.
    #[napi]
    pub fn next<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, Option<Vec<JsChange>>>> {
        let watcher = Arc::clone(&self.inner);
        promise(env, async move {
            Ok(watcher.next().await?.map(|events| events.into_iter().filter_map(change).collect()))
        })
    }

    /// Ends the watch.
    #[napi]
    pub fn stop(&self) {
        self.inner.stop();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.inner.stop();
    }
}

/// Watches a directory.
#[napi]
pub fn watch_dir(env: &Env, id: String, spec: JsWatch, call: Call) -> napi::Result<PromiseRaw<'_, Watcher>> {
    call.run(env, async move {
        let request = Watch {
            path: spec.path,
            user: spec.user,
            recursive: spec.recursive,
            include_entry: spec.include_entry,
            allow_network_mounts: spec.allow_network_mounts,
        };
        let watcher = awake(&id).await?.watch_dir(request, whole_ms(spec.timeout_ms)).await?;
        Ok(Watcher { inner: Arc::new(watcher) })
    })
}
