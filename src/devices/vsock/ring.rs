//! A bounded byte queue: one direction of one stream. Grows in powers of two up to its bound, so that the many
//! short conversations cost little memory.

/// The most a stream buffers in one direction; also what is advertised to the guest.
pub(super) const CAPACITY: usize = 512 * 1024;
const FIRST: usize = 4096;

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Ring {
    bytes: Vec<u8>,
    head: usize,
    len: usize,
}

impl Ring {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How much more fits.
    pub(super) fn free(&self) -> usize {
        CAPACITY - self.len
    }

    /// Empties the queue and gives its memory back.
    pub(super) fn clear(&mut self) {
        *self = Ring::default();
    }

    /// The content, oldest first.
    pub(super) fn slices(&self) -> [&[u8]; 2] {
        let first = self.len.min(self.bytes.len() - self.head);
        [&self.bytes[self.head..self.head + first], &self.bytes[..self.len - first]]
    }

    /// Drops the oldest `count` bytes.
    pub(super) fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        self.head = if self.len == 0 { 0 } else { (self.head + count) % self.bytes.len() };
    }

    /// Room for the next `count` bytes, which must fit; they count from [`commit`](Self::commit) on.
    pub(super) fn reserve(&mut self, count: usize) -> [&mut [u8]; 2] {
        let count = count.min(self.free());
        if self.len + count > self.bytes.len() {
            self.grow(self.len + count);
        }
        let size = self.bytes.len();
        let start = if size == 0 { 0 } else { (self.head + self.len) % size };
        let first = count.min(size - start);
        let (low, high) = self.bytes.split_at_mut(start);
        [&mut high[..first], &mut low[..count - first]]
    }

    /// Makes `count` bytes of the last reservation part of the queue.
    pub(super) fn commit(&mut self, count: usize) {
        self.len += count.min(self.bytes.len() - self.len);
    }

    /// Appends what fits and returns how much that was.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(self.free());
        let [first, second] = self.reserve(count);
        let (head, tail) = data[..count].split_at(first.len());
        first.copy_from_slice(head);
        second.copy_from_slice(tail);
        self.commit(count);
        count
    }

    fn grow(&mut self, needed: usize) {
        let size = needed.next_power_of_two().clamp(FIRST, CAPACITY);
        let mut bytes = Vec::with_capacity(size);
        self.slices().iter().for_each(|slice| bytes.extend_from_slice(slice));
        bytes.resize(size, 0);
        self.bytes = bytes;
        self.head = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn behaves_like_a_deque(ops in proptest::collection::vec((any::<bool>(), 0usize..100_000), 1..60)) {
            let mut ring = Ring::default();
            let mut model: VecDeque<u8> = VecDeque::new();
            let mut next = 0u8;
            for (push, count) in ops {
                if push {
                    let data: Vec<u8> = (0..count).map(|_| { next = next.wrapping_add(1); next }).collect();
                    let taken = ring.push(&data);
                    prop_assert_eq!(taken, count.min(CAPACITY - model.len()));
                    model.extend(&data[..taken]);
                } else {
                    ring.consume(count);
                    model.drain(..count.min(model.len()));
                }
                prop_assert_eq!(ring.len(), model.len());
                prop_assert_eq!(ring.free(), CAPACITY - model.len());
                let [first, second] = ring.slices();
                let content: Vec<u8> = [first, second].concat();
                prop_assert_eq!(&content, &Vec::from(model.clone()));
            }
        }
    }

    #[test]
    fn an_unused_queue_holds_no_memory() {
        let mut ring = Ring::default();
        assert_eq!(ring.push(&[]), 0);
        assert_eq!(ring.slices(), [&[] as &[u8], &[]]);
        assert!(ring.bytes.is_empty());
        ring.push(b"x");
        ring.clear();
        assert!(ring.bytes.is_empty() && ring.is_empty());
    }
}
