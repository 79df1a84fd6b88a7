//! Actions from other threads to the vmm thread, which takes one at a time; an answer may come later.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, sync_channel};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Action, ActionError, Reply};

/// An action that waits for its answer.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub action: Action,
    asked: Instant,
    cancelled: Arc<AtomicBool>,
    /// `None` once it is answered.
    reply: Option<SyncSender<Result<Reply, ActionError>>>,
    answered: Arc<EventFd>,
}

impl Call {
    /// When it was asked.
    pub fn asked(&self) -> Instant {
        self.asked
    }

    /// Becomes true when nobody wants the answer any more.
    pub fn cancelled(&self) -> Arc<AtomicBool> {
        self.cancelled.clone()
    }

    /// Answers. A caller that is gone is no error.
    pub fn answer(mut self, result: Result<Reply, ActionError>) {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(result);
        }
    }
}

impl Drop for Call {
    /// Wakes the caller, also where there is no answer.
    fn drop(&mut self) {
        self.reply = None;
        // Only a counter at its maximum refuses, which wakes as well.
        let _ = self.answered.write(1);
    }
}

/// The asking end, for one thread.
#[derive(Debug)]
pub struct Caller {
    calls: Sender<Call>,
    event: EventFd,
    answered: Arc<EventFd>,
}

/// What was asked.
#[derive(Debug)]
pub struct Pending {
    answer: Receiver<Result<Reply, ActionError>>,
    cancelled: Arc<AtomicBool>,
}

impl Caller {
    /// Asks.
    ///
    /// # Errors
    /// [`ActionError::Ended`] where nobody answers any more.
    pub fn send(&self, action: Action) -> Result<Pending, ActionError> {
        let (reply, answer) = sync_channel(1);
        let pending = Pending {
            answer,
            cancelled: Arc::default(),
        };
        let call = Call {
            action,
            asked: Instant::now(),
            cancelled: pending.cancelled.clone(),
            reply: Some(reply),
            answered: self.answered.clone(),
        };
        let sent = self.calls.send(call);
        match sent.is_err() || self.event.write(1).is_err() {
            true => Err(ActionError::Ended),
            false => Ok(pending),
        }
    }
}

impl Caller {
    /// Clears the descriptor. Answers that come after this make it readable again.
    pub fn clear(&self) {
        let _ = self.answered.read();
    }
}

/// Readable when there may be an answer to something that was asked.
impl AsFd for Caller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.answered.as_raw_fd()) }
    }
}

impl Pending {
    /// The answer, if it is there.
    pub fn take(&self) -> Option<Result<Reply, ActionError>> {
        match self.answer.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(ActionError::Ended)),
        }
    }

    /// Says that nobody wants the answer any more; there is one nevertheless.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether that was said.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
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

    /// Announces again what is there: for who looks for calls from here on, where another did and did not take all.
    pub fn announce(&self) {
        // It cannot be full: it was just emptied.
        let _ = self.event.write(1);
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
        answered: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
    };
    Ok((caller, Requests { calls, event }))
}
