//! Files: each operation runs on a blocking thread and talks to its connection directly, so that bulk data takes the shortest way
//! (one read, one write per chunk) and a slow disk delays nobody else.
//!
//! The agent acts as root and gives what it creates to the user, as E2B's daemon does; users and permissions decide who owns files,
//! not which ones the host may touch.

mod bulk;
mod content;
mod entry;
mod list;
mod remove;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use amber_proto::{Done, ErrorCode, MakeDir, Rename, Request, Shutdown, Stat, Sync};

use crate::conn::{BlockingConn, Conn, Failure, Result, failure};
use crate::paths;
use crate::state::{Settings, State};
use crate::users::{self, Names, User};

pub(crate) use content::{read, write};
pub(crate) use entry::entry as entry_info;
pub(crate) use list::list;
pub(crate) use remove::remove;

/// How long processes may take to end when the guest shuts down.
const GRACE: Duration = Duration::from_millis(200);

/// Runs an operation on a blocking thread. An operation sends its replies itself.
pub(crate) async fn blocking<R: Request + Send + 'static>(
    state: &Rc<State>,
    slot: &mut Option<Conn>,
    request: R,
    operation: fn(&Settings, &mut BlockingConn, R) -> Result<()>,
) -> Result<()> {
    let settings = state.settings();
    let mut conn = slot.take().ok_or(Failure::Gone)?.into_blocking()?;
    let task = tokio::task::spawn_blocking(move || {
        if let Err(Failure::Remote(error)) = operation(&settings, &mut conn, request) {
            conn.refuse(&error);
        }
    });
    // The thread has no way to panic, and no one to tell if it did.
    let _ = task.await;
    Ok(())
}

/// The user and the absolute path of a request.
pub(crate) fn locate(settings: &Settings, user: Option<&str>, path: &str) -> Result<(User, String)> {
    let name = user.filter(|name| !name.is_empty()).unwrap_or(&settings.default_user);
    let user = users::user(&settings.etc, name)?;
    let path = paths::resolve(path, &user, settings.default_workdir.as_deref())?;
    Ok((user, path))
}

/// The error of a system call on a path, by class.
fn explain(what: &str, path: &str, error: &io::Error) -> Failure {
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => ErrorCode::NotFound,
        Some(libc::ENOSPC | libc::EDQUOT) => {
            return failure(ErrorCode::NoSpace, "not enough disk space available");
        }
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorCode::PermissionDenied,
        Some(
            libc::ENOTDIR
            | libc::EISDIR
            | libc::ELOOP
            | libc::ENAMETOOLONG
            | libc::EINVAL
            | libc::ENXIO
            | libc::EXDEV
            | libc::E2BIG,
        ) => ErrorCode::InvalidArgument,
        _ => ErrorCode::Internal,
    };
    failure(code, format!("{what} '{path}': {error}"))
}

/// Creates a directory and its parents, owned by the user. Whether the last one is new.
fn ensure_directory(path: &Path, user: &User) -> Result<bool> {
    let mut missing = Vec::new();
    let mut current = path;
    loop {
        match fs::metadata(current) {
            Ok(metadata) if metadata.is_dir() => break,
            Ok(_) => {
                return Err(failure(
                    ErrorCode::InvalidArgument,
                    format!("path is a file: {}", current.display()),
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(current),
            // A component that is a file is found on the way up.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(explain("error accessing path", &current.to_string_lossy(), &error)),
        }
        match current.parent() {
            Some(parent) => current = parent,
            None => break,
        }
    }
    let mut created = false;
    for directory in missing.into_iter().rev() {
        created = match fs::DirBuilder::new().mode(0o755).create(directory) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => {
                return Err(explain("error creating directory", &directory.to_string_lossy(), &error));
            }
        };
        if created && !is_own(user) {
            chown(directory, Some(user.uid), Some(user.gid))
                .map_err(|error| explain("error changing owner of", &directory.to_string_lossy(), &error))?;
        }
    }
    Ok(created)
}

/// Whether files that the agent creates belong to the user already.
fn is_own(user: &User) -> bool {
    rustix::process::geteuid().as_raw() == user.uid && rustix::process::getegid().as_raw() == user.gid
}

/// One entry.
pub(crate) fn stat(settings: &Settings, conn: &mut BlockingConn, request: Stat) -> Result<()> {
    let (_, path) = locate(settings, request.user.as_deref(), &request.path)?;
    let entry =
        entry::entry(&path, &Names::read(&settings.etc)).map_err(|error| missing_file(&path, &error))?;
    conn.reply::<Stat>(&entry)
}

/// An entry that is not there, in the words of E2B's daemon.
pub(crate) fn missing_file(path: &str, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound => failure(ErrorCode::NotFound, format!("path '{path}' does not exist")),
        _ => explain("error accessing path", path, error),
    }
}

/// Creates a directory.
pub(crate) fn make_dir(settings: &Settings, conn: &mut BlockingConn, request: MakeDir) -> Result<()> {
    let (user, path) = locate(settings, request.user.as_deref(), &request.path)?;
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {
            return Err(failure(ErrorCode::AlreadyExists, format!("directory already exists: {path}")));
        }
        Ok(_) => {
            let message = format!("path already exists but it is not a directory: {path}");
            return Err(failure(ErrorCode::InvalidArgument, message));
        }
        Err(_) => {}
    }
    if !ensure_directory(Path::new(&path), &user)? {
        return Err(failure(ErrorCode::AlreadyExists, format!("directory already exists: {path}")));
    }
    let entry =
        entry::entry(&path, &Names::read(&settings.etc)).map_err(|error| missing_file(&path, &error))?;
    conn.reply::<MakeDir>(&entry)
}

/// Renames a file or directory.
pub(crate) fn rename(settings: &Settings, conn: &mut BlockingConn, request: Rename) -> Result<()> {
    let (user, from) = locate(settings, request.user.as_deref(), &request.from)?;
    let (_, to) = locate(settings, request.user.as_deref(), &request.to)?;
    fs::symlink_metadata(&from).map_err(|error| missing_file(&from, &error))?;
    if let Some(parent) = Path::new(&to).parent() {
        ensure_directory(parent, &user)?;
    }
    fs::rename(&from, &to).map_err(|error| explain("error renaming", &from, &error))?;
    let entry = entry::entry(&to, &Names::read(&settings.etc)).map_err(|error| missing_file(&to, &error))?;
    conn.reply::<Rename>(&entry)
}

/// Writes everything back.
pub(crate) fn sync(_: &Settings, conn: &mut BlockingConn, _: Sync) -> Result<()> {
    rustix::fs::sync();
    conn.reply::<Sync>(&Done {})
}

/// Ends the guest; in tests, only the agent.
pub(crate) fn shutdown(settings: &Settings, conn: &mut BlockingConn, _: Shutdown) -> Result<()> {
    conn.reply::<Shutdown>(&Done {})?;
    if !settings.system {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
        return Ok(());
    }
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        // SAFETY: no memory is involved; as process 1, -1 means everybody else.
        unsafe { libc::kill(-1, signal) };
        std::thread::sleep(GRACE);
    }
    rustix::fs::sync();
    // There is no power button on the platform: a reset is how a machine ends.
    rustix::system::reboot(rustix::system::RebootCommand::Restart)
        .map_err(|error| failure(ErrorCode::Internal, format!("Machine cannot be reset: {error}")))
}
