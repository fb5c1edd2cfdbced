//! The machine behind a sandbox: fits [`crate::machine`] to what the registry needs.

use std::path::Path;
use std::sync::Arc;

use amber_layers::Snapshot;

use super::Error;
use super::vm::Vm;

pub(super) fn restore(_snapshot: &Arc<Snapshot>) -> Result<Arc<dyn Vm>, Error> {
    Err(Error::Machine("no machine".into()))
}
pub(super) fn boot(_kernel: &Path, _rootfs: &Path, _memory_mb: u32) -> Result<Arc<dyn Vm>, Error> {
    Err(Error::Machine("no machine".into()))
}
