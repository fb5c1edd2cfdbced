//! A machine as a snapshot, and back.
//!
//! The state sections are CBOR, one per part, each with a version of its own; SNAPSHOT.md lists them. Everything that comes
//! back is untrusted: each part checks its own, and nothing runs before all of them agreed.
//!
//! A capture stops the machine only to copy registers and to mark the pages and blocks that changed; reading, compressing
//! and writing them happen behind the running guest ([`ram::capture`](super::ram::capture),
//! [`disk`](crate::devices::disk)). What is captured is clean from then on, and the snapshot is what the next capture is
//! compared with, so that a second snapshot stores what changed since the first. If writing fails, all of it is dirty
//! again and nothing is lost.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use amber_layers::{
    CaptureStats, FRAME_PAGES, FormatError, Image, NewSnapshot, PAGE_SIZE, Page, PageKind, SectionId,
    Snapshot, SnapshotMeta, Store, StoreError,
};
use amber_x86::SharedCode;
use amber_x86::state::CpuState;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::clock::ClockState;
use super::devices::DevicesState;
use super::irq::IrqchipState;
use super::platform;
use super::ram::PageSource;
use super::ram::capture::{MemoryCapture, PreCopy};
use super::run::Guts;
use super::vcpu::{BackendError, CpuModel, HostCpu, LiveCapture, OtherCpu};
use crate::devices::disk::{Aside, BLOCK_SIZE, Base, FrozenDisk, Overlay, Storage};

const _: () = assert!(BLOCK_SIZE == PAGE_SIZE && PAGE_SIZE as u64 == platform::PAGE_SIZE);

/// A section of machine state: number, newest version, name.
struct Kind(SectionId, u16, &'static str);

const PLATFORM: Kind = Kind(SectionId(0x100), 1, "platform");
const CPU: Kind = Kind(SectionId(0x101), 1, "CPU");
const IRQCHIP: Kind = Kind(SectionId(0x102), 1, "interrupt controller");
const CLOCK: Kind = Kind(SectionId(0x103), 1, "clock");
const BLOCK: Kind = Kind(SectionId(0x104), 1, "block device");
const VSOCK: Kind = Kind(SectionId(0x105), 1, "vsock device");
const ENTROPY: Kind = Kind(SectionId(0x106), 1, "entropy device");
const SERIAL: Kind = Kind(SectionId(0x107), 1, "serial device");
/// Only where there are several CPUs.
const OTHER_CPUS: Kind = Kind(SectionId(0x108), 1, "other CPUs");
/// Instead of all others, where there is no memory.
const BOOT: Kind = Kind(SectionId(0x109), 1, "boot");
/// Only where they are the host's.
const HOST_CPUS: Kind = Kind(SectionId(0x10a), 1, "host CPU");
const KNOWN: [&Kind; 11] =
    [&PLATFORM, &CPU, &IRQCHIP, &CLOCK, &BLOCK, &VSOCK, &ENTROPY, &SERIAL, &OTHER_CPUS, &BOOT, &HOST_CPUS];

/// What of a machine a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Content {
    /// Memory, devices and disk: a copy goes on.
    #[default]
    Full,
    /// The disk: a copy boots.
    Disk,
}

impl Content {
    /// That of a snapshot. Only its list of sections is looked at.
    pub fn of(snapshot: &Snapshot) -> Content {
        if snapshot.section(BOOT.0).is_some() { Content::Disk } else { Content::Full }
    }
}

/// What a machine that boots from a snapshot's disk has to be like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BootState {
    version: u16,
    pub(super) ram: u64,
    pub(super) cpus: u8,
}

impl BootState {
    /// That of a snapshot, which may also hold memory.
    pub(super) fn read(snapshot: &Snapshot) -> Result<BootState, SnapshotError> {
        if Content::of(snapshot) == Content::Full {
            let state = MachineState::read(snapshot)?;
            return Ok(BootState { version: platform::VERSION, ram: state.ram, cpus: state.cpus() });
        }
        let known: Vec<(SectionId, u16)> = KNOWN.iter().map(|kind| (kind.0, kind.1)).collect();
        snapshot.check_sections(&known)?;
        decode(snapshot, &BOOT)
    }
}

/// A snapshot cannot be restored, or one cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It has sections that this version does not know.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It was taken on a newer platform.
    #[error(
        "The snapshot is of platform version {found}, this version of Amberbox knows {known}. Update Amberbox"
    )]
    NewerPlatform {
        /// The snapshot's.
        found: u16,
        /// Ours.
        known: u16,
    },
    /// A section is not there.
    #[error("The snapshot has no {0} state")]
    Missing(&'static str),
    /// A section holds what no machine can have.
    #[error("The snapshot's {section} state is damaged: {reason}")]
    Invalid {
        /// Which section.
        section: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The disk's private part cannot be kept.
    #[error("Cannot create storage for the sandbox's disk in {}", .dir.display())]
    Disk {
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The backend has no CPUs such as the snapshot's.
    #[error("The snapshot cannot be restored here: {0}")]
    Backend(BackendError),
    /// The host does not tell the state of the machine.
    #[error("The host does not tell the state of the virtual machine: {0}")]
    Host(String),
    /// The store cannot take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a snapshot says of the platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PlatformState {
    version: u16,
    ram: u64,
}

/// All of a machine's state but memory and disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MachineState {
    pub(super) ram: u64,
    pub(super) cpu: CpuState,
    /// CPUs beyond the first.
    pub(super) others: Vec<OtherCpu>,
    /// What each CPU has beyond the baseline; empty if nothing.
    pub(super) hosts: Vec<HostCpu>,
    pub(super) irqchip: IrqchipState,
    pub(super) clock: ClockState,
    pub(super) devices: DevicesState,
}

impl MachineState {
    /// The sections to store.
    fn sections(&self) -> Result<Vec<(&'static Kind, Vec<u8>)>, SnapshotError> {
        let platform = PlatformState { version: platform::VERSION, ram: self.ram };
        let mut sections = vec![
            encode(&PLATFORM, &platform)?,
            encode(&CPU, &self.cpu)?,
            encode(&IRQCHIP, &self.irqchip)?,
            encode(&CLOCK, &self.clock)?,
            encode(&BLOCK, &self.devices.block)?,
            encode(&VSOCK, &self.devices.vsock)?,
            encode(&ENTROPY, &self.devices.entropy)?,
            encode(&SERIAL, &self.devices.serial)?,
        ];
        if !self.others.is_empty() {
            sections.push(encode(&OTHER_CPUS, &self.others)?);
        }
        if !self.hosts.is_empty() {
            sections.push(encode(&HOST_CPUS, &self.hosts)?);
        }
        Ok(sections)
    }

    /// What the CPUs can do.
    pub(super) fn model(&self) -> CpuModel {
        if self.hosts.is_empty() { CpuModel::Baseline } else { CpuModel::Host }
    }

    /// Number of CPUs.
    pub(super) fn cpus(&self) -> u8 {
        // At most MAX_CPUS, which was checked.
        1 + self.others.len() as u8
    }

    /// Reads the sections of a snapshot. What they say has still to be checked by those whom it concerns.
    pub(super) fn read(snapshot: &Snapshot) -> Result<MachineState, SnapshotError> {
        let known: Vec<(SectionId, u16)> = KNOWN.iter().map(|kind| (kind.0, kind.1)).collect();
        snapshot.check_sections(&known)?;
        let platform: PlatformState = decode(snapshot, &PLATFORM)?;
        if platform.version > platform::VERSION {
            return Err(SnapshotError::NewerPlatform { found: platform.version, known: platform::VERSION });
        }
        if Some(platform.ram) != snapshot.memory().pages().checked_mul(platform::PAGE_SIZE) {
            return Err(invalid(&PLATFORM, "its RAM is not that of the memory image"));
        }
        let others: Vec<OtherCpu> = match snapshot.section(OTHER_CPUS.0) {
            Some(_) => decode(snapshot, &OTHER_CPUS)?,
            None => Vec::new(),
        };
        if others.len() >= usize::from(platform::MAX_CPUS) {
            return Err(invalid(&OTHER_CPUS, "there are too many"));
        }
        let hosts: Vec<HostCpu> = match snapshot.section(HOST_CPUS.0) {
            Some(_) => decode(snapshot, &HOST_CPUS)?,
            None => Vec::new(),
        };
        if !hosts.is_empty() && hosts.len() != 1 + others.len() {
            return Err(invalid(&HOST_CPUS, "there is not one for each CPU"));
        }
        Ok(MachineState {
            ram: platform.ram,
            cpu: decode(snapshot, &CPU)?,
            others,
            hosts,
            irqchip: decode(snapshot, &IRQCHIP)?,
            clock: decode(snapshot, &CLOCK)?,
            devices: DevicesState {
                block: decode(snapshot, &BLOCK)?,
                vsock: decode(snapshot, &VSOCK)?,
                entropy: decode(snapshot, &ENTROPY)?,
                serial: decode(snapshot, &SERIAL)?,
            },
        })
    }
}

fn encode<T: Serialize>(kind: &'static Kind, state: &T) -> Result<(&'static Kind, Vec<u8>), SnapshotError> {
    let mut bytes = Vec::new();
    ciborium::into_writer(state, &mut bytes).map_err(|e| invalid(kind, e))?;
    Ok((kind, bytes))
}

fn decode<T: DeserializeOwned>(snapshot: &Snapshot, kind: &Kind) -> Result<T, SnapshotError> {
    let section = snapshot.section(kind.0).ok_or(SnapshotError::Missing(kind.2))?;
    let mut rest = section.bytes.as_slice();
    let state = ciborium::from_reader(&mut rest).map_err(|e| invalid(kind, e))?;
    if rest.is_empty() { Ok(state) } else { Err(invalid(kind, "bytes are left over")) }
}

fn invalid(kind: &Kind, reason: impl ToString) -> SnapshotError {
    SnapshotError::Invalid { section: kind.2, reason: reason.to_string() }
}

/// Turns a part's complaint about its state into ours.
pub(super) mod refuse {
    use super::{CLOCK, CPU, IRQCHIP, Kind, SnapshotError, invalid};

    fn by(kind: &'static Kind, reason: impl ToString) -> SnapshotError {
        invalid(kind, reason)
    }
    pub(in crate::machine) fn cpu(reason: impl ToString) -> SnapshotError {
        by(&CPU, reason)
    }
    pub(in crate::machine) fn irqchip(reason: impl ToString) -> SnapshotError {
        by(&IRQCHIP, reason)
    }
    pub(in crate::machine) fn clock(reason: impl ToString) -> SnapshotError {
        by(&CLOCK, reason)
    }
    pub(in crate::machine) fn device(reason: impl ToString) -> SnapshotError {
        SnapshotError::Invalid { section: "device", reason: reason.to_string() }
    }
}

/// The memory image of a snapshot, which stays open as long as RAM needs it.
pub(super) struct MemorySource(pub(super) Arc<Snapshot>);

impl PageSource for MemorySource {
    fn pages(&self) -> u64 {
        self.0.memory().pages()
    }

    fn backing(&self) -> BorrowedFd<'_> {
        self.0.memory().backing()
    }

    fn data_runs(&self) -> Vec<(u64, u64)> {
        let data = |(range, kind)| (kind == PageKind::Data).then_some(range);
        self.0.memory().extents().filter_map(data).map(|range| (range.first, range.count)).collect()
    }

    fn ensure(&self, page: u64) -> Result<Range<u64>, String> {
        let image = self.0.memory();
        image.ensure(page, 1).map_err(|e| e.to_string())?;
        // A frame holds up to FRAME_PAGES pages, mostly neighbours; those that are there need not be asked for again.
        let reach = FRAME_PAGES as u64;
        let (low, high) = (page.saturating_sub(reach), (page + reach).min(image.pages()));
        let first = (low..page).rev().take_while(|p| image.is_present(*p)).last().unwrap_or(page);
        let last = (page + 1..high).take_while(|p| image.is_present(*p)).last().unwrap_or(page);
        Ok(first..last + 1)
    }

    fn shared_code(&self) -> Option<Arc<SharedCode>> {
        self.0.memory().derived(SharedCode::new)
    }
}

/// A disk image under a machine's overlay.
pub(super) struct DiskBase(pub(super) Arc<Image>);

impl Base for DiskBase {
    fn len(&self) -> u64 {
        self.0.pages() * PAGE_SIZE as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some(last) = (buf.len() as u64).checked_sub(1).map(|n| offset.saturating_add(n)) else {
            return Ok(());
        };
        let (first, last) = (offset / PAGE_SIZE as u64, last / PAGE_SIZE as u64);
        self.0.ensure(first, last - first + 1).map_err(io::Error::other)?;
        let (mut offset, mut buf) = (offset, buf);
        while !buf.is_empty() {
            match rustix::io::pread(self.0.backing(), &mut *buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Where a machine's disk keeps what it wrote: files in a directory, or anonymous memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskStorage {
    /// Unlinked files in this directory.
    Directory(PathBuf),
    /// Memory.
    Memory,
}

impl DiskStorage {
    fn storage(&self) -> Storage<'_> {
        match self {
            DiskStorage::Directory(dir) => Storage::Directory(dir),
            DiskStorage::Memory => Storage::Memory,
        }
    }

    fn failed(&self, source: io::Error) -> SnapshotError {
        let dir = match self {
            DiskStorage::Directory(dir) => dir.clone(),
            DiskStorage::Memory => "memory".into(),
        };
        SnapshotError::Disk { dir, source }
    }

    /// A fresh overlay over `base`.
    pub(super) fn overlay(&self, base: Arc<dyn Base>) -> Result<Overlay, SnapshotError> {
        let len = base.len();
        Overlay::new(Some(base), len, self.storage()).map_err(|e| self.failed(e))
    }

    /// Room for a capture of `disk`.
    pub(super) fn aside(&self, disk: &Overlay) -> Result<Aside, SnapshotError> {
        disk.aside(self.storage()).map_err(|e| self.failed(e))
    }

    fn freeze(&self, disk: &Overlay, aside: Aside) -> Result<FrozenDisk, SnapshotError> {
        disk.freeze(aside).map_err(|e| self.failed(e))
    }
}

/// The captured part of memory.
struct CapturedMemory(MemoryCapture);

impl amber_layers::PageSource for CapturedMemory {
    fn read(&self, page: u64, out: &mut Page) -> io::Result<()> {
        self.0.read(page, out)
    }
}

/// What is under a disk's overlay, for captures.
pub(super) enum DiskParent {
    /// An image: only what the overlay owns has to be stored.
    Image(Arc<Image>),
    /// A plain file, of which these blocks hold data (first, count): they have to be stored too.
    File(Vec<(u64, u64)>),
}

impl DiskParent {
    /// A plain file. File systems that know no holes say that all of it is data.
    pub(super) fn file(path: &Path) -> io::Result<DiskParent> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < len {
            let start = match seek(&file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                Err(e) => return Err(e.into()),
            };
            at = seek(&file, SeekFrom::Hole(start))?;
            let first = start / PAGE_SIZE as u64;
            runs.push((first, at.div_ceil(PAGE_SIZE as u64) - first));
        }
        Ok(DiskParent::File(runs))
    }
}

/// What a machine's next capture is compared with.
pub(super) struct Lineage {
    /// The memory image that clean pages equal, or zeros.
    pub(super) memory: Option<Arc<Image>>,
    /// What is under the disk's overlay.
    pub(super) disk: DiskParent,
    /// The disk itself.
    pub(super) overlay: Overlay,
    pub(super) storage: DiskStorage,
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct Captured {
    /// What was published.
    pub meta: SnapshotMeta,
    /// How long the machine stood still.
    pub pause: Duration,
    /// How long it took all in all.
    pub total: Duration,
    /// What became of the dirty pages of memory.
    pub memory: CaptureStats,
    /// What became of the dirty blocks of the disk.
    pub disk: CaptureStats,
}

/// How hard templates are compressed: each is made once and read by everybody.
const TEMPLATE_LEVEL: i32 = 3;

/// Rounds of pre-copy at most, and the number of pages that the last one may have to copy while the machine stands.
const ROUNDS: usize = 8;
const LAST_ROUND: usize = 256;

/// What is made ready for a capture while the machine still runs.
pub(super) struct Prepared {
    aside: Aside,
    copies: Option<PreCopy>,
}

impl Prepared {
    /// Makes room, and copies memory in advance where the backend needs that. `stopped` stops the machine for its argument.
    pub(super) fn new(
        lineage: &Lineage,
        mut stopped: impl FnMut(&mut dyn FnMut(&mut Guts)) -> Option<()>,
    ) -> Result<Option<Prepared>, SnapshotError> {
        let aside = lineage.storage.aside(&lineage.overlay)?;
        let mut copies: Option<PreCopy> = None;
        let mut fewest = usize::MAX;
        for _ in 0..ROUNDS {
            let mut round = Vec::new();
            let mut collected = Ok(());
            let mut begin = |guts: &mut Guts| {
                if guts.vcpu.live_capture() == LiveCapture::PreCopy {
                    collected = guts.vcpu.collect_dirty();
                    round = copies.get_or_insert_with(|| PreCopy::new(&guts.ram)).begin_round();
                    guts.vcpu.forget_dirty();
                }
            };
            if stopped(&mut begin).is_none() {
                return Ok(None);
            }
            let Some(copies) = &mut copies else { break };
            copies.copy(&round);
            collected.map_err(SnapshotError::Host)?;
            // A guest that writes faster than it is copied does not get slower by trying again.
            if round.len() <= LAST_ROUND || round.len() >= fewest {
                break;
            }
            fewest = round.len();
        }
        Ok(Some(Prepared { aside, copies }))
    }
}

/// A machine's content at one moment.
pub(super) struct Capture {
    state: MachineState,
    memory: CapturedMemory,
    disk: FrozenDisk,
    pages: u64,
    started: Instant,
    pub(super) pause: Duration,
}

impl Capture {
    /// Captures a stopped machine. Memory and disk are clean afterwards: publish, or drop to make them dirty again.
    pub(super) fn take(
        guts: &mut Guts,
        prepared: Prepared,
        clock: ClockState,
        irqchip: IrqchipState,
        storage: &DiskStorage,
        started: Instant,
    ) -> Result<Capture, SnapshotError> {
        let disk = storage.freeze(guts.devices.disk(), prepared.aside)?;
        let mut cpu = guts.vcpu.state().map_err(SnapshotError::Host)?;
        cpu.halted |= guts.halted;
        let others = guts.others.iter().map(|vcpu| vcpu.other_state()).collect::<Result<_, _>>();
        let others = others.map_err(SnapshotError::Host)?;
        let vcpus = std::iter::once(&guts.vcpu).chain(&guts.others);
        let hosts = vcpus.filter_map(|vcpu| vcpu.host_state().transpose()).collect::<Result<_, _>>();
        let hosts = hosts.map_err(SnapshotError::Host)?;
        let devices = guts.devices.state();
        let state = MachineState { ram: guts.ram.map().bytes(), cpu, others, hosts, irqchip, clock, devices };
        guts.vcpu.collect_dirty().map_err(SnapshotError::Host)?;
        let memory = match prepared.copies {
            Some(copies) => MemoryCapture::copied(copies),
            None => MemoryCapture::on_write(&guts.ram),
        };
        guts.vcpu.forget_dirty();
        let (memory, pages) = (CapturedMemory(memory), guts.ram.map().pages());
        Ok(Capture { state, memory, disk, pages, started, pause: Duration::ZERO })
    }

    /// Writes the capture to a store. Afterwards `lineage` is that of the snapshot; if it fails, that of before.
    pub(super) fn publish(
        self,
        lineage: &mut Lineage,
        store: &Arc<Store>,
        mut new: NewSnapshot,
        content: Content,
    ) -> Result<Captured, SnapshotError> {
        let mut writer = store.writer();
        if new.kind == amber_layers::Kind::Template {
            writer.level(TEMPLATE_LEVEL);
        }
        let full = content == Content::Full;
        // The disk first: a page of memory that equals one of its blocks is not stored again.
        let blocks = self.disk.blocks();
        let owned = self.disk.dirty_blocks();
        let (parent, data) = match &lineage.disk {
            DiskParent::Image(image) => {
                writer.share(image)?;
                (Some(&**image), &[][..])
            }
            DiskParent::File(data) => (None, data.as_slice()),
        };
        let dirty = data.iter().flat_map(|(first, count)| *first..first + count).chain(owned);
        let disk = writer.disk(parent, blocks, dirty, &self.disk)?;
        let memory = if full {
            let dirty = self.memory.0.pages().iter().copied();
            writer.memory(lineage.memory.as_deref(), self.pages, dirty, &self.memory)?
        } else {
            CaptureStats::default()
        };
        let sections = if full {
            self.state.sections()?
        } else {
            let (ram, cpus) = (self.state.ram, self.state.cpus());
            vec![encode(&BOOT, &BootState { version: platform::VERSION, ram, cpus })?]
        };
        for (kind, bytes) in sections {
            writer.section(kind.0, kind.1, true, bytes)?;
        }
        new.platform = u32::from(platform::VERSION);
        let meta = writer.publish(new)?;
        // The images only, not the snapshot: its source does not keep it from being deleted. A snapshot that vanished at once
        // or cannot be opened is no basis for the next one; it is published all the same.
        if let Ok(snapshot) = store.open_tagged(&meta.id, &meta.tag)
            && snapshot.meta().build == meta.build
        {
            // A snapshot of the disk says nothing of memory: what was dirty still is.
            if full {
                lineage.memory = Some(Arc::clone(snapshot.memory()));
                self.memory.0.commit();
            }
            lineage.disk = DiskParent::Image(Arc::clone(snapshot.disk()));
            self.disk.commit();
        }
        Ok(Captured { meta, pause: self.pause, total: self.started.elapsed(), memory, disk })
    }
}
