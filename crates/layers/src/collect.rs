//! Deleting snapshots and collecting what nobody needs any more (SNAPSHOT.md, section 5.3).
//!
//! A layer is removed when no manifest names it and nobody is about to publish one that does; who has it open keeps its
//! content until they close it. Manifests are the only truth: there is no
//! reference count on disk that a crash could leave wrong. If one manifest cannot be read, no layer is removed.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::claim::{CLAIMED, claimed_manifests};
use crate::error::StoreError;
use crate::files::{LOCK_NAME, dead_work_areas, sync_dir};
use crate::ids::{LayerId, SnapshotId, random_text};
use crate::lock::{FileLock, holders};
use crate::manifest::Manifest;
use crate::store::{Store, is_gone, names_in, read_meta};

const LAYER_SUFFIX: &str = ".layer";

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers removed.
    pub layers: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Layers that no snapshot names yet, kept because they are being published.
    pub in_use: u64,
    /// Manifests that could not be read. While there are any, no layer is removed.
    pub unreadable: u64,
}

/// One damaged file.
#[derive(Debug)]
pub struct Problem {
    /// The snapshots (with tag) that are affected; empty for a layer that none names.
    pub snapshots: Vec<(SnapshotId, String)>,
    /// What is wrong.
    pub error: StoreError,
}

/// The result of [`Store::verify`].
#[derive(Debug, Default)]
pub struct Verified {
    /// Manifests checked.
    pub snapshots: u64,
    /// Layers checked.
    pub layers: u64,
    /// Frames checked.
    pub frames: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// Disk usage of one snapshot, and of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Per snapshot and tag: bytes of its manifest and of the layers that only it needs. Deleting it frees these.
    pub snapshots: Vec<(SnapshotId, String, u64)>,
    /// Bytes of all layers.
    pub layer_bytes: u64,
    /// Bytes of all manifests.
    pub manifest_bytes: u64,
    /// Bytes of layers that no snapshot names: what [`Store::gc`] may free.
    pub unreferenced_bytes: u64,
}

impl Store {
    /// Deletes a snapshot with all its tags, and the layers that nobody else needs. `false` when there is none;
    /// [`StoreError::InUse`] while somebody, in any process, has it open.
    pub fn delete(&self, id: &SnapshotId) -> Result<bool, StoreError> {
        self.remove(id, false)
    }

    /// Deletes a snapshot as [`Store::delete`] does, even if somebody has it open: they run on, and the bytes come back
    /// when the last of them has ended.
    pub fn delete_forced(&self, id: &SnapshotId) -> Result<bool, StoreError> {
        self.remove(id, true)
    }

    fn remove(&self, id: &SnapshotId, force: bool) -> Result<bool, StoreError> {
        let _store = self.lock_exclusive()?;
        let dir = self.snapshot_dir(id);
        let lock = match FileLock::try_exclusive(&dir.join(LOCK_NAME)) {
            Err(e) if is_gone(&e) => return Ok(false),
            Err(e) => return Err(StoreError::write("lock", &dir, e)),
            Ok(Ok(lock)) => Some(lock),
            Ok(Err(_)) if force => None,
            Ok(Err(file)) => return Err(StoreError::InUse { id: id.clone(), holders: holders(&file) }),
        };
        let name = random_text().map_err(|e| StoreError::write("delete", &dir, e))?;
        let doomed = self.tmp_dir().join(name);
        fs::rename(&dir, &doomed).map_err(|e| StoreError::write("delete", &dir, e))?;
        sync_dir(&self.snapshots_dir())?;
        // It is deleted. If this process dies from here on, the directory in tmp, whose lock dies too, tells the next
        // opener to collect the layers.
        let _ = self.collect_locked();
        let _ = fs::remove_dir_all(&doomed);
        drop(lock);
        Ok(true)
    }

    /// Removes layers that no snapshot names, and the leftovers of dead processes.
    pub fn gc(&self) -> Result<Collected, StoreError> {
        self.writable()?;
        let dead = dead_work_areas(&self.tmp_dir())?;
        forget_claims(&dead);
        let collected = self.collect()?;
        remove_all(dead);
        Ok(collected)
    }

    /// Cleans up after processes that died in the middle of something; does nothing when there are none.
    pub(crate) fn recover(&self) -> Result<(), StoreError> {
        let dead = dead_work_areas(&self.tmp_dir())?;
        if !dead.is_empty() {
            forget_claims(&dead);
            self.collect()?;
            remove_all(dead);
        }
        Ok(())
    }

    pub(crate) fn collect(&self) -> Result<Collected, StoreError> {
        let _store = self.lock_exclusive()?;
        self.collect_locked()
    }

    /// The store lock is held exclusively.
    fn collect_locked(&self) -> Result<Collected, StoreError> {
        let mut collected = Collected::default();
        let mut named = HashSet::new();
        for (id, tag) in self.manifests()? {
            match self.manifest(&id, &tag).and_then(|m| m.map(|m| m.layers()).transpose()) {
                Ok(layers) => named.extend(layers.into_iter().flatten()),
                Err(_) => collected.unreadable += 1,
            }
        }
        // What is claimed may be put back.
        for claimed in claimed_manifests(&self.tmp_dir())? {
            match Manifest::open(&claimed).and_then(|m| m.layers()) {
                Ok(layers) => named.extend(layers),
                Err(StoreError::Io { source, .. }) if is_gone(&source) => {}
                Err(_) => collected.unreadable += 1,
            }
        }
        if collected.unreadable > 0 {
            return Ok(collected);
        }
        for (id, path) in self.layer_files()? {
            if named.contains(&id) {
                continue;
            }
            match remove_layer(&path) {
                Ok(Some(bytes)) => {
                    collected.layers += 1;
                    collected.bytes += bytes;
                }
                Ok(None) => collected.in_use += 1,
                Err(e) if is_gone(&e) => {}
                Err(e) => return Err(StoreError::write("remove", &path, e)),
            }
        }
        Ok(collected)
    }

    pub(crate) fn layer_files(&self) -> Result<Vec<(LayerId, PathBuf)>, StoreError> {
        let dir = self.layers_dir();
        let names = names_in(&dir)?.into_iter();
        let id = |name: &str| name.strip_suffix(LAYER_SUFFIX).and_then(LayerId::parse);
        Ok(names.filter_map(|name| Some((id(&name)?, dir.join(&name)))).collect())
    }

    /// Reads and checks everything: manifests, state, and every frame of every layer.
    pub fn verify(&self) -> Result<Verified, StoreError> {
        let mut out = Verified::default();
        let mut users: HashMap<LayerId, Vec<(SnapshotId, String)>> = HashMap::new();
        // The layers found now are opened before anybody can remove them.
        let mut open = Vec::new();
        {
            let _store = self.lock_shared()?;
            for (id, tag) in self.manifests()? {
                let snapshot = (id, tag);
                match self.verify_manifest(&snapshot.0, &snapshot.1) {
                    Ok(None) => continue,
                    Ok(Some(layers)) => {
                        layers.into_iter().for_each(|l| users.entry(l).or_default().push(snapshot.clone()));
                    }
                    Err(error) => out.problems.push(Problem { snapshots: vec![snapshot], error }),
                }
                out.snapshots += 1;
            }
            let on_disk: HashSet<LayerId> = self.layer_files()?.into_iter().map(|(id, _)| id).collect();
            let missing: Vec<LayerId> = users.keys().filter(|id| !on_disk.contains(id)).copied().collect();
            for layer in missing {
                let error = StoreError::MissingLayer { layer, store: self.dir().to_owned() };
                let snapshots = users.remove(&layer).unwrap_or_default();
                out.problems.push(Problem { snapshots, error });
            }
            for id in on_disk {
                open.push((id, self.open_layer(id)));
            }
        }
        for (id, layer) in open {
            out.layers += 1;
            let result = layer.and_then(|layer| {
                out.frames += u64::from(layer.frame_count());
                Ok(layer.verify()?)
            });
            if let Err(error) = result {
                out.problems.push(Problem { snapshots: users.remove(&id).unwrap_or_default(), error });
            }
        }
        Ok(out)
    }

    /// Checks all of a manifest that can be checked without its layers' content.
    fn verify_manifest(&self, id: &SnapshotId, tag: &str) -> Result<Option<Vec<LayerId>>, StoreError> {
        let Some(manifest) = self.manifest(id, tag)? else { return Ok(None) };
        manifest.check_known()?;
        read_meta(&manifest, id, tag)?;
        manifest.all()?;
        self.check_maps(&manifest)?;
        Ok(Some(manifest.layers()?))
    }

    /// How much disk each snapshot and the whole store use.
    pub fn du(&self) -> Result<Usage, StoreError> {
        let mut usage = Usage::default();
        let mut found = Vec::new();
        let mut users: HashMap<LayerId, u32> = HashMap::new();
        for (id, tag) in self.manifests()? {
            let Ok(Some(manifest)) = self.manifest(&id, &tag) else { continue };
            let layers = manifest.layers().unwrap_or_default();
            layers.iter().for_each(|l| *users.entry(*l).or_default() += 1);
            usage.manifest_bytes += manifest.len();
            found.push((id, tag, manifest.len(), layers));
        }
        let mut sizes = HashMap::new();
        for (id, path) in self.layer_files()? {
            let len = fs::metadata(&path).map_or(0, |m| m.len());
            usage.layer_bytes += len;
            usage.unreferenced_bytes += if users.contains_key(&id) { 0 } else { len };
            sizes.insert(id, len);
        }
        for (id, tag, manifest, layers) in found {
            let only_here = layers.iter().filter(|l| users.get(l) == Some(&1));
            let bytes: u64 = only_here.filter_map(|l| sizes.get(l)).sum();
            usage.snapshots.push((id, tag, bytes + manifest));
        }
        usage.snapshots.sort();
        Ok(usage)
    }
}

/// The last step of a recovery or deletion. Each directory gets a new name first, so that nobody who is just
/// creating it finds itself in a directory that is being emptied.
fn remove_all(dead: Vec<(PathBuf, FileLock)>) {
    for (dir, lock) in dead {
        let Ok(name) = random_text() else { continue };
        let doomed = dir.with_file_name(name);
        if fs::rename(&dir, &doomed).is_ok() {
            let _ = fs::remove_dir_all(&doomed);
        }
        drop(lock);
    }
}

/// What dead processes had claimed is gone with them.
fn forget_claims(dead: &[(PathBuf, FileLock)]) {
    for (dir, _) in dead {
        // What cannot be removed keeps its layers, and is looked at again by the next one.
        let _ = fs::remove_dir_all(dir.join(CLAIMED));
    }
}

/// Removes a layer unless it is being published.
fn remove_layer(path: &Path) -> io::Result<Option<u64>> {
    // Network file systems grant exclusive locks to writers only; others do not ask, and the file may belong to root.
    let file = OpenOptions::new().read(true).write(true).open(path).or_else(|_| File::open(path))?;
    match FileLock::try_exclusive_on(file)? {
        Err(_) => Ok(None),
        Ok(lock) => {
            let len = lock.file().metadata()?.len();
            fs::remove_file(path)?;
            Ok(Some(len))
        }
    }
}
