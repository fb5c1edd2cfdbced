//! The store after a crash at any moment: what a process did to the disk is replayed up to each system call, and opened.
//!
//! A child carries out a script of publications and deletions and is traced; before each of its system calls that changes
//! the disk, the store's directory is copied. Each copy is a disk after the process was killed there. Each copy whose
//! files lose what was not synced yet is one after the power failed: names keep their order on a journaling
//! file system, content does not.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking"
)]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use amber_layers::{ListFilter, NewSnapshot, Store};
use common::*;

const TASK: &str = "AMBER_LAYERS_CRASH_TASK";
const PAGES: u64 = 60;
/// Operations of the script.
const OPERATIONS: usize = 6;

fn version(number: u64) -> Pages {
    Pages::of((0..PAGES).filter(|p| p % 7 != number % 7).map(|p| (p, mixed(p + 1000 * number))))
}

fn new(number: u64, name: Option<&str>) -> NewSnapshot {
    NewSnapshot {
        metadata: number.to_string(),
        names: name.map(str::to_owned).into_iter().collect(),
        ..NewSnapshot::default()
    }
}

#[test]
fn child() {
    let Ok(dir) = std::env::var(TASK) else { return };
    let dir = PathBuf::from(dir);
    let done = |operation: usize| fs::write(dir.join("done"), operation.to_string()).unwrap();
    done(0);
    let store = open(&dir.join("store"));
    let first = publish(&store, None, PAGES, &version(1), new(1, Some("a"))).unwrap();
    done(1);
    let parent = store.open_snapshot(&first.id).unwrap();
    let dirty = Pages::of((0..PAGES).map(|p| (p, version(2).0.remove(&p).unwrap_or_else(|| filled(0)))));
    let child = publish(&store, Some(parent.memory()), PAGES, &dirty, new(2, None)).unwrap();
    drop(parent);
    done(2);
    publish(&store, None, PAGES, &version(3), new(3, Some("a"))).unwrap();
    done(3);
    let file = dir.join("exported");
    store.export(&child.id, "default", &file, &Default::default()).unwrap();
    assert!(store.delete(&child.id).unwrap());
    done(4);
    store.import(&file).unwrap();
    done(5);
    assert!(store.delete(&first.id).unwrap());
    store.gc().unwrap();
    done(OPERATIONS);
}

/// A copy of the disk, made while the child was about to change it.
struct Image {
    dir: PathBuf,
    /// Operations of the script that were over.
    done: usize,
    /// Files, relative, with content that was not synced.
    unsynced: Vec<PathBuf>,
}

/// What a system call changes, if it changes the disk; for those that write to or sync a descriptor, which.
enum Change {
    Names,
    Writes(i32),
    Syncs(i32),
}

fn change(regs: &libc::user_regs_struct) -> Option<Change> {
    let descriptor = regs.rdi as i32;
    match regs.orig_rax as i64 {
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_ftruncate => {
            Some(Change::Writes(descriptor))
        }
        libc::SYS_fsync | libc::SYS_fdatasync => Some(Change::Syncs(descriptor)),
        libc::SYS_openat if regs.rdx as i32 & libc::O_CREAT != 0 => Some(Change::Names),
        libc::SYS_mkdir
        | libc::SYS_mkdirat
        | libc::SYS_rename
        | libc::SYS_renameat
        | libc::SYS_renameat2
        | libc::SYS_link
        | libc::SYS_linkat
        | libc::SYS_unlink
        | libc::SYS_unlinkat
        | libc::SYS_rmdir => Some(Change::Names),
        _ => None,
    }
}

fn copy_dir(from: &Path, to: &Path, inodes: &mut HashMap<u64, Vec<PathBuf>>, below: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, below) = (to.join(entry.file_name()), below.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &path, inodes, &below);
        } else {
            fs::copy(entry.path(), &path).unwrap();
            inodes.entry(entry.metadata().unwrap().ino()).or_default().push(below);
        }
    }
}

/// What happens to one thread of the child.
enum Event {
    Stopped(libc::pid_t, i32),
    Ended(libc::pid_t, i32),
}

fn next_event() -> Event {
    let mut status = 0;
    // SAFETY: waitpid writes to `status` only. No other test of this binary has children.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
    assert!(pid > 0, "{}", io::Error::last_os_error());
    if libc::WIFSTOPPED(status) {
        Event::Stopped(pid, libc::WSTOPSIG(status))
    } else {
        Event::Ended(pid, status)
    }
}

/// A request about a stopped thread whose data is a number.
fn trace(request: libc::c_uint, pid: libc::pid_t, data: usize) {
    // SAFETY: none of the requests used reads or writes memory of this process.
    unsafe { libc::ptrace(request, pid, 0usize, data) };
}

/// Runs the script and copies its disk before each change. Nothing if processes cannot be traced here.
fn record(dir: &Path, images: &Path) -> Option<Vec<Image>> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command.env(TASK, dir).stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: ptrace is a system call; nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0usize, 0usize) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let child = match command.spawn() {
        Ok(child) => child.id() as libc::pid_t,
        Err(e) => {
            println!("skipped: processes cannot be traced here: {e}");
            return None;
        }
    };
    let store = dir.join("store");
    let mut found = Vec::new();
    let mut entering: HashMap<libc::pid_t, bool> = HashMap::new();
    let mut unsynced: BTreeSet<u64> = BTreeSet::new();
    let mut done = 0;
    loop {
        let (pid, signal) = match next_event() {
            Event::Ended(pid, status) if pid == child => {
                assert!(
                    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
                    "the script failed: {status}"
                );
                return Some(found);
            }
            Event::Ended(..) => continue,
            Event::Stopped(pid, signal) => (pid, signal),
        };
        if signal != libc::SIGTRAP | 0x80 {
            let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
            trace(libc::PTRACE_SETOPTIONS, pid, options as usize);
            let pass = if matches!(signal, libc::SIGTRAP | libc::SIGSTOP) { 0 } else { signal };
            trace(libc::PTRACE_SYSCALL, pid, pass as usize);
            continue;
        }
        let enters = entering.entry(pid).or_insert(false);
        *enters = !*enters;
        // SAFETY: a plain structure, for which zero is a valid value.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        // SAFETY: the thread is stopped, and the request writes to `regs` only.
        unsafe { libc::ptrace(libc::PTRACE_GETREGS, pid, 0usize, &raw mut regs) };
        let inode = |fd: i32| fs::metadata(format!("/proc/{pid}/fd/{fd}")).map_or(0, |found| found.ino());
        match change(&regs) {
            Some(changes) if *enters && store.exists() => {
                let to = images.join(found.len().to_string());
                let mut inodes = HashMap::new();
                copy_dir(&store, &to, &mut inodes, Path::new(""));
                let lost = unsynced.iter().filter_map(|inode| inodes.get(inode)).flatten().cloned();
                // Empty for a moment whenever it is written.
                done = fs::read_to_string(dir.join("done")).unwrap().parse().unwrap_or(done);
                found.push(Image { dir: to, done, unsynced: lost.collect() });
                if let Change::Writes(fd) = changes {
                    unsynced.insert(inode(fd));
                }
            }
            // Leaving: it is on the disk.
            Some(Change::Syncs(fd)) if !*enters => _ = unsynced.remove(&inode(fd)),
            _ => {}
        }
        trace(libc::PTRACE_SYSCALL, pid, 0);
    }
}

/// Opens a store after a crash in operation `done + 1` and compares it with what may be there.
fn check(dir: &Path, done: usize, what: &str) {
    let store = Arc::new(Store::open(dir).unwrap_or_else(|e| panic!("{what}: {e}")));
    let verified = store.verify().unwrap();
    assert!(verified.problems.is_empty(), "{what}: {:?}", verified.problems);
    store.gc().unwrap();
    assert_clean(&store);
    let mut there = BTreeSet::new();
    for meta in store.list(&ListFilter::default()).unwrap() {
        let number: u64 = meta.metadata.parse().unwrap();
        assert_eq!(meta.names.is_empty(), number == 2, "{what}");
        let (snapshot, want) = (store.open_snapshot(&meta.id).unwrap(), version(number));
        for p in 0..PAGES {
            let want = want.0.get(&p).cloned().unwrap_or_else(|| filled(0));
            assert!(page(&snapshot, p) == *want, "{what}: page {p} of version {number}");
        }
        assert!(there.insert(number), "{what}: version {number} twice");
    }
    // After each operation, and before the next is over, one of these.
    let states: [&[u64]; OPERATIONS + 1] = [&[], &[1], &[1, 2], &[2, 3], &[3], &[2, 3], &[2]];
    let there: Vec<u64> = there.into_iter().collect();
    let fine = states[done] == there || states.get(done + 1).is_some_and(|next| *next == there);
    assert!(fine, "{what}: versions {there:?} after {done} operations");
    // It works on.
    publish(&store, None, PAGES, &version(9), new(9, Some("a"))).unwrap();
}

#[test]
fn every_prefix_of_the_writes_is_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    fs::create_dir(&images).unwrap();
    let Some(found) = record(dir.path(), &images) else { return };
    assert_eq!(fs::read_to_string(dir.path().join("done")).unwrap(), OPERATIONS.to_string());
    assert!(found.len() > 100, "{}", found.len());
    let (mut lossy, mut at) = (0, BTreeSet::new());
    for (i, image) in found.iter().enumerate() {
        at.insert(image.done);
        if !image.unsynced.is_empty() {
            lossy += 1;
            // Nothing of it arrived, or the first half.
            for half in [false, true] {
                let copy = images.join("lossy");
                copy_dir(&image.dir, &copy, &mut HashMap::new(), Path::new(""));
                for path in &image.unsynced {
                    let file = File::options().write(true).open(copy.join(path)).unwrap();
                    let len = file.metadata().unwrap().len();
                    file.set_len(if half { len / 2 } else { 0 }).unwrap();
                }
                check(&copy, image.done, &format!("power lost before change {i}, {half}"));
                fs::remove_dir_all(&copy).unwrap();
            }
        }
        check(&image.dir, image.done, &format!("killed before change {i}"));
        fs::remove_dir_all(&image.dir).unwrap();
    }
    assert!(lossy > 10 && at.len() >= OPERATIONS, "{lossy} {at:?}");
}
