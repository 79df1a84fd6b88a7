//! What devices count on their threads for others to read, under the names that Firecracker's metrics
//! have.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Names and values since the start; a name with a dot is one of a group.
pub type Values = Vec<(&'static str, u64)>;

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn one(&self) {
        self.add(1);
    }

    /// As [`add`](Self::add), where no other thread adds to it.
    pub(crate) fn add_alone(&self, count: u64) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(count), Ordering::Relaxed);
    }

    /// Since the start.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long operations took.
#[derive(Debug, Default)]
pub struct Latency {
    sum: AtomicU64,
    /// The shortest plus one, so that zero is none.
    min: AtomicU64,
    max: AtomicU64,
}

impl Latency {
    pub(crate) fn note(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX - 1);
        // Only one thread notes, so nothing comes in between.
        let sum = self.sum.load(Ordering::Relaxed);
        self.sum.store(sum.wrapping_add(micros), Ordering::Relaxed);
        if micros > self.max.load(Ordering::Relaxed) {
            self.max.store(micros, Ordering::Relaxed);
        }
        let min = self.min.load(Ordering::Relaxed);
        if min == 0 || micros < min - 1 {
            self.min.store(micros.saturating_add(1), Ordering::Relaxed);
        }
    }

    /// Microseconds: sum, shortest and longest.
    pub fn get(&self) -> [u64; 3] {
        let [sum, min, max] =
            [&self.sum, &self.min, &self.max].map(|value| value.load(Ordering::Relaxed));
        [sum, min.saturating_sub(1), max]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_have_a_sum_and_bounds() {
        let latency = Latency::default();
        assert_eq!(latency.get(), [0, 0, 0]);
        for micros in [7, 3, 0, 5] {
            latency.note(Duration::from_micros(micros));
        }
        assert_eq!(latency.get(), [15, 0, 7]);
    }
}
