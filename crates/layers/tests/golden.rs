//! Snapshots of every format version that was ever published, checked in: they must load for ever.
//!
//! The files are never rewritten. For a new version, run the ignored test with `AMBER_LAYERS_GOLDEN` set to a new
//! directory, check the result in beside the older ones, and add it to `VERSIONS`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use amber_layers::{Kind, NewSnapshot, PAGE_SIZE, PageRange, Prefetch, SectionId, Store};
use common::*;

const VERSIONS: [&str; 1] = ["v1"];

fn base_memory() -> Pages {
    Pages::of([(0, filled(1)), (3, mixed(3)), (4, mixed(4)), (40, filled(2))])
}

fn base_disk() -> Pages {
    Pages::of((10..30).map(|p| (p, filled(p as u8))))
}

fn child_memory() -> Pages {
    Pages::of([(3, filled(9)), (4, filled(0)), (41, filled(5))])
}

fn prefetch() -> Prefetch {
    let range = |first, count| PageRange { first, count };
    Prefetch { memory: vec![range(40, 2), range(3, 1)], disk: vec![range(12, 4)] }
}

#[test]
#[ignore = "writes a new golden store into $AMBER_LAYERS_GOLDEN"]
fn write() {
    let dir = PathBuf::from(std::env::var_os("AMBER_LAYERS_GOLDEN").unwrap());
    let store = open(&dir);
    let mut writer = store.writer();
    writer.memory(None, 64, base_memory().numbers(), &base_memory()).unwrap();
    writer.disk(None, 1000, base_disk().numbers(), &base_disk()).unwrap();
    let template = NewSnapshot { kind: Kind::Template, platform: 1, ..named("base") };
    let base = writer.publish(template).unwrap();
    let parent = store.open_snapshot(&base.id).unwrap();
    let mut writer = store.writer();
    writer.memory(Some(parent.memory()), 64, child_memory().numbers(), &child_memory()).unwrap();
    writer.disk(Some(parent.disk()), 1000, [], &Pages::default()).unwrap();
    writer.section(SectionId(0x100), 1, true, b"state".repeat(100)).unwrap();
    writer.section(SectionId(0x101), 7, false, Vec::new()).unwrap();
    writer.prefetch(prefetch());
    let child = NewSnapshot {
        tag: Some("v1".into()),
        source: Some("sbx".into()),
        parent: Some(base.as_parent()),
        metadata: r#"{"job":"42"}"#.into(),
        platform: 1,
        constraints: BTreeMap::from([("cpu".into(), "x86-64-v2".into())]),
        ..named("team/child")
    };
    writer.publish(child).unwrap();
}

fn merged(len: usize, layers: &[&Pages]) -> Vec<u8> {
    let mut out = vec![0; len * PAGE_SIZE];
    for (page, content) in layers.iter().flat_map(|l| &l.0) {
        out[*page as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&content[..]);
    }
    out
}

#[test]
fn every_version_loads() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for version in VERSIONS {
        let store = Arc::new(Store::open_read_only(&golden.join(version)).unwrap());
        let base = store.resolve("base").unwrap().unwrap();
        assert_eq!((base.kind, base.platform, base.parent.clone()), (Kind::Template, 1, None));
        let snapshot = store.open_snapshot(&base.id).unwrap();
        assert!(content(snapshot.memory()) == merged(64, &[&base_memory()]));
        assert!(content(snapshot.disk()) == merged(1000, &[&base_disk()]));

        let child = store.resolve("team/child:v1").unwrap().unwrap();
        assert_eq!(child.parent, Some(base.as_parent()));
        assert_eq!(child.source.as_deref(), Some("sbx"));
        assert_eq!(child.metadata, r#"{"job":"42"}"#);
        assert_eq!(child.constraints["cpu"], "x86-64-v2");
        assert_eq!((child.memory_pages, child.disk_pages, child.disk_data_pages), (64, 1000, 20));
        assert!(child.created_ns > 0 && child.own_bytes < base.total_bytes + 2000);
        let snapshot = store.open_snapshot(&child.id).unwrap();
        assert!(content(snapshot.memory()) == merged(64, &[&base_memory(), &child_memory()]));
        assert!(content(snapshot.disk()) == merged(1000, &[&base_disk()]));
        assert_eq!(snapshot.section(SectionId(0x100)).unwrap().bytes, b"state".repeat(100));
        let empty = snapshot.section(SectionId(0x101)).unwrap();
        assert_eq!((empty.version, empty.required, empty.bytes.len()), (7, false, 0));
        assert_eq!(snapshot.prefetch(), &prefetch());
        let verified = store.verify().unwrap();
        assert!(verified.problems.is_empty(), "{:?}", verified.problems);
        assert_eq!((verified.snapshots, verified.layers), (2, 2));
        assert!(store.gc().is_err() && store.delete(&child.id).is_err(), "opened read-only");
    }
}
