//! The last steps in the new process: from fork to the command's own code.
//!
//! Unsafe: the pointer arrays that execve reads.

use core::ffi::{CStr, c_char};
use core::ptr::null;

use agent_protocol::start::StartView;
use agent_protocol::{MAX_STRINGS, Stage};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::sys;
use crate::text::Text;

/// Where programs are looked for when the environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What runs a file that is executable but of no known format, as in a shell.
const SHELL: &CStr = c"/bin/sh";

/// Why the command does not run.
#[derive(Clone, Copy)]
pub struct Failure {
    /// At which step.
    pub stage: Stage,
    /// With which error.
    pub errno: Errno,
}

impl Failure {
    /// For `map_err`.
    pub fn at(stage: Stage) -> impl Fn(Errno) -> Self {
        move |errno| Self { stage, errno }
    }
}

/// Turns this process into the command. Returns only on failure.
pub fn run(start: &StartView<'_>, files: &[OwnedFd; 3], tty: bool) -> Failure {
    match prepare(start, files, tty) {
        Ok(()) => execute(start),
        Err(failure) => failure,
    }
}

fn prepare(start: &StartView<'_>, files: &[OwnedFd; 3], tty: bool) -> Result<(), Failure> {
    sys::block_signals(0);
    let pipe = Failure::at(Stage::Pipe);
    rustix::process::setsid().map_err(Failure::at(Stage::Fork))?;
    rustix::stdio::dup2_stdin(&files[0]).map_err(&pipe)?;
    rustix::stdio::dup2_stdout(&files[1]).map_err(&pipe)?;
    rustix::stdio::dup2_stderr(&files[2]).map_err(&pipe)?;
    if tty {
        rustix::process::ioctl_tiocsctty(&files[0]).map_err(Failure::at(Stage::Pty))?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let cwd = start
        .strings()
        .next()
        .map(c_str)
        .filter(|s| !s.is_empty())
        .unwrap_or(c"/");
    rustix::process::chdir(cwd).map_err(Failure::at(Stage::Cwd))
}

/// A string of a [`StartView`], which ends with NUL.
fn c_str(bytes: &[u8]) -> &CStr {
    CStr::from_bytes_with_nul(bytes).unwrap_or_default()
}

/// The arguments and environment as execve wants them.
struct Pointers {
    /// A free slot for the shell, the arguments, null, the environment, null.
    list: [*const c_char; MAX_STRINGS + 3],
    argc: usize,
}

impl Pointers {
    fn new(start: &StartView<'_>) -> Self {
        let mut list = [null(); MAX_STRINGS + 3];
        for (i, string) in start.strings().skip(1).enumerate() {
            let slot = if i < start.argc { 1 + i } else { 2 + i };
            list[slot] = string.as_ptr().cast();
        }
        Self {
            list,
            argc: start.argc,
        }
    }

    fn exec(&self, path: &CStr) -> Errno {
        let envp = &self.list[self.argc + 2..];
        // SAFETY: the list holds pointers to the NUL-terminated strings of a Start that outlives
        // this call, and both parts end with null: at argc + 1 and after the last variable.
        unsafe { sys::execve(path, self.list[1..].as_ptr(), envp.as_ptr()) }
    }

    /// As `exec`, with the shell as interpreter.
    fn exec_shell(&mut self, path: &CStr) -> Errno {
        let first = self.list[1];
        self.list[0] = SHELL.as_ptr();
        self.list[1] = path.as_ptr();
        let envp = &self.list[self.argc + 2..];
        // SAFETY: as in `exec`; the path is NUL-terminated and outlives the call.
        let errno = unsafe { sys::execve(SHELL, self.list.as_ptr(), envp.as_ptr()) };
        self.list[1] = first;
        errno
    }

    fn exec_or_shell(&mut self, path: &CStr) -> Errno {
        match self.exec(path) {
            Errno::NOEXEC => self.exec_shell(path),
            errno => errno,
        }
    }
}

/// Looks for the program as a shell does and executes it.
fn execute(start: &StartView<'_>) -> Failure {
    let mut pointers = Pointers::new(start);
    let name = start.strings().nth(1).map(c_str).unwrap_or_default();
    let fail = Failure::at(Stage::Exec);
    if name.is_empty() {
        return fail(Errno::NOENT);
    }
    if name.to_bytes().contains(&b'/') {
        return explain(name, pointers.exec_or_shell(name));
    }
    let mut denied = None;
    for directory in search_path(start).split(|&b| b == b':') {
        let mut path = Text::<4096>::new();
        path.push(if directory.is_empty() {
            b"."
        } else {
            directory
        });
        path.push(b"/");
        path.push(name.to_bytes_with_nul());
        let Ok(path) = CStr::from_bytes_with_nul(path.as_bytes()) else {
            continue;
        };
        match explain(path, pointers.exec_or_shell(path)) {
            Failure {
                stage: Stage::Exec,
                errno: Errno::NOENT | Errno::NOTDIR,
            } => {}
            failure @ Failure {
                errno: Errno::ACCESS,
                ..
            } => denied = Some(failure),
            failure => return failure,
        }
    }
    denied.unwrap_or(fail(Errno::NOENT))
}

fn search_path<'a>(start: &StartView<'a>) -> &'a [u8] {
    start
        .strings()
        .skip(1 + start.argc)
        .find_map(|variable| variable.strip_prefix(b"PATH=")?.strip_suffix(b"\0"))
        .unwrap_or(DEFAULT_PATH)
}

/// "No such file" for a file that is there means its interpreter.
fn explain(path: &CStr, errno: Errno) -> Failure {
    let there = rustix::fs::access(path, rustix::fs::Access::EXISTS).is_ok();
    let stage = if errno == Errno::NOENT && there {
        Stage::Interpreter
    } else {
        Stage::Exec
    };
    Failure { stage, errno }
}
