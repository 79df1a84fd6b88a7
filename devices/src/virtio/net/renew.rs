//! The host's end of a network device goes, and another one comes in its place.
//!
//! The driver sees a link that goes down and up again. Who gets another end is told on the I/O thread and must
//! not wait there; the end comes from any thread, and is taken on the I/O thread when the device runs.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::eventfd::EventFd;

use super::{Net, NetBackend, Stream, WRITABLE};
use crate::lock;
use crate::virtio::device::Source;
use crate::virtio::io::Io;

/// Gets another end for a device that lost its own.
pub trait Keeper: std::fmt::Debug + Send {
    /// It is lost. Does not wait; `renewal` takes another one later.
    fn lost(&self, renewal: Renewal);
}

/// Where another end is waited for.
pub(super) type Slot = Arc<Mutex<Option<Stream>>>;

/// Takes another end for a device.
#[derive(Clone, Debug)]
pub struct Renewal {
    slot: Weak<Mutex<Option<Stream>>>,
    wake: Arc<EventFd>,
}

impl Renewal {
    /// Whether the device is still there.
    pub fn is_wanted(&self) -> bool {
        self.slot.strong_count() > 0
    }

    /// Has the device go on with `stream`, if it is still there.
    ///
    /// # Errors
    /// Of waking it.
    pub fn renew(&self, stream: Stream) -> io::Result<()> {
        if let Some(slot) = self.slot.upgrade() {
            *lock(&slot) = Some(stream);
            self.wake.write(1)?;
        }
        Ok(())
    }
}

impl Net {
    /// The host's end is gone: the driver sees a link that is down.
    pub(super) fn close(&mut self, io: &mut Io<'_>, error: &io::Error) {
        if !self.space.link_is_up() {
            return;
        }
        self.space.changes.fetch_add(1, Ordering::SeqCst);
        let complaints = self.backend.complaints();
        let complaints = complaints.map_or_else(String::new, |text| format!(" (it said: {text})"));
        log::warn!(
            "a network device has lost the host's side: {error}{complaints}; its link is down"
        );
        io.config_changed();
        io.announce();
        if let Some(keeper) = &self.keeper {
            keeper.lost(Renewal {
                slot: Arc::downgrade(&self.slot),
                wake: Arc::clone(&self.wake),
            });
        }
    }

    /// Whether a host's end that is not waited for is gone, which no frame says then.
    pub(super) fn notice_end(&mut self, io: &mut Io<'_>) {
        if self.backend.is_closed() {
            self.close(io, &io::ErrorKind::UnexpectedEof.into());
        }
    }

    /// Goes on with another end, if one has come.
    pub(super) fn renew(&mut self, io: &mut Io<'_>) {
        let Some(stream) = lock(&self.slot).take() else {
            return;
        };
        let other = NetBackend::Stream(Box::new(stream));
        // Its descriptors are open until the loop has let go of them.
        self.retired = Some(std::mem::replace(&mut self.backend, other));
        self.blocked = false;
        let (frames, writable) = (self.backend.fd(0), self.backend.writable_fd());
        if let Some(fd) = frames {
            io.watch_instead(Source::readable(0, fd));
        }
        if let Some(fd) = writable {
            io.watch_instead(Source::readable(WRITABLE, fd));
        }
        if let Some(rx) = self.rx.first_mut() {
            rx.armed = true;
        }
        if !self.space.link_is_up() {
            self.space.changes.fetch_add(1, Ordering::SeqCst);
            io.config_changed();
            io.announce();
        }
    }
}
