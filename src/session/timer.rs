//! Timers that the event loop waits for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// A timer that is not armed.
pub fn timer() -> io::Result<TimerFd> {
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    Ok(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?)
}

/// Has `timer` fire once, after a time that is not zero.
pub fn arm(timer: &TimerFd, after: Duration) -> io::Result<()> {
    let once = Expiration::OneShot(TimeSpec::from_duration(after));
    Ok(timer.set(once, TimerSetTimeFlags::empty())?)
}

/// Its descriptor.
pub fn timer_fd(timer: &TimerFd) -> RawFd {
    timer.as_fd().as_raw_fd()
}
