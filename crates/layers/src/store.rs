//! The store: one directory of layers and manifests that several processes share without a daemon (SNAPSHOT.md, section 5).
//!
//! Lock order, always in this sequence: the cache of this process, the store lock, a snapshot's lock, layer locks. The store
//! lock is held for moments only; nobody who holds it exclusively touches the cache.

use std::collections::HashMap;
use std::fs;
use std::hash::Hash;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::{FormatError, Part, StoreError};
use crate::extent::ExtentMap;
use crate::files::{LOCK_NAME, WorkArea, create_dirs, rename, sync_dir, write_file};
use crate::format::{FORMAT_VERSION, MAX_SECTION_LEN};
use crate::ids::{BuildId, DEFAULT_TAG, LayerId, SnapshotId, check_tag};
use crate::image::Image;
use crate::layer::Layer;
use crate::lock::FileLock;
use crate::manifest::{Manifest, Prefetch, Section, SectionId};
use crate::meta::{ListFilter, MetaRecord, Reference, SnapshotMeta};
use crate::writer::SnapshotWriter;

const MARKER: &str = "STORE";
const MARKER_PREFIX: &str = "amberbox store ";
const LAYERS: &str = "layers";
const SNAPSHOTS: &str = "snapshots";
const TMP: &str = "tmp";
const STORE_LOCK: &str = "store.lock";
pub(crate) const MANIFEST_SUFFIX: &str = ".manifest";

/// One store directory. Cheap to keep; share it with `Arc`.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    read_only: bool,
    cache: Mutex<Cache>,
    /// The most bytes that layers and manifests may have; 0 is no limit.
    quota: AtomicU64,
}

#[derive(Debug, Default)]
struct Cache {
    layers: HashMap<LayerId, Weak<Layer>>,
    snapshots: HashMap<(SnapshotId, BuildId), Weak<Snapshot>>,
    /// Images that outlive their snapshot: whoever keeps them spares the next opener their decoding.
    images: HashMap<(SnapshotId, BuildId), (Weak<Image>, Weak<Image>)>,
}

/// An open snapshot. While it exists, in any process, it is deleted only by force, and its content stays even then.
#[derive(Debug)]
pub struct Snapshot {
    meta: SnapshotMeta,
    memory: Arc<Image>,
    disk: Arc<Image>,
    sections: Vec<Section>,
    prefetch: Prefetch,
    _lock: Option<FileLock>,
}

impl Snapshot {
    /// What it says about itself.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Image> {
        &self.memory
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Image> {
        &self.disk
    }

    /// All sections of machine state.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// One section of machine state.
    pub fn section(&self, id: SectionId) -> Option<&Section> {
        self.sections.iter().find(|s| s.id == id)
    }

    /// Refuses the snapshot when it has a required section of machine state that is not in `known` (number and newest
    /// version), or one in a newer version.
    pub fn check_sections(&self, known: &[(SectionId, u16)]) -> Result<(), FormatError> {
        // The path is for the message only; the snapshot may have been published again meanwhile.
        let file = || PathBuf::from(format!("snapshot {}", self.meta.id));
        for s in &self.sections {
            match known.iter().find(|(id, _)| *id == s.id) {
                Some((_, supported)) if s.version > *supported => {
                    let (part, found, supported) = (s.id.part(), s.version, *supported);
                    return Err(FormatError::NewerVersion { file: file(), part, found, supported });
                }
                None if s.required => {
                    return Err(FormatError::UnknownSection { file: file(), id: s.id.0, version: s.version });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What to decode early; empty when nothing was recorded.
    pub fn prefetch(&self) -> &Prefetch {
        &self.prefetch
    }
}

impl Store {
    /// Opens a store, and makes one of an empty or missing directory. Cleans up after processes that died.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        create_dirs(dir)?;
        let dir = dir.canonicalize().map_err(|e| StoreError::read(dir, e))?;
        let store = Store { dir, read_only: false, cache: Mutex::default(), quota: AtomicU64::new(0) };
        if !store.check_marker()? {
            store.initialize()?;
        }
        for name in [LAYERS, SNAPSHOTS, TMP] {
            create_dirs(&store.dir.join(name))?;
        }
        // Finds out now, not in the middle of a snapshot, whether the store can be written.
        drop(store.lock_shared()?);
        store.recover()?;
        Ok(store)
    }

    /// Opens an existing store without ever writing to it: a template that was installed read-only.
    pub fn open_read_only(dir: &Path) -> Result<Store, StoreError> {
        let dir = dir.canonicalize().map_err(|e| StoreError::read(dir, e))?;
        let store = Store { dir, read_only: true, cache: Mutex::default(), quota: AtomicU64::new(0) };
        if store.check_marker()? {
            Ok(store)
        } else {
            Err(FormatError::NotASnapshot { file: store.dir, expected: "an Amberbox store" }.into())
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sets how many bytes the layers and manifests of the store may have for this process to add more; `None` is no limit.
    pub fn set_quota(&self, bytes: Option<u64>) {
        self.quota.store(bytes.map_or(0, |bytes| bytes.max(1)), Ordering::Relaxed);
    }

    /// The quota and what is used of it; nothing without a quota.
    pub(crate) fn quota(&self) -> Result<Option<(u64, u64)>, StoreError> {
        let quota = self.quota.load(Ordering::Relaxed);
        if quota == 0 {
            return Ok(None);
        }
        let mut files: Vec<PathBuf> = self.layer_files()?.into_iter().map(|(_, path)| path).collect();
        files.extend(self.manifests()?.iter().map(|(id, tag)| self.manifest_path(id, tag)));
        // What is removed meanwhile is not used any more.
        let used = files.iter().filter_map(|path| fs::metadata(path).ok()).map(|found| found.len()).sum();
        Ok(Some((quota, used)))
    }

    /// Refuses to add `bytes` when that would exceed the quota.
    pub(crate) fn check_quota(&self, bytes: u64) -> Result<(), StoreError> {
        match self.quota()? {
            Some((quota, used)) if used.saturating_add(bytes) > quota => {
                Err(StoreError::Quota { store: self.dir.clone(), quota, used })
            }
            _ => Ok(()),
        }
    }

    fn check_marker(&self) -> Result<bool, StoreError> {
        let path = self.dir.join(MARKER);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => String::new(),
            Err(e) => return Err(StoreError::read(&path, e)),
        };
        let version = text.strip_prefix(MARKER_PREFIX).and_then(|v| v.trim_end().parse::<u16>().ok());
        match version {
            Some(FORMAT_VERSION) => Ok(true),
            Some(found) if found > FORMAT_VERSION => {
                let (part, supported) = (Part::Header, FORMAT_VERSION);
                Err(FormatError::NewerVersion { file: path, part, found, supported }.into())
            }
            _ => {
                Err(FormatError::NotASnapshot { file: path, expected: "the marker of an Amberbox store" }
                    .into())
            }
        }
    }

    /// Writes the marker, unless the directory belongs to somebody else.
    fn initialize(&self) -> Result<(), StoreError> {
        let ours = [LAYERS, SNAPSHOTS, TMP, STORE_LOCK, MARKER];
        for entry in fs::read_dir(&self.dir).map_err(|e| StoreError::read(&self.dir, e))? {
            let name = entry.map_err(|e| StoreError::read(&self.dir, e))?.file_name();
            if !ours.iter().any(|o| name.as_os_str() == *o) {
                return Err(StoreError::NotAStore { path: self.dir.clone() });
            }
        }
        create_dirs(&self.tmp_dir())?;
        let area = self.work_area()?;
        let marker = area.path(MARKER);
        write_file(&marker, format!("{MARKER_PREFIX}{FORMAT_VERSION}\n").as_bytes())?;
        rename(&marker, &self.dir.join(MARKER))?;
        sync_dir(&self.dir)
    }

    pub(crate) fn tmp_dir(&self) -> PathBuf {
        self.dir.join(TMP)
    }

    pub(crate) fn layers_dir(&self) -> PathBuf {
        self.dir.join(LAYERS)
    }

    pub(crate) fn layer_path(&self, id: LayerId) -> PathBuf {
        self.layers_dir().join(format!("{id}.layer"))
    }

    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.dir.join(SNAPSHOTS)
    }

    pub(crate) fn snapshot_dir(&self, id: &SnapshotId) -> PathBuf {
        self.snapshots_dir().join(id.as_str())
    }

    pub(crate) fn manifest_path(&self, id: &SnapshotId, tag: &str) -> PathBuf {
        self.snapshot_dir(id).join(manifest_name(tag))
    }

    /// Refuses to change a store that was opened read-only.
    pub(crate) fn writable(&self) -> Result<(), StoreError> {
        if self.read_only {
            let source = io::ErrorKind::ReadOnlyFilesystem.into();
            return Err(StoreError::NotWritable { path: self.dir.clone(), source });
        }
        Ok(())
    }

    /// A work area of this process.
    pub(crate) fn work_area(&self) -> Result<WorkArea, StoreError> {
        self.writable()?;
        WorkArea::create(&self.tmp_dir())
    }

    /// The store lock in shared mode: nothing is removed while it is held. A store that was opened read-only is
    /// not locked: nobody is expected to change it.
    pub(crate) fn lock_shared(&self) -> Result<Option<FileLock>, StoreError> {
        if self.read_only {
            return Ok(None);
        }
        let path = self.dir.join(STORE_LOCK);
        FileLock::shared(&path).map(Some).map_err(|e| StoreError::write("lock", &path, e))
    }

    /// The store lock in exclusive mode: names and manifests do not change otherwise.
    pub(crate) fn lock_exclusive(&self) -> Result<FileLock, StoreError> {
        self.writable()?;
        let path = self.dir.join(STORE_LOCK);
        FileLock::exclusive(&path).map_err(|e| StoreError::write("lock", &path, e))
    }

    /// All manifests there are, by path. Those that vanish meanwhile are left out.
    pub(crate) fn manifests(&self) -> Result<Vec<(SnapshotId, String)>, StoreError> {
        let mut found = Vec::new();
        for name in names_in(&self.snapshots_dir())? {
            if let Ok(id) = SnapshotId::parse(&name) {
                found.extend(self.tags(&id)?.into_iter().map(|tag| (id.clone(), tag)));
            }
        }
        Ok(found)
    }

    /// The tags of one snapshot.
    fn tags(&self, id: &SnapshotId) -> Result<Vec<String>, StoreError> {
        let names = names_in(&self.snapshot_dir(id))?.into_iter();
        let tags = names.filter_map(|name| name.strip_suffix(MANIFEST_SUFFIX).map(str::to_owned));
        Ok(tags.filter(|tag| check_tag(tag).is_ok()).collect())
    }

    /// Opens a manifest; `None` when there is no such one.
    pub(crate) fn manifest(&self, id: &SnapshotId, tag: &str) -> Result<Option<Manifest>, StoreError> {
        match Manifest::open(&self.manifest_path(id, tag)) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(StoreError::Io { source, .. }) if is_gone(&source) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What a snapshot says about itself; `None` when there is no such one.
    pub fn meta(&self, id: &SnapshotId, tag: &str) -> Result<Option<SnapshotMeta>, StoreError> {
        self.manifest(id, tag)?.map(|m| read_meta(&m, id, tag)).transpose()
    }

    /// Snapshots that match, newest first. Damaged ones are left out here; [`Store::verify`] reports them, and opening
    /// one says what is wrong.
    pub fn list(&self, filter: &ListFilter) -> Result<Vec<SnapshotMeta>, StoreError> {
        let mut found = Vec::new();
        for (id, tag) in self.manifests()? {
            match self.meta(&id, &tag) {
                Ok(Some(meta)) if filter.matches(&meta) => found.push(meta),
                Ok(_) | Err(StoreError::Format(_)) => {}
                Err(e) => return Err(e),
            }
        }
        found.sort_by(|a, b| (b.created_ns, &b.id, &b.tag).cmp(&(a.created_ns, &a.id, &a.tag)));
        Ok(found)
    }

    /// The snapshot that an id or a name means, optionally with `:tag`. Without a tag it is `default`, or the newest
    /// one when there is no `default`.
    pub fn resolve(&self, id_or_name: &str) -> Result<Option<SnapshotMeta>, StoreError> {
        let reference = Reference::parse(id_or_name);
        if let Ok(id) = SnapshotId::parse(reference.name) {
            let tag = match reference.tag {
                Some(tag) if check_tag(tag).is_ok() => Some(tag.to_owned()),
                Some(_) => None,
                None => self.usual_tag(&id)?,
            };
            if let Some(meta) = tag.map(|tag| self.meta(&id, &tag)).transpose()?.flatten() {
                return Ok(Some(meta));
            }
        }
        let filter = ListFilter { name: Some(id_or_name.to_owned()), ..ListFilter::default() };
        let mut found = self.list(&filter)?;
        let usual = found.iter().position(|m| m.tag == DEFAULT_TAG).unwrap_or(0);
        Ok((!found.is_empty()).then(|| found.swap_remove(usual)))
    }

    /// `default`, or else the newest tag of a snapshot.
    fn usual_tag(&self, id: &SnapshotId) -> Result<Option<String>, StoreError> {
        let tags = self.tags(id)?;
        if tags.len() < 2 || tags.iter().any(|t| t == DEFAULT_TAG) {
            let usual = tags.iter().position(|t| t == DEFAULT_TAG).unwrap_or(0);
            return Ok(tags.into_iter().nth(usual));
        }
        let mut newest: Option<(u64, String)> = None;
        for tag in tags {
            if let Some(meta) = self.meta(id, &tag)? {
                newest = newest.max(Some((meta.created_ns, tag)));
            }
        }
        Ok(newest.map(|(_, tag)| tag))
    }

    /// Opens a snapshot by id (its `default` tag, or else its newest one). Those who open the same content in one
    /// process share one [`Snapshot`] and its decoded pages.
    pub fn open_snapshot(self: &Arc<Self>, id: &SnapshotId) -> Result<Arc<Snapshot>, StoreError> {
        let tag = self.usual_tag(id)?.ok_or_else(|| StoreError::NotFound { name: id.to_string() })?;
        self.open_tagged(id, &tag)
    }

    /// Opens a snapshot by id and tag.
    pub fn open_tagged(self: &Arc<Self>, id: &SnapshotId, tag: &str) -> Result<Arc<Snapshot>, StoreError> {
        check_tag(tag)?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let store_lock = self.lock_shared()?;
        let not_found = || StoreError::NotFound { name: format!("{id}:{tag}") };
        let manifest = self.manifest(id, tag)?.ok_or_else(not_found)?;
        let key = (id.clone(), manifest.build());
        if let Some(open) = cache.snapshots.get(&key).and_then(Weak::upgrade) {
            return Ok(open);
        }
        manifest.check_known()?;
        let lock_path = self.snapshot_dir(id).join(LOCK_NAME);
        let lock = if self.read_only {
            None
        } else {
            Some(FileLock::shared(&lock_path).map_err(|e| StoreError::write("lock", &lock_path, e))?)
        };
        let layers = manifest.layers()?;
        let layers =
            layers.into_iter().map(|id| self.layer(&mut cache, id)).collect::<Result<Vec<_>, _>>()?;
        // From here on a collector may take the layers' names away, but not their content.
        drop(store_lock);
        let known =
            cache.images.get(&key).and_then(|(memory, disk)| Some((memory.upgrade()?, disk.upgrade()?)));
        let (memory, disk) = match known {
            Some(images) => images,
            None => (
                Arc::new(read_image(&manifest, SectionId::MEMORY, &layers)?),
                Arc::new(read_image(&manifest, SectionId::DISK, &layers)?),
            ),
        };
        let prefetch = match manifest.section(SectionId::PREFETCH, MAX_SECTION_LEN)? {
            None => Prefetch::default(),
            Some(bytes) => Prefetch::decode(&bytes, memory.pages(), disk.pages()).map_err(|reason| {
                FormatError::corrupt(manifest.path(), SectionId::PREFETCH.part(), reason)
            })?,
        };
        let snapshot = Arc::new(Snapshot {
            meta: read_meta(&manifest, id, tag)?,
            memory,
            disk,
            sections: manifest.state()?,
            prefetch,
            _lock: lock,
        });
        cache.images.retain(|_, (memory, _)| memory.strong_count() > 0);
        let images = (Arc::downgrade(&snapshot.memory), Arc::downgrade(&snapshot.disk));
        cache.images.insert(key.clone(), images);
        remember(&mut cache.snapshots, key, &snapshot);
        Ok(snapshot)
    }

    /// Opens a layer file of this store.
    pub(crate) fn open_layer(&self, id: LayerId) -> Result<Layer, StoreError> {
        Layer::open(&self.layer_path(id), id)
    }

    fn layer(&self, cache: &mut Cache, id: LayerId) -> Result<Arc<Layer>, StoreError> {
        if let Some(layer) = cache.layers.get(&id).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let layer = match self.open_layer(id) {
            Err(StoreError::Io { source, .. }) if is_gone(&source) => {
                return Err(StoreError::MissingLayer { layer: id, store: self.dir.clone() });
            }
            layer => Arc::new(layer?),
        };
        remember(&mut cache.layers, id, &layer);
        Ok(layer)
    }

    /// Starts a new snapshot.
    pub fn writer(self: &Arc<Self>) -> SnapshotWriter {
        SnapshotWriter::new(Arc::clone(self))
    }
}

impl Store {
    /// Checks that both maps of a manifest fit the layers that are there.
    pub(crate) fn check_maps(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let mut slots = Vec::new();
        for id in manifest.layers()? {
            // A missing or damaged layer is a problem of its own; its extents cannot be checked against it.
            slots.push(Layer::open(&self.layer_path(id), id).map_or(u32::MAX, |l| l.slots()));
        }
        for id in [SectionId::MEMORY, SectionId::DISK] {
            read_map(manifest, id, &slots)?;
        }
        Ok(())
    }
}

fn remember<K: Hash + Eq, V>(map: &mut HashMap<K, Weak<V>>, key: K, value: &Arc<V>) {
    map.retain(|_, weak| weak.strong_count() > 0);
    map.insert(key, Arc::downgrade(value));
}

pub(crate) fn manifest_name(tag: &str) -> String {
    format!("{tag}{MANIFEST_SUFFIX}")
}

pub(crate) fn read_meta(manifest: &Manifest, id: &SnapshotId, tag: &str) -> Result<SnapshotMeta, StoreError> {
    let record = MetaRecord::decode(manifest.path(), SectionId::META.part(), &manifest.meta_bytes()?)?;
    Ok(record.into_meta(id.clone(), tag.to_owned(), manifest.build(), manifest.len()))
}

fn read_image(manifest: &Manifest, id: SectionId, layers: &[Arc<Layer>]) -> Result<Image, StoreError> {
    let slots: Vec<u32> = layers.iter().map(|l| l.slots()).collect();
    Ok(Image::from_layers(read_map(manifest, id, &slots)?, layers.into())?)
}

fn read_map(manifest: &Manifest, id: SectionId, slots: &[u32]) -> Result<ExtentMap, StoreError> {
    let bytes = manifest.required(id, MAX_SECTION_LEN)?;
    let map = ExtentMap::parse(&bytes, slots);
    Ok(map.map_err(|reason| FormatError::corrupt(manifest.path(), id.part(), reason))?)
}

/// Whether a path does not exist (any more).
pub(crate) fn is_gone(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// UTF-8 names in a directory; none when it does not exist.
pub(crate) fn names_in(dir: &Path) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if is_gone(&e) => return Ok(Vec::new()),
        entries => entries.map_err(|e| StoreError::read(dir, e))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => names.extend(entry.file_name().into_string()),
            Err(e) if is_gone(&e) => {}
            Err(e) => return Err(StoreError::read(dir, e)),
        }
    }
    Ok(names)
}
