//! The operation that starts a process: user, directory, environment, pipes or terminal.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::rc::Rc;
use std::time::Duration;

use amber_proto::{ErrorCode, Exec, Kind, ProcessInfo, PtySize, Started};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;
use rustix::pty::OpenptFlags;
use tokio::sync::{mpsc, watch};

use crate::conn::{Conn, Failure, Result, failure};
use crate::paths;
use crate::process::{Input, Process};
use crate::pump::{self, Output};
use crate::spawn::{self, Command, SpawnError, Step};
use crate::state::{Settings, State};
use crate::stream::Stream;
use crate::users::{self, User};

/// Where programs are looked for, unless an environment says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Group of terminals in Debian.
const TTY_GROUP: u32 = 5;

/// The ends of a process's descriptors: those of the child, and ours.
struct Plumbing {
    child: [OwnedFd; 3],
    input: Option<Input>,
    outputs: Vec<Output>,
}

/// Starts a process; its output goes to the connection.
pub(crate) async fn run(state: &Rc<State>, slot: &mut Option<Conn>, request: Exec) -> Result<()> {
    let timeout = request.timeout_ms.filter(|&timeout| timeout > 0);
    state.freezer.thawed().await;
    let (process, outputs, attached) = start(state, request)?;
    if let Some(timeout) = timeout {
        tokio::task::spawn_local(kill_after(process.clone(), Duration::from_millis(timeout)));
    }
    // A host that is gone already leaves a process without an audience.
    let mut audience = Vec::new();
    if let Some(conn) = slot.take()
        && conn.reply::<Exec>(&Started { pid: process.pid }).await.is_ok()
    {
        audience.push(conn);
    }
    pump::run(state, process, outputs, attached, audience).await;
    Ok(())
}

/// Kills the process group when its time is up, unless it ends before.
async fn kill_after(process: Rc<Process>, timeout: Duration) {
    let mut ended = process.ending.subscribe();
    tokio::select! {
        biased;
        _ = ended.wait_for(Option::is_some) => {}
        () = tokio::time::sleep(timeout) => {
            // The reaper has not taken it yet (it runs on this thread), so the id is still its own.
            process.timed_out.set(true);
            let _ = process.signal(Signal::KILL);
        }
    }
}

type Running = (Rc<Process>, Vec<Output>, mpsc::UnboundedReceiver<Conn>);

/// Everything up to the running process. Nothing here waits, so the reaper cannot see the process before it is in the table.
fn start(state: &State, request: Exec) -> Result<Running> {
    let settings = state.settings();
    let user_name = request.user.as_deref().filter(|name| !name.is_empty()).unwrap_or(&settings.default_user);
    let user = users::user(&settings.etc, user_name)?;
    let cwd = paths::resolve(
        request.cwd.as_deref().unwrap_or_default(),
        &user,
        settings.default_workdir.as_deref(),
    )?;
    match fs::metadata(&cwd) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(failure(ErrorCode::InvalidArgument, format!("cwd '{cwd}' is not a directory"))),
        Err(_) => return Err(failure(ErrorCode::InvalidArgument, format!("cwd '{cwd}' does not exist"))),
    }
    let envs = environment(&settings, &user, &request.envs);
    let program = look_up(&request.cmd, &cwd, envs.get("PATH").map_or(PATH, String::as_str))?;
    let args =
        std::iter::once(&request.cmd).chain(&request.args).map(|arg| c_string(arg)).collect::<Result<_>>()?;
    let variables =
        envs.iter().map(|(key, value)| c_string(&format!("{key}={value}"))).collect::<Result<_>>()?;
    let plumbing = match request.pty {
        Some(size) => terminal(size, user.uid),
        None => pipes(state, request.stdin),
    };
    let Plumbing { child, input, outputs } = plumbing.map_err(|error| {
        failure(ErrorCode::Internal, format!("Descriptors for the process could not be made: {error}"))
    })?;
    // Without privileges (in tests) there is nobody else to become.
    let own = rustix::process::geteuid().as_raw();
    let command = Command {
        program: c_string(&program)?,
        args,
        envs: variables,
        cwd: c_string(&cwd)?,
        descriptors: [child[0].as_fd(), child[1].as_fd(), child[2].as_fd()],
        terminal: request.pty.is_some(),
        uid: user.uid,
        gid: user.gid,
        groups: users::groups(&settings.etc, &user),
        switch_user: own == 0 || own != user.uid,
        group: state.freezer.group(),
    };
    let pid = spawn::spawn(&mut state.stack.borrow_mut(), &command)
        .map_err(|error| explain(&error, &request.cmd, &cwd, &user.name))?;
    drop(command);
    drop(child);
    let (attach, attached) = mpsc::unbounded_channel();
    let info = ProcessInfo {
        pid,
        cmd: request.cmd,
        args: request.args,
        envs: request.envs,
        cwd: request.cwd,
        tag: request.tag,
        pty: request.pty.is_some(),
    };
    let process = Rc::new(Process {
        pid,
        info,
        input: RefCell::new(input.map(Rc::new)),
        timed_out: Cell::new(false),
        ending: watch::Sender::new(None),
        attach,
    });
    state.add(process.clone());
    Ok((process, outputs, attached))
}

/// The environment, from low to high: `PATH`, the user's variables, the sandbox's, the command's.
fn environment(settings: &Settings, user: &User, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let base = [("PATH", PATH), ("HOME", &user.home), ("USER", &user.name), ("LOGNAME", &user.name)];
    let mut envs: BTreeMap<String, String> =
        base.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    for (key, value) in settings.envs.iter().chain(own) {
        envs.insert(key.clone(), value.clone());
    }
    envs
}

/// The path of a program: as it is when it has a slash, otherwise the first executable file of that name.
fn look_up(program: &str, cwd: &str, path: &str) -> Result<String> {
    if program.is_empty() {
        return Err(failure(ErrorCode::InvalidArgument, "Command is required"));
    }
    if program.contains('/') {
        return Ok(program.to_owned());
    }
    let executable = |candidate: &String| {
        fs::metadata(candidate)
            .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    path.split(':')
        .map(|directory| match directory {
            "" => format!("{cwd}/{program}"),
            directory if directory.starts_with('/') => format!("{directory}/{program}"),
            directory => format!("{cwd}/{directory}/{program}"),
        })
        .find(executable)
        .ok_or_else(|| {
            failure(
                ErrorCode::InvalidArgument,
                format!("exec: \"{program}\": executable file not found in $PATH"),
            )
        })
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| {
        failure(ErrorCode::InvalidArgument, "Command, arguments and environment must not contain NUL bytes")
    })
}

/// Standard input (or `/dev/null`), output and error.
fn pipes(state: &State, stdin: bool) -> io::Result<Plumbing> {
    let (input, child_input) = if stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        (Some(Input::new(Rc::new(Stream::new(write)?), false)), read)
    } else {
        (None, state.null.try_clone()?)
    };
    let (out_read, out_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err_read, err_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let outputs = vec![
        Output::new(Kind::STDOUT, Rc::new(Stream::new(out_read)?)),
        Output::new(Kind::STDERR, Rc::new(Stream::new(err_read)?)),
    ];
    Ok(Plumbing { child: [child_input, out_write, err_write], input, outputs })
}

/// A new terminal of the given size, owned by the user.
fn terminal(size: PtySize, uid: u32) -> io::Result<Plumbing> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    let size = rustix::termios::Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size)?;
    // So that the user's programs can open the terminal by name; not possible (nor needed) without privileges.
    let _ = rustix::fs::fchown(
        &slave,
        Some(rustix::fs::Uid::from_raw(uid)),
        Some(rustix::fs::Gid::from_raw(TTY_GROUP)),
    );
    let stream = Rc::new(Stream::new(master)?);
    let outputs = vec![Output::new(Kind::PTY, stream.clone())];
    Ok(Plumbing {
        child: [slave.try_clone()?, slave.try_clone()?, slave],
        input: Some(Input::new(stream, true)),
        outputs,
    })
}

/// The error of a process that could not be started, in words.
fn explain(error: &SpawnError, cmd: &str, cwd: &str, user: &str) -> Failure {
    let cause = &error.error;
    match error.step {
        Step::Directory => failure(
            ErrorCode::InvalidArgument,
            format!("cwd '{cwd}' cannot be entered by user '{user}': {cause}"),
        ),
        Step::Exec => failure(ErrorCode::InvalidArgument, format!("exec {cmd}: {cause}")),
        Step::User => {
            failure(ErrorCode::PermissionDenied, format!("User '{user}' cannot be assumed: {cause}"))
        }
        Step::Clone | Step::Prepare => {
            failure(ErrorCode::Internal, format!("Process could not be started: {cause}"))
        }
    }
}
