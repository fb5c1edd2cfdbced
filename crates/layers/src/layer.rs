//! Layer files: immutable, content-named, made of independently compressed frames (SNAPSHOT.md, section 2).
//!
//! A layer is read with `pread`, not mapped: a file that shrinks under a mapping would raise SIGBUS and take the whole
//! Node process with it, while a short read is an error like any other. Beside a decode the copy is small.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::codec::Scratch;
use crate::error::{FormatError, ImageError, Part, StoreError};
use crate::format::{
    FORMAT_VERSION, FRAME_PAGES, HEADER_LEN, Hash, LAYER_MAGIC, MAX_FRAMES, PAGE_SIZE, Reader, hash,
};
use crate::ids::LayerId;

const BYTES_PER_FRAME: u64 = 4 + 1 + 1 + 16;
/// Stored bytes are gathered before they are written.
const WRITE_BUFFER: usize = 256 << 10;

/// Where a frame is and what it must be.
#[derive(Debug, Clone, Copy)]
struct Frame {
    offset: u64,
    stored: u32,
    pages: u8,
    codec: u8,
    hash: Hash,
}

/// An open layer. A collector may take its name away; its content stays as long as it is open.
#[derive(Debug)]
pub(crate) struct Layer {
    id: LayerId,
    path: PathBuf,
    file: File,
    frames: Vec<Frame>,
    file_len: u64,
}

impl Layer {
    /// Opens a layer and checks header and index against its name.
    pub(crate) fn open(path: &Path, id: LayerId) -> Result<Layer, StoreError> {
        let file = File::open(path).map_err(|e| StoreError::read(path, e))?;
        let (frames, file_len) = read_index(path, &file, id)?;
        Ok(Layer { id, path: path.to_owned(), file, frames, file_len })
    }

    pub(crate) fn id(&self) -> LayerId {
        self.id
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn file_len(&self) -> u64 {
        self.file_len
    }

    pub(crate) fn frame_count(&self) -> u32 {
        // Checked against MAX_FRAMES when the index was read.
        u32::try_from(self.frames.len()).unwrap_or(u32::MAX)
    }

    /// Slots are numbered with full frames, whether or not each of them is full.
    pub(crate) fn slots(&self) -> u32 {
        self.frame_count() * FRAME_PAGES as u32
    }

    /// Reads, checks and decodes one frame into the scratch space; returns its content.
    pub(crate) fn read_frame<'a>(
        &self,
        number: u32,
        scratch: &'a mut Scratch,
    ) -> Result<&'a [u8], ImageError> {
        let part = Part::Frame(number);
        let bad = |reason| FormatError::corrupt(&self.path, part, reason);
        let frame = self.frames.get(number as usize).ok_or_else(|| bad("no such frame"))?;
        // At most FRAME_BYTES: checked with the index.
        let stored = &mut scratch.stored[..frame.stored as usize];
        self.file.read_exact_at(stored, frame.offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                let found = self.file.metadata().map_or(0, |m| m.len());
                FormatError::Truncated { file: self.path.clone(), expected: self.file_len, found }.into()
            }
            _ => ImageError::Read { path: self.path.clone(), source: e },
        })?;
        if hash(stored) != frame.hash {
            return Err(FormatError::HashMismatch { file: self.path.clone(), part }.into());
        }
        let len = usize::from(frame.pages) * PAGE_SIZE;
        let decoded = scratch.decode_own(frame.codec, frame.stored as usize, len);
        decoded.map_err(|e| bad(e.reason()))?;
        Ok(&scratch.content[..len])
    }

    /// Checks every frame.
    pub(crate) fn verify(&self) -> Result<(), ImageError> {
        let all = |scratch: &mut Scratch| {
            (0..self.frame_count()).try_for_each(|n| self.read_frame(n, scratch).map(|_| ()))
        };
        Scratch::with(all).map_err(ImageError::Memory)?
    }
}

/// Reads header and index: nothing of the file is used before its hash was compared with the layer's name.
fn read_index(path: &Path, file: &File, id: LayerId) -> Result<(Vec<Frame>, u64), StoreError> {
    let found = file.metadata().map_err(|e| StoreError::read(path, e))?.len();
    let truncated = |expected| FormatError::Truncated { file: path.to_owned(), expected, found };
    let bad = |reason| FormatError::corrupt(path, Part::Header, reason);
    let read = |buf: &mut [u8], at: u64| match file.read_exact_at(buf, at) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(truncated(at + buf.len() as u64).into()),
        result => result.map_err(|e| StoreError::read(path, e)),
    };
    let mut header = [0; HEADER_LEN];
    read(&mut header, 0)?;
    let fields = Header::parse(&header);
    if fields.magic != LAYER_MAGIC {
        return Err(FormatError::NotASnapshot { file: path.to_owned(), expected: "a layer" }.into());
    }
    if fields.version > FORMAT_VERSION {
        let (found, supported) = (fields.version, FORMAT_VERSION);
        let file = path.to_owned();
        return Err(FormatError::NewerVersion { file, part: Part::Header, found, supported }.into());
    }
    if fields.file_len != found {
        return Err(truncated(fields.file_len).into());
    }
    let count = usize::try_from(fields.frames).unwrap_or(usize::MAX);
    let index_len = u64::from(fields.frames) * BYTES_PER_FRAME;
    // The index ends the file, so a count that is larger than the file cannot pass.
    if count > MAX_FRAMES || fields.index_at.checked_add(index_len) != Some(found) {
        return Err(bad("index does not fit the file").into());
    }
    let mut index = vec![0; usize::try_from(index_len).map_err(|_| bad("index does not fit into memory"))?];
    read(&mut index, fields.index_at)?;
    if layer_id(&header, &index) != id {
        return Err(FormatError::HashMismatch { file: path.to_owned(), part: Part::Header }.into());
    }
    if (fields.version, fields.page_shift, fields.frame_pages) != (FORMAT_VERSION, 12, FRAME_PAGES as u8) {
        return Err(bad("unknown page or frame size").into());
    }
    let frames = parse_frames(&index, count, fields.index_at).map_err(bad)?;
    Ok((frames, found))
}

fn parse_frames(index: &[u8], count: usize, index_at: u64) -> Result<Vec<Frame>, &'static str> {
    let mut r = Reader::new(index);
    let short = "index ends early";
    let lengths = r.column_u32(count).ok_or(short)?;
    let pages = r.bytes(count).ok_or(short)?;
    let codecs = r.bytes(count).ok_or(short)?;
    let (hashes, _) = r.bytes(count * 16).ok_or(short)?.as_chunks::<16>();
    let mut frames = Vec::with_capacity(count);
    let mut offset = HEADER_LEN as u64;
    for (((&stored, &pages), &codec), &hash) in lengths.iter().zip(pages).zip(codecs).zip(hashes) {
        if pages == 0 || usize::from(pages) > FRAME_PAGES {
            return Err("frame with an impossible number of pages");
        }
        if stored as usize > usize::from(pages) * PAGE_SIZE {
            return Err("frame is longer than its content");
        }
        frames.push(Frame { offset, stored, pages, codec, hash });
        offset += u64::from(stored);
    }
    if offset != index_at {
        return Err("frames do not fill the space before the index");
    }
    Ok(frames)
}

struct Header {
    magic: [u8; 8],
    version: u16,
    page_shift: u8,
    frame_pages: u8,
    frames: u32,
    index_at: u64,
    file_len: u64,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_LEN]) -> Header {
        let at = |from: usize| -> [u8; 8] { std::array::from_fn(|i| bytes[from + i]) };
        Header {
            magic: at(0),
            version: u16::from_le_bytes([bytes[8], bytes[9]]),
            page_shift: bytes[10],
            frame_pages: bytes[11],
            frames: u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]),
            index_at: u64::from_le_bytes(at(16)),
            file_len: u64::from_le_bytes(at(24)),
        }
    }

    fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..8].copy_from_slice(&self.magic);
        out[8..10].copy_from_slice(&self.version.to_le_bytes());
        out[10] = self.page_shift;
        out[11] = self.frame_pages;
        out[12..16].copy_from_slice(&self.frames.to_le_bytes());
        out[16..24].copy_from_slice(&self.index_at.to_le_bytes());
        out[24..32].copy_from_slice(&self.file_len.to_le_bytes());
        out
    }
}

fn layer_id(header: &[u8; HEADER_LEN], index: &[u8]) -> LayerId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher.update(index);
    LayerId(*hasher.finalize().as_bytes())
}

/// A frame that is ready to be written.
#[derive(Debug)]
pub(crate) struct EncodedFrame {
    pub(crate) stored: Vec<u8>,
    pub(crate) pages: u8,
    pub(crate) codec: u8,
    pub(crate) hash: Hash,
}

/// Writes a layer file frame by frame; the header comes last, so an unfinished file is not a layer.
#[derive(Debug)]
pub(crate) struct LayerWriter {
    path: PathBuf,
    out: BufWriter<File>,
    lengths: Vec<u32>,
    pages: Vec<u8>,
    codecs: Vec<u8>,
    hashes: Vec<Hash>,
    offset: u64,
    limit: u64,
}

impl LayerWriter {
    /// `file` is new and empty; `limit` bounds the whole file.
    pub(crate) fn new(path: &Path, file: File, limit: u64) -> Result<LayerWriter, StoreError> {
        let mut writer = LayerWriter {
            path: path.to_owned(),
            out: BufWriter::with_capacity(WRITE_BUFFER, file),
            lengths: Vec::new(),
            pages: Vec::new(),
            codecs: Vec::new(),
            hashes: Vec::new(),
            offset: 0,
            limit,
        };
        writer.write(&[0; HEADER_LEN])?;
        Ok(writer)
    }

    /// The slot of the next frame's first page.
    pub(crate) fn next_slot(&self) -> u32 {
        u32::try_from(self.lengths.len() * FRAME_PAGES).unwrap_or(u32::MAX)
    }

    pub(crate) fn frame_count(&self) -> usize {
        self.lengths.len()
    }

    pub(crate) fn push(&mut self, frame: &EncodedFrame) -> Result<(), StoreError> {
        if self.lengths.len() >= MAX_FRAMES {
            return Err(StoreError::InvalidInput { reason: "more pages than a layer can hold" });
        }
        self.write(&frame.stored)?;
        // A frame is at most 64 KiB.
        self.lengths.push(u32::try_from(frame.stored.len()).unwrap_or(u32::MAX));
        self.pages.push(frame.pages);
        self.codecs.push(frame.codec);
        self.hashes.push(frame.hash);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.offset += bytes.len() as u64;
        let result = if self.offset > self.limit {
            Err(io::Error::new(io::ErrorKind::QuotaExceeded, "limit of this snapshot reached"))
        } else {
            self.out.write_all(bytes)
        };
        result.map_err(|e| StoreError::write("write", &self.path, e))
    }

    /// Writes index and header and makes the content durable.
    pub(crate) fn finish(mut self) -> Result<(LayerId, File, u64), StoreError> {
        let index_at = self.offset;
        let frames = u32::try_from(self.lengths.len()).unwrap_or(u32::MAX);
        let mut index = Vec::with_capacity(self.lengths.len() * BYTES_PER_FRAME as usize);
        self.lengths.iter().for_each(|n| index.extend_from_slice(&n.to_le_bytes()));
        index.extend_from_slice(&self.pages);
        index.extend_from_slice(&self.codecs);
        index.extend_from_slice(self.hashes.as_flattened());
        self.write(&index)?;
        let header = Header {
            magic: LAYER_MAGIC,
            version: FORMAT_VERSION,
            page_shift: 12,
            frame_pages: FRAME_PAGES as u8,
            frames,
            index_at,
            file_len: self.offset,
        };
        let header = header.encode();
        let fail = |e| StoreError::write("write", &self.path, e);
        let file = self.out.into_inner().map_err(|e| fail(e.into_error()))?;
        file.write_all_at(&header, 0).map_err(fail)?;
        file.sync_data().map_err(fail)?;
        Ok((layer_id(&header, &index), file, self.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Encoder, RAW, ZSTD};

    fn frame(pages: u8, fill: u8) -> EncodedFrame {
        let raw = vec![fill; usize::from(pages) * PAGE_SIZE];
        let mut stored = Vec::new();
        let codec = Encoder::new(3).unwrap().encode(&raw, &mut stored);
        EncodedFrame { hash: hash(&stored), stored, pages, codec }
    }

    fn write(path: &Path, frames: &[EncodedFrame]) -> Result<LayerId, StoreError> {
        let mut w = LayerWriter::new(path, File::create(path).unwrap(), u64::MAX)?;
        frames.iter().try_for_each(|f| w.push(f))?;
        Ok(w.finish()?.0)
    }

    fn open(path: &Path, id: LayerId) -> Result<Layer, FormatError> {
        Layer::open(path, id).map_err(|e| match e {
            StoreError::Format(e) => e,
            e => panic!("{e}"),
        })
    }

    fn read(layer: &Layer, frame: u32) -> Result<Vec<u8>, ImageError> {
        Scratch::with(|s| layer.read_frame(frame, s).map(<[u8]>::to_vec)).unwrap()
    }

    /// The id that a file with this header and index would have: for testing rules behind the hash.
    fn forge(bytes: &[u8], index_at: usize) -> LayerId {
        layer_id(bytes[..HEADER_LEN].try_into().unwrap(), &bytes[index_at..])
    }

    #[test]
    fn frames_come_back_and_content_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let id = write(&path, &[frame(16, 1), frame(3, 2)]).unwrap();
        let layer = open(&path, id).unwrap();
        assert_eq!((layer.id(), layer.frame_count(), layer.slots()), (id, 2, 32));
        assert_eq!(layer.file_len(), std::fs::metadata(&path).unwrap().len());
        assert_eq!(read(&layer, 0).unwrap(), [1; 16 * PAGE_SIZE]);
        assert_eq!(read(&layer, 1).unwrap(), [2; 3 * PAGE_SIZE]);
        assert!(matches!(read(&layer, 2), Err(ImageError::Format(FormatError::Corrupt { .. }))));
        layer.verify().unwrap();
        assert_eq!(write(&dir.path().join("b"), &[frame(16, 1), frame(3, 2)]).unwrap(), id);
        assert_ne!(write(&dir.path().join("c"), &[frame(16, 1), frame(3, 3)]).unwrap(), id);
    }

    #[test]
    fn an_empty_layer_is_valid() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let id = write(&path, &[]).unwrap();
        assert_eq!(open(&path, id).unwrap().slots(), 0);
    }

    #[test]
    fn every_reason_for_refusal_has_its_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let id = write(&path, &[frame(16, 1), frame(2, 2)]).unwrap();
        let good = std::fs::read(&path).unwrap();
        let index_at = good.len() - 2 * BYTES_PER_FRAME as usize;
        let put = |at: usize, bytes: &[u8]| {
            let mut b = good.clone();
            b[at..at + bytes.len()].copy_from_slice(bytes);
            std::fs::write(&path, &b).unwrap();
            b
        };
        put(0, b"x");
        assert!(matches!(open(&path, id), Err(FormatError::NotASnapshot { .. })));
        put(8, &[2]);
        assert!(matches!(open(&path, id), Err(FormatError::NewerVersion { found: 2, supported: 1, .. })));
        put(24, &[0]);
        assert!(matches!(open(&path, id), Err(FormatError::Truncated { .. })));
        put(12, &u32::MAX.to_le_bytes());
        assert!(matches!(open(&path, id), Err(FormatError::Corrupt { .. })));
        put(40, &[1]);
        assert!(matches!(open(&path, id), Err(FormatError::HashMismatch { part: Part::Header, .. })));
        put(index_at, &[0]);
        assert!(matches!(open(&path, id), Err(FormatError::HashMismatch { part: Part::Header, .. })));
        // Behind the hash: a hostile writer can make it right.
        for (at, value, want) in [
            (10, 13u8, "unknown page or frame size"),
            (index_at, 0, "frames do not fill the space before the index"),
            (index_at + 3, 1, "frame is longer than its content"),
            (index_at + 8, 0, "frame with an impossible number of pages"),
            (index_at + 8, 17, "frame with an impossible number of pages"),
        ] {
            let forged = forge(&put(at, &[value]), index_at);
            match open(&path, forged) {
                Err(FormatError::Corrupt { reason, .. }) => assert_eq!(reason, want),
                other => panic!("{other:?}"),
            }
        }
        for (at, value, want) in [
            (index_at + 8, 15, DecodeReason::Content),
            (index_at + 10, RAW, DecodeReason::Content),
            (index_at + 10, 7, DecodeReason::Codec),
        ] {
            let layer = open(&path, forge(&put(at, &[value]), index_at)).unwrap();
            match read(&layer, 0) {
                Err(ImageError::Format(FormatError::Corrupt { reason, part: Part::Frame(0), .. })) => {
                    assert_eq!(reason.contains("codec"), matches!(want, DecodeReason::Codec), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
        put(HEADER_LEN + 2, &[0xff]);
        let layer = open(&path, id).unwrap();
        let damaged = read(&layer, 0);
        assert!(matches!(
            damaged,
            Err(ImageError::Format(FormatError::HashMismatch { part: Part::Frame(0), .. }))
        ));
        assert!(layer.verify().is_err());
        assert_eq!(good[index_at + 10], ZSTD);
    }

    enum DecodeReason {
        Content,
        Codec,
    }

    #[test]
    fn truncation_at_every_length_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let id = write(&path, &[frame(16, 1)]).unwrap();
        let good = std::fs::read(&path).unwrap();
        let layer = open(&path, id).unwrap();
        for len in 0..good.len() {
            std::fs::write(&path, &good[..len]).unwrap();
            assert!(matches!(open(&path, id), Err(FormatError::Truncated { .. })), "{len}");
        }
        // A layer that is cut while it is open.
        std::fs::write(&path, &good[..HEADER_LEN + 3]).unwrap();
        let got = read(&layer, 0);
        assert!(matches!(got, Err(ImageError::Format(FormatError::Truncated { .. }))));
        std::fs::write(&path, [&good[..], &[0]].concat()).unwrap();
        assert!(matches!(open(&path, id), Err(FormatError::Truncated { .. })));
    }

    #[test]
    fn the_limit_is_a_full_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut w = LayerWriter::new(&path, File::create(&path).unwrap(), 100).unwrap();
        let raw = EncodedFrame { stored: vec![1; 4096], pages: 1, codec: RAW, hash: hash(&[1; 4096]) };
        assert!(matches!(w.push(&raw), Err(StoreError::DiskFull { .. })));
    }
}
