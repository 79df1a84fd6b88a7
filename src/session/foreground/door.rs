//! The machine's control socket, which is made some time after the start.

use std::io;

use nix::sys::timerfd::TimerFd;

use super::{DOOR_AFTER, Foreground};
use crate::session::managed::Door;
use crate::session::timer::{arm, timer};

impl Foreground<'_> {
    /// Lets others find the machine at its control socket, soon.
    pub fn open_soon(&mut self, door: Door) -> io::Result<()> {
        let timer = timer()?;
        arm(&timer, DOOR_AFTER)?;
        (self.door, self.door_timer) = (Some(door), Some(timer));
        Ok(())
    }

    pub(super) fn open_door(&mut self) {
        // One shot: nothing more comes of it.
        let _ = self.door_timer.as_ref().map(TimerFd::wait);
        let Some(door) = self.door.take() else { return };
        self.managed = door.open(self.runtime.config());
        if let Some(managed) = &self.managed {
            self.runtime.set_name(managed.name());
        }
    }
}
