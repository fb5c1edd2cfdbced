//! vsock from both ends: a guest that speaks the protocol through the rings, and host programs on streams.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

use super::packet::*;
use super::ring::CAPACITY;
use super::*;
use crate::devices::mmio::MmioState;
use crate::devices::testing::{Driver, RAM, into, out, state_round_trips};

const BUFFER: usize = 4096;
const PORT: u32 = 1024;

/// A guest: posts receive buffers like Linux and keeps the protocol's counters.
struct Guest {
    driver: Driver<Vsock>,
    /// Address of the receive buffer of each chain.
    buffers: Vec<u64>,
    /// The same for the event queue.
    events: Vec<u64>,
    tx: u64,
    repost: bool,
}

impl Guest {
    fn new() -> Self {
        Self::with_buffers(32)
    }

    fn with_buffers(count: usize) -> Self {
        let driver = Driver::new(Vsock::new());
        let mut guest = Guest { driver, buffers: vec![0; 128], events: vec![0; 16], tx: 0, repost: true };
        guest.tx = guest.driver.alloc(128 * 1024);
        guest.post(count);
        guest
    }

    /// The same guest on a restored device.
    fn copied(&self, state: &MmioState<VsockState>) -> Self {
        Guest {
            driver: self.driver.restore((), state),
            buffers: self.buffers.clone(),
            events: self.events.clone(),
            tx: self.tx,
            repost: self.repost,
        }
    }

    fn post(&mut self, count: usize) {
        for _ in 0..count {
            let addr = self.driver.alloc(BUFFER);
            let head = self.driver.add(RX, &[into(addr, BUFFER)]);
            self.buffers[usize::from(head)] = addr;
        }
        self.driver.kick(RX);
    }

    fn post_event_buffers(&mut self) {
        for _ in 0..8 {
            let addr = self.driver.alloc(4);
            let head = self.driver.add(EVENT, &[into(addr, 4)]);
            self.events[usize::from(head)] = addr;
        }
        self.driver.kick(EVENT);
    }

    fn connector(&self) -> VsockConnector {
        self.driver.dev.connector()
    }

    fn counts(&self) -> (usize, usize, usize) {
        let mut counts = (0, 0, 0);
        self.driver.dev.with_device(|device, _| {
            counts = device.mux.counts();
            Ok(())
        });
        counts
    }

    /// The next packet from the host.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.driver.used(RX)?;
        let addr = self.buffers[usize::from(head)];
        let packet = self.driver.peek(addr, len as usize);
        if self.repost {
            let head = self.driver.add(RX, &[into(addr, BUFFER)]);
            self.buffers[usize::from(head)] = addr;
            self.driver.kick(RX);
        }
        let header = Header::decode(packet[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, packet.len() - HEADER_LEN);
        assert_eq!((header.dst_cid, header.kind), (GUEST_CID, TYPE_STREAM));
        Some((header, packet[HEADER_LEN..].to_vec()))
    }

    /// The next packet, which must be `op`.
    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive().unwrap_or_else(|| panic!("no packet instead of {op:?}"));
        assert_eq!(Op::from_wire(header.op), Some(op));
        header
    }

    fn silent(&mut self) {
        assert_eq!(self.receive(), None);
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.poke(self.tx, &header.encode());
        self.driver.poke(self.tx + 64, payload);
        self.driver.add(TX, &[out(self.tx, HEADER_LEN), out(self.tx + 64, payload.len())]);
        self.driver.kick(TX);
        self.driver.used(TX).expect("the packet was taken");
    }
}

/// The guest's end of one connection.
#[derive(Clone, Copy)]
struct End {
    host: u32,
    guest: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl End {
    fn header(&self, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn say(&self, guest: &mut Guest, op: Op) {
        guest.send(self.header(op), &[]);
    }

    fn write(&self, guest: &mut Guest, data: &[u8]) {
        guest.send(Header { len: data.len() as u32, ..self.header(Op::Rw) }, data);
    }

    fn shutdown(&self, guest: &mut Guest, flags: u32) {
        guest.send(Header { flags, ..self.header(Op::Shutdown) }, &[]);
    }
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A task's identity: polls futures by hand and counts its wake-ups.
#[derive(Default)]
struct Task(Arc<Counter>);

impl Task {
    fn wakes(&self) -> usize {
        self.0.0.load(Ordering::SeqCst)
    }

    fn poll<F: Future>(&self, future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(&Arc::clone(&self.0).into()))
    }

    fn read(&self, stream: &mut VsockStream, room: usize) -> Poll<io::Result<Vec<u8>>> {
        let mut bytes = vec![0; room];
        let mut buf = ReadBuf::new(&mut bytes);
        let waker = Arc::clone(&self.0).into();
        Pin::new(stream)
            .poll_read(&mut Context::from_waker(&waker), &mut buf)
            .map_ok(|()| buf.filled().to_vec())
    }

    fn write(&self, stream: &mut VsockStream, data: &[u8]) -> Poll<io::Result<usize>> {
        let waker = Arc::clone(&self.0).into();
        Pin::new(stream).poll_write(&mut Context::from_waker(&waker), data)
    }
}

fn ready<T>(poll: Poll<io::Result<T>>) -> T {
    match poll {
        Poll::Ready(Ok(value)) => value,
        Poll::Ready(Err(error)) => panic!("failed: {error}"),
        Poll::Pending => panic!("pending"),
    }
}

fn failure<T>(poll: Poll<io::Result<T>>) -> ErrorKind {
    match poll {
        Poll::Ready(Err(error)) => error.kind(),
        Poll::Ready(Ok(_)) => panic!("succeeded"),
        Poll::Pending => panic!("pending"),
    }
}

fn shut(stream: &mut VsockStream) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Pin::new(stream).poll_shutdown(&mut cx).is_ready());
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 249) as u8 ^ (i >> 12) as u8).collect()
}

/// Establishes a connection from the host; the guest has `buf_alloc` bytes of room.
fn connect(guest: &mut Guest, buf_alloc: u32) -> (VsockStream, End) {
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(PORT));
    let task = Task::default();
    assert!(task.poll(connecting.as_mut()).is_pending());
    let request = guest.expect(Op::Request);
    assert_eq!((request.src_cid, request.dst_port), (HOST_CID, PORT));
    assert_eq!((request.buf_alloc as usize, request.fwd_cnt), (CAPACITY, 0));
    let end = End { host: request.src_port, guest: PORT, buf_alloc, fwd_cnt: 0 };
    assert!(task.poll(connecting.as_mut()).is_pending());
    end.say(guest, Op::Response);
    assert_eq!(task.wakes(), 1);
    let stream = ready(task.poll(connecting.as_mut()));
    assert_eq!((stream.host_port(), stream.guest_port()), (end.host, PORT));
    (stream, end)
}

#[test]
fn a_whole_conversation() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 64 * 1024);
    let task = Task::default();
    assert!(task.read(&mut stream, 10).is_pending());
    assert_eq!(ready(task.write(&mut stream, b"uname")), 5);
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, data.as_slice()), (Op::Rw as u16, &b"uname"[..]));
    assert_eq!(guest.driver.interrupts(), 1);
    end.write(&mut guest, b"Linux\n");
    assert_eq!(task.wakes(), 1);
    assert_eq!(ready(task.read(&mut stream, 3)), b"Lin");
    assert_eq!(ready(task.read(&mut stream, 10)), b"ux\n");
    // The guest closes: the rest is read, then the end; the answer is a reset.
    end.write(&mut guest, b"bye");
    end.shutdown(&mut guest, SHUTDOWN_BOTH);
    guest.expect(Op::Rst);
    assert_eq!(failure(task.write(&mut stream, b"?")), ErrorKind::BrokenPipe);
    assert_eq!(ready(task.read(&mut stream, 10)), b"bye");
    assert_eq!(ready(task.read(&mut stream, 10)), b"");
    assert_eq!(guest.counts().0, 1);
    drop(stream);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn refused_when_nobody_listens() {
    let mut guest = Guest::new();
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(7));
    let task = Task::default();
    assert!(task.poll(connecting.as_mut()).is_pending());
    let request = guest.expect(Op::Request);
    let end = End { host: request.src_port, guest: 7, buf_alloc: 0, fwd_cnt: 0 };
    end.say(&mut guest, Op::Rst);
    assert_eq!(failure(task.poll(connecting.as_mut())), ErrorKind::ConnectionRefused);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_connect_that_times_out_takes_the_request_back() {
    let mut guest = Guest::new();
    let connector = guest.connector();
    let error = runtime().block_on(connector.connect_timeout(PORT, Duration::from_millis(1))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let request = guest.expect(Op::Request);
    assert_eq!(guest.expect(Op::Rst).src_port, request.src_port);
    // An answer that comes too late is for nobody.
    End { host: request.src_port, guest: PORT, buf_alloc: 0, fwd_cnt: 0 }.say(&mut guest, Op::Response);
    guest.expect(Op::Rst);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_connect_waits_for_the_guests_driver() {
    let mut guest = Guest::with_buffers(0);
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(PORT));
    let task = Task::default();
    assert!(task.poll(connecting.as_mut()).is_pending());
    // A driver starts with a reset, which must not end what it never heard of.
    guest.driver.probe(u64::MAX, u16::MAX);
    guest.post(4);
    let request = guest.expect(Op::Request);
    End { host: request.src_port, guest: PORT, buf_alloc: 0, fwd_cnt: 0 }.say(&mut guest, Op::Response);
    assert!(task.poll(connecting.as_mut()).is_ready());
}

#[test]
fn a_given_up_connect_that_was_never_sent_leaves_nothing() {
    let mut guest = Guest::with_buffers(0);
    for _ in 0..100 {
        let connector = guest.connector();
        let limit = Duration::from_millis(0);
        assert!(runtime().block_on(connector.connect_timeout(PORT, limit)).is_err());
    }
    assert_eq!(guest.counts(), (0, 0, 0));
    guest.post(4);
    guest.silent();
}

#[test]
fn a_megabyte_to_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 64 * 1024);
    let task = Task::default();
    let data = pattern(1 << 20);
    let (mut sent, mut received) = (0, Vec::new());
    let mut rounds = 0;
    while received.len() < data.len() {
        rounds += 1;
        assert!(rounds < 10_000, "stalled at {} of {}", received.len(), data.len());
        while sent < data.len()
            && let Poll::Ready(count) = task.write(&mut stream, &data[sent..])
        {
            sent += count.unwrap();
        }
        while let Some((header, payload)) = guest.receive() {
            if header.op == Op::Rw as u16 {
                received.extend(payload);
                let unread = received.len() as u32 - end.fwd_cnt;
                assert!(unread <= end.buf_alloc, "the guest's window was overrun");
            }
        }
        end.fwd_cnt = received.len() as u32;
        end.say(&mut guest, Op::CreditUpdate);
    }
    assert!(received == data);
    assert_eq!(sent, data.len());
}

#[test]
fn a_megabyte_to_the_host() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 64 * 1024);
    let task = Task::default();
    let data = pattern(1 << 20);
    let (mut sent, mut received, mut window) = (0, Vec::new(), CAPACITY);
    let mut updates = 0;
    while received.len() < data.len() {
        while sent < data.len() && window > 0 {
            let count = window.min(data.len() - sent).min(MAX_PAYLOAD as usize);
            end.write(&mut guest, &data[sent..sent + count]);
            sent += count;
            window -= count;
        }
        let wakes = task.wakes();
        while let Poll::Ready(bytes) = task.read(&mut stream, 50_000) {
            received.extend(bytes.unwrap());
        }
        let before = window;
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, Op::CreditUpdate as u16);
            window = CAPACITY - (sent as u32).wrapping_sub(header.fwd_cnt) as usize;
            updates += 1;
        }
        assert!(window > before || received.len() == data.len(), "reading gave no credit back");
        assert!(sent == data.len() || wakes <= updates, "woken without cause");
    }
    assert!(received == data);
    assert!(updates <= 16, "{updates} credit updates for 16 windows");
}

#[test]
fn without_credit_the_writer_waits_and_asks_once() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 1000);
    let task = Task::default();
    let data = pattern(1000 + CAPACITY + 500);
    assert_eq!(ready(task.write(&mut stream, &data)), 1000 + CAPACITY);
    assert_eq!(guest.expect(Op::Rw).len, 1000);
    guest.expect(Op::CreditRequest);
    assert!(task.write(&mut stream, &data[1000 + CAPACITY..]).is_pending());
    guest.silent();
    // An answer without credit, then one with some.
    end.say(&mut guest, Op::CreditUpdate);
    guest.silent();
    assert_eq!(task.wakes(), 0);
    end.fwd_cnt = 600;
    end.say(&mut guest, Op::CreditUpdate);
    let (_, payload) = guest.receive().unwrap();
    assert_eq!(payload, data[1000..1600]);
    assert_eq!(task.wakes(), 1);
    assert_eq!(ready(task.write(&mut stream, &data[1000 + CAPACITY..])), 500);
    guest.expect(Op::CreditRequest);
    guest.silent();
}

#[test]
fn a_guest_that_lies_about_its_counters_gets_nothing() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 4096);
    end.fwd_cnt = 0x8000_0000;
    end.say(&mut guest, Op::CreditUpdate);
    let task = Task::default();
    assert_eq!(ready(task.write(&mut stream, &[1; 100])), 100);
    guest.expect(Op::CreditRequest);
    guest.silent();
}

#[test]
fn a_guest_that_overruns_the_window_is_reset() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let piece = pattern(CAPACITY / 8);
    for _ in 0..8 {
        end.write(&mut guest, &piece);
    }
    guest.silent();
    end.write(&mut guest, b"x");
    guest.expect(Op::Rst);
    let task = Task::default();
    for _ in 0..8 {
        assert!(ready(task.read(&mut stream, piece.len())) == piece, "what fitted is still readable");
    }
    assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
}

#[test]
fn credit_is_told_when_asked() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    end.write(&mut guest, &[1; 100]);
    end.say(&mut guest, Op::CreditRequest);
    assert_eq!(guest.expect(Op::CreditUpdate).fwd_cnt, 0);
    ready(Task::default().read(&mut stream, 70));
    guest.silent();
    end.say(&mut guest, Op::CreditRequest);
    assert_eq!(guest.expect(Op::CreditUpdate).fwd_cnt, 70);
}

#[test]
fn a_reset_from_the_guest_is_an_error_after_the_data() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    end.write(&mut guest, b"last words");
    end.say(&mut guest, Op::Rst);
    assert_eq!(ready(task.read(&mut stream, 100)), b"last words");
    assert_eq!(failure(task.read(&mut stream, 100)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::ConnectionReset);
    drop(stream);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn the_guest_half_closes() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    assert!(task.read(&mut stream, 10).is_pending());
    end.shutdown(&mut guest, SHUTDOWN_SEND);
    assert_eq!(task.wakes(), 1);
    assert_eq!(ready(task.read(&mut stream, 10)), b"");
    assert_eq!(ready(task.write(&mut stream, b"still here")), 10);
    guest.expect(Op::Rw);
    end.shutdown(&mut guest, SHUTDOWN_RCV);
    guest.expect(Op::Rst);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::BrokenPipe);
}

#[test]
fn a_guest_that_stops_reading_breaks_the_pipe() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 10);
    let task = Task::default();
    while task.write(&mut stream, &[0; 10_000]).is_ready() {}
    end.shutdown(&mut guest, SHUTDOWN_RCV);
    assert_eq!(task.wakes(), 1);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::BrokenPipe);
    end.write(&mut guest, b"but writes");
    assert_eq!(ready(task.read(&mut stream, 100)), b"but writes");
}

#[test]
fn the_host_half_closes_after_its_data() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 3);
    let task = Task::default();
    assert_eq!(ready(task.write(&mut stream, b"abcdef")), 6);
    shut(&mut stream);
    assert_eq!(failure(task.write(&mut stream, b"g")), ErrorKind::BrokenPipe);
    assert_eq!(guest.receive().unwrap().1, b"abc");
    guest.expect(Op::CreditRequest);
    end.fwd_cnt = 3;
    end.say(&mut guest, Op::CreditUpdate);
    assert_eq!(guest.receive().unwrap().1, b"def");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    end.write(&mut guest, b"reply");
    assert_eq!(ready(task.read(&mut stream, 100)), b"reply");
    end.shutdown(&mut guest, SHUTDOWN_BOTH);
    guest.expect(Op::Rst);
    assert_eq!(ready(task.read(&mut stream, 100)), b"");
}

#[test]
fn a_dropped_stream_delivers_and_closes() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 4);
    assert_eq!(ready(Task::default().write(&mut stream, b"12345678")), 8);
    drop(stream);
    assert_eq!(guest.receive().unwrap().1, b"1234");
    guest.expect(Op::CreditRequest);
    // What the guest still sends goes nowhere, but it gets its credit back.
    for _ in 0..3 {
        end.write(&mut guest, &[0; CAPACITY / 4]);
        guest.expect(Op::CreditUpdate);
    }
    end.fwd_cnt = 4;
    end.say(&mut guest, Op::CreditUpdate);
    assert_eq!(guest.receive().unwrap().1, b"5678");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    assert_eq!(guest.counts().0, 1, "waits for the guest to close");
    end.say(&mut guest, Op::Rst);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn nothing_is_lost_when_the_guest_has_no_buffers() {
    let mut guest = Guest::with_buffers(2);
    let (mut stream, end) = connect(&mut guest, 1 << 20);
    guest.repost = false;
    let task = Task::default();
    let data = pattern(50_000);
    assert_eq!(ready(task.write(&mut stream, &data)), data.len());
    // These need an answer too.
    end.say(&mut guest, Op::CreditRequest);
    let mut stray = end;
    stray.guest = 9;
    stray.say(&mut guest, Op::Rw);
    let mut received = Vec::new();
    let mut others = Vec::new();
    for _ in 0..20 {
        while let Some((header, payload)) = guest.receive() {
            received.extend(payload);
            if header.op != Op::Rw as u16 {
                others.push(header.op);
            }
        }
        guest.post(1);
    }
    assert!(received == data);
    assert_eq!(others, [Op::Rst as u16], "credit was told by the data packets");
}

#[test]
fn a_flood_of_stray_packets_blocks_only_the_guest() {
    let mut guest = Guest::with_buffers(0);
    let stray = End { host: 5, guest: 6, buf_alloc: 0, fwd_cnt: 0 };
    let place = guest.driver.place(&stray.header(Op::Rw).encode());
    for _ in 0..100 {
        guest.driver.add(TX, &[out(place, HEADER_LEN)]);
        guest.driver.kick(TX);
    }
    let taken = std::iter::from_fn(|| guest.driver.used(TX)).count();
    assert!(taken < 100);
    assert_eq!(guest.counts().2, taken);
    let mut resets = 0;
    for _ in 0..10 {
        guest.repost = false;
        guest.post(12);
        while guest.receive().is_some_and(|(header, _)| header.op == Op::Rst as u16) {
            resets += 1;
        }
    }
    assert_eq!(resets, 100, "each is answered in the end");
    assert_eq!(taken + std::iter::from_fn(|| guest.driver.used(TX)).count(), 100);
}

#[test]
fn packets_that_belong_nowhere_are_reset() {
    let mut guest = Guest::new();
    let (_stream, end) = connect(&mut guest, 4096);
    let other = End { guest: 77, ..end };
    for header in [
        other.header(Op::Rw),
        other.header(Op::Response),
        other.header(Op::Request),
        Header { op: 99, ..other.header(Op::Rw) },
        Header { op: 0, ..other.header(Op::Rw) },
        Header { kind: TYPE_STREAM, dst_cid: 9, ..end.header(Op::Request) },
    ] {
        guest.send(header, &[]);
        let reset = guest.expect(Op::Rst);
        assert_eq!((reset.src_cid, reset.dst_cid), (header.dst_cid, header.src_cid));
        assert_eq!((reset.src_port, reset.dst_port), (header.dst_port, header.src_port));
    }
    for header in [
        other.header(Op::Rst),
        // Not from this guest at all.
        Header { src_cid: 4, ..end.header(Op::Rst) },
    ] {
        guest.send(header, &[]);
        guest.silent();
    }
    assert_eq!(guest.counts().0, 1, "the connection was left alone");
}

#[test]
fn violations_end_the_connection() {
    let violations: [fn(End) -> Header; 6] = [
        |end| Header { len: 100, ..end.header(Op::Rw) },
        |end| Header { len: u32::MAX, ..end.header(Op::Rw) },
        |end| Header { len: MAX_PAYLOAD + 1, ..end.header(Op::Rw) },
        |end| Header { op: 42, ..end.header(Op::Rw) },
        |end| end.header(Op::Request),
        |end| end.header(Op::Response),
    ];
    for violation in violations {
        let mut guest = Guest::new();
        let (mut stream, end) = connect(&mut guest, 4096);
        guest.send(violation(end), &[]);
        assert_eq!(guest.expect(Op::Rst).src_port, end.host);
        assert_eq!(failure(Task::default().read(&mut stream, 1)), ErrorKind::ConnectionReset);
        drop(stream);
        assert_eq!(guest.counts(), (0, 0, 0));
    }
}

#[test]
fn payloads_outside_memory_end_the_connection() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let header = Header { len: 100, ..end.header(Op::Rw) };
    let place = guest.driver.place(&header.encode());
    guest.driver.add(TX, &[out(place, HEADER_LEN), out(RAM - 50, 100)]);
    guest.driver.kick(TX);
    guest.expect(Op::Rst);
    assert_eq!(failure(Task::default().read(&mut stream, 1)), ErrorKind::ConnectionReset);
}

#[test]
fn a_different_socket_type_is_refused_without_harm() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let header = Header { kind: 2, ..end.header(Op::Rst) };
    guest.send(header, &[]);
    guest.silent();
    assert!(Task::default().read(&mut stream, 1).is_pending());
}

#[test]
fn the_guest_connects_to_a_listener() {
    let mut guest = Guest::new();
    let task = Task::default();
    let end = End { host: 80, guest: 5000, buf_alloc: 4096, fwd_cnt: 0 };
    end.say(&mut guest, Op::Request);
    guest.expect(Op::Rst);

    let connector = guest.connector();
    let mut listener = connector.listen(80).unwrap();
    assert_eq!(listener.port(), 80);
    assert_eq!(connector.listen(80).unwrap_err().kind(), ErrorKind::AddrInUse);
    let mut stream = {
        let mut accepting = pin!(listener.accept());
        assert!(task.poll(accepting.as_mut()).is_pending());
        end.say(&mut guest, Op::Request);
        assert_eq!(task.wakes(), 1);
        assert_eq!(guest.expect(Op::Response).src_port, 80);
        ready(task.poll(accepting.as_mut()))
    };
    assert_eq!((stream.host_port(), stream.guest_port()), (80, 5000));
    end.write(&mut guest, b"GET");
    assert_eq!(ready(task.read(&mut stream, 10)), b"GET");
    assert_eq!(ready(task.write(&mut stream, b"200")), 3);
    assert_eq!(guest.receive().unwrap().1, b"200");

    // One that nobody accepts any more.
    let late = End { guest: 5001, ..end };
    late.say(&mut guest, Op::Request);
    guest.expect(Op::Response);
    drop(listener);
    assert_eq!(guest.expect(Op::Rst).dst_port, 5001);
    late.say(&mut guest, Op::Request);
    guest.expect(Op::Rst);
    end.write(&mut guest, b"!");
    assert_eq!(ready(task.read(&mut stream, 10)), b"!", "accepted streams live on");
}

#[test]
fn the_backlog_is_bounded() {
    let mut guest = Guest::new();
    let _listener = guest.connector().listen(80).unwrap();
    let mut answers = Vec::new();
    for port in 0..200 {
        End { host: 80, guest: port, buf_alloc: 0, fwd_cnt: 0 }.say(&mut guest, Op::Request);
        answers.push(guest.receive().unwrap().0.op);
    }
    assert_eq!(answers.iter().filter(|&&op| op == Op::Response as u16).count(), 128);
    assert_eq!(answers.iter().filter(|&&op| op == Op::Rst as u16).count(), 72);
}

#[test]
fn connections_are_bounded_and_lingering_ones_give_way() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..1024).map(|_| connect(&mut guest, 0).0).collect();
    let connector = guest.connector();
    let error = runtime().block_on(connector.connect(PORT)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::QuotaExceeded);
    let port = streams.remove(10).host_port();
    guest.expect(Op::Shutdown);
    let runtime = runtime();
    let _entered = runtime.enter();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(Task::default().poll(connecting.as_mut()).is_pending());
    assert_eq!(guest.expect(Op::Rst).src_port, port);
    guest.expect(Op::Request);
}

#[test]
fn a_driver_reset_ends_all_connections() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    end.write(&mut guest, b"rest");
    ready(task.read(&mut stream, 4));
    assert!(task.read(&mut stream, 1).is_pending());
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(task.wakes(), 1);
    assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::ConnectionReset);
    drop(stream);
    assert_eq!(guest.counts(), (0, 0, 0));
    // And the next driver starts afresh.
    guest.driver.probe(u64::MAX, u16::MAX);
    guest.post(8);
    connect(&mut guest, 4096);
}

#[test]
fn the_end_of_the_machine_reaches_everyone() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let (mut quiet, _) = connect(&mut guest, 4096);
    let mut listener = guest.connector().listen(80).unwrap();
    let connector = guest.connector();
    let runtime = runtime();
    let _entered = runtime.enter();
    let task = Task::default();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(task.poll(connecting.as_mut()).is_pending());
    let mut accepting = pin!(listener.accept());
    assert!(task.poll(accepting.as_mut()).is_pending());
    assert!(task.read(&mut quiet, 1).is_pending());
    end.write(&mut guest, b"exit 137");

    guest.driver.dev.shutdown();
    assert_eq!(task.wakes(), 3);
    assert_eq!(failure(task.poll(connecting)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.poll(accepting)), ErrorKind::NotConnected);
    assert_eq!(failure(task.read(&mut quiet, 1)), ErrorKind::ConnectionReset);
    assert_eq!(ready(task.read(&mut stream, 100)), b"exit 137", "what had arrived is not lost");
    assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::ConnectionReset);
    assert_eq!(runtime.block_on(connector.connect(PORT)).unwrap_err().kind(), ErrorKind::NotConnected);
    assert_eq!(connector.listen(81).unwrap_err().kind(), ErrorKind::NotConnected);
    assert_eq!(Arc::strong_count(&guest.driver.mem), 1, "open streams do not keep guest memory");
}

#[test]
fn a_paused_device_leaves_guest_memory_alone() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    guest.driver.dev.pause();
    guest.driver.clean();
    let state = guest.driver.dev.state();
    assert_eq!(ready(task.write(&mut stream, b"while you slept")), 15);
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(task.poll(connecting.as_mut()).is_pending());
    assert!(!guest.driver.any_dirty());
    assert_eq!(guest.driver.dev.state().transport, state.transport);
    assert_eq!(guest.driver.interrupts(), 1);
    guest.driver.dev.resume();
    assert_eq!(guest.driver.interrupts(), 1);
    assert_eq!(guest.receive().unwrap().1, b"while you slept");
    guest.expect(Op::Request);
    end.write(&mut guest, b"hm");
    assert_eq!(ready(task.read(&mut stream, 10)), b"hm");
}

fn take_event(guest: &mut Guest) -> u32 {
    let (head, len) = guest.driver.used(EVENT).expect("an event");
    assert_eq!(len, 4);
    let addr = guest.events[usize::from(head)];
    u32::from_le_bytes(guest.driver.peek(addr, 4).try_into().unwrap())
}

#[test]
fn a_copy_resets_the_transport_before_anything_else() {
    let mut guest = Guest::new();
    guest.post_event_buffers();
    let (mut stream, end) = connect(&mut guest, 4096);
    guest.driver.dev.pause();
    let state = guest.driver.dev.state();
    let mut copy = guest.copied(&state);

    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = copy.connector();
    let task = Task::default();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(task.poll(connecting.as_mut()).is_pending());
    copy.driver.clean();
    assert!(!copy.driver.any_dirty(), "a copy starts paused");
    copy.driver.dev.resume();
    assert!(copy.driver.irq.is_high());
    // The old connection means nothing here, and the new one waits.
    end.write(&mut copy, b"?");
    copy.silent();
    assert_eq!(take_event(&mut copy), TRANSPORT_RESET);
    assert!(copy.driver.used(EVENT).is_none());
    copy.silent();
    // The driver has handled the event when it offers the buffer again.
    let addr = copy.driver.alloc(4);
    copy.driver.add(EVENT, &[into(addr, 4)]);
    assert!(copy.driver.kick(EVENT));
    copy.expect(Op::Rst);
    let request = copy.expect(Op::Request);
    assert_eq!(request.src_port, end.host + 1, "ports go on, the old one may still be in use");
    End { host: request.src_port, guest: PORT, buf_alloc: 10, fwd_cnt: 0 }.say(&mut copy, Op::Response);
    ready(task.poll(connecting));

    // The original, over its own memory, would go on; its stream is still there.
    assert!(task.read(&mut stream, 1).is_pending());
}

#[test]
fn a_reset_event_waits_for_a_buffer() {
    let guest = Guest::new();
    guest.driver.dev.pause();
    let mut copy = guest.copied(&guest.driver.dev.state());
    copy.driver.dev.resume();
    assert!(copy.driver.used(EVENT).is_none());
    copy.post_event_buffers();
    assert_eq!(take_event(&mut copy), TRANSPORT_RESET);
}

#[test]
fn a_copy_without_a_driver_needs_no_reset() {
    let guest = Guest::with_buffers(0);
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    let mut copy = guest.copied(&guest.driver.dev.state());
    copy.driver.dev.resume();
    copy.driver.probe(u64::MAX, u16::MAX);
    copy.post_event_buffers();
    copy.post(8);
    connect(&mut copy, 100);
    assert!(copy.driver.used(EVENT).is_none());
}

#[test]
fn small_and_odd_receive_buffers() {
    let mut guest = Guest::with_buffers(4);
    let (mut stream, _) = connect(&mut guest, 4096);
    while guest.receive().is_some() {}
    guest.repost = false;
    let task = Task::default();
    let heads: Vec<u16> = {
        let addr = guest.driver.alloc(4096);
        // Too small, header only, read-only, not memory; then a good one in three pieces.
        vec![
            guest.driver.add(RX, &[into(addr, 20)]),
            guest.driver.add(RX, &[into(addr, HEADER_LEN)]),
            guest.driver.add(RX, &[out(addr, 4096)]),
            guest.driver.add(RX, &[into(RAM, 4096)]),
            guest.driver.add(RX, &[into(addr, 40), into(addr + 40, 6), into(addr + 46, 4)]),
        ]
    };
    // The four good buffers of the start come first.
    for _ in 0..4 {
        assert_eq!(ready(task.write(&mut stream, b"x")), 1);
        guest.receive().unwrap();
    }
    assert_eq!(ready(task.write(&mut stream, b"payload")), 7);
    for &head in &heads[..4] {
        assert_eq!(guest.driver.used(RX), Some((head, 0)));
    }
    let (head, len) = guest.driver.used(RX).unwrap();
    assert_eq!((head, len as usize), (heads[4], HEADER_LEN + 6));
    guest.repost = false;
    guest.post(1);
    assert_eq!(guest.receive().unwrap().1, b"d", "the rest follows");
}

#[test]
fn a_broken_queue_stops_the_device_and_its_streams() {
    for queue in [RX, TX] {
        let mut guest = Guest::new();
        let (mut stream, _) = connect(&mut guest, 4096);
        let task = Task::default();
        assert!(task.read(&mut stream, 1).is_pending());
        guest.driver.set_avail_idx(queue, 30_000);
        if queue == RX {
            assert_eq!(ready(task.write(&mut stream, b"x")), 1);
        } else {
            guest.driver.notify(TX);
        }
        assert_ne!(guest.driver.status() & 0x40, 0, "queue {queue}");
        assert_eq!(task.wakes(), 1);
        assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
    }
    let mut guest = Guest::new();
    guest.driver.set_avail_idx(EVENT, 30_000);
    guest.driver.dev.pause();
    let copy = guest.copied(&guest.driver.dev.state());
    copy.driver.dev.resume();
    assert_ne!(copy.driver.status() & 0x40, 0);
}

#[test]
fn tokio_tasks_on_several_threads() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    // The guest echoes; writer and reader run on their own threads against it.
    let mut guest = Guest::new();
    let (stream, mut end) = connect(&mut guest, 32 * 1024);
    let data = pattern(3 << 20);
    let expected = data.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let writing = runtime.spawn(async move {
        writer.write_all(&data).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let reading = runtime.spawn(async move {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        received
    });
    let (mut window, mut sent, mut backlog, mut finished) = (CAPACITY, 0u32, Vec::new(), false);
    while !reading.is_finished() {
        let mut heard = false;
        while let Some((header, payload)) = guest.receive() {
            heard = true;
            window = CAPACITY - sent.wrapping_sub(header.fwd_cnt) as usize;
            end.fwd_cnt = end.fwd_cnt.wrapping_add(header.len);
            backlog.extend(payload);
            match Op::from_wire(header.op) {
                Some(Op::CreditRequest) => end.say(&mut guest, Op::CreditUpdate),
                Some(Op::Shutdown) => finished = true,
                _ => {}
            }
        }
        while window > 0 && !backlog.is_empty() {
            let count = window.min(backlog.len()).min(4000);
            let piece: Vec<u8> = backlog.drain(..count).collect();
            end.write(&mut guest, &piece);
            window -= count;
            sent += count as u32;
        }
        if heard {
            end.say(&mut guest, Op::CreditUpdate);
        }
        if finished && backlog.is_empty() {
            end.shutdown(&mut guest, SHUTDOWN_BOTH);
            finished = false;
        }
        std::thread::yield_now();
    }
    runtime.block_on(writing).unwrap();
    assert!(runtime.block_on(reading).unwrap() == expected);
}

state_round_trips! {
    state,
    device: Guest::new(),
    mutate: |guest: &mut Guest| {
        connect(guest, 100);
    },
    save: |guest: &Guest| guest.driver.dev.state(),
    restore: |guest: &Guest, state: &MmioState<VsockState>| guest.copied(state),
}

#[test]
fn another_guest_id_is_refused() {
    let mut state = Vsock::new().state();
    assert!(Vsock::restore((), &state).is_ok());
    state.guest_cid = 4;
    assert!(Vsock::restore((), &state).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn random_packets_never_panic(
        packets in proptest::collection::vec(
            (0u16..10, 0u32..5, any::<[u32; 3]>(), 0usize..300, 0u64..5, 0u8..8),
            1..200,
        ),
    ) {
        let mut guest = Guest::with_buffers(6);
        let (mut stream, end) = connect(&mut guest, 1000);
        let _listener = guest.connector().listen(80).unwrap();
        let task = Task::default();
        for (op, flags, [len, buf_alloc, fwd_cnt], size, cid, action) in packets {
            let header = Header {
                op,
                flags,
                len: if len % 3 == 0 { len } else { size as u32 },
                buf_alloc: buf_alloc % 5000,
                fwd_cnt: if fwd_cnt % 2 == 0 { fwd_cnt } else { 0 },
                dst_cid: if cid == 4 { 4 } else { HOST_CID },
                dst_port: if action == 7 { 80 } else { end.host },
                src_port: if action == 7 { len % 4 } else { PORT },
                ..end.header(Op::Rw)
            };
            match action {
                0 => drop(task.write(&mut stream, &vec![0; size])),
                1 => drop(task.read(&mut stream, size)),
                2 => drop(guest.receive()),
                3 => shut(&mut stream),
                _ => {
                    guest.driver.poke(guest.tx, &header.encode());
                    guest.driver.add(TX, &[out(guest.tx, HEADER_LEN), out(guest.tx + 64, size)]);
                    guest.driver.notify(TX);
                    while guest.driver.used(TX).is_some() {}
                    if guest.driver.free(TX) < 10 {
                        break;
                    }
                }
            }
        }
        drop(stream);
        prop_assert!(guest.counts().1 <= guest.counts().0);
    }

    #[test]
    fn random_descriptor_tables_never_panic(
        descriptors in proptest::collection::vec(
            (0usize..3, prop_oneof![0..RAM + 0x1000, any::<u64>()], 0u32..0x1000, 0u16..8, 0u16..20),
            40,
        ),
        heads in proptest::collection::vec((0usize..3, 0u16..16), 1..60),
    ) {
        let mut guest = Guest::with_buffers(0);
        let connector = guest.connector();
        let runtime = runtime();
        let _entered = runtime.enter();
        let mut connecting = pin!(connector.connect(PORT));
        let _ = Task::default().poll(connecting.as_mut());
        for (index, (queue, addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            guest.driver.descriptor(queue, index as u16 % 16, addr, len, flags, next);
        }
        for (queue, head) in heads {
            guest.driver.offer(queue, head);
            guest.driver.notify(queue);
        }
    }
}
