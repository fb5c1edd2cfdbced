//! The machine behind a sandbox: fits [`crate::machine`] to what the registry needs.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use amber_layers::{NewSnapshot, Snapshot, SnapshotMeta, Store};

use super::vm::{Facts, Vm};
use super::{Ended, Error};
use crate::agent::{AsyncStream, Connect, Connecting};
use crate::devices::disk::{Base, Overlay, RawImage, Storage};
use crate::devices::vsock::VsockConnector;
use crate::machine::soft::Soft;
use crate::machine::{BootConfig, EndKind, Machine, MachineEnd, MachineError};

/// The guest's first program.
const INIT: &str = "/sbin/amberbox-agent";

impl From<MachineError> for Error {
    fn from(error: MachineError) -> Self {
        Self::Machine(super::stores::with_causes(&error))
    }
}

/// What an end of the machine means for its sandbox.
fn ended(end: MachineEnd) -> Ended {
    match end.kind {
        EndKind::Killed => Ended::Killed,
        _ => Ended::Crashed { reason: end.to_string().into(), console: end.console.into() },
    }
}

impl Connect for VsockConnector {
    fn connect(&self, port: u32) -> Connecting {
        let connector = self.clone();
        Box::pin(async move {
            let stream = VsockConnector::connect(&connector, port).await?;
            Ok(Box::new(stream) as Box<dyn AsyncStream>)
        })
    }
}

struct MachineVm {
    machine: Machine,
}

impl Vm for MachineVm {
    fn connector(&self) -> Arc<dyn Connect> {
        Arc::new(self.machine.vsock())
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = Ended> + Send>> {
        let end = self.machine.ended();
        Box::pin(async move { ended(end.await) })
    }

    fn kill(&self) {
        self.machine.kill();
    }

    fn facts(&self) -> Facts {
        Facts {
            cpu_count: 1,
            memory_mb: u32::try_from(self.machine.ram_bytes() >> 20).unwrap_or(u32::MAX),
            backend: self.machine.backend().name(),
            backend_reason: "the software CPU is the only backend of this version".to_owned(),
        }
    }

    fn console(&self) -> String {
        self.machine.console_tail()
    }

    fn capture(&self, _store: &Arc<Store>, _snapshot: NewSnapshot) -> Result<SnapshotMeta, Error> {
        Err(Error::Machine("Snapshots are not available yet".to_owned()))
    }
}

/// Restores the machine of a snapshot, and lets it run. Blocks.
pub(super) fn restore(_snapshot: &Arc<Snapshot>) -> Result<Arc<dyn Vm>, Error> {
    Err(Error::Machine("Snapshots are not available yet".to_owned()))
}

/// Boots a guest from a kernel and a root file system. Blocks until its CPU runs.
pub(super) fn boot(kernel: &Path, rootfs: &Path, memory_mb: u32) -> Result<Arc<dyn Vm>, Error> {
    let cannot =
        |error| Error::Machine(format!("Cannot use the root file system {}: {error}", rootfs.display()));
    let base = RawImage::open(rootfs).map_err(cannot)?;
    let len = base.len();
    let disk = Overlay::new(Some(Arc::new(base)), len, Storage::Memory).map_err(cannot)?;
    let machine = Machine::boot(
        BootConfig {
            ram: u64::from(memory_mb) << 20,
            kernel: kernel.to_owned(),
            init: INIT.to_owned(),
            parameters: String::new(),
            disk,
        },
        &Soft,
    )?;
    machine.resume()?;
    Ok(Arc::new(MachineVm { machine }))
}
