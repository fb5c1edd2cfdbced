//! Identity, lifetime and errors, over a machine that is a few channels: what it says of its end is what the test says.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use amber_layers::{NewSnapshot, SnapshotId, SnapshotMeta, Store};
use amber_proto::Decoder;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;

use super::instance::Identity;
use super::vm::{Captured, Facts, Orphan, Vm};
use super::*;
use crate::agent::{AsyncStream, Connect, Connecting};

/// What the fake guest does with a connection.
#[derive(Clone, Copy)]
enum Guest {
    /// Answers every request with an empty reply.
    Answers,
    /// Takes the request and says nothing.
    Silent,
    /// Closes every connection.
    Hangs,
}

struct FakeVm {
    guest: Guest,
    ended: watch::Sender<Option<Ended>>,
    kills: AtomicUsize,
    /// A capture waits until it can take this.
    capture: Mutex<()>,
}

impl FakeVm {
    fn new(guest: Guest) -> Arc<Self> {
        Arc::new(Self {
            guest,
            ended: watch::Sender::new(None),
            kills: AtomicUsize::new(0),
            capture: Mutex::default(),
        })
    }

    fn crash(&self) {
        self.ended.send_replace(Some(Ended::Crashed { reason: "test".into(), console: "last words".into() }));
    }
}

impl Vm for FakeVm {
    fn connector(&self) -> Arc<dyn Connect> {
        struct Connector(Guest);
        impl Connect for Connector {
            fn connect(&self, _port: u32) -> Connecting {
                let guest = self.0;
                Box::pin(async move {
                    let (host, agent) = tokio::io::duplex(4096);
                    match guest {
                        Guest::Hangs => return Err(io::ErrorKind::ConnectionReset.into()),
                        _ => tokio::spawn(serve(agent, guest)),
                    };
                    Ok(Box::new(host) as Box<dyn AsyncStream>)
                })
            }
        }
        Arc::new(Connector(self.guest))
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = Ended> + Send>> {
        let mut ended = self.ended.subscribe();
        Box::pin(async move {
            let end = ended.wait_for(Option::is_some).await.unwrap();
            end.clone().unwrap()
        })
    }

    fn kill(&self) {
        self.kills.fetch_add(1, Ordering::SeqCst);
    }

    fn facts(&self) -> Facts {
        Facts { cpu_count: 1, memory_mb: 1, backend: "soft", backend_reason: String::new() }
    }

    fn console(&self) -> String {
        String::new()
    }

    fn capture(
        &self,
        _store: &Arc<Store>,
        _snapshot: NewSnapshot,
        _captured: Captured,
    ) -> Result<SnapshotMeta, Error> {
        let _allowed = self.capture.lock().unwrap();
        Err(Error::StoreFull("no space".into()))
    }
}

/// Reads one request; answers it or keeps the connection open for ever.
async fn serve(mut stream: DuplexStream, guest: Guest) {
    let mut decoder = Decoder::new(4096);
    loop {
        let count = stream.read(decoder.space()).await.unwrap();
        if count == 0 {
            return;
        }
        decoder.filled(count);
        if decoder.next_frame().unwrap().is_some() && matches!(guest, Guest::Answers) {
            let reply =
                amber_proto::encode_reply::<amber_proto::ListProcesses>(&amber_proto::Processes::default());
            stream.write_all(&reply.unwrap()).await.unwrap();
        }
    }
}

/// A registered sandbox over a fake machine, in a store of its own.
fn sandbox(vm: &Arc<FakeVm>, home: &std::path::Path, life: Duration) -> Arc<Sandbox> {
    let identity = Identity {
        id: id::sandbox_id().unwrap(),
        store: Arc::new(Store::open(home).unwrap()),
        home: home.to_owned(),
        template: SnapshotId::parse("origin").unwrap(),
        template_name: Some("base".into()),
        metadata: BTreeMap::from([("key".into(), "value".into())]),
        access_token: String::new(),
        life,
    };
    let sandbox = Sandbox::new(identity, Arc::clone(vm) as Arc<dyn Vm>);
    registry().insert(&sandbox);
    sandbox.watch();
    sandbox
}

/// Runs a test on the runtime that everything here runs on.
fn on_runtime<T>(test: impl Future<Output = T>) -> T {
    runtime().unwrap().block_on(test)
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn the_deadline_ends_a_sandbox_and_stops_its_machine() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Silent);
        let sandbox = sandbox(&vm, home.path(), HOUR);
        let pending = tokio::spawn({
            let sandbox = Arc::clone(&sandbox);
            async move { sandbox.processes().await }
        });
        sandbox.set_timeout(Duration::from_millis(20));
        let error = pending.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::SandboxKilled(_)), "{error}");
        assert!(error.to_string().contains("sandbox was killed or reached its end of life"));
        assert_eq!(sandbox.ended(), Some(Ended::TimedOut));
        assert!(!sandbox.kill().await.unwrap());
        assert!(vm.kills.load(Ordering::SeqCst) > 0);
        assert!(matches!(registry().find(sandbox.id()), Err(Error::SandboxKilled(_))));
        assert!(matches!(registry().find_live(sandbox.id()), Err(Error::SandboxNotFound(_))));
    });
}

#[test]
fn extend_never_shortens_and_set_timeout_may() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let sandbox = sandbox(&FakeVm::new(Guest::Answers), home.path(), HOUR);
        let end = sandbox.end_at();
        sandbox.extend(HOUR / 2);
        assert_eq!(sandbox.end_at(), end);
        sandbox.extend(HOUR * 2);
        assert!(sandbox.end_at() > end);
        sandbox.set_timeout(HOUR / 2);
        assert!(sandbox.end_at() < end);
        sandbox.set_timeout(Duration::MAX);
        assert!(sandbox.kill().await.unwrap());
    });
}

#[test]
fn a_crash_during_identification_is_told_as_such() {
    on_runtime(async {
        // Connections break before the news of the end arrives.
        let vm = FakeVm::new(Guest::Hangs);
        let identify = create::identify(&*vm, "i0", BTreeMap::new());
        let crash = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            vm.crash();
        };
        let (result, ()) = tokio::join!(identify, crash);
        assert!(matches!(result, Err(Error::SandboxCrashed { .. })), "{result:?}");
    });
}

#[test]
fn a_crash_reaches_pending_and_later_calls() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Silent);
        let sandbox = sandbox(&vm, home.path(), HOUR);
        let pending = tokio::spawn({
            let sandbox = Arc::clone(&sandbox);
            async move { sandbox.stat("/", None).await }
        });
        vm.crash();
        let error = pending.await.unwrap().unwrap_err();
        assert!(
            matches!(&error, Error::SandboxCrashed { console, .. } if &**console == "last words"),
            "{error}"
        );
        assert!(matches!(registry().find_live(sandbox.id()), Err(Error::SandboxCrashed { .. })));
        assert!(matches!(sandbox.processes().await, Err(Error::SandboxCrashed { .. })));
        assert!(!sandbox.kill().await.unwrap());
    });
}

#[test]
fn a_connection_that_breaks_before_the_news_waits_for_it() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Hangs);
        let sandbox = sandbox(&vm, home.path(), HOUR);
        let later = Arc::clone(&vm);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            later.crash();
        });
        assert!(matches!(sandbox.processes().await, Err(Error::SandboxCrashed { .. })));
    });
}

#[test]
fn snapshots_take_turns_and_a_kill_waits_for_the_one_in_progress() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Answers);
        let sandbox = sandbox(&vm, home.path(), HOUR);
        let (snapshot, kill);
        {
            let _held = vm.capture.lock().unwrap();
            snapshot = tokio::spawn({
                let sandbox = Arc::clone(&sandbox);
                async move { create_snapshot(&sandbox, None).await }
            });
            while sandbox.exclusive.try_lock().is_ok() {
                std::thread::yield_now();
            }
            let mut waiting = std::pin::pin!(create_snapshot(&sandbox, None));
            assert!(futures_now(waiting.as_mut()).is_none());
            kill = tokio::spawn({
                let sandbox = Arc::clone(&sandbox);
                async move { sandbox.kill().await }
            });
            while sandbox.ended().is_none() {
                std::thread::yield_now();
            }
            assert!(matches!(futures_now(waiting), Some(Err(Error::SandboxKilled(_)))));
            assert_eq!(vm.kills.load(Ordering::SeqCst), 0);
        }
        assert!(matches!(snapshot.await.unwrap(), Err(Error::StoreFull(_))));
        assert!(kill.await.unwrap().unwrap());
        assert!(matches!(create_snapshot(&sandbox, None).await, Err(Error::SandboxKilled(_))));
    });
}

/// The output of a future that is ready at once.
fn futures_now<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.poll(&mut context) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}

#[test]
fn listing_filters_and_pages() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Answers);
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(sandbox(&vm, home.path(), HOUR).id().to_owned());
            // Start times have a resolution of a microsecond.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let query =
            ListQuery { home: home.path().to_owned(), running: true, limit: 2, ..ListQuery::default() };
        let names =
            |page: &Page<Arc<Sandbox>>| page.items.iter().map(|s| s.id().to_owned()).collect::<Vec<_>>();
        let first = registry().list(&query).unwrap();
        assert_eq!(names(&first), [ids[2].clone(), ids[1].clone()]);
        let second = registry().list(&ListQuery { next_token: first.next_token, ..query.clone() }).unwrap();
        assert_eq!(names(&second), [ids[0].clone()]);
        assert_eq!(second.next_token, None);
        let oldest = registry().list(&ListQuery { ascending: true, limit: 1, ..query.clone() }).unwrap();
        assert_eq!(names(&oldest), [ids[0].clone()]);
        let count = |query: ListQuery| registry().list(&query).unwrap().items.len();
        let with = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        assert_eq!(count(ListQuery { metadata: with("key", "value"), limit: 9, ..query.clone() }), 3);
        assert_eq!(count(ListQuery { metadata: with("key", "other"), ..query.clone() }), 0);
        assert_eq!(count(ListQuery { template: Some("base:default".into()), limit: 9, ..query.clone() }), 3);
        assert_eq!(count(ListQuery { template: Some("other".into()), ..query.clone() }), 0);
        assert_eq!(count(ListQuery { running: false, ..query.clone() }), 0);
        assert_eq!(count(ListQuery { home: "/elsewhere".into(), ..query }), 0);
        assert_eq!(
            registry().users_of(&home.path().to_owned(), &SnapshotId::parse("origin").unwrap()).len(),
            3
        );
        for id in ids {
            assert!(registry().find(&id).unwrap().kill().await.unwrap());
        }
    });
}

#[test]
fn a_machine_that_nobody_adopts_is_stopped() {
    on_runtime(async {
        let vm = FakeVm::new(Guest::Answers);
        drop(Orphan::new(Arc::clone(&vm) as Arc<dyn Vm>));
        while vm.kills.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let kept = Orphan::new(FakeVm::new(Guest::Answers) as Arc<dyn Vm>).adopt();
        tokio::task::yield_now().await;
        drop(kept);
    });
}

#[test]
fn a_panic_of_a_task_is_an_error() {
    on_runtime(async {
        let result: Result<(), Error> = blocking(|| panic!("boom")).await;
        assert!(matches!(&result, Err(Error::Internal(text)) if text == "boom"), "{result:?}");
    });
}
