//! Large content on its way to the disk.
//!
//! It goes past the page cache where the file system allows that (`O_DIRECT`): through the cache every page of it would cost thousands of
//! instructions, and memory that the guest's programs, and every snapshot of the guest, would have to do without.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Bytes per write.
const BLOCK: usize = 1 << 20;

/// Alignment, in memory and in the file, that every disk is content with.
const ALIGNMENT: usize = 4096;

/// A file that grows by whole blocks.
pub(super) struct Bulk {
    file: File,
    block: Block,
    /// Bytes of the block that are content and not written yet.
    filled: usize,
    /// Bytes written.
    written: u64,
}

/// From this size on a file is read directly.
pub(super) const WORTHWHILE: u64 = BLOCK as u64;

/// Pieces of a block that is sent.
const PIECE: usize = BLOCK / 2;

/// Hands the content of a file to `send`, piece by piece.
pub(super) fn read<E>(
    file: &File,
    offset: u64,
    mut left: u64,
    mut send: impl FnMut(&[u8]) -> Result<(), E>,
    fail: impl Fn(&io::Error) -> E,
) -> Result<(), E> {
    let mut block = Block::new();
    let mut at = offset;
    let mut direct = offset.is_multiple_of(ALIGNMENT as u64) && set_direct(file, true);
    while left > 0 {
        let count = match file.read_at(block.bytes_mut(), at) {
            Ok(0) => break,
            Ok(count) => count.min(usize::try_from(left).unwrap_or(usize::MAX)),
            Err(error) if direct && refused(&error) => {
                direct = false;
                set_direct(file, false);
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(fail(&error)),
        };
        for piece in block.bytes()[..count].chunks(PIECE) {
            send(piece)?;
        }
        at += count as u64;
        left -= count as u64;
        // A file that ends here, or grows at this moment: what follows is not aligned.
        if direct && !at.is_multiple_of(ALIGNMENT as u64) {
            direct = false;
            set_direct(file, false);
        }
    }
    Ok(())
}

/// An aligned buffer.
struct Block {
    memory: Vec<u8>,
    start: usize,
}

impl Block {
    fn new() -> Self {
        let memory = vec![0; BLOCK + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + BLOCK]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + BLOCK]
    }
}

impl Bulk {
    /// Takes over an empty file.
    pub(super) fn new(file: File) -> Self {
        set_direct(&file, true);
        Self { file, block: Block::new(), filled: 0, written: 0 }
    }

    /// Takes a piece.
    pub(super) fn add(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let space = self.space();
            let count = space.len().min(data.len());
            space[..count].copy_from_slice(&data[..count]);
            data = &data[count..];
            self.filled(count)?;
        }
        Ok(())
    }

    /// Room for content, never empty.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.block.bytes_mut()[self.filled..]
    }

    /// Says that `count` bytes have been put at the front of the space.
    pub(super) fn filled(&mut self, count: usize) -> io::Result<()> {
        self.filled += count;
        if self.filled == BLOCK {
            write_at(&self.file, self.block.bytes(), self.written)?;
            self.written += BLOCK as u64;
            self.filled = 0;
        }
        Ok(())
    }

    /// Writes what is left; returns the length of the file.
    pub(super) fn finish(&mut self) -> io::Result<u64> {
        write_tail(&self.file, &self.block.bytes()[..self.filled], self.written)?;
        self.written += self.filled as u64;
        self.filled = 0;
        Ok(self.written)
    }

    /// Copies the finished file over the start of another.
    pub(super) fn copy_to(&self, target: &File) -> io::Result<()> {
        let mut block = Block::new();
        let mut at = 0;
        set_direct(&self.file, true);
        set_direct(target, true);
        while at < self.written {
            let count = match self.file.read_at(block.bytes_mut(), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if refused(&error) && set_direct(&self.file, false) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let piece = &block.bytes()[..count];
            if count == BLOCK {
                write_at(target, piece, at)?
            } else {
                write_tail(target, piece, at)?
            }
            at += count as u64;
        }
        set_direct(target, false);
        Ok(())
    }
}

/// Writes aligned bytes, through the page cache if need be.
fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    match file.write_all_at(bytes, at) {
        Err(error) if refused(&error) && set_direct(file, false) => file.write_all_at(bytes, at),
        result => result,
    }
}

/// Writes bytes of any length: what is not a multiple of the alignment has to go through the page cache.
fn write_tail(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let (aligned, rest) = bytes.split_at(bytes.len() / ALIGNMENT * ALIGNMENT);
    if !aligned.is_empty() {
        write_at(file, aligned, at)?;
    }
    if rest.is_empty() {
        return Ok(());
    }
    set_direct(file, false);
    file.write_all_at(rest, at + aligned.len() as u64)
}

/// What file systems say that can only be written through the page cache, here or at all.
fn refused(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::INVAL.raw_os_error())
}

/// Switches the way past the page cache on or off. Whether it changed anything.
fn set_direct(file: &File, direct: bool) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    if flags.contains(OFlags::DIRECT) == direct {
        return false;
    }
    let flags = if direct { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
    rustix::fs::fcntl_setfl(file, flags).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..3 * BLOCK + 777).map(|i| (i * 7 % 251) as u8).collect();
        let path = dir.path().join("f");
        std::fs::write(&path, &content).unwrap();
        for (offset, length) in
            [(0, usize::MAX), (1, usize::MAX), (4096, BLOCK + 5), (content.len() + 1, 9), (7, 0)]
        {
            let file = File::open(&path).unwrap();
            let mut got = Vec::new();
            let take = |piece: &[u8]| {
                got.extend_from_slice(piece);
                Ok::<(), io::ErrorKind>(())
            };
            read(&file, offset as u64, length as u64, take, io::Error::kind).unwrap();
            let rest = content.get(offset..).unwrap_or_default();
            assert!(got == rest[..length.min(rest.len())], "{offset} {length}");
        }
    }

    #[test]
    fn any_length_arrives_and_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        for length in [0, 1, 4095, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 4096, 3 * BLOCK + 12_345] {
            let content: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
            let path = dir.path().join(length.to_string());
            let mut options = File::options();
            let file = options.read(true).write(true).create_new(true).open(&path).unwrap();
            let mut bulk = Bulk::new(file);
            for piece in content.chunks(100_003) {
                bulk.add(piece).unwrap();
            }
            assert_eq!(bulk.finish().unwrap(), length as u64);
            assert!(std::fs::read(&path).unwrap() == content, "{length}");
            let copy = dir.path().join("copy");
            std::fs::write(&copy, vec![1; 2 * BLOCK]).unwrap();
            let target = File::options().write(true).open(&copy).unwrap();
            bulk.copy_to(&target).unwrap();
            target.set_len(length as u64).unwrap();
            assert!(std::fs::read(&copy).unwrap() == content, "copy of {length}");
        }
    }
}
