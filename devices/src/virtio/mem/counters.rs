//! What a memory device counts.

use std::time::Duration;

use super::{ACK, PLUG, STATE, UNPLUG, UNPLUG_ALL};
use crate::counters::{Counter, Latency, Values};

/// What a memory device has done. Its I/O thread adds, others read.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub queue_events: Counter,
    plug: Requests,
    unplug: Requests,
    unplug_all: Requests,
    state: Requests,
}

/// Requests of one kind.
#[derive(Debug, Default)]
struct Requests {
    count: Counter,
    /// Those that were refused.
    fails: Counter,
    bytes: Counter,
    latency: Latency,
}

impl Counters {
    /// A request of this `kind` was answered, and changed as much.
    pub fn answered(&self, kind: u16, answer: u16, bytes: u64, took: Duration) {
        let requests = match kind {
            PLUG => &self.plug,
            UNPLUG => &self.unplug,
            UNPLUG_ALL => &self.unplug_all,
            STATE => &self.state,
            _ => return,
        };
        requests.count.one();
        requests.fails.add(u64::from(answer != ACK));
        requests.bytes.add(bytes);
        requests.latency.note(took);
    }

    /// All of them.
    pub fn values(&self) -> Values {
        let Self {
            plug,
            unplug,
            unplug_all,
            state,
            ..
        } = self;
        let latency = |requests: &Requests| requests.latency.get();
        let [plug_sum, plug_min, plug_max] = latency(plug);
        let [unplug_sum, unplug_min, unplug_max] = latency(unplug);
        let [all_sum, all_min, all_max] = latency(unplug_all);
        let [state_sum, state_min, state_max] = latency(state);
        vec![
            ("queue_event_count", self.queue_events.get()),
            ("plug_count", plug.count.get()),
            ("plug_bytes", plug.bytes.get()),
            ("plug_fails", plug.fails.get()),
            ("plug_agg.sum_us", plug_sum),
            ("plug_agg.min_us", plug_min),
            ("plug_agg.max_us", plug_max),
            ("unplug_count", unplug.count.get()),
            ("unplug_bytes", unplug.bytes.get()),
            ("unplug_fails", unplug.fails.get()),
            ("unplug_agg.sum_us", unplug_sum),
            ("unplug_agg.min_us", unplug_min),
            ("unplug_agg.max_us", unplug_max),
            ("unplug_all_count", unplug_all.count.get()),
            ("unplug_all_fails", unplug_all.fails.get()),
            ("unplug_all_agg.sum_us", all_sum),
            ("unplug_all_agg.min_us", all_min),
            ("unplug_all_agg.max_us", all_max),
            ("state_count", state.count.get()),
            ("state_fails", state.fails.get()),
            ("state_agg.sum_us", state_sum),
            ("state_agg.min_us", state_min),
            ("state_agg.max_us", state_max),
        ]
    }
}
