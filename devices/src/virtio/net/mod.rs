//! Network device (section 5.1): queues in pairs, in front of a tap or a stream socket.
//!
//! The device is owned by its I/O thread. Frames go between guest RAM and the host without a copy;
//! headers are copied and cleaned. What the driver has no buffers for stays with the host, which
//! is not waited for meanwhile. A limit delays what follows the frame that went over it. The host's
//! ends are in `backend`, `tap` and `stream`, receiving in `rx`, the driver's commands in `control`, a
//! service of the VMM's own in front of the host's end in `detour`, the host's kernel in place of this
//! thread in `vhost`.

mod backend;
mod control;
mod counters;
mod detour;
mod handle;
mod header;
mod renew;
mod rx;
mod space;
mod stream;
mod tap;
mod vhost;

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

pub use self::backend::NetBackend;
use self::backend::{Received, Sent};
use self::counters::Counters;
pub use self::counters::Traffic;
pub use self::detour::{Detour, HEAD as DETOUR_HEAD};
pub use self::handle::NetHandle;
use self::header::{HEADER, MAX_FRAME, MIN_FRAME, clean};
use self::renew::Slot;
pub use self::renew::{Keeper, Renewal};
use self::rx::{Rx, RxMode};
use self::space::Space;
pub use self::space::{Mac, random_mac};
pub use self::stream::Stream;
pub use self::tap::{Tap, TapError};
pub use self::vhost::{Vhost, VhostError};
use super::device::{ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice};
use super::io::{Io, total};
use super::limiter::Limiter;

/// Size of the queues for frames.
const QUEUE_SIZE: u16 = 256;
/// Size of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Most pairs of queues.
pub const MAX_PAIRS: u16 = 64;
/// Frames received in one turn.
const TURN: u32 = 256;

/// Sources other than those of the pairs.
const TIMER: u32 = 1 << 16;
const WAKE: u32 = TIMER + 1;
const WRITABLE: u32 = TIMER + 2;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetOptions {
    /// The host's end.
    pub backend: NetBackend,
    /// The guest's address; absent: the one that it had when it was saved, or else a random one.
    pub mac: Option<Mac>,
    /// Largest packet that the guest is told to send, in bytes; absent: it is not told.
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    pub rx_limiter: Option<Arc<Limiter>>,
    /// Limits of what it sends.
    pub tx_limiter: Option<Arc<Limiter>>,
    /// Takes some of the guest's frames.
    pub detour: Option<Box<dyn Detour>>,
    /// Has the host's kernel move the frames; with a tap, and with neither limits nor detour, which it
    /// does not know.
    pub vhost: Option<Vhost>,
    /// Gets another end of a stream socket where that goes.
    pub keeper: Option<Box<dyn Keeper>>,
}

/// A network device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A number of queues that no device has.
    #[error("{pairs} pairs of queues: want 1 to {MAX_PAIRS}")]
    Pairs {
        /// As wanted, or as saved.
        pairs: u16,
    },
    /// The host failed.
    #[error("cannot {what} for a network device")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is saved of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Pairs of queues that the driver uses.
    pub pairs: u16,
    /// The work on received frames that the driver takes, as feature bits; absent: all that was
    /// negotiated.
    #[serde(default)]
    pub offloads: Option<u64>,
    /// The address that the driver has; absent before there was a driver.
    #[serde(default)]
    pub mac: Option<Mac>,
}

impl Default for NetState {
    fn default() -> Self {
        Self {
            pairs: 1,
            offloads: None,
            mac: None,
        }
    }
}

/// The sending side of a pair of queues.
#[derive(Debug, Default)]
struct Tx {
    /// Nothing is sent before.
    until: Option<Instant>,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    backend: NetBackend,
    detour: Option<Box<dyn Detour>>,
    vhost: Option<Vhost>,
    keeper: Option<Box<dyn Keeper>>,
    slot: Slot,
    /// The end before this one.
    retired: Option<NetBackend>,
    space: Arc<Space>,
    counters: Arc<Counters>,
    limiters: [Option<Arc<Limiter>>; 2],
    rx: Vec<Rx>,
    tx: Vec<Tx>,
    /// Pairs that the driver uses, and those that the host does.
    active: u16,
    host_active: u16,
    /// As in [`NetState`].
    offloads: Option<u64>,
    /// The driver was saved and loaded since, and is to say where it is now.
    moved: bool,
    /// The backend fits the negotiated features.
    mode: Option<RxMode>,
    /// Sending waits for the host.
    blocked: bool,
    timer: TimerFd,
    timer_at: Option<Instant>,
    wake: Arc<EventFd>,
}

fn host_error(what: &'static str, source: io::Error) -> DeviceError {
    DeviceError::Host { what, source }
}

impl Net {
    /// Makes the device and its handle.
    pub fn new(options: NetOptions, state: NetState) -> Result<(Self, NetHandle), NetError> {
        let NetOptions {
            backend,
            mac,
            mtu,
            rx_limiter,
            tx_limiter,
            detour,
            vhost,
            keeper,
        } = options;
        let pairs = backend.pairs();
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(NetError::Pairs { pairs });
        }
        if !(1..=pairs).contains(&state.pairs) {
            return Err(NetError::Pairs { pairs: state.pairs });
        }
        let host = |what| move |source| NetError::Host { what, source };
        let mac = match mac.or(state.mac) {
            Some(mac) => mac,
            None => random_mac().map_err(host("get random numbers"))?,
        };
        let timer = TimerFd::new().map_err(io::Error::from);
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        let handle = NetHandle {
            counters: Arc::default(),
            limiters: [rx_limiter, tx_limiter],
            wake: Arc::new(wake),
            space: Arc::new(Space {
                mac,
                pairs,
                mtu: mtu.unwrap_or(0),
                changes: AtomicU32::new(0),
                announcements: AtomicU32::new(0),
            }),
        };
        let net = Self {
            space: Arc::clone(&handle.space),
            counters: Arc::clone(&handle.counters),
            limiters: handle.limiters.clone(),
            rx: (0..pairs.into()).map(|pair| Rx::new(2 * pair)).collect(),
            tx: (0..pairs).map(|_| Tx::default()).collect(),
            active: state.pairs,
            host_active: pairs,
            offloads: state.offloads,
            moved: state.mac.is_some(),
            mode: None,
            blocked: false,
            timer: timer.map_err(host("create a timer"))?,
            timer_at: None,
            wake: Arc::clone(&handle.wake),
            backend,
            detour,
            vhost,
            keeper,
            slot: Slot::default(),
            retired: None,
        };
        Ok((net, handle))
    }

    /// What is negotiated; the first call after a start makes the host's end fit it.
    fn begin(&mut self, io: &mut Io<'_>) -> Result<RxMode, DeviceError> {
        if let Some(mode) = self.mode {
            return Ok(mode);
        }
        let takes = |bit| io.has(bit) && self.offloads.is_none_or(|all| all >> bit & 1 != 0);
        let configured = self.backend.configure(takes);
        configured.map_err(|error| host_error("set the offloads of a tap interface", error))?;
        let csum = takes(VIRTIO_NET_F_GUEST_CSUM);
        self.use_pairs()?;
        if let (Some(vhost), NetBackend::Tap(tap)) = (&mut self.vhost, &self.backend) {
            vhost.start(io, tap)?;
        }
        self.ask_announcement(io);
        let mode = RxMode::new(io, self.space.mtu, csum);
        self.mode = Some(mode);
        Ok(mode)
    }

    /// Has the timer go off at `at` at the latest.
    fn schedule(&mut self, at: Instant) -> Result<(), DeviceError> {
        if self.timer_at.is_some_and(|set| set <= at) {
            return Ok(());
        }
        self.timer_at = Some(at);
        // Zero would disarm it.
        let wait = at.saturating_duration_since(Instant::now());
        let set = self.timer.reset(wait.max(Duration::from_nanos(1)), None);
        set.map_err(|error| host_error("set a timer", error.into()))
    }

    fn arm(&mut self, pair: usize, on: bool, io: &mut Io<'_>) {
        if let Some(rx) = self.rx.get_mut(pair).filter(|rx| rx.armed != on) {
            rx.armed = on;
            io.arm(pair as u32, on);
        }
    }

    /// Gives the guest what the host has for a pair, as far as there are buffers.
    fn receive(&mut self, pair: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let wait = self.receive_turn(pair, io)?;
        self.arm(pair, wait, io);
        self.attend_detour(pair, wait)
    }

    /// One turn of [`receive`](Self::receive): whether the host is to be waited for.
    fn receive_turn(&mut self, pair: usize, io: &mut Io<'_>) -> Result<bool, DeviceError> {
        let mode = self.begin(io)?;
        if pair >= usize::from(self.active) || self.vhost.is_some() {
            return Ok(false);
        }
        for _ in 0..TURN {
            let Some(rx) = self.rx.get_mut(pair) else {
                return Ok(false);
            };
            if let Some(at) = self.counters.rx.must_wait(&mut rx.until) {
                self.schedule(at)?;
                return Ok(false);
            }
            if !self.space.link_is_up() {
                return Ok(false);
            }
            if !rx.gather(io, mode)? {
                self.counters.rx.no_buffer.one();
                return Ok(false);
            }
            if self.take_detour(pair, io, mode)? {
                continue;
            }
            let Some(rx) = self.rx.get_mut(pair) else {
                return Ok(false);
            };
            let buffers = rx.buffers(mode);
            let received = self.backend.receive(pair, io.ram(), buffers, mode.longest);
            match received? {
                Received::Nothing => return Ok(true),
                Received::Dropped => self.counters.rx.dropped("it does not fit the buffers"),
                Received::Closed(error) => {
                    self.close(io, &error);
                    return Ok(false);
                }
                Received::Frame(len) => {
                    let blank = matches!(self.backend, NetBackend::Stream(_));
                    rx.deliver(io, mode, (len, blank))?;
                    let bytes = len - HEADER;
                    self.counters.rx.passed(bytes);
                    let [limiter, _] = &self.limiters;
                    rx.until = limiter
                        .as_ref()
                        .and_then(|limiter| limiter.charge(Instant::now(), bytes));
                }
            }
        }
        Ok(true)
    }

    /// Sends nothing before the host can take it.
    fn block(&mut self, io: &mut Io<'_>) {
        self.blocked = true;
        io.arm(WRITABLE, true);
    }

    /// Sends what the driver has for a pair, and gives it what a detour answers at once.
    fn transmit(&mut self, pair: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match self.transmit_turn(pair, io)? {
            true => self.receive(detour::PAIR, io),
            false => Ok(()),
        }
    }

    /// One turn of [`transmit`](Self::transmit): whether a detour was taken.
    fn transmit_turn(&mut self, pair: usize, io: &mut Io<'_>) -> Result<bool, DeviceError> {
        self.begin(io)?;
        let (mut any, mut detoured) = (false, false);
        while !self.blocked && self.vhost.is_none() {
            let Some(tx) = self.tx.get_mut(pair) else {
                return Ok(detoured);
            };
            if let Some(at) = self.counters.tx.must_wait(&mut tx.until) {
                self.schedule(at)?;
                return Ok(detoured);
            }
            let Some(chain) = io.pop(2 * pair + 1)? else {
                self.counters.tx.no_buffer.add(u64::from(!any));
                return Ok(detoured);
            };
            any = true;
            self.counters
                .remaining
                .add(io.remaining(2 * pair + 1).into());
            let ram = io.ram();
            let (header, source) = header::start(ram, chain.readable())?;
            let len = total(chain.readable()).saturating_sub(HEADER);
            let fits = self.space.link_is_up() && (MIN_FRAME..=MAX_FRAME).contains(&len);
            if fits && self.give_detour(io, &chain, len)? {
                io.complete(chain, 0)?;
                detoured = true;
                continue;
            }
            let header = clean(&header, |bit| io.has(bit)).filter(|_| fits);
            let sent = match header {
                None => {
                    self.counters.malformed.one();
                    Sent::Refused
                }
                Some(header) => {
                    self.counters.spoofed.add((source != self.space.mac).into());
                    let begin = Instant::now();
                    let frame = (header, len);
                    let sent = self.backend.send(pair, ram, chain.readable(), frame)?;
                    self.counters.writes.note(begin.elapsed());
                    sent
                }
            };
            match sent {
                Sent::All => self.counters.tx.passed(len),
                Sent::Part => {
                    self.counters.tx.passed(len);
                    self.block(io);
                }
                Sent::Refused => self.counters.tx.dropped("the host does not take it"),
                Sent::Later => {
                    io.unpop(chain);
                    self.block(io);
                    return Ok(detoured);
                }
                Sent::Closed(error) => self.close(io, &error),
            }
            io.complete(chain, 0)?;
            let [_, limiter] = &self.limiters;
            let limiter = limiter.as_ref();
            let until = limiter.and_then(|limiter| limiter.charge(Instant::now(), len));
            if let Some(tx) = self.tx.get_mut(pair) {
                tx.until = until;
            }
        }
        Ok(detoured)
    }

    fn all_pairs(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        for pair in 0..self.rx.len() {
            self.receive(pair, io)?;
            self.transmit(pair, io)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn traits(&self) -> Traits {
        let mut features = self.backend.features()
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF;
        if self.space.mtu != 0 {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        if let Some(vhost) = &self.vhost {
            features = vhost.features(features);
        }
        let mut queues = vec![QUEUE_SIZE; 2 * self.rx.len()];
        if self.rx.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        let commands = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
        if features & commands != 0 {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
            queues.push(CONTROL_SIZE);
        }
        Traits {
            id: VIRTIO_ID_NET,
            features,
            queues,
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn sources(&self) -> Vec<Source> {
        let own = if self.vhost.is_some() {
            0
        } else {
            self.rx.len()
        };
        let pairs = (0..own).filter_map(|pair| Some((pair, self.backend.fd(pair)?)));
        let mut sources: Vec<_> = pairs
            .map(|(pair, fd)| Source::readable(pair as u32, fd))
            .collect();
        sources.push(Source::readable(TIMER, self.timer.as_raw_fd()));
        sources.push(Source::readable(WAKE, self.wake.as_raw_fd()));
        let writable = self.backend.writable_fd();
        sources.extend(writable.map(|fd| Source::readable(WRITABLE, fd)));
        sources
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.control_queue(io) == Some(queue) {
            return self.control(queue, io);
        }
        let pair = queue / 2;
        let Counters { rx, tx, .. } = &*self.counters;
        match queue % 2 {
            // With buffers at hand, the source says when there is something for them.
            0 => rx.queue_events.one(),
            _ => tx.queue_events.one(),
        }
        match queue % 2 {
            0 if self.mode.is_some() && self.rx.get(pair).is_some_and(|rx| rx.armed) => Ok(()),
            0 => self.receive(pair, io),
            _ => self.transmit(pair, io),
        }
    }

    fn on_source(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if let Some(vhost) = &self.vhost
            && vhost.on_source(token, io)?
        {
            return Ok(());
        }
        match token {
            TIMER => {
                let cleared = self.timer.clear();
                cleared.map_err(|error| host_error("clear a timer", error.into()))?;
                self.timer_at = None;
                self.all_pairs(io)
            }
            WAKE => {
                // Readable, or another event took it.
                let _ = self.wake.read();
                self.renew(io);
                self.rx.iter_mut().for_each(|rx| rx.until = None);
                self.tx.iter_mut().for_each(|tx| tx.until = None);
                self.all_pairs(io)
            }
            WRITABLE => {
                match self.backend.flush() {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error) => self.close(io, &error),
                }
                self.blocked = false;
                io.arm(WRITABLE, false);
                (0..self.tx.len()).try_for_each(|pair| self.transmit(pair, io))
            }
            pair => {
                self.counters.host_events.one();
                self.receive(pair as usize, io)?;
                if self.rx.get(pair as usize).is_some_and(|rx| !rx.armed) {
                    self.notice_end(io);
                }
                Ok(())
            }
        }
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.rx.iter_mut().for_each(|rx| rx.let_go(io));
        self.tx.iter_mut().for_each(|tx| tx.until = None);
        self.backend.let_go();
        self.mode = None;
        self.blocked = false;
        match &mut self.vhost {
            Some(vhost) => vhost.stop(io),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.active = 1;
        self.offloads = None;
        self.stay();
        if let Some(detour) = &mut self.detour {
            detour.reset();
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState {
            pairs: self.active,
            offloads: self.offloads,
            mac: Some(self.space.mac),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let state = match state {
            DeviceState::Net(state) => *state,
            DeviceState::Reset => NetState::default(),
            _ => return false,
        };
        // The metadata service has connections of the guest's, which nothing saves.
        if self.detour.is_some() || !(1..=self.space.pairs).contains(&state.pairs) {
            return false;
        }
        self.active = state.pairs;
        self.offloads = state.offloads;
        self.stay();
        self.mode = None;
        true
    }
}
