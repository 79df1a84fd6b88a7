//! What makes a running vCPU look at its commands: the order in which it is asked, and in which it answers.
//!
//! Whoever asks raises a flag, then sends the command, then kicks; a vCPU that was kicked looks at the flags before it
//! enters the guest again. tests/handover.rs has loom go through all that can come of it, with this file as it is.

use super::sync::{AtomicBool, AtomicU32, Ordering};

/// Shared by a vCPU's thread and who holds it.
#[derive(Debug, Default)]
pub struct Flags {
    stop: AtomicBool,
    /// Pauses that were asked for and not answered yet.
    pauses: AtomicU32,
}

impl Flags {
    /// Asks the vCPU to park: `tell` sends the command, and `kick` has it leave the guest.
    pub fn ask_to_pause(&self, tell: impl FnOnce(), kick: impl FnOnce()) {
        self.pauses.fetch_add(1, Ordering::SeqCst);
        tell();
        kick();
    }

    /// As [`ask_to_pause`](Self::ask_to_pause), to end.
    pub fn ask_to_stop(&self, tell: impl FnOnce(), kick: impl FnOnce()) {
        self.stop.store(true, Ordering::SeqCst);
        tell();
        kick();
    }

    /// Has the vCPU `enter` the guest over and over until it is asked to leave, or that says how the machine ended.
    pub fn until_asked<T>(&self, mut enter: impl FnMut() -> Option<T>) -> Option<T> {
        while !self.leave() {
            let end = enter();
            if end.is_some() {
                return end;
            }
        }
        None
    }

    fn leave(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.pausing()
    }

    /// Whether the vCPU is to park.
    pub fn pausing(&self) -> bool {
        self.pauses.load(Ordering::SeqCst) > 0
    }

    /// The vCPU is parked and answers one request. Who hears that may have it run at once.
    pub fn paused(&self, answer: impl FnOnce()) {
        self.pauses.fetch_sub(1, Ordering::SeqCst);
        answer();
    }
}
