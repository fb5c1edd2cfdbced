//! Sandboxes: a machine with an identity, a lifetime, a store it came from and an agent inside it.
//!
//! - [`registry`]: the sandboxes of this process, found by id from every JavaScript realm.
//! - [`pause`], [`connect`], [`awake`], [`fork`]: how it leaves memory, comes back and multiplies. [`list`]: all of them.
//! - [`Sandbox`]: one of them; its end, whatever the cause, reaches every pending and later operation.
//! - [`create`], [`create_snapshot`], [`build_template`]: how machines come from snapshots and snapshots from machines.
//!
//! Everything here is asynchronous and runs on one small runtime of its own, so that lifetimes do not depend on any JavaScript
//! environment; work that blocks (decoding, compressing, joining threads) goes to its blocking threads.

mod create;
mod error;
mod fork;
mod id;
mod instance;
mod listing;
mod machine;
mod metrics;
mod ops;
mod paused;
mod ports;
mod process;
mod profile;
mod registry;
mod snapshots;
mod store;
mod stores;
mod template;
#[cfg(test)]
mod tests;
mod vm;
mod watch;

use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime};

pub use create::{CreateRequest, create};
pub use error::{Ended, Error};
pub use fork::{Copy, fork};
pub use instance::Sandbox;
pub use listing::{ListQuery, Page, list};
pub use metrics::Sample;
pub use ops::{FileReader, FileWriter};
pub use paused::{OnResume, awake, connect, get_info, kill, pause};
pub use ports::forward;
pub use process::Process;
pub use profile::{Lifecycle, OnTimeout, Profile, SandboxInfo, State};
pub use registry::{Registry, registry};
pub use snapshots::{SnapshotInfo, SnapshotQuery, create_snapshot, delete_snapshot, list_snapshots};
pub use store::{
    ExportInfo, StoreProblem, StoreReport, collect_store, export_snapshot, import_snapshot, store_layers,
    store_usage, verify_store,
};
pub use stores::Places;
pub use template::{TemplateRequest, TemplateResult, build_template};
pub use vm::Facts;
pub use watch::Watcher;

/// Timers and agent connections wait, they do not compute: two threads serve any number of sandboxes.
const WORKERS: usize = 2;

static RUNTIME: LazyLock<Result<Runtime, String>> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("amberbox")
        .enable_all()
        .build()
        .map_err(|error| error.to_string())
});

/// The runtime that all sandboxes of this process share. It lives as long as the process.
pub fn runtime() -> Result<&'static Handle, Error> {
    match &*RUNTIME {
        Ok(runtime) => Ok(runtime.handle()),
        Err(error) => Err(Error::Machine(format!("Cannot start threads: {error}. Raise the process limit"))),
    }
}

/// Runs work that blocks on a thread where that is allowed.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(Error::panicked)?
}
