//! The header of a packet (section 5.10.6), and its numbers.

use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, read_at, write_at};
use crate::virtio::uds::SocketType;

/// Bytes of a header.
pub const HEADER: u64 = 44;
/// Most bytes behind a header, as Linux has it.
pub const MAX_PAYLOAD: u64 = 64 * 1024;
/// The host's CID.
pub const HOST_CID: u64 = 2;

/// Operations.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// SHUTDOWN: the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN: the sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// SHUTDOWN: neither.
pub const SHUTDOWN_BOTH: u32 = 3;
/// RW: the packet is the last of its message.
pub const END_OF_MESSAGE: u32 = 1;

/// Type of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Stream,
    Seqpacket,
}

impl Kind {
    /// As the host's sockets have it.
    pub fn socket_type(self) -> SocketType {
        match self {
            Self::Stream => SocketType::Stream,
            Self::Seqpacket => SocketType::Seqpacket,
        }
    }

    pub fn of_socket(kind: SocketType) -> Self {
        match kind {
            SocketType::Stream => Self::Stream,
            SocketType::Seqpacket => Self::Seqpacket,
        }
    }

    pub fn number(self) -> u16 {
        match self {
            Self::Stream => 1,
            Self::Seqpacket => 2,
        }
    }

    pub fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Stream),
            2 => Some(Self::Seqpacket),
            _ => None,
        }
    }
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header of a packet from the guest; `None` if the packet is not whole.
    pub fn read(ram: &GuestRam, chain: &Chain) -> Result<Option<Self>, DeviceError> {
        let mut bytes = [0; HEADER as usize];
        let count = read_at(ram, chain.readable(), 0, &mut bytes)?;
        let header = Self::parse(bytes);
        let there = crate::virtio::io::total(chain.readable()).saturating_sub(HEADER);
        let len = u64::from(header.len);
        let whole = count == bytes.len() && len <= there && len <= MAX_PAYLOAD;
        Ok(whole.then_some(header))
    }

    /// Writes the header at the start of a buffer for the guest.
    pub fn write(&self, ram: &GuestRam, chain: &Chain) -> Result<(), DeviceError> {
        write_at(ram, chain.writable(), 0, &self.bytes()).map(drop)
    }

    pub fn parse(bytes: [u8; HEADER as usize]) -> Self {
        let mut rest = bytes.into_iter();
        let mut take = |count: u32| -> u64 {
            (0..count).fold(0, |n, i| n | u64::from(rest.next().unwrap_or(0)) << (8 * i))
        };
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER as usize);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    /// The RST that answers this packet.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}
