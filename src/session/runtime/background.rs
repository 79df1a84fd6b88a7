//! Snapshots that are written while the guest goes on, seen from the vmm thread: one at a time, announced
//! as an event and among the statistics when it ends.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::Runtime;
use crate::control::{
    ActionError, Event, PAUSE_PATIENCE, Reply, SnapshotCreate, SnapshotState, SnapshotStatistics,
    State, chain,
};
use crate::session::agent::AgentLink;
use crate::session::meter::{Meter, Task};
use crate::session::signals::Signals;
use crate::session::snapshots::Begun;
use crate::snapshot::background::Background;
use crate::telemetry::tell;
use crate::vm::Vm;

/// What the epoll set says of the snapshot that is being written.
const ENDED: u64 = 5;
/// Why one failed that nobody wanted any more.
const CANCELLED: &str = "it was cancelled";

/// The snapshot that is being written, and how the last one went.
#[derive(Debug, Default)]
pub struct Behind {
    now: Option<Background>,
    last: Option<SnapshotStatistics>,
}

impl Behind {
    /// Where one is being written.
    pub fn path(&self) -> Option<&Path> {
        self.now.as_ref().map(Background::path)
    }

    /// As [`path`](Self::path), where memory is protected meanwhile and has to stay as it is mapped.
    pub fn protecting(&self) -> Option<&Path> {
        let now = self.now.as_ref().filter(|now| now.is_protecting());
        now.map(Background::path)
    }

    /// The last one.
    pub fn statistics(&self) -> Option<SnapshotStatistics> {
        self.last.clone()
    }

    /// Takes in how far it is, and that it has ended.
    fn look(&mut self) -> Option<Event> {
        let now = self.now.as_mut()?;
        let result = now.ended();
        let path = now.path().to_owned();
        let last = self.last.as_mut();
        let Some(result) = result else {
            let [written_bytes, total_bytes] = now.progress()?;
            if let Some(last) = last {
                (last.written_bytes, last.total_bytes) = (written_bytes, total_bytes);
            }
            return Some(Event::SnapshotProgress {
                path,
                written_bytes,
                total_bytes,
            });
        };
        self.now = None;
        Some(match result {
            Ok(()) => {
                if let Some(last) = last {
                    last.state = SnapshotState::Saved;
                }
                Event::SnapshotSaved { path }
            }
            Err(error) => {
                log::error!("the snapshot {} was not saved: {error}", path.display());
                if let Some(last) = last {
                    last.state = SnapshotState::Failed;
                    last.error = Some(error.clone());
                }
                Event::SnapshotFailed { path, error }
            }
        })
    }

    /// Ends what is being written; its temporary files go with it. It may have been saved all the same.
    fn cancel(&mut self) -> Option<Event> {
        let now = self.now.take()?;
        let path = now.path().to_owned();
        let saved = now.cancel().is_ok();
        let error = CANCELLED.to_owned();
        if let Some(last) = &mut self.last {
            (last.state, last.error) = match saved {
                true => (SnapshotState::Saved, None),
                false => (SnapshotState::Failed, Some(error.clone())),
            };
        }
        Some(match saved {
            true => Event::SnapshotSaved { path },
            false => Event::SnapshotFailed { path, error },
        })
    }

    /// Waits for the end of what is being written, of a machine that has ended itself; a signal that ends
    /// machines cuts it short.
    pub fn finish(mut self, signals: &mut Signals) {
        while let Some(now) = &self.now {
            let mut fds = [
                PollFd::new(now.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            let waited = poll(&mut fds, PollTimeout::NONE);
            let [_, interrupted] = fds.map(|fd| fd.any().unwrap_or(false));
            if interrupted && signals.ending() || waited.is_err_and(|errno| errno != Errno::EINTR) {
                if let Some(Event::SnapshotFailed { path, .. }) = self.cancel() {
                    let path = path.display();
                    tell(format_args!(
                        "the snapshot {path} was not saved: interrupted"
                    ));
                }
                return;
            }
            if let Some(Event::SnapshotFailed { path, error }) = self.look() {
                let path = path.display();
                tell(format_args!("the snapshot {path} was not saved: {error}"));
            }
        }
    }
}

impl Runtime {
    /// Ends the snapshot that is being written in the background; what was there before stays.
    pub(super) fn cancel_behind(&mut self) -> Result<Reply, ActionError> {
        // One that has just ended is not cancelled.
        self.look_at_snapshot();
        let event = self.behind.cancel().ok_or(ActionError::NoSnapshot)?;
        self.events.emit(&event);
        match event {
            Event::SnapshotFailed { .. } => Ok(Reply::Done),
            _ => Err(ActionError::NoSnapshot),
        }
    }

    /// Tells of the snapshot that was written in the background, if it has come to its end.
    pub(super) fn look_at_snapshot(&mut self) {
        if let Some(event) = self.behind.look() {
            self.events.emit(&event);
        }
    }

    /// Hands over what is being written.
    pub fn take_behind(&mut self) -> Behind {
        std::mem::take(&mut self.behind)
    }

    /// Saves the machine while it goes on. One that runs stands still for a moment.
    pub(super) fn save_behind(
        &mut self,
        create: &SnapshotCreate,
        vm: &Vm,
        agent: Option<&mut AgentLink>,
    ) -> Result<Reply, ActionError> {
        let prepared = self.saver.prepare(vm, create)?;
        let running = self.instance.state == State::Running;
        let begin = Instant::now();
        let stands = match running {
            true => vm.pause(PAUSE_PATIENCE),
            false => Ok(()),
        };
        // What the guest has just ejected is not part of it.
        self.settle_unplugs(vm);
        let cancelled = create.cancellable.then(|| self.cancelled.clone());
        let path = &create.snapshot_path;
        let meter = Meter::new(Task::Write, path, cancelled, &mut self.events);
        let watch = |done, total| meter.watch(done, total);
        let begun = match &stands {
            Ok(()) => self
                .saver
                .keep_talk(vm, agent)
                .and_then(|()| self.saver.begin(vm, &self.config, create, prepared, &watch)),
            Err(error) => Err(ActionError::Failed { text: chain(error) }),
        };
        meter.give_back(&mut self.events);
        let begun = match begun {
            Err(_) if meter.is_cancelled() => Err(ActionError::Cancelled),
            begun => begun,
        };
        if running {
            vm.start();
        }
        let pause = begin.elapsed();
        self.saved_behind(create, begun?, pause)
    }

    fn saved_behind(
        &mut self,
        create: &SnapshotCreate,
        begun: Begun,
        pause: Duration,
    ) -> Result<Reply, ActionError> {
        self.latencies
            .insert("background_create_snapshot".to_owned(), pause);
        let path = create.snapshot_path.clone();
        let mut last = SnapshotStatistics {
            state: SnapshotState::Writing,
            path: path.clone(),
            pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
            written_bytes: 0,
            total_bytes: 0,
            error: None,
            waited: None,
        };
        match begun {
            Begun::Writing(background) => {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, ENDED);
                let watched = self.ready.add(&background, event);
                watched.map_err(|errno| ActionError::Save {
                    text: errno.to_string(),
                })?;
                self.behind.now = Some(background);
            }
            Begun::Written(why) => {
                log::warn!("the guest stood still until its snapshot was written: {why}");
                last.state = SnapshotState::Saved;
                last.waited = Some(why.to_owned());
                self.events.emit(&Event::SnapshotSaved { path });
            }
        }
        self.behind.last = Some(last);
        Ok(Reply::Done)
    }
}
