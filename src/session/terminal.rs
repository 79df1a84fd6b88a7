//! The terminal on stdin: raw while a guest owns it, restored whatever happens.
//!
//! Restored on drop, on panic (see [`restore_on_panic`]) and, since signals are read from a
//! signalfd and end the session normally, on signals. Output post-processing stays on, so that
//! bulle's own messages keep their line ends.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// stdin in raw mode, while it lives.
pub struct RawTerminal(());

impl RawTerminal {
    /// Sets stdin raw where it is a terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let saved = tcgetattr(stdin.as_fd())?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        raw.output_flags = saved.output_flags | OutputFlags::OPOST;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was found; does nothing where it was never changed.
pub fn restore() {
    let saved = SAVED.try_lock().ok().and_then(|mut saved| saved.take());
    if let Some(saved) = saved
        && let Err(error) = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &saved)
    {
        log::warn!("terminal not restored: {error}");
    }
}

/// Makes panics restore the terminal before they print.
pub fn restore_on_panic() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        previous(info);
    }));
}

/// Rows and columns of the terminal on stdout.
pub fn window_size() -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ fills the structure it is given; zeroes are a valid value as well.
    let size = unsafe {
        if libc::ioctl(
            io::stdout().as_raw_fd(),
            libc::TIOCGWINSZ,
            size.as_mut_ptr(),
        ) != 0
        {
            return None;
        }
        size.assume_init()
    };
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
