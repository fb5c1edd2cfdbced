//! Several processes and threads on one store, processes that are killed at any moment, and disks that are full.
//!
//! Children are this test binary again: the test `child` does what the environment says, and nothing without it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking"
)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use amber_layers::{ListFilter, NewSnapshot, Store, StoreError};
use common::*;

const TASK: &str = "AMBER_LAYERS_TEST_TASK";
const PAGES: u64 = 300;

#[test]
fn child() {
    let Ok(task) = std::env::var(TASK) else { return };
    let mut words = task.splitn(3, ' ');
    let (what, seed, dir) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let seed: u64 = seed.parse().unwrap();
    match what {
        "cycles" => cycles(Path::new(dir), seed, 25),
        "soak" => cycles(Path::new(dir), seed, 200),
        "forever" => cycles(Path::new(dir), seed, u64::MAX),
        "full" => full_disk(Path::new(dir)),
        "readonly" => read_only(Path::new(dir)),
        other => panic!("unknown task {other}"),
    }
}

fn spawn(task: &str, seed: u64, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command.env(TASK, format!("{task} {seed} {}", dir.display()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// A small generator: the sequence differs per seed and needs no crate.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Memory that follows from a number, which the snapshot's metadata holds.
fn expected(seed: u64) -> Pages {
    Pages::of((0..PAGES).filter(|p| p % 3 != seed % 3).map(|p| (p, mixed(seed * 1000 + p))))
}

fn check_content(store: &Arc<Store>, id: &amber_layers::SnapshotId) -> Result<(), StoreError> {
    let snapshot = store.open_snapshot(id)?;
    let want = expected(snapshot.meta().metadata.parse().unwrap());
    for p in 0..PAGES {
        let want = want.0.get(&p).cloned().unwrap_or_else(|| filled(0));
        assert!(page(&snapshot, p) == *want, "page {p} of {id}");
    }
    Ok(())
}

/// Creates, opens, checks, copies, deletes, collects; several processes do so at once.
fn cycles(dir: &Path, seed: u64, rounds: u64) {
    let mut dice = Dice(seed);
    for round in 0..rounds {
        let store = open(dir);
        let number = dice.roll(12);
        let new = NewSnapshot {
            metadata: number.to_string(),
            names: if dice.roll(3) == 0 { vec![format!("name{}", dice.roll(3))] } else { Vec::new() },
            ..NewSnapshot::default()
        };
        let list = store.list(&ListFilter::default()).unwrap();
        let pick = |dice: &mut Dice| (!list.is_empty()).then(|| &list[dice.roll(list.len() as u64) as usize]);
        let parent = pick(&mut dice).and_then(|meta| match store.open_snapshot(&meta.id) {
            Ok(snapshot) => Some(snapshot),
            Err(StoreError::NotFound { .. }) => None,
            Err(e) => panic!("{e}"),
        });
        let mut dirty = expected(number);
        if parent.is_some() {
            // What the parent had and the child has not is zero.
            (0..PAGES).for_each(|p| _ = dirty.0.entry(p).or_insert_with(|| filled(0)));
        }
        let image = parent.as_deref().map(|p| &**p.memory());
        let made = publish(&store, image, PAGES, &dirty, new).unwrap();
        drop(parent);
        match check_content(&store, &made.id) {
            Ok(()) | Err(StoreError::NotFound { .. }) => {}
            Err(e) => panic!("{e}"),
        }
        for _ in 0..2 {
            let victim = pick(&mut dice).unwrap_or(&made).id.clone();
            match store.delete(&victim) {
                Ok(_) | Err(StoreError::InUse { .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
        if round % 7 == 0 {
            store.gc().unwrap();
        }
    }
}

fn check_store(dir: &Path) {
    let store = open(dir);
    store.gc().unwrap();
    assert_clean(&store);
    for meta in store.list(&ListFilter::default()).unwrap() {
        check_content(&store, &meta.id).unwrap();
    }
}

#[test]
fn processes_and_threads_share_one_store() {
    let dir = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..4).map(|seed| spawn("cycles", seed + 1, dir.path())).collect();
    std::thread::scope(|scope| {
        for seed in 10..13 {
            let dir = dir.path();
            scope.spawn(move || cycles(dir, seed, 10));
        }
    });
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    check_store(dir.path());
    let store = open(dir.path());
    for meta in store.list(&ListFilter::default()).unwrap() {
        assert!(store.delete(&meta.id).unwrap());
    }
    assert_eq!(store.du().unwrap(), Default::default());
}

#[test]
fn a_collector_at_work_never_takes_a_layer_that_is_being_published() {
    let dir = tempfile::tempdir().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3u64)
            .map(|writer| {
                let dir = dir.path();
                scope.spawn(move || {
                    let store = open(dir);
                    for round in 0..60 {
                        let seed = writer * 1000 + round;
                        let pages = Pages::of([(0, noise(seed))]);
                        let meta = publish(&store, None, 1, &pages, NewSnapshot::default()).unwrap();
                        assert!(page(&store.open_snapshot(&meta.id).unwrap(), 0) == *noise(seed));
                        assert!(store.delete(&meta.id).unwrap());
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let store = open(dir.path());
            while !done.load(Ordering::Relaxed) {
                store.gc().unwrap();
            }
        });
        let results: Vec<_> = writers.into_iter().map(|w| w.join()).collect();
        done.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|r| r.unwrap());
    });
    let store = open(dir.path());
    assert_clean(&store);
    assert_eq!(store.du().unwrap(), Default::default());
}

#[test]
fn killed_processes_leave_whole_snapshots_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(std::process::id().into());
    let mut survivor = spawn("forever", 1, dir.path());
    for round in 0..30 {
        let mut victim = spawn("forever", 100 + round, dir.path());
        std::thread::sleep(Duration::from_millis(dice.roll(150)));
        victim.kill().unwrap();
        victim.wait().unwrap();
        // The next opener cleans up, with others at work.
        let store = open(dir.path());
        let problems = store.verify().unwrap().problems;
        assert!(problems.is_empty(), "{problems:?}");
        assert!(survivor.try_wait().unwrap().is_none(), "the survivor failed");
    }
    survivor.kill().unwrap();
    survivor.wait().unwrap();
    // One opening is enough: everything that the dead left is gone, and no lock is held.
    let store = open(dir.path());
    assert_clean(&store);
    drop(store);
    check_store(dir.path());
}

/// Eight processes of 200 cycles each, of which one is killed every now and then and begins anew. For releases: it takes minutes.
#[test]
#[ignore = "takes minutes"]
fn a_long_time_with_many_processes_and_kills() {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(7);
    let mut children: Vec<Option<Child>> = (0..8).map(|seed| Some(spawn("soak", seed, dir.path()))).collect();
    let mut kills = 0;
    while children.iter().any(Option::is_some) {
        std::thread::sleep(Duration::from_millis(50 + dice.roll(400)));
        for slot in &mut children {
            if let Some(status) = slot.as_mut().and_then(|child| child.try_wait().unwrap()) {
                assert!(status.success(), "a process failed");
                *slot = None;
            }
        }
        let victim = dice.roll(8) as usize;
        if kills < 200
            && let Some(child) = &mut children[victim]
        {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            children[victim] = Some(spawn("soak", 1000 + kills, dir.path()));
        }
    }
    assert_eq!(kills, 200);
    check_store(dir.path());
    let store = open(dir.path());
    for meta in store.list(&ListFilter::default()).unwrap() {
        assert!(store.delete(&meta.id).unwrap());
    }
    assert_eq!(store.du().unwrap(), Default::default());
    assert_clean(&store);
}

/// Runs a task of `child` with a small file system mounted on its directory, which only it can see.
fn with_mount(task: &str, options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let script =
        "mount -t tmpfs -o \"$1\" amber \"$2\" && exec \"$3\" --exact child --nocapture --test-threads=1";
    let mut command = Command::new("unshare");
    // Without root, a user namespace is needed; some systems forbid it.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let probe = command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", options]);
    probe.arg(dir.path()).arg(std::env::current_exe().unwrap());
    probe.env(TASK, format!("{task} 0 {}", dir.path().display()));
    match probe.output() {
        Err(e) => println!("skipped: cannot run unshare: {e}"),
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stderr);
            if !out.status.success() && (text.contains("unshare:") || text.contains("mount:")) {
                println!("skipped: cannot mount a small file system: {text}");
                return;
            }
            assert!(out.status.success(), "{text}\n{}", String::from_utf8_lossy(&out.stdout));
            assert!(String::from_utf8_lossy(&out.stdout).contains("1 passed"), "the child ran");
        }
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    with_mount("full", "size=4m");
}

/// Leaves a little more room in each round, so that the disk is full at every step of a publication once.
fn full_disk(dir: &Path) {
    let store = open(&dir.join("store"));
    let base = publish(&store, None, PAGES, &expected(1), NewSnapshot { metadata: "1".into(), ..named("a") })
        .unwrap();
    let ballast = dir.join("ballast");
    let (mut failed, mut succeeded) = (0, 0);
    for room in 0..250u64 {
        fill(&ballast, room * 4096);
        let new = NewSnapshot { metadata: "2".into(), ..NewSnapshot::default() };
        match publish(&store, None, PAGES, &expected(2), new) {
            Ok(meta) => {
                succeeded += 1;
                fs::remove_file(&ballast).unwrap();
                check_content(&store, &meta.id).unwrap();
                assert!(store.delete(&meta.id).unwrap());
            }
            Err(StoreError::DiskFull { .. }) => {
                failed += 1;
                fs::remove_file(&ballast).unwrap();
                assert_clean(&store);
            }
            Err(e) => panic!("room {room}: {e:?}"),
        }
        check_content(&store, &base.id).unwrap();
    }
    assert!(failed > 100 && succeeded > 10, "{failed} {succeeded}");
    // The next one is complete.
    let meta = publish(&store, None, PAGES, &expected(3), NewSnapshot { metadata: "3".into(), ..named("a") })
        .unwrap();
    assert_eq!(meta.id, base.id);
    check_content(&store, &meta.id).unwrap();
    assert_clean(&store);
}

/// Fills the file system but for `room` bytes.
fn fill(ballast: &Path, room: u64) {
    let stat = rustix::fs::statvfs(ballast.parent().unwrap()).unwrap();
    let free = (stat.f_bavail * stat.f_frsize).saturating_sub(room);
    fs::write(ballast, vec![1; usize::try_from(free).unwrap()]).unwrap();
}

#[test]
fn a_read_only_file_system_is_named() {
    with_mount("readonly", "size=4m");
}

fn read_only(dir: &Path) {
    let path = dir.join("store");
    let store = open(&path);
    let meta = publish(&store, None, PAGES, &expected(1), NewSnapshot { metadata: "1".into(), ..named("a") })
        .unwrap();
    let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(dir).status().unwrap();
    assert!(remount.success());
    assert!(matches!(Store::open(&path), Err(StoreError::NotWritable { .. })));
    assert!(matches!(Store::open(&dir.join("other")), Err(StoreError::NotWritable { .. })));
    let failed = publish(&store, None, PAGES, &expected(2), NewSnapshot::default());
    assert!(matches!(failed, Err(StoreError::NotWritable { .. })));
    let reader = Arc::new(Store::open_read_only(&path).unwrap());
    check_content(&reader, &meta.id).unwrap();
    assert!(matches!(store.delete(&meta.id), Err(StoreError::NotWritable { .. })));
}
