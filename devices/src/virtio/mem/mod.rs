//! Memory device (section 5.15): RAM that is plugged and unplugged while the guest runs.
//!
//! The device is owned by its I/O thread. A block that is plugged is in KVM's mapping and in the
//! devices' view of guest RAM before the driver hears of it; one that is unplugged is in neither,
//! and its memory is the host's again. What is unplugged reads as zeros and cannot be written.

mod blocks;
mod counters;
mod region;
mod space;

#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::blocks::Blocks;
use self::counters::Counters;
pub use self::region::{Pager, Region};
use self::space::Space;
use super::device::{ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice};
use super::io::{Chain, Io, read_at, total, write_at};
use super::{GuestRam, Memory};
use crate::counters::Values;

/// Feature bit: the driver does not touch what is unplugged (section 5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u32 = 1;

/// Requests (section 5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
/// Bytes of a request.
const REQUEST: usize = 24;

/// Answers.
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
/// States of blocks.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;
/// Bytes of an answer.
const ANSWER: usize = 10;

/// Size of the one queue.
const QUEUE_SIZE: u16 = 128;
/// Most pieces of plugged memory. Each takes mappings of the process, of which it has some 65,000.
const MAX_RUNS: usize = 2048;
/// Source: the handle changed something.
const WAKE: u32 = 0;
/// Failures of the host that are logged; a guest can repeat them at will.
const MAX_LOGGED: u32 = 8;

/// What a memory device is.
#[derive(Clone, Debug)]
pub struct MemOptions {
    /// Its memory.
    pub region: Arc<Region>,
    /// Guest physical address, a multiple of the block.
    pub address: u64,
    /// Bytes of a block, a power of two, 2 MiB or more.
    pub block: u64,
    /// Bytes that the driver is to plug at first.
    pub requested: u64,
    /// Guest RAM, into which blocks are plugged for the other devices; `None` where there are none.
    pub memory: Option<Memory>,
}

/// A memory device could not be made, or does not take a command.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Blocks that cannot be.
    #[error(
        "{len} bytes at {address:#x} are not blocks of {block} bytes, which are a power of two from \
         2 MiB on"
    )]
    Layout {
        /// Bytes.
        len: u64,
        /// Guest physical address.
        address: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// A size that cannot be.
    #[error("{requested} bytes cannot be plugged: want a multiple of {block} up to {len}")]
    Requested {
        /// As asked.
        requested: u64,
        /// Bytes of a block.
        block: u64,
        /// Bytes there are.
        len: u64,
    },
    /// A saved state of another device.
    #[error("the saved state has blocks plugged that the memory device does not have")]
    State,
    /// Not where or as large as the saved driver knows it.
    #[error("the memory device is {now}, and was {saved} when the machine was saved")]
    Moved {
        /// In the saved state.
        saved: MemLayout,
        /// As it is.
        now: MemLayout,
    },
    /// The host failed.
    #[error("cannot {what} for a memory device")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> MemError {
    move |source| MemError::Host { what, source }
}

/// What is saved of a memory device; the content is saved with RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// Bytes wanted; `None`: as configured.
    pub requested: Option<u64>,
    /// Plugged blocks: first and number, in order.
    pub plugged: Vec<(u64, u64)>,
    /// What the driver knows; `None` before there was a driver.
    pub layout: Option<MemLayout>,
}

/// Where a memory device's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemLayout {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of a block.
    pub block: u64,
}

impl std::fmt::Display for MemLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            address,
            len,
            block,
        } = self;
        write!(f, "{len} bytes at {address:#x} in blocks of {block}")
    }
}

/// How much is plugged, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemStatus {
    /// Most that can be.
    pub total: u64,
    /// What the host wants.
    pub requested: u64,
    /// What is.
    pub plugged: u64,
    /// Bytes of a block.
    pub block: u64,
}

/// The memory device.
#[derive(Debug)]
pub struct Mem {
    region: Arc<Region>,
    space: Arc<Space>,
    memory: Option<Memory>,
    blocks: Blocks,
    /// What the devices' view has of it, by guest address.
    views: BTreeMap<u64, Arc<GuestRegionMmap>>,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
    failures: u32,
}

/// The side of a memory device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct MemHandle {
    space: Arc<Space>,
    counters: Arc<Counters>,
    wake: Arc<EventFd>,
}

impl MemHandle {
    /// Wants the driver to have `bytes` plugged, a multiple of the block. It gets there when it can,
    /// which for less than now may be never.
    pub fn set_requested(&self, bytes: u64) -> Result<(), MemError> {
        check_requested(bytes, self.space.block, self.space.len)?;
        self.space.change(|inner| inner.requested = bytes);
        self.wake.write(1).map_err(host("wake the I/O thread"))
    }

    /// What the device has done.
    pub fn counters(&self) -> Values {
        self.counters.values()
    }

    /// How much is plugged.
    pub fn status(&self) -> MemStatus {
        let inner = self.space.get();
        MemStatus {
            total: self.space.len,
            requested: inner.requested,
            plugged: inner.plugged,
            block: self.space.block,
        }
    }
}

fn check_requested(requested: u64, block: u64, len: u64) -> Result<(), MemError> {
    match requested <= len && requested.is_multiple_of(block) {
        true => Ok(()),
        false => Err(MemError::Requested {
            requested,
            block,
            len,
        }),
    }
}

impl Mem {
    /// Makes the device and its handle. Blocks that were plugged when it was saved are plugged.
    pub fn new(options: MemOptions, state: &MemState) -> Result<(Self, MemHandle), MemError> {
        let MemOptions {
            region,
            address,
            block,
            requested,
            memory,
        } = options;
        let len = region.len();
        let aligned = block >= 2 << 20
            && block.is_power_of_two()
            && len.is_multiple_of(block)
            && address.is_multiple_of(block)
            && address.checked_add(len).is_some();
        if !aligned {
            return Err(MemError::Layout {
                len,
                address,
                block,
            });
        }
        let now = MemLayout {
            address,
            len,
            block,
        };
        if let Some(saved) = state.layout.filter(|saved| *saved != now) {
            return Err(MemError::Moved { saved, now });
        }
        let requested = state.requested.unwrap_or(requested);
        check_requested(requested, block, len)?;
        let mut blocks = Blocks::new(len / block);
        for (start, count) in &state.plugged {
            let end = start.checked_add(*count).filter(|end| *end <= blocks.len());
            let range = *start..end.ok_or(MemError::State)?;
            if range.is_empty() || blocks.count(range.clone()) != 0 {
                return Err(MemError::State);
            }
            let bytes = range.start * block..range.end * block;
            region.plug_saved(bytes).map_err(host("map saved blocks"))?;
            blocks.set(range, true);
        }
        let plugged = blocks.plugged() * block;
        let space = Arc::new(Space::new([block, address, len], plugged, requested));
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        let handle = MemHandle {
            space: Arc::clone(&space),
            counters: Arc::default(),
            wake: Arc::new(wake),
        };
        let mut mem = Self {
            region,
            space,
            memory,
            blocks,
            views: BTreeMap::new(),
            wake: Arc::clone(&handle.wake),
            counters: Arc::clone(&handle.counters),
            failures: 0,
        };
        mem.show().map_err(host("show saved blocks to devices"))?;
        Ok((mem, handle))
    }

    /// Blocks as bytes of the region.
    fn bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        let block = self.space.block;
        blocks.start * block..blocks.end * block
    }

    /// The blocks that a request names, if there are such.
    fn range(&self, addr: u64, count: u16) -> Option<Range<u64>> {
        let offset = addr.checked_sub(self.space.address)?;
        let block = self.space.block;
        let start = offset / block;
        let end = start.checked_add(count.into())?;
        let good = offset.is_multiple_of(block) && count > 0 && end <= self.blocks.len();
        good.then_some(start..end)
    }

    fn plug(&mut self, blocks: Range<u64>) -> u16 {
        if self.blocks.count(blocks.clone()) != 0 {
            return ERROR;
        }
        let count = blocks.end - blocks.start;
        let wanted = (self.blocks.plugged() + count) * self.space.block;
        if wanted > self.space.get().requested {
            return NACK;
        }
        let bytes = self.bytes(&blocks);
        if let Err(error) = self.region.plug(bytes.clone()) {
            return self.busy("plug memory", &error);
        }
        self.blocks.set(blocks.clone(), true);
        if let Err(error) = self.show() {
            self.blocks.set(blocks, false);
            if let Err(error) = self.region.unplug(bytes) {
                self.busy("take memory back", &error);
            }
            return self.busy("show plugged memory to devices", &error);
        }
        self.space.change(|inner| inner.plugged = wanted);
        ACK
    }

    fn unplug(&mut self, blocks: Range<u64>) -> u16 {
        if self.blocks.count(blocks.clone()) != blocks.end - blocks.start {
            return ERROR;
        }
        // Out of the devices' sight first.
        self.blocks.set(blocks.clone(), false);
        let bytes = self.bytes(&blocks);
        let hidden = self.show();
        if let Err(error) = hidden.and_then(|()| self.region.unplug(bytes)) {
            self.blocks.set(blocks, true);
            if let Err(error) = self.show() {
                self.busy("show memory to devices again", &error);
            }
            return self.busy("unplug memory", &error);
        }
        let plugged = self.blocks.plugged() * self.space.block;
        self.space.change(|inner| inner.plugged = plugged);
        ACK
    }

    fn state(&self, blocks: Range<u64>) -> u16 {
        match self.blocks.count(blocks.clone()) {
            0 => UNPLUGGED,
            count if count == blocks.end - blocks.start => PLUGGED,
            _ => MIXED,
        }
    }

    /// The host cannot now; the driver tries again.
    fn busy(&mut self, what: &str, error: &io::Error) -> u16 {
        self.failures = self.failures.saturating_add(1);
        if self.failures <= MAX_LOGGED {
            log::warn!("the host cannot {what}: {error}");
        }
        BUSY
    }

    /// Makes the devices' view of guest RAM have what is plugged, and nothing else of the region.
    fn show(&mut self) -> io::Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let guard = memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ram: GuestRam = GuestRam::clone(&memory.memory());
        let mut wanted = BTreeMap::new();
        let runs = self.blocks.runs();
        if runs.len() > MAX_RUNS {
            return Err(io::Error::other("there would be too many pieces"));
        }
        for run in runs {
            let bytes = self.bytes(&run);
            wanted.insert(self.space.address + bytes.start, bytes);
        }
        let mut views = self.views.clone();
        views.retain(|address, view| {
            let same = |bytes: &Range<u64>| bytes.end - bytes.start == view.len();
            wanted.get(address).is_some_and(same)
        });
        for (address, view) in &self.views {
            if !views.contains_key(address) {
                let gone = ram.remove_region(GuestAddress(*address), view.len());
                ram = gone.map_err(io::Error::other)?.0;
            }
        }
        for (address, bytes) in wanted {
            if let Entry::Vacant(place) = views.entry(address) {
                let view = Arc::new(self.region.view(bytes, address)?);
                let more = ram.insert_region(Arc::clone(&view));
                ram = more.map_err(io::Error::other)?;
                place.insert(view);
            }
        }
        guard.replace(ram);
        self.views = views;
        Ok(())
    }

    /// Carries out one request; answer, and state where that was asked for.
    fn request(&mut self, bytes: [u8; REQUEST]) -> (u16, u16) {
        let [
            k0,
            k1,
            _,
            _,
            _,
            _,
            _,
            _,
            addr @ ..,
            n0,
            n1,
            _,
            _,
            _,
            _,
            _,
            _,
        ] = bytes;
        let addr = u64::from_le_bytes(addr);
        let blocks = self.range(addr, u16::from_le_bytes([n0, n1]));
        match (u16::from_le_bytes([k0, k1]), blocks) {
            (PLUG, Some(blocks)) => (self.plug(blocks), 0),
            (UNPLUG, Some(blocks)) => (self.unplug(blocks), 0),
            (STATE, Some(blocks)) => (ACK, self.state(blocks)),
            (UNPLUG_ALL, _) => {
                let runs = self.blocks.runs();
                let mut answers = runs.into_iter().map(|run| self.unplug(run));
                (answers.find(|answer| *answer != ACK).unwrap_or(ACK), 0)
            }
            _ => (ERROR, 0),
        }
    }
}

impl VirtioDevice for Mem {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_MEM,
            features: 1 << F_UNPLUGGED_INACCESSIBLE,
            queues: vec![QUEUE_SIZE],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(WAKE, self.wake.as_raw_fd())]
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.counters.queue_events.one();
        while let Some(chain) = io.pop(queue)? {
            let mut request = [0; REQUEST];
            let got = read_at(io.ram(), chain.readable(), 0, &mut request)?;
            if got < REQUEST || total(chain.writable()) < ANSWER as u64 {
                return Err(chain.layout_error());
            }
            let begin = Instant::now();
            let plugged = self.blocks.plugged();
            let (answer, state) = self.request(request);
            let bytes = plugged.abs_diff(self.blocks.plugged()) * self.space.block;
            let [low, high, ..] = request;
            let kind = u16::from_le_bytes([low, high]);
            self.counters.answered(kind, answer, bytes, begin.elapsed());
            complete(chain, answer, state, io)?;
        }
        Ok(())
    }

    fn on_source(&mut self, _: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        // Only an empty counter refuses, and then there is nothing to tell.
        if self.wake.read().is_ok() {
            io.config_changed();
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        let runs = self.blocks.runs().into_iter();
        DeviceState::Mem(MemState {
            requested: Some(self.space.get().requested),
            plugged: runs.map(|run| (run.start, run.end - run.start)).collect(),
            layout: Some(MemLayout {
                address: self.space.address,
                len: self.space.len,
                block: self.space.block,
            }),
        })
    }
}

fn complete(chain: Chain, answer: u16, state: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
    let mut bytes = [0; ANSWER];
    for (to, from) in bytes.iter_mut().zip(answer.to_le_bytes()) {
        *to = from;
    }
    for (to, from) in bytes.iter_mut().skip(8).zip(state.to_le_bytes()) {
        *to = from;
    }
    let len = write_at(io.ram(), chain.writable(), 0, &bytes)?;
    io.complete(chain, len as u32)
}
