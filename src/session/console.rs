//! The host's end of the guest's console (COM1).
//!
//! Bytes come on vCPU threads and go straight to their sink, where a blocking write holds the
//! guest back as a slow terminal would; a VM that is being stopped gives up at once. On the way
//! they pass a tap that keeps the last lines and notices a kernel panic.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use devices::console::{LastLines, PanicDetector, PanicMark};
use devices::virtio::limiter::Limiter;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of console kept for reports and later readers: a kernel's messages at boot fit.
pub const KEPT: usize = 64 * 1024;
/// Lines of it that a report shows: a kernel's oops with its stack fits.
const SHOWN: usize = 60;

/// A console file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open {} for the console: name a file that this user can write", path.display())]
pub struct ConsoleFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where console bytes go.
pub enum Sink {
    /// A descriptor of the process, 1 or 2.
    Standard(ManuallyDrop<File>),
    /// A file of ours.
    File(File),
    /// Nowhere.
    None,
}

impl Sink {
    /// stdout.
    pub fn stdout() -> Self {
        Self::standard(1)
    }

    /// stderr.
    pub fn stderr() -> Self {
        Self::standard(2)
    }

    fn standard(fd: i32) -> Self {
        // SAFETY: descriptors 1 and 2 are open for the whole life of the process, and
        // ManuallyDrop keeps this handle from closing them.
        Self::Standard(ManuallyDrop::new(unsafe { File::from_raw_fd(fd) }))
    }

    /// Appends to `path`, made if absent, readable by its owner only.
    pub fn file(path: &Path) -> Result<Self, ConsoleFileError> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map(Self::File)
            .map_err(|source| ConsoleFileError {
                path: path.to_path_buf(),
                source,
            })
    }

    /// Waits until it can be written; a kick of the thread ends that.
    fn wait(&self) {
        let file: &File = match self {
            Self::Standard(file) => file,
            Self::File(file) => file,
            Self::None => return,
        };
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
        if let Err(error) = poll(&mut fds, PollTimeout::NONE) {
            log::debug!("console: {error}");
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Standard(file) => file.write(bytes),
            Self::File(file) => file.write(bytes),
            Self::None => Ok(bytes.len()),
        }
    }
}

/// What the tap has seen, shared between the vCPUs and the vmm thread.
#[derive(Debug)]
pub struct ConsoleTap {
    lines: Mutex<(LastLines, PanicDetector)>,
    panicked: AtomicBool,
    ended: AtomicBool,
    /// Bytes beyond the console's limit.
    dropped: AtomicU64,
    closing: AtomicBool,
    event: EventFd,
    /// Somebody reads along.
    followed: AtomicBool,
    /// Written at output while somebody does.
    output: EventFd,
}

impl ConsoleTap {
    /// `event` is written when a panic is noticed and again when its text is complete, `output` at output while
    /// somebody [`follow`](Self::follow)s.
    pub fn new(event: EventFd, output: EventFd) -> Arc<Self> {
        Arc::new(Self {
            lines: Mutex::new((LastLines::new(KEPT), PanicDetector::new())),
            panicked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            event,
            followed: AtomicBool::new(false),
            output,
        })
    }

    /// The last lines of the console, printable.
    pub fn last_lines(&self) -> Vec<String> {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .lines(SHOWN)
    }

    /// Output from `position` on, and how many bytes of it are not kept any more.
    pub fn since(&self, position: u64) -> (Vec<u8>, u64) {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.0.since(position)
    }

    /// Whether output is announced from now on.
    pub fn follow(&self, so: bool) {
        self.followed.store(so, Ordering::SeqCst);
    }

    /// Whether the console showed a kernel panic.
    pub fn panicked(&self) -> bool {
        self.panicked.load(Ordering::SeqCst)
    }

    /// Whether the panic's text is complete.
    pub fn panic_complete(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Bytes of output that went nowhere, being beyond the console's limit.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Lets blocked writers go: the VM is being stopped.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    fn observe(&self, bytes: &[u8]) {
        let mark = {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.0.push(bytes);
            lines.1.feed(bytes)
        };
        if self.followed.load(Ordering::SeqCst) {
            // Full: announced often enough.
            let _ = self.output.write(1);
        }
        let flag = match mark {
            Some(PanicMark::Begin) => &self.panicked,
            Some(PanicMark::End) => &self.ended,
            None => return,
        };
        flag.store(true, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            log::error!("a kernel panic was not announced: {error}");
        }
    }
}

/// The writer that the UART gets.
pub struct ConsoleWriter {
    tap: Arc<ConsoleTap>,
    sink: Sink,
    /// What goes beyond it is dropped, behind the tap.
    limiter: Option<Limiter>,
    dropping: bool,
}

impl ConsoleWriter {
    /// Writes to `sink`, past `tap`.
    pub fn new(tap: Arc<ConsoleTap>, sink: Sink, limiter: Option<Limiter>) -> Self {
        Self {
            tap,
            sink,
            limiter,
            dropping: false,
        }
    }

    /// Whether `bytes` may pass.
    fn passes(&mut self, bytes: &[u8]) -> bool {
        let limiter = self.limiter.as_ref();
        let passes = limiter.is_none_or(|l| l.take(Instant::now(), bytes.len() as u64));
        if !passes && !self.dropping {
            log::warn!("console output beyond its rate limit is dropped");
        }
        if !passes {
            let count = bytes.len() as u64;
            self.tap.dropped.fetch_add(count, Ordering::Relaxed);
        }
        self.dropping |= !passes;
        passes
    }
}

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tap.observe(bytes);
        let mut rest = match self.passes(bytes) {
            true => bytes,
            false => &[],
        };
        while !rest.is_empty() && !self.tap.closing.load(Ordering::SeqCst) {
            match self.sink.write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Another process has made the descriptor non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.sink.wait(),
                Err(error) => {
                    log::warn!("console output is lost from here on: {error}");
                    self.sink = Sink::None;
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
