//! vsock packet headers (virtio 1.2, section 5.10.6).

/// Bytes of a header on the wire.
pub(super) const HEADER_LEN: usize = 44;
/// The host's well-known context id.
pub(super) const HOST_CID: u64 = 2;
/// The only socket type we offer.
pub(super) const TYPE_STREAM: u16 = 1;
/// A larger packet is refused; Linux never sends more.
pub(super) const MAX_PAYLOAD: u32 = 64 * 1024;

/// SHUTDOWN flag: the sender will receive no more.
pub(super) const SHUTDOWN_RCV: u32 = 1;
/// SHUTDOWN flag: the sender will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_wire(op: u16) -> Option<Op> {
        Some(match op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Header {
        fn take<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes[at + i])
        }
        Header {
            src_cid: u64::from_le_bytes(take(bytes, 0)),
            dst_cid: u64::from_le_bytes(take(bytes, 8)),
            src_port: u32::from_le_bytes(take(bytes, 16)),
            dst_port: u32::from_le_bytes(take(bytes, 20)),
            len: u32::from_le_bytes(take(bytes, 24)),
            kind: u16::from_le_bytes(take(bytes, 28)),
            op: u16::from_le_bytes(take(bytes, 30)),
            flags: u32::from_le_bytes(take(bytes, 32)),
            buf_alloc: u32::from_le_bytes(take(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(take(bytes, 40)),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_specifications() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 1024,
            len: 7,
            kind: 1,
            op: 5,
            flags: 3,
            buf_alloc: 0x4_0000,
            fwd_cnt: 9,
        };
        let bytes = header.encode();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[20..24], [0, 4, 0, 0]);
        assert_eq!(bytes[24..32], [7, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[36..44], [0, 0, 4, 0, 9, 0, 0, 0]);
        assert_eq!(Header::decode(&bytes), header);
    }

    #[test]
    fn operations_round_trip() {
        for raw in 0..=u16::MAX {
            match Op::from_wire(raw) {
                Some(op) => assert_eq!(op as u16, raw),
                None => assert!(raw == 0 || raw > 7),
            }
        }
    }
}
