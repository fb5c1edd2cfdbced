//! One vsock connection: its state machine and both directions' flow control (virtio 1.2, section 5.10.6.3).
//!
//! A connection never queues packets. What it has to say follows from its state
//! ([`Connection::next_op`]), so however much is due, it costs nothing but a few flags:
//!
//! ```text
//!   host connects:   Connecting ──RESPONSE──▶ Established ──both ends shut / RST──▶ Closed
//!   guest connects:                           Established (RESPONSE due)
//! ```
//!
//! `on_wire` tells whether the guest still knows the connection; `has_handle` whether the host program still
//! holds the stream. It is forgotten when neither does.

use std::io;
use std::task::Waker;

use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::ring::{CAPACITY, Ring};

/// An update is sent when the reader has consumed this much since the guest last heard.
const CREDIT_STEP: u32 = CAPACITY as u32 / 4;

/// Where the connection stands, as the host program sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Connecting,
    Established,
    /// Over: properly, or with an error.
    Closed(Option<io::ErrorKind>),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) phase: Phase,
    /// The guest has not been told that it is over.
    pub(super) on_wire: bool,
    /// A stream, a pending connect or a listener's backlog refers to it.
    pub(super) has_handle: bool,
    /// It is in the multiplexer's ready queue.
    pub(super) queued: bool,

    /// From the guest, not yet read.
    pub(super) rx: Ring,
    /// To the guest, not yet sent.
    pub(super) tx: Ring,

    /// Bytes the reader has consumed, and the value the guest last heard.
    fwd_cnt: u32,
    announced: u32,
    /// Bytes sent, and what the guest says about its side.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// The guest was asked for credit and has not answered.
    credit_requested: bool,
    /// The guest asked for credit, or should hear of new credit.
    credit_due: bool,

    request_due: bool,
    response_due: bool,
    rst_due: bool,
    /// Directions the host has shut, and what the guest has heard of it.
    shut: u32,
    shut_sent: u32,
    /// Directions the guest has shut, from its point of view.
    pub(super) peer_shut: u32,

    pub(super) read_waker: Option<Waker>,
    pub(super) write_waker: Option<Waker>,
}

impl Connection {
    fn new(host_port: u32, guest_port: u32, phase: Phase) -> Self {
        Connection {
            host_port,
            guest_port,
            phase,
            on_wire: true,
            has_handle: true,
            queued: false,
            rx: Ring::default(),
            tx: Ring::default(),
            fwd_cnt: 0,
            announced: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            credit_requested: false,
            credit_due: false,
            request_due: false,
            response_due: false,
            rst_due: false,
            shut: 0,
            shut_sent: 0,
            peer_shut: 0,
            read_waker: None,
            write_waker: None,
        }
    }

    /// The host asks for a connection.
    pub(super) fn connecting(host_port: u32, guest_port: u32) -> Self {
        Connection { request_due: true, ..Self::new(host_port, guest_port, Phase::Connecting) }
    }

    /// The guest asked for a connection, and gets it.
    pub(super) fn accepted(request: &Header) -> Self {
        let mut conn = Connection {
            response_due: true,
            ..Self::new(request.dst_port, request.src_port, Phase::Established)
        };
        conn.hear_credit(request);
        conn
    }

    /// Whether the guest knows nothing of it yet.
    pub(super) fn unannounced(&self) -> bool {
        self.request_due
    }

    /// Takes note of the guest's receive window, which every packet carries.
    pub(super) fn hear_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// How many bytes the guest has room for. Counters that make no sense give none.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Whether data may go out now, as far as the connection's own state goes.
    pub(super) fn may_send(&self) -> bool {
        self.phase == Phase::Established && !self.response_due && !self.rst_due
    }

    /// The next packet due, if any.
    pub(super) fn next_op(&self) -> Option<Op> {
        if !self.on_wire {
            return None;
        }
        if self.rst_due {
            // A request the guest never saw needs no reset; the multiplexer drops it.
            return Some(Op::Rst);
        }
        if self.request_due {
            return Some(Op::Request);
        }
        if self.response_due {
            return Some(Op::Response);
        }
        if self.phase != Phase::Established {
            return None;
        }
        let credit = self.credit();
        if !self.tx.is_empty() && credit > 0 {
            return Some(Op::Rw);
        }
        if self.tx.is_empty() && self.shut & !self.shut_sent != 0 {
            return Some(Op::Shutdown);
        }
        if self.credit_due {
            return Some(Op::CreditUpdate);
        }
        if !self.tx.is_empty() && !self.credit_requested {
            return Some(Op::CreditRequest);
        }
        None
    }

    /// The header for a packet with `op`; the length is filled in by whoever places the payload.
    pub(super) fn header(&self, guest_cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: if op == Op::Shutdown { self.shut } else { 0 },
            buf_alloc: CAPACITY as u32,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// The most the next data packet may carry out of `available` bytes.
    pub(super) fn sendable(&self, available: usize) -> usize {
        available.min(self.credit().min(MAX_PAYLOAD) as usize)
    }

    /// A packet with `op` and `payload` bytes of data reached the guest's ring.
    pub(super) fn sent(&mut self, op: Op, payload: usize) {
        self.announced = self.fwd_cnt;
        self.credit_due = false;
        match op {
            Op::Request => self.request_due = false,
            Op::Response => self.response_due = false,
            Op::Rst => {
                self.rst_due = false;
                self.on_wire = false;
            }
            Op::Shutdown => self.shut_sent = self.shut,
            // At most MAX_PAYLOAD.
            Op::Rw => self.tx_cnt = self.tx_cnt.wrapping_add(payload as u32),
            Op::CreditRequest => self.credit_requested = true,
            Op::CreditUpdate => {}
        }
    }

    /// `count` bytes from the guest are out of the way: read, or thrown away.
    pub(super) fn consumed(&mut self, count: usize) {
        // At most CAPACITY.
        self.fwd_cnt = self.fwd_cnt.wrapping_add(count as u32);
        if self.fwd_cnt.wrapping_sub(self.announced) >= CREDIT_STEP {
            self.credit_due = true;
        }
    }

    /// The guest asked how much it may send.
    pub(super) fn credit_asked(&mut self) {
        self.credit_due = true;
    }

    /// Whether the host program will read no more.
    pub(super) fn deaf(&self) -> bool {
        self.shut & SHUTDOWN_RCV != 0 || !self.has_handle
    }

    /// Whether the host program may write.
    pub(super) fn may_write(&self) -> Result<(), io::ErrorKind> {
        match self.phase {
            Phase::Closed(error) => Err(error.unwrap_or(io::ErrorKind::BrokenPipe)),
            _ if self.peer_shut & SHUTDOWN_RCV != 0 || self.shut & SHUTDOWN_SEND != 0 => {
                Err(io::ErrorKind::BrokenPipe)
            }
            _ => Ok(()),
        }
    }

    /// The host will send no more; told to the guest after what is buffered.
    pub(super) fn shut_send(&mut self) {
        self.shut |= SHUTDOWN_SEND;
    }

    /// The host program has let go. What it has written is still delivered.
    pub(super) fn abandon(&mut self) {
        self.has_handle = false;
        self.rx.clear();
        if self.phase == Phase::Connecting {
            self.reset(io::ErrorKind::ConnectionAborted);
        } else {
            self.shut = SHUTDOWN_BOTH;
        }
    }

    /// The guest shut directions.
    pub(super) fn peer_shutdown(&mut self, flags: u32) {
        self.peer_shut |= flags & SHUTDOWN_BOTH;
        if self.peer_shut & SHUTDOWN_RCV != 0 {
            self.tx.clear();
        }
        if self.peer_shut == SHUTDOWN_BOTH {
            // The peer has closed; all it sent came before this. A reset is the proper answer (5.10.6.5).
            self.rst_due = true;
            self.close(None);
        }
    }

    /// The guest reset the connection.
    pub(super) fn peer_reset(&mut self) {
        self.on_wire = false;
        let proper = self.peer_shut & SHUTDOWN_SEND != 0 || self.shut_sent == SHUTDOWN_BOTH;
        self.close(match self.phase {
            Phase::Connecting => Some(io::ErrorKind::ConnectionRefused),
            _ if proper => None,
            _ => Some(io::ErrorKind::ConnectionReset),
        });
    }

    /// We end the connection, because the guest broke the protocol or nobody wants it any more.
    pub(super) fn reset(&mut self, error: io::ErrorKind) {
        if self.request_due {
            self.on_wire = false;
        } else {
            self.rst_due = true;
        }
        self.close(Some(error));
    }

    /// The transport under the connection is gone.
    pub(super) fn sever(&mut self, error: io::ErrorKind) {
        self.on_wire = false;
        self.close(Some(error));
    }

    /// The guest accepted.
    pub(super) fn established(&mut self) {
        self.phase = Phase::Established;
    }

    fn close(&mut self, error: Option<io::ErrorKind>) {
        if !matches!(self.phase, Phase::Closed(_)) {
            self.phase = Phase::Closed(error);
        }
        self.tx.clear();
    }
}
