//! Helpers of the integration tests: a source of pages in memory, and short ways to write and read snapshots.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use amber_layers::{
    Image, NewSnapshot, PAGE_SIZE, Page, PageSource, Snapshot, SnapshotMeta, Store, StoreError,
};

/// Pages by number; what is missing is an error, so that reading too much is noticed.
#[derive(Default, Clone)]
pub struct Pages(pub BTreeMap<u64, Box<Page>>);

impl Pages {
    pub fn of(pages: impl IntoIterator<Item = (u64, Box<Page>)>) -> Pages {
        Pages(pages.into_iter().collect())
    }

    pub fn numbers(&self) -> Vec<u64> {
        self.0.keys().copied().collect()
    }
}

impl PageSource for Pages {
    fn read(&self, page: u64, out: &mut Page) -> io::Result<()> {
        let content =
            self.0.get(&page).ok_or_else(|| io::Error::other(format!("page {page} is not dirty")))?;
        out.copy_from_slice(&content[..]);
        Ok(())
    }
}

/// A page full of one byte.
pub fn filled(byte: u8) -> Box<Page> {
    Box::new([byte; PAGE_SIZE])
}

/// A page that does not compress, different for each seed.
pub fn noise(seed: u64) -> Box<Page> {
    let mut page = Box::new([0; PAGE_SIZE]);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).finalize_xof().fill(&mut page[..]);
    page
}

/// A page that compresses to about a half, different for each seed.
pub fn mixed(seed: u64) -> Box<Page> {
    let mut page = noise(seed);
    page.iter_mut().skip(1).step_by(2).for_each(|b| *b = 7);
    page
}

pub fn open(dir: &Path) -> Arc<Store> {
    Arc::new(Store::open(dir).unwrap())
}

/// Publishes a snapshot with these dirty pages of memory, and no disk.
pub fn publish(
    store: &Arc<Store>,
    parent: Option<&Image>,
    pages: u64,
    dirty: &Pages,
    new: NewSnapshot,
) -> Result<SnapshotMeta, StoreError> {
    let mut writer = store.writer();
    writer.memory(parent, pages, dirty.numbers(), dirty)?;
    writer.publish(new)
}

pub fn named(name: &str) -> NewSnapshot {
    NewSnapshot { names: vec![name.to_owned()], ..NewSnapshot::default() }
}

/// All bytes of an image.
pub fn content(image: &Image) -> Vec<u8> {
    let mut out = vec![0xee; usize::try_from(image.pages()).unwrap() * PAGE_SIZE];
    image.read(0, &mut out).unwrap();
    out
}

pub fn page(snapshot: &Snapshot, number: u64) -> Page {
    let mut out = [0xee; PAGE_SIZE];
    snapshot.memory().read_page(number, &mut out).unwrap();
    out
}

/// Files below a directory, relative, sorted.
pub fn files(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, prefix: &str, out: &mut Vec<String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), &format!("{name}/"), out);
            } else {
                out.push(name);
            }
        }
    }
    let mut out = Vec::new();
    walk(dir, "", &mut out);
    out.sort();
    out
}

/// The store has no damage, no unnamed layers and no leftovers.
pub fn assert_clean(store: &Store) {
    let verified = store.verify().unwrap();
    assert!(verified.problems.is_empty(), "{:?}", verified.problems);
    assert_eq!(store.du().unwrap().unreferenced_bytes, 0);
    let left: Vec<String> = files(store.dir()).into_iter().filter(|f| f.starts_with("tmp/")).collect();
    assert!(left.is_empty(), "{left:?}");
}
