//! Actions from other threads to the vmm thread: one at a time, answered in turn.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Action, ActionError, Reply};

/// An action that waits for its answer.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub action: Action,
    asked: Instant,
    reply: SyncSender<Result<Reply, ActionError>>,
}

impl Call {
    /// When it was asked.
    pub fn asked(&self) -> Instant {
        self.asked
    }

    /// Answers. A caller that is gone is no error.
    pub fn answer(self, result: Result<Reply, ActionError>) {
        let _ = self.reply.send(result);
    }
}

/// The asking end; a clone for each thread that asks.
#[derive(Debug)]
pub struct Caller {
    calls: Sender<Call>,
    event: EventFd,
}

impl Caller {
    /// Asks, and waits for the answer.
    pub fn ask(&self, action: Action) -> Result<Reply, ActionError> {
        let (reply, answer) = sync_channel(1);
        let asked = Instant::now();
        let call = Call {
            action,
            asked,
            reply,
        };
        let sent = self.calls.send(call);
        if sent.is_err() || self.event.write(1).is_err() {
            return Err(ActionError::Ended);
        }
        answer.recv().unwrap_or(Err(ActionError::Ended))
    }
}

/// The answering end, on the vmm thread. Its descriptor is readable when there are calls.
#[derive(Debug)]
pub struct Requests {
    calls: Receiver<Call>,
    event: EventFd,
}

impl Requests {
    /// The next call, if there is one.
    pub fn next(&self) -> Option<Call> {
        // Emptied before the look, so that a call that comes in between is announced again.
        let _ = self.event.read();
        self.calls.try_recv().ok()
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

impl AsRawFd for Requests {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// Both ends.
pub fn channel() -> io::Result<(Caller, Requests)> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (sender, calls) = std::sync::mpsc::channel();
    let caller = Caller {
        calls: sender,
        event: event.try_clone()?,
    };
    Ok((caller, Requests { calls, event }))
}
