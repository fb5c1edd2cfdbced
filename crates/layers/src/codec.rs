//! Compression of frames and sections: bounded decoding with contexts that are reused between calls.
//!
//! Codec 0 stores bytes as they are, codec 1 is one zstd frame. A result always has the exact length that the index
//! or section table promises, so a hostile frame cannot make this process allocate or write more than that.

use std::io;
use std::sync::{Mutex, PoisonError};

use zstd::bulk::{Compressor, Decompressor};

use crate::format::FRAME_BYTES;

/// Stored as is.
pub(crate) const RAW: u8 = 0;
/// One zstd frame.
pub(crate) const ZSTD: u8 = 1;

/// What decoding a frame needs: a context of some 150 KiB and two buffers.
pub(crate) struct Scratch {
    decoder: Decompressor<'static>,
    /// For bytes as they are stored.
    pub(crate) stored: Box<[u8; FRAME_BYTES]>,
    /// For decoded bytes.
    pub(crate) content: Box<[u8; FRAME_BYTES]>,
}

/// Scratch space that waits for its next use, shared by all threads of the process instead of kept per thread: many
/// sandboxes are idle most of the time.
static IDLE: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());
const IDLE_MAX: usize = 16;

impl Scratch {
    fn new() -> io::Result<Scratch> {
        let decoder = Decompressor::new()?;
        Ok(Scratch { decoder, stored: Box::new([0; FRAME_BYTES]), content: Box::new([0; FRAME_BYTES]) })
    }

    /// Lends scratch space to `work`. Its buffers hold leftovers of earlier uses.
    pub(crate) fn with<T>(work: impl FnOnce(&mut Scratch) -> T) -> io::Result<T> {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = match idle {
            Some(scratch) => scratch,
            None => Scratch::new()?,
        };
        let result = work(&mut scratch);
        let mut pool = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < IDLE_MAX {
            pool.push(scratch);
        }
        Ok(result)
    }

    /// Decodes the first `stored` bytes of its own buffer into the first `len` bytes of `content`.
    pub(crate) fn decode_own(&mut self, codec: u8, stored: usize, len: usize) -> Result<(), DecodeError> {
        decode_with(&mut self.decoder, codec, &self.stored[..stored], &mut self.content[..len])
    }
}

/// Why decoding failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DecodeError {
    /// The codec's number is unknown.
    UnknownCodec,
    /// The bytes are not a frame of this codec, or decode to another length.
    Invalid,
}

impl DecodeError {
    pub(crate) fn reason(self) -> &'static str {
        match self {
            DecodeError::UnknownCodec => "unknown compression codec",
            DecodeError::Invalid => "compressed data does not decode to its recorded length",
        }
    }
}

/// Decodes `stored` so that it fills `out` exactly.
pub(crate) fn decode(codec: u8, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    Scratch::with(|s| decode_with(&mut s.decoder, codec, stored, out)).unwrap_or(Err(DecodeError::Invalid))
}

fn decode_with(
    decoder: &mut Decompressor<'_>,
    codec: u8,
    stored: &[u8],
    out: &mut [u8],
) -> Result<(), DecodeError> {
    match codec {
        RAW if stored.len() == out.len() => {
            out.copy_from_slice(stored);
            Ok(())
        }
        ZSTD => match decoder.decompress_to_buffer(stored, out) {
            Ok(n) if n == out.len() => Ok(()),
            _ => Err(DecodeError::Invalid),
        },
        RAW => Err(DecodeError::Invalid),
        _ => Err(DecodeError::UnknownCodec),
    }
}

/// Compresses with one level; keeps its context.
pub(crate) struct Encoder {
    zstd: Compressor<'static>,
}

impl Encoder {
    pub(crate) fn new(level: i32) -> io::Result<Encoder> {
        Ok(Encoder { zstd: Compressor::new(level)? })
    }

    /// Appends the encoded form of `raw` to `out` and returns its codec. What compression does not make smaller by a
    /// sixteenth is stored as it is: reading it back is then a copy.
    pub(crate) fn encode(&mut self, raw: &[u8], out: &mut Vec<u8>) -> u8 {
        let limit = raw.len() - raw.len() / 16;
        let start = out.len();
        out.resize(start + limit, 0);
        match self.zstd.compress_to_buffer(raw, &mut out[start..]) {
            Ok(n) => {
                out.truncate(start + n);
                ZSTD
            }
            // The only failure is a destination that is too small.
            Err(_) => {
                out.truncate(start);
                out.extend_from_slice(raw);
                RAW
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_bounds() {
        let text: Vec<u8> = b"amber ".iter().copied().cycle().take(10_000).collect();
        let mut enc = Encoder::new(3).unwrap();
        let mut stored = b"before".to_vec();
        assert_eq!(enc.encode(&text, &mut stored), ZSTD);
        assert!(stored.len() < 200 && stored.starts_with(b"before"));
        let frame = &stored[6..];
        let mut out = vec![0; 10_000];
        decode(ZSTD, frame, &mut out).unwrap();
        assert_eq!(out, text);
        assert_eq!(decode(ZSTD, frame, &mut vec![0; 9_999]), Err(DecodeError::Invalid));
        assert_eq!(decode(ZSTD, frame, &mut vec![0; 10_001]), Err(DecodeError::Invalid));
        assert_eq!(decode(ZSTD, &frame[..frame.len() - 1], &mut out), Err(DecodeError::Invalid));
        assert_eq!(decode(ZSTD, b"", &mut out), Err(DecodeError::Invalid));
        assert_eq!(decode(9, frame, &mut out), Err(DecodeError::UnknownCodec));
    }

    #[test]
    fn what_does_not_shrink_is_stored_raw() {
        let mut noise = vec![0; 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut stored = Vec::new();
        assert_eq!(Encoder::new(1).unwrap().encode(&noise, &mut stored), RAW);
        assert_eq!(stored, noise);
        let mut out = vec![1; 4096];
        decode(RAW, &stored, &mut out).unwrap();
        assert_eq!(out, noise);
        assert_eq!(decode(RAW, &stored[1..], &mut out), Err(DecodeError::Invalid));
    }
}
