//! The watchdog: times that its registers can count.

use std::time::Duration;

use crate::config::Watchdog;

/// Longest time of a watchdog.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Least upper bound: Linux chooses whole seconds.
const LEAST: Duration = Duration::from_secs(1);

/// A watchdog that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WatchdogError {
    /// A time out of range.
    #[error(
        "a watchdog timeout of {} cannot be had: give 1s to 24h",
        humantime::format_duration(*timeout)
    )]
    Timeout {
        /// As asked.
        timeout: Duration,
    },
    /// Bounds the wrong way round.
    #[error(
        "the watchdog's shortest timeout of {} is not within 1ms and its longest of {}: give \
         min=TIME less than timeout=TIME",
        humantime::format_duration(*min), humantime::format_duration(*timeout)
    )]
    Min {
        /// Shortest, as asked.
        min: Duration,
        /// Longest.
        timeout: Duration,
    },
}

pub(super) fn validate(watchdog: &Watchdog) -> Result<(), WatchdogError> {
    let &Watchdog { timeout, min, .. } = watchdog;
    if !(LEAST..=LONGEST).contains(&timeout) {
        return Err(WatchdogError::Timeout { timeout });
    }
    if min < Duration::from_millis(1) || min > timeout {
        return Err(WatchdogError::Min { min, timeout });
    }
    Ok(())
}
