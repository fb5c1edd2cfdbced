//! Errors of the protocol: broken frames, undecodable messages, and the typed error that one side reports to the other.

use serde::{Deserialize, Serialize};

/// A frame that breaks the framing rules. The connection cannot be used any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field is zero; a frame has at least a kind.
    #[error("Frame has no kind (length 0)")]
    Empty,
    /// The length field exceeds [`crate::MAX_FRAME`].
    #[error("Frame of {0} bytes exceeds the limit of {max}", max = crate::MAX_FRAME)]
    TooLong(usize),
}

/// A payload that is not the message it should be.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The message does not fit into one frame.
    #[error("Message of {0} bytes exceeds the limit of {max}", max = crate::MAX_FRAME)]
    TooLong(usize),
    /// The message could not be encoded.
    #[error("Message could not be encoded: {0}")]
    Encode(String),
    /// The payload is not valid CBOR or lacks the structure of the message.
    #[error("Message could not be decoded: {0}")]
    Decode(String),
}

/// What went wrong in the guest, by class. On the wire it is a lower-case name, so that a later version can add classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request itself is wrong: bad path, missing working directory, a directory where a file is needed.
    InvalidArgument,
    /// The user does not exist.
    Unauthenticated,
    /// The file or process does not exist.
    NotFound,
    /// The directory exists already.
    AlreadyExists,
    /// The guest's disk is full.
    NoSpace,
    /// The operation needs a state that is absent, for example standard input that was not requested.
    FailedPrecondition,
    /// The guest's kernel denied the operation.
    PermissionDenied,
    /// The agent does not know the operation: it is older than the host.
    Unsupported,
    /// Anything else, including classes that this version does not know.
    #[serde(other)]
    #[default]
    Internal,
}

/// The payload of an error frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default, thiserror::Error)]
#[error("{message}")]
#[serde(default)]
pub struct RemoteError {
    /// Protocol version of the sender.
    pub v: u16,
    /// Class of the error.
    pub code: ErrorCode,
    /// What happened, for people.
    pub message: String,
}

impl RemoteError {
    /// An error of this version.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { v: crate::VERSION, code, message: message.into() }
    }
}
