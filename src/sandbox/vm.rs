//! What a sandbox needs of the machine that runs it. The seam keeps identity, lifetime and errors testable without a guest kernel.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use amber_layers::{NewSnapshot, SnapshotMeta, Store};

use super::{Ended, Error};
use crate::agent::Connect;
use crate::machine::Content;

/// What a machine says about itself.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Processors of the guest.
    pub cpu_count: u32,
    /// Memory of the guest in MiB.
    pub memory_mb: u32,
    /// `kvm` or `soft`.
    pub backend: &'static str,
    /// Why this backend was chosen.
    pub backend_reason: String,
}

/// What to do once the content of a snapshot is fixed.
pub(crate) type Captured = Box<dyn FnOnce() + Send>;

/// The machine of one sandbox. Methods that say so block; the others return at once.
pub(crate) trait Vm: Send + Sync + 'static {
    /// Reaches the guest's vsock ports.
    fn connector(&self) -> Arc<dyn Connect>;
    /// Resolves when the machine has stopped by itself.
    fn ended(&self) -> Pin<Box<dyn Future<Output = Ended> + Send>>;
    /// Stops the machine and waits for its threads. Blocks; idempotent.
    fn kill(&self);
    /// What the machine says about itself.
    fn facts(&self) -> Facts;
    /// Last lines of the guest's console.
    fn console(&self) -> String;
    /// Publishes a snapshot of the machine, which goes on running. `captured` is called (or dropped, if it fails before) as
    /// soon as the content is fixed and the machine may run, before anything is compressed. Blocks.
    fn capture(
        &self,
        store: &Arc<Store>,
        snapshot: NewSnapshot,
        content: Content,
        captured: Captured,
    ) -> Result<SnapshotMeta, Error>;
    /// Stops the guest and publishes a snapshot of it; it goes on running only if that fails. Blocks.
    fn suspend(
        &self,
        store: &Arc<Store>,
        snapshot: NewSnapshot,
        content: Content,
    ) -> Result<SnapshotMeta, Error>;
    /// Processor time of the host that its virtual CPU has used.
    fn cpu_time(&self) -> Duration;
}

/// A machine that nobody owns yet: dropped, it is stopped.
pub(crate) struct Orphan {
    vm: Arc<dyn Vm>,
    adopted: bool,
}

impl Orphan {
    pub(crate) fn new(vm: Arc<dyn Vm>) -> Self {
        Self { vm, adopted: false }
    }

    pub(crate) fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// Somebody else stops it from now on.
    pub(crate) fn adopt(mut self) -> Arc<dyn Vm> {
        self.adopted = true;
        Arc::clone(&self.vm)
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        if self.adopted {
            return;
        }
        let vm = Arc::clone(&self.vm);
        // Stopping joins threads, which no asynchronous thread may wait for; without a runtime the process is ending anyway.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || vm.kill());
        }
    }
}
