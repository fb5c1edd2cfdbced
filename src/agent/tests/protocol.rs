//! The protocol itself: versions, hostile frames, lost connections, identity.

use amber_proto::{
    Decoder, ErrorCode, Kind, MAX_FRAME, RemoteError, decode_cbor, encode, encode_cbor, header,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::agent::{FileType, Identify};

/// Sends bytes and reads frames until the agent closes the connection or has answered once.
async fn answer(guest: &Guest, bytes: &[u8]) -> Option<(Kind, Vec<u8>)> {
    let mut socket = guest.socket().await;
    // The agent may close before it has read everything.
    let _ = socket.write_all(bytes).await;
    let mut decoder = Decoder::new(4096);
    loop {
        if let Some(frame) = decoder.next_frame().unwrap() {
            return Some((frame.kind, frame.payload.to_vec()));
        }
        match socket.read(decoder.space()).await {
            Ok(count) if count > 0 => decoder.filled(count),
            _ => return None,
        }
    }
}

#[tokio::test]
async fn survives_hostile_frames() {
    let guest = Guest::start().await;
    // Frames that break the rules end the connection; requests that make no sense are answered.
    for bytes in [&[0; 16][..], &[0xff; 64], &header(Kind::REQUEST, MAX_FRAME), b"GET / HTTP/1.1\r\n\r\n"] {
        assert_eq!(answer(&guest, bytes).await, None);
    }
    let depth = 100_000;
    let nested: Vec<u8> = std::iter::repeat_n(0x81, depth).chain([0]).collect();
    let huge_array = [&[0xa1, 0x62, b'o', b'p', 0x9b][..], &u64::MAX.to_le_bytes()].concat();
    for payload in
        [&[][..], &[0xff], &nested, &huge_array, b"\xa1\x62op\x01", b"\xa2\x62op\x64exec\x64args\x01"]
    {
        let (kind, payload) = answer(&guest, &encode(Kind::REQUEST, payload)).await.unwrap();
        assert_eq!(kind, Kind::ERROR);
        assert_eq!(decode_cbor::<RemoteError>(&payload).unwrap().code, ErrorCode::InvalidArgument);
    }
    // Half a frame, and nothing at all.
    drop(guest.socket().await);
    let mut socket = guest.socket().await;
    socket.write_all(&header(Kind::REQUEST, 1000)).await.unwrap();
    drop(socket);
    assert_eq!(guest.sh("echo alive").await.text(), "alive\n");
}

#[tokio::test]
async fn an_unknown_operation_is_unsupported_and_unknown_parts_are_ignored() {
    let guest = Guest::start().await;
    #[derive(serde::Serialize)]
    struct Future<A> {
        v: u16,
        op: &'static str,
        args: A,
        trailer: [u8; 3],
    }
    #[derive(serde::Serialize)]
    struct Args {
        path: &'static str,
        follow: bool,
        nested: Vec<Vec<String>>,
    }
    let args = || Args { path: "/", follow: true, nested: vec![vec!["x".into()]] };
    let unknown =
        encode_cbor(Kind::REQUEST, &Future { v: 9, op: "teleport", args: args(), trailer: [1, 2, 3] })
            .unwrap();
    let (kind, payload) = answer(&guest, &unknown).await.unwrap();
    let error: RemoteError = decode_cbor(&payload).unwrap();
    assert_eq!((kind, error.code, error.v), (Kind::ERROR, ErrorCode::Unsupported, amber_proto::VERSION));
    assert!(
        matches!(AgentError::from(error), AgentError::Unsupported(message) if message.contains("teleport"))
    );
    // Frames of unknown kinds before a known request with unknown fields.
    let mut bytes = encode(Kind(0x77), b"what is this");
    bytes.extend(
        encode_cbor(Kind::REQUEST, &Future { v: 9, op: "stat", args: args(), trailer: [1, 2, 3] }).unwrap(),
    );
    let (kind, payload) = answer(&guest, &bytes).await.unwrap();
    assert_eq!(kind, Kind::REPLY);
    assert_eq!(amber_proto::decode_reply::<amber_proto::Stat>(&payload).unwrap().kind, FileType::Dir);
}

#[tokio::test]
async fn a_lost_agent_is_an_error_of_its_own() {
    let mut guest = Guest::start().await;
    let mut process = guest.agent.exec(&shell("echo $$; exec sleep 100")).await.unwrap();
    let pid = read_until(&mut process, "\n").await;
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    assert!(matches!(process.next().await, Err(AgentError::ConnectionLost(_))));
    assert!(process.next().await.unwrap().is_none());
    assert!(matches!(guest.agent.info().await, Err(AgentError::Unreachable(_))));
    Command::new("kill").args(["-9", pid.trim()]).status().unwrap();
}

#[tokio::test]
async fn identity() {
    let guest = Guest::start().await;
    let etc = guest.dir.path().join("etc");
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n").unwrap();
    let before = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let identify = Identify {
        sandbox_id: "iabc".into(),
        hostname: Some("iabc".into()),
        wall_clock_ns: Some(1),
        entropy: vec![7; 64],
        machine_id: Some("0123456789abcdef0123456789abcdef".into()),
        default_workdir: Some("/".into()),
        default_user: Some("root".into()),
        ..Identify::default()
    };
    let identified = guest.agent.identify(&identify).await.unwrap();
    assert_eq!(identified.warnings, Vec::<String>::new());
    assert_eq!(fs::read_to_string(etc.join("hostname")).unwrap(), "iabc\n");
    assert_eq!(fs::read_to_string(etc.join("hosts")).unwrap(), "127.0.0.1 localhost\n127.0.1.1\tiabc\n");
    assert_eq!(fs::read_to_string(etc.join("machine-id")).unwrap(), "0123456789abcdef0123456789abcdef\n");
    // As an ordinary process the agent leaves the machine alone.
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
    let info = guest.agent.info().await.unwrap();
    assert_eq!((info.protocol, info.sandbox_id.as_deref()), (amber_proto::VERSION, Some("iabc")));
    assert!(info.uptime_ns > 0 && !info.boot_id.is_empty() && info.operations.iter().any(|op| op == "exec"));
    if fs::metadata(&etc).unwrap().uid() == 0 {
        assert_eq!(guest.sh("echo $USER; pwd").await.text(), "root\n/\n");
    }
}

#[tokio::test]
async fn processes_are_held_back_until_the_copy_is_identified() {
    let guest = Guest::start().await;
    for thaw in [true, false] {
        guest.agent.freeze().await.unwrap();
        let agent = guest.agent.clone();
        let held = tokio::spawn(async move { run(agent.exec(&shell("echo $WHO")).await.unwrap()).await });
        // Everything else is answered, in the order in which it comes.
        assert!(guest.agent.processes().await.unwrap().is_empty());
        assert!(!held.is_finished());
        if thaw {
            guest.agent.thaw().await.unwrap();
            assert_eq!(held.await.unwrap().text(), "\n");
        } else {
            let identify =
                Identify { envs: [("WHO".to_owned(), "copy".to_owned())].into(), ..Identify::default() };
            guest.agent.identify(&identify).await.unwrap();
            assert_eq!(held.await.unwrap().text(), "copy\n");
        }
    }
    guest.agent.thaw().await.unwrap();
}

#[tokio::test]
async fn metrics_sync_shutdown() {
    let mut guest = Guest::start().await;
    let metrics = guest.agent.metrics().await.unwrap();
    assert!(metrics.mem_total > metrics.mem_used && metrics.disk_total > 0 && metrics.cpu_count > 0);
    guest.agent.sync().await.unwrap();
    guest.agent.shutdown().await.unwrap();
    assert!(!guest.child.wait().unwrap().success());
}
