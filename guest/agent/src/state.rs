//! What the agent knows: its settings, which an identity replaces as a whole, and the processes it has started.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amber_proto::{ErrorCode, Target};

use crate::conn::{Result, failure};
use crate::freeze::Freezer;
use crate::process::{Finished, Process};
use crate::spawn::Stack;

/// How long the exit of a process can be asked for after its end.
const EXIT_KEPT: Duration = Duration::from_secs(30);

/// Exits that are kept at most.
const EXITS_KEPT: usize = 4096;

/// Settings that operations read; shared with the blocking threads.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Where `passwd`, `group` and the identity files are.
    pub(crate) etc: PathBuf,
    /// Whether the machine is ours to change: clock, host name, random pool, power.
    pub(crate) system: bool,
    /// Id of the sandbox.
    pub(crate) sandbox_id: Option<String>,
    /// User of operations that name none.
    pub(crate) default_user: String,
    /// Directory of operations that name none; the user's home if absent.
    pub(crate) default_workdir: Option<String>,
    /// Environment of the sandbox.
    pub(crate) envs: BTreeMap<String, String>,
}

/// The agent's state, owned by the event loop.
pub(crate) struct State {
    settings: RefCell<Arc<Settings>>,
    processes: RefCell<BTreeMap<u64, Rc<Process>>>,
    by_pid: RefCell<HashMap<u32, u64>>,
    finished: RefCell<Vec<(Instant, Finished)>>,
    next: Cell<u64>,
    /// Holds processes back around snapshots.
    pub(crate) freezer: Freezer,
    /// `/dev/null`, the standard input of most processes.
    pub(crate) null: OwnedFd,
    /// Stack for the moments between clone and exec.
    pub(crate) stack: RefCell<Stack>,
    /// Read buffer of all pumps; borrowed only while no one awaits.
    pub(crate) scratch: RefCell<Box<[u8]>>,
}

impl State {
    pub(crate) fn new(settings: Settings, null: OwnedFd, freezer: Freezer) -> Rc<Self> {
        Rc::new(Self {
            settings: RefCell::new(Arc::new(settings)),
            processes: RefCell::default(),
            by_pid: RefCell::default(),
            finished: RefCell::default(),
            next: Cell::new(0),
            freezer,
            null,
            stack: RefCell::new(Stack::new()),
            scratch: RefCell::new(vec![0; crate::pump::BUFFER].into_boxed_slice()),
        })
    }

    /// The current settings.
    pub(crate) fn settings(&self) -> Arc<Settings> {
        self.settings.borrow().clone()
    }

    /// Replaces the settings.
    pub(crate) fn set_settings(&self, settings: Settings) {
        *self.settings.borrow_mut() = Arc::new(settings);
    }

    /// Adds a process that has just been started. An exit kept for an earlier one of the same id is forgotten.
    pub(crate) fn add(&self, process: Rc<Process>) {
        let key = self.next.get();
        self.next.set(key + 1);
        self.finished.borrow_mut().retain(|(_, finished)| finished.pid != process.pid);
        self.by_pid.borrow_mut().insert(process.pid, key);
        self.processes.borrow_mut().insert(key, process);
    }

    /// Takes a process out that has been reaped.
    pub(crate) fn remove(&self, pid: u32) -> Option<Rc<Process>> {
        let key = self.by_pid.borrow_mut().remove(&pid)?;
        self.processes.borrow_mut().remove(&key)
    }

    /// The running processes, oldest first.
    pub(crate) fn running(&self) -> Vec<Rc<Process>> {
        self.processes.borrow().values().cloned().collect()
    }

    /// Keeps the exit of a process for those who ask a little later. Old ones are dropped here rather than by a timer.
    pub(crate) fn keep(&self, exit: Finished) {
        let mut finished = self.finished.borrow_mut();
        finished.retain(|(since, _)| since.elapsed() < EXIT_KEPT);
        if finished.len() >= EXITS_KEPT {
            finished.remove(0);
        }
        finished.push((Instant::now(), exit));
    }

    /// The exit of a process that ended a short while ago.
    pub(crate) fn kept(&self, target: &Target) -> Option<Finished> {
        let finished = self.finished.borrow();
        let wanted = |exit: &Finished| match (target.pid, &target.tag) {
            (Some(pid), _) => exit.pid == pid,
            (None, tag) => tag.is_some() && *tag == exit.tag,
        };
        let (since, exit) = finished.iter().rev().find(|(_, exit)| wanted(exit))?;
        (since.elapsed() < EXIT_KEPT).then(|| exit.clone())
    }

    /// The running process that is meant.
    pub(crate) fn find(&self, target: &Target) -> Result<Rc<Process>> {
        let processes = self.processes.borrow();
        let found = match (target.pid, &target.tag) {
            (Some(pid), _) => self.by_pid.borrow().get(&pid).and_then(|key| processes.get(key)),
            (None, Some(tag)) => {
                processes.values().rev().find(|process| process.info.tag.as_ref() == Some(tag))
            }
            (None, None) => return Err(failure(ErrorCode::InvalidArgument, "Process id or tag is required")),
        };
        found.cloned().ok_or_else(|| {
            let message = match (target.pid, &target.tag) {
                (Some(pid), _) => format!("process with pid {pid} not found"),
                (None, tag) => format!("process with tag {} not found", tag.as_deref().unwrap_or_default()),
            };
            failure(ErrorCode::NotFound, message)
        })
    }
}
