//! The byte stream to the host: a UART, a port of a virtio console or any other file, with a bounded
//! queue of frames to send.

use agent_protocol::{FromGuest, GUEST_WINDOW, MAX_FRAME, MAX_GUEST_WINDOW};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{ControlModes, OptionalActions, QueueSelector, SpecialCodeIndex};

use crate::sys;

/// Room that output leaves for control messages.
const RESERVE: usize = 2048;
/// Several frames for one write, which costs an exit or two whatever its length.
const QUEUE: usize = 7 * MAX_FRAME + RESERVE;
/// How long the host may take to say that it has a port open, and how often that is looked for.
const PORT_PATIENCE_MS: u64 = 2000;
const PORT_PAUSE_MS: u64 = 1;

/// The channel, with frames that wait to be sent.
pub struct Link {
    file: OwnedFd,
    /// A terminal that may drop what it has no room for.
    is_tty: bool,
    queue: [u8; QUEUE],
    start: usize,
    end: usize,
}

impl Link {
    /// Opens the file; a terminal is made raw and emptied.
    pub fn open(path: &str) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())?;
        let is_tty = match rustix::termios::tcgetattr(&file) {
            Ok(mut termios) => {
                termios.make_raw();
                termios.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
                termios.control_modes &= !ControlModes::CRTSCTS;
                termios.special_codes[SpecialCodeIndex::VMIN] = 1;
                termios.special_codes[SpecialCodeIndex::VTIME] = 0;
                let _ = termios.set_speed(115_200);
                rustix::termios::tcsetattr(&file, OptionalActions::Now, &termios)?;
                rustix::termios::tcflush(&file, QueueSelector::IFlush)?;
                true
            }
            Err(Errno::NOTTY) => false,
            Err(errno) => return Err(errno),
        };
        Ok(Self {
            file,
            is_tty,
            queue: [0; QUEUE],
            start: 0,
            end: 0,
        })
    }

    /// Opens a port of a virtio console, once the host has it open as well.
    pub fn open_port(path: &str) -> Result<Self, Errno> {
        let link = Self::open(path)?;
        let deadline = sys::now_ms() + PORT_PATIENCE_MS;
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            let mut files = [PollFd::new(&link.file, PollFlags::OUT)];
            poll(&mut files, Some(&now))?;
            if !files[0].revents().contains(PollFlags::HUP) {
                return Ok(link);
            }
            if sys::now_ms() >= deadline {
                return Err(Errno::TIMEDOUT);
            }
            sys::sleep_ms(PORT_PAUSE_MS);
        }
    }

    /// Bytes of input that may be on their way here.
    pub fn window(&self) -> u32 {
        if self.is_tty {
            GUEST_WINDOW
        } else {
            MAX_GUEST_WINDOW
        }
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

    /// Queues a message about the main command or none; `false` if it does not fit.
    pub fn send(&mut self, message: &FromGuest<'_>) -> bool {
        self.send_for(0, message)
    }

    /// Queues a message about the command `job`; `false` if it does not fit.
    pub fn send_for(&mut self, job: u8, message: &FromGuest<'_>) -> bool {
        if self.start > 0 {
            self.queue.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        match message.encode_for(job, &mut self.queue[self.end..]) {
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
