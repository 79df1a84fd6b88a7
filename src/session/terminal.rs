//! The terminal on stdin: raw while a guest owns it, restored whatever happens.
//!
//! Restored on drop, on panic, and on signals: most are read from a signalfd and end the session
//! normally, fatal ones have a handler. Output post-processing stays on, so that bulle's own
//! messages keep their line ends.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use super::outcome::CODE_FAILURE;

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
        restore_on_fatal_signals(&saved);
        // SAFETY: the function is safe to call at any time.
        unsafe { libc::atexit(restore_at_exit) };
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

/// For a process that ends without its session.
extern "C" fn restore_at_exit() {
    restore();
}

/// Makes a panic on any thread restore the terminal, print and end the process with bulle's own
/// failure code: a VM without one of its threads is none.
pub fn end_on_panic() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        previous(info);
        // SAFETY: ends the process at once; nothing runs after it.
        unsafe { libc::_exit(CODE_FAILURE.into()) }
    }));
}

/// Signals that end a process and that no session handles.
const FATAL: [i32; 9] = [
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGALRM,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGSYS,
];

/// What [`on_fatal_signal`] restores; never freed.
static FATAL_RESTORE: AtomicPtr<libc::termios> = AtomicPtr::new(ptr::null_mut());

extern "C" fn on_fatal_signal(signal: i32) {
    // SAFETY: the pointer is null or a leaked structure that is never written again; tcsetattr and
    // raise are async-signal-safe. The handler is gone (SA_RESETHAND), so the signal now kills.
    unsafe {
        let saved = FATAL_RESTORE.load(Ordering::SeqCst);
        if !saved.is_null() {
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved);
        }
        libc::raise(signal);
    }
}

/// Makes fatal signals restore `saved` before they kill.
fn restore_on_fatal_signals(saved: &Termios) {
    let saved: libc::termios = saved.clone().into();
    FATAL_RESTORE.store(Box::into_raw(Box::new(saved)), Ordering::SeqCst);
    for signal in FATAL {
        // SAFETY: the structure is plain data, filled in before use; the handler is
        // async-signal-safe.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fatal_signal as *const () as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, ptr::null_mut())
        };
        if result != 0 {
            log::debug!("signal {signal} will not restore the terminal");
        }
    }
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
