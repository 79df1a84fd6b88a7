//! How long exits took to be answered, by reason. The vCPU's thread alone writes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Nanoseconds that exits of one reason took.
#[derive(Debug, Default)]
pub struct Spent {
    sum: AtomicU64,
    /// The shortest plus one, so that zero is none.
    least: AtomicU64,
    most: AtomicU64,
}

impl Spent {
    /// One was begun to be answered at `begin`, and is now.
    pub fn note(&self, begin: Instant) {
        let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX - 1);
        let least = self.least.load(Ordering::Relaxed);
        if least == 0 || nanos < least - 1 {
            self.least.store(nanos.saturating_add(1), Ordering::Relaxed);
        }
        if nanos > self.most.load(Ordering::Relaxed) {
            self.most.store(nanos, Ordering::Relaxed);
        }
        // One writer needs no locked instruction.
        let sum = self.sum.load(Ordering::Relaxed).wrapping_add(nanos);
        self.sum.store(sum, Ordering::Relaxed);
    }

    /// Nanoseconds in all, the fewest if there was any, and the most.
    pub fn get(&self) -> (u64, Option<u64>, u64) {
        let [sum, least, most] =
            [&self.sum, &self.least, &self.most].map(|value| value.load(Ordering::Relaxed));
        (sum, least.checked_sub(1), most)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_sum_and_the_bounds_are_kept() {
        let spent = Spent::default();
        assert_eq!(spent.get(), (0, None, 0));
        let ago = |millis| Instant::now() - Duration::from_millis(millis);
        for millis in [20, 10, 30] {
            spent.note(ago(millis));
        }
        let (sum, least, most) = spent.get();
        let millis = |nanos| nanos / 1_000_000;
        assert!(millis(sum) >= 60 && millis(least.unwrap()) >= 10 && millis(most) >= 30);
        assert!(least.unwrap() < most && sum >= most + 2 * least.unwrap());
    }
}
