//! Constants, limits and little-endian reading shared by the file formats (SNAPSHOT.md, sections 1 to 4).
//!
//! Everything that is read from a file goes through [`Reader`], which cannot run past the end, and every count
//! is checked against the bytes that are there before anything of its size is allocated.

/// Bytes of a page, in memory and on disk alike.
pub const PAGE_SIZE: usize = 4096;
/// Pages of a full frame.
pub const FRAME_PAGES: usize = 16;
/// Bytes of a full frame before compression.
pub(crate) const FRAME_BYTES: usize = PAGE_SIZE * FRAME_PAGES;
/// The newest version of layer and manifest files that this build reads, and the one it writes.
pub const FORMAT_VERSION: u16 = 1;

/// One page of memory or disk.
pub type Page = [u8; PAGE_SIZE];
/// A page of zeros.
pub(crate) const ZERO_PAGE: Page = [0; PAGE_SIZE];

pub(crate) const LAYER_MAGIC: [u8; 8] = *b"AMBRLAYR";
pub(crate) const MANIFEST_MAGIC: [u8; 8] = *b"AMBRSNAP";
pub(crate) const HEADER_LEN: usize = 64;

/// Largest page number plus one: 16 TiB of address space.
pub(crate) const MAX_PAGES: u64 = u32::MAX as u64;
/// Sections of one manifest.
pub(crate) const MAX_SECTIONS: usize = 1024;
/// Bytes of one section, uncompressed.
pub(crate) const MAX_SECTION_LEN: u64 = 256 << 20;
/// Bytes of the metadata section, uncompressed: it is read for every listing.
pub(crate) const MAX_META_LEN: u64 = 1 << 20;
/// Layers that one manifest may name; 0 is reserved for zeros.
pub(crate) const MAX_LAYERS: usize = u16::MAX as usize - 1;
/// Frames of one layer: slots are 32-bit.
pub(crate) const MAX_FRAMES: usize = (u32::MAX as usize) / FRAME_PAGES;

/// A BLAKE3 hash cut to 128 bits: enough to notice any damage, short enough to keep per frame.
pub(crate) type Hash = [u8; 16];

pub(crate) fn hash(bytes: &[u8]) -> Hash {
    truncate(blake3::hash(bytes))
}

pub(crate) fn truncate(full: blake3::Hash) -> Hash {
    let mut short = [0; 16];
    short.copy_from_slice(&full.as_bytes()[..16]);
    short
}

/// Reads little-endian numbers from a byte slice; `None` at its end.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A column of `len` 32-bit numbers.
    pub(crate) fn column_u32(&mut self, len: usize) -> Option<Vec<u32>> {
        let (chunks, _) = self.bytes(len.checked_mul(4)?)?.as_chunks::<4>();
        Some(chunks.iter().map(|c| u32::from_le_bytes(*c)).collect())
    }

    /// A column of `len` 16-bit numbers.
    pub(crate) fn column_u16(&mut self, len: usize) -> Option<Vec<u16>> {
        let (chunks, _) = self.bytes(len.checked_mul(2)?)?.as_chunks::<2>();
        Some(chunks.iter().map(|c| u16::from_le_bytes(*c)).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_stops_at_the_end() {
        let mut r = Reader::new(&[1, 0, 2, 0, 0, 0, 9]);
        assert_eq!(r.u16(), Some(1));
        assert_eq!(r.u32(), Some(2));
        assert_eq!(r.u16(), None);
        assert_eq!(r.bytes(1), Some(&[9][..]));
        assert!(r.is_empty());
        assert_eq!(Reader::new(&[0; 8]).column_u32(usize::MAX), None);
        assert_eq!(Reader::new(&[0; 8]).column_u32(3), None);
        assert_eq!(Reader::new(&[1, 0, 0, 0, 2, 0, 0, 0]).column_u32(2), Some(vec![1, 2]));
        assert_eq!(Reader::new(&[1, 0, 2, 0]).column_u16(2), Some(vec![1, 2]));
    }
}
