//! virtio-vsock (virtio 1.2, section 5.10): byte streams between host programs and guest ports.
//!
//! There are no sockets and no threads on the host side. A [`VsockStream`] is a handle to a connection inside
//! the device; its reads and writes take the device's lock, copy, and return. Written data goes straight into
//! the guest's receive buffers when it can. Flow control is the protocol's own credit, 512 KiB towards
//! the host and what the guest grants towards it, so a slow reader on either side stops the writer on the other.
//!
//! Connections do not survive into a copy of the machine. After a restore the guest is told by a
//! TRANSPORT_RESET event, and packets to it are held back until it has dealt with it: Linux resets every
//! connected socket when it sees the event, new ones included.

mod conn;
mod mux;
mod packet;
mod ring;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::task::Waker;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::GuestMemory;

use super::mmio::MmioTransport;
use super::queue::{Chain, QueueError, Queues};
use super::{RestoreError, VirtioDevice, read_config_bytes};
use mux::{Mux, RxRing};
use packet::{HEADER_LEN, Header};
pub use stream::{CONNECT_TIMEOUT, VsockConnector, VsockListener, VsockStream};

/// The guest's context id. Every machine has the same: they do not share a network.
pub const GUEST_CID: u64 = 3;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Event: all connections are gone (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// Saved state of the vsock device. Connections are not saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    guest_cid: u64,
    next_port: u32,
}

/// The guest's way to its TRANSPORT_RESET event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResetEvent {
    None,
    /// To be sent as soon as there is a buffer.
    Due,
    /// Sent, when the driver had made this many buffers available. The driver adds one when it has dealt with
    /// the event.
    Sent(u16),
}

/// The vsock device.
#[derive(Debug)]
pub struct Vsock {
    mux: Mux,
    chain: Chain,
    rx_chain: Chain,
    reset_event: ResetEvent,
    paused: bool,
}

impl Vsock {
    /// A device without connections.
    pub fn new() -> Self {
        Self::with_first_port(Mux::FIRST_PORT)
    }

    fn with_first_port(port: u32) -> Self {
        Vsock {
            mux: Mux::new(GUEST_CID, port),
            chain: Chain::default(),
            rx_chain: Chain::default(),
            reset_event: ResetEvent::None,
            paused: false,
        }
    }

    fn pump<M: GuestMemory>(&mut self, queues: &mut Queues<'_, M>) -> Result<(), QueueError> {
        let mut rx = GuestRx::new(queues, &mut self.rx_chain);
        self.mux.pump(&mut rx);
        rx.into_result()
    }

    /// Reads packets from the guest, as long as answers to them have a place.
    fn receive<M: GuestMemory>(&mut self, queues: &mut Queues<'_, M>) -> Result<(), QueueError> {
        if !queues.ready(TX) {
            return Ok(());
        }
        loop {
            queues.disable_notification(TX)?;
            let mut any = false;
            while !self.mux.congested() && queues.pop(TX, &mut self.chain)? {
                receive_packet(&mut self.mux, &self.chain, queues.mem());
                queues.add_used(TX, self.chain.head(), 0)?;
                any = true;
            }
            if any {
                queues.signal(TX)?;
            }
            self.pump(queues)?;
            if self.mux.congested() {
                // Goes on when the receive queue has buffers again.
                return Ok(());
            }
            if !queues.enable_notification(TX)? {
                return Ok(());
            }
        }
    }

    /// Moves the reset event along, and lets packets go when it has been dealt with.
    fn advance_reset<M: GuestMemory>(&mut self, queues: &mut Queues<'_, M>) -> Result<(), QueueError> {
        while self.reset_event == ResetEvent::Due {
            if !queues.ready(EVENT) {
                // A driver without an event queue has no connections yet.
                self.reset_event = ResetEvent::None;
            } else if queues.pop(EVENT, &mut self.chain)? {
                let event = TRANSPORT_RESET.to_le_bytes();
                let written = self.chain.write(queues.mem(), 0, &event).map_or(0, |()| event.len() as u32);
                queues.add_used(EVENT, self.chain.head(), written)?;
                queues.signal(EVENT)?;
                let then = queues.avail_idx(EVENT)?;
                queues.enable_notification_beyond(EVENT, then)?;
                self.reset_event = ResetEvent::Sent(then);
            } else if !queues.enable_notification(EVENT)? {
                break;
            }
        }
        if let ResetEvent::Sent(then) = self.reset_event
            && queues.avail_idx(EVENT)? != then
        {
            self.reset_event = ResetEvent::None;
        }
        self.mux.hold(self.reset_event != ResetEvent::None);
        Ok(())
    }
}

impl Default for Vsock {
    fn default() -> Self {
        Self::new()
    }
}

/// Hands one packet from a chain to the multiplexer. One without a whole header is dropped.
fn receive_packet<M: GuestMemory>(mux: &mut Mux, chain: &Chain, mem: &M) {
    let mut bytes = [0; HEADER_LEN];
    if !chain.well_formed() || chain.read(mem, 0, &mut bytes).is_err() {
        return;
    }
    let header = Header::decode(&bytes);
    let available = chain.readable_len() - HEADER_LEN as u64;
    mux.receive(&header, available, &mut |offset, buf| {
        chain.read(mem, HEADER_LEN as u64 + offset, buf).map_err(|_| ())
    });
}

/// The guest's receive queue, for the time of one operation. The multiplexer does not deal in queue errors:
/// after one, there simply are no more buffers.
struct GuestRx<'a, 'q, M> {
    queues: &'a mut Queues<'q, M>,
    chain: &'a mut Chain,
    placed: bool,
    error: Option<QueueError>,
}

impl<'a, 'q, M: GuestMemory> GuestRx<'a, 'q, M> {
    fn new(queues: &'a mut Queues<'q, M>, chain: &'a mut Chain) -> Self {
        GuestRx { queues, chain, placed: false, error: None }
    }

    fn into_result(self) -> Result<(), QueueError> {
        self.error.map_or(Ok(()), Err)
    }

    fn try_send(&mut self, mut header: Header, payload: [&[u8]; 2]) -> Result<Option<usize>, QueueError> {
        let wanted = payload[0].len() + payload[1].len();
        while self.queues.ready(RX) && self.queues.pop(RX, self.chain)? {
            self.placed = true;
            let room = self.chain.writable_len().saturating_sub(HEADER_LEN as u64);
            let count = (wanted as u64).min(room) as usize;
            let head = count.min(payload[0].len());
            let (mem, at) = (self.queues.mem(), HEADER_LEN as u64);
            // One packet is limited to MAX_PAYLOAD.
            header.len = count as u32;
            let written = self.chain.well_formed()
                && (count > 0 || wanted == 0)
                && self.chain.write(mem, 0, &header.encode()).is_ok()
                && self.chain.write(mem, at, &payload[0][..head]).is_ok()
                && self.chain.write(mem, at + head as u64, &payload[1][..count - head]).is_ok();
            let used = if written { HEADER_LEN as u32 + header.len } else { 0 };
            self.queues.add_used(RX, self.chain.head(), used)?;
            if written {
                return Ok(Some(count));
            }
            // A buffer that cannot take a packet goes back empty.
        }
        Ok(None)
    }

    fn try_rearm(&mut self) -> Result<bool, QueueError> {
        Ok(self.error.is_none() && self.queues.ready(RX) && self.queues.enable_notification(RX)?)
    }
}

impl<M: GuestMemory> RxRing for GuestRx<'_, '_, M> {
    fn send(&mut self, header: Header, payload: [&[u8]; 2]) -> Option<usize> {
        if self.error.is_some() {
            return None;
        }
        self.try_send(header, payload).unwrap_or_else(|error| {
            self.error = Some(error);
            None
        })
    }

    fn rearm(&mut self) -> bool {
        self.try_rearm().unwrap_or_else(|error| {
            self.error = Some(error);
            false
        })
    }

    fn finish(&mut self) {
        if std::mem::take(&mut self.placed)
            && self.error.is_none()
            && let Err(error) = self.queues.signal(RX)
        {
            self.error = Some(error);
        }
    }
}

impl VirtioDevice for Vsock {
    type State = VsockState;
    type Resources = ();

    const NAME: &'static str = "vsock";
    const DEVICE_ID: u32 = VIRTIO_ID_VSOCK;
    /// Linux keeps a page in each receive buffer; the event queue needs room for eight.
    const QUEUE_SIZES: &'static [u16] = &[128, 128, 16];

    fn features(&self) -> u64 {
        // Without a feature bit of its own, the device offers stream sockets (5.10.3).
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn reset(&mut self) {
        self.reset_event = ResetEvent::None;
        self.mux.driver_reset();
    }

    fn notify<M: GuestMemory>(&mut self, queue: usize, queues: &mut Queues<'_, M>) -> Result<(), QueueError> {
        if queue == EVENT {
            self.advance_reset(queues)?;
        }
        if queue == TX {
            self.receive(queues)
        } else {
            let congested = self.mux.congested();
            self.pump(queues)?;
            if congested { self.receive(queues) } else { Ok(()) }
        }
    }

    fn fail(&mut self) {
        self.reset();
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume<M: GuestMemory>(&mut self, queues: Option<&mut Queues<'_, M>>) -> Result<(), QueueError> {
        self.paused = false;
        match queues {
            Some(queues) => {
                self.advance_reset(queues)?;
                self.pump(queues)
            }
            None => {
                self.reset_event = ResetEvent::None;
                self.mux.hold(false);
                Ok(())
            }
        }
    }

    fn shutdown(&mut self) {
        self.mux.end();
    }

    fn take_wakers(&mut self) -> Vec<Waker> {
        self.mux.take_wakers()
    }

    fn state(&self) -> VsockState {
        VsockState { guest_cid: GUEST_CID, next_port: self.mux.next_port() }
    }

    fn restore((): (), state: &VsockState) -> Result<Self, RestoreError> {
        if state.guest_cid != GUEST_CID {
            return Err(RestoreError::Invalid { device: Self::NAME, reason: "another context id" });
        }
        let mut vsock = Vsock::with_first_port(state.next_port);
        vsock.reset_event = ResetEvent::Due;
        vsock.mux.hold(true);
        Ok(vsock)
    }
}

/// The device as host programs see it: the multiplexer, and the guest's receive queue when it may be used.
trait Hub: Send + Sync {
    fn run(&self, f: &mut dyn FnMut(&mut Mux, Option<&mut dyn RxRing>));
}

impl<M: GuestMemory + Send + Sync> Hub for MmioTransport<Vsock, M> {
    fn run(&self, f: &mut dyn FnMut(&mut Mux, Option<&mut dyn RxRing>)) {
        self.with_device(|device, queues| {
            let Some(queues) = queues.filter(|_| !device.paused) else {
                f(&mut device.mux, None);
                return Ok(());
            };
            let congested = device.mux.congested();
            let mut rx = GuestRx::new(queues, &mut device.rx_chain);
            f(&mut device.mux, Some(&mut rx));
            device.mux.pump(&mut rx);
            rx.into_result()?;
            if congested { device.receive(queues) } else { Ok(()) }
        });
    }
}

impl<M: GuestMemory + Send + Sync + 'static> MmioTransport<Vsock, M> {
    /// A handle for host programs to connect with.
    pub fn connector(self: &Arc<Self>) -> VsockConnector {
        VsockConnector::new(Arc::clone(self) as Arc<dyn Hub>)
    }
}
