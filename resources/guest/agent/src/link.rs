//! The byte stream to the host: a UART or any other file, with a bounded queue of frames to send.

use agent_protocol::{FromGuest, MAX_FRAME};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{ControlModes, OptionalActions, QueueSelector, SpecialCodeIndex};

/// Room that output leaves for control messages.
const RESERVE: usize = 2048;
const QUEUE: usize = 3 * MAX_FRAME + RESERVE;

/// The channel, with frames that wait to be sent.
pub struct Link {
    file: OwnedFd,
    queue: [u8; QUEUE],
    start: usize,
    end: usize,
}

impl Link {
    /// Opens the file; a terminal is made raw and emptied.
    pub fn open(path: &str) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())?;
        match rustix::termios::tcgetattr(&file) {
            Ok(mut termios) => {
                termios.make_raw();
                termios.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
                termios.control_modes &= !ControlModes::CRTSCTS;
                termios.special_codes[SpecialCodeIndex::VMIN] = 1;
                termios.special_codes[SpecialCodeIndex::VTIME] = 0;
                let _ = termios.set_speed(115_200);
                rustix::termios::tcsetattr(&file, OptionalActions::Now, &termios)?;
                rustix::termios::tcflush(&file, QueueSelector::IFlush)?;
            }
            // Not a terminal: a virtio port, say.
            Err(Errno::NOTTY) => {}
            Err(errno) => return Err(errno),
        }
        Ok(Self {
            file,
            queue: [0; QUEUE],
            start: 0,
            end: 0,
        })
    }

    /// The file, to wait on.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Everything queued has been written.
    pub fn is_idle(&self) -> bool {
        self.start == self.end
    }

    /// A full frame of output fits, and control messages still do after it.
    pub fn has_room_for_output(&self) -> bool {
        self.end - self.start + MAX_FRAME + RESERVE <= QUEUE
    }

    /// Queues a message; `false` if it does not fit.
    pub fn send(&mut self, message: &FromGuest<'_>) -> bool {
        if self.start > 0 {
            self.queue.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        match message.encode(&mut self.queue[self.end..]) {
            Some(n) => {
                self.end += n;
                true
            }
            None => false,
        }
    }

    /// Writes as much of the queue as the file takes now.
    pub fn flush(&mut self) -> Result<(), Errno> {
        while !self.is_idle() {
            match rustix::io::write(&self.file, &self.queue[self.start..self.end]) {
                Ok(n) => self.start += n,
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Reads what has arrived; 0 if nothing has.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match rustix::io::read(&self.file, buffer) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Ok(0) => Err(Errno::PIPE),
            other => other,
        }
    }

    /// Waits until the UART has sent everything.
    pub fn drain(&self) {
        let _ = rustix::termios::tcdrain(&self.file);
    }
}
