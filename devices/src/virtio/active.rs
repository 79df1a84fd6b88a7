//! A queue in the hands of a running device: the rules of the split queue (section 2.7).
//!
//! Indirect descriptors, EVENT_IDX and suppression of notifications in both directions. Nothing that the
//! driver wrote is trusted: a chain is checked as a whole when it is popped. Owned by the device's worker;
//! devices reach it through [`Io`](super::io::Io).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::GuestRam;
use super::device::{ChainFault, DeviceError};
use super::io::{Chain, MAX_SEGMENTS, Segment};
use super::piece::Piece;

/// Room for descriptors, up to which a used chain's memory is kept for the next.
const SPARE_SEGMENTS: usize = 64;
/// Bytes of a descriptor (section 2.7.5).
const DESCRIPTOR: u32 = 16;
/// Bytes of an element of the used ring (section 2.7.8).
const USED: usize = 8;

/// A queue in the hands of a running device.
#[derive(Debug)]
pub(super) struct ActiveQueue {
    pub(super) queue: Queue,
    /// The driver's index in the available ring when it was last looked at.
    avail: u16,
    /// Chains popped and not completed.
    in_flight: u16,
    /// Chains that may still be popped in this turn.
    budget: u16,
    /// The device saw the end of the available ring.
    drained: bool,
    /// The device was stopped by the budget.
    pub(super) starved: bool,
    /// The device looks again by itself: the driver need not notify.
    pub(super) quiet: bool,
    /// Used buffers were added since the driver was last told.
    pub(super) added: bool,
    /// Next used index when it was last decided whether to interrupt.
    pub(super) told: u16,
    /// Empty vectors for the next chains.
    spare: Vec<Vec<Segment>>,
    /// The host's kernel has it: its rings are left alone.
    pub(super) lent: bool,
    /// Interrupt, whatever the driver wants.
    pub(super) interrupt: bool,
}

/// What comes after a device's turn on one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for a notification, or for the device itself where it holds chains back.
    Wait,
    /// More came in the meantime.
    Again,
    /// The turn was used up: let others run, then go on.
    Later,
}

impl ActiveQueue {
    pub(super) fn new(queue: Queue) -> Self {
        Self {
            told: queue.next_used(),
            avail: queue.next_avail(),
            queue,
            in_flight: 0,
            budget: 0,
            drained: false,
            starved: false,
            quiet: false,
            added: false,
            spare: Vec::new(),
            lent: false,
            interrupt: false,
        }
    }

    /// Where the driver and the device are: next available and next used index.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Starts a turn of the device on this queue.
    pub(super) fn begin(&mut self) {
        self.budget = self.queue.size();
        self.drained = false;
        self.starved = false;
        self.quiet = false;
    }

    /// Tells the driver not to notify while the device works anyway.
    pub(super) fn suppress(&mut self, ram: &GuestRam) -> Result<(), Error> {
        if self.lent {
            return Ok(());
        }
        self.queue.disable_notification(ram)
    }

    /// Tells the driver not to notify, also where it has not passed the index yet from which it would.
    /// The device has to come to the end of the queue after this.
    pub(super) fn hush(&mut self, ram: &GuestRam) -> Result<(), Error> {
        if self.lent || !self.queue.event_idx_enabled() {
            return self.suppress(ram);
        }
        // Section 2.7.10: as far behind what is to come as can be.
        let at = 4 + 8 * u64::from(self.queue.size());
        let at = GuestAddress(self.queue.used_ring().wrapping_add(at));
        let passed = self.queue.next_avail().wrapping_sub(1);
        ram.store(passed.to_le(), at, Ordering::Relaxed)
            .map_err(Error::GuestMemory)
    }

    /// Ends the turn: whether to interrupt, and what comes next.
    pub(super) fn end(&mut self, ram: &GuestRam) -> Result<(bool, Next), Error> {
        let wanted = std::mem::take(&mut self.added) && self.wants_interrupt(ram)?;
        let interrupt = std::mem::take(&mut self.interrupt) || wanted;
        let next = if self.lent {
            Next::Wait
        } else if self.starved {
            Next::Later
        } else if self.quiet {
            self.hush(ram)?;
            Next::Wait
        } else if self.drained && self.queue.enable_notification(ram)? {
            Next::Again
        } else {
            Next::Wait
        };
        Ok((interrupt, next))
    }

    fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        let now = self.queue.next_used();
        let before = std::mem::replace(&mut self.told, now);
        // What the driver wants is read after what was used is written.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let word = |offset: u64| -> Result<u16, Error> {
            let at = GuestAddress(avail.wrapping_add(offset));
            let word = ram.load(at, Ordering::Relaxed);
            word.map(u16::from_le).map_err(Error::GuestMemory)
        };
        if self.queue.event_idx_enabled() {
            // Section 2.7.7.2: `used_event` is among those that were used since.
            let event = word(4 + 2 * u64::from(self.queue.size()))?;
            let since = now.wrapping_sub(before);
            return Ok(now.wrapping_sub(event).wrapping_sub(1) < since);
        }
        // Section 2.7.7: without EVENT_IDX the flag decides.
        Ok(u32::from(word(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Adds used chains so that the driver sees all of them or none.
    pub(super) fn add_together(
        &mut self,
        ram: &GuestRam,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), Error> {
        let mut last = None;
        let mut next = self.queue.next_used();
        let size = self.queue.size();
        let ring = self.queue.used_ring().wrapping_add(4);
        let ring = Piece::new(ram, ring, USED * usize::from(size));
        for (chain, len) in chains {
            let Some((head, len)) = last.replace((self.recycle(chain), len)) else {
                continue;
            };
            // Ahead of the index that the driver sees.
            let element = [u32::from(head).to_le(), u32::to_le(len)];
            ring.write(USED * usize::from(next % size), element)?;
            next = next.wrapping_add(1);
        }
        let Some((head, len)) = last else {
            return Ok(());
        };
        self.added = true;
        self.queue.set_next_used(next);
        self.queue.add_used(ram, head, len)
    }

    pub(super) fn pop(
        &mut self,
        index: usize,
        ram: &GuestRam,
    ) -> Result<Option<Chain>, DeviceError> {
        if self.lent {
            return Ok(None);
        }
        if self.budget == 0 {
            self.starved = true;
            return Ok(None);
        }
        let next = self.next_head(ram).map_err(|source| DeviceError::Queue {
            queue: index,
            source,
        })?;
        let Some(head) = next else {
            self.drained = true;
            return Ok(None);
        };
        let fault = |fault| DeviceError::Chain {
            queue: index,
            head,
            fault,
        };
        if self.in_flight >= self.queue.size() {
            return Err(fault(ChainFault::TooMany));
        }
        let limit = usize::from(self.queue.size()).max(MAX_SEGMENTS);
        let mut segments = self.spare.pop().unwrap_or_default();
        let table = (self.queue.desc_table(), self.queue.size());
        let readable = collect(ram, table, head, limit, &mut segments).map_err(fault)?;
        self.in_flight += 1;
        self.budget -= 1;
        Ok(Some(Chain {
            queue: index,
            head,
            segments,
            readable,
        }))
    }

    /// Takes the head of the next chain from the available ring, if there is one.
    fn next_head(&mut self, ram: &GuestRam) -> Result<Option<u16>, Error> {
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        if self.avail == next {
            self.avail = self.queue.avail_idx(ram, Ordering::Acquire)?.0;
        }
        let ahead = self.avail.wrapping_sub(next);
        if ahead > size {
            self.avail = next;
            return Err(Error::InvalidAvailRingIndex);
        }
        if ahead == 0 {
            return Ok(None);
        }
        let at = 4 + 2 * u64::from(next % size);
        let at = GuestAddress(self.queue.avail_ring().wrapping_add(at));
        let head = ram.load(at, Ordering::Acquire);
        let head = head.map(u16::from_le).map_err(Error::GuestMemory)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
    }

    /// Chains that are still to be popped of those that were available when the ring was last looked at.
    pub(super) fn remaining(&self) -> u16 {
        self.avail.wrapping_sub(self.queue.next_avail())
    }

    /// Goes on at `next` of the available ring.
    pub(super) fn go_to(&mut self, next: u16) {
        self.queue.set_next_avail(next);
        self.avail = next;
    }

    pub(super) fn recycle(&mut self, chain: Chain) -> u16 {
        let mut segments = chain.segments;
        segments.clear();
        // Long chains are rare: what they took is given back.
        if segments.capacity() <= SPARE_SEGMENTS {
            self.spare.push(segments);
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        chain.head
    }
}

/// Reads the whole chain at `head` of the table of descriptors at an address, of so many; says how many
/// of its segments are readable.
fn collect(
    ram: &GuestRam,
    (table, size): (u64, u16),
    head: u16,
    limit: usize,
    segments: &mut Vec<Segment>,
) -> Result<usize, ChainFault> {
    let mut walk = Walk::new(ram, table, size, head);
    let (mut readable, mut writing, mut count) = (0, false, 0);
    let mut ends = Err(ChainFault::Empty);
    while let Some(descriptor) = walk.next() {
        if count >= limit {
            return Err(ChainFault::TooLong);
        }
        count += 1;
        if writing && !descriptor.is_write_only() {
            return Err(ChainFault::Order);
        }
        writing = descriptor.is_write_only();
        // The walk stops without a word where a chain is broken: then the last descriptor it gave
        // says that there is a next one.
        ends = match descriptor.has_next() {
            true => Err(ChainFault::Endless),
            false => Ok(()),
        };
        if descriptor.len() > 0 {
            readable += usize::from(!writing);
            segments.push(Segment {
                addr: descriptor.addr(),
                len: descriptor.len(),
            });
        }
    }
    ends.map(|()| readable)
}

/// The descriptors of a chain, one after the other, up to its end or to where it is broken.
struct Walk<'m> {
    ram: &'m GuestRam,
    table: Piece<'m>,
    size: u16,
    /// The next one; none is behind the last.
    next: Option<u16>,
    /// How many there may still be without a loop.
    left: u16,
    /// How many bytes there may still be: a chain has at most 2^32 (section 2.7.5.2).
    bytes: u32,
    indirect: bool,
}

impl<'m> Walk<'m> {
    fn new(ram: &'m GuestRam, table: u64, size: u16, head: u16) -> Self {
        Self {
            ram,
            table: Piece::new(ram, table, DESCRIPTOR as usize * usize::from(size)),
            size,
            next: Some(head),
            left: size,
            bytes: u32::MAX,
            indirect: false,
        }
    }

    fn next(&mut self) -> Option<Descriptor> {
        let index = self.next.take().filter(|index| *index < self.size)?;
        self.left = self.left.checked_sub(1)?;
        let at = DESCRIPTOR as usize * usize::from(index);
        let descriptor: Descriptor = self.table.read(at).ok()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(&descriptor)?;
            return self.next();
        }
        self.bytes = self.bytes.checked_sub(descriptor.len())?;
        self.next = descriptor.has_next().then(|| descriptor.next());
        Some(descriptor)
    }

    /// Goes on in an indirect table, in which there are no others (section 2.7.5.3.1).
    fn enter(&mut self, descriptor: &Descriptor) -> Option<()> {
        let whole = descriptor.len().is_multiple_of(DESCRIPTOR);
        let size = u16::try_from(descriptor.len() / DESCRIPTOR).ok();
        let size = size.filter(|_| whole && !self.indirect)?;
        *self = Self {
            bytes: self.bytes,
            indirect: true,
            ..Self::new(self.ram, descriptor.addr().0, size, 0)
        };
        Some(())
    }
}
