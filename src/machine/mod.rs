//! The virtual machine: RAM, CPU, interrupt controllers, clock and devices, put together as [`platform`] says.
//!
//! A [`Machine`] is booted from a kernel or restored from a snapshot; it is created paused. Its CPU has a thread of its own
//! ([`run`]); devices work on that thread and on those of their users. Everything that waits does so
//! blockingly: call it where blocking is allowed. Nothing here needs an async runtime; only [`Machine::ended`] is a
//! future.
//!
//! Rooms:
//! - [`platform`]: what the guest sees, as one table.
//! - [`ram`]: guest memory, its lazy filling and its page flags.
//! - [`irq`]: local APIC, I/O APIC, interval timer. [`clock`]: guest time, TSC, kvm-clock.
//! - [`vcpu`]: the CPU seam; [`soft`]: the software CPU behind it; [`kvm`]: the host's CPU behind it; `bus`: what a CPU reaches; [`probe`]: which backend.
//! - `snapshot`: taking and restoring snapshots. `boot`: loading a kernel; `run`: the CPU's thread; `devices`: who is in which slot; `end`: how it ends.

mod boot;
mod bus;
pub mod clock;
mod devices;
mod end;
pub mod irq;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod platform;
pub mod probe;
pub mod ram;
mod run;
mod snapshot;
pub mod soft;
#[cfg(test)]
mod tests;
pub mod vcpu;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use amber_layers::{NewSnapshot, Snapshot, Store};

use self::boot::BootError;
use self::clock::Clock;
use self::devices::{Devices, Parts};
use self::irq::Irqchip;
use self::platform::MemoryMap;
use self::ram::view::view;
use self::ram::{Ram, RamError};
use self::run::{Core, Guts};
use self::snapshot::{
    BootState, Capture, DiskBase, DiskParent, Lineage, MachineState, MemorySource, Prepared, refuse,
};
use self::vcpu::{Backend, BackendError, BackendKind, Counters, CpuModel, HostChips, Shape, Vm};
use crate::devices::disk::{Base, RawImage};
use crate::devices::serial::{ConsoleLog, LineObserver};
use crate::devices::vsock::VsockConnector;

pub use self::end::{EndKind, MachineEnd};
pub use self::snapshot::{Captured, Content, DiskStorage, SnapshotError};

/// A machine cannot be made, or cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Not a size that a machine can have.
    #[error("{bytes} bytes is not a valid RAM size; use whole pages between 64 MiB and 64 GiB")]
    RamSize {
        /// What was asked for.
        bytes: u64,
    },
    /// Not a number of CPUs that a machine can have.
    #[error("{cpus} is not a valid number of CPUs; use 1 to {}", platform::MAX_CPUS)]
    CpuCount {
        /// What was asked for.
        cpus: u8,
    },
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The kernel image cannot be read.
    #[error("Cannot read the guest kernel {path}")]
    Kernel {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The backend has no CPU.
    #[error("Cannot create a {} CPU: {reason}", backend.name())]
    Cpu {
        /// Which backend.
        backend: BackendKind,
        /// Why not.
        reason: BackendError,
    },
    /// No thread.
    #[error("Cannot start a thread for the virtual CPU")]
    Thread(#[source] std::io::Error),
    /// No random numbers.
    #[error("Cannot get random numbers from the host")]
    Random(#[source] std::io::Error),
    /// The root file system cannot be read.
    #[error("Cannot read the root file system {path}")]
    Rootfs {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A snapshot cannot be taken or restored.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It has ended.
    #[error("The machine has ended: {0}")]
    Ended(MachineEnd),
}

/// What a machine boots.
#[derive(Debug, Clone)]
pub struct BootConfig {
    /// Bytes of RAM.
    pub ram: u64,
    /// Number of CPUs.
    pub cpus: u8,
    /// What they can do.
    pub cpu: CpuModel,
    /// A vmlinux, plain or zstd.
    pub kernel: PathBuf,
    /// The first program.
    pub init: String,
    /// More kernel parameters.
    pub parameters: String,
    /// The root file system: an image of a disk, not changed. Its size is a multiple of 4096.
    pub rootfs: PathBuf,
    /// Where the disk keeps what the guest writes.
    pub storage: DiskStorage,
}

/// How a machine is restored.
#[derive(Debug, Clone)]
pub struct RestoreConfig {
    /// Where the disk keeps what the guest writes.
    pub storage: DiskStorage,
}

/// Numbers about a machine, for those who look for trouble.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// What the CPU has done.
    pub cpu: Counters,
    /// Times that it woke up from HLT.
    pub wakeups: u64,
    /// Guest time in nanoseconds.
    pub guest_ns: u64,
    /// Guest time at which a timer fires next.
    pub next_timer_ns: Option<u64>,
    /// Pages that differ from the base image.
    pub dirty_pages: u64,
    /// Pages that were never touched.
    pub absent_pages: u64,
    /// MSRs that the guest asked for and did not get, with the value if it was a write.
    pub unknown_msrs: Vec<(u32, Option<u64>)>,
    /// Address of the next instruction.
    pub rip: u64,
}

/// A virtual machine. Clones are the same machine; it ends when the last of them goes.
#[derive(Clone)]
pub struct Machine(Arc<Handle>);

struct Handle {
    core: Arc<Core>,
    thread: Mutex<Option<JoinHandle<()>>>,
    connector: VsockConnector,
    /// What the next capture is compared with; its lock is held for the length of a capture.
    lineage: Mutex<Option<Lineage>>,
    backend: BackendKind,
    ram: u64,
    cpus: u8,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Handle {
    fn kill(&self) {
        self.core.kill();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // The CPU's own thread may drop the last handle (in a waker): it ends by itself.
        if let Some(thread) = thread.take_if(|t| t.thread().id() != std::thread::current().id()) {
            // The thread catches panics; what it had to say is in the machine's end.
            let _ = thread.join();
        }
        // What the images hold of memory and locks goes too, unless a capture is being written: then with the handle.
        if let Ok(mut lineage) = self.lineage.try_lock() {
            *lineage = None;
        }
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("backend", &self.0.backend).field("ram", &self.0.ram).finish()
    }
}

impl Machine {
    /// A machine about to boot, paused.
    ///
    /// # Errors
    /// Everything that can be wrong with the configuration or the host.
    pub fn boot(config: BootConfig, backend: &dyn Backend) -> Result<Machine, MachineError> {
        let unreadable = |source| MachineError::Rootfs { path: config.rootfs.clone(), source };
        let base = Arc::new(RawImage::open(&config.rootfs).map_err(unreadable)?);
        let bytes = base.len();
        if bytes == 0 || !bytes.is_multiple_of(platform::PAGE_SIZE) {
            let size = format!("Its size is {bytes} bytes, not a multiple of 4096");
            return Err(unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, size)));
        }
        let parent = DiskParent::file(&config.rootfs).map_err(unreadable)?;
        Self::boot_from(base, parent, &config, backend)
    }

    /// A machine about to boot from the disk in a snapshot, paused, with as much RAM and as many CPUs as the one that was captured:
    /// `config.ram`, `config.cpus` and `config.rootfs` are not looked at.
    ///
    /// # Errors
    /// Everything that can be wrong with the snapshot, the configuration or the host.
    pub fn boot_snapshot(
        snapshot: &Arc<Snapshot>,
        mut config: BootConfig,
        backend: &dyn Backend,
    ) -> Result<Machine, MachineError> {
        let state = BootState::read(snapshot)?;
        (config.ram, config.cpus) = (state.ram, state.cpus);
        let disk = snapshot.disk();
        let base = Arc::new(DiskBase(Arc::clone(disk)));
        Self::boot_from(base, DiskParent::Image(Arc::clone(disk)), &config, backend)
    }

    fn boot_from(
        base: Arc<dyn Base>,
        parent: DiskParent,
        config: &BootConfig,
        backend: &dyn Backend,
    ) -> Result<Machine, MachineError> {
        let map = MemoryMap::new(config.ram).ok_or(MachineError::RamSize { bytes: config.ram })?;
        if !(1..=platform::MAX_CPUS).contains(&config.cpus) {
            return Err(MachineError::CpuCount { cpus: config.cpus });
        }
        let kernel = std::fs::read(&config.kernel)
            .map_err(|source| MachineError::Kernel { path: config.kernel.clone(), source })?;
        let ram = Arc::new(Ram::new(map)?);
        let memory = memory_of(&ram)?;
        let mut seed = [0; 32];
        rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty())
            .map_err(|e| MachineError::Random(e.into()))?;
        let command_line = platform::command_line(&config.init, &config.parameters);
        let state = boot::load(&memory, map, config.cpus, &kernel, &command_line, &seed)?;
        let refused = |reason| MachineError::Cpu { backend: backend.kind(), reason };
        let failed = |reason| refused(BackendError::Host(reason));
        let shape = Shape { cpus: config.cpus, model: config.cpu };
        let Vm { first: mut vcpu, others, chips } = backend.create_vm(&ram, shape).map_err(refused)?;
        vcpu.set_state(&state).map_err(failed)?;
        let (irqchip, clock) = host(Irqchip::new(config.cpus), Clock::new(map), chips).map_err(failed)?;
        let console = ConsoleLog::new();
        let disk = config.storage.overlay(base)?;
        let overlay = disk.clone();
        let devices = Devices::new(Parts { memory, irqchip: &irqchip, disk, console: console.clone() });
        let guts =
            Guts { ram, vcpu, others, devices: Arc::new(devices), halted: false, unknown_msrs: Vec::new() };
        let lineage = Lineage { memory: None, disk: parent, overlay, storage: config.storage.clone() };
        Self::assemble(guts, irqchip, clock, console, lineage, backend.kind())
    }

    /// A copy of the machine in a snapshot, paused. None of its memory or disk is read yet.
    ///
    /// # Errors
    /// Everything that can be wrong with the snapshot or the host.
    pub fn restore(
        snapshot: &Arc<Snapshot>,
        config: RestoreConfig,
        backend: &dyn Backend,
    ) -> Result<Machine, MachineError> {
        let state = MachineState::read(snapshot)?;
        let map = MemoryMap::new(state.ram).ok_or(MachineError::RamSize { bytes: state.ram })?;
        let ram = Arc::new(Ram::restore(map, Arc::new(MemorySource(Arc::clone(snapshot))))?);
        let memory = memory_of(&ram)?;
        let clock = Clock::restore(map, &state.clock).map_err(refuse::clock)?;
        if let Some(page) = clock.system_time_page() {
            ram.write(page.address, &page.bytes).map_err(refuse::clock)?;
        }
        let irqchip = Irqchip::restore(&state.irqchip, state.clock.guest_ns).map_err(refuse::irqchip)?;
        let failed =
            |reason| MachineError::Cpu { backend: backend.kind(), reason: BackendError::Host(reason) };
        let shape = Shape { cpus: state.cpus(), model: state.model() };
        let vm = backend.create_vm(&ram, shape).map_err(|reason| match reason {
            BackendError::Host(reason) => failed(reason),
            // Not this host's fault: the snapshot asks for another kind of CPU.
            reason => SnapshotError::Backend(reason).into(),
        })?;
        let Vm { first: mut vcpu, mut others, chips } = vm;
        vcpu.set_state(&state.cpu).map_err(refuse::cpu)?;
        for (vcpu, state) in others.iter_mut().zip(&state.others) {
            vcpu.set_other_state(state).map_err(refuse::cpu)?;
        }
        for (vcpu, state) in std::iter::once(&mut vcpu).chain(&mut others).zip(&state.hosts) {
            vcpu.set_host_state(state).map_err(SnapshotError::Backend)?;
        }
        // A backend with controllers of its own waits for interrupts itself.
        let halted = state.cpu.halted && chips.is_none();
        let (irqchip, clock) = host(irqchip, clock, chips).map_err(failed)?;
        let console = ConsoleLog::new();
        let disk = config.storage.overlay(Arc::new(DiskBase(Arc::clone(snapshot.disk()))))?;
        let overlay = disk.clone();
        let parts = Parts { memory, irqchip: &irqchip, disk, console: console.clone() };
        let devices = Devices::restore(parts, &state.devices).map_err(refuse::device)?;
        let guts = Guts { ram, vcpu, others, devices: Arc::new(devices), halted, unknown_msrs: Vec::new() };
        let lineage = Lineage {
            memory: Some(Arc::clone(snapshot.memory())),
            disk: DiskParent::Image(Arc::clone(snapshot.disk())),
            overlay,
            storage: config.storage,
        };
        Self::assemble(guts, irqchip, clock, console, lineage, backend.kind())
    }

    /// Processor time of the host that the first CPU's thread has used; zero when it has ended or the host does not say.
    pub fn cpu_time(&self) -> Duration {
        self.0.core.cpu_time()
    }

    /// [`capture_then`](Self::capture_then) of everything, with nothing to do in between.
    ///
    /// # Errors
    /// As there.
    pub fn capture(&self, store: &Arc<Store>, new: NewSnapshot) -> Result<Captured, MachineError> {
        self.capture_then(store, new, Content::Full, || {})
    }

    /// Takes a snapshot and publishes it. The machine stands still only while its registers are copied and what changed
    /// is marked; it runs on, if it was running, while this call compresses and writes. Captures of one machine take turns.
    /// `captured` is called once the content is fixed and the machine may run, before anything is compressed; not
    /// if that was not reached.
    ///
    /// # Errors
    /// It has ended, or the snapshot cannot be written: then nothing is published and nothing is lost.
    pub fn capture_then(
        &self,
        store: &Arc<Store>,
        new: NewSnapshot,
        content: Content,
        captured: impl FnOnce(),
    ) -> Result<Captured, MachineError> {
        let core = &self.0.core;
        let mut lineage = self.0.lineage.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lineage) = lineage.as_mut() else { return Err(self.ended_error()) };
        let started = Instant::now();
        let stopped = |body: &mut dyn FnMut(&mut Guts)| {
            body(core.hold()?.guts()?);
            Some(())
        };
        let prepared = Prepared::new(lineage, stopped)?;
        let prepared = prepared.ok_or_else(|| self.ended_error())?;
        let stopped = Instant::now();
        let mut held = core.hold().ok_or_else(|| self.ended_error())?;
        let Some(guts) = held.guts() else { return Err(self.ended_error()) };
        let clock = core.clock.state().map_err(SnapshotError::Host)?;
        let irqchip = core.irqchip.state(clock.guest_ns).map_err(SnapshotError::Host)?;
        let mut capture = Capture::take(guts, prepared, clock, irqchip, &lineage.storage, started)?;
        drop(held);
        capture.pause = stopped.elapsed();
        captured();
        Ok(capture.publish(lineage, store, new, content)?)
    }

    fn assemble(
        guts: Guts,
        irqchip: Arc<Irqchip>,
        clock: Clock,
        console: ConsoleLog,
        lineage: Lineage,
        backend: BackendKind,
    ) -> Result<Machine, MachineError> {
        let connector = guts.devices.connector();
        let ram = guts.ram.map().bytes();
        // At most MAX_CPUS.
        let cpus = 1 + guts.others.len() as u8;
        let (core, thread) =
            Core::spawn(guts, irqchip, Arc::new(clock), console).map_err(MachineError::Thread)?;
        let thread = Mutex::new(Some(thread));
        let lineage = Mutex::new(Some(lineage));
        Ok(Machine(Arc::new(Handle { core, thread, connector, lineage, backend, ram, cpus })))
    }

    /// Which kind of CPU it has.
    pub fn backend(&self) -> BackendKind {
        self.0.backend
    }

    /// Number of CPUs.
    pub fn cpus(&self) -> u8 {
        self.0.cpus
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.0.ram
    }

    /// Lets the machine run; it is created paused.
    ///
    /// # Errors
    /// It has ended.
    pub fn resume(&self) -> Result<(), MachineError> {
        if self.0.core.set_paused(false) { Ok(()) } else { Err(self.ended_error()) }
    }

    /// Stops the CPU, the devices and guest time. Blocks until they stand, which takes microseconds.
    ///
    /// # Errors
    /// It has ended.
    pub fn pause(&self) -> Result<(), MachineError> {
        if self.0.core.set_paused(true) { Ok(()) } else { Err(self.ended_error()) }
    }

    /// The way to the guest's vsock ports.
    pub fn vsock(&self) -> VsockConnector {
        self.0.connector.clone()
    }

    /// The last part of what the guest wrote to its console.
    pub fn console_tail(&self) -> String {
        self.0.core.console.tail()
    }

    /// Calls `observer` for each further line of the console, on the CPU's thread.
    pub fn observe_console(&self, observer: LineObserver) {
        self.0.core.console.observe(observer);
    }

    /// Numbers about the machine. Stops it for some microseconds.
    pub fn diagnostics(&self) -> Diagnostics {
        let core = &self.0.core;
        let mut diagnostics = Diagnostics { guest_ns: core.clock.now(), ..Diagnostics::default() };
        diagnostics.next_timer_ns = core.irqchip.deadline();
        if let Some(mut held) = core.hold()
            && let Some(guts) = held.guts()
        {
            // Those that are not collected now are so by the next capture.
            let _ = guts.vcpu.collect_dirty();
            (diagnostics.dirty_pages, diagnostics.absent_pages) = guts.ram.counts();
            diagnostics.unknown_msrs.clone_from(&guts.unknown_msrs);
            diagnostics.rip = guts.vcpu.state().map_or(0, |state| state.rip);
        }
        (diagnostics.cpu, diagnostics.wakeups) = core.counters();
        diagnostics
    }

    /// How the machine ended, as soon as it has.
    pub fn ended(&self) -> impl Future<Output = MachineEnd> + Send + 'static {
        let mut end = self.0.core.end();
        async move {
            loop {
                if let Some(end) = end.borrow_and_update().clone() {
                    return end;
                }
                if end.changed().await.is_err() {
                    // The core is gone, and with it the machine.
                    let console = String::new();
                    return MachineEnd { kind: EndKind::Killed, detail: String::new(), console };
                }
            }
        }
    }

    /// How the machine ended, if it has.
    pub fn end(&self) -> Option<MachineEnd> {
        self.0.core.end().borrow().clone()
    }

    /// Ends the machine and waits until its thread is gone and its memory is given back. May be called any number of
    /// times.
    pub fn kill(&self) {
        self.0.kill();
    }

    fn ended_error(&self) -> MachineError {
        let killed = || MachineEnd { kind: EndKind::Killed, detail: String::new(), console: String::new() };
        MachineError::Ended(self.end().unwrap_or_else(killed))
    }
}

/// Lets the backend have the controllers and the clock, if it has its own.
fn host(
    irqchip: Irqchip,
    clock: Clock,
    chips: Option<Arc<dyn HostChips>>,
) -> Result<(Arc<Irqchip>, Clock), String> {
    let Some(chips) = chips else { return Ok((Arc::new(irqchip), clock)) };
    let irqchip = irqchip.hosted(clock.now(), &chips)?;
    Ok((Arc::new(irqchip), clock.hosted(&chips)?))
}

fn memory_of(ram: &Arc<Ram>) -> Result<ram::view::GuestMemory, MachineError> {
    view(ram).map_err(|_| MachineError::RamSize { bytes: ram.map().bytes() })
}
