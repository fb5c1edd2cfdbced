//! Random messages survive the trip, and random bytes never do harm.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;

use amber_proto::*;
use proptest::option;
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    proptest::string::string_regex("(?s).{0,40}").unwrap()
}

fn map() -> impl Strategy<Value = BTreeMap<String, String>> {
    proptest::collection::btree_map(text(), text(), 0..5)
}

fn exec() -> impl Strategy<Value = Exec> {
    let pty = option::of((any::<u16>(), any::<u16>()).prop_map(|(cols, rows)| PtySize { cols, rows }));
    let strings =
        (text(), proptest::collection::vec(text(), 0..5), map(), option::of(text()), option::of(text()));
    (strings, any::<bool>(), pty, option::of(text()), option::of(any::<u64>())).prop_map(
        |((cmd, args, envs, cwd, user), stdin, pty, tag, timeout_ms)| Exec {
            cmd,
            args,
            envs,
            cwd,
            user,
            stdin,
            pty,
            tag,
            timeout_ms,
        },
    )
}

fn entry() -> impl Strategy<Value = EntryInfo> {
    let kind = prop_oneof![Just(FileType::File), Just(FileType::Dir), Just(FileType::Unknown)];
    let strings = (text(), text(), text(), text(), text(), option::of(text()), map());
    (strings, kind, any::<u64>(), any::<u32>(), any::<i64>()).prop_map(
        |(
            (name, path, permissions, owner, group, symlink_target, metadata),
            kind,
            size,
            mode,
            modified_ns,
        )| EntryInfo {
            name,
            path,
            kind,
            size,
            mode,
            permissions,
            owner,
            group,
            modified_ns,
            symlink_target,
            metadata,
        },
    )
}

/// Tries every decoder on a payload.
fn decode_everything(payload: &[u8]) {
    let _ = decode_head(payload);
    let _ = decode_args::<Exec>(payload);
    let _ = decode_args::<Identify>(payload);
    let _ = decode_args::<Write>(payload);
    let _ = decode_args::<SendStdin>(payload);
    let _ = decode_reply::<List>(payload);
    let _ = decode_reply::<ListProcesses>(payload);
    let _ = decode_reply::<GetInfo>(payload);
    let _ = decode_reply::<GetMetrics>(payload);
    let _ = decode_cbor::<Exit>(payload);
    let _ = decode_cbor::<RemoteError>(payload);
}

proptest! {
    #[test]
    fn messages_survive_the_trip(exec in exec(), entries in proptest::collection::vec(entry(), 0..4), more: bool) {
        let frame = encode_request(&exec).unwrap();
        prop_assert_eq!(decode_args::<Exec>(&frame[HEADER_LEN..]).unwrap(), exec);
        let reply = Entries { entries, more };
        let frame = encode_reply::<List>(&reply).unwrap();
        prop_assert_eq!(decode_reply::<List>(&frame[HEADER_LEN..]).unwrap(), reply);
    }

    #[test]
    fn noise_does_no_harm(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        decode_everything(&payload);
    }

    #[test]
    fn damaged_messages_do_no_harm(exec in exec(), at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
        let mut payload = encode_request(&exec).unwrap().split_off(HEADER_LEN);
        let at = at.index(payload.len());
        payload[at] = byte;
        decode_everything(&payload);
        payload.truncate(cut.index(payload.len()));
        decode_everything(&payload);
    }
}
