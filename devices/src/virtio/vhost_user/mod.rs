//! A block device (section 5.2) whose requests another process carries out: the backend, by the
//! vhost-user protocol.
//!
//! The backend is asked for features and configuration space when the device is made, and gets guest
//! RAM and the queues when the driver starts it. It hears the driver's kicks itself; its interrupts are
//! messages that KVM sends where vectors are not masked, and come by way of the I/O thread otherwise.
//! It is trusted with guest RAM, which it maps, and with nothing else: its answers are checked, each has
//! [`PATIENCE`], and a backend that fails or goes away fails the device until a reset by the driver, which
//! finds the next one that listens. Nothing of it is saved.

mod handle;
mod link;
mod options;
#[cfg(any(test, feature = "test-util"))]
#[path = "tests/peer.rs"]
pub mod peer;
mod space;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::handle::Counters;
pub use self::handle::VhostUserHandle;
use self::link::{Found, Link, Served};
pub use self::options::{PATIENCE, Spawn, VhostUserError, VhostUserOptions};
use self::space::Space;
use super::core::CORE_FEATURES;
use super::device::{ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice};
use super::io::Io;
use crate::lock;

/// Size of each queue.
const QUEUE_SIZE: u16 = 256;
/// Sources; those of interrupts are by queue.
const WAKE: u32 = 0;
const GONE: u32 = 1;
const CALLS: u32 = 1 << 17;

/// The block device.
pub struct VhostUserBlock {
    options: VhostUserOptions,
    link: Arc<Mutex<Link>>,
    features: u64,
    queues: u16,
    space: Arc<Space>,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
    /// The queues that the backend has, with its interrupts; empty while stopped.
    served: Vec<(usize, EventFd)>,
}

impl std::fmt::Debug for VhostUserBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let served = self.served.len();
        f.debug_struct("VhostUserBlock")
            .field("served", &served)
            .finish()
    }
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

fn to_device(error: &VhostUserError) -> DeviceError {
    let why = std::error::Error::source(error).map(|source| format!(": {source}"));
    DeviceError::Host {
        what: "have a disk served by vhost-user",
        source: io::Error::other(format!("{error}{}", why.unwrap_or_default())),
    }
}

impl VhostUserBlock {
    /// Connects to the backend and makes the device and its handle.
    ///
    /// # Errors
    /// A backend that is not there, is no such backend, or does not answer in time.
    pub fn new(options: &VhostUserOptions) -> Result<(Self, VhostUserHandle), VhostUserError> {
        let begun = Instant::now();
        let Found {
            link,
            features,
            queues,
            config,
        } = Link::open(options)?;
        let wake = event().map_err(|source| VhostUserError::Host {
            what: "create an eventfd",
            source,
        })?;
        let handle = VhostUserHandle {
            link: Arc::new(Mutex::new(link)),
            space: Arc::new(Space::new(config, queues)),
            wake: Arc::new(wake),
            counters: Arc::default(),
        };
        handle.counters.initialised(begun.elapsed());
        let device = Self {
            options: VhostUserOptions {
                queues: Some(queues),
                ..options.clone()
            },
            link: Arc::clone(&handle.link),
            features,
            queues,
            space: Arc::clone(&handle.space),
            wake: Arc::clone(&handle.wake),
            counters: Arc::clone(&handle.counters),
            served: Vec::new(),
        };
        Ok((device, handle))
    }

    /// The number of queues.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    fn link(&self) -> Link {
        lock(&self.link).clone()
    }

    /// Another connection where the backend went away, as it may have been started again.
    fn connected(&self) -> Result<Link, VhostUserError> {
        let link = self.link();
        if !link.is_closed() {
            return Ok(link);
        }
        let found = Link::open(&self.options)?;
        if self.features & !found.features != 0 {
            return Err(found.link.lacks("features that the guest has seen"));
        }
        self.space.update(found.config);
        log::info!("connected to another vhost-user backend");
        *lock(&self.link) = found.link.clone();
        Ok(found.link)
    }

    /// Hands the backend all queues that the driver set up.
    fn start(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let begun = Instant::now();
        let ready = (0..usize::from(self.queues)).filter(|queue| io.ready(*queue));
        let served = ready.map(|queue| Ok((queue, event()?)));
        let served: io::Result<Vec<_>> = served.collect();
        let served = served.map_err(|source| DeviceError::Host {
            what: "create an eventfd",
            source,
        })?;
        let mut queues = Vec::with_capacity(served.len());
        for (index, call) in &served {
            if let Some(lent) = io.lend(*index) {
                let index = *index;
                queues.push(Served { index, lent, call });
            }
        }
        let negotiated = (0..64).filter(|bit| io.has(*bit));
        let negotiated = negotiated.fold(0, |all, bit| all | 1 << bit);
        let begun_by = self.connected().and_then(|link| {
            link.start(negotiated, io.ram(), &queues)?;
            Ok(link)
        });
        let link = begun_by.map_err(|error| {
            self.counters.activate_fails.one();
            to_device(&error)
        })?;
        // Before a guest is served, which may look at the figures then.
        self.counters.activated(begun.elapsed());
        for Served { index, lent, call } in &queues {
            io.watch(Source::readable(CALLS + *index as u32, call.as_raw_fd()));
            io.direct(*index, Some(call));
            // Of what was kicked before it listened.
            let _ = lent.kick.write(1);
        }
        drop(queues);
        self.served = served;
        // Its hang-up, which comes whatever is waited for; answers are read by those who asked.
        io.watch(Source::readable(GONE, link.as_raw_fd()));
        io.arm(GONE, false);
        Ok(())
    }

    /// Has the queues back.
    fn stop(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let served = std::mem::take(&mut self.served);
        if served.is_empty() {
            return Ok(());
        }
        let queues: Vec<_> = served.iter().map(|(queue, _)| *queue).collect();
        for queue in &queues {
            io.direct(*queue, None);
        }
        let next = self.link().stop(&queues);
        for (queue, call) in &served {
            if call.read().is_ok() {
                io.interrupt(*queue);
            }
        }
        let next = next.map_err(|error| to_device(&error))?;
        let mut queues = queues.into_iter().zip(next);
        queues.try_for_each(|(queue, next)| io.take_back(queue, next))
    }
}

impl VirtioDevice for VhostUserBlock {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_BLOCK,
            features: self.features & !CORE_FEATURES,
            queues: vec![QUEUE_SIZE; self.queues.into()],
            shm: Vec::new(),
            withheld: CORE_FEATURES & !self.features,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(WAKE, self.wake.as_raw_fd())]
    }

    fn on_queue(&mut self, _: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match self.served.is_empty() {
            true => self.start(io),
            false => Ok(()),
        }
    }

    fn on_source(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match token {
            WAKE => {
                // Readable, or another event took it.
                let _ = self.wake.read();
                io.config_changed();
            }
            GONE => {
                let link = self.link();
                if link.is_closed() {
                    return Err(to_device(&link.gone()));
                }
            }
            _ => {
                let queue = token.wrapping_sub(CALLS) as usize;
                let mut served = self.served.iter();
                let served = served.find(|(index, _)| *index == queue);
                if served.is_some_and(|(_, call)| call.read().is_ok()) {
                    io.interrupt(queue);
                }
            }
        }
        Ok(())
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.stop(io)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Reset
    }
}
