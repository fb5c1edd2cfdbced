//! Tests of the manifest container: each refusal, each truncation, each flipped byte.

use super::*;
use proptest::prelude::*;
use std::os::fd::AsRawFd;

const BUILD: BuildId = BuildId([7; 16]);

fn section(id: u16, required: bool, bytes: Vec<u8>) -> Section {
    Section { id: SectionId(id), version: 1, required, bytes }
}

fn sections() -> Vec<Section> {
    vec![
        section(1, true, b"meta".to_vec()),
        section(2, true, vec![3; 64]),
        section(0x100, true, (0..2000u32).flat_map(u32::to_le_bytes).collect()),
        section(0x101, false, Vec::new()),
    ]
}

/// Opens bytes as a manifest and reads all of it.
fn load(bytes: &[u8]) -> Result<Vec<Section>, FormatError> {
    // A memory file: thousands of variants would keep a disk busy.
    let memory = rustix::fs::memfd_create("manifest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
    std::fs::write(&path, bytes).unwrap();
    let read = || -> Result<Vec<Section>, StoreError> {
        let m = Manifest::open(&path)?;
        m.check_known()?;
        m.all()
    };
    read().map_err(|e| match e {
        StoreError::Format(e) => e,
        e => panic!("{e}"),
    })
}

/// Repairs the header's hash, as a hostile writer would.
fn seal(bytes: &mut [u8]) {
    let count = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
    let end = (HEADER_LEN + count * ENTRY_LEN).min(bytes.len());
    let sum = table_hash(bytes[..HEADER_LEN].try_into().unwrap(), &bytes[HEADER_LEN..end]);
    bytes[48..64].copy_from_slice(&sum);
}

#[test]
fn sections_come_back() {
    let bytes = encode(BUILD, &sections()).unwrap();
    assert_eq!(load(&bytes).unwrap(), sections());
    assert!(bytes.len() < 6000, "sections are compressed");
}

#[test]
fn every_truncation_and_flip_is_noticed() {
    let bytes = encode(BUILD, &sections()).unwrap();
    for len in 0..bytes.len() {
        assert!(matches!(load(&bytes[..len]), Err(FormatError::Truncated { .. })), "{len}");
    }
    assert!(matches!(load(&[&bytes[..], b"x"].concat()), Err(FormatError::Truncated { .. })));
    for at in (0..bytes.len()).step_by(if bytes.len() > 3000 { 3 } else { 1 }).chain(0..400) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(load(&damaged).is_err(), "{at}");
    }
}

#[test]
fn every_reason_for_refusal_has_its_error() {
    let good = encode(BUILD, &sections()).unwrap();
    let forged = |at: usize, value: &[u8]| {
        let mut b = good.clone();
        b[at..at + value.len()].copy_from_slice(value);
        seal(&mut b);
        load(&b).err().unwrap_or_else(|| panic!("accepted with {value:?} at {at}"))
    };
    let reason = |e| match e {
        FormatError::Corrupt { reason, .. } => reason,
        e => panic!("{e}"),
    };
    let entry = |n: usize| HEADER_LEN + n * ENTRY_LEN;
    assert!(matches!(forged(0, b"X"), FormatError::NotASnapshot { .. }));
    assert!(matches!(forged(8, &[9]), FormatError::NewerVersion { found: 9, supported: 1, .. }));
    assert_eq!(reason(forged(8, &[0])), "version 0 does not exist");
    assert_eq!(reason(forged(10, &[0xff, 0xff])), "table of sections does not fit the file");
    assert_eq!(reason(forged(10, &[3])), "sections do not follow each other");
    assert!(matches!(forged(16, &[0xff]), FormatError::Truncated { .. }));
    assert_eq!(reason(forged(entry(0), &[2])), "section appears twice");
    assert!(matches!(forged(entry(0), &[9]), FormatError::UnknownSection { id: 9, .. }));
    assert_eq!(reason(forged(entry(0) + 8, &[1])), "sections do not follow each other");
    assert_eq!(reason(forged(entry(0) + 16, &u64::MAX.to_le_bytes())), "section exceeds the file");
    assert_eq!(reason(forged(entry(0) + 24, &[9])), "section has an impossible length");
    assert_eq!(
        reason(forged(entry(2) + 24, &(1u64 << 40).to_le_bytes())),
        "section has an impossible length"
    );
    assert_eq!(reason(forged(entry(2) + 24, &[1])), "compressed data does not decode to its recorded length");
    assert_eq!(reason(forged(entry(2) + 6, &[7])), "unknown compression codec");
    assert!(matches!(
        forged(entry(2) + 32, &[0; 4]),
        FormatError::HashMismatch { part: Part::Section(0x100), .. }
    ));
    let mut b = good.clone();
    b[40] ^= 1;
    assert!(matches!(load(&b), Err(FormatError::HashMismatch { part: Part::Header, .. })));
}

#[test]
fn unknown_sections_are_skipped_when_optional() {
    let mut all = sections();
    all.push(section(0x42, false, b"from the future".to_vec()));
    assert!(load(&encode(BUILD, &all).unwrap()).is_ok());
    all.last_mut().unwrap().required = true;
    let refused = load(&encode(BUILD, &all).unwrap());
    assert!(matches!(refused, Err(FormatError::UnknownSection { id: 0x42, version: 1, .. })));
}

#[test]
fn a_newer_version_of_a_known_section_is_refused() {
    let mut all = sections();
    all[0].version = 2;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    std::fs::write(&path, encode(BUILD, &all).unwrap()).unwrap();
    let m = Manifest::open(&path).unwrap();
    let refused = m.meta_bytes();
    let wanted = Part::Section(1);
    assert!(
        matches!(refused, Err(StoreError::Format(FormatError::NewerVersion { part, found: 2, supported: 1, .. })) if part == wanted)
    );
    assert!(matches!(
        m.required(SectionId::DISK, 10),
        Err(StoreError::Format(FormatError::Corrupt { reason: "section is missing", .. }))
    ));
    assert!(matches!(
        m.required(SectionId::LAYERS, 10),
        Err(StoreError::Format(FormatError::Corrupt { reason: "section is too long", .. }))
    ));
}

#[test]
fn the_writer_refuses_what_readers_would() {
    let twice = vec![section(1, true, vec![]), section(1, true, vec![])];
    assert!(matches!(encode(BUILD, &twice), Err(StoreError::InvalidInput { .. })));
    let many: Vec<Section> = (0..1025).map(|i| section(i, false, vec![])).collect();
    assert!(matches!(encode(BUILD, &many), Err(StoreError::InvalidInput { .. })));
}

#[test]
fn prefetch_lists_are_checked() {
    let list = Prefetch {
        memory: vec![PageRange { first: 3, count: 2 }],
        disk: vec![PageRange { first: 0, count: 9 }],
    };
    let bytes = list.encode();
    assert_eq!(Prefetch::decode(&bytes, 5, 9).unwrap(), list);
    assert!(Prefetch::decode(&bytes, 4, 9).is_err());
    assert!(Prefetch::decode(&bytes, 5, 8).is_err());
    (0..bytes.len()).for_each(|n| assert!(Prefetch::decode(&bytes[..n], 5, 9).is_err()));
    assert!(Prefetch::decode(&[&bytes[..], &[0]].concat(), 5, 9).is_err());
    assert!(Prefetch::decode(&u32::MAX.to_le_bytes(), 5, 9).is_err());
}

proptest! {
    #[test]
    fn hostile_tables_never_panic(at in 0usize..300, value in any::<[u8; 8]>()) {
        let mut b = encode(BUILD, &sections()).unwrap();
        let at = at.min(b.len() - 8);
        b[at..at + 8].copy_from_slice(&value);
        seal(&mut b);
        let _ = load(&b);
    }
}
