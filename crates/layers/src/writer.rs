//! Builds a new snapshot on top of optional parent images: pages into one new layer, maps and state into a manifest.
//!
//! Nothing is visible before [`SnapshotWriter::publish`]; dropping the writer removes what it wrote. A page that is zero,
//! or that is known to equal its parent's, is not stored again.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::capture::{Capture, CaptureStats, PageSource};
use crate::error::{ImageError, StoreError};
use crate::extent::{Extent, ExtentMap, overlay};
use crate::files::{WorkArea, create_file};
use crate::format::{MAX_LAYERS, MAX_PAGES, PAGE_SIZE, Page};
use crate::ids::{BuildId, LayerId};
use crate::image::Image;
use crate::known::Known;
use crate::layer::{Layer, LayerWriter};
use crate::lock::FileLock;
use crate::manifest::{self, Prefetch, Section, SectionId};
use crate::meta::{MetaRecord, NewSnapshot, SnapshotMeta};
use crate::publish::{NewLayer, Publication};
use crate::store::Store;

/// The compression level used unless another is asked for: of a guest's memory level 3 makes 5 % less, in four times the time.
pub const DEFAULT_LEVEL: i32 = 1;
/// The number of the new layer while a snapshot is built; final numbers are given on publication.
const OWN_LAYER: u16 = 1;
const LAYER_FILE: &str = "layer";

/// A snapshot in the making.
#[derive(Debug)]
pub struct SnapshotWriter {
    store: Arc<Store>,
    level: i32,
    threads: usize,
    limit: u64,
    /// The open layer file, then the directory that it is in, so that they are dropped in this order.
    layer: Option<LayerWriter>,
    area: Option<WorkArea>,
    /// Layers of parents; number `OWN_LAYER + 1` is the first.
    inherited: Vec<Arc<Layer>>,
    known: Known,
    memory: ExtentMap,
    disk: ExtentMap,
    sections: Vec<Section>,
    prefetch: Option<Prefetch>,
}

impl SnapshotWriter {
    pub(crate) fn new(store: Arc<Store>) -> SnapshotWriter {
        SnapshotWriter {
            store,
            level: DEFAULT_LEVEL,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            limit: u64::MAX,
            layer: None,
            area: None,
            inherited: Vec::new(),
            known: Known { own_layer: OWN_LAYER, ..Known::default() },
            memory: ExtentMap::zero(0),
            disk: ExtentMap::zero(0),
            sections: Vec::new(),
            prefetch: None,
        }
    }

    /// The zstd level, 1 to 19; [`DEFAULT_LEVEL`] unless set.
    pub fn level(&mut self, level: i32) -> &mut Self {
        self.level = level.clamp(1, 19);
        self
    }

    /// Threads that compress; all cores unless set.
    pub fn threads(&mut self, threads: usize) -> &mut Self {
        self.threads = threads.max(1);
        self
    }

    /// The most bytes that the new layer may have; beyond it the snapshot fails like on a full disk.
    pub fn limit(&mut self, bytes: u64) -> &mut Self {
        self.limit = bytes;
        self
    }

    /// Stores guest memory of `pages` pages: `dirty` (any order) from `source`, the rest as in `parent`, or zeros.
    pub fn memory(
        &mut self,
        parent: Option<&Image>,
        pages: u64,
        dirty: impl IntoIterator<Item = u64>,
        source: &dyn PageSource,
    ) -> Result<CaptureStats, StoreError> {
        let (map, stats) = self.image(parent, pages, dirty.into_iter().collect(), source, false)?;
        self.memory = map;
        Ok(stats)
    }

    /// Lets pages of memory that equal a decoded page of `image`, usually the parent's disk, refer to that one's layer.
    ///
    /// # Errors
    /// The snapshot would have too many layers.
    pub fn share(&mut self, image: &Arc<Image>) -> Result<(), StoreError> {
        image.learn_prints();
        let mut numbers = vec![0];
        for layer in image.layers() {
            numbers.push(self.inherit(layer)?);
        }
        self.known.images.push((Arc::clone(image), numbers));
        Ok(())
    }

    /// Stores the disk, like [`SnapshotWriter::memory`]. Pages of memory that are stored after it and equal one of these are
    /// not stored again.
    pub fn disk(
        &mut self,
        parent: Option<&Image>,
        pages: u64,
        dirty: impl IntoIterator<Item = u64>,
        source: &dyn PageSource,
    ) -> Result<CaptureStats, StoreError> {
        let (map, stats) = self.image(parent, pages, dirty.into_iter().collect(), source, true)?;
        self.disk = map;
        Ok(stats)
    }

    /// Adds a section of machine state. `required`: a reader that does not know it must refuse the snapshot.
    pub fn section(
        &mut self,
        id: SectionId,
        version: u16,
        required: bool,
        bytes: Vec<u8>,
    ) -> Result<(), StoreError> {
        if id < SectionId::FIRST_STATE {
            return Err(StoreError::InvalidInput { reason: "section number is reserved" });
        }
        self.sections.push(Section { id, version, required, bytes });
        Ok(())
    }

    /// Adds a list of pages to decode early.
    pub fn prefetch(&mut self, prefetch: Prefetch) -> &mut Self {
        self.prefetch = Some(prefetch);
        self
    }

    fn image(
        &mut self,
        parent: Option<&Image>,
        pages: u64,
        mut dirty: Vec<u64>,
        source: &dyn PageSource,
        remember: bool,
    ) -> Result<(ExtentMap, CaptureStats), StoreError> {
        let count = u32::try_from(pages).ok().filter(|_| pages <= MAX_PAGES);
        let count = count.ok_or(StoreError::InvalidInput { reason: "image larger than 16 TiB" })?;
        dirty.sort_unstable();
        dirty.dedup();
        if dirty.last().is_some_and(|last| *last >= pages) {
            return Err(StoreError::InvalidInput { reason: "dirty page outside of the image" });
        }
        match parent {
            Some(raw) if raw.map().is_none() => {
                // A plain file has no layers to refer to: all of it is stored.
                let source = OverRaw { raw, dirty: &dirty, source };
                let all: Vec<u32> = (0..count).collect();
                self.capture(None, count, &all, &source, remember)
            }
            parent => {
                // All are below `count`.
                let dirty: Vec<u32> = dirty.into_iter().map(|page| page as u32).collect();
                self.capture(parent, count, &dirty, source, remember)
            }
        }
    }

    fn capture(
        &mut self,
        parent: Option<&Image>,
        pages: u32,
        dirty: &[u32],
        source: &dyn PageSource,
        remember: bool,
    ) -> Result<(ExtentMap, CaptureStats), StoreError> {
        let (level, threads, own_layer) = (self.level, self.threads, OWN_LAYER);
        // What a disk holds twice is not worth a search.
        let (nothing, known) = (Known::default(), std::mem::take(&mut self.known));
        let used = if remember { &nothing } else { &known };
        let capture = Capture { parent, dirty, source, level, threads, own_layer, known: used, remember };
        let captured = self.layer().and_then(|layer| capture.run(layer));
        self.known = known;
        let (changes, stats, stored) = captured.map_err(|e| self.over_quota(e))?;
        if remember {
            self.known.stored = stored;
        }
        let mut translate = vec![0];
        for layer in parent.map_or(&[][..], Image::layers) {
            translate.push(self.inherit(layer)?);
        }
        let map = overlay(parent.and_then(Image::map), &translate, pages, changes.into_iter());
        Ok((map, stats))
    }

    /// The number of a parent's layer in this snapshot.
    fn inherit(&mut self, layer: &Arc<Layer>) -> Result<u16, StoreError> {
        let known = self.inherited.iter().position(|l| l.id() == layer.id());
        let index = known.unwrap_or(self.inherited.len());
        if known.is_none() {
            if index + 1 >= MAX_LAYERS {
                return Err(StoreError::InvalidInput { reason: "more than 65533 layers" });
            }
            self.inherited.push(Arc::clone(layer));
        }
        Ok(OWN_LAYER + 1 + index as u16)
    }

    fn layer(&mut self) -> Result<&mut LayerWriter, StoreError> {
        let path = self.area()?.path(LAYER_FILE);
        if self.layer.is_none() {
            let quota = self.store.quota()?;
            let room = quota.map_or(u64::MAX, |(quota, used)| quota.saturating_sub(used));
            let layer = LayerWriter::new(&path, create_file(&path)?, self.limit.min(room));
            // A limit below a header's length.
            self.layer = Some(layer.map_err(|e| self.over_quota(e))?);
        }
        self.layer.as_mut().ok_or(StoreError::InvalidInput { reason: "the writer has no layer" })
    }

    /// Says which limit it was that a layer reached.
    fn over_quota(&self, error: StoreError) -> StoreError {
        let limited = matches!(&error, StoreError::DiskFull { source, .. } if source.get_ref().is_some());
        match self.store.quota() {
            Ok(Some((quota, used))) if limited && quota.saturating_sub(used) < self.limit => {
                StoreError::Quota { store: self.store.dir().to_owned(), quota, used }
            }
            _ => error,
        }
    }

    fn area(&mut self) -> Result<&WorkArea, StoreError> {
        match &mut self.area {
            Some(area) => Ok(area),
            none => Ok(none.insert(self.store.work_area()?)),
        }
    }

    /// Makes the snapshot visible, whole, under a new id or the one that its name already has.
    pub fn publish(mut self, new: NewSnapshot) -> Result<SnapshotMeta, StoreError> {
        new.check()?;
        self.area()?;
        let own = match self.layer.take().filter(|layer| layer.frame_count() > 0) {
            None => None,
            Some(layer) => {
                let (id, file, len) = layer.finish().map_err(|e| self.over_quota(e))?;
                let path = self.area()?.path(LAYER_FILE);
                let guard = FileLock::shared_on(file).map_err(|e| StoreError::write("lock", &path, e))?;
                Some(NewLayer { id, _guard: guard, len, path })
            }
        };
        let layers = self.number_layers();
        let own_bytes = own.as_ref().map_or(0, |own| own.len);
        let inherited_bytes: u64 = layers.inherited.iter().map(|l| l.file_len()).sum();
        let ids: Vec<LayerId> = own
            .iter()
            .filter(|_| layers.own)
            .map(|own| own.id)
            .chain(layers.inherited.iter().map(|layer| layer.id()))
            .collect();
        let record = MetaRecord {
            kind: new.kind,
            names: new.names.clone(),
            created_ns: now_ns(),
            source: new.source.clone(),
            parent: new.parent.clone(),
            metadata: new.metadata.clone(),
            memory_pages: u64::from(layers.memory.pages()),
            disk_pages: u64::from(layers.disk.pages()),
            memory_data_pages: layers.memory.data_pages(),
            disk_data_pages: layers.disk.data_pages(),
            layer_bytes: own_bytes,
            total_bytes: own_bytes + inherited_bytes,
            platform: new.platform,
            constraints: new.constraints.clone(),
        };
        let section = |id, required, bytes| Section { id, version: 1, required, bytes };
        let mut sections = vec![
            section(SectionId::META, true, record.encode()?),
            section(SectionId::LAYERS, true, ids.iter().flat_map(|id| id.0).collect()),
            section(SectionId::MEMORY, true, layers.memory.encode()),
            section(SectionId::DISK, true, layers.disk.encode()),
        ];
        sections.extend(self.prefetch.take().map(|p| section(SectionId::PREFETCH, false, p.encode())));
        sections.append(&mut self.sections);
        let build = BuildId::generate().map_err(|e| StoreError::write("name", self.store.dir(), e))?;
        let manifest = manifest::encode(build, &sections)?;
        let Some(area) = self.area.take() else {
            return Err(StoreError::InvalidInput { reason: "the writer has no work area" });
        };
        let len = manifest.len() as u64;
        self.store.check_quota(own_bytes + len)?;
        let tag = new.tag.unwrap_or_else(|| crate::ids::DEFAULT_TAG.to_owned());
        let publication = Publication {
            area,
            own: own.filter(|_| layers.own),
            inherited: layers.inherited,
            manifest,
            names: new.names,
            wanted_id: new.id,
            tag: tag.clone(),
        };
        let id = self.store.publish(publication)?;
        Ok(record.into_meta(id, tag, build, len))
    }

    /// Gives the layers that are really used their final numbers, from 1 on.
    fn number_layers(&mut self) -> Numbered {
        let mut used = vec![false; self.inherited.len() + 2];
        for extent in self.memory.iter().chain(self.disk.iter()) {
            used[usize::from(extent.layer)] = true;
        }
        let mut next = 0u16;
        let translate: Vec<u16> = used
            .iter()
            .enumerate()
            .map(|(number, used)| {
                next += u16::from(number > 0 && *used);
                if *used && number > 0 { next } else { 0 }
            })
            .collect();
        let renumber =
            |map: &ExtentMap| overlay(Some(map), &translate, map.pages(), std::iter::empty::<Extent>());
        let first = usize::from(OWN_LAYER) + 1;
        let inherited = std::mem::take(&mut self.inherited);
        Numbered {
            memory: renumber(&self.memory),
            disk: renumber(&self.disk),
            own: used[usize::from(OWN_LAYER)],
            inherited: inherited
                .into_iter()
                .zip(&used[first..])
                .filter(|(_, used)| **used)
                .map(|(l, _)| l)
                .collect(),
        }
    }
}

struct Numbered {
    memory: ExtentMap,
    disk: ExtentMap,
    own: bool,
    inherited: Vec<Arc<Layer>>,
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Dirty pages over a plain file.
struct OverRaw<'a> {
    raw: &'a Image,
    dirty: &'a [u64],
    source: &'a dyn PageSource,
}

impl PageSource for OverRaw<'_> {
    fn read(&self, page: u64, out: &mut Page) -> std::io::Result<()> {
        self.read_run(page, out)
    }

    fn read_run(&self, first: u64, out: &mut [u8]) -> std::io::Result<()> {
        let end = first + (out.len() / PAGE_SIZE) as u64;
        // What lies behind the file (or the image over it) is zero.
        let inside = self.raw.pages().clamp(first, end) - first;
        let (head, tail) = out.split_at_mut(inside as usize * PAGE_SIZE);
        self.raw.read_raw(first, head).map_err(|e| match e {
            ImageError::Read { source, .. } => source,
            e => std::io::Error::other(e),
        })?;
        tail.fill(0);
        let from = self.dirty.partition_point(|page| *page < first);
        for page in self.dirty[from..].iter().take_while(|page| **page < end) {
            let at = (*page - first) as usize * PAGE_SIZE;
            let (pages, _) = out[at..at + PAGE_SIZE].as_chunks_mut::<PAGE_SIZE>();
            pages.iter_mut().try_for_each(|out| self.source.read(*page, out))?;
        }
        Ok(())
    }
}
