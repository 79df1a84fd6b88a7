//! Signals to bulle, read from a descriptor on the vmm thread.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

const SIGNALS: [Signal; 8] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGWINCH,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGIO,
];

/// Those that end what has no guest to be told.
pub const ENDING: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// The signals that a session handles, blocked for the calling thread and all that it starts.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals and opens the descriptor. Call it before any other thread starts.
    pub fn block() -> nix::Result<Self> {
        let set = SigSet::from_iter(SIGNALS);
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
        // For good: a disk or a log at the limit of file sizes is an error of that write only.
        let file_size = SigSet::from_iter([Signal::SIGXFSZ]);
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&file_size), None)?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map(Self)
    }

    /// Whether one of [`ENDING`] waits. All are taken until then.
    pub fn ending(&mut self) -> bool {
        std::iter::from_fn(|| self.next()).any(|signal| ENDING.contains(&signal))
    }

    /// The next signal that waits.
    pub fn next(&mut self) -> Option<Signal> {
        match self.0.read_signal() {
            Ok(Some(info)) => Signal::try_from(info.ssi_signo as i32).ok(),
            Ok(None) | Err(Errno::EAGAIN) => None,
            Err(error) => {
                log::error!("cannot read signals: {error}");
                None
            }
        }
    }
}

impl Drop for Signals {
    /// From here on they have their usual effect.
    fn drop(&mut self) {
        let set = SigSet::from_iter(SIGNALS);
        if let Err(error) = pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&set), None) {
            log::error!("signals stay blocked: {error}");
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
