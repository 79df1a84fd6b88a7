//! What bulle says: messages to its user on stderr; the log, limited where a guest can cause it; and
//! figures.

mod logger;
mod metrics;

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub use logger::{LogFileError, configure, init, missed, name};
pub use metrics::{Figures, Metrics};

/// Tells the user `text` on stderr. A stderr that takes nothing (full, closed) is no reason to end.
pub fn tell(text: impl Display) {
    // One write, so that the lines of two processes do not mix.
    let _ = io::stderr().write_all(format!("bulle: {text}\n").as_bytes());
}

/// Events that log sites of this crate did not log.
static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// How many events were not logged because there had been many of their kind.
pub fn suppressed() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// A log site that a guest can reach: the first few events are logged, the rest only counted.
#[derive(Debug)]
pub struct Limited {
    seen: AtomicU32,
    limit: u32,
}

impl Limited {
    /// Lets `limit` events through.
    pub const fn new(limit: u32) -> Self {
        Self {
            seen: AtomicU32::new(0),
            limit,
        }
    }

    /// Counts an event; true while it may be logged.
    pub fn allow(&self) -> bool {
        let allowed = self.seen.load(Ordering::Relaxed) < self.limit
            && self.seen.fetch_add(1, Ordering::Relaxed) < self.limit;
        if !allowed {
            SUPPRESSED.fetch_add(1, Ordering::Relaxed);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_events_pass() {
        let site = Limited::new(3);
        let passed = (0..10).filter(|_| site.allow()).count();
        assert_eq!(passed, 3);
        assert!(suppressed() >= 7);
    }
}
