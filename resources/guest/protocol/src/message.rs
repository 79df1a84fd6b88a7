//! What the frames mean. The two directions have disjoint kinds, so an echoed frame is malformed.

use crate::frame::{Frame, encode};

/// Bits of [`Hello::features`].
pub mod features {
    /// A pvpanic device is bound to its driver: the host learns of panics at once.
    pub const PVPANIC: u32 = 1 << 0;
    /// The agent listens to an ACPI power button.
    pub const POWER_BUTTON: u32 = 1 << 1;
    /// Pseudo-terminals work.
    pub const PTY: u32 = 1 << 2;
    /// Commands run beside the main one.
    pub const EXTRA: u32 = 1 << 3;
    /// Network interfaces are given other addresses.
    pub const ADDRESS: u32 = 1 << 4;
}

/// A frame that is intact but not a message of this direction and version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The frame's kind.
    pub kind: u8,
}

/// The agent's greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// [`crate::VERSION`] of the agent.
    pub version: u16,
    /// See [`features`].
    pub features: u32,
    /// Bytes of Start and Stdin payload that may be sent before the first Credit.
    pub window: u32,
    /// `uname -r` of the guest.
    pub release: &'a [u8],
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(u8),
    /// It was killed by this signal.
    Signal(u8),
}

/// What the agent was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The host broke the protocol.
    Protocol = 0,
    /// Making pipes.
    Pipe = 1,
    /// Making a pseudo-terminal.
    Pty = 2,
    /// Making the process.
    Fork = 3,
    /// Changing to the working directory, which the text names.
    Cwd = 4,
    /// Executing the command, which the text names.
    Exec = 5,
    /// The command exists but its interpreter (`#!` or dynamic loader) does not.
    Interpreter = 6,
    /// Entering the root file system; the text is a sentence without its end.
    Root = 7,
}

/// Importance of a [`FromGuest::Log`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// Something does not work.
    Error = 0,
    /// Something may not work.
    Warn = 1,
    /// For the curious.
    Info = 2,
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Power {
    /// Power off.
    Off = 0,
    /// Restart.
    Reboot = 1,
    /// Halt; the agent powers off all the same, since nothing can wake a halted guest.
    Halt = 2,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WinSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Messages from the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromGuest<'a> {
    /// The agent is ready for Start. Always first.
    Hello(Hello<'a>),
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Output of the command, or of its terminal.
    Stdout(&'a [u8]),
    /// Error output of the command.
    Stderr(&'a [u8]),
    /// The command ended and its output has been sent. Nothing but Log and Stopping follows.
    Exited(Exit),
    /// The command could not be run. Nothing but Log and Stopping follows.
    Failed {
        /// Where.
        stage: Stage,
        /// Linux error number, 0 if none.
        errno: u16,
        /// What it was about: a path, or a sentence. Not always UTF-8.
        text: &'a [u8],
    },
    /// A note for the user.
    Log {
        /// How important.
        level: Level,
        /// Not always UTF-8.
        text: &'a [u8],
    },
    /// The guest is going down by its own or the host's wish; no Exited will follow.
    Stopping(Power),
    /// So many bytes of Start and Stdin have been consumed.
    Credit(u32),
}

/// Messages from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromHost<'a> {
    /// A piece of the [`crate::start::Start`] layout.
    Start {
        /// No more pieces follow.
        last: bool,
        /// Non-empty.
        bytes: &'a [u8],
    },
    /// Input for the command.
    Stdin(&'a [u8]),
    /// No more input.
    StdinEof,
    /// The terminal's new size.
    Resize(WinSize),
    /// A signal for the command's process group.
    Signal(u8),
    /// End the guest in an orderly way.
    Shutdown(Power),
    /// A network interface gets another address, and announces it.
    Address {
        /// The one that it has.
        from: [u8; 6],
        /// The one that it is to have.
        to: [u8; 6],
    },
    /// So many bytes of Stdout and Stderr have been consumed.
    Credit(u32),
}

const HELLO: u8 = 0x01;
const STARTED: u8 = 0x02;
const STDOUT: u8 = 0x03;
const STDERR: u8 = 0x04;
const EXITED: u8 = 0x05;
const FAILED: u8 = 0x06;
const LOG: u8 = 0x07;
const STOPPING: u8 = 0x08;
const GUEST_CREDIT: u8 = 0x09;
const START: u8 = 0x81;
const STDIN: u8 = 0x82;
const STDIN_EOF: u8 = 0x83;
const RESIZE: u8 = 0x84;
const SIGNAL: u8 = 0x85;
const SHUTDOWN: u8 = 0x86;
const HOST_CREDIT: u8 = 0x87;
const ADDRESS: u8 = 0x88;

/// Flag of Start: no more pieces follow.
const LAST: u8 = 1;
/// The flags that number commands.
const JOB: u8 = 0xf0;
/// Longest release in Hello (the kernel's own limit is 64).
const MAX_RELEASE: usize = 128;

impl Stage {
    fn from_u8(n: u8) -> Option<Self> {
        [
            Self::Protocol,
            Self::Pipe,
            Self::Pty,
            Self::Fork,
            Self::Cwd,
            Self::Exec,
            Self::Interpreter,
            Self::Root,
        ]
        .into_iter()
        .find(|s| *s as u8 == n)
    }
}

impl Level {
    fn from_u8(n: u8) -> Option<Self> {
        [Self::Error, Self::Warn, Self::Info]
            .into_iter()
            .find(|s| *s as u8 == n)
    }
}

impl Power {
    fn from_u8(n: u8) -> Option<Self> {
        [Self::Off, Self::Reboot, Self::Halt]
            .into_iter()
            .find(|s| *s as u8 == n)
    }
}

/// Reads the parts of a payload from its front; every part is checked.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }
    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.0)
    }
    fn winsize(&mut self) -> Option<WinSize> {
        Some(WinSize {
            rows: self.u16()?,
            cols: self.u16()?,
        })
    }
}

/// Calls `parse` on the payload; all of it must be used.
fn whole<'a, T>(
    frame: Frame<'a>,
    parse: impl FnOnce(&mut Parts<'a>) -> Option<T>,
) -> Result<T, Malformed> {
    let mut parts = Parts(frame.payload);
    match parse(&mut parts) {
        Some(message) if parts.0.is_empty() => Ok(message),
        _ => Err(Malformed { kind: frame.kind }),
    }
}

impl<'a> FromGuest<'a> {
    /// The message in a frame.
    ///
    /// # Errors
    /// [`Malformed`] for a kind of the other direction, an unknown kind, flag or value, and a
    /// payload of the wrong length.
    pub fn parse(frame: Frame<'a>) -> Result<Self, Malformed> {
        let of_a_job = matches!(
            frame.kind,
            STARTED | STDOUT | STDERR | EXITED | FAILED | GUEST_CREDIT
        );
        if frame.flags & !JOB != 0 || frame.job() > 0 && !of_a_job {
            return Err(Malformed { kind: frame.kind });
        }
        whole(frame, |p| {
            Some(match frame.kind {
                HELLO => Self::Hello(Hello {
                    version: p.u16()?,
                    features: p.u32()?,
                    window: p.u32()?,
                    release: Some(p.rest()).filter(|r| r.len() <= MAX_RELEASE)?,
                }),
                STARTED => Self::Started { pid: p.u32()? },
                STDOUT => Self::Stdout(p.rest()),
                STDERR => Self::Stderr(p.rest()),
                EXITED => match p.u8()? {
                    0 => Self::Exited(Exit::Code(p.u8()?)),
                    1 => Self::Exited(Exit::Signal(p.u8()?)),
                    _ => return None,
                },
                FAILED => Self::Failed {
                    stage: Stage::from_u8(p.u8()?)?,
                    errno: p.u16()?,
                    text: p.rest(),
                },
                LOG => Self::Log {
                    level: Level::from_u8(p.u8()?)?,
                    text: p.rest(),
                },
                STOPPING => Self::Stopping(Power::from_u8(p.u8()?)?),
                GUEST_CREDIT => Self::Credit(p.u32()?),
                _ => return None,
            })
        })
    }

    /// Writes the message about the main command as one frame and returns its length; `None` if it does not
    /// fit.
    pub fn encode(&self, out: &mut [u8]) -> Option<usize> {
        self.encode_for(0, out)
    }

    /// As [`encode`](Self::encode), about the command `job`.
    pub fn encode_for(&self, job: u8, out: &mut [u8]) -> Option<usize> {
        let mut short = [0; 10 + MAX_RELEASE];
        let (kind, payload) = match *self {
            Self::Hello(hello) => {
                short[..2].copy_from_slice(&hello.version.to_le_bytes());
                short[2..6].copy_from_slice(&hello.features.to_le_bytes());
                short[6..10].copy_from_slice(&hello.window.to_le_bytes());
                let end = 10 + hello.release.len();
                short.get_mut(10..end)?.copy_from_slice(hello.release);
                (HELLO, &short[..end])
            }
            Self::Started { pid } => (STARTED, fixed(&mut short, pid.to_le_bytes())),
            Self::Stdout(bytes) => (STDOUT, bytes),
            Self::Stderr(bytes) => (STDERR, bytes),
            Self::Exited(Exit::Code(n)) => (EXITED, fixed(&mut short, [0, n])),
            Self::Exited(Exit::Signal(n)) => (EXITED, fixed(&mut short, [1, n])),
            Self::Failed { stage, errno, text } => {
                let [low, high] = errno.to_le_bytes();
                return encode_text((FAILED, job), &[stage as u8, low, high], text, out);
            }
            Self::Log { level, text } => return encode_text((LOG, job), &[level as u8], text, out),
            Self::Stopping(power) => (STOPPING, fixed(&mut short, [power as u8])),
            Self::Credit(n) => (GUEST_CREDIT, fixed(&mut short, n.to_le_bytes())),
        };
        encode(
            Frame {
                kind,
                flags: job << 4,
                payload,
            },
            out,
        )
    }
}

impl<'a> FromHost<'a> {
    /// The message in a frame.
    ///
    /// # Errors
    /// [`Malformed`] as for [`FromGuest::parse`].
    pub fn parse(frame: Frame<'a>) -> Result<Self, Malformed> {
        let known = if frame.kind == START { LAST } else { 0 };
        if frame.flags & !JOB & !known != 0
            || frame.job() > 0 && matches!(frame.kind, SHUTDOWN | ADDRESS)
        {
            return Err(Malformed { kind: frame.kind });
        }
        whole(frame, |p| {
            Some(match frame.kind {
                START => Self::Start {
                    last: frame.flags & LAST != 0,
                    bytes: Some(p.rest()).filter(|b| !b.is_empty())?,
                },
                STDIN => Self::Stdin(p.rest()),
                STDIN_EOF => Self::StdinEof,
                RESIZE => Self::Resize(p.winsize()?),
                SIGNAL => Self::Signal(p.u8()?),
                SHUTDOWN => Self::Shutdown(Power::from_u8(p.u8()?)?),
                HOST_CREDIT => Self::Credit(p.u32()?),
                ADDRESS => Self::Address {
                    from: p.array()?,
                    to: p.array()?,
                },
                _ => return None,
            })
        })
    }

    /// Writes the message about the main command as one frame and returns its length; `None` if it does not
    /// fit.
    pub fn encode(&self, out: &mut [u8]) -> Option<usize> {
        self.encode_for(0, out)
    }

    /// As [`encode`](Self::encode), about the command `job`.
    pub fn encode_for(&self, job: u8, out: &mut [u8]) -> Option<usize> {
        let mut short = [0; 12];
        let mut flags = 0;
        let (kind, payload) = match *self {
            Self::Start { last, bytes } => {
                flags = if last { LAST } else { 0 };
                (START, bytes)
            }
            Self::Stdin(bytes) => (STDIN, bytes),
            Self::StdinEof => (STDIN_EOF, &[][..]),
            Self::Resize(size) => {
                let ([a, b], [c, d]) = (size.rows.to_le_bytes(), size.cols.to_le_bytes());
                (RESIZE, fixed(&mut short, [a, b, c, d]))
            }
            Self::Signal(n) => (SIGNAL, fixed(&mut short, [n])),
            Self::Shutdown(power) => (SHUTDOWN, fixed(&mut short, [power as u8])),
            Self::Credit(n) => (HOST_CREDIT, fixed(&mut short, n.to_le_bytes())),
            Self::Address { from, to } => {
                short[..6].copy_from_slice(&from);
                short[6..].copy_from_slice(&to);
                (ADDRESS, &short[..])
            }
        };
        encode(
            Frame {
                kind,
                flags: flags | job << 4,
                payload,
            },
            out,
        )
    }
}

/// Puts `bytes` at the front of `buffer` (which is longer) and returns them.
fn fixed<const N: usize>(buffer: &mut [u8], bytes: [u8; N]) -> &[u8] {
    buffer[..N].copy_from_slice(&bytes);
    &buffer[..N]
}

/// A frame of some fixed bytes and a text, which is cut at [`MAX_TEXT`].
fn encode_text((kind, job): (u8, u8), head: &[u8], text: &[u8], out: &mut [u8]) -> Option<usize> {
    let text = &text[..text.len().min(MAX_TEXT)];
    let mut payload = [0; MAX_TEXT + 4];
    let end = head.len() + text.len();
    payload.get_mut(..head.len())?.copy_from_slice(head);
    payload.get_mut(head.len()..end)?.copy_from_slice(text);
    encode(
        Frame {
            kind,
            flags: job << 4,
            payload: &payload[..end],
        },
        out,
    )
}

/// Longest text of Failed and Log; the rest is cut off.
pub const MAX_TEXT: usize = 512;
