//! Frames that never reach the host's end: a service of the VMM's own takes and answers them.

use std::fmt::Debug;
use std::time::Instant;

use super::Net;
use super::header::HEADER;
use super::rx::RxMode;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, Io, read_at};

/// Bytes by which a frame is told: an Ethernet header and a request of ARP over it.
pub const HEAD: usize = 42;
/// Longest frame for a detour.
const LONGEST: u64 = 16 << 10;
/// The pair of queues on which it answers.
pub(super) const PAIR: usize = 0;

/// A service in front of the host's end. Owned by the device; all its work is done in these calls.
pub trait Detour: Debug + Send {
    /// Whether a frame that begins so is for it. What is behind a shorter frame is zero.
    fn takes(&self, start: &[u8; HEAD]) -> bool;
    /// Takes a frame of the guest, of any content.
    fn send(&mut self, frame: &[u8]);
    /// The next frame for the guest.
    fn receive(&mut self) -> Option<Vec<u8>>;
    /// Whether there are frames for the guest.
    fn is_waiting(&self) -> bool;
    /// When [`receive`](Self::receive) is to be called although nothing came from the guest.
    fn due(&mut self) -> Option<Instant>;
    /// Forgets the guest.
    fn reset(&mut self);
}

impl Net {
    /// Gives the detour the frame of `len` bytes in `chain`, if it is for it.
    pub(super) fn give_detour(
        &mut self,
        io: &Io<'_>,
        chain: &Chain,
        len: u64,
    ) -> Result<bool, DeviceError> {
        let Some(detour) = &mut self.detour else {
            return Ok(false);
        };
        let mut start = [0; HEAD];
        read_at(io.ram(), chain.readable(), HEADER, &mut start)?;
        if !detour.takes(&start) {
            return Ok(false);
        }
        if len > LONGEST {
            self.counters.tx.dropped("it is too long");
            return Ok(true);
        }
        let mut frame = vec![0; len as usize];
        read_at(io.ram(), chain.readable(), HEADER, &mut frame)?;
        detour.send(&frame);
        self.counters.tx.passed(len);
        Ok(true)
    }

    /// Gives the guest a frame of the detour, if there is one and the buffers are empty.
    pub(super) fn take_detour(
        &mut self,
        pair: usize,
        io: &mut Io<'_>,
        mode: RxMode,
    ) -> Result<bool, DeviceError> {
        let (Some(detour), Some(rx)) = (&mut self.detour, self.rx.get_mut(pair)) else {
            return Ok(false);
        };
        if pair != PAIR || self.backend.is_amid_frame() {
            return Ok(false);
        }
        let Some(frame) = detour.receive() else {
            return Ok(false);
        };
        let bytes = frame.len() as u64;
        if rx.fill(io.ram(), mode, &frame)? {
            rx.deliver(io, mode, (HEADER + bytes, true))?;
            self.counters.rx.passed(bytes);
        } else {
            self.counters.rx.dropped("it does not fit the buffers");
        }
        Ok(true)
    }

    /// Comes back to the detour when it is time. `wait`: there are buffers.
    pub(super) fn attend_detour(&mut self, pair: usize, wait: bool) -> Result<(), DeviceError> {
        let Some(detour) = self.detour.as_mut().filter(|_| pair == PAIR) else {
            return Ok(());
        };
        let at = match detour.is_waiting() {
            false => detour.due(),
            // The guest's next buffers, or the rest of the host's frame, come first.
            true => (wait && !self.backend.is_amid_frame()).then(Instant::now),
        };
        at.map_or(Ok(()), |at| self.schedule(at))
    }
}
