//! Content that a snapshot in the making need not store again: a page of memory that equals a block of the disk, because
//! the guest holds the file in its page cache.
//!
//! A page is looked up by its *print*, a quick sum of 64 bits, and then compared, by its hash or byte by byte. Blocks that the
//! snapshot itself stores are remembered while they are written; of images, those pages that are decoded at this
//! moment are known, and nothing is decoded to find more.

use std::collections::HashMap;
use std::sync::Arc;

use crate::extent::Extent;
use crate::format::{Hash, PAGE_SIZE, hash};
use crate::image::Image;

/// The print of a page: equal pages have equal prints, and others hardly ever.
pub(crate) fn print(page: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [1u64, 2, 3, 4];
    let (words, _) = page.as_chunks::<32>();
    for word in words {
        let (parts, _) = word.as_chunks::<8>();
        for (lane, part) in lanes.iter_mut().zip(parts) {
            *lane = (*lane ^ u64::from_le_bytes(*part)).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
    lanes.iter().fold(0, |sum, lane| (sum ^ lane).wrapping_mul(FACTOR).rotate_left(31))
}

/// Pages that were stored in the layer that is being written.
#[derive(Debug, Default)]
pub(crate) struct Stored(HashMap<u64, (u32, Hash)>);

impl Stored {
    pub(crate) fn insert(&mut self, print: u64, hash: Hash, slot: u32) {
        self.0.entry(print).or_insert((slot, hash));
    }
}

/// Where pages with known content are.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The number of the layer that is being written.
    pub(crate) own_layer: u16,
    pub(crate) stored: Stored,
    /// Images, with the numbers that their layers have in the snapshot.
    pub(crate) images: Vec<(Arc<Image>, Vec<u16>)>,
}

impl Known {
    pub(crate) fn is_empty(&self) -> bool {
        self.stored.0.is_empty() && self.images.is_empty()
    }

    /// Where the content of `page` is stored, as the extent of that one page.
    pub(crate) fn find(&self, page: u32, content: &[u8]) -> Option<Extent> {
        if self.is_empty() {
            return None;
        }
        let print = print(content);
        let at = |layer, slot| Extent { start: page, count: 1, layer, slot };
        if let Some((slot, stored)) = self.stored.0.get(&print)
            && hash(content) == *stored
        {
            return Some(at(self.own_layer, *slot));
        }
        self.images.iter().find_map(|(image, numbers)| {
            let same = image.find_equal(print, content)?;
            let map = image.map()?;
            let extent = map.get(map.find(same));
            let layer = *numbers.get(usize::from(extent.layer))?;
            Some(at(layer, extent.slot + (same - extent.start)))
        })
    }
}

/// Prints of the decoded pages of an image, brought up to date when they are needed.
#[derive(Debug, Default)]
pub(crate) struct Prints {
    /// One bit per page, as in the image: its print is known.
    seen: Vec<u64>,
    pages: HashMap<u64, u32>,
}

impl Prints {
    /// Adds the pages that are present and not known yet. `present` gives word `i` of the image's bitmap, `read` a page's content.
    pub(crate) fn update(
        &mut self,
        words: usize,
        present: impl Fn(usize) -> u64,
        mut read: impl FnMut(u32, &mut [u8; PAGE_SIZE]) -> bool,
    ) {
        self.seen.resize(words, 0);
        let mut content = [0; PAGE_SIZE];
        for (i, seen) in self.seen.iter_mut().enumerate() {
            let mut new = present(i) & !*seen;
            *seen |= new;
            while new != 0 {
                // The number of pages is below 2^32.
                let page = (i * 64) as u32 + new.trailing_zeros();
                new &= new - 1;
                if read(page, &mut content) {
                    self.pages.entry(print(&content)).or_insert(page);
                }
            }
        }
    }

    pub(crate) fn get(&self, print: u64) -> Option<u32> {
        self.pages.get(&print).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_tell_pages_apart() {
        let mut seen = std::collections::HashSet::new();
        assert!(seen.insert(print(&[0; PAGE_SIZE])));
        for at in 0..PAGE_SIZE {
            for bit in [1, 0x80] {
                let mut page = [0; PAGE_SIZE];
                page[at] = bit;
                assert!(seen.insert(print(&page)), "{at}");
            }
        }
        let mut swapped = [0; PAGE_SIZE];
        swapped[8] = 1;
        swapped[32] = 2;
        let one = print(&swapped);
        swapped.swap(8, 32);
        assert_ne!(one, print(&swapped));
    }
}
