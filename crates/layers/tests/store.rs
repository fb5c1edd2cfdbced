//! The store through its public API: publication, names and tags, listing, deletion, collection, templates.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use amber_layers::{
    Image, Kind, ListFilter, NewSnapshot, PAGE_SIZE, Page, PageKind, PageRange, PageSource, Prefetch,
    Section, SectionId, SnapshotId, Store, StoreError,
};
use common::*;

#[test]
fn a_snapshot_comes_back_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let memory = Pages::of([(0, filled(1)), (5, noise(5)), (6, filled(0)), (99, mixed(1))]);
    let disk = Pages::of((1000..1100).map(|p| (p, mixed(p))));
    let mut writer = store.writer();
    let stats = writer.memory(None, 100, memory.numbers(), &memory).unwrap();
    assert_eq!((stats.dirty, stats.zero, stats.same, stats.own), (4, 1, 0, 3));
    writer.disk(None, 1 << 21, disk.numbers(), &disk).unwrap();
    let id = SectionId(0x100);
    writer.section(id, 3, true, b"cpu".to_vec()).unwrap();
    let refused = writer.section(SectionId(0xff), 1, true, Vec::new());
    assert!(matches!(refused, Err(StoreError::InvalidInput { .. })));
    let lists = Prefetch { memory: vec![PageRange { first: 5, count: 2 }], disk: Vec::new() };
    writer.prefetch(lists.clone());
    let new = NewSnapshot {
        kind: Kind::Template,
        source: Some("sbx".into()),
        metadata: "{\"a\":1}".into(),
        platform: 1,
        constraints: BTreeMap::from([("cpu".into(), "baseline".into())]),
        ..NewSnapshot::default()
    };
    let meta = writer.publish(new).unwrap();
    assert_eq!(store.resolve(meta.id.as_str()).unwrap().unwrap(), meta);
    let on_disk: u64 = files(dir.path())
        .iter()
        .filter(|f| f.ends_with(".layer") || f.ends_with(".manifest"))
        .map(|f| fs::metadata(dir.path().join(f)).unwrap().len())
        .sum();
    assert_eq!(meta.own_bytes, on_disk);
    assert_eq!((meta.memory_pages, meta.memory_data_pages, meta.disk_data_pages), (100, 3, 100));

    let snapshot = store.open_snapshot(&meta.id).unwrap();
    assert!(
        Arc::ptr_eq(&snapshot, &store.open_tagged(&meta.id, "default").unwrap()),
        "opened once per process"
    );
    assert_eq!(snapshot.meta(), &meta);
    assert_eq!(
        snapshot.section(id).unwrap(),
        &Section { id, version: 3, required: true, bytes: b"cpu".to_vec() }
    );
    assert_eq!(snapshot.prefetch(), &lists);
    assert!(snapshot.check_sections(&[(id, 3)]).is_ok());
    assert!(snapshot.check_sections(&[(id, 2)]).is_err());
    assert!(snapshot.check_sections(&[]).is_err());
    let image = snapshot.memory();
    assert!(image.is_zero(6) && image.is_zero(50) && !image.is_zero(5) && !image.is_zero(100));
    assert!(!image.is_present(5));
    assert_eq!(page(&snapshot, 5), *noise(5));
    // One frame holds all three: they came with it.
    assert!(image.is_present(0) && image.is_present(99));
    assert_eq!(image.frames_decoded(), 1);
    assert_eq!(image.first_touches(), [PageRange { first: 5, count: 1 }]);
    for p in 0..100 {
        let want = memory.0.get(&p).cloned().unwrap_or_else(|| filled(0));
        assert_eq!(page(&snapshot, p), *want, "{p}");
    }
    let kinds: Vec<_> = snapshot.disk().extents().collect();
    let range = |first, count| PageRange { first, count };
    assert_eq!(
        kinds,
        [
            (range(0, 1000), PageKind::Zero),
            (range(1000, 100), PageKind::Data),
            (range(1100, (1 << 21) - 1100), PageKind::Zero)
        ]
    );
    assert!(snapshot.disk().ensure(1 << 21, 1).is_err());
    assert!(snapshot.disk().ensure(u64::MAX, 2).is_err());
    assert_clean(&store);
}

#[test]
fn everything_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Store>();
    shared::<amber_layers::Snapshot>();
    shared::<Image>();
    shared::<StoreError>();
    sent::<amber_layers::SnapshotWriter>();
}

#[test]
fn zero_pages_are_holes_of_the_memory_file() {
    use rustix::fs::fstat;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let meta = publish(&store, None, 1 << 17, &Pages::of([(7, noise(7))]), NewSnapshot::default()).unwrap();
    let snapshot = store.open_snapshot(&meta.id).unwrap();
    snapshot.memory().ensure(0, 1 << 17).unwrap();
    let stat = fstat(snapshot.memory().backing()).unwrap();
    assert_eq!(stat.st_size, 512 << 20);
    assert_eq!(stat.st_blocks * 512, PAGE_SIZE as i64);
}

#[test]
fn children_store_what_changed_and_outlive_their_parents() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = Pages::of((0..1000).map(|p| (p, noise(p))));
    let first = publish(&store, None, 1000, &base, NewSnapshot::default()).unwrap();
    let snapshot = store.open_snapshot(&first.id).unwrap();
    // The parent's pages were needed by the guest before it wrote to them, so they can be compared.
    snapshot.memory().ensure(0, 1000).unwrap();
    let dirty =
        Pages::of([(3, noise(3)), (4, noise(4000)), (5, filled(0)), (900, noise(900)), (999, noise(1))]);
    let mut writer = store.writer();
    let stats = writer.memory(Some(snapshot.memory()), 1200, dirty.numbers(), &dirty).unwrap();
    assert_eq!((stats.dirty, stats.zero, stats.same, stats.own), (5, 1, 2, 2));
    let parent = Some(snapshot.meta().as_parent());
    let second = writer.publish(NewSnapshot { parent: parent.clone(), ..NewSnapshot::default() }).unwrap();
    assert_eq!(second.parent, parent);
    assert!(second.own_bytes < 12_000 && second.total_bytes > 4_000_000, "{second:?}");
    drop(snapshot);
    let usage = store.du().unwrap();
    assert!(store.delete(&first.id).unwrap());
    assert_eq!(store.du().unwrap().layer_bytes, usage.layer_bytes, "the child needs both layers");
    assert!(matches!(store.open_snapshot(&first.id), Err(StoreError::NotFound { .. })));
    let child = store.open_snapshot(&second.id).unwrap();
    assert_eq!(child.memory().layer_count(), 2);
    for p in (0..1200).rev() {
        let want = dirty.0.get(&p).or_else(|| base.0.get(&p)).cloned().unwrap_or_else(|| filled(0));
        assert_eq!(page(&child, p), *want, "{p}");
    }
    assert_clean(&store);
    drop(child);
    assert!(store.delete(&second.id).unwrap());
    assert_eq!(store.du().unwrap(), Default::default(), "bytes come back at once");
    assert!(!store.delete(&second.id).unwrap());
}

#[test]
fn a_layer_that_no_page_needs_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let meta = publish(&store, None, 4, &Pages::of([(1, noise(1))]), NewSnapshot::default()).unwrap();
    let snapshot = store.open_snapshot(&meta.id).unwrap();
    let gone =
        publish(&store, Some(snapshot.memory()), 4, &Pages::of([(1, filled(0))]), NewSnapshot::default());
    let gone = store.open_snapshot(&gone.unwrap().id).unwrap();
    assert_eq!(gone.memory().layer_count(), 0);
    assert_eq!(content(gone.memory()), vec![0; 4 * PAGE_SIZE]);
    // Nothing changed: no new layer at all.
    let same =
        publish(&store, Some(snapshot.memory()), 4, &Pages::default(), NewSnapshot::default()).unwrap();
    let same = store.open_snapshot(&same.id).unwrap();
    assert_eq!(content(same.memory()), content(snapshot.memory()));
    assert_eq!(files(dir.path()).iter().filter(|f| f.starts_with("layers/")).count(), 1);
}

#[test]
fn equal_content_is_stored_once_and_heals_a_damaged_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let dirty = Pages::of((0..40).map(|p| (p, noise(p))));
    let a = publish(&store, None, 40, &dirty, NewSnapshot::default()).unwrap();
    let b = publish(&store, None, 40, &dirty, NewSnapshot::default()).unwrap();
    assert_ne!(a.id, b.id);
    let layers: Vec<_> = files(dir.path()).into_iter().filter(|f| f.starts_with("layers/")).collect();
    assert_eq!(layers.len(), 1);
    let path = dir.path().join(&layers[0]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[500] ^= 1;
    fs::write(&path, bytes).unwrap();
    let problems = store.verify().unwrap().problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].snapshots.len(), 2, "both are affected");
    publish(&store, None, 40, &dirty, NewSnapshot::default()).unwrap();
    assert_clean(&store);
}

#[test]
fn the_same_name_keeps_its_id_and_gets_the_newest_content() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let old = publish(&store, None, 1, &Pages::of([(0, noise(1))]), named("team/a")).unwrap();
    let running = store.open_snapshot(&old.id).unwrap();
    let new = publish(&store, None, 1, &Pages::of([(0, noise(2))]), named("team/a")).unwrap();
    assert_eq!(new.id, old.id);
    assert_ne!(new.build, old.build);
    assert_eq!(store.resolve("team/a").unwrap().unwrap(), new);
    assert_eq!(store.list(&ListFilter::default()).unwrap(), std::slice::from_ref(&new));
    assert_eq!(page(&store.open_snapshot(&new.id).unwrap(), 0), *noise(2));
    // A sandbox of the old content runs on, and can still be snapshotted.
    assert_eq!(files(dir.path()).iter().filter(|f| f.starts_with("layers/")).count(), 1);
    let child =
        publish(&store, Some(running.memory()), 1, &Pages::default(), NewSnapshot::default()).unwrap();
    assert!(matches!(store.delete(&old.id), Err(StoreError::InUse { .. })));
    assert_eq!(page(&running, 0), *noise(1));
    drop(running);
    assert_eq!(page(&store.open_snapshot(&child.id).unwrap(), 0), *noise(1));
    assert!(store.delete(&child.id).unwrap());
    assert!(store.delete(&new.id).unwrap());
    assert_eq!(store.du().unwrap(), Default::default());
}

#[test]
fn tags_are_contents_of_one_id() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let tagged = |tag: &str, seed| {
        let new = NewSnapshot { tag: Some(tag.into()), ..named("app") };
        publish(&store, None, 1, &Pages::of([(0, noise(seed))]), new).unwrap()
    };
    let v1 = tagged("v1", 1);
    let v2 = tagged("v2", 2);
    assert_eq!(v1.id, v2.id);
    let resolve = |name: &str| store.resolve(name).unwrap().map(|m| m.tag);
    assert_eq!(resolve("app:v1").as_deref(), Some("v1"));
    assert_eq!(resolve("app").as_deref(), Some("v2"), "newest, for want of a default");
    assert_eq!(resolve(v1.id.as_str()).as_deref(), Some("v2"));
    tagged("default", 3);
    tagged("v1", 4);
    assert_eq!(resolve("app").as_deref(), Some("default"));
    assert_eq!(resolve(&format!("{}:v2", v1.id)).as_deref(), Some("v2"));
    for unknown in ["app:v3", "nobody", "app:../x", "../x", "", ":"] {
        assert_eq!(resolve(unknown), None, "{unknown}");
    }
    assert_eq!(page(&store.open_tagged(&v1.id, "v1").unwrap(), 0), *noise(4));
    assert!(matches!(store.open_tagged(&v1.id, "../x"), Err(StoreError::InvalidName { .. })));
    let named = ListFilter { name: Some("app".into()), ..ListFilter::default() };
    let tags: Vec<String> = store.list(&named).unwrap().into_iter().map(|m| m.tag).collect();
    assert_eq!(tags, ["v1", "default", "v2"], "newest first");
    assert!(store.delete(&v1.id).unwrap(), "all tags go together");
    assert_eq!(store.du().unwrap(), Default::default());
}

#[test]
fn lists_are_filtered_and_names_checked() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let put = |kind, source: &str, names: &[&str]| {
        let names = names.iter().map(|n| (*n).to_owned()).collect();
        let new = NewSnapshot { kind, source: Some(source.into()), names, ..NewSnapshot::default() };
        publish(&store, None, 1, &Pages::default(), new)
    };
    let base = put(Kind::Template, "build", &["base"]).unwrap();
    let a = put(Kind::Snapshot, "sbx1", &[]).unwrap();
    let b = put(Kind::Snapshot, "sbx1", &["b", "bb"]).unwrap();
    let c = put(Kind::Snapshot, "sbx2", &[]).unwrap();
    let ids = |filter: ListFilter| -> Vec<SnapshotId> {
        store.list(&filter).unwrap().into_iter().map(|m| m.id).collect()
    };
    let all = ListFilter::default();
    assert_eq!(ids(all.clone()), [&c, &b, &a, &base].map(|m| m.id.clone()));
    assert_eq!(ids(ListFilter { kind: Some(Kind::Template), ..all.clone() }), vec![base.id.clone()]);
    assert_eq!(ids(ListFilter { source: Some("sbx1".into()), ..all.clone() }), [b.id.clone(), a.id.clone()]);
    assert_eq!(ids(ListFilter { name: Some("bb".into()), ..all.clone() }), vec![b.id.clone()]);
    assert_eq!(ids(ListFilter { name: Some(c.id.to_string()), ..all.clone() }), [c.id]);
    assert_eq!(ids(ListFilter { name: Some("nobody".into()), ..all }), []);
    assert!(matches!(put(Kind::Snapshot, "s", &["base", "b"]), Err(StoreError::NameConflict { .. })));
    assert!(matches!(put(Kind::Snapshot, "s", &["Upper"]), Err(StoreError::InvalidName { .. })));
    let tag = NewSnapshot { tag: Some("a/b".into()), ..NewSnapshot::default() };
    let bad_tag = publish(&store, None, 1, &Pages::default(), tag);
    assert!(matches!(bad_tag, Err(StoreError::InvalidName { .. })));
    let huge = NewSnapshot { metadata: "x".repeat(600 << 10), ..NewSnapshot::default() };
    assert!(matches!(
        publish(&store, None, 1, &Pages::default(), huge),
        Err(StoreError::InvalidInput { .. })
    ));
    assert_clean(&store);
}

#[test]
fn a_snapshot_in_use_is_not_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let meta = publish(&store, None, 1, &Pages::of([(0, noise(1))]), NewSnapshot::default()).unwrap();
    let other = open(dir.path());
    let running = other.open_snapshot(&meta.id).unwrap();
    let twice = other.open_snapshot(&meta.id).unwrap();
    match store.delete(&meta.id) {
        Err(StoreError::InUse { id, holders }) => {
            assert_eq!(id, meta.id);
            assert!(holders.is_empty() || holders == [std::process::id()]);
        }
        other => panic!("{other:?}"),
    }
    drop(running);
    assert!(store.delete(&meta.id).is_err());
    drop(twice);
    assert!(store.delete(&meta.id).unwrap());
}

#[test]
fn deleting_by_force_frees_the_bytes_and_leaves_the_users_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Pages::of((0..100).map(|p| (p, noise(p))));
    let meta = publish(&store, None, 100, &content, NewSnapshot::default()).unwrap();
    let other = open(dir.path());
    let running = other.open_snapshot(&meta.id).unwrap();
    assert!(store.delete(&meta.id).is_err());
    assert!(store.delete_forced(&meta.id).unwrap());
    assert!(!store.delete_forced(&meta.id).unwrap());
    assert_eq!(store.du().unwrap(), Default::default());
    assert_clean(&store);
    assert_eq!(page(&running, 77), *noise(77));
    // It can still be the parent of another.
    let dirty = Pages::of([(0, filled(7))]);
    let child = publish(&other, Some(running.memory()), 100, &dirty, NewSnapshot::default()).unwrap();
    drop(running);
    assert_eq!(page(&store.open_snapshot(&child.id).unwrap(), 99), *noise(99));
    assert_clean(&store);
}

#[test]
fn images_that_are_kept_do_not_keep_the_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let meta = publish(&store, None, 1, &Pages::of([(0, noise(1))]), NewSnapshot::default()).unwrap();
    let first = store.open_snapshot(&meta.id).unwrap();
    first.memory().ensure(0, 1).unwrap();
    let kept = (Arc::clone(first.memory()), Arc::clone(first.disk()));
    drop(first);
    let second = store.open_snapshot(&meta.id).unwrap();
    assert!(Arc::ptr_eq(second.memory(), &kept.0) && second.memory().is_present(0));
    drop(second);
    assert!(open(dir.path()).delete(&meta.id).unwrap());
}

#[test]
fn a_quota_is_kept_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = |seed: u64| Pages::of((0..64).map(|p| (p, noise(seed + p))));
    let quota = 700 << 10;
    store.set_quota(Some(quota));
    let first = publish(&store, None, 64, &content(0), NewSnapshot::default()).unwrap();
    publish(&store, None, 64, &content(1000), NewSnapshot::default()).unwrap();
    let before = store.du().unwrap();
    match publish(&store, None, 64, &content(2000), NewSnapshot::default()) {
        Err(StoreError::Quota { quota: said, used, .. }) => {
            assert_eq!((said, used), (quota, before.layer_bytes + before.manifest_bytes));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(store.du().unwrap(), before);
    assert_clean(&store);
    // A full store still takes what needs no room of its own, but not even a manifest beyond it.
    assert!(store.delete(&first.id).unwrap());
    publish(&store, None, 64, &content(2000), NewSnapshot::default()).unwrap();
    let used = store.du().unwrap();
    store.set_quota(Some(used.layer_bytes + used.manifest_bytes));
    let tiny = publish(&store, None, 64, &Pages::default(), NewSnapshot::default());
    assert!(matches!(tiny, Err(StoreError::Quota { .. })));
    store.set_quota(None);
    publish(&store, None, 64, &content(3000), NewSnapshot::default()).unwrap();
    assert_clean(&store);
}

#[test]
fn a_damaged_neighbour_keeps_all_layers() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let a = publish(&store, None, 1, &Pages::of([(0, noise(1))]), NewSnapshot::default()).unwrap();
    let b = publish(&store, None, 1, &Pages::of([(0, noise(2))]), NewSnapshot::default()).unwrap();
    let manifest = dir.path().join(format!("snapshots/{}/default.manifest", b.id));
    fs::write(&manifest, "not a manifest").unwrap();
    assert_eq!(
        store.list(&ListFilter::default()).unwrap(),
        std::slice::from_ref(&a),
        "the others are listed"
    );
    assert!(matches!(store.resolve(b.id.as_str()), Err(StoreError::Format(_))));
    assert!(store.delete(&a.id).unwrap());
    // Nobody can tell what the damaged one needs.
    assert_eq!(files(dir.path()).iter().filter(|f| f.starts_with("layers/")).count(), 2);
    let kept = store.gc().unwrap();
    assert_eq!((kept.layers, kept.unreadable), (0, 1));
    assert_eq!(store.verify().unwrap().problems.len(), 1);
    assert!(store.delete(&b.id).unwrap(), "a damaged snapshot can be deleted");
    assert_eq!(store.du().unwrap(), Default::default());
}

#[test]
fn a_missing_layer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let a = publish(&store, None, 1, &Pages::of([(0, noise(1))]), NewSnapshot::default()).unwrap();
    let layer = files(dir.path()).into_iter().find(|f| f.starts_with("layers/")).unwrap();
    fs::remove_file(dir.path().join(&layer)).unwrap();
    match store.open_snapshot(&a.id) {
        Err(StoreError::MissingLayer { layer: id, .. }) => assert_eq!(format!("layers/{id}.layer"), layer),
        other => panic!("{other:?}"),
    }
    let problems = store.verify().unwrap().problems;
    assert!(matches!(problems[0].error, StoreError::MissingLayer { .. }));
    assert_eq!(problems[0].snapshots, [(a.id, "default".to_owned())]);
}

#[test]
fn foreign_and_newer_directories_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "").unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StoreError::NotAStore { .. })));
    assert_eq!(files(dir.path()), ["thesis.tex"], "nothing was added");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("STORE"), "amberbox store 2\n").unwrap();
    let newer = Store::open(dir.path()).unwrap_err();
    assert!(newer.to_string().contains("version 2, this Amberbox reads up to 1"), "{newer}");
    fs::write(dir.path().join("STORE"), [0xff, 0xfe]).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Format(_))));
    assert!(matches!(Store::open_read_only(&dir.path().join("none")), Err(StoreError::Io { .. })));
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(Store::open(&file).is_err());
}

#[test]
fn templates_are_adopted_once_and_renewed_under_their_name() {
    let home = tempfile::tempdir().unwrap();
    let store = open(&home.path().join("store"));
    let template = |seed: u64| {
        let dir = tempfile::tempdir_in(home.path()).unwrap();
        let built = open(dir.path());
        let new = NewSnapshot { kind: Kind::Template, ..named("base") };
        let meta = publish(&built, None, 64, &Pages::of((0..64).map(|p| (p, noise(seed + p)))), new).unwrap();
        (dir, meta)
    };
    let (dir, meta) = template(1000);
    let id = store.adopt(dir.path()).unwrap();
    assert_eq!(id, meta.id);
    let before = files(store.dir());
    assert_eq!(store.adopt(dir.path()).unwrap(), id);
    assert_eq!(files(store.dir()), before);
    let running = store.open_snapshot(&id).unwrap();
    assert_eq!(running.meta(), &meta);
    // The installed template goes away; ours stays.
    fs::remove_dir_all(dir.path()).unwrap();
    assert_eq!(page(&running, 63), *noise(1063));
    let (dir, newer) = template(2000);
    assert_ne!(newer.id, id);
    assert_eq!(store.adopt(dir.path()).unwrap(), id, "the name keeps its id");
    assert_eq!(page(&store.open_snapshot(&id).unwrap(), 0), *noise(2000));
    assert_eq!(page(&running, 0), *noise(1000));
    drop(running);
    store.gc().unwrap();
    assert_clean(&store);
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(store.adopt(empty.path()), Err(StoreError::Format(_))));
    open(empty.path());
    assert!(matches!(store.adopt(empty.path()), Err(StoreError::NotATemplate { found: 0, .. })));
}

#[test]
fn a_child_of_another_stores_snapshot_brings_its_layers_along() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (open(&dir.path().join("here")), open(&dir.path().join("there")));
    let meta =
        publish(&there, None, 2, &Pages::of([(0, noise(1)), (1, noise(2))]), NewSnapshot::default()).unwrap();
    let parent = there.open_snapshot(&meta.id).unwrap();
    let dirty = Pages::of([(1, noise(3))]);
    let child = publish(&here, Some(parent.memory()), 2, &dirty, NewSnapshot::default()).unwrap();
    drop(parent);
    assert!(there.delete(&meta.id).unwrap());
    let child = here.open_snapshot(&child.id).unwrap();
    assert_eq!((page(&child, 0), page(&child, 1)), (*noise(1), *noise(3)));
    assert_clean(&here);
    assert_clean(&there);
}

#[test]
fn plain_files_are_parents_that_are_stored_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"));
    let path = dir.path().join("rootfs.img");
    let mut raw: Vec<u8> = (0..40).flat_map(|p| if p % 3 == 0 { *filled(0) } else { *noise(p) }).collect();
    raw.truncate(40 * PAGE_SIZE - 100);
    fs::write(&path, &raw).unwrap();
    let image = Image::from_raw_file(&path, 64).unwrap();
    assert_eq!(image.extents().collect::<Vec<_>>(), [(PageRange { first: 0, count: 64 }, PageKind::Data)]);
    raw.resize(64 * PAGE_SIZE, 0);
    assert_eq!(content(&image), raw);
    let dirty = Pages::of([(2, noise(7)), (63, noise(8)), (65, noise(9))]);
    let mut writer = store.writer();
    let stats = writer.disk(Some(&image), 70, dirty.numbers(), &dirty).unwrap();
    assert_eq!(stats.dirty, 70);
    let meta = writer.publish(NewSnapshot::default()).unwrap();
    fs::remove_file(&path).unwrap();
    raw.resize(70 * PAGE_SIZE, 0);
    for (p, content) in &dirty.0 {
        let at = *p as usize * PAGE_SIZE;
        raw[at..at + PAGE_SIZE].copy_from_slice(&content[..]);
    }
    assert_eq!(content(store.open_snapshot(&meta.id).unwrap().disk()), raw);
    assert!(matches!(Image::from_raw_file(&path, 1), Err(amber_layers::ImageError::Read { .. })));
    assert_eq!(content(&Image::zero(3).unwrap()), vec![0; 3 * PAGE_SIZE]);
}

#[test]
fn prefetch_lists_are_added_later() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let meta = publish(&store, None, 9, &Pages::of([(3, noise(1))]), named("a")).unwrap();
    let lists = Prefetch { memory: vec![PageRange { first: 3, count: 1 }], disk: Vec::new() };
    assert!(store.record_prefetch(&meta, &lists).unwrap());
    assert!(store.record_prefetch(&meta, &lists).unwrap());
    let snapshot = store.open_snapshot(&meta.id).unwrap();
    assert_eq!(snapshot.prefetch(), &lists);
    assert_eq!(snapshot.meta().build, meta.build);
    publish(&store, None, 9, &Pages::default(), named("a")).unwrap();
    assert!(!store.record_prefetch(&meta, &lists).unwrap(), "that content is gone");
    store.gc().unwrap();
    drop(snapshot);
    store.gc().unwrap();
    assert_clean(&store);
}

/// Fails or panics at one page, and counts.
struct Broken {
    at: u64,
    panics: bool,
    reads: AtomicU64,
}

impl PageSource for Broken {
    fn read(&self, page: u64, out: &mut Page) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if page == self.at {
            assert!(!self.panics, "page source panics on purpose");
            return Err(io::Error::other("gone"));
        }
        out.copy_from_slice(&noise(page)[..]);
        Ok(())
    }
}

#[test]
fn a_failing_source_fails_the_snapshot_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for (at, panics) in [(0, false), (3000, false), (5999, false), (3000, true)] {
        let source = Broken { at, panics, reads: AtomicU64::new(0) };
        let mut writer = store.writer();
        let failed = writer.threads(3).memory(None, 6000, 0..6000, &source).unwrap_err();
        assert!(matches!(failed, StoreError::Source { .. }), "{failed}");
        assert!(source.reads.load(Ordering::Relaxed) <= 6000);
    }
    let source = Broken { at: u64::MAX, panics: false, reads: AtomicU64::new(0) };
    let mut writer = store.writer();
    writer.threads(3).memory(None, 6000, (0..6000).rev().chain(5..10), &source).unwrap();
    assert_eq!(source.reads.load(Ordering::Relaxed), 6000, "each page is read once");
    drop(writer);
    let outside = store.writer().memory(None, 10, [10], &source);
    assert!(matches!(outside, Err(StoreError::InvalidInput { .. })));
    let limited = store.writer().limit(100_000).memory(None, 6000, 0..6000, &source);
    assert!(matches!(limited, Err(StoreError::DiskFull { .. })));
    assert_clean(&store);
    assert_eq!(store.du().unwrap(), Default::default());
}

#[test]
fn many_threads_decode_each_frame_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let meta =
        publish(&store, None, 2048, &Pages::of((0..2048).map(|p| (p, mixed(p)))), NewSnapshot::default())
            .unwrap();
    let snapshot = store.open_snapshot(&meta.id).unwrap();
    std::thread::scope(|scope| {
        for t in 0..8u64 {
            let snapshot = &snapshot;
            scope.spawn(move || {
                for i in 0..2048 {
                    let p = (i * 769 + t * 131) % 2048;
                    assert_eq!(page(snapshot, p), *mixed(p), "{p}");
                }
            });
        }
    });
    assert_eq!(snapshot.memory().frames_decoded(), 128);
}

#[test]
fn memory_that_equals_the_disk_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // More than one chunk, so that all cores take part; memory holds the file backwards, as a page cache may.
    let disk = Pages::of((0..600).map(|p| (p, noise(p))));
    let cache = Pages::of((0..600).map(|p| (2000 - p, noise(p))).chain([(5, mixed(1)), (6, filled(0))]));
    let mut writer = store.writer();
    let stats = writer.disk(None, 1000, disk.numbers(), &disk).unwrap();
    assert_eq!((stats.own, stats.shared), (600, 0));
    let stats = writer.memory(None, 4096, cache.numbers(), &cache).unwrap();
    assert_eq!((stats.dirty, stats.zero, stats.shared, stats.own), (602, 1, 600, 1));
    let meta = writer.publish(NewSnapshot::default()).unwrap();
    assert!(meta.own_bytes < 610 * PAGE_SIZE as u64, "{}", meta.own_bytes);
    let base = store.open_snapshot(&meta.id).unwrap();
    for (number, want) in &cache.0 {
        assert_eq!(page(&base, *number), **want, "{number}");
    }

    // Of the parent's disk, what is decoded is known.
    base.disk().ensure(100, 50).unwrap();
    let decoded: Vec<u64> = (0..600).filter(|p| base.disk().is_present(*p)).collect();
    assert!((50..100).contains(&decoded.len()));
    let read = Pages::of((0..600).map(|p| (p, noise(p))).chain([(700, mixed(7))]));
    let mut writer = store.writer();
    writer.share(base.disk()).unwrap();
    writer.disk(Some(base.disk()), 1000, [], &Pages::default()).unwrap();
    let stats = writer.memory(None, 4096, read.numbers(), &read).unwrap();
    assert_eq!((stats.shared, stats.own), (decoded.len() as u64, 601 - decoded.len() as u64));
    let child = writer.publish(NewSnapshot::default()).unwrap();
    drop(base);
    assert!(store.delete(&meta.id).unwrap());
    let child = store.open_snapshot(&child.id).unwrap();
    for (number, want) in &read.0 {
        assert_eq!(page(&child, *number), **want, "{number}");
    }
    assert_clean(&store);
}

#[test]
fn a_claimed_snapshot_is_one_owners_and_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = SnapshotId::parse("sandbox1").unwrap();
    let memory = Pages::of((0..40).map(|p| (p, noise(p))));
    let publish = || {
        let mut writer = store.writer();
        writer.memory(None, 64, memory.numbers(), &memory).unwrap();
        let new = NewSnapshot { kind: Kind::Sandbox, id: Some(id.clone()), ..NewSnapshot::default() };
        assert_eq!(writer.publish(new).unwrap().id, id);
    };
    publish();
    let layers = || files(dir.path()).iter().filter(|f| f.ends_with(".layer")).count();
    let open = store.open_snapshot(&id).unwrap();
    let claim = store.claim(&id).unwrap().unwrap();
    assert!(store.claim(&id).unwrap().is_none() && store.meta(&id, "default").unwrap().is_none());
    // What was opened before can still be read.
    let mut page = [0; PAGE_SIZE];
    open.memory().read_page(7, &mut page).unwrap();
    assert_eq!(page, *noise(7));

    // Collections leave it alone: it may be put back.
    store.gc().unwrap();
    assert_eq!(layers(), 1);
    claim.put_back().unwrap();
    assert_eq!(store.meta(&id, "default").unwrap().unwrap().kind, Kind::Sandbox);
    assert!(!store.delete(&SnapshotId::parse("other").unwrap()).unwrap());

    let claim = store.claim(&id).unwrap().unwrap();
    store.gc().unwrap();
    assert_eq!(layers(), 1);
    open.memory().read_page(9, &mut page).unwrap();
    assert_eq!(page, *noise(9));
    drop(open);
    drop(claim);
    assert_eq!(layers(), 0);
    assert!(fs::read_dir(dir.path().join("tmp")).unwrap().next().is_none());

    // A new one under the same id meanwhile is not overwritten.
    publish();
    let claim = store.claim(&id).unwrap().unwrap();
    publish();
    assert!(claim.put_back().is_err());
    assert_eq!(layers(), 1);
    assert!(store.verify().unwrap().problems.is_empty());

    // What a dead process had claimed goes when the store is opened again.
    let claim = store.claim(&id).unwrap().unwrap();
    let area = fs::read_dir(dir.path().join("tmp")).unwrap().next().unwrap().unwrap().path();
    let left = dir.path().join("tmp/left");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("lock"), "").unwrap();
    fs::rename(area.join("claimed"), left.join("claimed")).unwrap();
    drop(claim);
    assert_eq!(layers(), 1);
    drop(Store::open(dir.path()).unwrap());
    assert_eq!(layers(), 0);
    assert!(fs::read_dir(dir.path().join("tmp")).unwrap().next().is_none());
}
