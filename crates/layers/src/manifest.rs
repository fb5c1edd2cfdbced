//! Manifests: one file that resolves every page of a snapshot and carries its state (SNAPSHOT.md, section 3).
//!
//! A header, a table of sections, the sections. Each has a number, a version, a hash and a flag that says whether a
//! reader must know it. A listing reads header, table and metadata only. Numbers below [`SectionId::FIRST_STATE`] belong
//! to this crate; those above belong to the machine, which checks them itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::codec::{self, Encoder};
use crate::error::{FormatError, Part, StoreError};
use crate::format::{
    FORMAT_VERSION, HEADER_LEN, Hash, MANIFEST_MAGIC, MAX_LAYERS, MAX_META_LEN, MAX_SECTION_LEN,
    MAX_SECTIONS, Reader, hash, truncate,
};
use crate::ids::{BuildId, LayerId};
use crate::image::PageRange;

const ENTRY_LEN: usize = 48;
const FLAG_REQUIRED: u16 = 1;
/// Sections below this are not worth a compression attempt.
const COMPRESS_FROM: usize = 256;

/// The number of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectionId(pub u16);

impl SectionId {
    pub(crate) const META: SectionId = SectionId(1);
    pub(crate) const LAYERS: SectionId = SectionId(2);
    pub(crate) const MEMORY: SectionId = SectionId(3);
    pub(crate) const DISK: SectionId = SectionId(4);
    pub(crate) const PREFETCH: SectionId = SectionId(5);
    /// Sections from here on belong to the machine.
    pub const FIRST_STATE: SectionId = SectionId(0x100);

    pub(crate) fn part(self) -> Part {
        Part::Section(self.0)
    }
}

/// One section of machine state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its number, at least [`SectionId::FIRST_STATE`].
    pub id: SectionId,
    /// The version of its content.
    pub version: u16,
    /// Whether a reader that does not know it must refuse the snapshot.
    pub required: bool,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// Pages to decode early, in the order in which earlier copies first needed them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefetch {
    /// Of the memory image.
    pub memory: Vec<PageRange>,
    /// Of the disk image.
    pub disk: Vec<PageRange>,
}

impl Prefetch {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for list in [&self.memory, &self.disk] {
            // Pages are 32-bit in the format; what lies outside cannot belong to an image.
            let fits: Vec<(u32, u32)> = list
                .iter()
                .filter_map(|r| Some((u32::try_from(r.first).ok()?, u32::try_from(r.count).ok()?)))
                .collect();
            out.extend_from_slice(&u32::try_from(fits.len()).unwrap_or(0).to_le_bytes());
            for (first, count) in fits {
                out.extend_from_slice(&first.to_le_bytes());
                out.extend_from_slice(&count.to_le_bytes());
            }
        }
        out
    }

    /// Reads the lists; ranges outside of the images are an error.
    pub(crate) fn decode(bytes: &[u8], memory: u64, disk: u64) -> Result<Prefetch, &'static str> {
        let mut r = Reader::new(bytes);
        let mut lists = [Vec::new(), Vec::new()];
        for (list, pages) in lists.iter_mut().zip([memory, disk]) {
            let len = r.u32().ok_or("prefetch list ends early")? as usize;
            let pairs = r.column_u32(len.saturating_mul(2)).ok_or("prefetch list ends early")?;
            for pair in pairs.chunks_exact(2) {
                let range = PageRange { first: u64::from(pair[0]), count: u64::from(pair[1]) };
                if range.first + range.count > pages {
                    return Err("prefetch outside of the image");
                }
                list.push(range);
            }
        }
        if !r.is_empty() {
            return Err("prefetch list has trailing bytes");
        }
        let [memory, disk] = lists;
        Ok(Prefetch { memory, disk })
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    id: SectionId,
    version: u16,
    required: bool,
    codec: u8,
    offset: u64,
    stored: u64,
    raw: u64,
    hash: Hash,
}

/// An open manifest: header and table are checked, sections are read on demand.
#[derive(Debug)]
pub(crate) struct Manifest {
    path: PathBuf,
    file: File,
    build: BuildId,
    len: u64,
    entries: Vec<Entry>,
}

impl Manifest {
    pub(crate) fn open(path: &Path) -> Result<Manifest, StoreError> {
        let file = File::open(path).map_err(|e| StoreError::read(path, e))?;
        let found = file.metadata().map_err(|e| StoreError::read(path, e))?.len();
        let truncated = |expected| FormatError::Truncated { file: path.to_owned(), expected, found };
        let bad = |reason| FormatError::corrupt(path, Part::Header, reason);
        let mut header = [0; HEADER_LEN];
        read_at(&file, path, &mut header, 0, || truncated(HEADER_LEN as u64))?;
        let at8 = |from: usize| -> [u8; 8] { std::array::from_fn(|i| header[from + i]) };
        let at16 = |from: usize| -> [u8; 16] { std::array::from_fn(|i| header[from + i]) };
        if at8(0) != MANIFEST_MAGIC {
            return Err(
                FormatError::NotASnapshot { file: path.to_owned(), expected: "a snapshot manifest" }.into()
            );
        }
        let version = u16::from_le_bytes([header[8], header[9]]);
        if version > FORMAT_VERSION {
            let (found, supported) = (version, FORMAT_VERSION);
            let file = path.to_owned();
            return Err(FormatError::NewerVersion { file, part: Part::Header, found, supported }.into());
        }
        let count = usize::from(u16::from_le_bytes([header[10], header[11]]));
        let len = u64::from_le_bytes(at8(16));
        if len != found {
            return Err(truncated(len).into());
        }
        let table_end = (HEADER_LEN + count * ENTRY_LEN) as u64;
        if count > MAX_SECTIONS || table_end > found {
            return Err(bad("table of sections does not fit the file").into());
        }
        let mut table = vec![0; count * ENTRY_LEN];
        read_at(&file, path, &mut table, HEADER_LEN as u64, || truncated(table_end))?;
        if table_hash(&header, &table) != at16(48) {
            return Err(FormatError::HashMismatch { file: path.to_owned(), part: Part::Header }.into());
        }
        if version != FORMAT_VERSION {
            return Err(bad("version 0 does not exist").into());
        }
        let entries = parse_table(&table, table_end, found).map_err(bad)?;
        Ok(Manifest { path: path.to_owned(), file, build: BuildId(at16(32)), len, entries })
    }

    pub(crate) fn build(&self) -> BuildId {
        self.build
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses sections of this crate's range that must be understood and are not.
    pub(crate) fn check_known(&self) -> Result<(), FormatError> {
        let known =
            [SectionId::META, SectionId::LAYERS, SectionId::MEMORY, SectionId::DISK, SectionId::PREFETCH];
        for e in self.entries.iter().filter(|e| e.required && e.id < SectionId::FIRST_STATE) {
            if !known.contains(&e.id) {
                let (id, version) = (e.id.0, e.version);
                return Err(FormatError::UnknownSection { file: self.path.clone(), id, version });
            }
        }
        Ok(())
    }

    /// One of this crate's sections, if it is there and of a version that is known.
    pub(crate) fn section(&self, id: SectionId, max_len: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(entry) = self.entries.iter().find(|e| e.id == id) else { return Ok(None) };
        if entry.version > 1 {
            let (file, part) = (self.path.clone(), id.part());
            return Err(FormatError::NewerVersion { file, part, found: entry.version, supported: 1 }.into());
        }
        self.load(entry, max_len).map(Some)
    }

    pub(crate) fn required(&self, id: SectionId, max_len: u64) -> Result<Vec<u8>, StoreError> {
        let missing = || FormatError::corrupt(&self.path, id.part(), "section is missing");
        Ok(self.section(id, max_len)?.ok_or_else(missing)?)
    }

    /// All sections of the machine.
    pub(crate) fn state(&self) -> Result<Vec<Section>, StoreError> {
        let state = self.entries.iter().filter(|e| e.id >= SectionId::FIRST_STATE);
        state
            .map(|e| {
                let bytes = self.load(e, MAX_SECTION_LEN)?;
                Ok(Section { id: e.id, version: e.version, required: e.required, bytes })
            })
            .collect()
    }

    /// Everything, for writing the manifest again with other sections.
    pub(crate) fn all(&self) -> Result<Vec<Section>, StoreError> {
        self.entries
            .iter()
            .map(|e| {
                let bytes = self.load(e, MAX_SECTION_LEN)?;
                Ok(Section { id: e.id, version: e.version, required: e.required, bytes })
            })
            .collect()
    }

    pub(crate) fn layers(&self) -> Result<Vec<LayerId>, StoreError> {
        let bytes = self.required(SectionId::LAYERS, MAX_SECTION_LEN)?;
        let (ids, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() || ids.len() > MAX_LAYERS {
            let part = SectionId::LAYERS.part();
            return Err(FormatError::corrupt(&self.path, part, "impossible number of layers").into());
        }
        Ok(ids.iter().map(|id| LayerId(*id)).collect())
    }

    pub(crate) fn meta_bytes(&self) -> Result<Vec<u8>, StoreError> {
        self.required(SectionId::META, MAX_META_LEN)
    }

    fn load(&self, e: &Entry, max_len: u64) -> Result<Vec<u8>, StoreError> {
        let part = e.id.part();
        let bad = |reason| FormatError::corrupt(&self.path, part, reason);
        if e.raw > max_len {
            return Err(bad("section is too long").into());
        }
        let too_long = |_| bad("section is too long");
        let mut stored = vec![0; usize::try_from(e.stored).map_err(too_long)?];
        read_at(&self.file, &self.path, &mut stored, e.offset, || {
            let found = self.file.metadata().map_or(0, |m| m.len());
            FormatError::Truncated { file: self.path.clone(), expected: self.len, found }
        })?;
        if hash(&stored) != e.hash {
            return Err(FormatError::HashMismatch { file: self.path.clone(), part }.into());
        }
        if e.codec == codec::RAW {
            return Ok(stored);
        }
        let mut raw = vec![0; usize::try_from(e.raw).map_err(too_long)?];
        codec::decode(e.codec, &stored, &mut raw).map_err(|e| bad(e.reason()))?;
        Ok(raw)
    }
}

fn read_at(
    file: &File,
    path: &Path,
    buf: &mut [u8],
    at: u64,
    short: impl FnOnce() -> FormatError,
) -> Result<(), StoreError> {
    match file.read_exact_at(buf, at) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(short().into()),
        result => result.map_err(|e| StoreError::read(path, e)),
    }
}

fn table_hash(header: &[u8; HEADER_LEN], table: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..48]);
    hasher.update(table);
    truncate(hasher.finalize())
}

fn parse_table(table: &[u8], table_end: u64, file_len: u64) -> Result<Vec<Entry>, &'static str> {
    let mut entries: Vec<Entry> = Vec::with_capacity(table.len() / ENTRY_LEN);
    let mut end = table_end;
    for bytes in table.chunks_exact(ENTRY_LEN) {
        let entry = parse_entry(bytes).ok_or("table of sections ends early")?;
        if entry.offset != end {
            return Err("sections do not follow each other");
        }
        end =
            end.checked_add(entry.stored).filter(|end| *end <= file_len).ok_or("section exceeds the file")?;
        let fits = match entry.codec {
            codec::RAW => entry.stored == entry.raw,
            _ => entry.stored <= entry.raw,
        };
        if !fits || entry.raw > MAX_SECTION_LEN {
            return Err("section has an impossible length");
        }
        if entries.iter().any(|e| e.id == entry.id) {
            return Err("section appears twice");
        }
        entries.push(entry);
    }
    if end != file_len {
        return Err("sections do not fill the file");
    }
    Ok(entries)
}

fn parse_entry(bytes: &[u8]) -> Option<Entry> {
    let mut r = Reader::new(bytes);
    Some(Entry {
        id: SectionId(r.u16()?),
        version: r.u16()?,
        required: r.u16()? & FLAG_REQUIRED != 0,
        // The codec's high byte is reserved; a number that does not fit is unknown either way.
        codec: u8::try_from(r.u16()?).unwrap_or(u8::MAX),
        offset: r.u64()?,
        stored: r.u64()?,
        raw: r.u64()?,
        hash: r.array()?,
    })
}

/// The bytes of a manifest.
pub(crate) fn encode(build: BuildId, sections: &[Section]) -> Result<Vec<u8>, StoreError> {
    let invalid = |reason| StoreError::InvalidInput { reason };
    if sections.len() > MAX_SECTIONS {
        return Err(invalid("too many sections"));
    }
    let encoder = Encoder::new(zstd::DEFAULT_COMPRESSION_LEVEL);
    let mut encoder = encoder.map_err(|_| invalid("compression cannot be set up"))?;
    let mut table = Vec::with_capacity(sections.len() * ENTRY_LEN);
    let mut body = Vec::new();
    let body_at = HEADER_LEN + sections.len() * ENTRY_LEN;
    for (i, s) in sections.iter().enumerate() {
        if s.bytes.len() as u64 > MAX_SECTION_LEN {
            return Err(invalid("section longer than 256 MiB"));
        }
        if sections[..i].iter().any(|other| other.id == s.id) {
            return Err(invalid("section given twice"));
        }
        let offset = body.len();
        let codec = if s.bytes.len() < COMPRESS_FROM {
            body.extend_from_slice(&s.bytes);
            codec::RAW
        } else {
            encoder.encode(&s.bytes, &mut body)
        };
        let stored = &body[offset..];
        table.extend_from_slice(&s.id.0.to_le_bytes());
        table.extend_from_slice(&s.version.to_le_bytes());
        table.extend_from_slice(&(if s.required { FLAG_REQUIRED } else { 0 }).to_le_bytes());
        table.extend_from_slice(&u16::from(codec).to_le_bytes());
        table.extend_from_slice(&((body_at + offset) as u64).to_le_bytes());
        table.extend_from_slice(&(stored.len() as u64).to_le_bytes());
        table.extend_from_slice(&(s.bytes.len() as u64).to_le_bytes());
        table.extend_from_slice(&hash(stored));
    }
    let mut header = [0; HEADER_LEN];
    header[0..8].copy_from_slice(&MANIFEST_MAGIC);
    header[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    // At most MAX_SECTIONS.
    header[10..12].copy_from_slice(&u16::try_from(sections.len()).unwrap_or(u16::MAX).to_le_bytes());
    header[16..24].copy_from_slice(&((body_at + body.len()) as u64).to_le_bytes());
    header[32..48].copy_from_slice(&build.0);
    let sum = table_hash(&header, &table);
    header[48..64].copy_from_slice(&sum);
    Ok([&header[..], &table, &body].concat())
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
