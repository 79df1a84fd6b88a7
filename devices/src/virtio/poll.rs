//! Many host file descriptors behind one [`Source`](super::device::Source), edge-triggered.
//!
//! For devices whose descriptors come and go. An event is given once, so the device remembers
//! what is ready until a call says that it would block; nothing spins while the guest is slow.
//! Owned by the device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken at once; more come with the next turn.
const BATCH: usize = 64;

/// What a file descriptor is ready for. An error or the end of a stream is both, since the next
/// call says which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ready {
    /// As given to [`Poller::add`].
    pub token: u64,
    pub readable: bool,
    pub writable: bool,
    /// The other side is gone.
    pub hung_up: bool,
}

#[derive(Debug)]
pub(super) struct Poller(Epoll);

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new()?))
    }

    /// Becomes readable when there are events.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Waits for `fd` from now on; closing its last duplicate ends that. One that never
    /// blocks, as a regular file, cannot be waited for and gives no events.
    pub fn add(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(set, token);
        match self.0.ctl(ControlOperation::Add, fd.as_raw_fd(), event) {
            Err(error) if error.raw_os_error() != Some(libc::EPERM) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for `fd` no more.
    pub fn remove(&self, fd: &impl AsRawFd) {
        // It fails where `fd` was never added, and then there is nothing to undo.
        let _ = self.0.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        );
    }

    /// What has become ready, without waiting.
    pub fn take(&self) -> io::Result<Vec<Ready>> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.0.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let ready = events.iter().take(count).map(|event| {
            let set = event.event_set();
            let ended = EventSet::ERROR | EventSet::HANG_UP;
            Ready {
                token: event.data(),
                readable: set.intersects(ended | EventSet::IN | EventSet::READ_HANG_UP),
                writable: set.intersects(ended | EventSet::OUT),
                hung_up: set.intersects(ended),
            }
        });
        Ok(ready.collect())
    }
}
