//! Frames: sync bytes, header with its own check, payload, CRC-32.
//!
//! The header's check lets the decoder discard a false start after eight bytes instead of waiting
//! for a payload that never comes.

use crc::{CRC_16_IBM_3740, CRC_32_ISO_HDLC, Crc, Table};

/// The two bytes that start a frame.
pub const SYNC: [u8; 2] = [0xb0, 0x11];
/// Bytes before the payload: sync (2), kind, flags, length (2), CRC-16 of the first six.
pub const HEADER: usize = 8;
/// Bytes after the payload: CRC-32 of header and payload.
pub const TRAILER: usize = 4;
/// Bytes of a frame that are not payload.
pub const OVERHEAD: usize = HEADER + TRAILER;
/// Largest payload of one frame.
pub const MAX_PAYLOAD: usize = 4096;
/// Largest frame.
pub const MAX_FRAME: usize = MAX_PAYLOAD + OVERHEAD;

const HEADER_CRC: Crc<u16, Table<1>> = Crc::<u16, Table<1>>::new(&CRC_16_IBM_3740);
const FRAME_CRC: Crc<u32, Table<1>> = Crc::<u32, Table<1>>::new(&CRC_32_ISO_HDLC);

/// One frame as found in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Kind of message, see [`crate::message`].
    pub kind: u8,
    /// Flags of the kind.
    pub flags: u8,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// The command that it is about: 0 is the main one.
    pub fn job(&self) -> u8 {
        self.flags >> 4
    }
}

/// Writes one frame to `out` and returns its length, `OVERHEAD` + payload.
///
/// `None` if the payload is longer than [`MAX_PAYLOAD`] or `out` is too small.
pub fn encode(frame: Frame<'_>, out: &mut [u8]) -> Option<usize> {
    if frame.payload.len() > MAX_PAYLOAD {
        return None;
    }
    let length = u16::try_from(frame.payload.len()).ok()?.to_le_bytes();
    let end = HEADER + frame.payload.len();
    let out = out.get_mut(..end + TRAILER)?;
    let head = [
        SYNC[0],
        SYNC[1],
        frame.kind,
        frame.flags,
        length[0],
        length[1],
    ];
    out[..6].copy_from_slice(&head);
    out[6..HEADER].copy_from_slice(&HEADER_CRC.checksum(&head).to_le_bytes());
    out[HEADER..end].copy_from_slice(frame.payload);
    let crc = FRAME_CRC.checksum(&out[..end]);
    out[end..].copy_from_slice(&crc.to_le_bytes());
    Some(end + TRAILER)
}

/// Finds frames in a byte stream. Holds at most one frame; bytes that belong to none are skipped
/// and counted.
pub struct Decoder {
    buffer: [u8; MAX_FRAME],
    filled: usize,
    /// Length of the frame returned last, dropped at the next call.
    returned: usize,
    skipped: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// An empty decoder.
    pub const fn new() -> Self {
        Self {
            buffer: [0; MAX_FRAME],
            filled: 0,
            returned: 0,
            skipped: 0,
        }
    }

    /// Whether no part of a frame waits for the rest of it.
    pub fn is_empty(&self) -> bool {
        self.filled == self.returned
    }

    /// The part of a frame that waits for the rest of it.
    pub fn held(&self) -> &[u8] {
        self.buffer
            .get(self.returned..self.filled)
            .unwrap_or_default()
    }

    /// Bytes skipped so far because they were not part of an intact frame.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes bytes from the front of `input` until a frame is complete.
    ///
    /// `None` means that all of `input` was taken and more is needed. Call again with the rest
    /// after each frame.
    pub fn decode(&mut self, input: &mut &[u8]) -> Option<Frame<'_>> {
        self.drop_front(self.returned);
        self.returned = 0;
        loop {
            let wanted = self.wanted();
            if self.filled < wanted {
                let n = (wanted - self.filled).min(input.len());
                let (now, rest) = input.split_at(n);
                self.buffer[self.filled..self.filled + n].copy_from_slice(now);
                self.filled += n;
                *input = rest;
            }
            if self.filled < wanted {
                return None;
            }
            if !self.header_is_intact() {
                self.resync();
            } else if wanted > HEADER {
                if self.payload_is_intact(wanted) {
                    self.returned = wanted;
                    break;
                }
                self.resync();
            }
        }
        Some(Frame {
            kind: self.buffer[2],
            flags: self.buffer[3],
            payload: &self.buffer[HEADER..self.returned - TRAILER],
        })
    }

    /// Bytes needed to go on: a header, or the whole frame when the header is there.
    fn wanted(&self) -> usize {
        if self.filled >= HEADER && self.header_is_intact() {
            OVERHEAD + usize::from(u16::from_le_bytes([self.buffer[4], self.buffer[5]]))
        } else {
            HEADER
        }
    }

    fn header_is_intact(&self) -> bool {
        let (head, crc) = self.buffer[..HEADER].split_at(6);
        let length = u16::from_le_bytes([head[4], head[5]]);
        head.starts_with(&SYNC)
            && usize::from(length) <= MAX_PAYLOAD
            && HEADER_CRC.checksum(head).to_le_bytes() == *crc
    }

    fn payload_is_intact(&self, length: usize) -> bool {
        let (body, crc) = self.buffer[..length].split_at(length - TRAILER);
        FRAME_CRC.checksum(body).to_le_bytes() == *crc
    }

    /// Skips to the next byte that may start a frame.
    fn resync(&mut self) {
        let held = &self.buffer[1..self.filled];
        let next = held
            .iter()
            .position(|&b| b == SYNC[0])
            .map_or(self.filled, |at| at + 1);
        self.skipped = self.skipped.saturating_add(next as u64);
        self.drop_front(next);
    }

    fn drop_front(&mut self, n: usize) {
        self.buffer.copy_within(n..self.filled, 0);
        self.filled -= n;
    }
}
