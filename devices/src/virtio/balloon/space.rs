//! Configuration space (section 5.5.4) and what else vCPU threads, the I/O thread and the handle
//! share of a balloon.

use std::sync::Mutex;
use std::time::Duration;

use super::super::device::{ConfigSpace, read_config};
use super::stats::Statistics;
use super::{BalloonState, CMD_DONE, CMD_STOP};
use crate::lock;

/// Where the driver's `actual` is.
const ACTUAL: u64 = 4;

/// All of it under one lock that is held for a few instructions.
#[derive(Debug)]
pub(super) struct Space(Mutex<Inner>);

#[derive(Clone, Debug)]
pub(super) struct Inner {
    /// 4 KiB pages that the host wants to have.
    pub num_pages: u32,
    /// 4 KiB pages that the driver says it gave.
    pub actual: u32,
    /// Command of the host to hint free pages.
    pub host_cmd: u32,
    /// Command that the driver works on.
    pub guest_cmd: u32,
    /// The host's command becomes "done" when the driver has hinted all.
    pub acknowledge: bool,
    /// Highest command that was given.
    pub last_cmd: u32,
    /// How often the driver is asked for statistics; zero: never.
    pub interval: Duration,
    pub statistics: Option<Statistics>,
    generation: u32,
}

impl Space {
    pub fn new(state: BalloonState, num_pages: u32, interval: Duration) -> Self {
        Self(Mutex::new(Inner {
            num_pages: state.num_pages.unwrap_or(num_pages),
            actual: state.actual,
            host_cmd: state.host_cmd,
            guest_cmd: state.guest_cmd,
            acknowledge: state.acknowledge,
            last_cmd: state.last_cmd.max(CMD_DONE),
            interval,
            statistics: None,
            generation: 0,
        }))
    }

    pub fn state(&self) -> BalloonState {
        let inner = self.get();
        BalloonState {
            num_pages: Some(inner.num_pages),
            actual: inner.actual,
            host_cmd: inner.host_cmd,
            guest_cmd: inner.guest_cmd,
            acknowledge: inner.acknowledge,
            last_cmd: inner.last_cmd,
        }
    }

    pub fn get(&self) -> Inner {
        lock(&self.0).clone()
    }

    /// Changes what no driver sees.
    pub fn update(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut lock(&self.0));
    }

    /// Changes what the driver sees.
    pub fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = lock(&self.0);
        change(&mut inner);
        inner.generation = inner.generation.wrapping_add(1);
    }

    /// The driver is gone, and all pages are the guest's again.
    pub fn reset(&self) {
        self.update(|inner| {
            inner.actual = 0;
            inner.host_cmd = CMD_STOP;
            inner.guest_cmd = CMD_STOP;
            inner.acknowledge = false;
            inner.last_cmd = CMD_DONE;
            inner.statistics = None;
        });
    }
}

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.get();
        // Page poisoning is not offered, so there is no value of it.
        let words = [inner.num_pages, inner.actual, inner.host_cmd, 0];
        read_config(words.map(u32::to_le_bytes).as_flattened(), offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> bool {
        let mut taken = false;
        let mut inner = lock(&self.0);
        let mut actual = inner.actual.to_le_bytes();
        for (at, byte) in (0..).zip(data) {
            let at = offset.checked_add(at).and_then(|at| at.checked_sub(ACTUAL));
            let at = at.and_then(|at| usize::try_from(at).ok());
            if let Some(to) = at.and_then(|at| actual.get_mut(at)) {
                *to = *byte;
                taken = true;
            }
        }
        inner.actual = u32::from_le_bytes(actual);
        taken
    }

    fn generation(&self) -> u32 {
        lock(&self.0).generation
    }
}
