//! The machine behind a sandbox: fits [`crate::machine`] to what the registry needs.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use amber_layers::{NewSnapshot, Snapshot, SnapshotMeta, Store, StoreError};

use super::stores::with_causes;
use super::vm::{Captured, Facts, Vm};
use super::{Ended, Error};
use crate::agent::{AsyncStream, Connect, Connecting};
use crate::devices::vsock::VsockConnector;
use crate::machine::probe::{self, Choice};
use crate::machine::vcpu::{BackendError, CpuModel};
use crate::machine::{
    BootConfig, Content, DiskStorage, EndKind, Machine, MachineEnd, MachineError, RestoreConfig,
    SnapshotError,
};

/// The guest's first program.
const INIT: &str = "/sbin/amberbox-agent";

impl From<MachineError> for Error {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Ended(end) => Self::from(&ended(end)),
            MachineError::Snapshot(SnapshotError::Format(error)) => StoreError::from(error).into(),
            MachineError::Snapshot(SnapshotError::Store(error)) => error.into(),
            MachineError::Snapshot(
                error @ (SnapshotError::NewerPlatform { .. } | SnapshotError::Backend(_)),
            ) => Self::SnapshotVersion(with_causes(&error)),
            MachineError::Snapshot(error @ SnapshotError::Disk { .. }) => Self::Store(with_causes(&error)),
            MachineError::Snapshot(error) => Self::SnapshotCorrupt(with_causes(&error)),
            error @ (MachineError::CpuCount { .. }
            | MachineError::Cpu { reason: BackendError::Cpus(_) | BackendError::HostCpu, .. }) => {
                Self::InvalidArgument(with_causes(&error))
            }
            other => Self::Machine(with_causes(&other)),
        }
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
    backend_reason: String,
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
            cpu_count: self.machine.cpus().into(),
            memory_mb: u32::try_from(self.machine.ram_bytes() >> 20).unwrap_or(u32::MAX),
            backend: self.machine.backend().name(),
            backend_reason: self.backend_reason.clone(),
        }
    }

    fn console(&self) -> String {
        self.machine.console_tail()
    }

    fn capture(
        &self,
        store: &Arc<Store>,
        snapshot: NewSnapshot,
        content: Content,
        captured: Captured,
    ) -> Result<SnapshotMeta, Error> {
        let done = self.machine.capture_then(store, snapshot, content, captured)?;
        tracing::debug!(id = %done.meta.id, pause = ?done.pause, total = ?done.total, "Snapshot taken");
        Ok(done.meta)
    }

    fn suspend(
        &self,
        store: &Arc<Store>,
        snapshot: NewSnapshot,
        content: Content,
    ) -> Result<SnapshotMeta, Error> {
        self.machine.pause()?;
        match self.machine.capture_then(store, snapshot, content, || {}) {
            Ok(captured) => Ok(captured.meta),
            Err(error) => {
                // If it has ended meanwhile, the caller learns that from its end.
                let _ = self.machine.resume();
                Err(error.into())
            }
        }
    }

    fn cpu_time(&self) -> Duration {
        self.machine.cpu_time()
    }
}

/// Restores the machine of a snapshot, and lets it run. What its guest writes to the disk is kept in unlinked files in `dir`. Blocks.
pub(super) fn restore(snapshot: &Arc<Snapshot>, dir: &Path) -> Result<Arc<dyn Vm>, Error> {
    let config = RestoreConfig { storage: DiskStorage::Directory(dir.to_owned()) };
    let choice = choose(Some(dir))?;
    start(Machine::restore(snapshot, config, choice.backend.backend())?, choice)
}

/// Boots a guest from a kernel and the disk in a snapshot. What it writes to the disk is kept in unlinked files in `dir`. Blocks.
pub(super) fn reboot(snapshot: &Arc<Snapshot>, kernel: &Path, dir: &Path) -> Result<Arc<dyn Vm>, Error> {
    let config = BootConfig {
        ram: 0,
        cpus: 1,
        // A snapshot of the disk does not say; what every host has is right everywhere.
        cpu: CpuModel::Baseline,
        kernel: kernel.to_owned(),
        init: INIT.to_owned(),
        parameters: String::new(),
        rootfs: dir.to_owned(),
        storage: DiskStorage::Directory(dir.to_owned()),
    };
    let choice = choose(Some(dir))?;
    start(Machine::boot_snapshot(snapshot, config, choice.backend.backend())?, choice)
}

/// Boots a guest from a kernel and a root file system. Blocks.
pub(super) fn boot(
    kernel: &Path,
    rootfs: &Path,
    memory_mb: u32,
    cpus: u8,
    cpu: CpuModel,
) -> Result<Arc<dyn Vm>, Error> {
    let config = BootConfig {
        ram: u64::from(memory_mb) << 20,
        cpus,
        cpu,
        kernel: kernel.to_owned(),
        init: INIT.to_owned(),
        parameters: String::new(),
        rootfs: rootfs.to_owned(),
        storage: DiskStorage::Memory,
    };
    let choice = choose(None)?;
    start(Machine::boot(config, choice.backend.backend())?, choice)
}

/// The backend and why. The probe behind it runs once per boot of the host; the verdict is kept in `home`.
fn choose(home: Option<&Path>) -> Result<Choice, Error> {
    probe::choose(home).map_err(|error| Error::Machine(error.to_string()))
}

fn start(machine: Machine, choice: Choice) -> Result<Arc<dyn Vm>, Error> {
    machine.resume()?;
    Ok(Arc::new(MachineVm { machine, backend_reason: choice.reason }))
}
