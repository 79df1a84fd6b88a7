//! Requests of a block device (section 5.2.6), one after the other.

use super::Device;
use super::queue::{Desc, NEXT, Queue, WRITE};
use crate::io;

/// Read.
pub const IN: u32 = 0;
/// Write.
pub const OUT: u32 = 1;
/// Device ID of block devices.
pub const ID: u32 = 2;

/// A disk with one queue and one request at a time, in RAM of its own.
pub struct Disk {
    device: Device,
    queue: Queue,
    header: u64,
    /// Where the data of requests is.
    pub data: u64,
}

impl Disk {
    /// RAM it needs besides the data.
    const RINGS: u64 = Queue::bytes(16);

    /// Starts `device`, with rings at `base` and data behind.
    pub fn start(device: Device, base: u64) -> Option<Self> {
        if !device.negotiate(0) {
            return None;
        }
        let queue = Queue::new(base, 0, 16);
        queue.announce(&device);
        device.driver_ok();
        let header = base + Self::RINGS;
        let data = header + 0x1000;
        Some(Self {
            device,
            queue,
            header,
            data,
        })
    }

    /// The size in sectors.
    pub fn sectors(&self) -> u64 {
        io::read(self.device.config())
    }

    /// Transfers `len` bytes; the request's status, or `None` if it is never answered.
    pub fn request(&mut self, kind: u32, sector: u64, len: u32) -> Option<u8> {
        let status = self.header + 16;
        io::write(self.header, u64::from(kind));
        io::write(self.header + 8, sector);
        io::write(status, 0xffu8);
        let write = if kind == IN { WRITE } else { 0 };
        let chain = [
            (self.header, 16, NEXT, 1),
            (self.data, len, NEXT | write, 2),
            (status, 1, WRITE, 0),
        ];
        for (at, (addr, len, flags, next)) in (0..).zip(chain) {
            self.queue.desc(
                at,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        self.queue.one(&self.device)?;
        Some(io::read(status))
    }
}
