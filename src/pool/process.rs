//! The pool's side of a process.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::PoolError;
use super::words::{Order, Word, receive, send};
use crate::snapshot::Template;
use crate::snapshot::template::TemplateError;

/// How long a process may take for what it is told.
const PATIENCE: Duration = Duration::from_secs(60);
/// The subcommand.
const SUBCOMMAND: &str = "shell";

/// Where what a clone writes goes; absent: nowhere.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
}

/// A process that is getting ready, or waits for an order. Dropping it ends it.
#[derive(Debug)]
pub struct Waiting {
    process: Option<Child>,
    socket: UnixStream,
    ready: bool,
}

/// A process that has become a clone, and outlives this.
#[derive(Debug)]
pub struct Running {
    /// It.
    pub process: Child,
}

impl Waiting {
    /// Starts a process of `program` for a clone of `template`.
    ///
    /// # Errors
    /// No such process, or one that takes nothing.
    pub fn start(program: &Path, template: &Template, stdio: Stdio) -> Result<Self, PoolError> {
        let failed = |source| PoolError::Start {
            program: program.to_owned(),
            source,
        };
        let (socket, theirs) = UnixStream::pair().map_err(failed)?;
        let to = |fd: Option<OwnedFd>| fd.map_or_else(std::process::Stdio::null, Into::into);
        let process = Command::new(program)
            .arg(SUBCOMMAND)
            .stdin(OwnedFd::from(theirs))
            .stdout(to(stdio.stdout))
            .stderr(to(stdio.stderr))
            .spawn()
            .map_err(failed)?;
        let waiting = Self {
            process: Some(process),
            socket,
            ready: false,
        };
        let socket = &waiting.socket;
        socket
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| socket.set_write_timeout(Some(PATIENCE)))
            .map_err(PoolError::Talk)?;
        hand(template, socket)?;
        Ok(waiting)
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// It is not, and says why, or is gone.
    pub fn ready(&mut self) -> Result<(), PoolError> {
        if !self.ready {
            self.hear(&Word::Ready)?;
            self.ready = true;
        }
        Ok(())
    }

    /// Whether it has said that it is ready.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Hears what it has said, without waiting.
    ///
    /// # Errors
    /// As [`ready`](Self::ready), and where it is gone though it was.
    pub fn attend(&mut self) -> Result<(), PoolError> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let count = poll(&mut fds, PollTimeout::ZERO);
        match count.map_err(|errno| PoolError::Talk(errno.into()))? {
            0 => Ok(()),
            _ if self.ready => Err(PoolError::Talk(ErrorKind::UnexpectedEof.into())),
            _ => self.ready(),
        }
    }

    /// Tells it what to become; nothing is waited for.
    ///
    /// # Errors
    /// It is gone.
    pub fn order(&mut self, order: &Order) -> Result<(), PoolError> {
        self.order_of(order, None)
    }

    /// As [`order`](Self::order), a clone of `another` template than it has. What it prepared is of use if
    /// machines of both have the same [`Shape`](crate::vm::Shape).
    ///
    /// # Errors
    /// It is gone.
    pub fn order_of(&mut self, order: &Order, another: Option<&Template>) -> Result<(), PoolError> {
        send(&self.socket, &(order, another.is_some())).map_err(PoolError::Talk)?;
        another.map_or(Ok(()), |template| hand(template, &self.socket))
    }

    /// Waits until it is what it was told to become.
    ///
    /// # Errors
    /// It is not, and says why, or is gone.
    pub fn begun(mut self) -> Result<Running, PoolError> {
        self.begin()
    }

    /// As [`begun`](Self::begun), so that one that is gone can be closed elsewhere.
    pub(super) fn begin(&mut self) -> Result<Running, PoolError> {
        self.ready()?;
        self.hear(&Word::Begun)?;
        match self.process.take() {
            Some(process) => Ok(Running { process }),
            None => Err(PoolError::Talk(std::io::ErrorKind::NotFound.into())),
        }
    }

    fn hear(&self, wanted: &Word) -> Result<(), PoolError> {
        match receive(&self.socket).map_err(PoolError::Talk)? {
            Some(Word::Failed(text)) => Err(PoolError::Refused { text }),
            Some(word) if word == *wanted => Ok(()),
            Some(_) => Err(PoolError::Talk(ErrorKind::InvalidData.into())),
            None => Err(PoolError::Talk(ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// Hands a template to a process, which may have been killed before it takes it.
fn hand(template: &Template, socket: &UnixStream) -> Result<(), PoolError> {
    template.send(socket).map_err(|error| match error {
        TemplateError::Host { source, .. } if source.kind() == ErrorKind::BrokenPipe => {
            PoolError::Talk(source)
        }
        error => PoolError::Template(error),
    })
}

impl AsFd for Waiting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // It has no guest yet, and would end by itself, without the socket.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
