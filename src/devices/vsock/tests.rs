//! vsock from both ends: a guest that speaks the protocol through the rings, and host programs on streams.

mod hostile;
mod lifecycle;
mod streams;

use std::future::Future;
use std::io::{self, ErrorKind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

use super::mux::MAX_CONNECTIONS;
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
