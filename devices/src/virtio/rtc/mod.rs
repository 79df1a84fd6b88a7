//! Real-time clock (virtio 1.4, "RTC Device"): the host's clocks, read by requests.
//!
//! Two clocks: UTC, as far as the host's clock is that around leap seconds, and monotonic time.
//! Both can be read together with the processor's counter once the VMM has said how far the
//! guest's is from the host's. There are no alarms. Owned by its I/O thread; nothing is kept
//! between requests but the last monotonic reading.

mod request;

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CLOCK;

use self::request::{Failure, Request, Response};
use super::device::{ConfigSpace, DeviceError, DeviceState, NoConfig, Traits, VirtioDevice};
use super::io::{Chain, Io, read_at, total, write_at};
use crate::lock;

/// Size of the one queue.
const QUEUE_SIZE: u16 = 64;
/// The clock of UTC.
const UTC: u16 = 0;
/// The clock of monotonic time.
const MONOTONIC: u16 = 1;

/// What the host's clock does around a leap second, which only its administrator knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeapSeconds {
    /// It may step or be smeared: `VIRTIO_RTC_CLOCK_UTC_MAYBE_SMEARED`.
    #[default]
    Unknown,
    /// It steps: `VIRTIO_RTC_CLOCK_UTC`.
    Step,
    /// It is smeared in some way: `VIRTIO_RTC_CLOCK_UTC_SMEARED`.
    Smeared,
    /// It is smeared from noon to noon: `VIRTIO_RTC_SMEAR_NOON_LINEAR`.
    NoonLinear,
    /// It is smeared over the last 1000 seconds of the day: `VIRTIO_RTC_SMEAR_UTC_SLS`.
    UtcSls,
}

impl LeapSeconds {
    /// Clock type and smearing variant.
    fn capability(self) -> (u8, u8) {
        match self {
            Self::Step => (0, 0),
            Self::Smeared => (3, 0),
            Self::NoonLinear => (3, 1),
            Self::UtcSls => (3, 2),
            Self::Unknown => (4, 0),
        }
    }
}

/// A counter of the processor that guests read as well.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    /// `hw_counter`: 0 for Arm's virtual counter, 1 for x86's time stamp counter.
    pub id: u8,
    /// Reads it on the host.
    pub read: fn() -> u64,
}

/// What a clock device is.
#[derive(Clone, Copy, Debug, Default)]
pub struct RtcOptions {
    /// What the host's UTC does around leap seconds.
    pub leap_seconds: LeapSeconds,
    /// The counter that clocks can be read together with.
    pub counter: Option<Counter>,
}

/// What is saved of a clock device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The last reading of the monotonic clock that the driver was given, in nanoseconds.
    pub monotonic: u64,
}

/// The side of a clock device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct RtcHandle(Arc<Mutex<Option<u64>>>);

impl RtcHandle {
    /// Says what is added to the host's counter to have that of the guest's first processor, which
    /// does not run now; clocks cannot be read together with the counter until then.
    pub fn set_counter_offset(&self, offset: u64) {
        *lock(&self.0) = Some(offset);
    }
}

/// The clock device.
#[derive(Debug)]
pub struct Rtc {
    leap_seconds: LeapSeconds,
    counter: Option<Counter>,
    counter_offset: Arc<Mutex<Option<u64>>>,
    /// Nanoseconds that the guest's monotonic clock is ahead of the host's.
    ahead: u64,
    last: u64,
}

/// Nanoseconds that a guest's monotonic clock has to be ahead of the host's, which may have started since
/// `state` was saved.
fn ahead(state: RtcState) -> u64 {
    match host(libc::CLOCK_MONOTONIC) {
        Ok(now) => state.monotonic.saturating_sub(now),
        Err(_) => 0,
    }
}

impl Rtc {
    /// Makes the device and its handle.
    pub fn new(options: RtcOptions, state: RtcState) -> (Self, RtcHandle) {
        let counter_offset = Arc::new(Mutex::new(None));
        let handle = RtcHandle(counter_offset.clone());
        let rtc = Self {
            leap_seconds: options.leap_seconds,
            counter: options.counter,
            counter_offset,
            ahead: ahead(state),
            last: state.monotonic,
        };
        (rtc, handle)
    }

    fn answer(&mut self, request: Request) -> Result<Response, Failure> {
        Ok(match request {
            Request::Cfg => Response::Cfg { clocks: 2 },
            Request::ClockCap { clock: UTC } => {
                let (kind, smearing) = self.leap_seconds.capability();
                Response::ClockCap { kind, smearing }
            }
            Request::ClockCap { clock: MONOTONIC } => Response::ClockCap {
                kind: 2,
                smearing: 0,
            },
            Request::CrossCap { clock, counter } if clock <= MONOTONIC => Response::CrossCap {
                supported: self.counter(counter).is_some(),
            },
            Request::Read { clock } => Response::Read {
                reading: self.read(clock)?,
            },
            Request::ReadCross { clock, counter } if clock <= MONOTONIC => {
                let (counter, offset) = self.counter(counter).ok_or(Failure::NotSupported)?;
                let before = counter();
                let reading = self.read(clock)?;
                let half = counter().wrapping_sub(before) / 2;
                Response::ReadCross {
                    reading,
                    cycles: before.wrapping_add(half).wrapping_add(offset),
                }
            }
            Request::ClockCap { .. } | Request::CrossCap { .. } | Request::ReadCross { .. } => {
                return Err(Failure::NoClock);
            }
        })
    }

    /// How to read a counter on the host, and what to add for the guest's.
    fn counter(&self, id: u8) -> Option<(fn() -> u64, u64)> {
        let counter = self.counter.filter(|counter| counter.id == id)?;
        Some((counter.read, (*lock(&self.counter_offset))?))
    }

    fn read(&mut self, clock: u16) -> Result<u64, Failure> {
        match clock {
            UTC => host(libc::CLOCK_REALTIME).map_err(|_| Failure::Io),
            MONOTONIC => {
                let now = host(libc::CLOCK_MONOTONIC).map_err(|_| Failure::Io)?;
                self.last = self.last.max(now.saturating_add(self.ahead));
                Ok(self.last)
            }
            _ => Err(Failure::NoClock),
        }
    }

    fn serve(&mut self, chain: &Chain, io: &Io<'_>) -> Result<u32, DeviceError> {
        let mut bytes = [0; Request::MAX];
        let len = read_at(io.ram(), chain.readable(), 0, &mut bytes)?;
        let room = total(chain.writable());
        let bytes = bytes.get(..len).unwrap_or_default();
        let request = Request::parse(bytes, room);
        let response = match request.and_then(|request| self.answer(request)) {
            Ok(response) => response.bytes(),
            Err(failure) => failure.bytes(),
        };
        // Where the status has no room, there is no answer; a failure's is cut to what there is.
        Ok(write_at(io.ram(), chain.writable(), 0, &response)? as u32)
    }
}

/// A clock of the host, in nanoseconds; never before its epoch.
fn host(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a timespec to write to.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    Ok(seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds))
}

impl VirtioDevice for Rtc {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_CLOCK,
            features: 0,
            queues: vec![QUEUE_SIZE],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            let written = self.serve(&chain, io)?;
            io.complete(chain, written)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.last = 0;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rtc(RtcState {
            monotonic: self.last,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let state = match state {
            DeviceState::Rtc(state) => *state,
            DeviceState::Reset => RtcState::default(),
            _ => return false,
        };
        (self.ahead, self.last) = (ahead(state), state.monotonic);
        true
    }
}
