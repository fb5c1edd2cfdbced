//! The encodings of protocol version 1, frozen: snapshots with agents of this version exist, so what this test compares with may be extended
//! by new lines but never changed. `AMBERBOX_BLESS=1` appends the lines that are missing.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fmt::Debug;

use amber_proto::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Checks that a frame decodes to a message.
type Check = Box<dyn Fn(&[u8])>;

/// A message, its frame, and a check that the frame decodes to the message.
struct Sample {
    name: String,
    frame: Vec<u8>,
    decodes: Check,
}

fn payload(frame: &[u8], kind: Kind) -> Vec<u8> {
    let mut decoder = Decoder::new(64);
    let mut rest = frame;
    loop {
        if let Some(found) = decoder.next_frame().unwrap() {
            assert_eq!(found.kind, kind);
            return found.payload.to_vec();
        }
        let space = decoder.space();
        let count = space.len().min(rest.len());
        assert!(count > 0, "The frame is cut");
        space[..count].copy_from_slice(&rest[..count]);
        decoder.filled(count);
        rest = &rest[count..];
    }
}

fn request<R: Request + PartialEq + Debug + Clone + 'static>(request: R) -> Sample {
    Sample {
        name: format!("request {}", R::OP),
        frame: encode_request(&request).unwrap(),
        decodes: Box::new(move |frame| {
            let payload = payload(frame, Kind::REQUEST);
            assert_eq!(decode_head(&payload).unwrap(), RequestHead { v: 1, op: R::OP.to_owned() });
            assert_eq!(decode_args::<R>(&payload).unwrap(), request);
        }),
    }
}

fn reply<R: Request>(reply: R::Reply) -> Sample
where
    R::Reply: PartialEq + Debug + Clone + 'static,
{
    Sample {
        name: format!("reply {}", R::OP),
        frame: encode_reply::<R>(&reply).unwrap(),
        decodes: Box::new(move |frame| {
            assert_eq!(decode_reply::<R>(&payload(frame, Kind::REPLY)).unwrap(), reply);
        }),
    }
}

fn message<T: Serialize + DeserializeOwned + PartialEq + Debug + 'static>(
    name: &str,
    kind: Kind,
    value: T,
) -> Sample {
    Sample {
        name: name.to_owned(),
        frame: encode_cbor(kind, &value).unwrap(),
        decodes: Box::new(move |frame| assert_eq!(decode_cbor::<T>(&payload(frame, kind)).unwrap(), value)),
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn samples() -> Vec<Sample> {
    let pid = || Target::from(77);
    let entry = || EntryInfo {
        name: "f".into(),
        path: "/home/user/f".into(),
        kind: FileType::File,
        size: 5_000_000_000,
        mode: 0o644,
        permissions: "-rw-r--r--".into(),
        owner: "user".into(),
        group: "user".into(),
        modified_ns: -1,
        symlink_target: Some("/t".into()),
        metadata: map(&[("k", "v")]),
    };
    let process = ProcessInfo {
        pid: 77,
        cmd: "/bin/bash".into(),
        args: vec!["-l".into(), "-c".into(), "true".into()],
        envs: map(&[("A", "1")]),
        cwd: Some("/tmp".into()),
        tag: None,
        pty: true,
    };
    vec![
        request(GetInfo {}),
        reply::<GetInfo>(Info {
            agent: "0.1.0".into(),
            protocol: 1,
            operations: vec!["info".into()],
            uptime_ns: 1,
            boot_id: "b".into(),
            sandbox_id: Some("i1".into()),
        }),
        request(Identify {
            sandbox_id: "i1".into(),
            hostname: Some("h".into()),
            wall_clock_ns: Some(1_800_000_000_000_000_000),
            entropy: (0..64).collect(),
            machine_id: Some("0".repeat(32)),
            envs: map(&[("A", "1"), ("B", "")]),
            reset_envs: true,
            default_user: Some("user".into()),
            default_workdir: None,
        }),
        reply::<Identify>(Identified { warnings: vec!["w".into()], hooks: Vec::new() }),
        request(Exec {
            cmd: "/bin/bash".into(),
            args: vec!["-l".into(), "-c".into(), "echo ü".into()],
            envs: map(&[("A", "1")]),
            cwd: Some("~/x".into()),
            user: Some("root".into()),
            stdin: true,
            pty: Some(PtySize { cols: 80, rows: 24 }),
            tag: Some("t".into()),
            timeout_ms: Some(60_000),
        }),
        reply::<Exec>(Started { pid: 77 }),
        request(Connect { process: Target { pid: None, tag: Some("t".into()) } }),
        request(ListProcesses {}),
        reply::<ListProcesses>(Processes { processes: vec![process], more: true }),
        request(Signal { process: pid(), signal: 9 }),
        reply::<Signal>(Done {}),
        request(SendStdin { process: pid() }),
        request(CloseStdin { process: pid() }),
        request(PtyResize { process: pid(), size: PtySize { cols: 100, rows: 30 } }),
        request(Stat { path: "f".into(), user: None }),
        reply::<Stat>(entry()),
        request(List { path: "/".into(), user: Some("user".into()), depth: 3 }),
        reply::<List>(Entries { entries: vec![EntryInfo::default(), entry()], more: false }),
        request(Read { path: "f".into(), user: None, offset: 1 << 40, length: Some(0) }),
        reply::<Read>(ReadStart { size: 1, modified_ns: 2 }),
        request(Write {
            path: "f".into(),
            user: None,
            length: Some(9),
            mode: Some(0o755),
            metadata: map(&[("k", "v")]),
        }),
        request(MakeDir { path: "d".into(), user: None }),
        request(Rename { from: "a".into(), to: "b".into(), user: None }),
        request(Remove { path: "a".into(), user: None }),
        request(Forward { port: 8080 }),
        reply::<Forward>(Done {}),
        request(Watch {
            path: "d".into(),
            user: Some("user".into()),
            recursive: true,
            include_entry: true,
            allow_network_mounts: false,
        }),
        reply::<Watch>(WatchStarted {}),
        message(
            "events",
            Kind::EVENTS,
            WatchEvents {
                events: vec![
                    WatchEvent { name: "f".into(), kind: ChangeKind::Create, entry: Some(entry()) },
                    WatchEvent { name: "d/g".into(), kind: ChangeKind::Chmod, entry: None },
                ],
            },
        ),
        request(GetMetrics {}),
        reply::<GetMetrics>(Metrics {
            wall_clock_ns: 1,
            cpu_count: 2,
            cpu_busy_ns: 3,
            cpu_total_ns: 4,
            mem_total: 5,
            mem_used: 6,
            mem_cache: 7,
            disk_total: 8,
            disk_used: 9,
        }),
        request(Sync {}),
        request(Shutdown {}),
        request(Freeze {}),
        request(Thaw {}),
        message(
            "exit",
            Kind::EXIT,
            Exit {
                exit_code: -1,
                exited: false,
                status: "signal: killed".into(),
                error: Some("signal: killed".into()),
                signal: Some(9),
                timed_out: true,
            },
        ),
        message("error", Kind::ERROR, RemoteError::new(ErrorCode::Unsupported, "no")),
        Sample {
            name: "stdout".into(),
            frame: encode(Kind::STDOUT, b"\x00raw\xff"),
            decodes: Box::new(|frame| assert_eq!(payload(frame, Kind::STDOUT), b"\x00raw\xff")),
        },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn version_1_is_frozen() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/v1.txt");
    let mut text = std::fs::read_to_string(path).unwrap_or_default();
    let mut missing = false;
    for sample in samples() {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{}: ", sample.name)));
        match line.map(str::to_owned) {
            Some(golden) => {
                assert_eq!(golden, hex(&sample.frame), "{}", sample.name);
                (sample.decodes)(&unhex(&golden));
            }
            None => {
                missing = true;
                text.push_str(&format!("{}: {}\n", sample.name, hex(&sample.frame)));
            }
        }
    }
    if missing && std::env::var_os("AMBERBOX_BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    } else {
        assert!(
            !missing,
            "Messages without a golden line; run with AMBERBOX_BLESS=1 and check the result in"
        );
    }
}

#[test]
fn every_part_is_optional_and_extensible() {
    #[derive(Serialize)]
    struct Nothing {}
    #[derive(Serialize)]
    struct Extended {
        status: &'static str,
        core_dump: Vec<u8>,
        nested: BTreeMap<&'static str, Vec<Option<f64>>>,
    }
    let empty = encode_cbor(Kind::EXIT, &Nothing {}).unwrap();
    let empty = payload(&empty, Kind::EXIT);
    assert_eq!(decode_cbor::<Exit>(&empty).unwrap(), Exit::default());
    assert_eq!(decode_cbor::<Exec>(&empty).unwrap(), Exec::default());
    assert_eq!(decode_cbor::<Identify>(&empty).unwrap(), Identify::default());
    assert_eq!(decode_cbor::<EntryInfo>(&empty).unwrap(), EntryInfo::default());
    assert_eq!(decode_cbor::<RemoteError>(&empty).unwrap().code, ErrorCode::Internal);
    let nested = [("x", vec![Some(1.5), None])].into();
    let extended =
        encode_cbor(Kind::EXIT, &Extended { status: "s", core_dump: vec![1; 300], nested }).unwrap();
    let exit: Exit = decode_cbor(&payload(&extended, Kind::EXIT)).unwrap();
    assert_eq!(exit, Exit { status: "s".into(), ..Exit::default() });
    // Names that a later version may add.
    #[derive(Serialize)]
    struct Later {
        code: &'static str,
        kind: &'static str,
        message: &'static str,
    }
    let later =
        encode_cbor(Kind::ERROR, &Later { code: "quota_exceeded", kind: "whiteout", message: "m" }).unwrap();
    let later = payload(&later, Kind::ERROR);
    assert_eq!(
        decode_cbor::<RemoteError>(&later).unwrap(),
        RemoteError { v: 0, code: ErrorCode::Internal, message: "m".into() }
    );
    assert_eq!(decode_cbor::<EntryInfo>(&later).unwrap().kind, FileType::Unknown);
}

#[test]
fn messages_that_fit_no_frame_are_refused() {
    let exec = Exec { args: vec!["x".repeat(MAX_FRAME)], ..Exec::default() };
    assert!(matches!(encode_request(&exec), Err(CodecError::TooLong(_))));
    let frame = encode_error(&RemoteError::new(ErrorCode::NotFound, "ü".repeat(MAX_FRAME)));
    let error: RemoteError = decode_cbor(&payload(&frame, Kind::ERROR)).unwrap();
    assert_eq!((error.code, error.message.chars().count()), (ErrorCode::NotFound, 4096));
}
