//! Block device (section 5.2) over a raw image file or a host block device.
//!
//! The device is owned by its I/O thread. Requests are checked in `request`, carried out by
//! io_uring or by system calls that wait, and completed in any order. What was acknowledged to a
//! driver that flushes is on the disk; a driver that does not know flushes gets every write
//! synchronously (section 5.2.6.2). All requests under way are finished before queues leave.

mod counters;
mod disk;
mod exchange;
mod handle;
pub(super) mod lock;
mod options;
mod request;
mod space;
mod sync;
mod task;
mod uring;

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::counters::Counters;
pub use self::disk::{Cache, Disk, DiskError, DiskOptions, Format, SECTOR};
use self::exchange::Present;
pub use self::handle::BlockHandle;
pub use self::lock::Holder;
pub use self::options::{BlockError, BlockOptions, BlockState, EngineKind, MAX_QUEUES};
use self::request::{Geometry, ID_LEN, Request, Status};
use self::space::{Fixed, Space};
use self::task::{Op, Task};
use self::uring::{Finished, Ring, Rings};
use super::device::{ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice};
use super::io::{Chain, Io, total, write_at};
use super::limiter::Limiter;

/// The timer's source; those of rings have their queue's index.
const TIMER: u32 = 1 << 16;
/// The source that says that size or limits changed.
const WAKE: u32 = TIMER + 1;
/// Errors of the host's disk that are logged; a guest can repeat them at will.
const MAX_LOGGED: u32 = 16;
/// Transfers under way on a queue from which on the end of one comes soon enough to look for more.
const MANY_UNDER_WAY: usize = 8;
/// Bytes under way on a queue from which on no more requests are taken.
const MAX_UNDER_WAY: u64 = 64 << 20;

enum Engine {
    Sync,
    Uring(Rings),
}

/// How far a queue was emptied.
enum Taken {
    /// There was nothing.
    Nothing,
    /// As far as may be.
    All,
    /// Until so many were taken as are best given to the host at once.
    Batch,
    /// There may be more, when what was taken is done.
    Enough,
}

/// A request that waits for its tokens. It is the last popped of its queue.
struct Held {
    chain: Chain,
    request: Request,
    at: Instant,
}

/// The block device.
pub struct Block {
    disk: Arc<Disk>,
    present: Arc<Present>,
    space: Arc<Space>,
    engine: Engine,
    queue_size: u16,
    serial: [u8; ID_LEN],
    /// Set at first, or by the handle.
    limiter: Arc<OnceLock<Arc<Limiter>>>,
    held: Vec<Option<Held>>,
    /// Made when a request first has to wait for its tokens.
    timer: Option<TimerFd>,
    wake: Arc<EventFd>,
    new_limits: Arc<AtomicBool>,
    errors: u32,
    counters: Arc<Counters>,
    /// Room for what is given back together; empty between turns.
    used: Vec<(Chain, u32)>,
}

impl Block {
    /// Makes the device and its handle.
    pub fn new(
        disk: Disk,
        options: BlockOptions,
        state: BlockState,
    ) -> Result<(Self, BlockHandle), BlockError> {
        let BlockOptions {
            engine,
            queues,
            queue_size,
            serial,
            limiter,
        } = options;
        let sized = queue_size.is_power_of_two() && (2..=1 << 15).contains(&queue_size);
        if !(1..=MAX_QUEUES).contains(&queues) || !sized {
            let size = queue_size;
            return Err(BlockError::Queues { queues, size });
        }
        let host = |what| move |source| BlockError::Host { what, source };
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        let sectors = disk.sectors().map_err(host("find the size of the disk"))?;
        state.check(disk.path(), sectors, disk.read_only())?;
        let disk = Arc::new(disk);
        let engine = match engine {
            EngineKind::Sync => Engine::Sync,
            EngineKind::IoUring => {
                uring::available().map_err(BlockError::IoUring)?;
                Engine::Uring(Rings::new(queues, queue_size, false))
            }
            EngineKind::Auto => match uring::available() {
                Ok(()) => Engine::Uring(Rings::new(queues, queue_size, true)),
                Err(error) => {
                    log::info!("disk {:?} does without io_uring: {error}", disk.path());
                    Engine::Sync
                }
            },
        };
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let fixed = Fixed {
            seg_max: u32::from(queue_size).saturating_sub(2).max(1),
            logical: disk.logical_block_size(),
            physical: disk.physical_block_size(),
            queues,
            writable: !disk.read_only(),
        };
        let sectors = state.capacity.unwrap_or(sectors);
        let space = Arc::new(Space::new(fixed, sectors, state.writeback));
        let handle = BlockHandle {
            present: Arc::new(Present::new(Arc::clone(&disk))),
            space: Arc::clone(&space),
            limiter: Arc::new(limiter.map_or_else(OnceLock::new, OnceLock::from)),
            wake: Arc::new(wake),
            new_limits: Arc::default(),
            counters: Arc::default(),
        };
        // The disk may have another size than the saved driver knows.
        handle.resize().map_err(host("find the size of the disk"))?;
        let block = Self {
            disk,
            present: Arc::clone(&handle.present),
            space,
            engine,
            queue_size,
            serial: id,
            limiter: Arc::clone(&handle.limiter),
            held: (0..queues).map(|_| None).collect(),
            timer: None,
            wake: Arc::clone(&handle.wake),
            new_limits: Arc::clone(&handle.new_limits),
            errors: 0,
            counters: Arc::clone(&handle.counters),
            used: Vec::new(),
        };
        Ok((block, handle))
    }

    /// Whether requests go through io_uring.
    pub fn uses_io_uring(&self) -> bool {
        matches!(self.engine, Engine::Uring(_))
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: self.space.capacity(),
            block: self.disk.logical_block_size().into(),
            writable: !self.disk.read_only(),
        }
    }

    /// Takes requests from a queue until it is empty or has to wait for tokens, and gives them to
    /// the host as one batch. Says whether there were any.
    fn process(&mut self, queue: usize, io: &mut Io<'_>) -> Result<bool, DeviceError> {
        let (mut begun, mut any) = (0, false);
        loop {
            let taken = self.take(queue, &mut begun, io);
            self.collect(queue, io, Ring::turn)?;
            match taken? {
                taken @ (Taken::All | Taken::Nothing) => {
                    if self.ring(queue).map_or(0, Ring::transfers) >= MANY_UNDER_WAY {
                        io.looks_again(queue);
                    }
                    return Ok(any || matches!(taken, Taken::All));
                }
                Taken::Batch => any = true,
                Taken::Enough => {
                    self.counters.engine_throttled.one();
                    // Where something is under way, its end leads back here.
                    if self.ring(queue).is_none_or(|ring| ring.in_flight() == 0) {
                        io.later(queue);
                    }
                    return Ok(true);
                }
            }
        }
    }

    fn ring(&self, queue: usize) -> Option<&Ring> {
        match &self.engine {
            Engine::Uring(rings) => rings.get(queue),
            Engine::Sync => None,
        }
    }

    /// Not more than [`MAX_UNDER_WAY`] at a time, so that the device comes to rest soon when it must.
    fn take(
        &mut self,
        queue: usize,
        begun: &mut u64,
        io: &mut Io<'_>,
    ) -> Result<Taken, DeviceError> {
        let mut geometry = self.geometry();
        while self.take_image(io)? {
            geometry = self.geometry();
        }
        let any = (usize::MAX, u64::MAX);
        let (batch, bytes) = self.ring(queue).map_or(any, Ring::batch);
        let before = *begun;
        let now = Instant::now();
        for taken in 0..batch {
            if *begun - before >= bytes {
                break;
            }
            let under_way = self.ring(queue).map_or(0, Ring::bytes);
            if under_way.max(*begun) >= MAX_UNDER_WAY {
                return Ok(Taken::Enough);
            }
            let held = self.held.get_mut(queue).and_then(Option::take);
            let (chain, request) = match held {
                Some(held) if held.at > now => {
                    return self.hold(queue, held, io).map(|()| Taken::All);
                }
                Some(held) => (held.chain, held.request),
                None => {
                    let Some(chain) = io.pop(queue)? else {
                        return Ok(match taken {
                            0 => Taken::Nothing,
                            _ => Taken::All,
                        });
                    };
                    self.counters.popped(io.remaining(queue));
                    let request = Request::parse(io.ram(), &chain, geometry)?;
                    let limiter = self.limiter.get();
                    let at = limiter.and_then(|l| l.charge(now, request.bytes()));
                    if let Some(at) = at {
                        self.counters.throttled.one();
                        let held = Held { chain, request, at };
                        return self.hold(queue, held, io).map(|()| Taken::All);
                    }
                    (chain, request)
                }
            };
            *begun += request.bytes();
            self.begin((chain, request), now, io)?;
        }
        Ok(Taken::Batch)
    }

    /// Keeps a request until its time, for which the timer is set.
    fn hold(&mut self, queue: usize, held: Held, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if let Some(slot) = self.held.get_mut(queue) {
            *slot = Some(held);
        }
        let Some(at) = self.held.iter().flatten().map(|h| h.at).min() else {
            return Ok(());
        };
        // Zero would disarm it.
        let wait = at.saturating_duration_since(Instant::now());
        let wait = wait.max(std::time::Duration::from_nanos(1));
        let failed = |error: Errno| host_error("set a timer", error.into());
        let timer = match &mut self.timer {
            Some(timer) => timer,
            none => {
                let timer = none.insert(TimerFd::new().map_err(failed)?);
                io.watch(Source::readable(TIMER, timer.as_raw_fd()));
                timer
            }
        };
        timer.reset(wait, None).map_err(failed)
    }

    /// Starts a request, or answers it at once.
    fn begin(
        &mut self,
        (chain, request): (Chain, Request),
        now: Instant,
        io: &mut Io<'_>,
    ) -> Result<(), DeviceError> {
        let ram = io.share_ram();
        let mut task = match request {
            Request::Refused(status) => {
                self.counters.invalid.one();
                return answer(io, chain, status, 0);
            }
            Request::Id => {
                // The status comes last, whatever room there is.
                let room = total(chain.writable()) - 1;
                let id = self.serial.get(..room.min(ID_LEN as u64) as usize);
                let written = write_at(&ram, chain.writable(), 0, id.unwrap_or_default())?;
                return answer(io, chain, Status::Ok, written as u64);
            }
            Request::Flush if self.disk.cache() == Cache::Unsafe => {
                self.counters.flushes.one();
                return answer(io, chain, Status::Ok, 0);
            }
            Request::Flush => Task::control(chain, Op::Flush, ram),
            Request::Read { len: 0, .. } | Request::Write { len: 0, .. } => {
                return answer(io, chain, Status::Ok, 0);
            }
            Request::Read { offset, len } => {
                Task::transfer(chain, Op::Read, (offset, len), ram, now)?
            }
            Request::Write { offset, len } => {
                let sync = self.is_synchronous(io);
                Task::transfer(chain, Op::Write { sync }, (offset, len), ram, now)?
            }
            Request::Discard(ranges) | Request::Zero(ranges) if ranges.is_empty() => {
                return answer(io, chain, Status::Ok, 0);
            }
            Request::Discard(ranges) => Task::control(chain, Op::Discard(ranges), ram),
            Request::Zero(ranges) => {
                let sync = self.is_synchronous(io);
                Task::control(chain, Op::Zero { ranges, sync }, ram)
            }
        };
        let queue = task.chain.queue();
        match &mut self.engine {
            Engine::Sync => {}
            Engine::Uring(rings) => {
                let uring = |error| host_error("use io_uring", error);
                if let Some(fd) = rings.make(queue, &self.disk).map_err(uring)? {
                    io.watch(Source::readable(queue as u32, fd));
                }
                if let Some(ring) = rings.get_mut(queue) {
                    return ring.push(task).map_err(uring);
                }
            }
        }
        task.begun = Some(Instant::now());
        let (status, error) = sync::run(&self.disk, &mut task);
        let (chain, len) = self.end((task, status, error), Instant::now(), io)?;
        io.complete(chain, len)
    }

    /// Whether what is written must be on the disk when it is acknowledged.
    fn is_synchronous(&self, io: &Io<'_>) -> bool {
        let writeback = self.space.writeback.load(Ordering::SeqCst);
        writes_through(self.disk.cache(), |bit| io.has(bit), writeback)
    }

    fn ring_mut(&mut self, queue: usize) -> Option<&mut Ring> {
        match &mut self.engine {
            Engine::Uring(rings) => rings.get_mut(queue),
            Engine::Sync => None,
        }
    }

    /// Ends those tasks on a queue's ring that come to their end by `how`.
    fn collect(
        &mut self,
        queue: usize,
        io: &mut Io<'_>,
        how: impl FnOnce(&mut Ring) -> io::Result<()>,
    ) -> Result<(), DeviceError> {
        let Some(ring) = self.ring_mut(queue) else {
            return Ok(());
        };
        let mut result = how(ring).map_err(|error| host_error("use io_uring", error));
        let mut finished = std::mem::take(ring.finished());
        let mut used = std::mem::take(&mut self.used);
        let now = Instant::now();
        for finished in finished.drain(..) {
            // All of them, also behind one that fails.
            match self.end(finished, now, io) {
                Ok(chain) => used.push(chain),
                Err(error) => result = result.and(Err(error)),
            }
        }
        // The driver polls the index, or will look at it: it changes once.
        let completed = io.complete_together(queue, used.drain(..));
        // Their room serves again.
        self.used = used;
        if let Some(ring) = self.ring_mut(queue) {
            *ring.finished() = finished;
        }
        result.and(completed)
    }

    /// Says how a request ended; gives what the driver is to have back.
    fn end(
        &mut self,
        (task, status, error): Finished,
        now: Instant,
        io: &Io<'_>,
    ) -> Result<(Chain, u32), DeviceError> {
        if let Some(error) = error {
            self.errors = self.errors.saturating_add(1);
            if self.errors <= MAX_LOGGED {
                let path = self.disk.path();
                log::warn!("disk {path:?}: {error}; the guest gets an I/O error");
            }
        }
        self.counters.ended(&task, status, now);
        let produced = match status {
            Status::Ok => task.produced,
            Status::IoError | Status::Unsupported => 0,
        };
        let len = say(io, &task.chain, status, produced)?;
        Ok((task.chain, len))
    }
}

/// Whether writes must be on the disk before they are acknowledged (section 5.2.6.2).
fn writes_through(cache: Cache, has: impl Fn(u32) -> bool, writeback: bool) -> bool {
    let chooses = has(VIRTIO_BLK_F_CONFIG_WCE);
    let cached = has(VIRTIO_BLK_F_FLUSH) && (!chooses || writeback);
    cache != Cache::Unsafe && !cached
}

fn host_error(what: &'static str, source: io::Error) -> DeviceError {
    DeviceError::Host { what, source }
}

/// Writes the status, which is the chain's last byte; says how many bytes were written in all.
fn say(io: &Io<'_>, chain: &Chain, status: Status, produced: u64) -> Result<u32, DeviceError> {
    let at = total(chain.writable()) - 1;
    write_at(io.ram(), chain.writable(), at, &[status.byte()])?;
    // Section 2.7.8.2: so many bytes from the first on; with a gap before the status there are none.
    let len = if produced == at { at + 1 } else { 0 };
    Ok(u32::try_from(len).unwrap_or(u32::MAX))
}

/// Gives a chain back whose request is answered at once.
fn answer(io: &mut Io<'_>, chain: Chain, status: Status, produced: u64) -> Result<(), DeviceError> {
    let len = say(io, &chain, status, produced)?;
    io.complete(chain, len)
}

impl VirtioDevice for Block {
    fn traits(&self) -> Traits {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        features |= match self.disk.read_only() {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        if self.held.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        Traits {
            id: VIRTIO_ID_BLOCK,
            features,
            queues: vec![self.queue_size; self.held.len()],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn sources(&self) -> Vec<Source> {
        let timer = self
            .timer
            .as_ref()
            .map(|timer| Source::readable(TIMER, timer.as_raw_fd()));
        let wake = Source::readable(WAKE, self.wake.as_raw_fd());
        timer.into_iter().chain([wake]).collect()
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.counters.queue_events.one();
        if !self.process(queue, io)? {
            self.counters.no_buffer.one();
        }
        Ok(())
    }

    fn on_source(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match token {
            TIMER | WAKE => {
                if token == WAKE {
                    // Readable, or another event took it.
                    let _ = self.wake.read();
                    if self.new_limits.swap(false, Ordering::SeqCst) {
                        for held in self.held.iter_mut().flatten() {
                            held.at = Instant::now();
                        }
                    }
                    io.config_changed();
                } else {
                    self.counters.limiter_events.one();
                    let cleared = self.timer.as_mut().map_or(Ok(()), TimerFd::clear);
                    cleared.map_err(|error| host_error("clear a timer", error.into()))?;
                }
                for queue in 0..self.held.len() {
                    self.process(queue, io)?;
                }
                Ok(())
            }
            // Completions, and what came meanwhile: that saves kicks.
            queue => {
                io.looking(queue as usize)?;
                self.process(queue as usize, io).map(drop)
            }
        }
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut result = Ok(());
        for queue in 0..self.held.len() {
            self.let_go(queue, io);
            let drained = self.collect(queue, io, Ring::drain);
            result = result.and(drained);
            if let Engine::Uring(rings) = &mut self.engine {
                rings.remove(queue);
            }
        }
        result
    }

    fn reset(&mut self) {
        self.space.writeback.store(true, Ordering::SeqCst);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            writeback: self.space.writeback.load(Ordering::SeqCst),
            capacity: Some(self.space.capacity()),
            read_only: Some(self.disk.read_only()),
        })
    }

    /// The disk itself stays as it is.
    fn restore(&mut self, state: &DeviceState) -> bool {
        let state = match state {
            DeviceState::Block(state) => *state,
            DeviceState::Reset => BlockState::default(),
            _ => return false,
        };
        let (disk, sectors) = (&self.disk, self.space.capacity());
        let fits = state.check(disk.path(), sectors, disk.read_only());
        if fits.is_err() {
            return false;
        }
        self.space
            .writeback
            .store(state.writeback, Ordering::SeqCst);
        if state.capacity.is_some_and(|saved| saved != sectors) {
            // The driver of that time hears of the size. A counter at its maximum wakes as well.
            let _ = self.wake.write(1);
        }
        true
    }
}
