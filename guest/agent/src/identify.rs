//! Who the guest is: what the agent says about itself, and what a fresh or copied guest is told before anything else happens in it.
//!
//! Identifying is on the path of every start of a sandbox, so it makes a dozen system calls and starts nothing. Files that name the machine
//! are rewritten in place: truncating them first would make ext4 write them to the disk at once when they are closed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use amber_proto::{Identified, Identify, Info, VERSION};
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, Timespec};

use crate::conn::Failure;
use crate::freeze;
use crate::server::OPERATIONS;
use crate::state::State;

/// Bytes of `/etc/hosts` that are looked at; a longer one is left alone.
const MAX_HOSTS: usize = 64 << 10;

/// Bytes of entropy that are used.
const MAX_ENTROPY: usize = 512;

/// Where programs read the id of this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The file that is mounted there: the kernel's own value is the same in all copies of a snapshot.
const OWN_BOOT_ID: &str = "/run/amberbox/boot_id";

/// Programs to run after a restore, below `/etc`.
const HOOKS: &str = "amberbox/restore.d";

/// Programs of [`HOOKS`] that are run at most.
const MAX_HOOKS: usize = 64;

/// The address that Debian gives the host's own name.
const OWN_ADDRESS: &str = "127.0.1.1";

/// Where programs find what E2B's sandboxes tell about themselves, without an environment.
const FACTS: &str = "/run/e2b";

/// What the agent says about itself.
pub(crate) fn info(state: &State) -> Info {
    let uptime = rustix::time::clock_gettime(ClockId::Boottime);
    let boot_id = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
    Info {
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: VERSION,
        operations: OPERATIONS.iter().map(|&op| op.to_owned()).collect(),
        uptime_ns: nanoseconds(uptime),
        boot_id: boot_id.trim().to_owned(),
        sandbox_id: state.settings().sandbox_id.clone(),
    }
}

/// Makes the guest the one that it is told to be. What fails is reported and does not stop the rest.
pub(crate) fn identify(state: &State, request: Identify) -> Identified {
    let mut settings = (*state.settings()).clone();
    let mut warnings = Vec::new();
    let mut check = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            warnings.push(format!("{what}: {error}"));
        }
    };
    if settings.system {
        // Randomness first: whatever runs from here on draws from a pool of its own.
        check("Random pool", add_entropy(&request.entropy));
        if let Some(now) = request.wall_clock_ns {
            check("Clock", rustix::time::clock_settime(ClockId::Realtime, timespec(now)).map_err(Into::into));
        }
        // One that goes on under its old id after a pause has not booted, and is not a copy.
        if settings.sandbox_id.as_ref() != Some(&request.sandbox_id) {
            check(BOOT_ID, renew_boot_id(Path::new(BOOT_ID), Path::new(OWN_BOOT_ID)));
        }
    }
    if let Some(name) = request.hostname.as_deref().filter(|name| !name.is_empty()) {
        if settings.system {
            check("Host name", rustix::system::sethostname(name.as_bytes()).map_err(Into::into));
        }
        check("/etc/hostname", rewrite(&settings.etc.join("hostname"), format!("{name}\n").as_bytes()));
        check("/etc/hosts", name_in_hosts(&settings.etc.join("hosts"), name));
    }
    if let Some(id) = request.machine_id.as_deref().filter(|id| !id.is_empty()) {
        check("/etc/machine-id", rewrite(&settings.etc.join("machine-id"), format!("{id}\n").as_bytes()));
    }
    if request.reset_envs {
        settings.envs.clear();
    }
    let known = [("E2B_SANDBOX", "true"), ("E2B_SANDBOX_ID", request.sandbox_id.as_str())];
    for (name, value) in known {
        settings.envs.insert(name.to_owned(), value.to_owned());
        if settings.system {
            check(FACTS, tell(Path::new(FACTS), name, value));
        }
    }
    settings.envs.extend(request.envs);
    settings.sandbox_id = Some(request.sandbox_id);
    if let Some(user) = request.default_user {
        settings.default_user = user;
    }
    settings.default_workdir = request.default_workdir.or(settings.default_workdir);
    state.set_settings(settings.clone());
    // Processes that were stopped for the snapshot go on only now.
    if let Err(Failure::Remote(error)) = freeze::thaw(state) {
        warnings.push(error.message);
    }
    Identified { warnings, hooks: hooks(&settings.etc) }
}

/// Credits entropy to the kernel's pool and makes it derive new keys at once: until then, copies of one snapshot draw equal numbers.
fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` with room for the bytes.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; MAX_ENTROPY],
    }
    /// `_IOW('R', 0x03, int[2])`
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    /// `_IO('R', 0x07)`
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    if entropy.is_empty() {
        return Ok(());
    }
    let count = entropy.len().min(MAX_ENTROPY);
    let mut info = PoolInfo {
        entropy_count: (count * 8) as libc::c_int,
        buf_size: count as libc::c_int,
        buf: [0; MAX_ENTROPY],
    };
    info.buf[..count].copy_from_slice(&entropy[..count]);
    let random = File::open("/dev/urandom")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&random);
    // SAFETY: `info` has the layout of rand_pool_info with `buf_size` bytes behind it, and outlives the call; the second call takes nothing.
    unsafe {
        if libc::ioctl(fd, RNDADDENTROPY, &raw const info) < 0 || libc::ioctl(fd, RNDRESEEDCRNG) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives the guest a boot id of its own: a random UUID in a file that is mounted over the kernel's.
fn renew_boot_id(shown: &Path, own: &Path) -> io::Result<()> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    let text = format!("{}\n", uuid(bytes));
    if let Some(dir) = own.parent() {
        std::fs::create_dir_all(dir)?;
    }
    rewrite(own, text.as_bytes())?;
    if std::fs::read_to_string(shown)? != text {
        rustix::mount::mount_bind(own, shown)?;
    }
    Ok(())
}

/// A version 4 UUID of random bytes.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = |part: &[u8]| part.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]].map(hex).join("-")
}

/// The programs that the guest wants run after a restore: executable files, in the order of their names.
fn hooks(etc: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(etc.join(HOOKS)) else { return Vec::new() };
    let runnable = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let mut found: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| runnable(path))
        .filter_map(|path| path.into_os_string().into_string().ok())
        .collect();
    found.sort_unstable();
    found.truncate(MAX_HOOKS);
    found
}

/// Opens a regular file for reading and writing; links, FIFOs and devices in its place are refused.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR
        | OFlags::CREATE
        | OFlags::CLOEXEC
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Replaces a small file's content in place.
fn rewrite(path: &Path, content: &[u8]) -> io::Result<()> {
    let file = open_regular(path)?;
    file.write_all_at(content, 0)?;
    let length = content.len() as u64;
    if file.metadata()?.len() > length {
        file.set_len(length)?;
    }
    Ok(())
}

/// Writes a fact into the directory of facts, which nobody but root can change.
fn tell(directory: &Path, name: &str, value: &str) -> io::Result<()> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => rewrite(&directory.join(format!(".{name}")), value.as_bytes()),
    }
}

/// Makes the own name resolvable: the line of the own address is replaced, or added.
fn name_in_hosts(path: &Path, name: &str) -> io::Result<()> {
    let file = open_regular(path)?;
    let mut old = vec![0; MAX_HOSTS];
    let length = file.read_at(&mut old, 0)?;
    old.truncate(length);
    let old = String::from_utf8(old).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not text"))?;
    if length == MAX_HOSTS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long"));
    }
    let mut new = String::with_capacity(old.len() + 64);
    if old.is_empty() {
        new.push_str("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    }
    for line in old.lines().filter(|line| line.split_ascii_whitespace().next() != Some(OWN_ADDRESS)) {
        new.push_str(line);
        new.push('\n');
    }
    new.push_str(&format!("{OWN_ADDRESS}\t{name}\n"));
    if new != old {
        file.write_all_at(new.as_bytes(), 0)?;
        if new.len() < old.len() {
            file.set_len(new.len() as u64)?;
        }
    }
    Ok(())
}

/// A time as nanoseconds; before the epoch is the epoch.
pub(crate) fn nanoseconds(time: Timespec) -> u64 {
    u64::try_from(time.tv_sec)
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

fn timespec(nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanoseconds % 1_000_000_000).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewrites_files_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        name_in_hosts(&path, "first").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("127.0.0.1\tlocalhost\n") && text.ends_with("127.0.1.1\tfirst\n"), "{text}");
        std::fs::write(&path, "127.0.0.1 localhost\n127.0.1.1 a-very-long-host-name\n10.0.0.1 x\n").unwrap();
        name_in_hosts(&path, "b").unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "127.0.0.1 localhost\n10.0.0.1 x\n127.0.1.1\tb\n"
        );
        rewrite(&path, b"short\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short\n");
    }

    #[test]
    fn finds_hooks_that_can_be_run() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(hooks(dir.path()), Vec::<String>::new());
        let place = dir.path().join(HOOKS);
        std::fs::create_dir_all(place.join("30-directory")).unwrap();
        for (name, mode) in [("20-second", 0o755), ("10-first", 0o700), ("15-not-executable", 0o644)] {
            std::fs::write(place.join(name), "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(place.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let paths = ["10-first", "20-second"].map(|name| place.join(name).to_str().unwrap().to_owned());
        assert_eq!(hooks(dir.path()), paths);
    }

    #[test]
    fn boot_ids_are_uuids_and_new_each_time() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("run/boot_id");
        // As if it were mounted already: both are one file.
        let read = || {
            renew_boot_id(&own, &own).unwrap();
            std::fs::read_to_string(&own).unwrap()
        };
        let (one, two) = (read(), read());
        assert!(one != two && one.len() == 37 && two.len() == 37, "{one} {two}");
    }

    #[test]
    fn refuses_what_is_not_a_file() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("target", dir.path().join("link")).unwrap();
        assert!(rewrite(&dir.path().join("link"), b"x").is_err());
        assert!(!dir.path().join("target").exists());
        assert!(rewrite(dir.path(), b"x").is_err());
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        assert!(name_in_hosts(&fifo, "x").is_err());
    }
}
