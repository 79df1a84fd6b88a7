//! Where a device lives: on an I/O thread while its driver runs it, in its backend otherwise.
//!
//! A [`Worker`] owns a device and its queues by value and is a subscriber of an [`IoLoop`], which
//! the root crate runs on a thread of its own. [`LoopBackend`] moves it there at `start` and gets
//! it back at `stop`: this hand-over is pause, reset and snapshot.
//!
//! Kicks are edge-triggered, so their eventfds are never read and a kick costs no system call
//! more. A guest that never stops feeding a queue gets one turn of queue-size chains at a time.

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
    SubscriberOps,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::active::{ActiveQueue, Next};
use super::core::QueueCfg;
use super::device::{DeviceError, DeviceState, Source, VirtioDevice};
use super::io::{Change, Io};
use super::notifier::Notifier;
use super::{GuestRam, Memory};
use crate::lock;

#[cfg(test)]
mod tests;

/// The event loop of an I/O thread. The root crate makes the thread, calls `run` on it in a loop,
/// and gives [`LoopBackend`]s its `remote_endpoint`.
pub type IoLoop = EventManager<Worker>;

/// Turns on a queue before others of the loop get theirs.
const MAX_TURNS: u32 = 4;
/// Marks the events of sources; those of kicks carry the queue's index.
const SOURCE: u32 = 1 << 31;

/// What a backend gets to run a device.
#[derive(Clone)]
pub struct Start {
    /// The queues that are ready, checked.
    pub queues: Vec<Option<QueueCfg>>,
    /// Negotiated features.
    pub features: u64,
    /// Guest RAM.
    pub memory: Memory,
    /// To the driver.
    pub notifier: Arc<Notifier>,
    /// From the driver, one per queue.
    pub kicks: Arc<[EventFd]>,
}

/// A device could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Another start came before a stop, or the device went down with its thread.
    #[error("the virtio device is not there to be started")]
    NoDevice,
    /// The I/O thread does not answer, or does not take the device.
    #[error("the I/O thread does not take the virtio device")]
    Loop(#[from] event_manager::Error),
    /// A queue that the core should have refused.
    #[error("virtio queue {queue} cannot be made")]
    Queue {
        /// Its index.
        queue: usize,
        /// Why.
        #[source]
        source: virtio_queue::Error,
    },
}

/// Where a device and its queues live while running. Never called from the I/O thread.
pub trait Backend: Send {
    /// Hands the queues over; the device runs.
    fn start(&mut self, start: Start) -> Result<(), BackendError>;
    /// Finishes all I/O in flight and gives the queues back, with their positions. Idempotent:
    /// nothing comes back where nothing runs.
    fn stop(&mut self) -> Vec<Option<QueueCfg>>;
    /// The driver reset the device, which is stopped.
    fn reset(&mut self);
    /// State of the device, which is stopped.
    fn save(&mut self) -> DeviceState;
    /// Gives the device, which is stopped, a state that it saved; false where that cannot be done in place.
    fn restore(&mut self, state: &DeviceState) -> bool {
        let _ = state;
        false
    }
    /// Many kicks came through the transport, where `kicks` as ioeventfds would be faster.
    fn many_kicks(&mut self, kicks: &[EventFd]) {
        let _ = kicks;
    }
}

/// The backend of a device that is gone.
pub struct Retired;

impl Backend for Retired {
    fn start(&mut self, _: Start) -> Result<(), BackendError> {
        Err(BackendError::NoDevice)
    }

    fn stop(&mut self) -> Vec<Option<QueueCfg>> {
        Vec::new()
    }

    fn reset(&mut self) {}

    fn save(&mut self) -> DeviceState {
        DeviceState::Reset
    }
}

/// A device with its queues, in the hands of one thread.
pub struct Worker {
    device: Box<dyn VirtioDevice>,
    start: Start,
    queues: Vec<Option<ActiveQueue>>,
    sources: Vec<Source>,
    failed: bool,
    refused: Option<event_manager::Error>,
    changes: Vec<Change>,
}

enum Turn {
    Queue(usize),
    Source(u32),
    Drain,
}

impl Worker {
    /// Fails with the device, which is not lost.
    fn new(
        device: Box<dyn VirtioDevice>,
        start: Start,
    ) -> Result<Self, (Box<dyn VirtioDevice>, BackendError)> {
        let event_idx = start.features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0;
        let mut queues = Vec::with_capacity(start.queues.len());
        for (index, cfg) in start.queues.iter().enumerate() {
            let queue = cfg.map(|cfg| Queue::try_from(cfg.to_queue_state(event_idx)));
            match queue.transpose() {
                Ok(queue) => queues.push(queue.map(ActiveQueue::new)),
                Err(source) => {
                    let queue = index;
                    return Err((device, BackendError::Queue { queue, source }));
                }
            }
        }
        Ok(Self {
            sources: device.sources(),
            device,
            start,
            queues,
            failed: false,
            refused: None,
            changes: Vec::new(),
        })
    }

    /// Ends all I/O and takes the worker apart.
    fn finish(mut self) -> (Box<dyn VirtioDevice>, Vec<Option<QueueCfg>>) {
        self.take_turn(Turn::Drain);
        let queues = self.start.queues.iter().zip(&self.queues);
        let queues = queues.map(|(cfg, queue)| {
            let (next_avail, next_used) = queue.as_ref()?.position();
            Some(QueueCfg {
                next_avail,
                next_used,
                ..(*cfg)?
            })
        });
        let queues = queues.collect();
        (self.device, queues)
    }

    /// Looks at all queues, since no kick may come for what is there already.
    fn kick_all(&mut self) {
        for index in 0..self.queues.len() {
            self.take_turn(Turn::Queue(index));
        }
    }

    fn take_turn(&mut self, turn: Turn) {
        if self.failed && !matches!(turn, Turn::Drain) {
            return;
        }
        let memory = self.start.memory.memory().into_inner();
        let mut config_changed = false;
        let result = self.work(turn, &memory, &mut config_changed);
        if config_changed {
            self.start.notifier.config_changed();
        }
        if let Err(error) = result {
            self.failed = true;
            self.start.notifier.fail(&error);
        }
    }

    fn work(
        &mut self,
        turn: Turn,
        ram: &Arc<GuestRam>,
        config_changed: &mut bool,
    ) -> Result<(), DeviceError> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if let Some(queue) = queue {
                queue.begin();
                if matches!(turn, Turn::Queue(kicked) if kicked == index) {
                    let error = |source| DeviceError::Queue {
                        queue: index,
                        source,
                    };
                    queue.suppress(ram).map_err(error)?;
                }
            }
        }
        let mut io = Io {
            ram,
            features: self.start.features,
            queues: &mut self.queues,
            config_changed,
            changes: &mut self.changes,
            kicks: &self.start.kicks,
            notifier: &self.start.notifier,
        };
        match turn {
            Turn::Queue(index) if io.ready(index) => self.device.on_queue(index, &mut io)?,
            Turn::Queue(_) => {}
            Turn::Source(token) => self.device.on_source(token, &mut io)?,
            Turn::Drain => {
                // Interrupts for what a failing device completed still go out below.
                let drained = self.device.drain(&mut io);
                self.settle(ram, config_changed, 0)?;
                return drained;
            }
        }
        self.settle(ram, config_changed, MAX_TURNS)
    }

    /// Interrupts for what was used, and goes on with queues that have got more meanwhile. Then once
    /// more without going on: work on one queue may have used chains of another.
    fn settle(
        &mut self,
        ram: &Arc<GuestRam>,
        config_changed: &mut bool,
        turns: u32,
    ) -> Result<(), DeviceError> {
        let mut worked = false;
        for index in 0..self.queues.len() {
            for left in (0..=turns).rev() {
                if !self.end_turn(index, ram, left > 0)? {
                    break;
                }
                worked = true;
                let mut io = Io {
                    ram,
                    features: self.start.features,
                    queues: &mut self.queues,
                    config_changed,
                    changes: &mut self.changes,
                    kicks: &self.start.kicks,
                    notifier: &self.start.notifier,
                };
                self.device.on_queue(index, &mut io)?;
            }
        }
        if worked {
            for index in 0..self.queues.len() {
                self.end_turn(index, ram, false)?;
            }
        }
        Ok(())
    }

    /// Ends the device's turn on a queue. Where more has come in it says so if the device may `go_on`
    /// at once, and kicks the queue itself otherwise.
    fn end_turn(
        &mut self,
        index: usize,
        ram: &Arc<GuestRam>,
        go_on: bool,
    ) -> Result<bool, DeviceError> {
        let Some(queue) = self.queues.get_mut(index).and_then(Option::as_mut) else {
            return Ok(false);
        };
        let error = |source| DeviceError::Queue {
            queue: index,
            source,
        };
        let (interrupt, next) = queue.end(ram).map_err(error)?;
        if interrupt {
            self.start.notifier.used(index as u16);
        }
        match next {
            Next::Wait => {}
            Next::Again if go_on => {
                queue.begin();
                queue.suppress(ram).map_err(error)?;
                return Ok(true);
            }
            Next::Again | Next::Later => {
                if let Some(kick) = self.start.kicks.get(index) {
                    // Only a counter at its maximum refuses: then the queue is kicked.
                    let _ = kick.write(1);
                }
            }
        }
        Ok(false)
    }

    fn events(source: &Source, on: bool) -> Events {
        let set = match (on, source.writable) {
            // Errors and hang-ups come whatever is asked for; so they come once only.
            (false, _) => EventSet::EDGE_TRIGGERED,
            (true, false) => EventSet::IN,
            (true, true) => EventSet::IN | EventSet::OUT,
        };
        Events::with_data_raw(source.fd, SOURCE | source.token, set)
    }

    fn register(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        for (index, kick) in self.start.kicks.iter().enumerate() {
            let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data(kick, index as u32, set))?;
        }
        for source in &self.sources {
            ops.add(Self::events(source, true))?;
        }
        Ok(())
    }

    fn watch(&mut self, source: Source, ops: &mut EventOps<'_>) {
        match ops.add(Self::events(&source, true)) {
            Ok(()) => self.sources.push(source),
            Err(error) => {
                self.failed = true;
                let source = io::Error::other(error.to_string());
                let what = "wait for a file descriptor";
                let error = DeviceError::Host { what, source };
                self.start.notifier.fail(&error);
            }
        }
    }

    fn apply_changes(&mut self, ops: &mut EventOps<'_>) {
        for change in std::mem::take(&mut self.changes) {
            match change {
                Change::Arm(token, on) => {
                    let source = self.sources.iter().find(|s| s.token == token);
                    // A registered file descriptor can only fail to change if the kernel is out of
                    // memory; the event then comes as before.
                    if let Some(Err(error)) = source.map(|s| ops.modify(Self::events(s, on))) {
                        log::warn!("cannot change what a virtio device waits for: {error}");
                    }
                }
                Change::Lent(queue) => {
                    let none = EventSet::EDGE_TRIGGERED;
                    let kick = self.start.kicks.get(queue);
                    let kick = kick.map(|kick| Events::with_data(kick, queue as u32, none));
                    // Kicks that still come wake this thread in vain.
                    if let Some(Err(error)) = kick.map(|kick| ops.modify(kick)) {
                        log::warn!("cannot leave kicks to the host's kernel: {error}");
                    }
                }
                Change::WatchInstead(source) => {
                    let before = self.sources.iter().position(|s| s.token == source.token);
                    if let Some(before) = before.map(|at| self.sources.swap_remove(at)) {
                        // It fails where the loop does not know it, and then there is nothing to undo.
                        let _ = ops.remove(Self::events(&before, false));
                    }
                    self.watch(source, ops);
                }
                Change::Watch(source) => self.watch(source, ops),
            }
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        match self.register(ops) {
            Ok(()) => {
                self.kick_all();
                self.apply_changes(ops);
            }
            Err(error) => self.refused = Some(error),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let data = events.data();
        self.take_turn(match data & SOURCE {
            0 => Turn::Queue(data as usize),
            _ => Turn::Source(data & !SOURCE),
        });
        self.apply_changes(ops);
        if self.failed {
            // Level-triggered sources that nobody reads would spin.
            for source in self.sources.drain(..) {
                let _ = ops.modify(Self::events(&source, false));
            }
        }
    }
}

/// Which loop a device runs on.
enum Host {
    /// One on another thread.
    Remote(RemoteEndpoint<Worker>),
    /// One that the caller runs.
    Inline(Arc<Mutex<IoLoop>>),
}

type LoopOps<'a> = dyn SubscriberOps<Subscriber = Worker> + 'a;

impl Host {
    fn call<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut LoopOps<'_>) -> Result<T, event_manager::Error> + Send + 'static,
    ) -> Result<T, event_manager::Error> {
        match self {
            Self::Remote(endpoint) => endpoint.call_blocking(|ops| f(ops)),
            Self::Inline(host) => f(&mut *lock(host)),
        }
    }
}

enum Place {
    Here(Box<dyn VirtioDevice>),
    There(SubscriberId),
    Lost,
}

/// A device, and the queues with it as they leave the loop.
type Finished = (Box<dyn VirtioDevice>, Vec<Option<QueueCfg>>);
/// The loop took the worker, or gave the device back with the reason.
type Added = Result<SubscriberId, (Box<dyn VirtioDevice>, event_manager::Error)>;

/// The backend of a device that runs on an [`IoLoop`].
pub struct LoopBackend {
    host: Host,
    place: Place,
}

impl LoopBackend {
    /// A backend for `device` on the loop behind `endpoint`, which runs on another thread.
    pub fn remote(device: Box<dyn VirtioDevice>, endpoint: RemoteEndpoint<Worker>) -> Self {
        Self::new(device, Host::Remote(endpoint))
    }

    /// A backend for `device` on a loop that the caller runs itself, for tests.
    pub fn inline(device: Box<dyn VirtioDevice>, host: Arc<Mutex<IoLoop>>) -> Self {
        Self::new(device, Host::Inline(host))
    }

    fn new(device: Box<dyn VirtioDevice>, host: Host) -> Self {
        Self {
            host,
            place: Place::Here(device),
        }
    }

    fn add(ops: &mut LoopOps<'_>, worker: Worker) -> Result<Added, event_manager::Error> {
        let id = ops.add_subscriber(worker);
        let Some(error) = ops.subscriber_mut(id)?.refused.take() else {
            return Ok(Ok(id));
        };
        Ok(Err((ops.remove_subscriber(id)?.finish().0, error)))
    }
}

impl Backend for LoopBackend {
    fn start(&mut self, start: Start) -> Result<(), BackendError> {
        let device = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Here(device) => device,
            place => {
                self.place = place;
                return Err(BackendError::NoDevice);
            }
        };
        let worker = match Worker::new(device, start) {
            Ok(worker) => worker,
            Err((device, error)) => {
                self.place = Place::Here(device);
                return Err(error);
            }
        };
        match self.host.call(move |ops| Self::add(ops, worker))? {
            Ok(id) => {
                self.place = Place::There(id);
                Ok(())
            }
            Err((device, error)) => {
                self.place = Place::Here(device);
                Err(error.into())
            }
        }
    }

    fn stop(&mut self) -> Vec<Option<QueueCfg>> {
        let Place::There(id) = self.place else {
            return Vec::new();
        };
        self.place = Place::Lost;
        let finished = self
            .host
            .call(move |ops| -> Result<Finished, _> { Ok(ops.remove_subscriber(id)?.finish()) });
        match finished {
            Ok((device, queues)) => {
                self.place = Place::Here(device);
                queues
            }
            // The thread is gone, and the device with it; starting again says so.
            Err(_) => Vec::new(),
        }
    }

    fn reset(&mut self) {
        if let Place::Here(device) = &mut self.place {
            device.reset();
        }
    }

    fn save(&mut self) -> DeviceState {
        match &self.place {
            Place::Here(device) => device.save(),
            Place::There(_) | Place::Lost => DeviceState::Reset,
        }
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        match &mut self.place {
            Place::Here(device) => device.restore(state),
            Place::There(_) | Place::Lost => false,
        }
    }
}
