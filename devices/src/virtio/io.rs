//! A running device's view of its queues and of guest RAM.
//!
//! The rules of the split queue are kept in [`ActiveQueue`] once for all devices. A chain is checked as a
//! whole when it is popped: it ends, it has a bounded number of descriptors, and no more chains are in
//! flight than the queue has room for. Addresses are checked at each access.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::GuestRam;
use super::active::ActiveQueue;
use super::device::{ChainFault, DeviceError, Source};
use super::notifier::Notifier;

/// Most descriptors of a chain, where the queue itself is smaller; indirect tables may be longer
/// than the queue in practice. The same as the host's limit on vectored I/O.
pub const MAX_SEGMENTS: usize = 1024;

/// One buffer of a chain: an address chosen by the guest and a length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address, unchecked.
    pub addr: GuestAddress,
    /// Bytes, unchecked.
    pub len: u32,
}

/// A descriptor chain taken from a queue, to be given back by [`Io::complete`] or [`Io::unpop`].
#[derive(Debug)]
#[must_use = "a chain that is dropped is lost to the driver"]
pub struct Chain {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) segments: Vec<Segment>,
    pub(super) readable: usize,
}

impl Chain {
    #[cfg(test)]
    pub(super) fn without_buffers(head: u16) -> Self {
        Self {
            queue: 0,
            head,
            segments: Vec::new(),
            readable: 0,
        }
    }

    /// Index of the queue it came from.
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// Buffers the driver filled.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// Buffers the device fills.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// The error for a chain that has not the buffers it should have.
    pub fn layout_error(&self) -> DeviceError {
        DeviceError::Chain {
            queue: self.queue,
            head: self.head,
            fault: ChainFault::Layout,
        }
    }
}

/// Bytes in `segments`.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// Calls `f` on the slices of guest RAM behind `len` bytes of `segments` from `offset` on. Says how
/// many bytes that were: fewer than `len` where the segments end.
pub fn for_slices<'m>(
    ram: &'m GuestRam,
    segments: &[Segment],
    mut offset: u64,
    mut len: u64,
    mut f: impl FnMut(VolatileSlice<'m, BS<'m, ()>>) -> Result<(), DeviceError>,
) -> Result<u64, DeviceError> {
    let mut done = 0;
    for segment in segments {
        let size = u64::from(segment.len);
        if offset >= size {
            offset -= size;
            continue;
        }
        let count = (size - offset).min(len);
        if count == 0 {
            break;
        }
        let error = || DeviceError::memory(segment.addr, size);
        let addr = segment.addr.0.checked_add(offset).ok_or_else(error)?;
        let (addr, len_here) = (GuestAddress(addr), count as usize);
        // All but few buffers lie in one piece of RAM.
        if let Ok(slice) = GuestMemoryBackend::get_slice(ram, addr, len_here) {
            f(slice)?;
        } else {
            for slice in GuestMemoryBackend::get_slices(ram, addr, len_here) {
                f(slice.map_err(|_| error())?)?;
            }
        }
        (offset, len, done) = (0, len - count, done + count);
    }
    Ok(done)
}

/// Reads from `segments` at `offset` into `data`; says how many bytes there were.
pub fn read_at(
    ram: &GuestRam,
    segments: &[Segment],
    offset: u64,
    data: &mut [u8],
) -> Result<usize, DeviceError> {
    let mut rest = &mut *data;
    let len = rest.len() as u64;
    let done = for_slices(ram, segments, offset, len, |slice| {
        let n = slice.copy_to(rest);
        rest = std::mem::take(&mut rest).get_mut(n..).unwrap_or_default();
        Ok(())
    })?;
    Ok(done as usize)
}

/// Writes `data` to `segments` at `offset`; says how many bytes had room.
pub fn write_at(
    ram: &GuestRam,
    segments: &[Segment],
    offset: u64,
    data: &[u8],
) -> Result<usize, DeviceError> {
    let mut rest = data;
    let done = for_slices(ram, segments, offset, data.len() as u64, |slice| {
        slice.copy_from(rest);
        rest = rest.get(slice.len()..).unwrap_or_default();
        Ok(())
    })?;
    Ok(done as usize)
}

/// What a device wants to wait for otherwise than before.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// A source, by its token, or no more.
    Arm(u32, bool),
    /// A new one.
    Watch(Source),
    /// Another descriptor for the source of that token.
    WatchInstead(Source),
    /// No kicks of this queue any more.
    Lent(usize),
}

/// A queue as the host's kernel takes it over: [`Io::lend`].
#[derive(Debug)]
pub(super) struct Lent<'a> {
    /// Size in descriptors.
    pub size: u16,
    /// Guest addresses of the descriptor table, the available ring and the used ring.
    pub rings: [u64; 3],
    /// Index of the next chain to take from the available ring.
    pub next_avail: u16,
    /// The driver's kicks.
    pub kick: &'a EventFd,
}

/// What a running device may do: take chains, give them back used, and look at guest RAM.
pub struct Io<'a> {
    pub(super) ram: &'a Arc<GuestRam>,
    pub(super) features: u64,
    pub(super) queues: &'a mut [Option<ActiveQueue>],
    pub(super) config_changed: &'a mut bool,
    pub(super) changes: &'a mut Vec<Change>,
    pub(super) kicks: &'a [EventFd],
    pub(super) notifier: &'a Notifier,
}

impl<'a> Io<'a> {
    /// Guest RAM.
    pub fn ram(&self) -> &'a GuestRam {
        self.ram
    }

    /// Guest RAM, to be kept as long as the host works on it.
    pub fn share_ram(&self) -> Arc<GuestRam> {
        Arc::clone(self.ram)
    }

    /// Whether feature bit `bit` was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 != 0
    }

    /// Whether the driver set up queue `index`.
    pub fn ready(&self, index: usize) -> bool {
        self.queues.get(index).is_some_and(Option::is_some)
    }

    fn queue(&mut self, index: usize) -> Option<&mut ActiveQueue> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// Takes the next available chain of queue `index`; `None` where there is none for now.
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain>, DeviceError> {
        let ram = self.ram;
        match self.queue(index) {
            Some(queue) => queue.pop(index, ram),
            None => Ok(None),
        }
    }

    /// Chains of queue `index` that are still to be popped, of those that were there when the driver's ring
    /// was last looked at.
    pub fn remaining(&self, index: usize) -> u16 {
        let queue = self.queues.get(index).and_then(Option::as_ref);
        queue.map_or(0, ActiveQueue::remaining)
    }

    /// Puts back the chain that was popped last, unused: the next [`pop`](Self::pop) gives it
    /// again.
    pub fn unpop(&mut self, chain: Chain) {
        if let Some(queue) = self.queue(chain.queue) {
            queue.recycle(chain);
            queue.queue.go_to_previous_position();
        }
    }

    /// Gives a chain back to the driver with `len` bytes written to it.
    pub fn complete(&mut self, chain: Chain, len: u32) -> Result<(), DeviceError> {
        let (ram, index) = (self.ram(), chain.queue);
        let Some(queue) = self.queue(index) else {
            return Ok(());
        };
        let head = queue.recycle(chain);
        queue.added = true;
        queue
            .queue
            .add_used(ram, head, len)
            .map_err(|source| DeviceError::Queue {
                queue: index,
                source,
            })
    }

    /// Has the device look at queue `index` again when others have had their turn.
    pub fn later(&mut self, index: usize) {
        if let Some(queue) = self.queue(index) {
            queue.starved = true;
        }
    }

    /// The device is going to look at queue `index` until there is no more: the driver need not notify
    /// meanwhile.
    pub(super) fn looking(&mut self, index: usize) -> Result<(), DeviceError> {
        let ram = self.ram();
        let suppressed = self.queue(index).map(|queue| queue.hush(ram));
        let suppressed = suppressed.unwrap_or(Ok(()));
        suppressed.map_err(|source| DeviceError::Queue {
            queue: index,
            source,
        })
    }

    /// The device looks at queue `index` again soon, whatever comes: the driver need not notify until
    /// then.
    pub(super) fn looks_again(&mut self, index: usize) {
        if let Some(queue) = self.queue(index) {
            queue.quiet = true;
        }
    }

    /// Gives chains of queue `index` back with the bytes written to each. The driver sees all of
    /// them or none.
    pub fn complete_together(
        &mut self,
        index: usize,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), DeviceError> {
        let ram = self.ram();
        let Some(queue) = self.queue(index) else {
            return Ok(());
        };
        let added = queue.add_together(ram, chains);
        added.map_err(|source| DeviceError::Queue {
            queue: index,
            source,
        })
    }

    /// Chains that queue `index` has room for; none where the driver did not set it up.
    pub fn queue_size(&self, index: usize) -> u16 {
        let queue = self.queues.get(index).and_then(Option::as_ref);
        queue.map_or(0, |queue| queue.queue.size())
    }

    /// Leaves queue `index` to the host's kernel until [`take_back`](Self::take_back): no kick comes
    /// and no chain any more. `None` where the driver did not set it up.
    pub(super) fn lend(&mut self, index: usize) -> Option<Lent<'a>> {
        let kick = self.kicks.get(index)?;
        let active = self.queue(index)?;
        active.lent = true;
        let queue = &active.queue;
        let lent = Lent {
            size: queue.size(),
            rings: [queue.desc_table(), queue.avail_ring(), queue.used_ring()],
            next_avail: queue.next_avail(),
            kick,
        };
        self.changes.push(Change::Lent(index));
        Some(lent)
    }

    /// Has queue `index` back from the host's kernel, which would take the chain at `next_avail` next,
    /// and whose used ring says where it is.
    pub(super) fn take_back(&mut self, index: usize, next_avail: u16) -> Result<(), DeviceError> {
        let ram = self.ram();
        let Some(active) = self.queue(index) else {
            return Ok(());
        };
        let used = active.queue.used_idx(ram, Ordering::Acquire);
        let used = used.map_err(|source| DeviceError::Queue {
            queue: index,
            source,
        })?;
        active.go_to(next_avail);
        active.queue.set_next_used(used.0);
        active.told = used.0;
        active.lent = false;
        Ok(())
    }

    /// Has the host's kernel interrupt for queue `index` at events of `event`:
    /// [`VirtioInterrupt::direct`](super::notifier::VirtioInterrupt::direct).
    pub(super) fn direct(&self, index: usize, event: Option<&EventFd>) {
        self.notifier.direct(index as u16, event);
    }

    /// Interrupts the driver for queue `index` after this turn.
    pub(super) fn interrupt(&mut self, index: usize) {
        if let Some(queue) = self.queue(index) {
            queue.interrupt = true;
        }
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&mut self) {
        *self.config_changed = true;
    }

    /// Waits for source `token` from now on, or no more.
    pub fn arm(&mut self, token: u32, on: bool) {
        self.changes.push(Change::Arm(token, on));
    }

    /// Has a source be another descriptor than the one that it was, which is open until the call of the device
    /// is over.
    pub(super) fn watch_instead(&mut self, source: Source) {
        self.changes.push(Change::WatchInstead(source));
    }

    /// Has the VMM look at the device's handle.
    pub(super) fn announce(&self) {
        self.notifier.announce();
    }

    /// Waits for one source more, until the queues leave.
    pub fn watch(&mut self, source: Source) {
        self.changes.push(Change::Watch(source));
    }
}

/// Whether `len` bytes at `addr` are all in RAM.
pub(super) fn in_ram(ram: &GuestRam, addr: u64, len: u64) -> bool {
    usize::try_from(len).is_ok_and(|len| {
        GuestMemory::check_range(ram, GuestAddress(addr), len, Permissions::ReadWrite)
    })
}
