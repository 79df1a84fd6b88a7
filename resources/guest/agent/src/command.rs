//! The command: its process, its input and its output.

use agent_protocol::start::StartView;
use agent_protocol::{Exit, Stage, WinSize};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;

use crate::exec::{self, Failure};
use crate::sys;

/// After the command's end its output counts as complete when nothing came for so long,
const QUIET_MS: u64 = 100;
/// or at the latest after so long,
const LINGER_MS: u64 = 5000;
/// or so many bytes, which processes left behind have written.
const LINGER_BYTES: usize = 64 * 1024;
/// What a terminal takes as the end of input (VEOF).
const END_OF_TRANSMISSION: u8 = 4;

/// A running command, or one that ended with output still to be read.
pub struct Command {
    pid: Pid,
    /// A pty's controlling side instead of pipes.
    pty: bool,
    stdin: Option<OwnedFd>,
    outputs: [Option<Output>; 2],
    ended: Option<Ended>,
}

struct Output {
    file: OwnedFd,
    /// Bytes that were unread when the command ended: they are its own.
    owned: usize,
}

struct Ended {
    how: Exit,
    /// Since when only leftovers of other processes are read.
    drained_at: u64,
    last_data: u64,
    extra: usize,
}

/// The two ends of the command's standard files.
struct Files {
    child: [OwnedFd; 3],
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
}

fn pipes() -> Result<Files, Errno> {
    let make = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
    let ((in_read, in_write), (out_read, out_write), (err_read, err_write)) =
        (make()?, make()?, make()?);
    for ours in [&in_write, &out_read, &err_read] {
        rustix::fs::fcntl_setfl(ours, OFlags::NONBLOCK)?;
    }
    let child = [in_read, out_write, err_write];
    Ok(Files {
        child,
        stdin: in_write,
        stdout: out_read,
        stderr: Some(err_read),
    })
}

fn pty(size: WinSize) -> Result<Files, Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let control = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&control)?;
    set_size(&control, size)?;
    rustix::fs::fcntl_setfl(&control, OFlags::RDWR | OFlags::NONBLOCK)?;
    let user = rustix::pty::ioctl_tiocgptpeer(&control, flags)?;
    let dup = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
    let child = [dup(&user)?, dup(&user)?, user];
    Ok(Files {
        child,
        stdin: dup(&control)?,
        stdout: control,
        stderr: None,
    })
}

fn set_size(control: impl AsFd, size: WinSize) -> Result<(), Errno> {
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(control, size)
}

impl Command {
    /// Starts it. When this returns `Ok`, execve has succeeded.
    pub fn spawn(start: &StartView<'_>) -> Result<Self, Failure> {
        let files = match start.tty {
            Some(size) => pty(size).map_err(Failure::at(Stage::Pty))?,
            None => pipes().map_err(Failure::at(Stage::Pipe))?,
        };
        let (report, reporter) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(Failure::at(Stage::Pipe))?;
        let Some(pid) = sys::fork().map_err(Failure::at(Stage::Fork))? else {
            let failure = exec::run(start, &files.child, start.tty.is_some());
            let [low, high] = (failure.errno.raw_os_error() as u16).to_le_bytes();
            let _ = rustix::io::write(&reporter, &[failure.stage as u8, low, high]);
            sys::exit(127)
        };
        drop(reporter);
        let mut told = [0; 3];
        // A successful execve closes the other end, so this ends either way.
        if let Ok(3) = rustix::io::retry_on_intr(|| rustix::io::read(&report, &mut told)) {
            let errno = Errno::from_raw_os_error(i32::from(u16::from_le_bytes([told[1], told[2]])));
            let stage = [
                Stage::Pipe,
                Stage::Pty,
                Stage::Fork,
                Stage::Cwd,
                Stage::Interpreter,
            ]
            .into_iter()
            .find(|s| *s as u8 == told[0])
            .unwrap_or(Stage::Exec);
            return Err(Failure { stage, errno });
        }
        let output = |file| Output { file, owned: 0 };
        Ok(Self {
            pid,
            pty: start.tty.is_some(),
            stdin: Some(files.stdin),
            outputs: [Some(output(files.stdout)), files.stderr.map(output)],
            ended: None,
        })
    }

    /// Its process id, which is also its process group and session.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, signal: u8) {
        // The real-time signals are not rustix's to name; nobody forwards them.
        if self.ended.is_none()
            && let Some(signal) = Signal::from_named_raw(i32::from(signal))
        {
            let _ = rustix::process::kill_process_group(self.pid, signal);
        }
    }

    /// The terminal's size has changed.
    pub fn resize(&self, size: WinSize) {
        if let (true, Some(output)) = (self.pty, &self.outputs[0]) {
            let _ = set_size(&output.file, size);
        }
    }

    /// The process has ended.
    pub fn on_exit(&mut self, how: Exit) {
        for output in self.outputs.iter_mut().flatten() {
            output.owned = rustix::io::ioctl_fionread(&output.file).unwrap_or(0) as usize;
        }
        let now = sys::now_ms();
        self.stdin = None;
        self.ended = Some(Ended {
            how,
            drained_at: now,
            last_data: now,
            extra: 0,
        });
    }

    /// The file of its input, while open.
    pub fn stdin(&self) -> Option<&OwnedFd> {
        self.stdin.as_ref()
    }

    /// The file of output 0 (stdout or pty) or 1 (stderr), while open.
    pub fn output(&self, index: usize) -> Option<&OwnedFd> {
        self.outputs.get(index)?.as_ref().map(|output| &output.file)
    }

    /// Reads output; 0 when there is none now. At its end the file is closed.
    pub fn read(&mut self, index: usize, buffer: &mut [u8]) -> usize {
        let Some(slot) = self.outputs.get_mut(index) else {
            return 0;
        };
        let Some(output) = slot else { return 0 };
        match rustix::io::read(&output.file, buffer) {
            Ok(n @ 1..) => {
                let others = n.saturating_sub(output.owned);
                output.owned -= n - others;
                if let Some(ended) = &mut self.ended {
                    ended.last_data = sys::now_ms();
                    ended.extra += others;
                    if others == 0 {
                        ended.drained_at = ended.last_data;
                    }
                }
                n
            }
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // End of file; on a pty, EIO when nobody has it open any more.
            _ => {
                *slot = None;
                0
            }
        }
    }

    /// How it ended, once its output is complete. Otherwise when to ask again, in milliseconds;
    /// `None` while it runs. `stalled`: the host does not take output at present.
    pub fn outcome(&mut self, stalled: bool) -> Result<Exit, Option<u64>> {
        let Some(ended) = &mut self.ended else {
            return Err(None);
        };
        let now = sys::now_ms();
        let mut open = self.outputs.iter().flatten().peekable();
        if open.peek().is_none() {
            return Ok(ended.how);
        }
        if stalled {
            ended.drained_at = now;
            ended.last_data = now;
        }
        if ended.extra >= LINGER_BYTES {
            return Ok(ended.how);
        }
        if open.any(|output| output.owned > 0) {
            return Err(Some(QUIET_MS));
        }
        let until = (ended.last_data + QUIET_MS).min(ended.drained_at + LINGER_MS);
        if now >= until {
            Ok(ended.how)
        } else {
            Err(Some(until - now))
        }
    }

    /// Writes input; returns how much of it is done with, written or not wanted.
    pub fn write(&mut self, input: &[u8]) -> usize {
        let Some(file) = &self.stdin else {
            return input.len();
        };
        match rustix::io::write(file, input) {
            Ok(n) => n,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                self.stdin = None;
                input.len()
            }
        }
    }

    /// No more input: a pipe is closed, a terminal is told.
    pub fn close_stdin(&mut self) {
        if let (true, Some(file)) = (self.pty, &self.stdin) {
            let _ = rustix::io::write(file, &[END_OF_TRANSMISSION]);
        }
        self.stdin = None;
    }
}

/// Input that the command has not taken yet; as much as the host may send.
pub struct Input<const N: usize> {
    bytes: [u8; N],
    len: usize,
    /// The host has no more.
    pub eof: bool,
}

impl<const N: usize> Input<N> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self {
            bytes: [0; N],
            len: 0,
            eof: false,
        }
    }

    /// Adds bytes from the host; `false` if it sent more than it may.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        let Some(room) = self.bytes.get_mut(self.len..self.len + bytes.len()) else {
            return false;
        };
        room.copy_from_slice(bytes);
        self.len += bytes.len();
        true
    }

    /// Forgets everything, the end of input included.
    pub fn clear(&mut self) {
        (self.len, self.eof) = (0, false);
    }

    /// The command has everything.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Gives the command what it takes; returns how many bytes are done with.
    pub fn pass_to(&mut self, command: &mut Command) -> usize {
        if self.len == 0 {
            return 0;
        }
        let n = command.write(&self.bytes[..self.len]);
        self.bytes.copy_within(n..self.len, 0);
        self.len -= n;
        n
    }
}
