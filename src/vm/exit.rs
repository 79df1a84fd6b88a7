//! Why a virtual machine ended, announced once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use devices::bus::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::snapshot::uffd::watch::HandlerLost;
use crate::vcpu::Failure;

/// Why a virtual machine ended.
#[derive(Debug)]
pub enum VmExit {
    /// The guest ended it through a device.
    Guest(ExitReason),
    /// A vCPU could not go on.
    Failed(Box<Failure>),
    /// Nobody brings its memory any more.
    HandlerLost(HandlerLost),
}

/// Holds the first end that a vCPU announces, and wakes whoever waits for it. Any thread sets it.
pub struct ExitLatch {
    exit: Mutex<Option<VmExit>>,
    event: EventFd,
}

impl ExitLatch {
    /// An open latch. Fails when the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            exit: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Announces an end; later ones are dropped.
    pub fn set(&self, exit: VmExit) {
        let mut slot = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(exit);
            if let Err(error) = self.event.write(1) {
                log::error!("the end of the VM was not announced: {error}");
            }
        }
    }

    /// The end, if there was one; the latch is then empty.
    pub fn take(&self) -> Option<VmExit> {
        self.exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl AsRawFd for ExitLatch {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_wins() {
        let latch = ExitLatch::new().unwrap();
        latch.set(VmExit::Guest(ExitReason::DebugExit(1)));
        latch.set(VmExit::Guest(ExitReason::PowerOff));
        assert_eq!(latch.event.read().unwrap(), 1);
        assert!(matches!(
            latch.take(),
            Some(VmExit::Guest(ExitReason::DebugExit(1)))
        ));
    }
}
