//! The stores that this process has open, by directory, and what their failures mean to a user.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use amber_layers::{FormatError, ImageError, Snapshot, SnapshotId, Store, StoreError};

use super::Error;

/// Where a process keeps and finds things.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Directory of the store.
    pub home: PathBuf,
    /// Directories in which the base template may lie, best first.
    pub guest: Vec<PathBuf>,
}

static STORES: LazyLock<Mutex<HashMap<PathBuf, Arc<Store>>>> = LazyLock::new(Mutex::default);

/// The store in `home`, created if it is not there. Blocks.
pub(super) fn open(home: &Path) -> Result<Arc<Store>, Error> {
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    // A directory that was removed behind our back is opened anew, as another process would.
    if let Some(store) = stores.get(home)
        && home.is_dir()
    {
        return Ok(Arc::clone(store));
    }
    let store = Arc::new(Store::open(home)?);
    stores.insert(home.to_owned(), Arc::clone(&store));
    Ok(store)
}

/// How long a snapshot stays open after a sandbox was created from it, so that the next one finds its pages decoded.
/// Short, because meanwhile no other process can delete it.
const WARM: Duration = Duration::from_secs(10);
/// At most this many are kept open.
const WARM_SNAPSHOTS: usize = 4;

/// Snapshots that are kept open, with the time of their last use, the latest at the end.
type WarmList = Vec<(Instant, Arc<Snapshot>)>;

static WARM_LIST: LazyLock<Mutex<WarmList>> = LazyLock::new(Mutex::default);

fn with_warm<T>(body: impl FnOnce(&mut WarmList) -> T) -> T {
    body(&mut WARM_LIST.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Keeps a snapshot open for a while. Must run on a tokio runtime.
pub(super) fn keep_warm(snapshot: Arc<Snapshot>) {
    with_warm(|list| {
        list.retain(|(_, other)| !Arc::ptr_eq(other, &snapshot));
        list.push((Instant::now(), snapshot));
        let excess = list.len().saturating_sub(WARM_SNAPSHOTS);
        list.drain(..excess);
    });
    tokio::spawn(async {
        tokio::time::sleep(WARM).await;
        with_warm(|list| list.retain(|(used, _)| used.elapsed() < WARM));
    });
}

/// Closes what is only kept open by [`keep_warm`], because it is to be deleted.
pub(super) fn cool(id: &SnapshotId) {
    with_warm(|list| list.retain(|(_, snapshot)| snapshot.meta().id != *id));
}

/// The message with its causes, which the layers keep apart.
pub(super) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

fn of_format(error: &FormatError) -> Error {
    match error {
        FormatError::NewerVersion { .. } | FormatError::UnknownSection { .. } => {
            Error::SnapshotVersion(with_causes(error))
        }
        _ => Error::SnapshotCorrupt(with_causes(error)),
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Format(format) | StoreError::Image(ImageError::Format(format)) => of_format(format),
            StoreError::MissingLayer { .. } => Self::SnapshotCorrupt(with_causes(&error)),
            StoreError::NotFound { name } => Self::UnknownTemplate(name.clone()),
            StoreError::DiskFull { .. } => Self::StoreFull(with_causes(&error)),
            StoreError::InvalidName { .. } | StoreError::NameConflict { .. } => {
                Self::InvalidArgument(with_causes(&error))
            }
            StoreError::InUse { id, .. } => {
                Self::SnapshotInUse { id: id.to_string(), users: with_causes(&error) }
            }
            _ => Self::Store(with_causes(&error)),
        }
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        match &error {
            ImageError::Format(format) => of_format(format),
            _ => Self::Store(with_causes(&error)),
        }
    }
}
