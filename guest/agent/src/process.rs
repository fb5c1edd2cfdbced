//! A process that the host has started: what it was started with, its input, and how it ended; the operations on it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use amber_proto::{
    CloseStdin, Connect, Done, ErrorCode, Exit, Kind, ListProcesses, ProcessInfo, Processes, PtyResize,
    SendStdin, Signal, Started, Target, encode_cbor,
};
use rustix::io::Errno;
use rustix::process::{Pid, Signal as Sig};
use tokio::sync::{Mutex, mpsc, watch};

use crate::conn::{Conn, Result, failure};
use crate::state::State;
use crate::stream::Stream;

/// The end-of-file character of a terminal.
const END_OF_FILE: &[u8] = &[4];

/// Bytes of process descriptions per reply.
const LISTING: usize = 256 << 10;

/// How a process ended, as `wait` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

/// A process that runs, or whose last output is still being delivered.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) info: ProcessInfo,
    /// Standard input or terminal, while it is open.
    pub(crate) input: RefCell<Option<Rc<Input>>>,
    /// Its time was up and it has been killed.
    pub(crate) timed_out: Cell<bool>,
    /// How it ended; set once, by the reaper.
    pub(crate) ending: watch::Sender<Option<Ending>>,
    /// Connections that want its output.
    pub(crate) attach: mpsc::UnboundedSender<Conn>,
}

/// The writing end of a process's input.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) stream: Rc<Stream>,
    pub(crate) terminal: bool,
    /// Held while one sender's data is written, so that senders do not mix.
    order: Mutex<()>,
}

/// A process that has ended.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) exit: Exit,
}

impl Input {
    pub(crate) fn new(stream: Rc<Stream>, terminal: bool) -> Self {
        Self { stream, terminal, order: Mutex::new(()) }
    }
}

impl Process {
    /// Sends a signal to the process's group, or to the process alone while it has not made its group yet. Only for processes that
    /// are in the state's table: their id cannot have been reused, because they have not been reaped.
    pub(crate) fn signal(&self, signal: Sig) -> std::result::Result<(), Errno> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Err(Errno::SRCH) };
        match rustix::process::kill_process_group(pid, signal) {
            Err(Errno::SRCH) => rustix::process::kill_process(pid, signal),
            result => result,
        }
    }

    /// The exit as the host is told.
    pub(crate) fn exit(&self, ending: Ending) -> Exit {
        let timed_out = self.timed_out.get();
        match ending {
            Ending::Code(code) => {
                let status = format!("exit status {code}");
                let error = (code != 0).then(|| status.clone());
                Exit { exit_code: code, exited: true, status, error, signal: None, timed_out }
            }
            Ending::Signal(signal) => {
                let status = format!("signal: {}", signal_name(signal));
                Exit {
                    exit_code: -1,
                    exited: false,
                    error: Some(status.clone()),
                    status,
                    signal: Some(signal),
                    timed_out,
                }
            }
        }
    }

    fn input(&self) -> Result<Rc<Input>> {
        self.input
            .borrow()
            .clone()
            .ok_or_else(|| failure(ErrorCode::FailedPrecondition, "stdin not enabled or closed"))
    }
}

/// Signal names as E2B's daemon gives them.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        _ => return format!("signal {signal}"),
    };
    name.to_owned()
}

/// Lists the running processes.
pub(crate) async fn list(state: &State, conn: &Conn) -> Result<()> {
    let mut reply = Processes::default();
    let mut size = 0;
    for process in state.running() {
        let info = &process.info;
        let strings = info.args.iter().chain(info.envs.iter().flat_map(|(key, value)| [key, value]));
        size += 64 + strings.map(|string| string.len() + 5).sum::<usize>();
        reply.processes.push(info.clone());
        if size > LISTING {
            let full = Processes { processes: std::mem::take(&mut reply.processes), more: true };
            conn.reply::<ListProcesses>(&full).await?;
            size = 0;
        }
    }
    conn.reply::<ListProcesses>(&reply).await
}

/// Sends a signal.
pub(crate) fn signal(state: &State, request: &Signal) -> Result<Done> {
    let process = state.find(&request.process)?;
    let signal = (1..=libc::SIGRTMAX()).contains(&request.signal).then_some(request.signal);
    // SAFETY: the number is within the range of signals that may be sent, and sending is all it is used for.
    let signal = signal.map(|number| unsafe { Sig::from_raw_unchecked(number) });
    let signal = signal.ok_or_else(|| {
        failure(ErrorCode::InvalidArgument, format!("Signal {} does not exist", request.signal))
    })?;
    match process.signal(signal) {
        Ok(()) => Ok(Done {}),
        Err(Errno::SRCH) => {
            Err(failure(ErrorCode::NotFound, format!("process with pid {} not found", process.pid)))
        }
        Err(error) => Err(failure(ErrorCode::Internal, format!("Signal could not be sent: {error}"))),
    }
}

/// Writes to a process's input what the host sends.
pub(crate) async fn send_stdin(state: &State, conn: &mut Conn, request: &SendStdin) -> Result<Done> {
    let process = state.find(&request.process)?;
    let input = process.input()?;
    let _turn = input.order.lock().await;
    let mut ended = process.ending.subscribe();
    loop {
        let (kind, data) = conn.frame(&[Kind::DATA, Kind::END]).await?;
        if kind == Kind::END {
            return Ok(Done {});
        }
        let written = tokio::select! {
            biased;
            written = input.stream.write_all(&data) => written,
            _ = ended.wait_for(Option::is_some) => {
                return Err(failure(ErrorCode::NotFound, format!("process with pid {} not found", process.pid)));
            }
        };
        if let Err(error) = written {
            return Err(failure(
                ErrorCode::FailedPrecondition,
                format!("Process does not read its input: {error}"),
            ));
        }
    }
}

/// Closes a process's input. Senders that are still at it finish first, because they hold it, too.
pub(crate) async fn close_stdin(state: &State, request: &CloseStdin) -> Result<Done> {
    let process = state.find(&request.process)?;
    let input = process.input()?;
    if input.terminal {
        let _turn = input.order.lock().await;
        if input.stream.write_all(END_OF_FILE).await.is_err() {
            return Err(failure(ErrorCode::FailedPrecondition, "stdin not enabled or closed"));
        }
    } else {
        process.input.borrow_mut().take();
    }
    Ok(Done {})
}

/// Resizes a process's terminal.
pub(crate) fn resize(state: &State, request: &PtyResize) -> Result<Done> {
    let process = state.find(&request.process)?;
    let input = process.input.borrow().clone().filter(|input| input.terminal);
    let input = input.ok_or_else(|| failure(ErrorCode::FailedPrecondition, "Process has no terminal"))?;
    let size = rustix::termios::Winsize {
        ws_row: request.size.rows,
        ws_col: request.size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&*input.stream, size)
        .map_err(|error| failure(ErrorCode::Internal, format!("Terminal could not be resized: {error}")))?;
    Ok(Done {})
}

/// Attaches a connection to the output of a process, or gives the exit of one that has just ended.
pub(crate) async fn connect(state: &State, slot: &mut Option<Conn>, request: &Connect) -> Result<()> {
    let found = state.find(&request.process);
    let kept = if found.is_ok() { None } else { state.kept(&request.process) };
    let pid = match (&found, &kept) {
        (Ok(process), _) => process.pid,
        (Err(_), Some(finished)) => finished.pid,
        (Err(_), None) => return found.map(drop),
    };
    let Some(conn) = slot.take() else { return Ok(()) };
    conn.reply::<Connect>(&Started { pid }).await?;
    let conn = match found {
        // The process and its pump may have ended while the reply was sent; then the connection comes back.
        Ok(process) => match process.attach.send(conn) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::SendError(conn)) => conn,
        },
        Err(_) => conn,
    };
    match kept.or_else(|| state.kept(&Target::from(pid))) {
        Some(finished) => conn.send(&encode_cbor(Kind::EXIT, &finished.exit).unwrap_or_default()).await,
        None => Ok(()),
    }
}
