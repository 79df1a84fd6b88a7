//! What a balloon counts.

use super::Balloon;
use crate::counters::{Counter, Values};
use crate::virtio::discard::Discarded;

/// What a balloon has done. Its I/O thread adds, others read.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub inflations: Counter,
    pub deflations: Counter,
    pub statistics: Counter,
    pub hints: GivenBack,
    pub reports: GivenBack,
}

/// What was given back in one way.
#[derive(Debug, Default)]
pub(super) struct GivenBack {
    /// Chains of it.
    pub times: Counter,
    bytes: Counter,
    refused: Counter,
}

impl GivenBack {
    /// `discarded` had these bytes and refusals before.
    fn note(&self, (bytes, refused): (u64, u32), discarded: &Discarded) {
        self.bytes.add(discarded.bytes().saturating_sub(bytes));
        let refused = discarded.refused().saturating_sub(refused);
        self.refused.add(refused.into());
    }
}

impl Counters {
    /// All of them.
    pub fn values(&self) -> Values {
        let Self { hints, reports, .. } = self;
        vec![
            ("inflate_count", self.inflations.get()),
            ("deflate_count", self.deflations.get()),
            ("stats_updates_count", self.statistics.get()),
            ("free_page_hint_count", hints.times.get()),
            ("free_page_hint_freed", hints.bytes.get()),
            ("free_page_hint_fails", hints.refused.get()),
            ("free_page_report_count", reports.times.get()),
            ("free_page_report_freed", reports.bytes.get()),
            ("free_page_report_fails", reports.refused.get()),
        ]
    }
}

impl Balloon {
    /// Counts what the host gets back by `work`.
    pub(super) fn counted<T>(
        &mut self,
        whose: fn(&Counters) -> &GivenBack,
        work: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let before = (self.discarded.bytes(), self.discarded.refused());
        let done = work(self);
        whose(&self.counters).note(before, &self.discarded);
        done
    }
}
