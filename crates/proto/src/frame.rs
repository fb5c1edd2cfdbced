//! Framing: the five byte header and an incremental decoder that serves blocking and asynchronous readers alike.

use crate::{FrameError, MAX_FRAME};

/// Bytes before the payload: length and kind.
pub const HEADER_LEN: usize = 5;

/// What a frame carries. A newtype rather than an enum: receivers skip kinds they do not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind(pub u8);

impl Kind {
    /// Host to agent, CBOR: the operation. First frame of every connection.
    pub const REQUEST: Kind = Kind(0x01);
    /// Agent to host, CBOR: the answer.
    pub const REPLY: Kind = Kind(0x02);
    /// Agent to host, CBOR [`crate::RemoteError`]: the operation failed; last frame of the connection.
    pub const ERROR: Kind = Kind(0x03);
    /// Agent to host, CBOR [`crate::Exit`]: the process ended; last frame of the connection.
    pub const EXIT: Kind = Kind(0x04);
    /// Agent to host, CBOR [`crate::WatchEvents`]: changes in a watched directory.
    pub const EVENTS: Kind = Kind(0x05);
    /// Agent to host, raw: standard output of a process.
    pub const STDOUT: Kind = Kind(0x10);
    /// Agent to host, raw: standard error of a process.
    pub const STDERR: Kind = Kind(0x11);
    /// Agent to host, raw: output of a process's terminal.
    pub const PTY: Kind = Kind(0x12);
    /// Either way, raw: contents of a file, or input of a process.
    pub const DATA: Kind = Kind(0x20);
    /// Either way, empty: the data is complete. A connection that closes without it has been cut.
    pub const END: Kind = Kind(0x21);
}

/// One frame, borrowed from the decoder's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the payload is.
    pub kind: Kind,
    /// The payload.
    pub payload: &'a [u8],
}

/// The header of a frame with `payload_len` bytes of payload, which must be less than [`MAX_FRAME`]; longer ones are clamped by
/// no one and refused by the receiver.
pub fn header(kind: Kind, payload_len: usize) -> [u8; HEADER_LEN] {
    let length = u32::try_from(payload_len.saturating_add(1)).unwrap_or(u32::MAX).to_le_bytes();
    [length[0], length[1], length[2], length[3], kind.0]
}

/// A whole frame in one buffer.
pub fn encode(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
    frame.extend_from_slice(&header(kind, payload.len()));
    frame.extend_from_slice(payload);
    frame
}

/// Splits a byte stream into frames. The caller reads into [`Decoder::space`], reports the count to [`Decoder::filled`] and takes frames
/// from [`Decoder::next_frame`] until there is none. The buffer grows with the data that has arrived, never with the length that
/// a header claims, and never beyond one frame of the largest size.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    initial: usize,
}

impl Decoder {
    /// A decoder whose buffer has `initial` bytes once it is used.
    pub fn new(initial: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, end: 0, initial: initial.clamp(64, MAX_FRAME) }
    }

    /// The free part of the buffer, never empty.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            // Compaction alone is enough unless the waiting frame fills most of the buffer.
            if self.end * 2 >= self.buffer.len() {
                let length =
                    (self.buffer.len() * 2).clamp(self.initial, (MAX_FRAME + HEADER_LEN).max(self.end + 1));
                self.buffer.resize(length, 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    /// Says that `count` bytes have been put at the front of [`Decoder::space`].
    pub fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
    }

    /// The next whole frame, or `None` when more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let waiting = &self.buffer[self.start..self.end];
        let Some((prefix, rest)) = waiting.split_first_chunk::<4>() else { return Ok(None) };
        let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if length == 0 {
            return Err(FrameError::Empty);
        }
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length));
        }
        let Some((kind, payload)) = rest.get(..length).and_then(<[u8]>::split_first) else { return Ok(None) };
        self.start += 4 + length;
        Ok(Some(Frame { kind: Kind(*kind), payload }))
    }

    /// Like [`Decoder::next_frame`], except that a [`Kind::DATA`] frame is given as far as it has arrived, with the number of bytes that
    /// are still to come. The buffer is empty then: the caller reads those from the stream itself, straight to where they belong.
    pub fn next_piece(&mut self) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
        let waiting = &self.buffer[self.start..self.end];
        if let Some((prefix, [kind, payload @ ..])) = waiting.split_first_chunk::<4>()
            && Kind(*kind) == Kind::DATA
        {
            let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
            if length <= MAX_FRAME && length > payload.len() + 1 {
                let left = length - 1 - payload.len();
                let from = self.start + HEADER_LEN;
                self.start = self.end;
                return Ok(Some((Frame { kind: Kind::DATA, payload: &self.buffer[from..self.end] }, left)));
            }
        }
        Ok(self.next_frame()?.map(|frame| (frame, 0)))
    }

    /// The bytes that have arrived and belong to no frame taken so far: where frames end, what comes behind them.
    pub fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Whether all bytes that have arrived belong to frames taken so far.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `bytes` in pieces of `step` and collects the frames.
    fn split(bytes: &[u8], step: usize) -> Result<Vec<(Kind, Vec<u8>)>, FrameError> {
        let mut decoder = Decoder::new(64);
        let mut frames = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let space = decoder.space();
            let count = step.min(space.len()).min(rest.len());
            space[..count].copy_from_slice(&rest[..count]);
            decoder.filled(count);
            rest = &rest[count..];
            while let Some(frame) = decoder.next_frame()? {
                frames.push((frame.kind, frame.payload.to_vec()));
            }
        }
        Ok(frames)
    }

    #[test]
    fn rejects_bad_lengths() {
        assert_eq!(split(&[0, 0, 0, 0, 1], 5), Err(FrameError::Empty));
        let mut bytes = u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes().to_vec();
        bytes.push(1);
        assert_eq!(split(&bytes, 1), Err(FrameError::TooLong(MAX_FRAME + 1)));
    }

    #[test]
    fn takes_the_largest_frame() {
        let payload = vec![7; MAX_FRAME - 1];
        let mut bytes = encode(Kind::DATA, &payload);
        bytes.extend(encode(Kind::END, &[]));
        for step in [4093, 1 << 20, 1 << 22] {
            let frames = split(&bytes, step).unwrap();
            assert_eq!(frames, vec![(Kind::DATA, payload.clone()), (Kind::END, vec![])]);
        }
    }

    #[test]
    fn a_claimed_length_allocates_nothing() {
        let mut decoder = Decoder::new(64);
        decoder.space()[..5].copy_from_slice(&header(Kind::DATA, MAX_FRAME - 1));
        decoder.filled(5);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.space().len() <= 128);
    }

    /// As `split`, with pieces: what is left of a frame is taken from the bytes directly.
    fn split_pieces(bytes: &[u8], step: usize) -> Vec<(Kind, Vec<u8>)> {
        let mut decoder = Decoder::new(64);
        let mut frames = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let space = decoder.space();
            let count = step.min(space.len()).min(rest.len());
            space[..count].copy_from_slice(&rest[..count]);
            decoder.filled(count);
            rest = &rest[count..];
            while let Some((frame, left)) = decoder.next_piece().unwrap() {
                frames.push((frame.kind, [frame.payload, &rest[..left]].concat()));
                rest = &rest[left..];
            }
        }
        frames
    }

    proptest! {
        #[test]
        fn pieces_give_the_same_frames(
            frames in proptest::collection::vec((0x1fu8..0x22, proptest::collection::vec(any::<u8>(), 0..300)), 0..12),
            step in 1usize..700,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| encode(Kind(*kind), payload)).collect();
            let expected: Vec<_> = frames.into_iter().map(|(kind, payload)| (Kind(kind), payload)).collect();
            prop_assert_eq!(split_pieces(&bytes, step), expected);
        }

        #[test]
        fn any_split_gives_the_same_frames(
            frames in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..12),
            step in 1usize..700,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| encode(Kind(*kind), payload)).collect();
            let expected: Vec<_> = frames.into_iter().map(|(kind, payload)| (Kind(kind), payload)).collect();
            prop_assert_eq!(split(&bytes, step), Ok(expected));
        }

        #[test]
        fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), step in 1usize..50) {
            let _ = split(&bytes, step);
        }
    }
}
