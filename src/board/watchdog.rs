//! The watchdog on the board: a timer of the host, and what follows when it runs out.
//!
//! vCPU threads arm the timer; the vmm thread waits for it and acts.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arch::acpi::WatchdogFacts;
use arch::layout;
use devices::bus::{Bus, ExitReason};
use devices::ioapic::MsiSink;
use devices::legacy::watchdog::{Alarm, PERIOD_MS, Watchdog, WatchdogState};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::BoardError;
use crate::config::{self, WatchdogAction};
use crate::telemetry::Limited;

static EXPIRED: Limited = Limited::new(16);
static ALARMS: Limited = Limited::new(4);

/// A message that is a non-maskable interrupt of the first vCPU (Intel SDM, volume 3, 11.11).
const NMI: (u64, u32) = (layout::LAPIC_START, 4 << 8);

/// The watchdog and its action.
pub struct BoardWatchdog {
    device: Arc<Watchdog<HostAlarm>>,
    bounds: RangeInclusive<u32>,
    action: WatchdogAction,
    messages: Arc<dyn MsiSink>,
}

impl BoardWatchdog {
    /// Makes it from its state and puts its registers on the bus. Its time stands still.
    pub fn place(
        settings: &config::Watchdog,
        messages: Arc<dyn MsiSink>,
        pio: &mut Bus,
        state: WatchdogState,
    ) -> Result<Self, BoardError> {
        let alarm = HostAlarm::new().map_err(BoardError::Timer)?;
        let bounds = periods(settings.min)..=periods(settings.timeout);
        let device = Arc::new(Watchdog::new(alarm, bounds.clone(), state));
        let (port, size) = (layout::WATCHDOG_PORT, layout::WATCHDOG_PORT_SIZE);
        pio.insert(port.into(), size.into(), device.clone())
            .map_err(|source| BoardError::Place {
                device: "the watchdog",
                source,
            })?;
        let watchdog = Self {
            device,
            bounds,
            action: settings.action,
            messages,
        };
        watchdog.pause();
        Ok(watchdog)
    }

    /// Goes back to these registers. Its time stands still.
    pub fn restore(&self, state: &WatchdogState) {
        self.device.restore(state);
    }

    /// Its registers, with the time that is left.
    pub fn save(&self) -> WatchdogState {
        self.device.save()
    }

    /// What ACPI says of it.
    pub fn facts(&self) -> WatchdogFacts {
        WatchdogFacts {
            port: layout::WATCHDOG_PORT,
            period_ms: PERIOD_MS,
            min_count: *self.bounds.start(),
            max_count: *self.bounds.end(),
        }
    }

    /// The descriptor is readable: the end of the VM, if the watchdog has expired and that is what
    /// follows. Other consequences are seen to here.
    pub fn on_alarm(&self) -> Option<ExitReason> {
        self.device.alarm().clear();
        if !self.device.check() {
            return None;
        }
        match self.action {
            WatchdogAction::Exit => return Some(ExitReason::Watchdog),
            WatchdogAction::Reset => return Some(ExitReason::Reset),
            WatchdogAction::Poweroff => return Some(ExitReason::PowerOff),
            WatchdogAction::Nmi => {
                let (address, data) = NMI;
                self.messages.send(address, data);
            }
            WatchdogAction::Log => {}
        }
        if EXPIRED.allow() {
            log::warn!("the guest did not feed its watchdog");
        }
        None
    }
}

impl BoardWatchdog {
    /// Its time stands still. No vCPU runs.
    pub fn pause(&self) {
        let alarm = self.device.alarm();
        let now = alarm.now();
        alarm.clock().stopped.get_or_insert(now);
        alarm.set(None);
    }

    /// Its time goes on, if it stood still; the next alarm, which comes at once, sees how much is left.
    pub fn resume(&self) {
        let alarm = self.device.alarm();
        let Some(stopped) = alarm.clock().stopped.take() else {
            return;
        };
        let lost = alarm.now().saturating_sub(stopped);
        alarm.clock().lost += lost;
        alarm.set(Some(Duration::ZERO));
    }
}

impl AsRawFd for BoardWatchdog {
    fn as_raw_fd(&self) -> RawFd {
        self.device.alarm().timer.as_fd().as_raw_fd()
    }
}

fn periods(time: Duration) -> u32 {
    let count = time.as_millis().div_ceil(PERIOD_MS.into());
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A timer of the host's monotonic clock, less the time that stood still.
struct HostAlarm {
    timer: TimerFd,
    origin: Instant,
    clock: Mutex<Clock>,
}

#[derive(Default)]
struct Clock {
    /// Since when, while it stands still.
    stopped: Option<Duration>,
    /// How long it has stood still before.
    lost: Duration,
}

impl HostAlarm {
    fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            origin: Instant::now(),
            clock: Mutex::default(),
        })
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the descriptor unreadable until the next alarm.
    fn clear(&self) {
        // One that was set anew meanwhile has nothing to read.
        let _ = nix::unistd::read(&self.timer, &mut [0; 8]);
    }
}

impl Alarm for HostAlarm {
    fn now(&self) -> Duration {
        let clock = self.clock();
        let runs = || self.origin.elapsed().saturating_sub(clock.lost);
        clock.stopped.unwrap_or_else(runs)
    }

    fn set(&self, after: Option<Duration>) {
        let result = match after {
            None => self.timer.unset(),
            Some(after) => {
                // Zero would disarm it.
                let after = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
                let once = Expiration::OneShot(after);
                self.timer.set(once, TimerSetTimeFlags::empty())
            }
        };
        if let Err(error) = result
            && ALARMS.allow()
        {
            log::error!("the watchdog's timer cannot be set: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_can_stand_still() {
        let sleep = || std::thread::sleep(Duration::from_millis(30));
        let mut pio = Bus::new();
        struct Nobody;
        impl MsiSink for Nobody {
            fn send(&self, _: u64, _: u32) {}
        }
        let settings = config::Watchdog::default();
        let state = WatchdogState::default();
        let watchdog = BoardWatchdog::place(&settings, Arc::new(Nobody), &mut pio, state).unwrap();
        let alarm = watchdog.device.alarm();
        watchdog.resume();
        watchdog.pause();
        let before = alarm.now();
        sleep();
        watchdog.pause();
        assert_eq!(alarm.now(), before);
        let resumed = Instant::now();
        watchdog.resume();
        let after = alarm.now();
        assert!(after - before <= resumed.elapsed(), "{before:?} {after:?}");
        sleep();
        assert!(alarm.now() - after >= Duration::from_millis(30));
        assert_eq!(watchdog.on_alarm(), None);
    }
}
