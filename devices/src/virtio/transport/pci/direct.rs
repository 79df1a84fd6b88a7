//! Queues whose interrupts the host's kernel sends by itself, at an event of whoever serves them.
//!
//! The kernel knows one message for each; it has none while the vector is masked or MSI-X is off, and
//! events then stay in their descriptor for the device, which signals them as its own. vCPU threads change
//! vectors while the I/O thread comes and goes, so what is true is looked at under the one lock.

use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::lock;
use crate::pci::msix::Msix;

/// One queue.
struct Direct {
    queue: u16,
    event: EventFd,
    message: Option<(u64, u32)>,
    /// The host's kernel sends the message for as long as this lives.
    way: Option<Box<dyn Send>>,
}

/// All of one device.
#[derive(Default)]
pub(super) struct DirectQueues(Mutex<Vec<Direct>>);

impl DirectQueues {
    /// Has `event` be that of `queue`, or none. [`follow`](Self::follow) comes after it.
    pub(super) fn set(&self, queue: u16, event: Option<&EventFd>) {
        let mut all = lock(&self.0);
        all.retain(|direct| direct.queue != queue);
        match event.map(EventFd::try_clone) {
            None => {}
            Some(Ok(event)) => all.push(Direct {
                queue,
                event,
                message: None,
                way: None,
            }),
            Some(Err(error)) => {
                log::debug!("the interrupts of queue {queue} take the way through bulle: {error}");
            }
        }
    }

    /// Tells the host's kernel of messages that are others than before; `vector` is that of a queue.
    pub(super) fn follow(&self, msix: &Msix, vector: impl Fn(u16) -> u16) {
        for direct in lock(&self.0).iter_mut() {
            let message = msix.message(vector(direct.queue));
            if message == direct.message {
                continue;
            }
            // An event has one message at a time.
            direct.way = None;
            direct.way = message
                .and_then(|(address, data)| msix.sink().direct(address, data, &direct.event));
            direct.message = message;
        }
    }
}
