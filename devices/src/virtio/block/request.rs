//! From a descriptor chain to a request that may be carried out (section 5.2.6).
//!
//! Everything is checked here, against the disk and not against what the driver negotiated: a
//! read-only disk is not written whatever the driver believes.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::SECTOR;
use super::space::{MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, read_at, total};

/// Bytes of the header: type, reserved, sector.
pub(super) const HEADER: u64 = 16;
/// Most bytes that a request moves: no driver asks for so many at once, but descriptors that name one
/// buffer many times would come to 4 GiB.
pub(super) const MAX_TRANSFER: u64 = 64 << 20;
/// Bytes of a range to discard or zero.
const RANGE: u64 = 16;
/// Bytes of a device ID.
pub(super) const ID_LEN: usize = 20;
/// The flag of a range that allows to free what is zeroed.
const UNMAP: u32 = 1;

/// `status` of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub offset: u64,
    pub len: u64,
    /// Zeroed blocks may be freed.
    pub unmap: bool,
}

/// What to do, in bytes; checked against the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read {
        offset: u64,
        len: u64,
    },
    Write {
        offset: u64,
        len: u64,
    },
    Flush,
    Id,
    Discard(Vec<Range>),
    Zero(Vec<Range>),
    /// Nothing: this is the answer.
    Refused(Status),
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// In sectors.
    pub capacity: u64,
    /// In bytes.
    pub block: u64,
    pub writable: bool,
}

impl Geometry {
    /// The place of `len` bytes at `sector`, if the disk has it.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        let offset = sector.checked_mul(SECTOR)?;
        let aligned = len.is_multiple_of(self.block) && offset.is_multiple_of(self.block);
        (end <= self.capacity && aligned).then_some(offset)
    }
}

impl Request {
    /// Reads the request in `chain`; an error is one of the driver that breaks the device.
    pub fn parse(ram: &GuestRam, chain: &Chain, disk: Geometry) -> Result<Self, DeviceError> {
        let readable = total(chain.readable());
        let writable = total(chain.writable());
        if readable < HEADER || writable < 1 {
            return Err(chain.layout_error());
        }
        let mut header = [0; HEADER as usize];
        read_at(ram, chain.readable(), 0, &mut header)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let sector = u64::from_le_bytes(sector);
        let (out, input) = (readable - HEADER, writable - 1);
        let refused = Self::Refused(Status::IoError);
        Ok(match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT if out.max(input) > MAX_TRANSFER => refused,
            VIRTIO_BLK_T_IN => match disk.place(sector, input) {
                Some(offset) => Self::Read { offset, len: input },
                None => refused,
            },
            VIRTIO_BLK_T_OUT => match disk.place(sector, out) {
                Some(offset) if disk.writable => Self::Write { offset, len: out },
                _ => refused,
            },
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::Id,
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !disk.writable => refused,
            VIRTIO_BLK_T_DISCARD => match ranges(ram, chain, out, disk, true)? {
                Ok(ranges) => Self::Discard(ranges),
                Err(status) => Self::Refused(status),
            },
            VIRTIO_BLK_T_WRITE_ZEROES => match ranges(ram, chain, out, disk, false)? {
                Ok(ranges) => Self::Zero(ranges),
                Err(status) => Self::Refused(status),
            },
            _ => Self::Refused(Status::Unsupported),
        })
    }

    /// Bytes that count for the bandwidth.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => *len,
            Self::Zero(ranges) => ranges.iter().map(|range| range.len).sum(),
            Self::Flush | Self::Id | Self::Discard(_) | Self::Refused(_) => 0,
        }
    }
}

/// Ranges of a discard or write-zeroes request, `len` bytes of them.
fn ranges(
    ram: &GuestRam,
    chain: &Chain,
    len: u64,
    disk: Geometry,
    discard: bool,
) -> Result<Result<Vec<Range>, Status>, DeviceError> {
    let (most, most_sectors) = match discard {
        true => (MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS),
        false => (1, MAX_ZERO_SECTORS),
    };
    if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > u64::from(most) {
        return Ok(Err(Status::IoError));
    }
    let mut ranges = Vec::with_capacity((len / RANGE) as usize);
    for at in 0..len / RANGE {
        let mut bytes = [0; RANGE as usize];
        read_at(ram, chain.readable(), HEADER + at * RANGE, &mut bytes)?;
        let word = u128::from_le_bytes(bytes);
        let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
        // Section 5.2.6.2: unknown flags, and unmap where all is unmapped, are not supported.
        if flags & !UNMAP != 0 || discard && flags != 0 {
            return Ok(Err(Status::Unsupported));
        }
        let len = u64::from(sectors) * SECTOR;
        match disk.place(sector, len) {
            Some(_) if len == 0 => {}
            Some(offset) if sectors <= most_sectors => ranges.push(Range {
                offset,
                len,
                unmap: flags & UNMAP != 0,
            }),
            _ => return Ok(Err(Status::IoError)),
        }
    }
    Ok(Ok(ranges))
}
