//! Socket device (section 5.10): the guest's vsock as Unix sockets of the host.
//!
//! Host programs connect to `<path>` and say `CONNECT <port>`; the guest's connections to port P
//! of CID 2 go to `<path>_P`. Packets are in `packet`, one connection in `conn`, all of them in
//! `mux`, system calls in `host`. The device is owned by its I/O thread.

mod conn;
mod event;
mod host;
mod mux;
mod packet;

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::timerfd::TimerFd;

use self::conn::Packet;
use self::event::Reset;
use self::mux::{Counters, Mux, TIMER};
use self::packet::Header;
use super::device::{
    ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice, read_config,
};
use super::io::Io;
use super::uds::{ListenError, Listener, MAX_PATH, SocketType};
use crate::counters::Values;

/// Size of the queues.
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

const F_STREAM: u32 = 0;
const F_SEQPACKET: u32 = 1;

/// Longest that `_<port>` or the suffix of the other listener makes a path.
const SUFFIX: usize = 11;
/// Events of the host taken in one turn, in batches.
const MAX_BATCHES: usize = 8;

/// What a socket device is made of.
#[derive(Clone, Debug)]
pub struct VsockOptions {
    /// The guest's CID, from 3 up to 2³² − 2.
    pub cid: u32,
    /// Where the host's programs connect to.
    pub path: PathBuf,
    /// SEQPACKET as well as STREAM sockets; the host's listener for those is `<path>.seqpacket`.
    pub seqpacket: bool,
    /// Most connections. No more than half the file descriptors that the process may have open.
    pub max_connections: usize,
}

impl VsockOptions {
    /// Both kinds of sockets, and up to 4096 connections.
    pub fn new(cid: u32, path: impl Into<PathBuf>) -> Self {
        Self {
            cid,
            path: path.into(),
            seqpacket: true,
            max_connections: 4096,
        }
    }
}

/// A socket device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A CID that no guest can have.
    #[error("guest CID {cid}: want 3 to 4294967294")]
    Cid {
        /// Wanted CID.
        cid: u32,
    },
    /// The host's programs have nowhere to connect to.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The host failed.
    #[error("cannot {what} for a socket device")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is saved of a socket device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The CID that the driver knows.
    pub cid: u32,
    /// The driver has connections, of which nothing else is saved.
    pub connected: bool,
}

/// The guest's CID.
#[derive(Debug)]
struct Space(u64);

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.0.to_le_bytes(), offset, data);
    }
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    seqpacket: bool,
    mux: Mux,
    timer: TimerFd,
    /// What the timer is set to.
    timer_at: Option<Instant>,
    /// Whether the driver has to forget its connections.
    reset: Reset,
}

fn host(what: &'static str) -> impl Fn(io::Error) -> VsockError {
    move |source| VsockError::Host { what, source }
}

/// Connections, if each needs a file descriptor and the rest of the process some as well.
fn fd_limit() -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: one valid structure for the length of the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => usize::try_from(limit.rlim_cur / 2).unwrap_or(usize::MAX),
        _ => usize::MAX,
    }
}

/// The host's end of a device: its sockets listen from now on, and clients wait.
#[derive(Debug)]
pub struct VsockEnd {
    options: VsockOptions,
    listeners: Vec<Listener>,
}

impl VsockEnd {
    /// Checks `options` and makes the sockets.
    ///
    /// # Errors
    /// A CID that no guest can have, and a path that is too long, in use, or cannot be made.
    pub fn bind(options: VsockOptions) -> Result<Self, VsockError> {
        let (cid, path) = (options.cid, &options.path);
        if !(3..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid { cid });
        }
        // Ports are added to it.
        let max = MAX_PATH - SUFFIX;
        if path.as_os_str().len() > max {
            let path = path.clone();
            return Err(ListenError::TooLong { path, max }.into());
        }
        let mut listeners = vec![Listener::bind(path, SocketType::Stream)?];
        if options.seqpacket {
            let mut other = path.clone().into_os_string();
            other.push(".seqpacket");
            listeners.push(Listener::bind(other.as_ref(), SocketType::Seqpacket)?);
        }
        Ok(Self { options, listeners })
    }
}

/// The side of a socket device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct VsockHandle(Arc<Counters>);

impl VsockHandle {
    /// What the device has done.
    pub fn counters(&self) -> Values {
        let all = [
            ("rx_queue_event_count", &self.0.rx_queue_event_count),
            ("tx_queue_event_count", &self.0.tx_queue_event_count),
            ("rx_bytes_count", &self.0.rx_bytes_count),
            ("tx_bytes_count", &self.0.tx_bytes_count),
            ("rx_packets_count", &self.0.rx_packets_count),
            ("tx_packets_count", &self.0.tx_packets_count),
            ("conns_added", &self.0.conns_added),
            ("conns_killed", &self.0.conns_killed),
            ("conns_removed", &self.0.conns_removed),
            ("rx_read_fails", &self.0.rx_read_fails),
            ("tx_write_fails", &self.0.tx_write_fails),
        ];
        all.map(|(name, counter)| (name, counter.get())).into()
    }
}

impl Vsock {
    /// Makes the device on the sockets of `end`.
    pub fn new(end: VsockEnd, state: VsockState) -> Result<Self, VsockError> {
        let VsockEnd { options, listeners } = end;
        let VsockOptions {
            cid,
            path,
            seqpacket,
            max_connections,
        } = options;
        let max = max_connections.min(fd_limit());
        let mux = Mux::new(cid.into(), path, max, listeners);
        let mux = mux.map_err(host("wait for sockets"))?;
        let timer = TimerFd::new().map_err(io::Error::from);
        let timer = timer.map_err(host("create a timer"))?;
        let added = mux.poller.add(&timer, TIMER);
        added.map_err(host("wait for a timer"))?;
        Ok(Self {
            cid,
            seqpacket,
            mux,
            timer,
            timer_at: None,
            reset: Reset::of(state, cid),
        })
    }

    /// The side of the device that the VMM keeps.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle(Arc::clone(self.mux.counters()))
    }

    fn take_packets(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let seqpacket = self.seqpacket && io.has(F_SEQPACKET);
        while let Some(chain) = io.pop(TX)? {
            let ram = io.ram();
            if let Some(header) = Header::read(ram, &chain)? {
                let counters = self.mux.counters();
                counters.tx_packets_count.one();
                counters.tx_bytes_count.add(header.len.into());
                let packet = Packet {
                    header,
                    ram,
                    chain: &chain,
                };
                self.mux.take(packet, seqpacket)?;
            }
            io.complete(chain, 0)?;
        }
        Ok(())
    }

    /// Gives the guest what there is, and sets the timer.
    fn settle(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if !self.reset.holds() {
            self.mux.pump(RX, io)?;
        }
        let at = self.mux.deadline();
        if let Some(at) = at.filter(|_| at != self.timer_at) {
            // Zero would disarm it.
            let wait = at.saturating_duration_since(Instant::now());
            let set = self.timer.reset(wait.max(Duration::from_nanos(1)), None);
            set.map_err(|error| DeviceError::Host {
                what: "set a timer",
                source: error.into(),
            })?;
        }
        self.timer_at = at;
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn traits(&self) -> Traits {
        let seqpacket = u64::from(self.seqpacket) << F_SEQPACKET;
        Traits {
            id: VIRTIO_ID_VSOCK,
            features: 1 << F_STREAM | seqpacket,
            queues: vec![QUEUE_SIZE; 3],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(Space(self.cid.into()))
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(0, self.mux.poller.fd())]
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.reset.proceed(EVENT, io)?;
        let counters = self.mux.counters();
        match queue {
            TX => counters.tx_queue_event_count.one(),
            RX => counters.rx_queue_event_count.one(),
            _ => {}
        }
        match queue {
            TX => self.take_packets(io)?,
            EVENT => {}
            _ => self.mux.accept(),
        }
        self.settle(io)
    }

    fn on_source(&mut self, _: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        for _ in 0..MAX_BATCHES {
            let ready = self.mux.poller.take().map_err(|source| DeviceError::Host {
                what: "look at sockets",
                source,
            })?;
            if ready.is_empty() {
                break;
            }
            for ready in ready {
                if ready.token == TIMER {
                    self.timer_at = None;
                }
                self.mux.event(ready);
            }
        }
        self.settle(io)
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.reset.holds() {
            self.reset.release(io);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.mux.clear();
        self.reset = Reset::Known;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            cid: self.cid,
            connected: self.reset.is_pending() || !self.mux.is_empty(),
        })
    }

    /// Connections end; the sockets go on listening.
    fn restore(&mut self, state: &DeviceState) -> bool {
        let state = match state {
            DeviceState::Vsock(state) => *state,
            DeviceState::Reset => VsockState::default(),
            _ => return false,
        };
        self.mux.clear();
        self.reset = Reset::of(state, self.cid);
        true
    }
}
