//! Snapshots on the move: one file with a manifest and the layers that it names (SNAPSHOT.md, section 8).
//!
//! Layers that the other side has may be left out: they are named by their content. Nothing of such a file is believed: what
//! arrives is written to a work area, checked there down to the last frame, and published like any other snapshot.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{FormatError, Part, StoreError};
use crate::extent::ExtentMap;
use crate::files::{create_file, rename, write_file};
use crate::format::{FORMAT_VERSION, MAX_LAYERS, MAX_SECTION_LEN, Reader, hash};
use crate::ids::{LayerId, SnapshotId, check_name, check_tag};
use crate::layer::Layer;
use crate::manifest::{Manifest, SectionId};
use crate::meta::{Kind, SnapshotMeta};
use crate::publish::Publication;
use crate::store::{Store, read_meta};

const MAGIC: [u8; 8] = *b"AMBRMOVE";
const HEADER_LEN: usize = 160;
const ENTRY_LEN: usize = 40;
const HASH_LEN: usize = 16;
const TEXT_LEN: usize = 64;
const COPY_BUFFER: usize = 256 << 10;
/// The most that a manifest is taken into memory for: two maps and all sections fit many times.
const MAX_MANIFEST: u64 = 1 << 30;

/// What an export wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// What was exported.
    pub meta: SnapshotMeta,
    /// Bytes written.
    pub bytes: u64,
    /// Layers in the file.
    pub layers: usize,
    /// Layers that the reader must have.
    pub left_out: usize,
}

/// The beginning of the file.
struct Header {
    id: SnapshotId,
    tag: String,
    manifest: u64,
    /// Each layer, and its length, or 0 when it is left out.
    layers: Vec<(LayerId, u64)>,
}

impl Header {
    /// Length of header, table and hash.
    fn len(layers: usize) -> u64 {
        (HEADER_LEN + layers * ENTRY_LEN + HASH_LEN) as u64
    }

    fn file_len(&self) -> Option<u64> {
        let rest = self.layers.iter().try_fold(self.manifest, |sum, (_, len)| sum.checked_add(*len))?;
        rest.checked_add(Header::len(self.layers.len()))
    }

    fn encode(&self) -> Vec<u8> {
        let text = |text: &str| {
            let mut field = [0; TEXT_LEN];
            // Ids and tags have at most this length.
            field.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
            field
        };
        let mut out = Vec::with_capacity(HEADER_LEN + self.layers.len() * ENTRY_LEN + HASH_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&u32::try_from(self.layers.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&self.manifest.to_le_bytes());
        out.extend_from_slice(&self.file_len().unwrap_or(u64::MAX).to_le_bytes());
        out.extend_from_slice(&text(self.id.as_str()));
        out.extend_from_slice(&text(&self.tag));
        for (id, len) in &self.layers {
            out.extend_from_slice(&id.0);
            out.extend_from_slice(&len.to_le_bytes());
        }
        let sum = hash(&out);
        out.extend_from_slice(&sum);
        out
    }

    fn read(file: &File, path: &Path) -> Result<Header, StoreError> {
        let found = file.metadata().map_err(|e| StoreError::read(path, e))?.len();
        let bad = |reason| FormatError::corrupt(path, Part::Header, reason);
        let truncated = |expected| FormatError::Truncated { file: path.to_owned(), expected, found };
        let read = |len: usize| -> Result<Vec<u8>, StoreError> {
            let mut bytes = vec![0; len];
            match file.read_exact_at(&mut bytes, 0) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(truncated(len as u64).into()),
                result => result.map(|()| bytes).map_err(|e| StoreError::read(path, e)),
            }
        };
        let fixed = read(HEADER_LEN)?;
        let mut r = Reader::new(&fixed);
        let short = || bad("header ends early");
        if r.array::<8>() != Some(MAGIC) {
            let expected = "an exported snapshot";
            return Err(FormatError::NotASnapshot { file: path.to_owned(), expected }.into());
        }
        let version = r.u16().ok_or_else(short)?;
        if version > FORMAT_VERSION {
            let (file, part) = (path.to_owned(), Part::Header);
            let (found, supported) = (version, FORMAT_VERSION);
            return Err(FormatError::NewerVersion { file, part, found, supported }.into());
        }
        r.u16().ok_or_else(short)?;
        let count = r.u32().ok_or_else(short)? as usize;
        let manifest = r.u64().ok_or_else(short)?;
        let expected = r.u64().ok_or_else(short)?;
        if expected != found {
            return Err(truncated(expected).into());
        }
        if count > MAX_LAYERS || Header::len(count) > found {
            return Err(bad("table of layers does not fit the file").into());
        }
        let whole = read(HEADER_LEN + count * ENTRY_LEN + HASH_LEN)?;
        let (covered, sum) = whole.split_at(whole.len() - HASH_LEN);
        if hash(covered) != sum {
            let (file, part) = (path.to_owned(), Part::Header);
            return Err(FormatError::HashMismatch { file, part }.into());
        }
        if version != FORMAT_VERSION {
            return Err(bad("version 0 does not exist").into());
        }
        let mut text = || {
            let field = r.bytes(TEXT_LEN)?;
            let len = field.iter().position(|byte| *byte == 0).unwrap_or(TEXT_LEN);
            let (used, rest) = field.split_at(len);
            rest.iter().all(|byte| *byte == 0).then_some(std::str::from_utf8(used).ok()?)
        };
        let id = text().and_then(|id| SnapshotId::parse(id).ok()).ok_or_else(|| bad("impossible id"))?;
        let tag =
            text().filter(|tag| check_tag(tag).is_ok()).ok_or_else(|| bad("impossible tag"))?.to_owned();
        let mut r = Reader::new(&covered[HEADER_LEN..]);
        let mut layers = Vec::with_capacity(count);
        while let (Some(id), Some(len)) = (r.array(), r.u64()) {
            layers.push((LayerId(id), len));
        }
        let header = Header { id, tag, manifest, layers };
        if header.file_len() != Some(found) || manifest > MAX_MANIFEST {
            return Err(bad("parts do not fill the file").into());
        }
        Ok(header)
    }
}

impl Store {
    /// Writes a snapshot to a new file, which must not exist. Layers in `without` are left out, for a reader that has them.
    ///
    /// # Errors
    /// The snapshot does not exist or is damaged, or the file cannot be written; then there is none.
    pub fn export(
        self: &Arc<Self>,
        id: &SnapshotId,
        tag: &str,
        to: &Path,
        without: &HashSet<LayerId>,
    ) -> Result<Exported, StoreError> {
        // While it is open, nothing of it goes away.
        let snapshot = self.open_tagged(id, tag)?;
        let meta = snapshot.meta().clone();
        let not_found = || StoreError::NotFound { name: format!("{id}:{tag}") };
        let manifest = self.manifest(id, tag)?.filter(|m| m.build() == meta.build).ok_or_else(not_found)?;
        let bytes = std::fs::read(manifest.path()).map_err(|e| StoreError::read(manifest.path(), e))?;
        let named = manifest.layers()?;
        let opened = snapshot.memory().layers();
        let mut layers = Vec::with_capacity(named.len());
        for id in &named {
            let layer = opened.iter().find(|layer| layer.id() == *id).cloned();
            let missing = || StoreError::MissingLayer { layer: *id, store: self.dir().to_owned() };
            layers.push((layer.ok_or_else(missing)?, !without.contains(id)));
        }
        let header = Header {
            id: id.clone(),
            tag: tag.to_owned(),
            manifest: bytes.len() as u64,
            layers: layers.iter().map(|(l, sent)| (l.id(), if *sent { l.file_len() } else { 0 })).collect(),
        };
        let file = create_file(to)?;
        let written = write_export(&file, &header, &bytes, layers.iter().filter(|l| l.1).map(|l| &*l.0));
        if let Err(e) = written {
            let _ = std::fs::remove_file(to);
            return Err(StoreError::write("write", to, e));
        }
        let sent = layers.iter().filter(|l| l.1).count();
        let bytes = header.file_len().unwrap_or(u64::MAX);
        Ok(Exported { meta, bytes, layers: sent, left_out: layers.len() - sent })
    }

    /// Takes over a snapshot from a file that [`Store::export`] wrote, here or elsewhere. Everything is checked before
    /// anything is visible. It keeps its id if that is free here, and its names; the same content again is no error.
    ///
    /// # Errors
    /// The file is damaged or of a newer version, a layer that it leaves out is not here, or one of its names belongs to
    /// a template.
    pub fn import(self: &Arc<Self>, from: &Path) -> Result<SnapshotMeta, StoreError> {
        let file = File::open(from).map_err(|e| StoreError::read(from, e))?;
        let header = Header::read(&file, from)?;
        let mut at = Header::len(header.layers.len());
        // At most MAX_MANIFEST, and within the file.
        let mut bytes = vec![0; usize::try_from(header.manifest).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, at).map_err(|e| StoreError::read(from, e))?;
        at += header.manifest;
        let area = self.work_area()?;
        let path = area.path("manifest");
        write_file(&path, &bytes)?;
        let manifest = Manifest::open(&path)?;
        manifest.check_known()?;
        let meta = read_meta(&manifest, &header.id, &header.tag)?;
        meta.names.iter().try_for_each(|name| check_name(name))?;
        manifest.state()?;
        if manifest.layers()? != header.layers.iter().map(|(id, _)| *id).collect::<Vec<_>>() {
            return Err(
                FormatError::corrupt(from, Part::Header, "layers are not those of the manifest").into()
            );
        }
        let here = self.list(&Default::default())?;
        if let Some(same) = here.iter().find(|m| m.build == meta.build && m.tag == meta.tag) {
            return Ok(same.clone());
        }
        let named_alike = |m: &&SnapshotMeta| m.names.iter().any(|name| meta.names.contains(name));
        if here.iter().filter(named_alike).any(|m| m.kind == Kind::Template) {
            return Err(StoreError::InvalidInput { reason: "its name belongs to a template of this store" });
        }
        let new = header.layers.iter().filter(|(id, _)| !self.layer_path(*id).exists());
        self.check_quota(new.fold(header.manifest, |sum, (_, len)| sum.saturating_add(*len)))?;
        let mut layers = Vec::with_capacity(header.layers.len());
        for (id, len) in header.layers {
            layers.push(Arc::new(self.take_layer(
                &file,
                from,
                (at, len),
                id,
                &area.path(&format!("{id}.layer")),
            )?));
            at += len;
        }
        let slots: Vec<u32> = layers.iter().map(|layer| layer.slots()).collect();
        for id in [SectionId::MEMORY, SectionId::DISK] {
            let map = manifest.required(id, MAX_SECTION_LEN)?;
            ExtentMap::parse(&map, &slots).map_err(|reason| FormatError::corrupt(from, id.part(), reason))?;
        }
        let taken = here.iter().any(|m| m.id == header.id);
        let id = self.publish(Publication {
            area,
            own: None,
            inherited: layers,
            manifest: bytes,
            names: meta.names.clone(),
            wanted_id: (!taken).then_some(header.id),
            tag: header.tag,
        })?;
        Ok(SnapshotMeta { id, ..meta })
    }

    /// One layer of a file that is being imported, checked: from the file, or that of this store.
    fn take_layer(
        &self,
        file: &File,
        from: &Path,
        (at, len): (u64, u64),
        id: LayerId,
        to: &Path,
    ) -> Result<Layer, StoreError> {
        // What is here already is taken from here, unless it is damaged.
        if let Ok(layer) = self.open_layer(id)
            && (len == 0 || layer.verify().is_ok())
        {
            return Ok(layer);
        }
        if len == 0 {
            return Err(StoreError::MissingLayer { layer: id, store: self.dir().to_owned() });
        }
        let new = create_file(to)?;
        let mut out = BufWriter::with_capacity(COPY_BUFFER, &new);
        let mut part = Section { file, at, left: len };
        let copied = io::copy(&mut part, &mut out).and_then(|_| out.flush()).and_then(|()| new.sync_data());
        copied.map_err(|e| StoreError::write("write", to, e))?;
        let name = |e| match e {
            // The file in the work area is gone when the message is read.
            StoreError::Format(FormatError::HashMismatch { part, .. }) => {
                FormatError::HashMismatch { file: from.to_owned(), part }.into()
            }
            e => e,
        };
        drop(out);
        let layer = Layer::open(to, id).map_err(name)?;
        layer.verify()?;
        let damaged = self.layer_path(id);
        if damaged.exists() {
            rename(to, &damaged)?;
        }
        Ok(layer)
    }

    /// The layers that this store has: what an export for it may leave out.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn layers(&self) -> Result<Vec<LayerId>, StoreError> {
        let mut layers: Vec<LayerId> = self.layer_files()?.into_iter().map(|(id, _)| id).collect();
        layers.sort_unstable();
        Ok(layers)
    }
}

fn write_export<'a>(
    file: &File,
    header: &Header,
    manifest: &[u8],
    layers: impl Iterator<Item = &'a Layer>,
) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(COPY_BUFFER, file);
    out.write_all(&header.encode())?;
    out.write_all(manifest)?;
    for layer in layers {
        let mut part = Section { file: layer.file(), at: 0, left: layer.file_len() };
        if io::copy(&mut part, &mut out)? != layer.file_len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    out.flush()?;
    file.sync_all()
}

/// Part of a file, read without moving its position.
struct Section<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read_at(&mut buf[..want], self.at)?;
        self.at += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}
