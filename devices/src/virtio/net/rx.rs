//! Receiving: buffers taken ahead from a receive queue, and frames put into them.
//!
//! Buffers are kept from call to call until there is room for the longest frame the driver may
//! get; the host's end is only looked at then, and only waited for then.

use std::collections::VecDeque;
use std::time::Instant;

use virtio_bindings::virtio_net::*;

use super::header::{HEADER, MAX_FRAME, NUM_BUFFERS};
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, Io, total, write_at};

/// Room for a frame with a VLAN tag where nothing says that frames may be longer.
const PLAIN_MTU: u16 = 1500;
const LINK_LAYER: u64 = 18;

/// What is negotiated about receiving.
#[derive(Clone, Copy, Debug)]
pub(super) struct RxMode {
    /// Frames may go over several buffers (MRG_RXBUF).
    pub mergeable: bool,
    /// The driver takes checksums that are not complete, or not checked, now.
    pub csum: bool,
    /// Longest frame with its header.
    pub longest: u64,
}

impl RxMode {
    /// `longest` goes by what was negotiated, whatever of it the driver takes now.
    pub fn new(io: &Io<'_>, mtu: u16, csum: bool) -> Self {
        let segments = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_UFO,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ];
        let frame = match segments.iter().any(|bit| io.has(*bit)) {
            true => MAX_FRAME,
            false => LINK_LAYER + u64::from(mtu.max(PLAIN_MTU)),
        };
        Self {
            mergeable: io.has(VIRTIO_NET_F_MRG_RXBUF),
            csum,
            longest: HEADER + frame,
        }
    }
}

/// The receiving side of a pair of queues.
#[derive(Debug)]
pub(super) struct Rx {
    queue: usize,
    held: VecDeque<Chain>,
    /// Bytes in them.
    room: u64,
    /// The source is waited for.
    pub armed: bool,
    /// Nothing is received before.
    pub until: Option<Instant>,
}

impl Rx {
    pub fn new(queue: usize) -> Self {
        Self {
            queue,
            held: VecDeque::new(),
            room: 0,
            armed: true,
            until: None,
        }
    }

    /// Takes buffers until there is room for a frame; says whether there is.
    pub fn gather(&mut self, io: &mut Io<'_>, mode: RxMode) -> Result<bool, DeviceError> {
        let enough = |rx: &Self| match mode.mergeable {
            true => rx.room >= mode.longest,
            false => !rx.held.is_empty(),
        };
        while !enough(self) {
            let Some(chain) = io.pop(self.queue)? else {
                // A queue too small for the longest frame has to do as it is.
                let all = usize::from(io.queue_size(self.queue));
                return Ok(!self.held.is_empty() && self.held.len() >= all);
            };
            let len = total(chain.writable());
            // Section 5.1.6.3.1: room for the header at least.
            if len < HEADER {
                return Err(chain.layout_error());
            }
            self.room += len;
            self.held.push_back(chain);
        }
        Ok(true)
    }

    /// The buffers for the next frame.
    pub fn buffers(&self, mode: RxMode) -> impl Iterator<Item = &Chain> + Clone {
        let count = if mode.mergeable { self.held.len() } else { 1 };
        self.held.iter().take(count)
    }

    /// Puts a frame of the device's own into the buffers, behind a blank header; says whether it fits.
    pub fn fill(&self, ram: &GuestRam, mode: RxMode, frame: &[u8]) -> Result<bool, DeviceError> {
        let (mut skip, mut rest) = (HEADER, frame);
        for chain in self.buffers(mode) {
            let done = write_at(ram, chain.writable(), skip, rest)?;
            rest = rest.get(done..).unwrap_or_default();
            skip = 0;
        }
        Ok(rest.is_empty())
    }

    /// Gives the driver the frame in the first `len` bytes, header included, that are in the
    /// buffers. `blank`: the header is not there yet.
    pub fn deliver(
        &mut self,
        io: &mut Io<'_>,
        mode: RxMode,
        (len, blank): (u64, bool),
    ) -> Result<(), DeviceError> {
        let mut left = len;
        let mut used = Vec::new();
        while left > 0 {
            let Some(chain) = self.held.pop_front() else {
                break;
            };
            let size = total(chain.writable());
            self.room -= size;
            let part = size.min(left);
            left -= part;
            used.push((chain, part as u32));
        }
        if let Some((first, _)) = used.first() {
            let ram = io.ram();
            if blank {
                write_at(ram, first.writable(), 0, &[0; NUM_BUFFERS as usize])?;
            } else if !mode.csum {
                write_at(ram, first.writable(), 0, &[0])?;
            }
            let count = used.len() as u16;
            write_at(ram, first.writable(), NUM_BUFFERS, &count.to_le_bytes())?;
        }
        io.complete_together(self.queue, used)
    }

    /// Puts all buffers back.
    pub fn let_go(&mut self, io: &mut Io<'_>) {
        while let Some(chain) = self.held.pop_back() {
            io.unpop(chain);
        }
        *self = Self::new(self.queue);
    }
}
