//! Claims: a snapshot that is taken out of the store to go on as a machine, as a paused sandbox does.
//!
//! Taking it out is one rename, so of several processes one gets it. Its layers stay where they are, and collections count them as
//! named, so that it can be put back. The claim is a work area like any other: if its owner dies, the next one who opens the store
//! removes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::StoreError;
use crate::files::{WorkArea, rename, sync_dir};
use crate::ids::SnapshotId;
use crate::store::{MANIFEST_SUFFIX, Store, is_gone, names_in};

/// The snapshot's directory in the work area.
pub(crate) const CLAIMED: &str = "claimed";

/// A snapshot that is not in the store any more. Dropped, it is deleted; layers that are still open then go with a later collection.
#[derive(Debug)]
pub struct Claim {
    store: Arc<Store>,
    id: SnapshotId,
    area: WorkArea,
}

impl Store {
    /// Takes a snapshot with all its tags out of the store, also while it is open; `None` when there is none (any more).
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn claim(self: &Arc<Self>, id: &SnapshotId) -> Result<Option<Claim>, StoreError> {
        let area = self.work_area()?;
        let store = self.lock_exclusive()?;
        let dir = self.snapshot_dir(id);
        match fs::rename(&dir, area.path(CLAIMED)) {
            Ok(()) => {}
            Err(e) if is_gone(&e) => return Ok(None),
            Err(e) => return Err(StoreError::write("claim", &dir, e)),
        }
        let claim = Claim { store: Arc::clone(self), id: id.clone(), area };
        let synced = sync_dir(&self.snapshots_dir());
        // A claim that is dropped takes the lock itself.
        drop(store);
        synced.map(|()| Some(claim))
    }
}

impl Claim {
    /// Makes it the snapshot again that it was.
    ///
    /// # Errors
    /// The store cannot be written, or there is a new snapshot with this id; then the claimed one is deleted.
    pub fn put_back(self) -> Result<(), StoreError> {
        let store = self.store.lock_exclusive()?;
        let renamed = rename(&self.area.path(CLAIMED), &self.store.snapshot_dir(&self.id));
        let synced = renamed.and_then(|()| sync_dir(&self.store.snapshots_dir()));
        drop(store);
        synced
    }
}

/// The manifests of all claims. The store lock is held exclusively.
pub(crate) fn claimed_manifests(tmp: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut found = Vec::new();
    for area in names_in(tmp)? {
        let dir = tmp.join(area).join(CLAIMED);
        let names = names_in(&dir)?.into_iter().filter(|name| name.ends_with(MANIFEST_SUFFIX));
        found.extend(names.map(|name| dir.join(name)));
    }
    Ok(found)
}

impl Drop for Claim {
    fn drop(&mut self) {
        let claimed = self.area.path(CLAIMED);
        if claimed.exists() {
            let _ = fs::remove_dir_all(&claimed);
            // What cannot be collected now is the next collection's.
            let _ = self.store.collect();
        }
    }
}
