//! What an operation on sandboxes fails with. Each variant has a stable code, which the JavaScript layer maps to a class in one table
//! (`lib/errors.js`); the messages are those that users see.

use std::sync::Arc;

use crate::agent::AgentError;

/// Why a sandbox is not there any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// Killed on request.
    Killed,
    /// Reached the end of its life.
    TimedOut,
    /// It is in the store, and can be resumed.
    Paused,
    /// The machine stopped by itself.
    Crashed {
        /// What happened, for people.
        reason: Arc<str>,
        /// Last lines of the guest's console.
        console: Arc<str>,
    },
}

/// An operation on sandboxes failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// The user does not exist in the guest.
    #[error("{0}")]
    Authentication(String),
    /// A process does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A file does not exist.
    #[error("{0}")]
    FileNotFound(String),
    /// No sandbox has this id (any more).
    #[error("{0}")]
    SandboxNotFound(String),
    /// A command ran longer than it was allowed to, or a connected stream was open longer.
    #[error("{0}")]
    Timeout(String),
    /// A request took longer than `requestTimeoutMs`.
    #[error("The request took longer than {0} ms: pass a larger 'requestTimeoutMs', or 0 for no limit")]
    RequestTimeout(u32),
    /// The sandbox was killed or reached the end of its life.
    #[error(
        "The sandbox was killed or reached its end of life ({0}). Its life can be set with 'timeoutMs' and 'setTimeout'"
    )]
    SandboxKilled(&'static str),
    /// The sandbox is not running, but can be resumed.
    #[error(
        "The sandbox is paused: resume it with 'connect', or create it with 'lifecycle: {{ onTimeout: \"pause\", autoResume: true }}'"
    )]
    SandboxPaused,
    /// The machine stopped by itself.
    #[error("The sandbox has crashed: {reason}{}", last_lines(console))]
    SandboxCrashed {
        /// What happened.
        reason: Arc<str>,
        /// Last lines of the guest's console.
        console: Arc<str>,
    },
    /// The guest's disk is full.
    #[error("{0}")]
    NotEnoughSpace(String),
    /// The base template has not been built, or cannot be read.
    #[error("{0}")]
    TemplateMissing(String),
    /// No template or snapshot has this id or name.
    #[error("404: template '{0}' not found")]
    UnknownTemplate(String),
    /// The operation cannot be done in the state the sandbox is in.
    #[error("409: {0}")]
    Conflict(String),
    /// The snapshot is in use.
    #[error("400: cannot delete template '{id}': {users}")]
    SnapshotInUse {
        /// The snapshot.
        id: String,
        /// Who uses it.
        users: String,
    },
    /// A snapshot's files are damaged.
    #[error("{0}")]
    SnapshotCorrupt(String),
    /// A snapshot was written by a newer release, or for another platform.
    #[error("{0}")]
    SnapshotVersion(String),
    /// The store cannot be read or written.
    #[error("{0}")]
    Store(String),
    /// The disk of the store is full.
    #[error("{0}")]
    StoreFull(String),
    /// The guest's agent failed in a way that has no class of its own.
    #[error("{0}")]
    Agent(String),
    /// The machine could not be started, or failed.
    #[error("{0}")]
    Machine(String),
    /// The caller gave the request up.
    #[error("The request was cancelled")]
    Cancelled,
    /// A fault in Amberbox.
    #[error("Internal error: {0}. Please report it")]
    Internal(String),
}

/// The console's end as part of a message.
fn last_lines(console: &str) -> String {
    const LINES: usize = 20;
    let lines: Vec<&str> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return String::new();
    }
    format!(". Last lines of its console:\n{}", lines[lines.len().saturating_sub(LINES)..].join("\n"))
}

impl Error {
    /// Every code, for the test that compares them with the JavaScript table.
    pub const CODES: [&'static str; 24] = [
        "ERR_INVALID_ARGUMENT",
        "ERR_AUTHENTICATION",
        "ERR_NOT_FOUND",
        "ERR_FILE_NOT_FOUND",
        "ERR_SANDBOX_NOT_FOUND",
        "ERR_TIMEOUT",
        "ERR_REQUEST_TIMEOUT",
        "ERR_SANDBOX_KILLED",
        "ERR_SANDBOX_PAUSED",
        "ERR_SANDBOX_CRASHED",
        "ERR_NOT_ENOUGH_SPACE",
        "ERR_TEMPLATE_MISSING",
        "ERR_UNKNOWN_TEMPLATE",
        "ERR_CONFLICT",
        "ERR_SNAPSHOT_IN_USE",
        "ERR_SNAPSHOT_CORRUPT",
        "ERR_SNAPSHOT_VERSION",
        "ERR_STORE",
        "ERR_STORE_FULL",
        "ERR_AGENT",
        "ERR_MACHINE",
        "ERR_CANCELLED",
        "ERR_INTERNAL",
        "ERR_RATE_LIMIT",
    ];

    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidArgument(_) => "ERR_INVALID_ARGUMENT",
            Self::Authentication(_) => "ERR_AUTHENTICATION",
            Self::NotFound(_) => "ERR_NOT_FOUND",
            Self::FileNotFound(_) => "ERR_FILE_NOT_FOUND",
            Self::SandboxNotFound(_) => "ERR_SANDBOX_NOT_FOUND",
            Self::Timeout(_) => "ERR_TIMEOUT",
            Self::RequestTimeout(_) => "ERR_REQUEST_TIMEOUT",
            Self::SandboxKilled(_) => "ERR_SANDBOX_KILLED",
            Self::SandboxPaused => "ERR_SANDBOX_PAUSED",
            Self::SandboxCrashed { .. } => "ERR_SANDBOX_CRASHED",
            Self::NotEnoughSpace(_) => "ERR_NOT_ENOUGH_SPACE",
            Self::TemplateMissing(_) => "ERR_TEMPLATE_MISSING",
            Self::UnknownTemplate(_) => "ERR_UNKNOWN_TEMPLATE",
            Self::Conflict(_) => "ERR_CONFLICT",
            Self::SnapshotInUse { .. } => "ERR_SNAPSHOT_IN_USE",
            Self::SnapshotCorrupt(_) => "ERR_SNAPSHOT_CORRUPT",
            Self::SnapshotVersion(_) => "ERR_SNAPSHOT_VERSION",
            Self::Store(_) => "ERR_STORE",
            Self::StoreFull(_) => "ERR_STORE_FULL",
            Self::Agent(_) => "ERR_AGENT",
            Self::Machine(_) => "ERR_MACHINE",
            Self::Cancelled => "ERR_CANCELLED",
            Self::Internal(_) => "ERR_INTERNAL",
        }
    }

    /// The error as it travels to JavaScript: `ERR_X: text`, then U+001E and details in JSON if there are any.
    pub fn to_wire(&self) -> String {
        let text = self.to_string().replace('\u{1e}', " ");
        match self {
            Self::SandboxCrashed { console, .. } => {
                format!("{}: {text}\u{1e}{}", self.code(), serde_json::json!({ "console": &**console }))
            }
            _ => format!("{}: {text}", self.code()),
        }
    }

    /// A thread or task of Amberbox that panicked.
    pub(crate) fn panicked(error: tokio::task::JoinError) -> Self {
        if error.is_cancelled() {
            return Self::Cancelled;
        }
        let payload = error.into_panic();
        let text = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "unknown panic".to_owned());
        Self::Internal(text)
    }

    /// No sandbox has this id.
    pub(super) fn no_sandbox(id: &str) -> Self {
        Self::SandboxNotFound(format!("Sandbox '{id}' not found: it does not exist, or has ended"))
    }

    /// An agent's error about a file: there "not found" has a class of its own.
    pub(super) fn of_file(error: AgentError) -> Self {
        match error {
            AgentError::NotFound(message) => Self::FileNotFound(message),
            other => other.into(),
        }
    }
}

impl From<&Ended> for Error {
    fn from(ended: &Ended) -> Self {
        match ended {
            Ended::Killed => Self::SandboxKilled("it was killed"),
            Ended::Paused => Self::SandboxPaused,
            Ended::TimedOut => Self::SandboxKilled("its timeout has passed"),
            Ended::Crashed { reason, console } => {
                Self::SandboxCrashed { reason: Arc::clone(reason), console: Arc::clone(console) }
            }
        }
    }
}

impl From<AgentError> for Error {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::InvalidArgument(message) => Self::InvalidArgument(message),
            AgentError::Unauthenticated(message) => Self::Authentication(message),
            AgentError::NotFound(message) => Self::NotFound(message),
            AgentError::NotEnoughSpace(message) => Self::NotEnoughSpace(message),
            AgentError::FailedPrecondition(message) => Self::InvalidArgument(message),
            other => Self::Agent(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crash_carries_the_console() {
        let error = Error::from(&Ended::Crashed {
            reason: "kernel panic".into(),
            console: "one\n\nKernel panic - not syncing\n".into(),
        });
        let wire = error.to_wire();
        let (text, details) = wire.split_once('\u{1e}').unwrap();
        assert!(text.starts_with("ERR_SANDBOX_CRASHED: The sandbox has crashed: kernel panic"), "{text}");
        assert!(text.ends_with("one\nKernel panic - not syncing"), "{text}");
        assert!(details.starts_with("{\"console\":\"one"), "{details}");
    }

    #[test]
    fn separators_in_guest_text_do_not_reach_the_details() {
        let wire = Error::NotFound("a\u{1e}{\"code\":1}".into()).to_wire();
        assert!(!wire.contains('\u{1e}'));
    }
}
