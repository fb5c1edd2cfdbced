//! Publication: from files in a work area to a snapshot that everybody sees, in one atomic step (SNAPSHOT.md, section 5.2).
//!
//! Order: layers are durable and in place, then the manifest is durable, then one rename makes it visible. New layers
//! are held by a shared lock until then, so that a collector leaves them alone although nobody names them yet.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::StoreError;
use crate::files::{LOCK_NAME, WorkArea, copy, create_dir, create_file, rename, sync_dir, write_file};
use crate::ids::{LayerId, SnapshotId};
use crate::layer::Layer;
use crate::lock::FileLock;
use crate::manifest::{self, Prefetch, Section, SectionId};
use crate::meta::{ListFilter, SnapshotMeta};
use crate::store::{Store, is_gone, manifest_name};

const NEW_SNAPSHOT: &str = "snapshot";

/// A layer file that was written to the work area.
#[derive(Debug)]
pub(crate) struct NewLayer {
    pub(crate) id: LayerId,
    /// Its lock, held until the manifest names it.
    pub(crate) _guard: FileLock,
    pub(crate) len: u64,
    pub(crate) path: PathBuf,
}

/// Everything that a publication needs.
pub(crate) struct Publication {
    pub(crate) area: WorkArea,
    pub(crate) own: Option<NewLayer>,
    pub(crate) inherited: Vec<Arc<Layer>>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) names: Vec<String>,
    /// The id to use when no name decides.
    pub(crate) wanted_id: Option<SnapshotId>,
    pub(crate) tag: String,
}

impl Store {
    pub(crate) fn publish(&self, p: Publication) -> Result<SnapshotId, StoreError> {
        let mut guards = Vec::new();
        let result = self.place_layers(&p, &mut guards).and_then(|()| self.place_manifest(&p));
        drop(guards);
        match result {
            Ok((id, replaced)) => {
                if replaced {
                    // The snapshot is published; what cannot be collected now stays for the next collection.
                    let _ = self.collect();
                }
                Ok(id)
            }
            Err(e) => {
                // Its lock would keep the layer.
                drop(p.own);
                let _ = self.collect();
                Err(e)
            }
        }
    }

    /// Puts all layers into the store and locks them.
    fn place_layers(&self, p: &Publication, guards: &mut Vec<FileLock>) -> Result<(), StoreError> {
        let _store = self.lock_shared()?;
        let mut placed = false;
        if let Some(own) = &p.own {
            guards.extend(self.place_own(own)?);
            placed = true;
        }
        for layer in &p.inherited {
            let (guard, new) = self.place_inherited(layer, &p.area)?;
            guards.push(guard);
            placed |= new;
        }
        if placed { sync_dir(&self.layers_dir()) } else { Ok(()) }
    }

    /// Returns the lock of the file that is used instead, if there is one.
    fn place_own(&self, own: &NewLayer) -> Result<Option<FileLock>, StoreError> {
        let target = self.layer_path(own.id);
        match link(&own.path, &target) {
            Ok(()) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // The same content was stored before. Use that file, unless it was damaged.
                let existing = lock_file(&target)?;
                let intact = Layer::open(&target, own.id).is_ok_and(|layer| layer.verify().is_ok());
                if intact {
                    return Ok(Some(existing));
                }
                rename(&own.path, &target)?;
                Ok(None)
            }
            Err(e) => Err(StoreError::write("write", &target, e)),
        }
    }

    /// Layers of parents are here already, unless the parent belongs to another store.
    fn place_inherited(&self, layer: &Layer, area: &WorkArea) -> Result<(FileLock, bool), StoreError> {
        let target = self.layer_path(layer.id());
        match lock_file(&target) {
            Ok(guard) => return Ok((guard, false)),
            Err(StoreError::Io { source, .. }) if is_gone(&source) => {}
            Err(e) => return Err(e),
        }
        if layer.path() == target || fs::hard_link(layer.path(), &target).is_err() {
            let temporary = area.path(&layer.id().to_string());
            copy(layer.file(), &temporary)?;
            match link(&temporary, &target) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(StoreError::write("write", &target, e));
                }
                _ => {}
            }
        }
        // What was linked by name is checked against that name.
        let opened = Layer::open(&target, layer.id());
        if let Err(e) = opened {
            let _ = fs::remove_file(&target);
            return Err(e);
        }
        Ok((lock_file(&target)?, true))
    }

    /// Makes the manifest visible; says whether it replaced another one.
    fn place_manifest(&self, p: &Publication) -> Result<(SnapshotId, bool), StoreError> {
        let prepared = p.area.path(NEW_SNAPSHOT);
        create_dir(&prepared)?;
        let manifest = prepared.join(manifest_name(&p.tag));
        write_file(&manifest, &p.manifest)?;
        drop(create_file(&prepared.join(LOCK_NAME))?);
        sync_dir(&prepared)?;
        let _store = self.lock_exclusive()?;
        let id = self.choose_id(p)?;
        let dir = self.snapshot_dir(&id);
        let target = self.manifest_path(&id, &p.tag);
        let replaced = target.exists();
        if dir.is_dir() {
            rename(&manifest, &target)?;
            sync_dir(&dir)?;
        } else {
            rename(&prepared, &dir)?;
            sync_dir(&self.snapshots_dir())?;
        }
        Ok((id, replaced))
    }

    /// Stores which pages copies of a snapshot need first. `false` when the snapshot was published again or deleted
    /// meanwhile, so that the list does not belong to it any more.
    pub fn record_prefetch(&self, meta: &SnapshotMeta, prefetch: &Prefetch) -> Result<bool, StoreError> {
        let Some(manifest) = self.manifest(&meta.id, &meta.tag)? else { return Ok(false) };
        if manifest.build() != meta.build {
            return Ok(false);
        }
        let mut sections = manifest.all()?;
        sections.retain(|s| s.id != SectionId::PREFETCH);
        sections.push(Section {
            id: SectionId::PREFETCH,
            version: 1,
            required: false,
            bytes: prefetch.encode(),
        });
        let area = self.work_area()?;
        let temporary = area.path(&manifest_name(&meta.tag));
        write_file(&temporary, &manifest::encode(meta.build, &sections)?)?;
        let _store = self.lock_exclusive()?;
        if self.manifest(&meta.id, &meta.tag)?.is_none_or(|now| now.build() != meta.build) {
            return Ok(false);
        }
        rename(&temporary, &self.manifest_path(&meta.id, &meta.tag))?;
        sync_dir(&self.snapshot_dir(&meta.id))?;
        Ok(true)
    }

    /// The id that one of the names has, or a new one. The store lock is held exclusively, so two writers
    /// cannot give one name to two ids.
    fn choose_id(&self, p: &Publication) -> Result<SnapshotId, StoreError> {
        let mut chosen: Option<(SnapshotId, &String)> = None;
        for name in &p.names {
            let Some(found) = self.id_of_name(name)? else { continue };
            match &chosen {
                Some((id, first)) if *id != found => {
                    return Err(StoreError::NameConflict { first: (*first).clone(), second: name.clone() });
                }
                _ => chosen = Some((found, name)),
            }
        }
        if let Some((id, _)) = chosen {
            return Ok(id);
        }
        if let Some(id) = &p.wanted_id {
            return Ok(id.clone());
        }
        loop {
            let id = SnapshotId::generate().map_err(|e| StoreError::write("name", self.dir(), e))?;
            if !self.snapshot_dir(&id).exists() {
                return Ok(id);
            }
        }
    }

    fn id_of_name(&self, name: &str) -> Result<Option<SnapshotId>, StoreError> {
        let all = self.list(&ListFilter::default())?;
        Ok(all.into_iter().find(|meta| meta.names.iter().any(|n| n == name)).map(|meta| meta.id))
    }
}

/// Gives a file a second name, or moves it where the file system has no hard links.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(e) if matches!(e.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) => {
            if to.exists() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        result => result,
    }
}

fn lock_file(path: &Path) -> Result<FileLock, StoreError> {
    File::open(path).and_then(FileLock::shared_on).map_err(|e| StoreError::read(path, e))
}
