//! What a network device counts. Its I/O thread adds, others read.

use std::time::Instant;

use crate::counters::{Counter, Latency, Values};

/// Log lines of one direction.
const MAX_LOGGED: u64 = 4;

/// What passed in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that got through.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that were lost here.
    pub dropped: u64,
}

/// One direction: frames and bytes are without headers of virtio.
#[derive(Debug, Default)]
pub(super) struct Direction {
    frames: Counter,
    bytes: Counter,
    dropped: Counter,
    pub queue_events: Counter,
    /// Times that a limit was waited for, and that it was over.
    pub throttled: Counter,
    pub limiter_events: Counter,
    /// Times that the driver had no buffer.
    pub no_buffer: Counter,
}

impl Direction {
    pub fn passed(&self, bytes: u64) {
        self.frames.one();
        self.bytes.add(bytes);
    }

    /// Whether a moment to wait for is still to come; forgets one that is not.
    pub fn must_wait(&self, until: &mut Option<Instant>) -> Option<Instant> {
        let at = (*until)?;
        *until = (at > Instant::now()).then_some(at);
        match until {
            Some(_) => self.throttled.one(),
            None => self.limiter_events.one(),
        }
        *until
    }

    /// Says why, the first times.
    pub fn dropped(&self, why: &str) {
        self.dropped.one();
        if self.dropped.get() <= MAX_LOGGED {
            log::debug!("a network frame is dropped: {why}");
        }
    }

    pub fn traffic(&self) -> Traffic {
        Traffic {
            frames: self.frames.get(),
            bytes: self.bytes.get(),
            dropped: self.dropped.get(),
        }
    }
}

/// Both directions.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub rx: Direction,
    pub tx: Direction,
    /// The host's end has something.
    pub host_events: Counter,
    /// The host's end is lost.
    pub host_lost: Counter,
    /// Frames that are none, of those that were dropped.
    pub malformed: Counter,
    /// Frames of another address than the device's, which pass as they do with Firecracker.
    pub spoofed: Counter,
    /// What was still in the queue behind each frame that was taken from the driver.
    pub remaining: Counter,
    /// How long the host took for a frame.
    pub writes: Latency,
}

impl Counters {
    /// All of them.
    pub fn values(&self) -> Values {
        let Self { rx, tx, .. } = self;
        let (lost, malformed) = (self.host_lost.get(), self.malformed.get());
        let [write_sum, write_min, write_max] = self.writes.get();
        let refused = tx.dropped.get().saturating_sub(malformed);
        vec![
            ("rx_queue_event_count", rx.queue_events.get()),
            ("rx_event_rate_limiter_count", rx.limiter_events.get()),
            ("rx_rate_limiter_throttled", rx.throttled.get()),
            ("no_rx_avail_buffer", rx.no_buffer.get()),
            ("rx_tap_event_count", self.host_events.get()),
            ("rx_bytes_count", rx.bytes.get()),
            ("rx_packets_count", rx.frames.get()),
            ("rx_count", rx.frames.get()),
            ("rx_fails", rx.dropped.get() + lost),
            ("tap_read_fails", lost),
            ("tx_queue_event_count", tx.queue_events.get()),
            ("tx_rate_limiter_event_count", tx.limiter_events.get()),
            ("tx_rate_limiter_throttled", tx.throttled.get()),
            ("no_tx_avail_buffer", tx.no_buffer.get()),
            ("tx_bytes_count", tx.bytes.get()),
            ("tx_packets_count", tx.frames.get()),
            ("tx_count", tx.frames.get()),
            ("tx_remaining_reqs_count", self.remaining.get()),
            ("tx_malformed_frames", malformed),
            ("tx_spoofed_mac_count", self.spoofed.get()),
            ("tap_write_agg.sum_us", write_sum),
            ("tap_write_agg.min_us", write_min),
            ("tap_write_agg.max_us", write_max),
            ("tx_fails", refused),
            ("tap_write_fails", refused),
        ]
    }
}
