//! A child process that has this one's private memory as it is at one moment.
//!
//! The kernel copies a page when either side writes to it first, so making the child takes as long as
//! copying page tables does. The child has one thread and, of all descriptors, those that it is left:
//! no lock of a disk. What is mapped, such as vCPUs' pages, keeps its file open until the child ends, which it
//! does with its parent. It never logs or prints, since another thread may have held the lock that
//! this takes; memory it can allocate, which fork(3) of the C library takes care of. The owner is the
//! thread that made it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, pipe2};

/// Most bytes of what a child says at its end, with the byte before it.
const MAX_TEXT: usize = 4096;
/// Before a text.
const TEXT: u8 = b't';
/// Before two numbers.
const PROGRESS: u8 = b'p';
/// Bytes of those with the byte before.
const PROGRESS_LEN: usize = 17;

/// A child at work. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// Readable when it has something to say, or has ended.
    pipe: File,
    said: Vec<u8>,
    progress: Option<[u64; 2]>,
    ended: bool,
}

/// What a child speaks through.
#[derive(Debug)]
pub struct Mouth(File);

impl Mouth {
    /// Says how far it is: what is done, and all. Nobody may hear it.
    pub fn progress(&self, done: u64, total: u64) {
        let mut bytes = vec![PROGRESS];
        bytes.extend([done, total].map(u64::to_le_bytes).as_flattened());
        // As a whole or not at all, being short.
        let _ = (&self.0).write(&bytes);
    }

    fn text(&self, text: &str) {
        let mut bytes = vec![TEXT];
        bytes.extend(text.bytes().take(MAX_TEXT - 1));
        // Less than the pipe holds. Without it the exit code still tells.
        let _ = (&self.0).write(&bytes);
    }
}

/// Makes a child that does `body` and ends. Descriptors other than `kept` are closed in it.
///
/// # Errors
/// Where the host has no process or no memory for it.
pub fn start(kept: &[RawFd], body: impl FnOnce(&Mouth) -> Result<(), String>) -> io::Result<Child> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let parent = getpid();
    // SAFETY: the child goes no further than `work`, which takes no lock that another thread of this
    // process can hold, see the head of this module.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Child {
            pid: child,
            pipe: ours.into(),
            said: Vec::new(),
            progress: None,
            ended: false,
        }),
        ForkResult::Child => {
            // Also where the parent is killed; it may be gone already.
            // SAFETY: it takes numbers only.
            let dies = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } == 0;
            if !dies || getppid() != parent {
                // SAFETY: ends the process at once; nothing runs after it.
                unsafe { libc::_exit(1) }
            }
            work(kept, theirs, body)
        }
    }
}

/// All that the child does.
fn work(kept: &[RawFd], pipe: OwnedFd, body: impl FnOnce(&Mouth) -> Result<(), String>) -> ! {
    log::set_max_level(log::LevelFilter::Off);
    let mut keep = kept.to_vec();
    keep.push(pipe.as_raw_fd());
    let done = close_others(keep).map_err(|error| format!("cannot close descriptors: {error}"));
    let mouth = Mouth(pipe.into());
    let code = match done.and_then(|()| body(&mouth)) {
        Ok(()) => 0,
        Err(text) => {
            mouth.text(&text);
            1
        }
    };
    // SAFETY: ends the process at once; nothing runs after it.
    unsafe { libc::_exit(code) }
}

pub(super) fn close_others(mut keep: Vec<RawFd>) -> io::Result<()> {
    keep.sort_unstable();
    let mut first: libc::c_uint = 0;
    for fd in keep {
        let fd = fd as libc::c_uint;
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX)
}

fn close_range(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    // SAFETY: closes descriptors of the child, which nothing in it uses.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Child {
    /// How far it is, where it has said that since the last call.
    pub fn progress(&mut self) -> Option<[u64; 2]> {
        self.progress.take()
    }

    /// Takes off what was said of progress; what is left is bounded, being a text or the beginning of more.
    fn take_progress(&mut self) {
        while self.said.first() == Some(&PROGRESS)
            && let Some(numbers) = self.said.get(1..PROGRESS_LEN)
        {
            let (words, _) = numbers.as_chunks();
            if let [done, total] = *words {
                self.progress = Some([done, total].map(u64::from_le_bytes));
            }
            self.said.drain(..PROGRESS_LEN);
        }
        self.said.truncate(MAX_TEXT);
    }

    /// Ends it, and says how it ended: it may have done so before.
    pub fn cancel(&mut self) -> Result<(), String> {
        if let Some(result) = self.ended() {
            return result;
        }
        let _ = kill(self.pid, Signal::SIGKILL);
        let status = wait(self.pid);
        self.ended = true;
        match status {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            _ => Err("it was ended".to_owned()),
        }
    }

    /// How it ended, once it has: well, or with a text.
    pub fn ended(&mut self) -> Option<Result<(), String>> {
        let mut buffer = [0; MAX_TEXT];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => {
                    let more = buffer.get(..len).unwrap_or_default();
                    self.said.extend_from_slice(more);
                    self.take_progress();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // Its end of the pipe is closed by its end alone.
        let status = wait(self.pid);
        self.ended = true;
        Some(match status {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                Err(format!("the process that wrote it was killed by {signal}"))
            }
            Ok(_) => {
                let text = self.said.strip_prefix(&[TEXT]).unwrap_or_default();
                Err(String::from_utf8_lossy(text).into_owned())
            }
            Err(errno) => Err(format!("the process that wrote it is lost: {errno}")),
        })
    }
}

fn wait(pid: Pid) -> Result<WaitStatus, Errno> {
    loop {
        match waitpid(pid, Some(WaitPidFlag::empty())) {
            Err(Errno::EINTR) => {}
            status => return status,
        }
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = wait(self.pid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(mut child: Child) -> Result<(), String> {
        loop {
            if let Some(result) = child.ended() {
                return result;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn a_child_has_memory_as_it_was_and_says_how_it_ends() {
        let mut value = vec![1_u8; 8192];
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let other = File::open("/dev/null").unwrap();
        let fd = other.as_raw_fd();
        let child = start(&[ours.as_raw_fd()], |mouth| {
            mouth.progress(1, 3);
            mouth.progress(2, 3);
            // Until the parent has written to its own.
            File::from(ours.try_clone().unwrap())
                .read_exact(&mut [0])
                .unwrap();
            // SAFETY: asks about a descriptor that is not there.
            let closed = unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1;
            match value == [1; 8192] && closed {
                true => Err("as it was".to_owned()),
                false => Ok(()),
            }
        });
        let mut child = child.unwrap();
        while child.progress() != Some([2, 3]) {
            assert_eq!(child.ended(), None);
        }
        value.fill(2);
        File::from(theirs).write_all(&[0]).unwrap();
        assert_eq!(end(child), Err("as it was".to_owned()));
        assert_eq!(end(start(&[], |_| Ok(())).unwrap()), Ok(()));
        drop(other);
    }

    #[test]
    fn a_child_that_is_killed_is_told_of_and_one_that_is_dropped_is_gone() {
        let forever = |_: &Mouth| -> Result<(), String> {
            loop {
                std::thread::park();
            }
        };
        let child = start(&[], forever).unwrap();
        let pid = child.pid;
        kill(pid, Signal::SIGKILL).unwrap();
        let text = end(child).unwrap_err();
        assert!(text.contains("SIGKILL"), "{text}");
        let child = start(&[], forever).unwrap();
        let pid = child.pid;
        drop(child);
        assert_eq!(kill(pid, None), Err(Errno::ESRCH));
    }
}
