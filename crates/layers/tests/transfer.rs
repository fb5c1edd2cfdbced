//! Snapshots as files: from one store to another, whole or without what the other has, damaged in every way.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;

use amber_layers::{Kind, NewSnapshot, SectionId, SnapshotMeta, Store, StoreError};
use common::*;

fn family(store: &Arc<Store>) -> (SnapshotMeta, SnapshotMeta) {
    let base = Pages::of((0..40).map(|p| (p, noise(p))));
    let base = publish(store, None, 64, &base, NewSnapshot::default()).unwrap();
    let parent = store.open_snapshot(&base.id).unwrap();
    let mut writer = store.writer();
    let dirty = Pages::of([(3, filled(9)), (50, mixed(1))]);
    writer.memory(Some(parent.memory()), 64, dirty.numbers(), &dirty).unwrap();
    writer.section(SectionId(0x100), 1, true, b"state".repeat(100)).unwrap();
    let child = NewSnapshot { tag: Some("v1".into()), metadata: "{}".into(), ..named("team/child") };
    (base, writer.publish(child).unwrap())
}

fn all(store: &Arc<Store>, meta: &SnapshotMeta) -> Vec<u8> {
    content(store.open_tagged(&meta.id, &meta.tag).unwrap().memory())
}

#[test]
fn a_snapshot_moves_to_another_store() {
    let dir = tempfile::tempdir().unwrap();
    let here = open(&dir.path().join("here"));
    let there = open(&dir.path().join("there"));
    let (base, child) = family(&here);
    let file = dir.path().join("child.amber");
    let done = here.export(&child.id, "v1", &file, &HashSet::new()).unwrap();
    assert_eq!((done.layers, done.left_out, &done.meta), (2, 0, &child));
    assert_eq!(done.bytes, fs::metadata(&file).unwrap().len());
    assert!(here.export(&child.id, "v1", &file, &HashSet::new()).is_err(), "never overwrites");
    assert!(matches!(here.export(&child.id, "v2", &file, &HashSet::new()), Err(StoreError::NotFound { .. })));

    let moved = there.import(&file).unwrap();
    assert_eq!(moved, child);
    assert_eq!(there.resolve("team/child:v1").unwrap().unwrap(), child);
    assert!(all(&there, &moved) == all(&here, &child));
    assert_clean(&there);
    // Again, and back to where it came from: nothing happens.
    assert_eq!(there.import(&file).unwrap(), child);
    assert_eq!(here.import(&file).unwrap(), child);
    assert_eq!(there.list(&Default::default()).unwrap().len(), 1);

    // What the other side has can be left out.
    let have: HashSet<_> = there.layers().unwrap().into_iter().collect();
    let small = dir.path().join("base.amber");
    let done = here.export(&base.id, "default", &small, &have).unwrap();
    assert_eq!((done.layers, done.left_out), (0, 1));
    assert!(done.bytes < 1000);
    let moved = there.import(&small).unwrap();
    assert!(all(&there, &moved) == all(&here, &base));
    let empty = open(&dir.path().join("empty"));
    assert!(matches!(empty.import(&small), Err(StoreError::MissingLayer { .. })));
    assert_clean(&empty);
    assert_clean(&there);
}

#[test]
fn an_id_that_is_taken_and_a_name_that_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let here = open(&dir.path().join("here"));
    let there = open(&dir.path().join("there"));
    let one =
        |store: &Arc<Store>, seed, new| publish(store, None, 4, &Pages::of([(0, noise(seed))]), new).unwrap();
    let old = one(&there, 1, named("app"));
    let new = one(&here, 2, named("app"));
    let file = dir.path().join("app");
    here.export(&new.id, "default", &file, &HashSet::new()).unwrap();
    // The name decides, as it does when a snapshot is taken.
    let moved = there.import(&file).unwrap();
    assert_eq!((&moved.id, moved.build), (&old.id, new.build));
    assert_eq!(page(&there.open_snapshot(&old.id).unwrap(), 0), *noise(2));
    assert_clean(&there);
    // But nothing that arrives replaces a template.
    let other = open(&dir.path().join("other"));
    one(&other, 3, NewSnapshot { kind: Kind::Template, ..named("app") });
    assert!(matches!(other.import(&file), Err(StoreError::InvalidInput { .. })));
    assert_eq!(page(&other.open_snapshot(&other.resolve("app").unwrap().unwrap().id).unwrap(), 0), *noise(3));
    assert_clean(&other);
}

#[test]
fn a_quota_holds_for_imports() {
    let dir = tempfile::tempdir().unwrap();
    let here = open(&dir.path().join("here"));
    let there = open(&dir.path().join("there"));
    let (_, child) = family(&here);
    let file = dir.path().join("file");
    here.export(&child.id, "v1", &file, &HashSet::new()).unwrap();
    there.set_quota(Some(100_000));
    assert!(matches!(there.import(&file), Err(StoreError::Quota { .. })));
    assert_clean(&there);
    there.set_quota(Some(1 << 20));
    there.import(&file).unwrap();
}

#[test]
fn damaged_files_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let here = open(&dir.path().join("here"));
    let dirty = Pages::of([(0, filled(1)), (2, noise(2)), (9, mixed(3))]);
    let meta = publish(&here, None, 16, &dirty, named("small")).unwrap();
    let want = all(&here, &meta);
    let file = dir.path().join("good");
    here.export(&meta.id, "default", &file, &HashSet::new()).unwrap();
    let good = fs::read(&file).unwrap();
    let bad = dir.path().join("bad");
    let there = open(&dir.path().join("there"));
    let attempt = |what: String, bytes: &[u8]| {
        fs::write(&bad, bytes).unwrap();
        match there.import(&bad) {
            Ok(moved) => {
                assert!(all(&there, &moved) == want, "{what}: wrong content");
                assert!(there.delete(&moved.id).unwrap());
            }
            Err(StoreError::Format(_)) => {}
            Err(StoreError::Image(_)) => {}
            Err(error) => panic!("{what}: {error:?}"),
        }
    };
    // All of what is read by fields, some of the pages.
    for at in (0..1500).chain((1500..good.len()).step_by(13)) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        attempt(format!("flipped at {at}"), &bytes);
    }
    for len in (0..good.len()).step_by(31) {
        attempt(format!("cut at {len}"), &good[..len]);
    }
    attempt("extended".to_owned(), &[&good[..], &[0]].concat());
    assert_eq!(there.du().unwrap(), Default::default());
    assert_clean(&there);
}
