//! What a block device counts.

use std::time::Instant;

use super::request::Status;
use super::task::{Op, Task};
use crate::counters::{Counter, Latency, Values};

/// What a block device has done.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Requests that are none.
    pub invalid: Counter,
    /// Requests that the host failed at.
    pub failed: Counter,
    pub flushes: Counter,
    pub queue_events: Counter,
    /// Requests that waited for the limits.
    pub throttled: Counter,
    pub limiter_events: Counter,
    /// Times that the driver called and had nothing.
    pub no_buffer: Counter,
    /// Times that requests waited for others to end.
    pub engine_throttled: Counter,
    /// What was still in the queue behind each request that was taken.
    remaining: Counter,
    /// New sizes, and images that did not come.
    pub updates: Counter,
    pub update_fails: Counter,
    reads: Transfers,
    writes: Transfers,
}

#[derive(Debug, Default)]
struct Transfers {
    count: Counter,
    bytes: Counter,
    latency: Latency,
}

impl Transfers {
    fn note(&self, task: &Task, now: Instant) {
        self.count.add_alone(1);
        self.bytes.add_alone(task.weight);
        let begun = task.begun.unwrap_or(now);
        self.latency.note(now.saturating_duration_since(begun));
    }
}

impl Counters {
    /// A request was taken from its queue, behind which there are so many.
    pub fn popped(&self, remaining: u16) {
        self.remaining.add_alone(remaining.into());
    }

    /// A task came to its end, at about `now`.
    pub fn ended(&self, task: &Task, status: Status, now: Instant) {
        match (status, &task.op) {
            (Status::IoError | Status::Unsupported, _) => self.failed.one(),
            (Status::Ok, Op::Read) => self.reads.note(task, now),
            (Status::Ok, Op::Write { .. }) => self.writes.note(task, now),
            (Status::Ok, Op::Flush) => self.flushes.one(),
            (Status::Ok, Op::Discard(_) | Op::Zero { .. }) => {}
        }
    }

    /// All of them.
    pub fn values(&self) -> Values {
        let [read_sum, read_min, read_max] = self.reads.latency.get();
        let [write_sum, write_min, write_max] = self.writes.latency.get();
        vec![
            ("invalid_reqs_count", self.invalid.get()),
            ("execute_fails", self.failed.get()),
            ("flush_count", self.flushes.get()),
            ("queue_event_count", self.queue_events.get()),
            ("rate_limiter_throttled_events", self.throttled.get()),
            ("rate_limiter_event_count", self.limiter_events.get()),
            ("no_avail_buffer", self.no_buffer.get()),
            ("io_engine_throttled_events", self.engine_throttled.get()),
            ("remaining_reqs_count", self.remaining.get()),
            ("update_count", self.updates.get()),
            ("update_fails", self.update_fails.get()),
            ("read_bytes", self.reads.bytes.get()),
            ("read_count", self.reads.count.get()),
            ("write_bytes", self.writes.bytes.get()),
            ("write_count", self.writes.count.get()),
            ("read_agg.sum_us", read_sum),
            ("read_agg.min_us", read_min),
            ("read_agg.max_us", read_max),
            ("write_agg.sum_us", write_sum),
            ("write_agg.min_us", write_min),
            ("write_agg.max_us", write_max),
        ]
    }
}
