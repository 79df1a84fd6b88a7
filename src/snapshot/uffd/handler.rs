//! RAM whose pages another process brings when they are touched, with Firecracker's protocol.
//!
//! bulle connects to the handler's socket and sends it one message: a JSON list of [`Mapping`]s with
//! the userfaultfd (SCM_RIGHTS). Nothing follows, but the connection stays open: its end is the end of
//! the handler and so of the VM, whose next fault nobody would answer. A thread of its own waits for
//! that, since any other may stand in a fault; what still stands when the VM should have ended goes
//! with the process.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arch::memory::GuestMemory;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Mode, Uffd, UffdError, feature};
use crate::config::MachineConfig;
use crate::sandbox::thread::{Role, ThreadError, spawn};
use crate::snapshot::ram::{self, MapError};
use crate::snapshot::socket;
use crate::telemetry::tell;
use crate::vm::{ExitLatch, VmExit};

/// How long the handler may take for what is touched while the machine is made.
const LOAD_PATIENCE: Duration = Duration::from_secs(60);
/// How long threads may stand in faults when the VM should end.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// Exit code of a process that has to be ended (docs/exit-codes.md).
const CODE_FAILURE: i32 = 125;

/// A region of guest RAM, as handlers know it (Firecracker's `GuestRegionUffdMapping`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// Address in bulle's process.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where its content is in the memory file.
    pub offset: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// The same under an older name.
    pub page_size_kib: u64,
}

/// No handler can be had.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// No userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// Nobody listens.
    #[error("Cannot connect to the page fault handler at {}", path.display())]
    Connect {
        /// As named.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It does not take the message.
    #[error("Cannot send the memory's mappings to the page fault handler at {}", path.display())]
    Send {
        /// As named.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// RAM.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No event descriptor.
    #[error("Cannot create an event descriptor")]
    Event(#[source] io::Error),
    /// No thread.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// The handler lost its connection, or never answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandlerLost {
    /// Its end of the socket is closed.
    #[error(
        "the page fault handler at {} closed its connection: nobody brings the guest's memory any more",
        path.display()
    )]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// A fault stands for too long.
    #[error(
        "the page fault handler at {} does not bring memory that is needed to {what} within {patience:?}",
        path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// For what.
        what: &'static str,
        /// How long it had.
        patience: Duration,
    },
}

/// RAM that a handler fills, which was told of it.
#[derive(Debug)]
pub struct Connected {
    path: PathBuf,
    stream: UnixStream,
    /// Faults wait as long as it is open; the handler's may be gone.
    _uffd: Uffd,
}

/// Maps the RAM of `config` empty and gives it to the handler that listens at `path`.
///
/// # Errors
/// [`HandlerError`].
pub fn map(config: &MachineConfig, path: &Path) -> Result<(GuestMemory, Connected), HandlerError> {
    let uffd = Uffd::new(feature::EVENT_REMOVE)?;
    let stream = socket::connect(path).map_err(|source| HandlerError::Connect {
        path: path.to_owned(),
        source,
    })?;
    let memory = crate::vm::memory::map(config).map_err(MapError::from)?;
    for region in memory.iter() {
        let range = (region.as_ptr() as u64, region.len());
        // SAFETY: all of one region of guest RAM, which nobody uses yet.
        unsafe { uffd.register(range, Mode::Missing)? };
    }
    let message = mappings(&memory, config);
    send(&stream, &message, &uffd).map_err(|source| HandlerError::Send {
        path: path.to_owned(),
        source,
    })?;
    let path = path.to_owned();
    let connected = Connected {
        path,
        stream,
        _uffd: uffd,
    };
    Ok((memory, connected))
}

fn mappings(memory: &GuestMemory, config: &MachineConfig) -> Vec<Mapping> {
    let page = config.huge_pages.reserved_mib();
    let page = page.map_or(super::super::pages::PAGE, |mib| mib << 20);
    let regions = memory.iter().zip(ram::regions(memory));
    let mapping = regions.map(|(region, here)| Mapping {
        base_host_virt_addr: region.as_ptr() as u64,
        size: here.len,
        offset: here.offset,
        page_size: page,
        page_size_kib: page,
    });
    mapping.collect()
}

fn send(stream: &UnixStream, mappings: &[Mapping], uffd: &Uffd) -> io::Result<()> {
    let text = serde_json::to_vec(mappings)?;
    socket::send(stream, &text, &[uffd.as_fd().as_raw_fd()])
}

/// What a machine is at, for whoever watches its handler.
const LOADING: u8 = 0;
const LOADED: u8 = 1;
const ENDING: u8 = 2;
const GONE: u8 = 3;

/// What both sides of the watch share.
struct Shared {
    phase: AtomicU8,
    changed: EventFd,
}

/// Watches a handler, and has the VM end without it. Faults wait while it lives.
pub struct Watched {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Connected {
    /// Watches the handler from now on; its end is announced to `exit`.
    ///
    /// # Errors
    /// Without a descriptor or a thread left.
    pub fn watch(self, exit: &Arc<ExitLatch>) -> Result<Watched, HandlerError> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(HandlerError::Event)?;
        let shared = Arc::new(Shared {
            phase: AtomicU8::new(LOADING),
            changed,
        });
        let watch = Watch {
            connected: self,
            shared: shared.clone(),
            exit: exit.clone(),
            lost: None,
            deadline: Some((Instant::now() + LOAD_PATIENCE, "load the machine")),
        };
        let thread = spawn(Role::Pager, move || watch.run())?;
        Ok(Watched {
            shared,
            thread: Some(thread),
        })
    }
}

impl Watched {
    /// The machine is made.
    pub fn loaded(&self) {
        self.enter(LOADED);
    }

    /// The VM ends: no fault is to keep it from that.
    pub fn ending(&self) {
        self.enter(ENDING);
    }

    fn enter(&self, phase: u8) {
        self.shared.phase.fetch_max(phase, Ordering::SeqCst);
        if let Err(error) = self.shared.changed.write(1) {
            log::error!("the page fault handler's watch is not told of a change: {error}");
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.enter(GONE);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the page fault handler's watch panicked");
        }
    }
}

/// What the thread has.
struct Watch {
    connected: Connected,
    shared: Arc<Shared>,
    exit: Arc<ExitLatch>,
    lost: Option<HandlerLost>,
    /// When the process ends, whatever stands in a fault, and what it is waiting for.
    deadline: Option<(Instant, &'static str)>,
}

impl Watch {
    fn run(mut self) {
        loop {
            match self.shared.phase.load(Ordering::SeqCst) {
                LOADED if self.lost.is_none() => self.deadline = None,
                ENDING => self.end_soon(),
                GONE => return,
                _ => {}
            }
            self.wait();
            if self.deadline.is_some_and(|(at, _)| Instant::now() >= at) {
                self.end_process();
            }
        }
    }

    fn end_soon(&mut self) {
        let at = Instant::now() + END_PATIENCE;
        match &mut self.deadline {
            Some((before, _)) if *before <= at => {}
            deadline => *deadline = Some((at, "end the machine")),
        }
    }

    /// Waits until something happens or time is up, and takes in what it is.
    fn wait(&mut self) {
        let timeout = self.deadline.map_or(PollTimeout::NONE, |(at, _)| {
            let left = at.saturating_duration_since(Instant::now());
            // One more, so that it is over then.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        // SAFETY: the descriptor is open as long as `self`.
        let changed = unsafe {
            std::os::fd::BorrowedFd::borrow_raw(AsRawFd::as_raw_fd(&self.shared.changed))
        };
        let mut fds = [
            PollFd::new(changed, PollFlags::POLLIN),
            PollFd::new(self.connected.stream.as_fd(), PollFlags::POLLIN),
        ];
        let watched = if self.lost.is_none() { 2 } else { 1 };
        let fds = fds.get_mut(..watched).unwrap_or_default();
        if let Err(errno) = poll(fds, timeout) {
            log::debug!("waiting for the page fault handler was interrupted: {errno}");
            return;
        }
        let _ = self.shared.changed.read();
        if self.lost.is_none() && self.is_closed() {
            self.lose();
        }
    }

    /// Whether the handler's end is closed. What it says is not listened to.
    fn is_closed(&self) -> bool {
        let mut buffer = [0; 4096];
        let stream = self.connected.stream.as_raw_fd();
        match recv(stream, &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => true,
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => false,
            Err(_) => true,
        }
    }

    fn lose(&mut self) {
        let path = self.connected.path.clone();
        let lost = HandlerLost::Closed { path };
        self.exit.set(VmExit::HandlerLost(lost.clone()));
        self.lost = Some(lost);
        self.end_soon();
    }

    /// Nothing else can end a thread that stands in a fault.
    fn end_process(&self) {
        let lost = self.lost.clone().unwrap_or_else(|| HandlerLost::Silent {
            path: self.connected.path.clone(),
            what: self.deadline.map_or("end", |(_, what)| what),
            patience: match self.shared.phase.load(Ordering::SeqCst) {
                LOADING => LOAD_PATIENCE,
                _ => END_PATIENCE,
            },
        });
        tell(lost);
        std::process::exit(CODE_FAILURE);
    }
}
