//! Every byte of a small store flipped, and every file cut at every length: a typed error or the right content.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use amber_layers::{NewSnapshot, PageRange, Prefetch, Section, SectionId, SnapshotId, Store, StoreError};
use common::*;

/// What a snapshot holds.
#[derive(Debug, PartialEq, Eq)]
struct Content {
    memory: Vec<u8>,
    disk: Vec<u8>,
    sections: Vec<Section>,
    prefetch: Prefetch,
}

fn load(dir: &Path, id: &SnapshotId) -> Result<Content, StoreError> {
    let store = Arc::new(Store::open_read_only(dir)?);
    store.resolve(id.as_str())?;
    let snapshot = store.open_snapshot(id)?;
    let read = |image: &amber_layers::Image| {
        let mut out = vec![0xee; image.pages() as usize * amber_layers::PAGE_SIZE];
        image.read(0, &mut out).map(|()| out)
    };
    Ok(Content {
        memory: read(snapshot.memory())?,
        disk: read(snapshot.disk())?,
        sections: snapshot.sections().to_vec(),
        prefetch: snapshot.prefetch().clone(),
    })
}

/// A store with a snapshot and its child; both kinds of codec, zeros, state, a prefetch list.
fn small_store(dir: &Path) -> [SnapshotId; 2] {
    let store = open(dir);
    let base = Pages::of([(1, filled(1)), (2, filled(2)), (9, noise(9)), (20, filled(3))]);
    let base = publish(&store, None, 24, &base, named("base")).unwrap();
    let parent = store.open_snapshot(&base.id).unwrap();
    let mut writer = store.writer();
    let dirty = Pages::of([(2, filled(0)), (3, filled(4)), (20, filled(5))]);
    writer.memory(Some(parent.memory()), 24, dirty.numbers(), &dirty).unwrap();
    let disk = Pages::of([(0, filled(6))]);
    writer.disk(None, 2, disk.numbers(), &disk).unwrap();
    writer.section(SectionId(0x100), 1, true, (0..600u32).flat_map(u32::to_le_bytes).collect()).unwrap();
    writer.prefetch(Prefetch { memory: vec![PageRange { first: 2, count: 2 }], disk: Vec::new() });
    let child = writer.publish(NewSnapshot { metadata: "{}".into(), ..NewSnapshot::default() }).unwrap();
    [base.id, child.id]
}

/// Loads both snapshots after `file` was replaced by each of `variants`.
fn try_all(dir: &Path, file: &str, variants: impl Iterator<Item = (String, Vec<u8>)>) {
    let ids = {
        let store = open(dir);
        store.list(&Default::default()).unwrap().into_iter().map(|m| m.id).collect::<Vec<_>>()
    };
    let want: Vec<Content> = ids.iter().map(|id| load(dir, id).unwrap()).collect();
    let path = dir.join(file);
    let good = fs::read(&path).unwrap();
    let mut refused = 0;
    for (what, bytes) in variants {
        // A new file each time: some file systems write out at once what replaces an older content.
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        for (id, want) in ids.iter().zip(&want) {
            match load(dir, id) {
                Ok(content) => assert!(content == *want, "{file} {what}: wrong content"),
                Err(StoreError::Format(_) | StoreError::Image(amber_layers::ImageError::Format(_))) => {
                    refused += 1
                }
                Err(e) => panic!("{file} {what}: {e:?}"),
            }
        }
    }
    fs::write(&path, &good).unwrap();
    assert!(refused > 0, "{file}: no damage was noticed");
    ids.iter().zip(&want).for_each(|(id, want)| assert!(load(dir, id).unwrap() == *want));
}

fn content_files(dir: &Path) -> Vec<String> {
    files(dir)
        .into_iter()
        .filter(|f| f.ends_with(".layer") || f.ends_with(".manifest") || f == "STORE")
        .collect()
}

#[test]
fn every_flipped_byte_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    small_store(dir.path());
    let found = content_files(dir.path());
    assert_eq!(found.len(), 5, "{found:?}");
    for file in found {
        let good = fs::read(dir.path().join(&file)).unwrap();
        let flips = (0..good.len()).map(|at| {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            (format!("flipped at {at}"), bytes)
        });
        try_all(dir.path(), &file, flips);
    }
}

#[test]
fn every_truncation_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    small_store(dir.path());
    for file in content_files(dir.path()) {
        let good = fs::read(dir.path().join(&file)).unwrap();
        let cuts = (0..good.len()).step_by(3).map(|len| (format!("cut at {len}"), good[..len].to_vec()));
        let longer = [&good[..], &[0]].concat();
        try_all(dir.path(), &file, cuts.chain([("extended".to_owned(), longer)]));
    }
}

#[test]
fn swapped_files_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    small_store(dir.path());
    let layers: Vec<String> = files(dir.path()).into_iter().filter(|f| f.ends_with(".layer")).collect();
    let other = fs::read(dir.path().join(&layers[1])).unwrap();
    try_all(dir.path(), &layers[0], std::iter::once(("swapped".to_owned(), other)));
}
