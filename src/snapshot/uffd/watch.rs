//! Who brings a guest's memory is watched, and the VM ends without him.
//!
//! A [`Provider`] is another process behind a socket, or bulle itself. A thread of its own attends to it,
//! since any other may stand in a fault; what still stands when the VM should have ended goes with the
//! process.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::handler::HandlerError;
use crate::sandbox::thread::{Role, spawn};
use crate::telemetry::tell;
use crate::vm::{ExitLatch, VmExit};

/// How long the handler may take for what is touched while the machine is made.
const LOAD_PATIENCE: Duration = Duration::from_secs(60);
/// How long threads may stand in faults when the VM should end.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// Exit code of a process that has to be ended (docs/exit-codes.md).
const CODE_FAILURE: i32 = 125;

/// The handler lost its connection, or never answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandlerLost {
    /// Its end of the socket is closed.
    #[error(
        "the page fault handler at {} closed its connection: nobody brings the guest's memory any more",
        path.display()
    )]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// bulle itself cannot bring a page.
    #[error("cannot bring the guest's memory from {}: {error}", path.display())]
    Failed {
        /// The memory file.
        path: PathBuf,
        /// What went wrong.
        error: String,
    },
    /// A fault stands for too long.
    #[error(
        "the page fault handler at {} does not bring memory that is needed to {what} within {patience:?}",
        path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// For what.
        what: &'static str,
        /// How long it had.
        patience: Duration,
    },
}

/// Who brings memory.
pub trait Provider: Send + 'static {
    /// Readable when there is something to attend to.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Attends to what there is, without waiting.
    ///
    /// # Errors
    /// Nobody brings memory any more.
    fn attend(&mut self) -> Result<(), HandlerLost>;

    /// Does a piece of what nobody waits for; whether there is more.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    fn idle(&mut self) -> Result<bool, HandlerLost> {
        Ok(false)
    }

    /// Whether it answers every fault unless it says that it is lost, so that nobody has to wait for it.
    fn always_answers(&self) -> bool {
        false
    }

    /// What to say where memory that is needed to do `what` does not come within `patience`.
    fn silent(&self, what: &'static str, patience: Duration) -> HandlerLost;
}

/// What a machine is at, for whoever watches its handler.
const LOADING: u8 = 0;
const LOADED: u8 = 1;
const ENDING: u8 = 2;
const GONE: u8 = 3;

/// What both sides of the watch share.
struct Shared {
    phase: AtomicU8,
    changed: EventFd,
}

/// Watches a handler, and has the VM end without it. Faults wait while it lives.
pub struct Watched {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watched {
    /// Watches `provider` from now on; its end is announced to `exit`.
    ///
    /// # Errors
    /// Without a descriptor or a thread left.
    pub fn new(provider: impl Provider, exit: &Arc<ExitLatch>) -> Result<Self, HandlerError> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(HandlerError::Event)?;
        let shared = Arc::new(Shared {
            phase: AtomicU8::new(LOADING),
            changed,
        });
        let watch = Watch {
            provider,
            shared: shared.clone(),
            exit: exit.clone(),
            lost: None,
            // What it has to do before the first fault.
            busy: true,
            deadline: Some((Instant::now() + LOAD_PATIENCE, "load the machine")),
        };
        let thread = spawn(Role::Pager, move || watch.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The machine is made.
    pub fn loaded(&self) {
        self.enter(LOADED);
    }

    /// The VM ends: no fault is to keep it from that.
    pub fn ending(&self) {
        self.enter(ENDING);
    }

    fn enter(&self, phase: u8) {
        self.shared.phase.fetch_max(phase, Ordering::SeqCst);
        if let Err(error) = self.shared.changed.write(1) {
            log::error!("the page fault handler's watch is not told of a change: {error}");
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.enter(GONE);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the page fault handler's watch panicked");
        }
    }
}

/// Whoever stands in a fault would do so for ever, so a panic of the thread is the process's end.
pub(super) struct EndsWithPanic;

impl Drop for EndsWithPanic {
    fn drop(&mut self) {
        end_process("the thread that brings the guest's memory panicked");
    }
}

/// Says why, and ends the process: nothing else can end a thread that stands in a fault.
pub(super) fn end_process(why: impl std::fmt::Display) -> ! {
    tell(why);
    std::process::exit(CODE_FAILURE)
}

/// What the thread has.
struct Watch<P> {
    provider: P,
    shared: Arc<Shared>,
    exit: Arc<ExitLatch>,
    lost: Option<HandlerLost>,
    /// The provider has work that nobody waits for.
    busy: bool,
    /// When the process ends, whatever stands in a fault, and what it is waiting for.
    deadline: Option<(Instant, &'static str)>,
}

impl<P: Provider> Watch<P> {
    fn run(mut self) {
        let panic = EndsWithPanic;
        self.attend_until_gone();
        std::mem::forget(panic);
    }

    fn attend_until_gone(&mut self) {
        loop {
            match self.shared.phase.load(Ordering::SeqCst) {
                LOADED if self.lost.is_none() => self.deadline = None,
                ENDING => self.end_soon(),
                GONE => return,
                _ => {}
            }
            self.wait();
            if self.deadline.is_some_and(|(at, _)| Instant::now() >= at) {
                self.give_up();
            }
        }
    }

    fn end_soon(&mut self) {
        if self.provider.always_answers() && self.lost.is_none() {
            return;
        }
        let at = Instant::now() + END_PATIENCE;
        match &mut self.deadline {
            Some((before, _)) if *before <= at => {}
            deadline => *deadline = Some((at, "end the machine")),
        }
    }

    /// Waits until something happens or time is up, and takes in what it is.
    fn wait(&mut self) {
        let timeout = match (self.busy, self.deadline) {
            (true, _) => PollTimeout::ZERO,
            (false, None) => PollTimeout::NONE,
            (false, Some((at, _))) => {
                let left = at.saturating_duration_since(Instant::now());
                // One more, so that it is over then.
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        // SAFETY: the descriptor is open as long as `self`.
        let changed = unsafe { BorrowedFd::borrow_raw(AsRawFd::as_raw_fd(&self.shared.changed)) };
        let mut fds = [
            PollFd::new(changed, PollFlags::POLLIN),
            PollFd::new(self.provider.fd(), PollFlags::POLLIN),
        ];
        let watched = if self.lost.is_none() { 2 } else { 1 };
        let fds = fds.get_mut(..watched).unwrap_or_default();
        if let Err(errno) = poll(fds, timeout) {
            log::debug!("waiting for who brings memory was interrupted: {errno}");
            return;
        }
        let _ = self.shared.changed.read();
        if self.lost.is_some() {
            return;
        }
        match self.provider.attend().and_then(|()| self.provider.idle()) {
            Ok(busy) => self.busy = busy,
            Err(lost) => self.lose(lost),
        }
    }

    fn lose(&mut self, lost: HandlerLost) {
        self.exit.set(VmExit::HandlerLost(lost.clone()));
        self.lost = Some(lost);
        self.busy = false;
        self.end_soon();
    }

    fn give_up(&self) -> ! {
        let silent = || {
            let patience = match self.shared.phase.load(Ordering::SeqCst) {
                LOADING => LOAD_PATIENCE,
                _ => END_PATIENCE,
            };
            let what = self.deadline.map_or("end", |(_, what)| what);
            self.provider.silent(what, patience)
        };
        let lost = self.lost.clone().unwrap_or_else(silent);
        end_process(lost)
    }
}
