//! The page map: which layer and slot holds each page of an image (SNAPSHOT.md, section 3.3).
//!
//! Extents tile the whole address space, so a page's owner is found by one binary search, whatever the number of
//! ancestors. On disk the start column is left out: it is the running sum of the counts, which makes gaps and overlaps
//! impossible to express. Layer 0 is reserved and means zeros.

use crate::format::{FRAME_PAGES, MAX_PAGES, Reader};

/// The reserved layer of zero pages.
pub(crate) const ZERO_LAYER: u16 = 0;
const BYTES_PER_EXTENT: usize = 10;

/// A run of pages held by consecutive slots of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u32,
    pub(crate) count: u32,
    pub(crate) layer: u16,
    pub(crate) slot: u32,
}

/// All extents of an image, in columns, in page order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExtentMap {
    /// First page of each extent, and the number of pages as a last entry.
    starts: Vec<u32>,
    layers: Vec<u16>,
    slots: Vec<u32>,
}

impl ExtentMap {
    pub(crate) fn zero(pages: u32) -> ExtentMap {
        let mut builder = MapBuilder::new();
        builder.push(pages, ZERO_LAYER, 0);
        builder.finish()
    }

    pub(crate) fn pages(&self) -> u32 {
        self.starts.last().copied().unwrap_or(0)
    }

    pub(crate) fn len(&self) -> usize {
        self.layers.len()
    }

    pub(crate) fn get(&self, index: usize) -> Extent {
        let start = self.starts[index];
        Extent {
            start,
            count: self.starts[index + 1] - start,
            layer: self.layers[index],
            slot: self.slots[index],
        }
    }

    /// The number of the extent that holds `page`, which must be inside of the map.
    pub(crate) fn find(&self, page: u32) -> usize {
        self.starts.partition_point(|&start| start <= page) - 1
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    /// Extents of `first..first + count`, cut to that range.
    pub(crate) fn range(&self, first: u32, count: u32) -> impl Iterator<Item = Extent> + '_ {
        let end = first.saturating_add(count).min(self.pages());
        let from = if first < end { self.find(first) } else { self.len() };
        (from..self.len()).map(|i| self.get(i)).take_while(move |e| e.start < end).map(move |e| {
            let start = e.start.max(first);
            let skipped = start - e.start;
            let slot = if e.layer == ZERO_LAYER { 0 } else { e.slot + skipped };
            Extent { start, count: (e.start + e.count).min(end) - start, layer: e.layer, slot }
        })
    }

    /// Pages that are not zero.
    pub(crate) fn data_pages(&self) -> u64 {
        self.iter().filter(|e| e.layer != ZERO_LAYER).map(|e| u64::from(e.count)).sum()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.len() * BYTES_PER_EXTENT);
        out.extend_from_slice(&u64::from(self.pages()).to_le_bytes());
        // The number of extents is at most the number of pages, which fits.
        out.extend_from_slice(&u32::try_from(self.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&0u32.to_le_bytes());
        for pair in self.starts.windows(2) {
            out.extend_from_slice(&(pair[1] - pair[0]).to_le_bytes());
        }
        for layer in &self.layers {
            out.extend_from_slice(&layer.to_le_bytes());
        }
        for slot in &self.slots {
            out.extend_from_slice(&slot.to_le_bytes());
        }
        out
    }

    /// Reads a map. `slots_of[n - 1]` is the number of slots of layer `n`. The error says what is wrong.
    pub(crate) fn parse(bytes: &[u8], slots_of: &[u32]) -> Result<ExtentMap, &'static str> {
        let mut r = Reader::new(bytes);
        let short = "page map ends early";
        let pages = r.u64().ok_or(short)?;
        if pages > MAX_PAGES {
            return Err("page map is larger than 16 TiB");
        }
        let len = usize::try_from(r.u32().ok_or(short)?).map_err(|_| short)?;
        r.u32().ok_or(short)?;
        // Each column is taken from the bytes before it is allocated, so a wrong length costs nothing.
        let counts = r.column_u32(len).ok_or(short)?;
        let layers = r.column_u16(len).ok_or(short)?;
        let slots = r.column_u32(len).ok_or(short)?;
        if !r.is_empty() {
            return Err("page map has trailing bytes");
        }
        let mut starts = Vec::with_capacity(len + 1);
        let mut start = 0u32;
        starts.push(0);
        for ((&count, &layer), &slot) in counts.iter().zip(&layers).zip(&slots) {
            if count == 0 {
                return Err("empty extent");
            }
            start = start.checked_add(count).ok_or("extents exceed the image")?;
            starts.push(start);
            if layer == ZERO_LAYER {
                if slot != 0 {
                    return Err("zero extent with a slot");
                }
            } else {
                let slots = *slots_of.get(usize::from(layer) - 1).ok_or("extent of an unknown layer")?;
                if slot.checked_add(count).is_none_or(|end| end > slots) {
                    return Err("extent exceeds its layer");
                }
            }
        }
        if u64::from(start) != pages {
            return Err("extents do not cover the image");
        }
        Ok(ExtentMap { starts, layers, slots })
    }
}

/// Puts a map together from left to right and merges what continues.
pub(crate) struct MapBuilder {
    map: ExtentMap,
}

impl MapBuilder {
    pub(crate) fn new() -> MapBuilder {
        MapBuilder { map: ExtentMap { starts: vec![0], layers: Vec::new(), slots: Vec::new() } }
    }

    pub(crate) fn pages(&self) -> u32 {
        self.map.pages()
    }

    /// Appends `count` pages.
    pub(crate) fn push(&mut self, count: u32, layer: u16, slot: u32) {
        if count == 0 {
            return;
        }
        let map = &mut self.map;
        let end = map.pages() + count;
        if let (Some(&last_layer), Some(&last_slot)) = (map.layers.last(), map.slots.last()) {
            let last_count = map.starts[map.len()] - map.starts[map.len() - 1];
            if last_layer == layer && (layer == ZERO_LAYER || last_slot + last_count == slot) {
                let tail = map.starts.len() - 1;
                map.starts[tail] = end;
                return;
            }
        }
        map.starts.push(end);
        map.layers.push(layer);
        map.slots.push(if layer == ZERO_LAYER { 0 } else { slot });
    }

    pub(crate) fn finish(self) -> ExtentMap {
        self.map
    }
}

/// A map of `pages` pages: `changes` (ascending, disjoint, inside of the map) over `parent`, whose layer numbers go
/// through `translate`. What neither covers is zero.
pub(crate) fn overlay(
    parent: Option<&ExtentMap>,
    translate: &[u16],
    pages: u32,
    changes: impl Iterator<Item = Extent>,
) -> ExtentMap {
    let mut out = MapBuilder::new();
    let inherit = |out: &mut MapBuilder, until: u32| {
        let from = out.pages();
        if let Some(parent) = parent {
            for e in parent.range(from, until - from) {
                out.push(e.count, translate[usize::from(e.layer)], e.slot);
            }
        }
        let rest = until - out.pages();
        out.push(rest, ZERO_LAYER, 0);
    };
    for change in changes {
        inherit(&mut out, change.start);
        out.push(change.count, change.layer, change.slot);
    }
    inherit(&mut out, pages);
    out.finish()
}

/// Finds the pages of a map that live in a given frame.
///
/// Usually these are neighbours, but children own scattered pages and several pages may share one slot, so this is an
/// index by (layer, slot). `reach` is the largest end of any extent up to here in the same layer, which bounds
/// the search backwards.
#[derive(Debug)]
pub(crate) struct FrameIndex {
    entries: Vec<FrameEntry>,
}

#[derive(Debug)]
struct FrameEntry {
    extent: Extent,
    reach: u32,
}

impl FrameIndex {
    pub(crate) fn new(map: &ExtentMap) -> FrameIndex {
        let mut extents: Vec<Extent> = map.iter().filter(|e| e.layer != ZERO_LAYER).collect();
        // Runs that are sorted already, as one layer's usually are, make the stable sort nearly linear.
        extents.sort_by_key(|e| (e.layer, e.slot));
        let mut entries: Vec<FrameEntry> = Vec::with_capacity(extents.len());
        for extent in extents {
            let end = extent.slot + extent.count;
            let reach = match entries.last() {
                Some(prev) if prev.extent.layer == extent.layer => prev.reach.max(end),
                _ => end,
            };
            entries.push(FrameEntry { extent, reach });
        }
        FrameIndex { entries }
    }

    /// The parts of extents inside of frame `frame` of `layer`.
    pub(crate) fn pages_of(&self, layer: u16, frame: u32) -> impl Iterator<Item = Extent> + '_ {
        let low = frame * FRAME_PAGES as u32;
        let high = low + FRAME_PAGES as u32;
        let end = self.entries.partition_point(|e| (e.extent.layer, e.extent.slot) < (layer, high));
        self.entries[..end]
            .iter()
            .rev()
            .take_while(move |e| e.extent.layer == layer && e.reach > low)
            .map(|e| e.extent)
            .filter(move |e| e.slot + e.count > low)
            .map(move |e| {
                let slot = e.slot.max(low);
                let start = e.start + (slot - e.slot);
                Extent { start, count: (e.slot + e.count).min(high) - slot, layer, slot }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The plain model: layer and slot per page.
    fn model(map: &ExtentMap) -> Vec<(u16, u32)> {
        map.iter()
            .flat_map(|e| (0..e.count).map(move |i| (e.layer, if e.layer == 0 { 0 } else { e.slot + i })))
            .collect()
    }

    fn from_model(pages: &[(u16, u32)]) -> ExtentMap {
        let mut b = MapBuilder::new();
        pages.iter().for_each(|&(layer, slot)| b.push(1, layer, slot));
        b.finish()
    }

    fn pages() -> impl Strategy<Value = Vec<(u16, u32)>> {
        prop::collection::vec((0u16..4, 0u32..70), 0..120)
            .prop_map(|v| v.into_iter().map(|(l, s)| (l, if l == 0 { 0 } else { s })).collect())
    }

    proptest! {
        #[test]
        fn encoding_round_trips(pages in pages()) {
            let map = from_model(&pages);
            prop_assert_eq!(model(&map), pages);
            prop_assert_eq!(ExtentMap::parse(&map.encode(), &[80; 3]).unwrap(), map);
        }

        #[test]
        fn lookup_and_ranges_agree_with_the_model(pages in pages(), first in 0u32..130, count in 0u32..130) {
            let map = from_model(&pages);
            for (i, want) in pages.iter().enumerate() {
                let e = map.get(map.find(i as u32));
                let slot = if e.layer == 0 { 0 } else { e.slot + (i as u32 - e.start) };
                prop_assert_eq!((e.layer, slot), *want);
            }
            let mut seen = Vec::new();
            for e in map.range(first, count) {
                prop_assert_eq!(e.start as usize, first as usize + seen.len());
                seen.extend((0..e.count).map(|i| (e.layer, if e.layer == 0 { 0 } else { e.slot + i })));
            }
            let end = (first + count).min(pages.len() as u32) as usize;
            prop_assert_eq!(&seen[..], pages.get(first as usize..end).unwrap_or(&[]));
        }

        #[test]
        fn overlay_agrees_with_the_model(
            parent in pages(), len in 0u32..150, marks in prop::collection::btree_map(0u32..150, (0u16..4, 0u32..70), 0..40),
        ) {
            let map = from_model(&parent);
            let changes: Vec<Extent> = marks.iter().filter(|(p, _)| **p < len)
                .map(|(&start, &(layer, slot))| Extent { start, count: 1, layer, slot }).collect();
            let got = overlay(Some(&map), &[0, 3, 2, 1], len, changes.iter().copied());
            let mut want: Vec<(u16, u32)> = parent.iter().map(|&(l, s)| ([0, 3, 2, 1][usize::from(l)], s)).collect();
            want.resize(len as usize, (0, 0));
            for c in &changes {
                want[c.start as usize] = (c.layer, if c.layer == 0 { 0 } else { c.slot });
            }
            prop_assert_eq!(model(&got), want);
        }

        #[test]
        fn frame_index_finds_exactly_the_pages_of_a_frame(pages in pages()) {
            let map = from_model(&pages);
            let index = FrameIndex::new(&map);
            for layer in 1..4u16 {
                for frame in 0..6u32 {
                    let mut got: Vec<(u32, u32)> = index.pages_of(layer, frame)
                        .flat_map(|e| (0..e.count).map(move |i| (e.start + i, e.slot + i))).collect();
                    got.sort_unstable();
                    let want: Vec<(u32, u32)> = pages.iter().enumerate()
                        .filter(|(_, (l, s))| *l == layer && s / 16 == frame)
                        .map(|(p, (_, s))| (p as u32, *s)).collect();
                    prop_assert_eq!(got, want);
                }
            }
        }

        #[test]
        fn hostile_bytes_are_refused_or_consistent(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(map) = ExtentMap::parse(&bytes, &[16, 32]) {
                prop_assert_eq!(ExtentMap::parse(&map.encode(), &[16, 32]).unwrap(), map);
            }
        }
    }

    #[test]
    fn every_rule_of_the_map_is_checked() {
        let good = from_model(&[(0, 0), (1, 0), (1, 1), (2, 5)]).encode();
        let parse = |b: &[u8]| ExtentMap::parse(b, &[16, 32]).unwrap_err();
        let with = |at: usize, v: u32| {
            let mut b = good.clone();
            b[at..at + 4].copy_from_slice(&v.to_le_bytes());
            b
        };
        assert!(ExtentMap::parse(&good, &[16, 32]).is_ok());
        (0..good.len()).for_each(|n| assert_eq!(parse(&good[..n]), "page map ends early"));
        assert_eq!(parse(&[&good[..], &[0]].concat()), "page map has trailing bytes");
        assert_eq!(parse(&with(0, 5)), "extents do not cover the image");
        assert_eq!(parse(&with(4, 1)), "page map is larger than 16 TiB");
        assert_eq!(parse(&with(8, u32::MAX)), "page map ends early");
        // Three extents: counts at 16, layers at 28, slots at 34.
        assert_eq!(parse(&with(16, 0)), "empty extent");
        assert_eq!(parse(&with(16, u32::MAX)), "extents exceed the image");
        assert_eq!(parse(&with(34, 1)), "zero extent with a slot");
        assert_eq!(parse(&with(38, 15)), "extent exceeds its layer");
        assert_eq!(parse(&with(38, u32::MAX)), "extent exceeds its layer");
        assert_eq!(ExtentMap::parse(&good, &[16]).unwrap_err(), "extent of an unknown layer");
    }
}
