//! The protocol between the host and the agent, process 1 of every guest.
//!
//! One connection carries one operation. The host connects to [`PORT`], sends one [`Kind::REQUEST`] frame and, for the operations that
//! take bulk data, [`Kind::DATA`] frames closed by [`Kind::END`]. The agent answers with one [`Kind::REPLY`] or [`Kind::ERROR`] frame;
//! operations that stream (a process, a file being read) go on with raw frames after the reply. The transport's own flow control
//! (vsock credit) is the back-pressure; the protocol adds none.
//!
//! # Frame
//!
//! ```text
//! u32 LE  length of what follows (1..=MAX_FRAME)
//! u8      kind
//! [u8]    payload: CBOR for REQUEST, REPLY, ERROR, EXIT and EVENTS, raw bytes otherwise
//! ```
//!
//! # Versions
//!
//! Snapshots outlive releases, so a host must expect to meet an older agent in a restored guest. Messages are CBOR maps with named fields:
//! unknown fields are ignored and absent ones take their default, so a message may gain fields. An operation that the agent does not know is
//! answered with [`ErrorCode::Unsupported`], a frame of an unknown kind is skipped, and every answer carries the version of its sender.
//! [`VERSION`] is raised when a host needs to know more than that. `tests/golden.rs` freezes the encodings of each version.
//!
//! Frames of the guest are hostile: lengths are checked before anything is allocated, and decoding never panics.

mod error;
mod frame;
mod message;

pub use error::{CodecError, ErrorCode, FrameError, RemoteError};
pub use frame::{Decoder, Frame, HEADER_LEN, Kind, encode, header};
pub use message::{
    ChangeKind, CloseStdin, Connect, Done, Entries, EntryInfo, Exec, Exit, FileType, Forward, Freeze,
    GetInfo, GetMetrics, Identified, Identify, Info, List, ListProcesses, MakeDir, Metrics, ProcessInfo,
    Processes, PtyResize, PtySize, Read, ReadStart, Remove, Rename, Request, RequestHead, SendStdin,
    Shutdown, Signal, Started, Stat, Sync, Target, Thaw, Watch, WatchEvent, WatchEvents, WatchStarted, Write,
    decode_args, decode_cbor, decode_head, decode_reply, encode_cbor, encode_error, encode_reply,
    encode_request,
};

/// Version of the protocol that this crate speaks.
pub const VERSION: u16 = 1;

/// The vsock port of the agent.
pub const PORT: u32 = 1024;

/// Largest value of a frame's length field: kind and payload.
pub const MAX_FRAME: usize = 1 << 20;

/// Payload size that senders use for bulk data: large enough to amortise the header, small enough to keep buffers modest.
pub const CHUNK: usize = 128 << 10;
