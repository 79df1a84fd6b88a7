//! Limits of a device that serves a request and then waits until it may serve the next.
//!
//! What was served is charged; a debt delays what follows. Nothing is held back meanwhile: requests stay in
//! the queue, and the device looks again when the timer goes off or the limits have changed.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::device::{DeviceError, Source};
use super::limiter::Limiter;
use crate::counters::Counter;

/// Tokens of the sources.
const TIMER: u32 = 0;
const WAKE: u32 = 1;

/// The limits of one device.
#[derive(Debug)]
pub(super) struct Pace {
    limiter: Arc<Limiter>,
    /// Nothing is served before.
    until: Option<Instant>,
    timer: TimerFd,
    wake: Arc<EventFd>,
}

/// The side of it that the VMM keeps.
#[derive(Clone, Debug)]
pub struct PaceHandle {
    limiter: Arc<Limiter>,
    wake: Arc<EventFd>,
}

impl PaceHandle {
    /// The limiter; after a change of it call [`limits_changed`](Self::limits_changed).
    pub fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// Lets requests go on that wait for old limits.
    pub fn limits_changed(&self) -> io::Result<()> {
        self.wake.write(1)
    }
}

impl Pace {
    /// Limits by `limiter`.
    pub fn new(limiter: Arc<Limiter>) -> io::Result<(Self, PaceHandle)> {
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let handle = PaceHandle {
            limiter: Arc::clone(&limiter),
            wake: Arc::clone(&wake),
        };
        let pace = Self {
            limiter,
            until: None,
            timer: TimerFd::new()?,
            wake,
        };
        Ok((pace, handle))
    }

    /// What it waits for.
    pub fn sources(&self) -> [Source; 2] {
        [
            Source::readable(TIMER, self.timer.as_raw_fd()),
            Source::readable(WAKE, self.wake.as_raw_fd()),
        ]
    }

    /// One of [`sources`](Self::sources) is ready: the queues are to be looked at again. `events` counts the
    /// timer's.
    pub fn on_source(&mut self, token: u32, events: &Counter) -> Result<(), DeviceError> {
        if token == WAKE {
            // Readable, or another event took it.
            let _ = self.wake.read();
            self.until = None;
            return Ok(());
        }
        events.one();
        let cleared = self.timer.clear();
        cleared.map_err(|error| failed("clear a timer", error.into()))
    }

    /// Charges a request that is served.
    pub fn charge(&mut self, bytes: u64) {
        let until = self.limiter.charge(Instant::now(), bytes);
        self.until = until.max(self.until);
    }

    /// Whether the next request has to wait, which `throttled` counts and for which the timer is set.
    pub fn must_wait(&mut self, throttled: &Counter) -> Result<bool, DeviceError> {
        let now = Instant::now();
        let Some(at) = self.until.filter(|at| *at > now) else {
            self.until = None;
            return Ok(false);
        };
        throttled.one();
        // Zero would disarm it.
        let wait = at
            .saturating_duration_since(now)
            .max(Duration::from_nanos(1));
        let set = self.timer.reset(wait, None);
        set.map_err(|error| failed("set a timer", error.into()))?;
        Ok(true)
    }
}

fn failed(what: &'static str, source: io::Error) -> DeviceError {
    DeviceError::Host { what, source }
}
