//! Random machines against a plain byte array: writes, snapshots, children to any depth, deletions in between.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::sync::Arc;

use amber_layers::{NewSnapshot, PAGE_SIZE, Snapshot, Store};
use common::*;
use proptest::prelude::*;

/// What one generation does to memory and disk before it is snapshotted.
#[derive(Debug, Clone)]
struct Generation {
    /// Page and content: 0 zero, 1 the same as before, others a new page.
    memory: Vec<(u64, u8)>,
    disk: Vec<(u64, u8)>,
    pages: u64,
    /// Pages that the guest touched (so that the parent's page is decoded).
    touched: Vec<u64>,
    delete_parent: bool,
}

fn generation() -> impl Strategy<Value = Generation> {
    let writes = || prop::collection::vec((0u64..200, 0u8..9), 0..60);
    let touched = prop::collection::vec(0u64..200, 0..10);
    (writes(), writes(), 100u64..200, touched, any::<bool>()).prop_map(
        |(memory, disk, pages, touched, delete_parent)| Generation {
            memory,
            disk,
            pages,
            touched,
            delete_parent,
        },
    )
}

fn apply(model: &mut Vec<u8>, pages: u64, writes: &[(u64, u8)], salt: u64) -> Pages {
    model.resize(pages as usize * PAGE_SIZE, 0);
    let mut dirty = Pages::default();
    for &(page, kind) in writes.iter().filter(|(page, _)| *page < pages) {
        let at = page as usize * PAGE_SIZE;
        match kind {
            0 => model[at..at + PAGE_SIZE].fill(0),
            1 => {}
            2 => model[at..at + PAGE_SIZE].copy_from_slice(&filled(9)[..]),
            _ => model[at..at + PAGE_SIZE]
                .copy_from_slice(&mixed(salt << 32 | page << 8 | u64::from(kind))[..]),
        }
        dirty.0.insert(page, Box::new(model[at..at + PAGE_SIZE].try_into().unwrap()));
    }
    dirty
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn content_is_what_was_written(generations in prop::collection::vec(generation(), 1..12), threads in 1usize..4) {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<Store> = open(dir.path());
        let (mut memory, mut disk) = (Vec::new(), Vec::new());
        let mut parent: Option<Arc<Snapshot>> = None;
        let mut kept = Vec::new();
        for (depth, g) in generations.iter().enumerate() {
            let salt = depth as u64 + 1;
            let dirty_memory = apply(&mut memory, g.pages, &g.memory, salt);
            let dirty_disk = apply(&mut disk, g.pages + 7, &g.disk, salt << 8);
            if let Some(parent) = &parent {
                for page in g.touched.iter().filter(|p| **p < parent.memory().pages()) {
                    parent.memory().ensure(*page, 1).unwrap();
                }
            }
            let mut writer = store.writer();
            writer.threads(threads);
            let image = parent.as_deref().map(|p| &**p.memory());
            writer.memory(image, g.pages, dirty_memory.numbers(), &dirty_memory).unwrap();
            let image = parent.as_deref().map(|p| &**p.disk());
            writer.disk(image, g.pages + 7, dirty_disk.numbers(), &dirty_disk).unwrap();
            let meta = writer.publish(NewSnapshot::default()).unwrap();
            if let Some(parent) = parent.take() {
                let id = parent.meta().id.clone();
                drop(parent);
                if g.delete_parent {
                    prop_assert!(store.delete(&id).unwrap());
                    kept.retain(|(other, _, _)| *other != id);
                }
            }
            let opened = store.open_snapshot(&meta.id).unwrap();
            kept.push((meta.id, memory.clone(), disk.clone()));
            parent = Some(opened);
        }
        drop(parent);
        for (id, memory, disk) in kept {
            let snapshot = store.open_snapshot(&id).unwrap();
            prop_assert!(content(snapshot.memory()) == memory);
            prop_assert!(content(snapshot.disk()) == disk);
        }
        assert_clean(&store);
    }
}

#[test]
fn fifty_generations_resolve_flat() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut model = Vec::new();
    let mut parent: Option<Arc<Snapshot>> = None;
    for depth in 0..50u64 {
        let writes: Vec<(u64, u8)> = (0..6).map(|i| ((depth * 37 + i * 11) % 256, 3 + i as u8)).collect();
        let dirty = apply(&mut model, 256, &writes, depth);
        let image = parent.as_deref().map(|p| &**p.memory());
        let meta = publish(&store, image, 256, &dirty, NewSnapshot::default()).unwrap();
        parent = Some(store.open_snapshot(&meta.id).unwrap());
    }
    let last = parent.unwrap();
    assert!(last.memory().layer_count() > 20);
    assert!(content(last.memory()) == model);
}
