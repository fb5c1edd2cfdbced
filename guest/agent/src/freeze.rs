//! Holds the guest's processes still around a snapshot, so that a copy knows that it is one before anything else in it runs.
//!
//! Every process is born in one control group, which the kernel can freeze as a whole. While it is frozen no process is started: a child that is
//! frozen before its exec would hold the agent, which waits for it. In tests there is no control group, and freezing only holds new
//! processes back.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use amber_proto::{Done, ErrorCode};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::conn::{Failure, Result, failure};
use crate::init;
use crate::state::State;

/// The control group of all processes that the host starts.
const GROUP: &str = "/sys/fs/cgroup/user";

/// How long processes may take to stand still; one in the middle of a disk access takes until its end.
const STANDSTILL: Duration = Duration::from_secs(2);

/// After so long the host is not expected to thaw any more.
const GIVEN_UP: Duration = Duration::from_secs(30);

/// The control group, and whether it is frozen.
#[derive(Debug)]
pub(crate) struct Freezer {
    group: Option<OwnedFd>,
    /// Number of the current freeze; `None` when processes run.
    frozen: watch::Sender<Option<u64>>,
    count: std::cell::Cell<u64>,
}

impl Freezer {
    /// Makes the control group. Without one, as in tests or on a kernel that has none, processes cannot be stopped.
    pub(crate) fn new(system: bool) -> Self {
        let make = || -> io::Result<OwnedFd> {
            if !Path::new(GROUP).is_dir() {
                fs::create_dir(GROUP)?;
            }
            Ok(File::open(GROUP)?.into())
        };
        let group = system
            .then(make)
            .and_then(|made| made.inspect_err(|error| init::say(&format!("{GROUP}: {error}"))).ok());
        Self { group, frozen: watch::Sender::new(None), count: Default::default() }
    }

    /// Where processes are to be born.
    pub(crate) fn group(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(AsFd::as_fd)
    }

    /// Waits until processes may be started.
    pub(crate) async fn thawed(&self) {
        // The sender lives as long as the freezer.
        let _ = self.frozen.subscribe().wait_for(Option::is_none).await;
    }

    fn set(&self, frozen: bool) -> io::Result<()> {
        match self.group {
            Some(_) => fs::write(format!("{GROUP}/cgroup.freeze"), if frozen { "1" } else { "0" }),
            None => Ok(()),
        }
    }

    /// Waits until every process of the group stands still.
    async fn standstill(&self) -> io::Result<()> {
        if self.group.is_none() {
            return Ok(());
        }
        let events = File::open(format!("{GROUP}/cgroup.events"))?;
        // SAFETY: a File refers to the same open file for as long as the AsyncFd owns it.
        let mut events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY)? };
        loop {
            let mut text = String::new();
            let file = events.get_mut();
            file.rewind()?;
            file.read_to_string(&mut text)?;
            if text.lines().any(|line| line == "frozen 1") {
                return Ok(());
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

/// Stops all processes; returns when they stand still.
pub(crate) async fn freeze(state: &Rc<State>) -> Result<Done> {
    let freezer = &state.freezer;
    let number = freezer.count.get() + 1;
    freezer.count.set(number);
    freezer.frozen.send_replace(Some(number));
    let frozen = match freezer.set(true) {
        Ok(()) => tokio::time::timeout(STANDSTILL, freezer.standstill())
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        error => error,
    };
    if let Err(error) = frozen {
        thaw(state)?;
        return Err(failure(ErrorCode::Internal, format!("Processes could not be stopped: {error}")));
    }
    let state = state.clone();
    tokio::task::spawn_local(async move {
        let mut frozen = state.freezer.frozen.subscribe();
        let over = frozen.wait_for(|current| *current != Some(number));
        if tokio::time::timeout(GIVEN_UP, over).await.is_err()
            && let Err(Failure::Remote(error)) = thaw(&state)
        {
            init::say(&error.message);
        }
    });
    Ok(Done {})
}

/// Lets the processes go on.
pub(crate) fn thaw(state: &State) -> Result<Done> {
    let freezer = &state.freezer;
    if freezer.frozen.borrow().is_some() {
        freezer.set(false).map_err(|error| {
            failure(ErrorCode::Internal, format!("Processes could not be thawed: {error}"))
        })?;
        freezer.frozen.send_replace(None);
    }
    Ok(Done {})
}
