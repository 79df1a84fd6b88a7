//! Memory balloon (section 5.5): guest RAM given back to the host while the guest runs.
//!
//! The driver gives pages of its own accord (free page reporting), on demand (inflation to a
//! target) or as a hint (free page hinting, which the host starts). Pages go back before their
//! chain is completed, joined to ranges over all chains of a turn, and only as whole host pages
//! that are RAM. The device is owned by its I/O thread; [`BalloonHandle`] commands it.

mod counters;
mod huge;
mod space;
mod stats;

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::counters::Counters;
use self::huge::HugePages;
use self::space::Space;
pub use self::stats::Statistics;
use super::device::{ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice};
use super::discard::{Discarded, discard};
use super::io::{Chain, Io, in_ram, read_at, total};
use crate::counters::Values;

/// Bytes of a page as the balloon counts them, whatever pages host and guest have.
pub const PAGE: u64 = 4096;

/// Feature bits (section 5.5.3).
const F_MUST_TELL_HOST: u32 = 0;
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_FREE_PAGE_HINT: u32 = 3;
const F_PAGE_REPORTING: u32 = 5;

/// Commands to hint (section 5.5.6.4): the driver stops.
const CMD_STOP: u32 = 0;
/// The driver may use the pages that it hinted.
const CMD_DONE: u32 = 1;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINT: usize = 3;
const REPORTING: usize = 4;

/// Size of each queue.
const QUEUE_SIZE: u16 = 128;
/// Most pages of one chain to inflate or deflate; Linux gives 256, others up to 1024.
const MAX_PFNS: usize = 1024;
/// Ranges that are joined before they are discarded.
const MAX_RANGES: usize = 1 << 14;

/// Source: statistics are due.
const TIMER: u32 = 0;
/// Source: the handle changed something.
const WAKE: u32 = 1;

/// What a balloon is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// 4 KiB pages that it is to have at first.
    pub num_pages: u32,
    /// Most that it can have: those of guest RAM.
    pub max_pages: u32,
    /// Bytes of a host page behind guest RAM, a power of two, 4096 or more.
    pub host_page: u64,
    /// The driver takes pages back before the guest runs out of memory.
    pub deflate_on_oom: bool,
    /// The driver gives statistics, so often; zero: only when it starts.
    pub statistics: Option<Duration>,
    /// The driver reports free pages by itself.
    pub reporting: bool,
    /// The driver hints free pages when told to.
    pub hinting: bool,
}

/// A balloon could not be made, or does not take a command.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// Pages that no balloon works on.
    #[error("a balloon cannot work on host pages of {bytes} bytes")]
    HostPage {
        /// As given.
        bytes: u64,
    },
    /// More pages than there are.
    #[error("a balloon of {pages} pages does not fit into a guest with {max}")]
    Target {
        /// As asked.
        pages: u32,
        /// Pages of the guest.
        max: u32,
    },
    /// A command for a feature that was not configured.
    #[error("the balloon has no {what}: it has to be configured before the guest starts")]
    Absent {
        /// The feature.
        what: &'static str,
    },
    /// The host failed.
    #[error("cannot {what} for a balloon")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is saved of a balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// 4 KiB pages wanted; `None`: as configured.
    pub num_pages: Option<u32>,
    /// 4 KiB pages that the driver says it gave.
    pub actual: u32,
    /// The host's command to hint.
    pub host_cmd: u32,
    /// The command that the driver works on.
    pub guest_cmd: u32,
    /// Whether the end of the driver's hints ends the command.
    pub acknowledge: bool,
    /// Highest command that was given.
    pub last_cmd: u32,
}

/// How large a balloon is, and what it gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// 4 KiB pages wanted.
    pub target_pages: u32,
    /// 4 KiB pages that the driver says are in the balloon.
    pub actual_pages: u32,
    /// Bytes given back to the host, by all ways, as often as they were.
    pub discarded: u64,
    /// Bytes that the driver gave and that are not RAM.
    pub outside: u64,
    /// Times that the host did not take pages back.
    pub refused: u32,
}

/// How far a round of hints is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hinting {
    /// The host's command: 0 stop, 1 done, else the number of a round.
    pub host_cmd: u32,
    /// The command that the driver works on: 0 if it is at rest, else the number of a round.
    pub guest_cmd: u32,
}

/// The balloon.
pub struct Balloon {
    options: BalloonOptions,
    space: Arc<Space>,
    discarded: Arc<Discarded>,
    counters: Arc<Counters>,
    huge: Option<HugePages>,
    /// The statistics buffer, to be given back when new ones are wanted.
    stats: Option<Chain>,
    ranges: Vec<Range<u64>>,
    timer: TimerFd,
    wake: Arc<EventFd>,
}

/// The side of a balloon that the VMM keeps.
#[derive(Clone, Debug)]
pub struct BalloonHandle {
    options: BalloonOptions,
    space: Arc<Space>,
    discarded: Arc<Discarded>,
    counters: Arc<Counters>,
    wake: Arc<EventFd>,
}

impl BalloonHandle {
    /// Wants the balloon to have `pages` pages of 4 KiB. The driver gets there when it can.
    pub fn set_target(&self, pages: u32) -> Result<(), BalloonError> {
        let max = self.options.max_pages;
        if pages > max {
            return Err(BalloonError::Target { pages, max });
        }
        self.space.change(|inner| inner.num_pages = pages);
        self.wake()
    }

    /// Size and counters.
    pub fn status(&self) -> BalloonStatus {
        let inner = self.space.get();
        BalloonStatus {
            target_pages: inner.num_pages,
            actual_pages: inner.actual,
            discarded: self.discarded.bytes(),
            outside: self.discarded.outside(),
            refused: self.discarded.refused(),
        }
    }

    /// What the device has done.
    pub fn counters(&self) -> Values {
        self.counters.values()
    }

    /// The last statistics; `None` before the driver gave any.
    pub fn statistics(&self) -> Result<Option<Statistics>, BalloonError> {
        self.want(self.options.statistics.is_some(), "statistics")?;
        Ok(self.space.get().statistics)
    }

    /// Asks the driver for statistics every `interval` from now on; zero: no more.
    pub fn set_interval(&self, interval: Duration) -> Result<(), BalloonError> {
        self.want(self.options.statistics.is_some(), "statistics")?;
        self.space.update(|inner| inner.interval = interval);
        self.wake()
    }

    /// Starts a round of hints. With `acknowledge`, the driver gets its pages back as soon as it has
    /// hinted all; else when [`stop_hinting`](Self::stop_hinting) is called.
    pub fn start_hinting(&self, acknowledge: bool) -> Result<(), BalloonError> {
        self.want(self.options.hinting, "free page hinting")?;
        self.space.change(|inner| {
            // 0 and 1 are no rounds.
            inner.last_cmd = inner.last_cmd.checked_add(1).unwrap_or(CMD_DONE + 1);
            inner.host_cmd = inner.last_cmd;
            inner.acknowledge = acknowledge;
        });
        self.wake()
    }

    /// Ends a round of hints: the driver gets its pages back.
    pub fn stop_hinting(&self) -> Result<(), BalloonError> {
        self.want(self.options.hinting, "free page hinting")?;
        self.space.change(|inner| inner.host_cmd = CMD_DONE);
        self.wake()
    }

    /// How far a round of hints is.
    pub fn hinting(&self) -> Result<Hinting, BalloonError> {
        self.want(self.options.hinting, "free page hinting")?;
        let inner = self.space.get();
        Ok(Hinting {
            host_cmd: inner.host_cmd,
            guest_cmd: inner.guest_cmd,
        })
    }

    fn want(&self, there: bool, what: &'static str) -> Result<(), BalloonError> {
        match there {
            true => Ok(()),
            false => Err(BalloonError::Absent { what }),
        }
    }

    fn wake(&self) -> Result<(), BalloonError> {
        self.wake.write(1).map_err(|source| BalloonError::Host {
            what: "wake the I/O thread",
            source,
        })
    }
}

impl Balloon {
    /// Makes the device and its handle.
    pub fn new(
        options: BalloonOptions,
        state: BalloonState,
    ) -> Result<(Self, BalloonHandle), BalloonError> {
        let bytes = options.host_page;
        if !bytes.is_power_of_two() || bytes < PAGE {
            return Err(BalloonError::HostPage { bytes });
        }
        let (pages, max) = (options.num_pages, options.max_pages);
        if pages > max {
            return Err(BalloonError::Target { pages, max });
        }
        let host = |what| move |source| BalloonError::Host { what, source };
        let timer = TimerFd::new().map_err(io::Error::from);
        let timer = timer.map_err(host("create a timer"))?;
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        let wake = Arc::new(wake);
        let interval = options.statistics.unwrap_or_default();
        let space = Arc::new(Space::new(state, pages, interval));
        let discarded = Arc::new(Discarded::default());
        let handle = BalloonHandle {
            options: options.clone(),
            space: Arc::clone(&space),
            discarded: Arc::clone(&discarded),
            counters: Arc::default(),
            wake: Arc::clone(&wake),
        };
        let balloon = Self {
            huge: (bytes > PAGE).then(|| HugePages::new(bytes)),
            options,
            space,
            discarded,
            counters: Arc::clone(&handle.counters),
            stats: None,
            ranges: Vec::new(),
            timer,
            wake,
        };
        Ok((balloon, handle))
    }

    /// What queue `index` is for, by the index that the specification gives it.
    ///
    /// Linux and QEMU number queues without gaps for features that are not negotiated, the
    /// specification with gaps. They differ in the highest queue that a driver sets up.
    fn role(index: usize, io: &Io<'_>) -> Option<usize> {
        let optional = [
            (F_STATS_VQ, STATS),
            (F_FREE_PAGE_HINT, HINT),
            (F_PAGE_REPORTING, REPORTING),
        ];
        let there = optional.into_iter().filter(|(bit, _)| io.has(*bit));
        let there: Vec<usize> = there.map(|(_, role)| role).collect();
        if index <= DEFLATE {
            return Some(index);
        }
        let dense = DEFLATE + there.len();
        let gaps = there
            .last()
            .is_some_and(|last| *last > dense && io.ready(*last));
        match gaps {
            true => there.contains(&index).then_some(index),
            false => there.get(index - STATS).copied(),
        }
    }

    /// The 4 KiB pages that a chain names (section 5.5.6.1), as addresses.
    fn pages(chain: &Chain, io: &Io<'_>) -> Result<Vec<u64>, DeviceError> {
        let len = usize::try_from(total(chain.readable())).unwrap_or(usize::MAX);
        if len > 4 * MAX_PFNS {
            return Err(chain.layout_error());
        }
        let mut bytes = vec![0; len];
        read_at(io.ram(), chain.readable(), 0, &mut bytes)?;
        let pfns = bytes.chunks_exact(4).filter_map(|pfn| pfn.try_into().ok());
        let pages = pfns.map(|pfn| u64::from(u32::from_le_bytes(pfn)) * PAGE);
        Ok(pages.collect())
    }

    fn inflate(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut chains = Vec::new();
        while let Some(chain) = io.pop(queue)? {
            self.counters.inflations.one();
            for page in Self::pages(&chain, io)? {
                self.ranges.push(page..page + PAGE);
                let huge = match &mut self.huge {
                    Some(huge) if io.has(F_MUST_TELL_HOST) && in_ram(io.ram(), page, PAGE) => {
                        huge.inflate(page)
                    }
                    _ => None,
                };
                self.ranges.extend(huge);
            }
            chains.push(chain);
            self.limit(&mut chains, io)?;
        }
        self.settle(&mut chains, io)
    }

    /// Pages that the driver takes back: they are the guest's as soon as it touches them.
    fn deflate(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            self.counters.deflations.one();
            if self.huge.is_some() {
                let pages = Self::pages(&chain, io)?;
                if let Some(huge) = &mut self.huge {
                    pages.into_iter().for_each(|page| huge.deflate(page));
                }
            }
            io.complete(chain, 0)?;
        }
        Ok(())
    }

    /// Free pages, which the driver keeps until the chain is completed (section 5.5.6.7).
    fn report(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut chains = Vec::new();
        while let Some(chain) = io.pop(queue)? {
            self.counters.reports.times.one();
            self.add(&chain);
            chains.push(chain);
            self.limit(&mut chains, io)?;
        }
        self.settle(&mut chains, io)
    }

    /// Commands and free pages (section 5.5.6.4).
    fn hint(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut chains = Vec::new();
        while let Some(chain) = io.pop(queue)? {
            let mut command = [0; 4];
            if read_at(io.ram(), chain.readable(), 0, &mut command)? == command.len() {
                // What was hinted before goes first: the driver may have it back afterwards.
                self.settle(&mut chains, io)?;
                self.command(u32::from_le_bytes(command), io);
            }
            let now = self.space.get();
            if now.guest_cmd == now.host_cmd && now.host_cmd > CMD_DONE {
                let pages = !chain.writable().is_empty();
                self.counters.hints.times.add(pages.into());
                self.add(&chain);
            }
            chains.push(chain);
            self.limit(&mut chains, io)?;
        }
        self.settle(&mut chains, io)
    }

    fn command(&self, command: u32, io: &mut Io<'_>) {
        let before = self.space.get();
        self.space.update(|inner| inner.guest_cmd = command);
        let current = before.guest_cmd == before.host_cmd && before.host_cmd > CMD_DONE;
        if command == CMD_STOP && current && before.acknowledge {
            self.space.change(|inner| {
                // Another round may have been started meanwhile.
                if inner.host_cmd == before.host_cmd {
                    inner.host_cmd = CMD_DONE;
                }
            });
            io.config_changed();
        }
    }

    /// Adds a chain's writable buffers to what is to be discarded.
    fn add(&mut self, chain: &Chain) {
        for segment in chain.writable() {
            let start = segment.addr.0;
            let end = start.saturating_add(segment.len.into());
            self.ranges.push(start..end);
        }
    }

    /// Keeps the number of ranges bounded.
    fn limit(&mut self, chains: &mut Vec<Chain>, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match self.ranges.len() >= MAX_RANGES {
            true => self.settle(chains, io),
            false => Ok(()),
        }
    }

    /// Discards what was gathered, and gives its chains back.
    fn settle(&mut self, chains: &mut Vec<Chain>, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let page = self.options.host_page;
        discard(io.ram(), &mut self.ranges, page, &self.discarded);
        for chain in chains.drain(..) {
            io.complete(chain, 0)?;
        }
        Ok(())
    }

    /// Statistics (section 5.5.6.3): the buffer is kept until new ones are wanted.
    fn statistics(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut bytes = [0; stats::ENTRY * stats::MAX_ENTRIES];
        while let Some(chain) = io.pop(queue)? {
            let len = read_at(io.ram(), chain.readable(), 0, &mut bytes)?;
            let all = Statistics::parse(bytes.get(..len).unwrap_or_default());
            self.space.update(|inner| inner.statistics = Some(all));
            self.counters.statistics.one();
            // A driver has one buffer; another one takes its place.
            if let Some(older) = self.stats.replace(chain) {
                io.complete(older, 0)?;
            }
        }
        self.set_timer()
    }

    /// Once, since the driver answers in its own time.
    fn set_timer(&mut self) -> Result<(), DeviceError> {
        let interval = self.space.get().interval;
        let result = match self.stats.is_some() && !interval.is_zero() {
            true => self.timer.reset(interval, None),
            false => self.timer.clear(),
        };
        result.map_err(|error| DeviceError::Host {
            what: "set a timer",
            source: error.into(),
        })
    }
}

impl VirtioDevice for Balloon {
    fn traits(&self) -> Traits {
        let BalloonOptions {
            host_page,
            deflate_on_oom,
            statistics,
            reporting,
            hinting,
            ..
        } = self.options;
        let bits = [
            // Only where pages in the balloon are counted.
            (host_page > PAGE, F_MUST_TELL_HOST),
            (statistics.is_some(), F_STATS_VQ),
            (deflate_on_oom, F_DEFLATE_ON_OOM),
            (hinting, F_FREE_PAGE_HINT),
            (reporting, F_PAGE_REPORTING),
        ];
        let queues = match (statistics.is_some(), hinting, reporting) {
            (_, _, true) => REPORTING + 1,
            (_, true, false) => HINT + 1,
            (true, false, false) => STATS + 1,
            (false, false, false) => DEFLATE + 1,
        };
        let bits = bits.into_iter().filter(|(there, _)| *there);
        Traits {
            id: VIRTIO_ID_BALLOON,
            features: bits.fold(0, |all, (_, bit)| all | 1 << bit),
            queues: vec![QUEUE_SIZE; queues],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn sources(&self) -> Vec<Source> {
        vec![
            Source::readable(TIMER, self.timer.as_raw_fd()),
            Source::readable(WAKE, self.wake.as_raw_fd()),
        ]
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match Self::role(queue, io) {
            Some(INFLATE) => self.inflate(queue, io),
            Some(DEFLATE) => self.deflate(queue, io),
            Some(STATS) => self.statistics(queue, io),
            Some(HINT) => self.counted(|c| &c.hints, |b| b.hint(queue, io)),
            Some(REPORTING) => self.counted(|c| &c.reports, |b| b.report(queue, io)),
            // A queue that the driver has no feature for.
            _ => Ok(()),
        }
    }

    fn on_source(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if token == TIMER {
            // Not read, which might wait if the timer was set anew meanwhile.
            self.timer.clear().map_err(|error| DeviceError::Host {
                what: "clear a timer",
                source: error.into(),
            })?;
            if let Some(chain) = self.stats.take() {
                io.complete(chain, 0)?;
            }
            return Ok(());
        }
        // Only an empty counter refuses, and then there is nothing to do.
        if self.wake.read().is_ok() {
            io.config_changed();
            self.set_timer()?;
        }
        Ok(())
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if let Some(chain) = self.stats.take() {
            io.unpop(chain);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.space.reset();
        self.stats = None;
        self.ranges.clear();
        if let Some(huge) = &mut self.huge {
            huge.clear();
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(self.space.state())
    }
}
