//! A port's host end inside the VMM: two bounded byte pipes with eventfds.
//!
//! One side is the device on its I/O thread, the other any thread. Nobody ever waits: a full pipe
//! takes nothing, and its eventfd tells the writer of room.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::lock;
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Segment, read_at, total};

#[derive(Debug, Default)]
struct Content {
    bytes: VecDeque<u8>,
    /// The writer was refused and wants to hear of room.
    refused: bool,
    closed: bool,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Pipe {
    content: Mutex<Content>,
    capacity: usize,
    /// Written when bytes begin to wait, and at the end.
    pub data: EventFd,
    /// Written when there is room again, and at the end.
    pub room: EventFd,
}

impl Pipe {
    fn new(capacity: usize) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            content: Mutex::default(),
            capacity: capacity.max(1),
            data: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// Bytes that fit now. Zero has the writer told of room.
    pub fn free(&self) -> io::Result<usize> {
        let mut content = lock(&self.content);
        if content.closed {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let free = self.capacity.saturating_sub(content.bytes.len());
        content.refused |= free == 0;
        Ok(free)
    }

    /// Takes as much as fits and says how much.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut content = lock(&self.content);
        if content.closed {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let free = self.capacity.saturating_sub(content.bytes.len());
        let fits = bytes.get(..free.min(bytes.len())).unwrap_or_default();
        content.refused |= fits.len() < bytes.len();
        let first = content.bytes.is_empty() && !fits.is_empty();
        content.bytes.extend(fits);
        if first {
            signal(&self.data);
        }
        Ok(fits.len())
    }

    /// Gives up to `max` bytes; `None` at the end.
    pub fn read(&self, max: usize) -> Option<Vec<u8>> {
        let mut content = lock(&self.content);
        let count = max.min(content.bytes.len());
        let mut bytes = Vec::with_capacity(count);
        let (first, second) = content.bytes.as_slices();
        for part in [first, second] {
            let fits = part.len().min(count - bytes.len());
            bytes.extend_from_slice(part.get(..fits).unwrap_or_default());
        }
        content.bytes.drain(..count);
        if count > 0 && std::mem::take(&mut content.refused) {
            signal(&self.room);
        }
        (!bytes.is_empty() || !content.closed).then_some(bytes)
    }

    /// What waits to be read.
    fn waiting(&self) -> Vec<u8> {
        lock(&self.content).bytes.iter().copied().collect()
    }

    /// Neither side adds anything any more; what waits can be read.
    pub fn close(&self) {
        lock(&self.content).closed = true;
        signal(&self.data);
        signal(&self.room);
    }

    pub fn is_closed(&self) -> bool {
        lock(&self.content).closed
    }
}

/// Only a counter at its maximum refuses, and then the reader is told already.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

/// The device's side of a pair of pipes; closed when it goes.
#[derive(Debug)]
pub(super) struct PipeEnd {
    pub to_guest: Arc<Pipe>,
    pub from_guest: Arc<Pipe>,
}

impl PipeEnd {
    /// Takes bytes of `segments` from `offset` on and says how many; `None` where nobody reads any
    /// more. Where not all fit, an event will tell of room.
    pub fn push(
        &self,
        ram: &GuestRam,
        segments: &[Segment],
        offset: u64,
    ) -> Result<Option<u64>, DeviceError> {
        let len = total(segments).saturating_sub(offset);
        let mut done = 0;
        while done < len {
            let Ok(free) = self.from_guest.free() else {
                return Ok(None);
            };
            if free == 0 {
                break;
            }
            let mut bytes = vec![0; (len - done).min(free as u64) as usize];
            read_at(ram, segments, offset + done, &mut bytes)?;
            match self.from_guest.write(&bytes) {
                Ok(count) => done += count as u64,
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(done))
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.to_guest.close();
        self.from_guest.close();
    }
}

/// The VMM's side of a port: for the agent, or whoever lives in this process. Dropping it closes
/// the port.
#[derive(Debug)]
pub struct HostPort {
    to_guest: Arc<Pipe>,
    from_guest: Arc<Pipe>,
}

impl HostPort {
    /// A pair that holds up to `capacity` bytes in each direction.
    pub(super) fn pair(capacity: usize) -> io::Result<(Self, PipeEnd)> {
        let (to_guest, from_guest) = (Pipe::new(capacity)?, Pipe::new(capacity)?);
        let end = PipeEnd {
            to_guest: Arc::clone(&to_guest),
            from_guest: Arc::clone(&from_guest),
        };
        let host = Self {
            to_guest,
            from_guest,
        };
        Ok((host, end))
    }

    /// Readable when bytes begin to wait, and when the device closes the port; [`take`](Self::take)
    /// clears it.
    pub fn readable(&self) -> &EventFd {
        &self.from_guest.data
    }

    /// Readable when there is room again after [`write`](Self::write) took less than all, which
    /// clears it.
    pub fn writable(&self) -> &EventFd {
        &self.to_guest.room
    }

    /// All bytes from the guest that wait; `None` once the device is gone and nothing waits.
    pub fn take(&self) -> Option<Vec<u8>> {
        // Readable, or somebody else took it.
        let _ = self.from_guest.data.read();
        self.from_guest.read(usize::MAX)
    }

    /// Takes as much for the guest as there is room, and says how much: zero when full.
    /// `BrokenPipe` once the device is gone.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.to_guest.room.read();
        self.to_guest.write(bytes)
    }

    /// Bytes for the guest that its device has not taken yet; they still wait.
    pub fn unread(&self) -> Vec<u8> {
        self.to_guest.waiting()
    }
}

impl Drop for HostPort {
    fn drop(&mut self) {
        self.to_guest.close();
        self.from_guest.close();
    }
}
