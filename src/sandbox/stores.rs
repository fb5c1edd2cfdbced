//! The stores that this process has open, by directory, and what their failures mean to a user.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use amber_layers::{FormatError, Image, ImageError, Snapshot, SnapshotId, Store, StoreError};

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
    store.set_quota(quota(std::env::var(QUOTA).ok().as_deref())?);
    stores.insert(home.to_owned(), Arc::clone(&store));
    Ok(store)
}

/// The store in `home`, unless there is none. Blocks.
pub(super) fn existing(home: &Path) -> Result<Option<Arc<Store>>, Error> {
    if home.is_dir() { open(home).map(Some) } else { Ok(None) }
}

/// Names the variable with the most bytes that layers and manifests may have for this process to add more.
const QUOTA: &str = "AMBERBOX_STORE_QUOTA";

/// A number of bytes, with K, M, G or T behind it for powers of 1024; nothing or 0 is no limit.
fn quota(text: Option<&str>) -> Result<Option<u64>, Error> {
    let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(None) };
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => {
            let shift = match unit.to_ascii_uppercase() {
                'K' => Some(10),
                'M' => Some(20),
                'G' => Some(30),
                'T' => Some(40),
                _ => None,
            };
            (&text[..at], shift)
        }
        _ => (text, Some(0)),
    };
    let bytes = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    match bytes {
        Some(bytes) => Ok((bytes > 0).then_some(bytes)),
        None => Err(Error::InvalidArgument(format!(
            "Invalid {QUOTA} '{text}': use a number of bytes, or one with K, M, G or T behind it, such as 20G"
        ))),
    }
}

/// How long the decoded pages of a snapshot are kept after a sandbox was created from it, so that the next one finds them. They
/// do not keep the snapshot from being deleted.
const WARM: Duration = Duration::from_secs(10);
/// At most this many are kept open.
const WARM_SNAPSHOTS: usize = 4;

/// The images of one snapshot.
struct Warm {
    id: SnapshotId,
    used: Instant,
    memory: Arc<Image>,
    _disk: Arc<Image>,
}

/// What is kept, the latest at the end.
type WarmList = Vec<Warm>;

static WARM_LIST: LazyLock<Mutex<WarmList>> = LazyLock::new(Mutex::default);

fn with_warm<T>(body: impl FnOnce(&mut WarmList) -> T) -> T {
    body(&mut WARM_LIST.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Keeps the images of a snapshot for a while. Must run on a tokio runtime.
pub(super) fn keep_warm(snapshot: &Snapshot) {
    with_warm(|list| {
        let (memory, disk) = (Arc::clone(snapshot.memory()), Arc::clone(snapshot.disk()));
        list.retain(|warm| !Arc::ptr_eq(&warm.memory, &memory));
        list.push(Warm { id: snapshot.meta().id.clone(), used: Instant::now(), memory, _disk: disk });
        let excess = list.len().saturating_sub(WARM_SNAPSHOTS);
        list.drain(..excess);
    });
    tokio::spawn(async {
        tokio::time::sleep(WARM).await;
        with_warm(|list| list.retain(|warm| warm.used.elapsed() < WARM));
    });
}

/// Lets go of what is only kept by [`keep_warm`], because it is to be deleted: its bytes come back at once.
pub(super) fn cool(id: &SnapshotId) {
    with_warm(|list| list.retain(|warm| warm.id != *id));
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
            StoreError::DiskFull { .. } | StoreError::Quota { .. } => Self::StoreFull(with_causes(&error)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_read() {
        let fine = |text| quota(Some(text)).unwrap();
        assert_eq!(quota(None).unwrap(), None);
        assert_eq!((fine(""), fine("0"), fine(" 5 ")), (None, None, Some(5)));
        assert_eq!((fine("2k"), fine("20G"), fine("1T")), (Some(2048), Some(20 << 30), Some(1 << 40)));
        for bad in ["G", "-1", "1.5G", "5X", "99999999999999999999", "999999999999T", "ä"] {
            assert!(quota(Some(bad)).is_err(), "{bad}");
        }
    }
}
