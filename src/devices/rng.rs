//! virtio-entropy (virtio 1.2, section 5.4): the host's random numbers for the guest.
//!
//! Bytes are drawn while the request is processed and are never kept, so a saved machine holds none and two
//! copies of it draw different ones.

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemory;

use super::queue::{Chain, QueueError, Queues};
use super::{RestoreError, VirtioDevice, read_config_bytes};

/// The most one request gets; a shorter answer is allowed, and Linux asks for less than a page.
const MAX_REQUEST: u64 = 64 * 1024;
/// Largest read that getrandom(2) never interrupts or shortens.
const PIECE: usize = 256;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Entropy {
    chain: Chain,
}

/// Saved state of the entropy device: it has none of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {}

impl VirtioDevice for Entropy {
    type State = EntropyState;
    type Resources = ();

    const NAME: &'static str = "entropy";
    const DEVICE_ID: u32 = VIRTIO_ID_RNG;
    const QUEUE_SIZES: &'static [u16] = &[16];

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn reset(&mut self) {}

    fn notify<M: GuestMemory>(&mut self, queue: usize, queues: &mut Queues<'_, M>) -> Result<(), QueueError> {
        loop {
            queues.disable_notification(queue)?;
            while queues.pop(queue, &mut self.chain)? {
                let written = fill(&self.chain, queues.mem());
                queues.add_used(queue, self.chain.head(), written)?;
            }
            queues.signal(queue)?;
            if !queues.enable_notification(queue)? {
                return Ok(());
            }
        }
    }

    fn state(&self) -> EntropyState {
        EntropyState {}
    }

    fn restore((): (), _state: &EntropyState) -> Result<Self, RestoreError> {
        Ok(Entropy::default())
    }
}

/// Fills a chain's writable part and returns how many bytes are good.
fn fill<M: GuestMemory>(chain: &Chain, mem: &M) -> u32 {
    if !chain.well_formed() {
        return 0;
    }
    let wanted = chain.writable_len().min(MAX_REQUEST);
    let mut done = 0;
    while done < wanted {
        let mut bytes = [0u8; PIECE];
        let piece = (wanted - done).min(PIECE as u64) as usize;
        let got = match getrandom(&mut bytes[..piece], GetRandomFlags::empty()) {
            Ok(got) if got > 0 => got,
            _ => break,
        };
        if chain.write(mem, done, &bytes[..got]).is_err() {
            break;
        }
        done += got as u64;
    }
    // At most MAX_REQUEST.
    done as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Driver, RAM, into, out};

    #[test]
    fn fills_what_the_guest_offers() {
        let mut driver = Driver::new(Entropy::default());
        let buffer = driver.alloc(700);
        assert_eq!(driver.request(0, &[into(buffer, 600), into(buffer + 600, 100)]), 700);
        let bytes = driver.peek(buffer, 700);
        // 700 random bytes have all but certainly more than 100 values; constants do not.
        let mut seen = bytes.clone();
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 100);
        assert_eq!(driver.request(0, &[into(buffer, 700)]), 700);
        assert_ne!(driver.peek(buffer, 700), bytes);
    }

    #[test]
    fn marks_what_it_fills_and_nothing_else() {
        let mut driver = Driver::new(Entropy::default());
        let buffer = driver.alloc(3 * 4096).next_multiple_of(4096);
        driver.clean();
        driver.request(0, &[into(buffer, 1)]);
        assert!(driver.dirty(buffer));
        assert!(!driver.dirty(buffer + 4096));
    }

    #[test]
    fn odd_requests_get_what_is_possible() {
        let mut driver = Driver::new(Entropy::default());
        let buffer = driver.alloc(16);
        assert_eq!(driver.request(0, &[out(buffer, 16)]), 0);
        assert_eq!(driver.request(0, &[into(buffer, 0)]), 0);
        assert_eq!(driver.request(0, &[into(RAM, 16)]), 0);
        assert_eq!(driver.request(0, &[into(0x10_0000, 1 << 20)]), MAX_REQUEST as u32);
    }
}
