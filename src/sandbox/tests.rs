//! Identity, lifetime and errors, over a machine that is a few channels: what it says of its end is what the test says.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use amber_layers::{NewSnapshot, SnapshotId, SnapshotMeta, Store};
use amber_proto::Decoder;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;

use super::create::Introduction;
use super::instance::Identity;
use super::vm::{Captured, Facts, Orphan, Vm};
use super::*;
use crate::agent::{AsyncStream, Connect, Connecting};
use crate::machine::Content;

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
    /// The store has no room for a pause.
    full: AtomicBool,
}

impl FakeVm {
    fn new(guest: Guest) -> Arc<Self> {
        Arc::new(Self {
            guest,
            ended: watch::Sender::new(None),
            kills: AtomicUsize::new(0),
            capture: Mutex::default(),
            full: AtomicBool::new(false),
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
        _content: Content,
        _captured: Captured,
    ) -> Result<SnapshotMeta, Error> {
        let _allowed = self.capture.lock().unwrap();
        Err(Error::StoreFull("no space".into()))
    }

    fn suspend(
        &self,
        store: &Arc<Store>,
        snapshot: NewSnapshot,
        _content: Content,
    ) -> Result<SnapshotMeta, Error> {
        let _allowed = self.capture.lock().unwrap();
        if self.full.load(Ordering::SeqCst) {
            return Err(Error::StoreFull("no space".into()));
        }
        Ok(store.writer().publish(snapshot)?)
    }

    fn cpu_time(&self) -> Duration {
        Duration::ZERO
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
fn sandbox(vm: &Arc<FakeVm>, home: &Path, life: Duration) -> Arc<Sandbox> {
    sandbox_with(vm, home, life, Lifecycle::default())
}

fn sandbox_with(vm: &Arc<FakeVm>, home: &Path, life: Duration, lifecycle: Lifecycle) -> Arc<Sandbox> {
    let profile = Profile {
        template: "origin".into(),
        template_name: Some("base".into()),
        metadata: BTreeMap::from([("key".into(), "value".into())]),
        lifecycle,
        started_us: profile::micros(SystemTime::now()),
        ..Profile::default()
    };
    let identity = Identity {
        id: id::sandbox_id().unwrap(),
        store: stores::open(home).unwrap(),
        places: places(home),
        profile,
        life,
        claim: None,
    };
    Sandbox::launch(identity, Arc::clone(vm) as Arc<dyn Vm>)
}

fn places(home: &Path) -> Places {
    Places { home: home.to_owned(), guest: Vec::new() }
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
        let identify = create::introduce(&*vm, Introduction::Resumed { id: "i0" });
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
                async move { create_snapshot(&sandbox, None, Content::Full).await }
            });
            while sandbox.exclusive.try_lock().is_ok() {
                std::thread::yield_now();
            }
            let mut waiting = std::pin::pin!(create_snapshot(&sandbox, None, Content::Full));
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
        assert!(matches!(create_snapshot(&sandbox, None, Content::Full).await, Err(Error::SandboxKilled(_))));
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
        let names = |page: &Page<SandboxInfo>| page.items.iter().map(|s| s.id.clone()).collect::<Vec<_>>();
        let first = list(query.clone()).await.unwrap();
        assert_eq!(names(&first), [ids[2].clone(), ids[1].clone()]);
        let second = list(ListQuery { next_token: first.next_token, ..query.clone() }).await.unwrap();
        assert_eq!(names(&second), [ids[0].clone()]);
        assert_eq!(second.next_token, None);
        let oldest = list(ListQuery { ascending: true, limit: 1, ..query.clone() }).await.unwrap();
        assert_eq!(names(&oldest), [ids[0].clone()]);
        let count = async |query: ListQuery| list(query).await.unwrap().items.len();
        let with = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        assert_eq!(count(ListQuery { metadata: with("key", "value"), limit: 9, ..query.clone() }).await, 3);
        assert_eq!(count(ListQuery { metadata: with("key", "other"), ..query.clone() }).await, 0);
        let template = |name: &str| Some(name.to_owned());
        let by_name = ListQuery { template: template("base:default"), limit: 9, ..query.clone() };
        assert_eq!(count(by_name).await, 3);
        assert_eq!(count(ListQuery { template: template("other"), ..query.clone() }).await, 0);
        assert_eq!(count(ListQuery { running: false, ..query.clone() }).await, 0);
        assert_eq!(count(ListQuery { home: "/elsewhere".into(), ..query.clone() }).await, 0);
        assert_eq!(registry().users_of(home.path(), &SnapshotId::parse("origin").unwrap()).len(), 3);

        // A paused one keeps its place.
        assert!(pause(ids[1].clone(), places(home.path()), true).await.unwrap());
        let both = ListQuery { paused: true, limit: 9, ..query.clone() };
        let all = list(both.clone()).await.unwrap();
        assert_eq!(names(&all), [ids[2].clone(), ids[1].clone(), ids[0].clone()]);
        assert_eq!(all.items[1].state, State::Paused);
        let paused = ListQuery { running: false, ..both.clone() };
        assert_eq!(names(&list(paused.clone()).await.unwrap()), [ids[1].clone()]);
        let other = ListQuery { metadata: with("key", "other"), ..paused };
        assert_eq!(count(other).await, 0);
        for id in ids {
            assert!(kill(id.clone(), places(home.path())).await.unwrap());
        }
        assert_eq!(count(both).await, 0);
    });
}

#[test]
fn a_pause_fails_pending_calls_and_keeps_what_was_created() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Answers);
        let lifecycle = Lifecycle { on_timeout: OnTimeout::Pause { keep_memory: true }, auto_resume: false };
        let sandbox = sandbox_with(&vm, home.path(), HOUR, lifecycle);
        let (id, at) = (sandbox.id().to_owned(), places(home.path()));
        assert!(pause(id.clone(), at.clone(), true).await.unwrap());
        assert!(vm.kills.load(Ordering::SeqCst) > 0);
        assert!(!pause(id.clone(), at.clone(), true).await.unwrap());
        assert!(matches!(sandbox.processes().await, Err(Error::SandboxPaused)));
        assert!(matches!(awake(&id).await, Err(Error::SandboxPaused)));
        assert!(matches!(registry().find_live(&id), Err(Error::SandboxNotFound(_))));
        let info = get_info(id.clone(), at.clone()).await.unwrap();
        assert_eq!((info.state, info.profile), (State::Paused, sandbox.profile()));
        assert!(matches!(fork(&id, at.clone(), 1, HOUR).await, Err(Error::Conflict(_))));
        assert!(matches!(fork(&id, at.clone(), 0, HOUR).await, Err(Error::InvalidArgument(_))));
        assert!(matches!(delete_snapshot(home.path().to_owned(), id.clone(), true).await, Ok(false)));
        // Its machine has no state here, so it cannot go on; it stays paused.
        assert!(connect(id.clone(), at.clone(), HOUR, OnResume::Restore).await.is_err());
        assert_eq!(get_info(id.clone(), at.clone()).await.unwrap().state, State::Paused);
        assert!(kill(id.clone(), at.clone()).await.unwrap());
        assert!(!kill(id.clone(), at.clone()).await.unwrap());
        assert!(matches!(pause(id.clone(), at.clone(), true).await, Err(Error::SandboxNotFound(_))));
        assert!(matches!(registry().find(&id), Err(Error::SandboxKilled(_))));
        let gone = connect(id, at, HOUR, OnResume::Restore).await;
        assert!(matches!(gone, Err(Error::SandboxNotFound(_))));
    });
}

#[test]
fn a_sandbox_that_cannot_be_paused_at_its_end_lives_on() {
    let home = tempfile::tempdir().unwrap();
    on_runtime(async {
        let vm = FakeVm::new(Guest::Answers);
        vm.full.store(true, Ordering::SeqCst);
        let lifecycle = Lifecycle { on_timeout: OnTimeout::Pause { keep_memory: true }, auto_resume: false };
        let sandbox = sandbox_with(&vm, home.path(), HOUR, lifecycle);
        sandbox.set_timeout(Duration::from_millis(10));
        let soon = sandbox.end_at() + Duration::from_secs(30);
        while sandbox.end_at() < soon {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(sandbox.ended(), None);
        vm.full.store(false, Ordering::SeqCst);
        sandbox.set_timeout(Duration::from_millis(10));
        while sandbox.ended().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(sandbox.ended(), Some(Ended::Paused));
        assert!(kill(sandbox.id().to_owned(), places(home.path())).await.unwrap());
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
