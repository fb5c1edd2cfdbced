//! Whole machines with guests of a few instructions, on the software CPU.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use amber_layers::{NewSnapshot, Page, SectionId, Snapshot, Store};
use amber_x86::{GuestRam, PageFlags};
use tempfile::TempDir;

use super::soft::Soft;
use super::vcpu::Vcpu;
use super::*;
use crate::devices::disk::Disk;

/// Where the guests run and count.
pub(super) const CODE: u64 = 0x100_0000;
pub(super) const COUNTER: u64 = 0x120_0000;

/// An ELF file with one segment at [`CODE`], which is also its entry.
pub(super) fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // An executable for x86-64.
    elf.extend([CODE, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend([0u8; 4]);
    elf.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend([1u32, 5].iter().flat_map(|half| half.to_le_bytes())); // Load; read and execute.
    let len = code.len() as u64;
    elf.extend([120, CODE, CODE, len, len, 4096].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(code);
    elf
}

/// `out 0x3f8, 'A'; out 0x64, 0xfe`: says something and resets.
pub(super) const RESET: [u8; 12] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xf4];
/// `ud2` without an interrupt table.
pub(super) const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];
/// `cli; hlt`
pub(super) const POWER_OFF: [u8; 2] = [0xfa, 0xf4];
/// `loop: inc qword [COUNTER]; jmp loop`
pub(super) const COUNT: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x01, 0xeb, 0xf6];

/// Sleeps, and counts the ticks of a periodic timer of 1 ms.
pub(super) fn ticker() -> Vec<u8> {
    let mut image = vec![0; 0xc10];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let lapic = |register: u16, value: u32| {
        [&[0xc7, 0x80][..], &u32::from(register).to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let mut code = vec![0x0f, 0x01, 0x1c, 0x25, 0x00, 0x03, 0x00, 0x01]; // lidt [CODE + 0x300]
    code.extend([0xb8, 0x00, 0x00, 0xe0, 0xfe]); // mov eax, LAPIC_BASE
    code.extend(lapic(0xf0, 0x1ff)); // Enabled.
    code.extend(lapic(0x3e0, 0xb)); // Divide by 1.
    code.extend(lapic(0x320, 0x2_0040)); // Periodic, vector 0x40.
    code.extend(lapic(0x380, 1_000_000));
    code.extend([0xfb, 0xf4, 0xeb, 0xfd]); // sti; loop: hlt; jmp loop
    put(0, &code);
    let mut handler = COUNT[..8].to_vec();
    handler.extend(lapic(0xb0, 0)); // End of interrupt.
    handler.extend([0x48, 0xcf]); // iretq
    put(0x200, &handler);
    put(0x300, &[0xff, 0x0f]); // The table's limit and base.
    put(0x302, &(CODE + 0x800).to_le_bytes());
    // An interrupt gate to the handler.
    let gate = (CODE + 0x200) & 0xffff | 0x10 << 16 | 0x8e << 40 | (CODE + 0x200) >> 16 << 48;
    put(0x800 + 0x40 * 16, &gate.to_le_bytes());
    image
}

pub(super) struct Rig {
    dir: TempDir,
    pub(super) store: Arc<Store>,
    backend: &'static dyn Backend,
}

impl Rig {
    fn new() -> Rig {
        Rig::on(&Soft)
    }

    pub(super) fn on(backend: &'static dyn Backend) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("rootfs"), vec![0x5a; 1 << 20]).unwrap();
        let store = Arc::new(Store::open(&dir.path().join("store")).unwrap());
        Rig { dir, store, backend }
    }

    pub(super) fn config(&self, code: &[u8]) -> BootConfig {
        let path = |name: &str| -> PathBuf { self.dir.path().join(name) };
        std::fs::write(path("kernel"), kernel(code)).unwrap();
        BootConfig {
            ram: 64 << 20,
            cpus: 1,
            cpu: vcpu::CpuModel::Baseline,
            kernel: path("kernel"),
            init: "/init".into(),
            parameters: String::new(),
            rootfs: path("rootfs"),
            storage: DiskStorage::Directory(self.dir.path().to_owned()),
        }
    }

    pub(super) fn boot(&self, code: &[u8]) -> Machine {
        Machine::boot(self.config(code), self.backend).unwrap()
    }

    pub(super) fn run(&self, code: &[u8]) -> Machine {
        let machine = self.boot(code);
        machine.resume().unwrap();
        machine
    }

    pub(super) fn snapshot(&self, machine: &Machine) -> (Captured, Arc<Snapshot>) {
        let captured = machine.capture(&self.store, NewSnapshot::default()).unwrap();
        let snapshot = self.store.open_snapshot(&captured.meta.id).unwrap();
        (captured, snapshot)
    }

    fn restore(&self, snapshot: &Arc<Snapshot>) -> Result<Machine, MachineError> {
        restore_on(self.backend, snapshot)
    }
}

pub(super) fn restore_on(backend: &dyn Backend, snapshot: &Arc<Snapshot>) -> Result<Machine, MachineError> {
    Machine::restore(snapshot, RestoreConfig { storage: DiskStorage::Memory }, backend)
}

pub(super) fn counter(snapshot: &Snapshot) -> u64 {
    let mut page: Page = [0; 4096];
    snapshot.memory().read_page(COUNTER / 4096, &mut page).unwrap();
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

pub(super) fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn end_of(machine: &Machine) -> MachineEnd {
    wait("the end", || machine.end().is_some());
    machine.end().unwrap()
}

#[test]
fn a_guest_that_resets_ends_with_its_last_words() {
    let machine = Rig::new().run(&RESET);
    let end = end_of(&machine);
    assert_eq!((end.kind, end.console.as_str()), (EndKind::Reset, "A"));
    assert_eq!(machine.console_tail(), "A");
    assert!(matches!(machine.resume(), Err(MachineError::Ended(_))));
    assert!(matches!(machine.pause(), Err(MachineError::Ended(_))));
}

#[test]
fn a_triple_fault_tells_its_story() {
    let end = end_of(&Rig::new().run(&TRIPLE_FAULT));
    assert_eq!(end.kind, EndKind::Reset);
    assert!(!end.detail.is_empty());
}

#[test]
fn a_halt_that_nothing_can_end_is_a_power_off() {
    assert_eq!(end_of(&Rig::new().run(&POWER_OFF)).kind, EndKind::PowerOff);
}

#[test]
fn a_machine_runs_only_when_told_to() {
    let machine = Rig::new().boot(&COUNT);
    assert_eq!(machine.diagnostics().cpu.instructions, 0);
    machine.resume().unwrap();
    wait("counting", || machine.diagnostics().cpu.instructions > 100_000);
    machine.pause().unwrap();
    let still = machine.diagnostics();
    assert_eq!(machine.diagnostics(), still);
    machine.resume().unwrap();
    wait("more counting", || machine.diagnostics().cpu.instructions > still.cpu.instructions);
    assert!(machine.diagnostics().guest_ns > still.guest_ns);
}

#[test]
fn a_sleeping_guest_is_woken_by_its_timer_and_does_nothing_else() {
    let machine = Rig::new().run(&ticker());
    wait("ticks", || machine.diagnostics().wakeups > 20);
    let d = machine.diagnostics();
    // A tick is HLT, JMP, INC, MOV and IRETQ.
    assert!(d.cpu.instructions <= 10 + 5 * (d.cpu.interrupts + 1), "{d:?}");
}

#[test]
fn a_disk_that_cannot_be_read_any_more_ends_the_machine() {
    let rig = Rig::new();
    let machine = rig.run(&COUNT);
    std::fs::write(rig.dir.path().join("rootfs"), [0; 100]).unwrap();
    let mut held = machine.0.core.hold().unwrap();
    let disk = held.guts().unwrap().devices.disk().clone();
    drop(held);
    assert!(disk.read_at(1 << 19, &mut [0; 4096]).is_err());
    let end = end_of(&machine);
    assert_eq!(end.kind, EndKind::Failed);
    assert!(end.detail.starts_with("The disk image cannot be read: "), "{end}");
}

#[test]
fn killing_is_idempotent_and_works_from_anywhere() {
    let rig = Rig::new();
    for code in [&COUNT[..], &ticker()] {
        let machine = rig.run(code);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| machine.kill());
            }
        });
        machine.kill();
        assert_eq!(machine.end().unwrap().kind, EndKind::Killed);
        assert!(matches!(machine.capture(&rig.store, NewSnapshot::default()), Err(MachineError::Ended(_))));
    }
    // One that never ran.
    rig.boot(&COUNT).kill();
}

#[tokio::test]
async fn the_end_can_be_awaited_after_the_handles_are_gone() {
    let machine = Rig::new().run(&COUNT);
    let ended = machine.ended();
    tokio::task::spawn_blocking(move || drop(machine)).await.unwrap();
    assert_eq!(ended.await.kind, EndKind::Killed);
}

#[test]
fn a_copy_goes_on_where_the_snapshot_was_taken_and_diverges() {
    let rig = Rig::new();
    for code in [&COUNT[..], &ticker()] {
        let machine = rig.run(code);
        wait("counting", || machine.diagnostics().cpu.instructions > 100);
        let (first, snapshot) = rig.snapshot(&machine);
        let then = counter(&snapshot);

        let copy = rig.restore(&snapshot).unwrap();
        let (_, unchanged) = rig.snapshot(&copy);
        assert_eq!(counter(&unchanged), then);
        assert!(copy.diagnostics().guest_ns > 0);
        copy.resume().unwrap();
        wait("the copy's counting", || counter(&rig.snapshot(&copy).1) > then);

        // The original goes on as well, and what did not change is not stored again.
        wait("the original's counting", || counter(&rig.snapshot(&machine).1) > then);
        let (second, _) = rig.snapshot(&machine);
        assert!(second.memory.dirty <= 2 && first.memory.dirty > 2, "{second:?}");
        assert_eq!((first.disk.own, second.disk.own), (256, 0));
    }
}

/// Runs a copy until it has counted; how many sequences it decoded itself, and its counter.
fn run_copy(rig: &Rig, copy: &Machine) -> (u64, i64) {
    let before = copy.diagnostics().cpu.instructions;
    copy.resume().unwrap();
    wait("counting", || copy.diagnostics().cpu.instructions > before + 1000);
    copy.pause().unwrap();
    let decoded =
        copy.diagnostics().cpu.other.iter().find(|(name, _)| *name == "sequences decoded").unwrap().1;
    (decoded, counter(&rig.snapshot(copy).1) as i64)
}

#[test]
fn copies_share_what_was_decoded_of_their_image_and_nothing_else() {
    let rig = Rig::new();
    let snapshot = rig.snapshot(&rig.boot(&COUNT)).1;
    // `dec` where the image has `inc`: once as a device would write it, once as if the news of it had not arrived yet.
    for announced in [true, false] {
        let changed = rig.restore(&snapshot).unwrap();
        let mut held = changed.0.core.hold().unwrap();
        let ram = &held.guts().unwrap().ram;
        ram.write(CODE + 2, &[0x0c]).unwrap();
        let flag = &ram.flags()[(CODE / 4096) as usize];
        if !announced {
            flag.fetch_and(!PageFlags::DIRTY, Ordering::SeqCst);
        }
        drop(held);
        let (decoded, count) = run_copy(&rig, &changed);
        assert!(decoded > 0 && count < 0, "{decoded} {count}");
    }
    let (decoded, count) = run_copy(&rig, &rig.restore(&snapshot).unwrap());
    assert!(decoded > 0 && count > 0, "{decoded} {count}");
    // The third copy left it for the fourth; but not for one whose page is another.
    let (decoded, count) = run_copy(&rig, &rig.restore(&snapshot).unwrap());
    assert!(decoded == 0 && count > 0, "{decoded} {count}");
    let changed = rig.restore(&snapshot).unwrap();
    changed.0.core.hold().unwrap().guts().unwrap().ram.write(CODE + 2, &[0x0c]).unwrap();
    let (decoded, count) = run_copy(&rig, &changed);
    assert!(decoded > 0 && count < 0, "{decoded} {count}");
}

#[test]
fn a_paused_machine_can_be_captured_and_stays_paused() {
    let rig = Rig::new();
    let machine = rig.run(&COUNT);
    wait("counting", || machine.diagnostics().cpu.instructions > 100);
    machine.pause().unwrap();
    let before = machine.diagnostics();
    let (a, b) = (rig.snapshot(&machine).1, rig.snapshot(&machine).1);
    assert_eq!(counter(&a), counter(&b));
    let after = machine.diagnostics();
    assert_eq!((before.cpu, before.guest_ns), (after.cpu, after.guest_ns));
}

#[test]
fn a_failed_capture_loses_nothing() {
    let rig = Rig::new();
    let machine = rig.run(&COUNT);
    wait("counting", || machine.diagnostics().cpu.instructions > 100);
    machine.pause().unwrap();
    let dirty = machine.diagnostics().dirty_pages;
    let bad = NewSnapshot { names: vec!["not a name!".into()], ..NewSnapshot::default() };
    let error = machine.capture(&rig.store, bad);
    assert!(matches!(error, Err(MachineError::Snapshot(SnapshotError::Store(_)))), "{error:?}");
    assert_eq!(machine.diagnostics().dirty_pages, dirty);
    let (captured, snapshot) = rig.snapshot(&machine);
    assert_eq!(captured.memory.dirty, dirty);
    assert!(counter(&snapshot) > 0);
}

/// Changes a section of state: its new version and content, or nothing to leave it out.
type Tamper = dyn Fn(&[u8]) -> Option<(u16, Vec<u8>)>;

/// A snapshot like `good`, with one section changed or left out.
fn tampered(
    rig: &Rig,
    good: &Snapshot,
    id: u16,
    change: impl Fn(&[u8]) -> Option<(u16, Vec<u8>)>,
) -> Arc<Snapshot> {
    struct Nothing;
    impl amber_layers::PageSource for Nothing {
        fn read(&self, _: u64, _: &mut Page) -> std::io::Result<()> {
            Err(std::io::ErrorKind::NotFound.into())
        }
    }
    let mut writer = rig.store.writer();
    writer.memory(Some(good.memory()), good.memory().pages(), [], &Nothing).unwrap();
    writer.disk(Some(good.disk()), good.disk().pages(), [], &Nothing).unwrap();
    for section in good.sections() {
        let (version, bytes) = match section.id == SectionId(id) {
            true => match change(&section.bytes) {
                Some(changed) => changed,
                None => continue,
            },
            false => (section.version, section.bytes.clone()),
        };
        writer.section(section.id, version, true, bytes).unwrap();
    }
    let meta = writer.publish(NewSnapshot::default()).unwrap();
    rig.store.open_snapshot(&meta.id).unwrap()
}

/// Writes a number that grows by one with each pass to the first word of [`WRITTEN`] pages from [`COUNTER`] on, in order.
const WRITE: [u8; 38] = [
    0x48, 0xc7, 0xc0, 0x01, 0x00, 0x00, 0x00, // mov rax, 1
    0x48, 0xc7, 0xc7, 0x00, 0x00, 0x20, 0x01, // pass: mov rdi, COUNTER
    0xb9, 0x00, 0x04, 0x00, 0x00, // mov ecx, WRITTEN
    0x48, 0x89, 0x07, // page: mov [rdi], rax
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
    0xff, 0xc9, // dec ecx
    0x75, 0xf2, // jnz page
    0x48, 0xff, 0xc0, // inc rax
    0xeb, 0xe1, // jmp pass
];
const WRITTEN: u64 = 1024;

/// The software CPU as one whose writes can only be noticed afterwards.
struct Unguarded;
struct UnguardedVcpu(Box<dyn Vcpu>);

impl Backend for Unguarded {
    fn kind(&self) -> BackendKind {
        BackendKind::Soft
    }
    fn create_vm(&self, ram: &Arc<Ram>, shape: vcpu::Shape) -> Result<vcpu::Vm, vcpu::BackendError> {
        let vm = Soft.create_vm(ram, shape)?;
        Ok(vcpu::Vm { first: Box::new(UnguardedVcpu(vm.first)), ..vm })
    }
}

impl Vcpu for UnguardedVcpu {
    fn run(&mut self, bus: &mut dyn amber_x86::Bus) -> vcpu::VcpuExit {
        self.0.run(bus)
    }
    fn state(&self) -> Result<amber_x86::state::CpuState, String> {
        self.0.state()
    }
    fn set_state(&mut self, state: &amber_x86::state::CpuState) -> Result<(), String> {
        self.0.set_state(state)
    }
    fn kicker(&self) -> Arc<dyn vcpu::Kicker> {
        self.0.kicker()
    }
    fn forget_dirty(&mut self) {
        self.0.forget_dirty();
    }
    fn counters(&self) -> Counters {
        self.0.counters()
    }
}

#[test]
fn a_capture_behind_a_guest_that_writes_holds_one_moment() {
    let kvm = super::kvm::tests::usable();
    for backend in [&Soft as &'static dyn Backend, &Unguarded].into_iter().chain(kvm) {
        let rig = Rig::on(backend);
        let machine = rig.run(&WRITE);
        wait("the first pass", || machine.diagnostics().dirty_pages > WRITTEN);
        let mut last = 0;
        for round in 0..6 {
            let mut told = false;
            let captured = machine
                .capture_then(&rig.store, NewSnapshot::default(), Content::Full, || told = true)
                .unwrap();
            assert!(told);
            let snapshot = rig.store.open_snapshot(&captured.meta.id).unwrap();
            let mut page: Page = [0; 4096];
            let words: Vec<u64> = (0..WRITTEN)
                .map(|i| {
                    snapshot.memory().read_page(COUNTER / 4096 + i, &mut page).unwrap();
                    u64::from_le_bytes(page[..8].try_into().unwrap())
                })
                .collect();
            assert!(words.is_sorted_by(|a, b| a >= b), "a pass writes in order");
            assert!(words[0] - words[WRITTEN as usize - 1] <= 1, "{} {}", words[0], words[1023]);
            assert!(words[0] > last || round == 0 && words[0] > 0);
            last = words[0];
            // The copy goes on from there.
            let copy = rig.restore(&snapshot).unwrap();
            copy.resume().unwrap();
            wait("the copy's pass", || copy.diagnostics().dirty_pages >= WRITTEN);
        }
        machine.kill();
    }
}

#[test]
fn a_kill_does_not_disturb_a_capture_in_progress() {
    let rig = Rig::new();
    let machine = rig.run(&WRITE);
    wait("the first pass", || machine.diagnostics().dirty_pages > WRITTEN);
    let captured =
        machine.capture_then(&rig.store, NewSnapshot::default(), Content::Full, || machine.kill()).unwrap();
    let snapshot = rig.store.open_snapshot(&captured.meta.id).unwrap();
    let copy = rig.restore(&snapshot).unwrap();
    copy.resume().unwrap();
    wait("the copy's pass", || copy.diagnostics().dirty_pages >= WRITTEN);
}

#[test]
fn hostile_snapshots_are_refused_with_a_reason() {
    let rig = Rig::new();
    let (_, good) = rig.snapshot(&rig.boot(&COUNT));
    assert!(rig.restore(&good).is_ok());
    for id in 0x100..=0x107 {
        let error = |change: &Tamper| {
            let bad = tampered(&rig, &good, id, change);
            match rig.restore(&bad) {
                Err(MachineError::Snapshot(e)) => e,
                other => panic!("section {id:#x}: {other:?}"),
            }
        };
        assert!(matches!(error(&|_| None), SnapshotError::Missing(_)));
        assert!(matches!(error(&|b| Some((2, b.to_vec()))), SnapshotError::Format(_)));
        assert!(matches!(error(&|b| Some((1, b[..b.len() - 1].to_vec()))), SnapshotError::Invalid { .. }));
        assert!(matches!(error(&|b| Some((1, [b, &[0]].concat()))), SnapshotError::Invalid { .. }));
        assert!(matches!(error(&|_| Some((1, vec![0xff; 64]))), SnapshotError::Invalid { .. }));
    }
    let bad = tampered(&rig, &good, 0x200, |_| None);
    assert!(rig.restore(&bad).is_ok());
}

/// Changes one value somewhere in a CBOR value. `dice` is used up from the front.
fn mutate(value: &mut ciborium::Value, dice: &mut impl Iterator<Item = u8>) {
    use ciborium::Value;
    let mut roll = || usize::from(dice.next().unwrap_or(0)) << 8 | usize::from(dice.next().unwrap_or(0));
    let (at, what) = (roll(), roll());
    match value {
        Value::Map(entries) if !entries.is_empty() && what % 16 > 0 => {
            let at = at % entries.len();
            mutate(&mut entries[at].1, dice);
        }
        Value::Array(items) if !items.is_empty() && what % 8 > 0 => {
            let at = at % items.len();
            mutate(&mut items[at], dice);
        }
        Value::Array(items) if what % 2 == 0 => items.extend(items.clone()),
        Value::Array(items) => items.truncate(at % (items.len() + 1)),
        Value::Bytes(bytes) if !bytes.is_empty() && what % 8 > 0 => {
            let len = bytes.len();
            bytes[at % len] ^= 1 << (what % 8);
        }
        Value::Bytes(bytes) => bytes.truncate(at / 2),
        Value::Integer(number) if what % 8 > 0 => {
            let old = u64::try_from(i128::from(*number)).unwrap_or(0);
            let new = match what % 6 {
                0 => old ^ 1 << (at % 64),
                1 => old.wrapping_add(1),
                2 => old.wrapping_sub(1),
                3 => u64::MAX >> (at % 64),
                4 => 0,
                _ => at as u64,
            };
            *value = Value::Integer(new.into());
        }
        Value::Bool(on) if what % 4 > 0 => *on = !*on,
        other => {
            *other = match what % 5 {
                0 => Value::Null,
                1 => Value::Integer((at as i64 - 30_000).into()),
                2 => Value::Text("text".into()),
                3 => Value::Array(Vec::new()),
                _ => Value::Map(Vec::new()),
            };
        }
    }
}

/// A section with some values changed.
fn mutated(bytes: &[u8], noise: &[u8; 64], changes: u64) -> Vec<u8> {
    let mut value: ciborium::Value = ciborium::from_reader(bytes).unwrap();
    let mut dice = noise.iter().copied();
    (0..changes).for_each(|_| mutate(&mut value, &mut dice));
    let mut out = Vec::new();
    ciborium::into_writer(&value, &mut out).unwrap();
    out
}

/// State that nobody wrote: each part refuses it with a reason or can live with it; whatever the guest then does ends at
/// most its own machine. `AMBERBOX_FUZZ_CASES` runs more than continuous integration does.
#[test]
fn state_that_nobody_wrote_is_refused_or_harmless() {
    let cases = std::env::var("AMBERBOX_FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(120);
    let rig = Rig::new();
    let machine = rig.run(&ticker());
    wait("ticks", || machine.diagnostics().wakeups > 3);
    let (_, good) = rig.snapshot(&machine);
    drop(machine);
    let (mut refused, mut lived) = (0, 0);
    for case in 0..cases {
        // The same cases each time, different ones everywhere.
        let mut noise = [0; 64];
        blake3::Hasher::new().update(&u64::to_le_bytes(case)).finalize_xof().fill(&mut noise);
        let id = 0x100 + (case % 8) as u16;
        let bad =
            tampered(&rig, &good, id, |bytes: &[u8]| Some((1, mutated(bytes, &noise, case / 8 % 3 + 1))));
        match rig.restore(&bad) {
            Err(MachineError::Snapshot(_) | MachineError::RamSize { .. } | MachineError::Ram(_)) => {
                refused += 1
            }
            Err(e) => panic!("case {case}: {e:?}"),
            Ok(copy) => {
                lived += 1;
                // It may end at once, but only as a machine does that was told so.
                if copy.resume().is_ok() {
                    std::thread::sleep(Duration::from_millis(2));
                    copy.kill();
                }
                let end = copy.end().unwrap();
                assert!(end.kind != EndKind::Failed || !end.detail.contains("panic"), "case {case}: {end}");
            }
        }
        let id = bad.meta().id.clone();
        drop(bad);
        rig.store.delete(&id).unwrap();
    }
    assert!(refused > cases / 10 && lived > cases / 10, "{refused} refused, {lived} lived");
}

#[test]
fn the_number_of_cpus_is_checked_and_the_software_cpu_has_one() {
    let rig = Rig::new();
    for cpus in [0, platform::MAX_CPUS + 1] {
        let config = BootConfig { cpus, ..rig.config(&COUNT) };
        assert!(matches!(Machine::boot(config, &Soft), Err(MachineError::CpuCount { .. })));
    }
    let refused = Machine::boot(BootConfig { cpus: 2, ..rig.config(&COUNT) }, &Soft).unwrap_err();
    assert!(matches!(refused, MachineError::Cpu { reason: BackendError::Cpus(2), .. }), "{refused}");
    let config = BootConfig { cpu: vcpu::CpuModel::Host, ..rig.config(&COUNT) };
    let refused = Machine::boot(config, &Soft).unwrap_err();
    assert!(matches!(refused, MachineError::Cpu { reason: BackendError::HostCpu, .. }), "{refused}");
}

#[test]
fn what_cannot_boot_says_why() {
    let rig = Rig::new();
    let boot = |change: &dyn Fn(&mut BootConfig)| {
        let mut config = rig.config(&COUNT);
        change(&mut config);
        Machine::boot(config, &Soft).unwrap_err()
    };
    assert!(matches!(boot(&|c| c.ram = 1 << 20), MachineError::RamSize { .. }));
    assert!(matches!(boot(&|c| c.kernel.push("none")), MachineError::Kernel { .. }));
    assert!(matches!(boot(&|c| c.rootfs.push("none")), MachineError::Rootfs { .. }));
    assert!(matches!(boot(&|c| c.kernel.clone_from(&c.rootfs)), MachineError::Boot(BootError::Elf(_))));
    let missing = DiskStorage::Directory(rig.dir.path().join("none"));
    let error = boot(&|c| c.storage = missing.clone());
    assert!(matches!(error, MachineError::Snapshot(SnapshotError::Disk { .. })));
}

/// The keys of a CBOR value, with the lengths of arrays and byte strings.
fn shape(value: &ciborium::Value) -> String {
    use ciborium::Value;
    match value {
        Value::Map(entries) => {
            let keys = entries.iter().map(|(k, v)| format!("{}{}", k.as_text().unwrap(), shape(v)));
            format!("{{{}}}", keys.collect::<Vec<_>>().join(" "))
        }
        Value::Array(items) => format!("[{}]{}", items.len(), items.first().map(shape).unwrap_or_default()),
        Value::Bytes(bytes) => format!("<{}>", bytes.len()),
        _ => String::new(),
    }
}

/// A change here is a change of the format: it needs new section versions, and SNAPSHOT.md.
#[test]
fn the_state_sections_are_those_of_version_1() {
    const QUEUES: &str = "{size ready next_avail next_used desc_table avail_ring used_ring}";
    let transport = |queues: usize| {
        format!(
            "transport{{device_features_sel driver_features_sel driver_features queue_sel status \
             interrupt_status config_generation queues[{queues}]{QUEUES}}}"
        )
    };
    let segment = "{selector base limit attributes}";
    let expected = [
        "{version ram}".to_owned(),
        format!(
            "{{gpr[16] rip rflags segments[6]{segment} ldtr{segment} tr{segment} gdtr{{base limit}} \
             idtr{{base limit}} cr0 cr2 cr3 cr4 dr[4] dr6 dr7 msrs[12][2] fxsave<512> halted interrupt_shadow}}"
        ),
        "{lapic{page<1024>} ioapic{base select id irr entries[24]} pit{mode access reload started next \
         write_high read_high low latch masks[2]}}"
            .to_owned(),
        "{guest_ns tsc tsc_hz system_time wall_ns}".to_owned(),
        format!("{{{} device{{sectors}}}}", transport(1)),
        format!("{{{} device{{guest_cid next_port}}}}", transport(3)),
        format!("{{{} device{{}}}}", transport(1)),
        "{baud_divisor_low baud_divisor_high interrupt_enable interrupt_identification line_control \
         line_status modem_control modem_status scratch in_buffer[0]}"
            .to_owned(),
    ];
    let rig = Rig::new();
    let (_, snapshot) = rig.snapshot(&rig.boot(&COUNT));
    let sections = snapshot.sections();
    assert_eq!(sections.len(), expected.len());
    for ((id, section), expected) in (0x100..).zip(sections).zip(&expected) {
        assert_eq!((section.id, section.version, section.required), (SectionId(id), 1, true));
        let value: ciborium::Value = ciborium::from_reader(&*section.bytes).unwrap();
        assert_eq!(shape(&value), *expected, "section {id:#x}");
    }
}
