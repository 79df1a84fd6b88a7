//! A split virtqueue, driver's side (section 2.7), used without interrupts.

use core::sync::atomic::{Ordering, fence};

use super::{Device, Part};
use crate::{io, tsc};

/// The chain goes on.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

/// A queue whose parts lie behind each other in RAM of its own.
#[derive(Clone, Copy)]
pub struct Queue {
    /// Its index.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Addresses of descriptors, available ring, used ring.
    pub parts: [u64; 3],
    /// Next available index.
    pub avail: u16,
    /// Used entries that were seen.
    pub seen: u16,
}

impl Queue {
    /// Bytes that a queue of `size` takes.
    pub const fn bytes(size: u16) -> u64 {
        let size = size as u64;
        (16 * size + (6 + 2 * size) + 64 + (6 + 8 * size)).next_multiple_of(4096)
    }

    /// An empty queue at `base`, which is zeroed; the device does not know of it yet.
    pub fn new(base: u64, index: u16, size: u16) -> Self {
        for at in (base..base + Self::bytes(size)).step_by(8) {
            io::write(at, 0u64);
        }
        let entries = u64::from(size);
        let avail = base + 16 * entries;
        let used = (avail + 6 + 2 * entries).next_multiple_of(64);
        Self {
            index,
            size,
            parts: [base, avail, used],
            avail: 0,
            seen: 0,
        }
    }

    /// Tells `device` of it, between FEATURES_OK and DRIVER_OK.
    pub fn announce(&self, device: &Device) {
        device.select(self.index);
        device.set_queue_size(self.size);
        let parts = [Part::Desc, Part::Avail, Part::Used];
        for (part, address) in parts.into_iter().zip(self.parts) {
            device.set_address(part, address);
        }
        device.set_ready(1);
    }

    /// Asks for no interrupts: by the flag, and by an event index that is never reached.
    pub fn suppress_interrupts(&self) {
        io::write(self.parts[1], 1u16);
        self.set_used_event(self.seen.wrapping_sub(1));
    }

    /// `used_event`.
    pub fn set_used_event(&self, index: u16) {
        io::write(self.parts[1] + 4 + 2 * u64::from(self.size), index);
    }

    /// Writes descriptor `at`.
    pub fn desc(&self, at: u16, desc: Desc) {
        io::write(self.parts[0] + 16 * u64::from(at), desc);
    }

    /// Writes descriptors from `first` on: address, bytes, and flags, of which [`NEXT`] leads to the
    /// one behind.
    pub fn chain(&self, first: u16, parts: &[(u64, u32, u16)]) {
        for (at, (addr, len, flags)) in (first..).zip(parts.iter().copied()) {
            let next = at + 1;
            let desc = Desc {
                addr,
                len,
                flags,
                next,
            };
            self.desc(at, desc);
        }
    }

    /// Puts `head` into the available ring; the device may look at it from [`publish`](Self::publish) on.
    pub fn offer(&mut self, head: u16) {
        io::write(
            self.parts[1] + 4 + 2 * u64::from(self.avail % self.size),
            head,
        );
        self.avail = self.avail.wrapping_add(1);
    }

    /// Makes what was offered available.
    pub fn publish(&self) {
        fence(Ordering::SeqCst);
        io::write(self.parts[1] + 2, self.avail);
        fence(Ordering::SeqCst);
    }

    /// Whether the device wants to be kicked, `published` entries before.
    pub fn wants_kick(&self, event_idx: bool, published: u16) -> bool {
        if event_idx {
            let event: u16 = io::read(self.parts[2] + 4 + 8 * u64::from(self.size));
            let passed = self.avail.wrapping_sub(event).wrapping_sub(1);
            passed < self.avail.wrapping_sub(published)
        } else {
            io::read::<u16>(self.parts[2]) & 1 == 0
        }
    }

    /// `idx` of the used ring.
    pub fn used_index(&self) -> u16 {
        io::read(self.parts[2] + 2)
    }

    /// The next used element: head and bytes written.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = self.parts[2] + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((io::read(at), io::read(at + 4)))
    }

    /// Sends the chain that starts at descriptor 0 and waits for it; `None` if it never comes.
    pub fn one(&mut self, device: &Device) -> Option<u32> {
        self.offer(0);
        self.publish();
        device.notify(self.index);
        let mut used = None;
        tsc::wait(tsc::LONG, || {
            used = self.used();
            used.is_some()
        });
        used.map(|(_, len)| len)
    }
}
