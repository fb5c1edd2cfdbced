//! A newer host talks to an older agent: what agents of version 1 send is frozen in the golden file of the protocol, and played back here
//! to the client of today. Snapshots with such agents exist, so these answers must be understood for ever.

use std::collections::BTreeMap;
use std::sync::Mutex;

use amber_proto::{ErrorCode, Kind, RemoteError, Watch, encode, encode_cbor, encode_error};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::agent::{FileType, Read};

/// An agent that answers every request with the same bytes, and keeps what it was asked.
struct Recorded {
    answer: Vec<u8>,
    asked: Arc<Mutex<Vec<u8>>>,
}

impl Connect for Recorded {
    fn connect(&self, _: u32) -> Connecting {
        let (host, mut guest) = tokio::io::duplex(1 << 16);
        let (answer, asked) = (self.answer.clone(), Arc::clone(&self.asked));
        tokio::spawn(async move {
            let mut request = [0; 4096];
            let count = guest.read(&mut request).await.unwrap();
            asked.lock().unwrap().extend_from_slice(&request[..count]);
            guest.write_all(&answer).await.unwrap();
            // The host closes first, as it does with every agent.
            while guest.read(&mut request).await.is_ok_and(|count| count > 0) {}
        });
        Box::pin(async move { Ok(Box::new(host) as Box<dyn AsyncStream>) })
    }
}

/// The frames that version 1 has frozen, by name.
fn golden() -> BTreeMap<&'static str, Vec<u8>> {
    include_str!("../../../crates/proto/tests/golden/v1.txt")
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, hex)| {
            let digits = hex.as_bytes().chunks(2);
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            (name, digits.map(byte).collect())
        })
        .collect()
}

fn agent(answer: Vec<u8>) -> (Agent, Arc<Mutex<Vec<u8>>>) {
    let asked = Arc::default();
    (Agent::new(Arc::new(Recorded { answer, asked: Arc::clone(&asked) })), asked)
}

#[tokio::test]
async fn answers_of_version_1_are_understood() {
    let golden = golden();
    let (info, asked) = agent(golden["reply info"].clone());
    let told = info.info().await.unwrap();
    assert_eq!((told.protocol, told.operations), (1, vec!["info".to_owned()]));
    assert_eq!(
        *asked.lock().unwrap(),
        golden["request info"],
        "What an agent of version 1 is asked has changed"
    );

    let (stat, _) = agent(golden["reply stat"].clone());
    let entry = stat.stat("x", None).await.unwrap();
    assert_eq!((entry.kind, entry.size), (FileType::File, 5_000_000_000));

    let run = [golden["reply exec"].clone(), golden["stdout"].clone(), golden["exit"].clone()].concat();
    let (exec, _) = agent(run);
    let mut process = exec.exec(&Exec::default()).await.unwrap();
    assert_eq!(process.pid(), 77);
    assert!(matches!(process.next().await.unwrap(), Some(Event::Stdout(_))));
    assert!(matches!(process.next().await.unwrap(), Some(Event::End(Exit { .. }))));

    let read =
        [golden["reply read"].clone(), encode(Kind::DATA, b"content"), encode(Kind::END, &[])].concat();
    let (file, _) = agent(read);
    let mut reader = file.read(&Read::default()).await.unwrap();
    assert_eq!(reader.next().await.unwrap().as_deref(), Some(&b"content"[..]));
    assert_eq!(reader.next().await.unwrap(), None);
}

#[tokio::test]
async fn what_an_older_agent_does_not_have_or_say() {
    // Agents from before these fields were thought of.
    #[derive(Serialize)]
    struct Reply<R> {
        v: u16,
        reply: R,
    }
    #[derive(Serialize)]
    struct Pid {
        pid: u32,
    }
    #[derive(Serialize)]
    struct Code {
        exit_code: i32,
    }
    let run = [
        encode_cbor(Kind::REPLY, &Reply { v: 1, reply: Pid { pid: 5 } }).unwrap(),
        encode_cbor(Kind::EXIT, &Code { exit_code: 3 }).unwrap(),
    ];
    let (exec, _) = agent(run.concat());
    let mut process = exec.exec(&Exec::default()).await.unwrap();
    let end = Exit { exit_code: 3, ..Exit::default() };
    assert_eq!((process.pid(), process.next().await.unwrap()), (5, Some(Event::End(end))));

    let unknown = RemoteError { v: 1, code: ErrorCode::Unsupported, message: "no 'watch' here".into() };
    let (watch, _) = agent(encode_error(&unknown));
    let error = watch.watch(&Watch::default()).await.unwrap_err();
    assert!(matches!(error, AgentError::Unsupported(message) if message.contains("watch")));
}
