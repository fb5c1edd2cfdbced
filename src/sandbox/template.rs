//! The base template: a snapshot that is made once, when the guest image is built. Each store adopts it on first use, by hard links where
//! the file systems allow it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use amber_layers::{Kind, NewSnapshot, SnapshotMeta, Store};

use super::stores::Places;
use super::vm::{Orphan, Vm};
use super::{Error, blocking, machine};
use crate::agent::Agent;
use crate::machine::Content;
use crate::machine::vcpu::CpuModel;

/// Name of the base template.
const BASE: &str = "base";

/// The template below a guest directory.
const TEMPLATE_DIR: &str = "template";

/// The kernel, compressed, in a template's directory and in a store.
const KERNEL: &str = "kernel.zst";

/// What the kernel is compressed with: it is done once, and read at each boot.
const KERNEL_LEVEL: i32 = 19;

/// How long to wait between two attempts to reach an agent that does not listen yet.
const RETRY: Duration = Duration::from_millis(20);

/// Templates that this process knows to be adopted: by store and resolved directory.
static ADOPTED: LazyLock<Mutex<HashMap<PathBuf, PathBuf>>> = LazyLock::new(Mutex::default);

/// Finds what a user named: a snapshot by id or name, or the base template, which the store adopts if it has not yet. Blocks.
pub(super) fn resolve(store: &Arc<Store>, places: &Places, wanted: &str) -> Result<SnapshotMeta, Error> {
    let wanted = wanted.to_lowercase();
    if wanted.strip_suffix(":default").unwrap_or(&wanted) == BASE {
        adopt_base(store, places)?;
    }
    // What is kept of a paused sandbox is nobody's template.
    let found = store.resolve(&wanted)?.filter(|meta| meta.kind != Kind::Sandbox);
    found.ok_or(Error::UnknownTemplate(wanted))
}

/// The kernel that boots a disk: the one that came with the base template. Blocks.
pub(super) fn kernel(store: &Arc<Store>, places: &Places) -> Result<PathBuf, Error> {
    adopt_base(store, places)?;
    let mut kernels = std::iter::once(store.dir().join(KERNEL))
        .chain(places.guest.iter().map(|dir| dir.join(TEMPLATE_DIR).join(KERNEL)));
    kernels.find(|path| path.is_file()).ok_or_else(|| {
        Error::TemplateMissing(
            "The base template has no kernel to boot with, because an older release made it. Run `npm run setup`"
                .to_owned(),
        )
    })
}

/// Keeps the template's kernel with the store, which may outlive the template's directory.
fn adopt_kernel(template: &Path, store: &Store) -> Result<(), Error> {
    let (from, to) = (template.join(KERNEL), store.dir().join(KERNEL));
    if !from.is_file() {
        return Ok(());
    }
    let failed = |error: io::Error| Error::Store(format!("Cannot copy {}: {error}", from.display()));
    // Whole or not at all; of several processes the last one wins, and all of them have the same.
    let temporary = store.dir().join(format!("{KERNEL}.{}", std::process::id()));
    let copied = fs::copy(&from, &temporary).and_then(|_| fs::rename(&temporary, &to));
    if copied.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    copied.map_err(failed)
}

fn adopt_base(store: &Arc<Store>, places: &Places) -> Result<(), Error> {
    // The directory is usually reached through a link that moves on when the guest is built anew.
    let found = places.guest.iter().find_map(|dir| fs::canonicalize(dir.join(TEMPLATE_DIR)).ok());
    let mut adopted = ADOPTED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(dir) = found else {
        // A store that has a base template goes on working without the directory it came from.
        return match store.resolve(BASE)? {
            Some(_) => Ok(()),
            None => Err(Error::TemplateMissing(format!(
                "The base template has not been built: no '{TEMPLATE_DIR}' in {}. Run `npm run setup`, or set AMBERBOX_GUEST",
                places.guest.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
            ))),
        };
    };
    if adopted.get(&places.home) == Some(&dir) && store.resolve(BASE)?.is_some() {
        return Ok(());
    }
    store.adopt(&dir)?;
    adopt_kernel(&dir, store)?;
    adopted.insert(places.home.clone(), dir);
    Ok(())
}

/// What to build a template from.
#[derive(Debug, Clone)]
pub struct TemplateRequest {
    /// The kernel: an ELF file.
    pub kernel: PathBuf,
    /// The root file system with the agent in it.
    pub rootfs: PathBuf,
    /// Directory to create.
    pub out: PathBuf,
    /// Memory of the guest in MiB.
    pub memory_mb: u32,
    /// Number of CPUs: more than one need KVM, then and whenever the template is used.
    pub cpus: u32,
    /// What they can do, `baseline` unless given: `host` needs KVM, and such a host whenever the template is used.
    pub cpu: Option<String>,
    /// Longest time to wait for the agent.
    pub boot_timeout: Duration,
}

/// A template that was built.
#[derive(Debug, Clone)]
pub struct TemplateResult {
    /// Its id.
    pub id: String,
    /// From the kernel's first instruction to the agent's first answer.
    pub boot: Duration,
    /// From the pause to the published template.
    pub capture: Duration,
}

/// Boots a guest and freezes it, once its agent answers, into a template in a directory of its own.
pub async fn build_template(request: TemplateRequest) -> Result<TemplateResult, Error> {
    let begun = Instant::now();
    let TemplateRequest { kernel, rootfs, out, memory_mb, cpus, cpu, boot_timeout } = request;
    // A number that is too large for its type is too large for a machine, which says so.
    let cpus = u8::try_from(cpus).unwrap_or(u8::MAX);
    let cpu = match cpu.as_deref() {
        None | Some("baseline") => CpuModel::Baseline,
        Some("host") => CpuModel::Host,
        Some(other) => {
            return Err(Error::InvalidArgument(format!("'{other}' is no CPU; use 'baseline' or 'host'")));
        }
    };
    let image = kernel.clone();
    let machine =
        blocking(move || Ok(Orphan::new(machine::boot(&image, &rootfs, memory_mb, cpus, cpu)?))).await?;
    let vm = Arc::clone(machine.vm());
    let agent = Agent::new(vm.connector());
    let ready = tokio::select! {
        () = answering(&agent) => Ok(()),
        ended = vm.ended() => Err(Error::from(&ended)),
        () = tokio::time::sleep(boot_timeout) => Err(Error::Machine(format!(
            "The guest did not boot within {} s. Its console ends with:\n{}", boot_timeout.as_secs(), vm.console()
        ))),
    };
    let boot = begun.elapsed();
    ready?;
    agent.sync().await?;
    let meta = blocking(move || capture(&*vm, &kernel, &out)).await?;
    let capture = begun.elapsed() - boot;
    let vm = machine.adopt();
    blocking(move || {
        vm.kill();
        Ok(())
    })
    .await?;
    Ok(TemplateResult { id: meta.id.to_string(), boot, capture })
}

fn capture(vm: &dyn Vm, kernel: &Path, out: &Path) -> Result<SnapshotMeta, Error> {
    let store = Arc::new(Store::open(out)?);
    let failed = |error: io::Error| Error::Store(format!("Cannot copy {}: {error}", kernel.display()));
    let image = fs::read(kernel).map_err(failed)?;
    let packed = zstd::encode_all(image.as_slice(), KERNEL_LEVEL).map_err(failed)?;
    fs::write(out.join(KERNEL), packed).map_err(failed)?;
    let base = NewSnapshot {
        kind: Kind::Template,
        names: vec![BASE.to_owned()],
        metadata: "{}".to_owned(),
        ..NewSnapshot::default()
    };
    vm.capture(&store, base, Content::Full, Box::new(|| ()))
}

/// Resolves when the agent answers.
pub(super) async fn answering(agent: &Agent) {
    while agent.info().await.is_err() {
        tokio::time::sleep(RETRY).await;
    }
}
