//! The multiplexer: all connections between host programs and guest ports, independent of queues and memory.
//!
//! Packets to the guest leave through a [`RxRing`], when there is one (the guest has a driver, the machine is
//! not paused) and it has buffers. What cannot leave is not queued as packets: a connection with
//! something to say is in `ready` once, and says it when its turn comes, round robin. The only packets without
//! a connection are resets for unknown ones; when too many of those wait, the guest's own queue is not
//! read further, so a guest that floods us only blocks itself.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::task::{Poll, Waker};

use super::conn::{Connection, Phase};
use super::packet::{HOST_CID, Header, MAX_PAYLOAD, Op, SHUTDOWN_SEND, TYPE_STREAM};
use super::ring::CAPACITY;

/// The most connections at a time, in either direction.
pub(super) const MAX_CONNECTIONS: usize = 8192;
/// Connections from the guest that nobody has accepted yet, per listener.
const MAX_BACKLOG: usize = 128;
/// Resets for unknown connections that may wait.
const MAX_RESETS: usize = 64;
/// Ports for connections from the host.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = u32::MAX >> 1;

/// Names a connection, and never another one later.
pub(super) type Id = u64;

/// The guest's receive queue.
pub(super) trait RxRing {
    /// Places one packet and as much of `payload` as the next buffer holds, at least one byte if there is any.
    /// Returns how much, or `None` when there is no buffer.
    fn send(&mut self, header: Header, payload: [&[u8]; 2]) -> Option<usize>;
    /// Asks to be told of new buffers. True when there are some now.
    fn rearm(&mut self) -> bool;
    /// Lets the guest know of the packets placed.
    fn finish(&mut self);
}

/// Reads the payload of a packet from the guest: fills the buffer from an offset, or fails.
pub(super) type PayloadReader<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<(), ()>;

/// Guest ports do not know which host they belong to; both ports name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

#[derive(Debug, Default)]
struct Listener {
    backlog: VecDeque<Id>,
    waker: Option<Waker>,
}

/// The multiplexer.
#[derive(Debug)]
pub(super) struct Mux {
    guest_cid: u64,
    connections: HashMap<Id, Connection>,
    by_ports: HashMap<Ports, Id>,
    listeners: HashMap<u32, Listener>,
    ready: VecDeque<Id>,
    resets: VecDeque<Header>,
    next_id: Id,
    next_port: u32,
    /// New packets must wait: the guest is about to drop all its connections.
    held: bool,
    /// The machine is gone.
    ended: bool,
    wakers: Vec<Waker>,
}

impl Mux {
    pub(super) fn new(guest_cid: u64, next_port: u32) -> Self {
        Mux {
            guest_cid,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            listeners: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: 1,
            next_port: next_port.clamp(FIRST_PORT, LAST_PORT),
            held: false,
            ended: false,
            wakers: Vec::new(),
        }
    }

    /// The first port of a machine that was never saved.
    pub(super) const FIRST_PORT: u32 = FIRST_PORT;

    /// The port the next connection from the host would have. A restored machine goes on from there, because
    /// the guest's old sockets, though reset, keep their ports until their owners close them.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    pub(super) fn take_wakers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.wakers)
    }

    /// Whether packets from the guest should wait until ours have left.
    pub(super) fn congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Holds back all packets to the guest, or lets them go.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    // ---- towards the guest ----

    /// Sends what is due until nothing is, or the guest has no more buffers.
    pub(super) fn pump(&mut self, rx: &mut dyn RxRing) {
        while !self.held {
            if let Some(&header) = self.resets.front() {
                if rx.send(header, [&[], &[]]).is_some() {
                    self.resets.pop_front();
                } else if !rx.rearm() {
                    break;
                }
                continue;
            }
            let Some(&id) = self.ready.front() else { break };
            if self.send_one(id, rx) {
                self.ready.pop_front();
                self.settle(id);
            } else if !rx.rearm() {
                break;
            }
        }
        rx.finish();
    }

    /// Sends the next packet of a connection. False when the guest has no buffer.
    fn send_one(&mut self, id: Id, rx: &mut dyn RxRing) -> bool {
        let Some(conn) = self.connections.get_mut(&id) else { return true };
        conn.queued = false;
        let Some(op) = conn.next_op() else { return true };
        let header = conn.header(self.guest_cid, op);
        let payload = if op == Op::Rw {
            let [first, second] = conn.tx.slices();
            let count = conn.sendable(conn.tx.len());
            let head = count.min(first.len());
            [&first[..head], &second[..count - head]]
        } else {
            [&[] as &[u8], &[]]
        };
        let Some(sent) = rx.send(header, payload) else {
            conn.queued = true;
            return false;
        };
        conn.sent(op, sent);
        conn.tx.consume(sent);
        if sent > 0 {
            self.wakers.extend(conn.write_waker.take());
        }
        true
    }

    /// After a connection's state has changed: queues it if it has something to say, forgets it if it is over.
    fn settle(&mut self, id: Id) {
        let Some(conn) = self.connections.get_mut(&id) else { return };
        if !conn.on_wire {
            let ports = Ports { host: conn.host_port, guest: conn.guest_port };
            if self.by_ports.get(&ports) == Some(&id) {
                self.by_ports.remove(&ports);
            }
            if !conn.has_handle {
                self.forget(id);
            }
            return;
        }
        if !conn.queued && conn.next_op().is_some() {
            conn.queued = true;
            self.ready.push_back(id);
        }
    }

    fn forget(&mut self, id: Id) {
        let Some(conn) = self.connections.remove(&id) else { return };
        if conn.queued {
            self.ready.retain(|&ready| ready != id);
        }
        self.wakers.extend(conn.read_waker);
        self.wakers.extend(conn.write_waker);
    }

    /// Settles a connection and wakes whoever waits for it.
    fn changed(&mut self, id: Id) {
        if let Some(conn) = self.connections.get_mut(&id) {
            self.wakers.extend(conn.read_waker.take());
            self.wakers.extend(conn.write_waker.take());
        }
        self.settle(id);
    }

    // ---- from the guest ----

    /// Processes one packet from the guest. `available` is how much payload its buffer really holds.
    pub(super) fn receive(&mut self, header: &Header, available: u64, payload: PayloadReader<'_>) {
        if header.src_cid != self.guest_cid {
            // Not even an address to answer to.
            return;
        }
        let op = Op::from_wire(header.op);
        let acceptable = header.len <= MAX_PAYLOAD && u64::from(header.len) <= available;
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        // Other types and addresses have ports of their own, none of which is in use.
        let ours = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let known = self.by_ports.get(&ports).copied().filter(|_| ours);
        let Some(op) = op.filter(|_| acceptable) else {
            return match known {
                Some(id) => self.violated(id),
                None => self.refuse(header),
            };
        };
        match known {
            Some(id) => self.receive_known(id, op, header, payload),
            None if op == Op::Request && ours => self.receive_request(header),
            None => self.refuse(header),
        }
    }

    fn receive_known(&mut self, id: Id, op: Op, header: &Header, payload: PayloadReader<'_>) {
        let Some(conn) = self.connections.get_mut(&id) else { return };
        conn.hear_credit(header);
        match (conn.phase, op) {
            (_, Op::Rst) => {
                conn.peer_reset();
                return self.changed(id);
            }
            // Our reset is on its way; nothing else matters.
            (Phase::Closed(_), _) => {}
            (Phase::Connecting, Op::Response) if !conn.unannounced() => {
                conn.established();
                return self.changed(id);
            }
            (Phase::Established, Op::Rw) => {
                let len = header.len as usize;
                if conn.deaf() {
                    conn.consumed(len);
                } else if conn.peer_shut & SHUTDOWN_SEND != 0 || len > conn.rx.free() {
                    return self.violated(id);
                } else {
                    let [first, second] = conn.rx.reserve(len);
                    let split = first.len() as u64;
                    if payload(0, first).and_then(|()| payload(split, second)).is_err() {
                        return self.violated(id);
                    }
                    conn.rx.commit(len);
                    self.wakers.extend(conn.read_waker.take());
                }
            }
            (Phase::Established, Op::CreditUpdate) => {}
            (Phase::Established, Op::CreditRequest) => conn.credit_asked(),
            (Phase::Established, Op::Shutdown) => {
                conn.peer_shutdown(header.flags);
                return self.changed(id);
            }
            _ => return self.violated(id),
        }
        self.settle(id);
    }

    fn receive_request(&mut self, header: &Header) {
        let room = self.make_room();
        match self.listeners.get_mut(&header.dst_port) {
            Some(listener) if room && listener.backlog.len() < MAX_BACKLOG => {
                let id = self.next_id;
                self.next_id += 1;
                listener.backlog.push_back(id);
                self.wakers.extend(listener.waker.take());
                self.add(id, Connection::accepted(header));
            }
            _ => self.refuse(header),
        }
    }

    fn violated(&mut self, id: Id) {
        if let Some(conn) = self.connections.get_mut(&id) {
            conn.reset(io::ErrorKind::ConnectionReset);
        }
        self.changed(id);
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Rst as u16 || self.resets.len() >= MAX_RESETS {
            return;
        }
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Rst as u16,
            ..Header::default()
        });
    }

    fn add(&mut self, id: Id, conn: Connection) {
        self.by_ports.insert(Ports { host: conn.host_port, guest: conn.guest_port }, id);
        self.connections.insert(id, conn);
        self.settle(id);
    }

    /// Makes sure that one more connection fits, at the cost of one that only waits for the guest to close.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let oldest = self.connections.iter().filter(|(_, conn)| !conn.has_handle).map(|(&id, _)| id).min();
        let Some((id, conn)) = oldest.and_then(|id| self.connections.get(&id).map(|conn| (id, conn))) else {
            return false;
        };
        self.by_ports.remove(&Ports { host: conn.host_port, guest: conn.guest_port });
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(conn.header(self.guest_cid, Op::Rst));
        }
        self.forget(id);
        true
    }

    // ---- from host programs ----

    /// Starts a connection to a guest port.
    pub(super) fn connect(&mut self, guest_port: u32) -> io::Result<(Id, u32)> {
        if self.ended {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if !self.make_room() {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "Too many connections to the guest"));
        }
        // There are more ports than connections, so this ends.
        let host_port = loop {
            let port = self.next_port;
            self.next_port = if port == LAST_PORT { FIRST_PORT } else { port + 1 };
            if !self.by_ports.contains_key(&Ports { host: port, guest: guest_port }) {
                break port;
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        self.add(id, Connection::connecting(host_port, guest_port));
        Ok((id, host_port))
    }

    /// Whether a connection was accepted.
    pub(super) fn poll_connect(&mut self, id: Id, waker: &Waker) -> Poll<io::Result<()>> {
        let Some(conn) = self.connections.get_mut(&id) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        match conn.phase {
            Phase::Connecting => {
                park(&mut conn.read_waker, waker, &mut self.wakers);
                Poll::Pending
            }
            Phase::Closed(Some(error)) if conn.rx.is_empty() => Poll::Ready(Err(error.into())),
            // Accepted, and perhaps over already; reading will tell.
            Phase::Established | Phase::Closed(_) => Poll::Ready(Ok(())),
        }
    }

    /// Reads what has arrived; zero bytes are the end.
    pub(super) fn poll_read(
        &mut self,
        id: Id,
        waker: &Waker,
        room: usize,
        mut sink: impl FnMut(&[u8]),
    ) -> Poll<io::Result<usize>> {
        let Some(conn) = self.connections.get_mut(&id) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if room == 0 {
            return Poll::Ready(Ok(0));
        }
        if !conn.rx.is_empty() {
            let [first, second] = conn.rx.slices();
            let head = room.min(first.len());
            let tail = (room - head).min(second.len());
            sink(&first[..head]);
            sink(&second[..tail]);
            conn.rx.consume(head + tail);
            conn.consumed(head + tail);
            self.settle(id);
            return Poll::Ready(Ok(head + tail));
        }
        match conn.phase {
            Phase::Closed(Some(error)) => Poll::Ready(Err(error.into())),
            Phase::Closed(None) => Poll::Ready(Ok(0)),
            _ if conn.peer_shut & SHUTDOWN_SEND != 0 => Poll::Ready(Ok(0)),
            _ => {
                park(&mut conn.read_waker, waker, &mut self.wakers);
                Poll::Pending
            }
        }
    }

    /// Sends `data`, as far as the guest has buffers and credit right away, and buffers the rest up to a bound.
    pub(super) fn poll_write(
        &mut self,
        id: Id,
        waker: &Waker,
        data: &[u8],
        rx: Option<&mut (dyn RxRing + '_)>,
    ) -> Poll<io::Result<usize>> {
        let Some(conn) = self.connections.get_mut(&id) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if let Err(error) = conn.may_write() {
            return Poll::Ready(Err(error.into()));
        }
        let mut done = 0;
        // With nothing queued ahead, straight from the caller's buffer into the guest's.
        let direct = !self.held
            && self.resets.is_empty()
            && self.ready.is_empty()
            && conn.tx.is_empty()
            && conn.may_send();
        if let (true, Some(rx)) = (direct, rx) {
            loop {
                let count = conn.sendable(data.len() - done);
                if count == 0 {
                    break;
                }
                let header = conn.header(self.guest_cid, Op::Rw);
                match rx.send(header, [&data[done..done + count], &[]]) {
                    Some(sent) => {
                        conn.sent(Op::Rw, sent);
                        done += sent;
                    }
                    None if rx.rearm() => {}
                    None => break,
                }
            }
            rx.finish();
        }
        done += conn.tx.push(&data[done..]);
        if done == 0 && !data.is_empty() {
            park(&mut conn.write_waker, waker, &mut self.wakers);
        }
        self.settle(id);
        if done == 0 && !data.is_empty() { Poll::Pending } else { Poll::Ready(Ok(done)) }
    }

    /// The host program sends no more.
    pub(super) fn shut_send(&mut self, id: Id) {
        if let Some(conn) = self.connections.get_mut(&id) {
            conn.shut_send();
        }
        self.settle(id);
    }

    /// The host program lets go of the connection.
    pub(super) fn abandon(&mut self, id: Id) {
        if let Some(conn) = self.connections.get_mut(&id) {
            conn.abandon();
            self.wakers.extend(conn.read_waker.take());
            self.wakers.extend(conn.write_waker.take());
        }
        self.settle(id);
    }

    /// Lets the guest connect to a host port.
    pub(super) fn listen(&mut self, port: u32) -> io::Result<()> {
        if self.ended {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if self.listeners.contains_key(&port) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        self.listeners.insert(port, Listener::default());
        Ok(())
    }

    /// Ends a listener; connections nobody accepted are reset.
    pub(super) fn unlisten(&mut self, port: u32) {
        let Some(listener) = self.listeners.remove(&port) else { return };
        self.wakers.extend(listener.waker);
        for id in listener.backlog {
            if let Some(conn) = self.connections.get_mut(&id) {
                conn.reset(io::ErrorKind::ConnectionAborted);
                conn.has_handle = false;
            }
            self.settle(id);
        }
    }

    /// The next connection from the guest, with its ports.
    pub(super) fn poll_accept(&mut self, port: u32, waker: &Waker) -> Poll<io::Result<(Id, u32)>> {
        let Some(listener) = self.listeners.get_mut(&port) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        while let Some(id) = listener.backlog.pop_front() {
            if let Some(conn) = self.connections.get(&id) {
                return Poll::Ready(Ok((id, conn.guest_port)));
            }
        }
        park(&mut listener.waker, waker, &mut self.wakers);
        Poll::Pending
    }

    // ---- the machine ----

    /// The guest's driver is gone, and every connection with it. Connects that the guest never heard of stay.
    pub(super) fn driver_reset(&mut self) {
        self.resets.clear();
        self.held = false;
        self.sever(io::ErrorKind::ConnectionReset, false);
    }

    /// The machine is gone.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.resets.clear();
        for (_, listener) in self.listeners.drain() {
            self.wakers.extend(listener.waker);
        }
        self.sever(io::ErrorKind::ConnectionReset, true);
    }

    fn sever(&mut self, error: io::ErrorKind, unannounced_too: bool) {
        let ids: Vec<Id> = self.connections.keys().copied().collect();
        for id in ids {
            if let Some(conn) = self.connections.get_mut(&id)
                && (unannounced_too || !conn.unannounced())
            {
                conn.sever(error);
                self.changed(id);
            }
        }
        let connections = &self.connections;
        self.ready.retain(|id| connections.get(id).is_some_and(|conn| conn.on_wire));
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        (self.connections.len(), self.ready.len(), self.resets.len())
    }
}

/// Remembers who waits. A waker that is replaced is woken rather than dropped, because dropping one may run
/// code that takes the device's lock.
fn park(slot: &mut Option<Waker>, waker: &Waker, woken: &mut Vec<Waker>) {
    if !slot.as_ref().is_some_and(|old| old.will_wake(waker)) {
        woken.extend(slot.replace(waker.clone()));
    }
}

const _: () = assert!(CAPACITY >= MAX_PAYLOAD as usize);
