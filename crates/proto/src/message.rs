//! The operations: one type per request with its reply, and their CBOR encoding.
//!
//! Every field has a default and unknown fields are ignored, so both sides may be of different age. The semantics (users, paths, environment,
//! exit codes) are those of the agent and are described at each type, because a host of any version relies on them.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{CodecError, HEADER_LEN, Kind, MAX_FRAME, RemoteError, VERSION, header};

/// An operation: its name on the wire, its arguments (`Self`) and what the agent replies.
pub trait Request: Serialize + DeserializeOwned {
    /// Name on the wire.
    const OP: &'static str;
    /// Payload of the reply.
    type Reply: Serialize + DeserializeOwned;
}

macro_rules! operations {
    ($($request:ty => $op:literal, $reply:ty;)*) => {
        $(impl Request for $request {
            const OP: &'static str = $op;
            type Reply = $reply;
        })*
    };
}

operations! {
    GetInfo => "info", Info;
    Identify => "identify", Identified;
    Exec => "exec", Started;
    Connect => "connect", Started;
    ListProcesses => "processes", Processes;
    Signal => "signal", Done;
    SendStdin => "stdin", Done;
    CloseStdin => "close_stdin", Done;
    PtyResize => "pty_resize", Done;
    Stat => "stat", EntryInfo;
    List => "list", Entries;
    Read => "read", ReadStart;
    Write => "write", EntryInfo;
    MakeDir => "make_dir", EntryInfo;
    Rename => "rename", EntryInfo;
    Remove => "remove", Done;
    Forward => "forward", Done;
    Watch => "watch", WatchStarted;
    GetMetrics => "metrics", Metrics;
    Sync => "sync", Done;
    Freeze => "freeze", Done;
    Thaw => "thaw", Done;
    Shutdown => "shutdown", Done;
}

/// Asks who the agent is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GetInfo {}

/// The agent and its guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Info {
    /// Version of the agent program.
    pub agent: String,
    /// Version of the protocol it speaks.
    pub protocol: u16,
    /// Operations it knows.
    pub operations: Vec<String>,
    /// Time since the guest's kernel booted, in nanoseconds.
    pub uptime_ns: u64,
    /// The boot id that the guest's processes see: new after a boot, and after each [`Identify`].
    pub boot_id: String,
    /// The sandbox id of the last [`Identify`].
    pub sandbox_id: Option<String>,
}

/// Tells a fresh or copied guest who it is. The agent carries it out before it starts any further process, and thaws those that
/// were frozen for the snapshot. It also makes a new boot id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identify {
    /// Id of the sandbox.
    pub sandbox_id: String,
    /// Host name, also written to `/etc/hostname` and `/etc/hosts`.
    pub hostname: Option<String>,
    /// Wall clock, nanoseconds since the epoch.
    pub wall_clock_ns: Option<u64>,
    /// Fresh entropy, 64 bytes or more, credited to the kernel's pool, which then reseeds at once.
    #[serde(with = "serde_bytes")]
    pub entropy: Vec<u8>,
    /// Content of `/etc/machine-id`: 32 hexadecimal digits.
    pub machine_id: Option<String>,
    /// Environment of every process started from now on; merged over what the guest already has.
    pub envs: BTreeMap<String, String>,
    /// Forget the environment that the guest has before merging.
    pub reset_envs: bool,
    /// User of processes and files that name none; `user` unless set.
    pub default_user: Option<String>,
    /// Working directory of processes that name none; the user's home unless set.
    pub default_workdir: Option<String>,
}

/// The guest knows who it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identified {
    /// What could not be set; never a reason to give the guest up.
    pub warnings: Vec<String>,
    /// Programs of the guest that are to be run now, as root and one after the other: `/etc/amberbox/restore.d/*`, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<String>,
}

/// Size of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PtySize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// Starts a process. After the reply its output follows as raw frames, then [`Exit`]; closing the connection only stops the output,
/// the process goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exec {
    /// Program, looked up in `PATH` when it has no slash.
    pub cmd: String,
    /// Arguments, without the program's name.
    pub args: Vec<String>,
    /// Environment, over `PATH`, `HOME`, `USER`, `LOGNAME` and the sandbox's environment.
    pub envs: BTreeMap<String, String>,
    /// Working directory; relative ones and `~` are under the user's home.
    pub cwd: Option<String>,
    /// User, by name; the default user if absent.
    pub user: Option<String>,
    /// Whether [`SendStdin`] will be used; otherwise standard input is `/dev/null`.
    pub stdin: bool,
    /// Run on a new terminal of this size.
    pub pty: Option<PtySize>,
    /// Name by which the process may be addressed instead of its id.
    pub tag: Option<String>,
    /// After so many milliseconds the process group is killed; absent or 0 means never.
    pub timeout_ms: Option<u64>,
}

/// A process runs, and its output follows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Started {
    /// Process id in the guest.
    pub pid: u32,
}

/// The end of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exit {
    /// Exit code, -1 if a signal ended the process.
    pub exit_code: i32,
    /// Whether the process ended by itself.
    pub exited: bool,
    /// `exit status N` or `signal: killed`.
    pub status: String,
    /// `status` unless the exit code is 0.
    pub error: Option<String>,
    /// Number of the signal that ended the process.
    pub signal: Option<i32>,
    /// Whether the process was killed because its time was up.
    pub timed_out: bool,
}

/// Addresses a process that was started through the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Target {
    /// By process id.
    pub pid: Option<u32>,
    /// By tag.
    pub tag: Option<String>,
}

impl From<u32> for Target {
    fn from(pid: u32) -> Self {
        Self { pid: Some(pid), tag: None }
    }
}

/// Attaches to a process: its output from now on, then [`Exit`]. A process that ended less than 30 s ago still gives its exit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Connect {
    /// Which one.
    pub process: Target,
}

/// Asks for the processes that were started through the agent and still run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListProcesses {}

/// Reply to [`ListProcesses`], oldest first. A long listing is sent as several replies; all but the last say `more`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Processes {
    /// The processes.
    pub processes: Vec<ProcessInfo>,
    /// Another reply follows.
    pub more: bool,
}

/// A running process, with what it was started with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// Process id.
    pub pid: u32,
    /// Program.
    pub cmd: String,
    /// Arguments.
    pub args: Vec<String>,
    /// Environment as given in [`Exec`].
    pub envs: BTreeMap<String, String>,
    /// Working directory as given in [`Exec`].
    pub cwd: Option<String>,
    /// Tag.
    pub tag: Option<String>,
    /// Whether it runs on a terminal.
    pub pty: bool,
}

/// Sends a signal to the whole process group of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Signal {
    /// Which one.
    pub process: Target,
    /// Number of the signal.
    pub signal: i32,
}

/// Writes to the standard input or terminal of a process. `DATA` frames and `END` follow the request; the reply comes when the
/// process's pipe has taken everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendStdin {
    /// Which one.
    pub process: Target,
}

/// Closes the standard input of a process; on a terminal it sends the end-of-file character.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CloseStdin {
    /// Which one.
    pub process: Target,
}

/// Sets the size of a process's terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PtyResize {
    /// Which one.
    pub process: Target,
    /// New size.
    pub size: PtySize,
}

/// The operation is done and has nothing to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Done {}

/// What a directory entry is. A symbolic link is what it points to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// Regular file.
    File,
    /// Directory.
    Dir,
    /// Anything else, and links that lead nowhere.
    #[default]
    #[serde(other)]
    Unknown,
}

/// A directory entry. Bytes of names that are not UTF-8 are replaced by U+FFFD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EntryInfo {
    /// Last component of the path.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// What it is.
    pub kind: FileType,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits; of the target if it is a link.
    pub mode: u32,
    /// Type letter and permissions, such as `-rw-r--r--`.
    pub permissions: String,
    /// Name of the owner, or the number if there is none.
    pub owner: String,
    /// Name of the group, or the number if there is none.
    pub group: String,
    /// Last change of the content, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Where a link leads, resolved completely; its own path if it leads nowhere.
    pub symlink_target: Option<String>,
    /// Extended attributes `user.e2b.*`.
    pub metadata: BTreeMap<String, String>,
}

/// Asks for one entry. Links are not followed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stat {
    /// Path; relative ones and `~` are under the user's home.
    pub path: String,
    /// User, by name; the default user if absent.
    pub user: Option<String>,
}

/// Lists a directory, depth first in the order of names, each directory before its content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct List {
    /// Path of the directory.
    pub path: String,
    /// User, by name.
    pub user: Option<String>,
    /// Levels to descend, 1 for the directory itself; 0 means 1.
    pub depth: u32,
}

/// Reply to [`List`]. A long listing is sent as several replies; all but the last say `more`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entries {
    /// The entries.
    pub entries: Vec<EntryInfo>,
    /// Another reply follows.
    pub more: bool,
}

/// Reads a regular file: the reply, `DATA` frames, `END`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Read {
    /// Path of the file.
    pub path: String,
    /// User, by name.
    pub user: Option<String>,
    /// First byte.
    pub offset: u64,
    /// Number of bytes; to the end if absent.
    pub length: Option<u64>,
}

/// Reply to [`Read`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReadStart {
    /// Size of the file when it was opened. Files of `/proc` say 0 and have content all the same.
    pub size: u64,
    /// Last change of the content, nanoseconds since the epoch.
    pub modified_ns: i64,
}

/// Writes a regular file: `DATA` frames and `END` follow the request. Missing parents are created and owned by the user. If anything fails
/// (the disk is full, the connection is cut) a file that existed keeps its content, and one that did not is not left behind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Write {
    /// Path of the file.
    pub path: String,
    /// User, by name: owner of the file.
    pub user: Option<String>,
    /// Number of bytes if it is known: a file that cannot fit is refused before it is sent.
    pub length: Option<u64>,
    /// Permission bits; if absent, those the file has, or 0644 for a new one.
    pub mode: Option<u32>,
    /// Extended attributes `user.e2b.KEY`; they replace all that the file had.
    pub metadata: BTreeMap<String, String>,
}

/// Creates a directory and its parents with mode 0755. [`crate::ErrorCode::AlreadyExists`] if it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MakeDir {
    /// Path of the directory.
    pub path: String,
    /// User, by name: owner of what is created.
    pub user: Option<String>,
}

/// Renames a file or directory; creates the parents of the new path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rename {
    /// Old path.
    pub from: String,
    /// New path.
    pub to: String,
    /// User, by name.
    pub user: Option<String>,
}

/// Removes a file, or a directory with its content. A path that does not exist is no error.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Remove {
    /// Path.
    pub path: String,
    /// User, by name.
    pub user: Option<String>,
}

/// Connects to a TCP port of the guest: on 127.0.0.1, and if nobody listens there on ::1. [`crate::ErrorCode::NotFound`] if nobody listens
/// on either. After the reply there are no frames any more: the connection carries the bytes of the TCP connection in both directions,
/// each of which ends with a shutdown of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Forward {
    /// The port.
    pub port: u16,
}

/// Watches a directory. After the reply [`Kind::EVENTS`] frames follow until the host closes the connection; [`Kind::END`] says that the
/// directory itself is gone, an error frame that events were lost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Watch {
    /// Path of the directory.
    pub path: String,
    /// User, by name.
    pub user: Option<String>,
    /// Whether directories below are watched, too, also those that appear later.
    pub recursive: bool,
    /// Whether events come with what is known about the entry.
    pub include_entry: bool,
    /// Whether directories on network file systems may be watched, whose changes may not all be seen.
    pub allow_network_mounts: bool,
}

/// Reply to [`Watch`]: everything from now on is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchStarted {}

/// What happened to a directory entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is new under this name.
    Create,
    /// Its content changed.
    Write,
    /// It was removed.
    Remove,
    /// It has another name now.
    Rename,
    /// Its permissions, owner, times or extended attributes changed.
    Chmod,
    /// Something that this version does not know.
    #[default]
    #[serde(other)]
    Unknown,
}

/// One change. Bytes of names that are not UTF-8 are replaced by U+FFFD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchEvent {
    /// Path relative to the watched directory; `.` is that directory.
    pub name: String,
    /// What happened.
    pub kind: ChangeKind,
    /// The entry, if that was asked for and it is still there.
    pub entry: Option<EntryInfo>,
}

/// Changes in the order in which they happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchEvents {
    /// The changes.
    pub events: Vec<WatchEvent>,
}

/// Asks for the guest's resource use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GetMetrics {}

/// The guest's resource use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Wall clock of the guest, nanoseconds since the epoch.
    pub wall_clock_ns: u64,
    /// Processors.
    pub cpu_count: u32,
    /// Processor time spent outside idle since boot, all processors, nanoseconds.
    pub cpu_busy_ns: u64,
    /// Processor time since boot, all processors, nanoseconds.
    pub cpu_total_ns: u64,
    /// Memory, bytes.
    pub mem_total: u64,
    /// Memory in use, without caches.
    pub mem_used: u64,
    /// Page cache.
    pub mem_cache: u64,
    /// Size of the root file system.
    pub disk_total: u64,
    /// Used part of it.
    pub disk_used: u64,
}

/// Writes everything back to the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sync {}

/// Stops all processes that were started through the agent, with their descendants, and holds new ones back, until [`Thaw`] or
/// [`Identify`]. To be called before a snapshot, so that a copy knows that it is one before anything else in it runs. The reply comes
/// when they stand still. A host that never thaws is given up after half a minute of guest time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Freeze {}

/// Undoes [`Freeze`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Thaw {}

/// Ends the guest: processes are killed, disks written back, the machine reset. The reply precedes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shutdown {}

/// The part of a request that tells what it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RequestHead {
    /// Version of the host.
    pub v: u16,
    /// Name of the operation.
    pub op: String,
}

#[derive(Serialize)]
struct RequestOut<'a, R> {
    v: u16,
    op: &'a str,
    args: &'a R,
}

#[derive(Deserialize)]
struct RequestIn<R> {
    args: R,
}

#[derive(Serialize)]
struct ReplyOut<'a, R> {
    v: u16,
    reply: &'a R,
}

#[derive(Deserialize)]
struct ReplyIn<R> {
    reply: R,
}

/// Nesting beyond this is refused; the messages need five levels, unknown fields may have more.
const MAX_DEPTH: usize = 32;

/// A whole frame of `kind` with `value` as CBOR.
pub fn encode_cbor<T: Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>, CodecError> {
    let mut frame = vec![0; HEADER_LEN];
    ciborium::into_writer(value, &mut frame).map_err(|error| CodecError::Encode(error.to_string()))?;
    let payload = frame.len() - HEADER_LEN;
    if payload >= MAX_FRAME {
        return Err(CodecError::TooLong(payload));
    }
    frame[..HEADER_LEN].copy_from_slice(&header(kind, payload));
    Ok(frame)
}

/// Decodes a CBOR payload.
pub fn decode_cbor<T: DeserializeOwned>(payload: &[u8]) -> Result<T, CodecError> {
    ciborium::de::from_reader_with_recursion_limit(payload, MAX_DEPTH)
        .map_err(|error| CodecError::Decode(error.to_string()))
}

/// The request frame of an operation.
pub fn encode_request<R: Request>(request: &R) -> Result<Vec<u8>, CodecError> {
    encode_cbor(Kind::REQUEST, &RequestOut { v: VERSION, op: R::OP, args: request })
}

/// The reply frame of an operation.
pub fn encode_reply<R: Request>(reply: &R::Reply) -> Result<Vec<u8>, CodecError> {
    encode_cbor(Kind::REPLY, &ReplyOut { v: VERSION, reply })
}

/// The frame of an error. An error that cannot be encoded becomes one with a shortened message.
pub fn encode_error(error: &RemoteError) -> Vec<u8> {
    encode_cbor(Kind::ERROR, error).unwrap_or_else(|_| {
        let short = RemoteError { message: error.message.chars().take(4096).collect(), ..*error };
        encode_cbor(Kind::ERROR, &short).unwrap_or_default()
    })
}

/// What operation a request frame asks for.
pub fn decode_head(payload: &[u8]) -> Result<RequestHead, CodecError> {
    decode_cbor(payload)
}

/// The arguments of a request frame.
pub fn decode_args<R: Request>(payload: &[u8]) -> Result<R, CodecError> {
    decode_cbor::<RequestIn<R>>(payload).map(|request| request.args)
}

/// The content of a reply frame.
pub fn decode_reply<R: Request>(payload: &[u8]) -> Result<R::Reply, CodecError> {
    decode_cbor::<ReplyIn<R::Reply>>(payload).map(|reply| reply.reply)
}
