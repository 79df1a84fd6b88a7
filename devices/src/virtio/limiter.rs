//! Token buckets for bandwidth and operations, shared by a device or by a group of devices.
//!
//! A request is charged when it comes; if that leaves a bucket in debt, the request starts when
//! the debt is paid. So requests of several devices are served in the order they came, a request
//! larger than the bucket is only late, and a timer is set for a computed moment.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::lock;

/// One token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketConfig {
    /// Tokens it holds: bytes, or operations.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills.
    pub refill_time: u64,
    /// Tokens on top that are there once and do not come back.
    #[serde(default)]
    pub one_time_burst: u64,
}

/// Limits of one limiter; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimiterConfig {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<BucketConfig>,
    /// Operations.
    #[serde(default)]
    pub ops: Option<BucketConfig>,
}

#[derive(Debug)]
struct Bucket {
    size: f64,
    per_second: f64,
    burst: f64,
    tokens: f64,
    last: Instant,
}

impl Bucket {
    /// `None` for a bucket that limits nothing.
    fn new(config: BucketConfig, now: Instant) -> Option<Self> {
        if config.size == 0 || config.refill_time == 0 {
            return None;
        }
        let size = config.size as f64;
        Some(Self {
            size,
            per_second: size * 1000.0 / config.refill_time as f64,
            burst: config.one_time_burst as f64,
            tokens: size,
            last: now,
        })
    }

    /// Charges `cost` and says how long to wait.
    fn charge(&mut self, now: Instant, cost: u64) -> Duration {
        let passed = now.saturating_duration_since(self.last);
        self.last = now.max(self.last);
        let refilled = self.tokens + passed.as_secs_f64() * self.per_second;
        self.tokens = refilled.min(self.size);
        let cost = cost as f64;
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        self.tokens -= cost - from_burst;
        let wait = (-self.tokens / self.per_second).max(0.0);
        Duration::try_from_secs_f64(wait).unwrap_or(Duration::MAX)
    }
}

#[derive(Debug)]
struct Buckets {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

/// A limiter. Devices that share one share its limits.
#[derive(Debug)]
pub struct Limiter(Mutex<Buckets>);

impl Limiter {
    /// A limiter with full buckets.
    pub fn new(config: LimiterConfig) -> Self {
        Self(Mutex::new(Self::buckets(config)))
    }

    fn buckets(config: LimiterConfig) -> Buckets {
        let now = Instant::now();
        Buckets {
            bandwidth: config.bandwidth.and_then(|b| Bucket::new(b, now)),
            ops: config.ops.and_then(|b| Bucket::new(b, now)),
        }
    }

    /// Replaces the limits, with full buckets.
    pub fn set(&self, config: LimiterConfig) {
        *lock(&self.0) = Self::buckets(config);
    }

    /// Replaces the buckets that are given, with full ones; those that are absent go on as they are.
    pub fn update(&self, config: LimiterConfig) {
        let new = Self::buckets(config);
        let mut buckets = lock(&self.0);
        if config.bandwidth.is_some() {
            buckets.bandwidth = new.bandwidth;
        }
        if config.ops.is_some() {
            buckets.ops = new.ops;
        }
    }

    /// Charges one operation of `bytes` if it may start now; says whether it may. For what is dropped
    /// rather than late.
    pub fn take(&self, now: Instant, bytes: u64) -> bool {
        let mut buckets = lock(&self.0);
        let Buckets { bandwidth, ops } = &mut *buckets;
        let has = |bucket: &mut Option<Bucket>, cost| {
            let bucket = bucket.as_mut();
            bucket.is_none_or(|b| b.charge(now, 0).is_zero() && b.tokens + b.burst >= cost)
        };
        let may = has(bandwidth, bytes as f64) && has(ops, 1.0);
        if may {
            for (bucket, cost) in [(bandwidth, bytes), (ops, 1)] {
                bucket.as_mut().map(|bucket| bucket.charge(now, cost));
            }
        }
        may
    }

    /// Takes a charge back, of an operation of `bytes` that has not started and is charged again when
    /// it comes again. What it took of a burst comes back as tokens, as far as there is room.
    pub fn refund(&self, bytes: u64) {
        let mut buckets = lock(&self.0);
        let Buckets { bandwidth, ops } = &mut *buckets;
        for (bucket, cost) in [(bandwidth, bytes), (ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.tokens = (bucket.tokens + cost as f64).min(bucket.size);
            }
        }
    }

    /// Charges one operation of `bytes`: `None` if it may start, else when it may.
    pub fn charge(&self, now: Instant, bytes: u64) -> Option<Instant> {
        let mut buckets = lock(&self.0);
        let bandwidth = buckets.bandwidth.as_mut().map(|b| b.charge(now, bytes));
        let ops = buckets.ops.as_mut().map(|b| b.charge(now, 1));
        let wait = bandwidth.max(ops).filter(|wait| !wait.is_zero())?;
        // A moment too far to name is a year away.
        let year = Duration::from_secs(365 * 24 * 3600);
        Some(now + wait.min(year))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn bucket(size: u64, refill_time: u64, one_time_burst: u64) -> Option<BucketConfig> {
        Some(BucketConfig {
            size,
            refill_time,
            one_time_burst,
        })
    }

    #[test]
    fn the_rate_holds_over_time() {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: bucket(1000, 100, 0),
            ops: None,
        });
        let start = Instant::now();
        let mut now = start;
        // 1000 bytes at once, then 10 000 bytes per second: 100 requests of 300 bytes.
        for _ in 0..100 {
            now = limiter.charge(now, 300).unwrap_or(now);
        }
        let expected = (100.0 * 300.0 - 1000.0) / 10_000.0;
        assert!(((now - start).as_secs_f64() - expected).abs() < 0.001);
    }

    #[test]
    fn a_burst_comes_once_and_large_requests_pass() {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: bucket(100, 1000, 500),
            ops: None,
        });
        let now = Instant::now();
        assert_eq!(limiter.charge(now, 600), None);
        let at = limiter.charge(now, 1000).unwrap();
        assert!((at - now).abs_diff(Duration::from_secs(10)) < Duration::from_millis(1));
        let later = at + Duration::from_secs(100);
        assert_eq!(limiter.charge(later, 100), None);
        assert!(limiter.charge(later, 1).is_some());
    }

    #[test]
    fn what_did_not_start_is_charged_once() {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: bucket(100, 1000, 0),
            ops: bucket(1000, 1000, 0),
        });
        let now = Instant::now();
        assert_eq!(limiter.charge(now, 100), None);
        let at = limiter.charge(now, 50);
        for _ in 0..10 {
            limiter.refund(50);
            assert_eq!(limiter.charge(now, 50), at);
        }
        limiter.refund(u64::MAX);
        assert_eq!(limiter.charge(now, 100), None);
        assert!(limiter.charge(now, 1).is_some(), "more than it holds");
    }

    #[test]
    fn what_is_taken_is_there() {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: bucket(100, 1000, 10),
            ops: None,
        });
        let now = Instant::now();
        assert!(limiter.take(now, 60) && !limiter.take(now, 60) && limiter.take(now, 50));
        assert!(!limiter.take(now, 1));
        assert!(limiter.take(now + Duration::from_millis(500), 49));
        assert!(!limiter.take(now + Duration::from_millis(500), 2));
    }

    #[test]
    fn an_update_leaves_what_it_does_not_name() {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: bucket(100, 1000, 0),
            ops: bucket(1, 1000, 0),
        });
        let now = Instant::now();
        assert_eq!(limiter.charge(now, 100), None);
        limiter.update(LimiterConfig {
            bandwidth: None,
            ops: bucket(0, 0, 0),
        });
        assert_eq!(limiter.charge(now, 0), None);
        assert!(limiter.charge(now, 50).is_some());
    }

    #[test]
    fn the_tighter_bucket_counts_and_zero_is_no_limit() {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: bucket(1 << 40, 1, 0),
            ops: bucket(2, 1000, 0),
        });
        let now = Instant::now();
        assert_eq!(limiter.charge(now, 1), None);
        assert_eq!(limiter.charge(now, 1), None);
        let at = limiter.charge(now, 1).unwrap();
        assert!((at - now).abs_diff(Duration::from_millis(500)) < Duration::from_millis(1));
        limiter.set(LimiterConfig {
            bandwidth: bucket(0, 10, 0),
            ops: bucket(10, 0, 0),
        });
        assert_eq!(limiter.charge(now, u64::MAX), None);
        let absurd = LimiterConfig {
            bandwidth: bucket(1, u64::MAX, 0),
            ops: None,
        };
        limiter.set(absurd);
        assert!(limiter.charge(now, u64::MAX).is_some());
    }
}
