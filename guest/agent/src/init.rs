//! What process 1 does before anything else: file systems, loopback interface, limits, console.

use std::ffi::CStr;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit};

/// Descriptors that the agent may hold: three per process and one per connection.
const AGENT_FILES: u64 = 1 << 18;

/// Descriptors that a process may raise its limit to.
pub(crate) const PROCESS_FILES_HARD: u64 = 1 << 19;

/// Descriptors that a process gets: more breaks programs that use `select`.
pub(crate) const PROCESS_FILES_SOFT: u64 = 1 << 10;

/// Free memory that the heap keeps.
const HEAP_SLACK: libc::c_int = 1 << 20;

/// Sets up the machine. What fails is reported on the console and left: a guest without one of its file systems is still reachable.
pub(crate) fn prepare() {
    let nodev = MountFlags::NOSUID | MountFlags::NODEV;
    let noexec = nodev | MountFlags::NOEXEC;
    attach("proc", "/proc", noexec, None);
    attach("sysfs", "/sys", noexec, None);
    attach("devtmpfs", "/dev", MountFlags::NOSUID, Some(c"mode=0755"));
    attach(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(c"gid=5,mode=620,ptmxmode=666"),
    );
    attach("tmpfs", "/dev/shm", nodev, Some(c"mode=1777"));
    attach("tmpfs", "/run", nodev, Some(c"mode=0755"));
    attach("cgroup2", "/sys/fs/cgroup", noexec, None);
    // The kernel gives process 1 the console as descriptors 0 to 2, unless /dev was empty.
    hold_standard_descriptors();
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        check(link, symlink(target, link));
    }
    // /tmp stays on the disk: it is large there, and a file-system-only snapshot keeps it.
    for directory in ["/tmp", "/var/tmp", "/run/lock"] {
        check(directory, fs::create_dir_all(directory));
        check(directory, fs::set_permissions(directory, PermissionsExt::from_mode(0o1777)));
    }
    // The defaults are for desktops; what the guest's programs watch is bounded by its memory, not by these.
    for (limit, value) in [("max_user_instances", "8192"), ("max_user_watches", "262144")] {
        check(limit, fs::write(format!("/proc/sys/fs/inotify/{limit}"), value));
    }
    check("lo", raise_loopback());
    // Proactive compaction wakes the guest twice a second for good, to prepare huge pages that few programs here ask for.
    check("compaction", fs::write("/proc/sys/vm/compaction_proactiveness", "0"));
    if let Ok(name) = fs::read("/etc/hostname") {
        check("hostname", rustix::system::sethostname(name.trim_ascii()).map_err(Into::into));
    }
    prepare_process();
}

/// What holds for the agent as an ordinary process, too.
pub(crate) fn prepare_process() {
    // One heap for all threads, which keeps its free memory: growing and shrinking it around every request costs page faults.
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, HEAP_SLACK), (libc::M_TOP_PAD, HEAP_SLACK / 8)]
    {
        // SAFETY: no other thread exists yet.
        unsafe { libc::mallopt(parameter, value) };
    }
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(AGENT_FILES);
    let limit = Rlimit { current: Some(AGENT_FILES), maximum: Some(AGENT_FILES.max(PROCESS_FILES_HARD)) };
    if rustix::process::setrlimit(Resource::Nofile, limit).is_err() {
        // Without privileges only the soft limit can be raised.
        let limit = Rlimit { current: Some(hard.min(AGENT_FILES)), maximum: Some(hard) };
        check("limits", rustix::process::setrlimit(Resource::Nofile, limit).map_err(Into::into));
    }
    // Whatever else was inherited is not for the processes of the guest.
    // SAFETY: no descriptor is closed or used; from here on they close when a program is executed.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } < 0 {
        say(&format!("descriptors: {}", io::Error::last_os_error()));
    }
    // Orphans of our processes come to us even when we are not process 1.
    let own = rustix::process::getpid();
    check("subreaper", rustix::process::set_child_subreaper(Some(own)).map_err(Into::into));
}

/// Writes a line to the console.
pub(crate) fn say(message: &str) {
    let line = format!("amberbox-agent: {message}\n");
    // Nothing is left to do if even this fails.
    let _ = io::stderr().write_all(line.as_bytes());
}

fn check(what: &str, result: io::Result<()>) {
    match result {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => say(&format!("{what}: {error}")),
        _ => {}
    }
}

/// Mounts a file system of the kernel, unless it is there already.
fn attach(kind: &str, path: &str, flags: MountFlags, data: Option<&CStr>) {
    if !Path::new(path).is_dir() {
        check(path, fs::create_dir_all(path));
    }
    match mount(kind, path, kind, flags, data) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => {}
        Err(error) => say(&format!("{path}: {error}")),
    }
}

/// Makes sure that 0, 1 and 2 are open, so that no other file ever gets these numbers, and that nobody reads the console by accident.
fn hold_standard_descriptors() {
    let Ok(null) = fs::OpenOptions::new().read(true).write(true).open("/dev/null") else { return };
    let console = fs::OpenOptions::new().write(true).open("/dev/console");
    let output = console.as_ref().unwrap_or(&null);
    let results = [
        rustix::stdio::dup2_stdin(&null),
        rustix::stdio::dup2_stdout(output),
        rustix::stdio::dup2_stderr(output),
    ];
    for result in results {
        check("console", result.map_err(Into::into));
    }
    // If 0 to 2 were free, `null` or `console` may itself be one of them now: it must stay open.
    if null.as_raw_fd() <= 2 {
        std::mem::forget(null);
    }
    if let Ok(console) = console
        && console.as_raw_fd() <= 2
    {
        std::mem::forget(console);
    }
}

/// Brings the loopback interface up; the kernel gives it its addresses.
fn raise_loopback() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: ifreq is plain data, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: `request` is a valid ifreq that outlives both calls; the flags member of the union is the one the calls use.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
