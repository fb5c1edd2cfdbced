//! What an operation of the agent fails with. The messages are those that users see.

use std::io;

use amber_proto::{CodecError, ErrorCode, RemoteError};

/// An operation of the agent failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The arguments are wrong, for example a working directory that does not exist.
    #[error("{0}")]
    InvalidArgument(String),
    /// The user does not exist in the guest.
    #[error("{0}")]
    Unauthenticated(String),
    /// The file or process does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The directory exists already.
    #[error("{0}")]
    AlreadyExists(String),
    /// The guest's disk is full.
    #[error("{0}")]
    NotEnoughSpace(String),
    /// The operation needs a state that is absent, for example standard input that was not requested.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The guest's kernel denied the operation.
    #[error("{0}")]
    PermissionDenied(String),
    /// The agent in this guest is older than the operation.
    #[error("{0}")]
    Unsupported(String),
    /// The guest failed in another way.
    #[error("{0}")]
    Internal(String),
    /// No connection could be made: the guest has ended, or its agent does not listen yet.
    #[error("Guest agent cannot be reached: {0}")]
    Unreachable(#[source] io::Error),
    /// The connection ended in the middle of the operation: the guest has ended or was replaced by a snapshot.
    #[error("Connection to the guest agent was lost")]
    ConnectionLost(#[source] Option<io::Error>),
    /// The guest sent something that is not the protocol.
    #[error("Guest agent broke the protocol: {0}")]
    Protocol(String),
}

impl AgentError {
    /// A request that cannot be sent as it is.
    pub(super) fn request(error: CodecError) -> Self {
        Self::InvalidArgument(error.to_string())
    }

    /// A connection that was not made.
    pub(super) fn connect(error: io::Error) -> Self {
        Self::Unreachable(error)
    }

    /// A connection that failed.
    pub(super) fn lost(error: io::Error) -> Self {
        Self::ConnectionLost(Some(error))
    }

    /// A frame that should not be there.
    pub(super) fn protocol(error: impl ToString) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl From<RemoteError> for AgentError {
    fn from(error: RemoteError) -> Self {
        let message = error.message;
        match error.code {
            ErrorCode::InvalidArgument => Self::InvalidArgument(message),
            ErrorCode::Unauthenticated => Self::Unauthenticated(message),
            ErrorCode::NotFound => Self::NotFound(message),
            ErrorCode::AlreadyExists => Self::AlreadyExists(message),
            ErrorCode::NoSpace => Self::NotEnoughSpace(message),
            ErrorCode::FailedPrecondition => Self::FailedPrecondition(message),
            ErrorCode::PermissionDenied => Self::PermissionDenied(message),
            ErrorCode::Unsupported => Self::Unsupported(message),
            _ => Self::Internal(message),
        }
    }
}
