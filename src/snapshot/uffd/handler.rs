//! RAM whose pages another process brings when they are touched, with Firecracker's protocol.
//!
//! bulle connects to the handler's socket and sends it one message: a JSON list of [`Mapping`]s, also of what is plugged, with
//! the userfaultfd (SCM_RIGHTS). Nothing follows, but the connection stays open: its end is the end of
//! the handler and so of the VM, whose next fault nobody would answer ([`super::watch`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arch::memory::GuestMemory;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::relay::{Absent, Relay};
use super::watch::{HandlerLost, Provider};
use super::{Mode, Uffd, UffdError, feature};
use crate::config::MachineConfig;
use crate::sandbox::thread::ThreadError;
use crate::snapshot::ram::{self, MapError};
use crate::snapshot::socket;

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

impl Mapping {
    fn new((host, size): (u64, u64), offset: u64, page: u64) -> Self {
        Self {
            base_host_virt_addr: host,
            size,
            offset,
            page_size: page,
            page_size_kib: page,
        }
    }
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
    /// Hot-pluggable memory.
    #[error("Cannot map hot-pluggable memory as it was")]
    Plug(#[source] io::Error),
    /// No event descriptor.
    #[error("Cannot create an event descriptor")]
    Event(#[source] io::Error),
    /// No thread.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// RAM that a handler fills, which was told of it.
#[derive(Debug)]
pub struct Connected {
    path: PathBuf,
    stream: UnixStream,
    /// Faults wait as long as it is open; the handler's may be gone.
    _uffd: Arc<Uffd>,
    /// Of devices in hot-pluggable memory.
    _relay: Option<Relay>,
}

/// Maps the RAM of `config` empty and gives it to the handler that listens at `path`, with what was plugged of
/// `absent`.
///
/// # Errors
/// [`HandlerError`].
pub fn map(
    config: &MachineConfig,
    path: &Path,
    absent: &[Absent],
) -> Result<(GuestMemory, Connected), HandlerError> {
    let uffd = Arc::new(Uffd::new(feature::EVENT_REMOVE)?);
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
    let relay = match absent {
        [] => None,
        absent => Some(Relay::new(absent, &uffd)?),
    };
    let mut message = mappings(&memory, config);
    message.extend(absent.iter().flat_map(plugged));
    send(&stream, &message, &uffd).map_err(|source| HandlerError::Send {
        path: path.to_owned(),
        source,
    })?;
    let path = path.to_owned();
    let connected = Connected {
        path,
        stream,
        _uffd: uffd,
        _relay: relay,
    };
    Ok((memory, connected))
}

fn mappings(memory: &GuestMemory, config: &MachineConfig) -> Vec<Mapping> {
    let page = config.huge_pages.reserved_mib();
    let page = page.map_or(super::super::pages::PAGE, |mib| mib << 20);
    let regions = memory.iter().zip(ram::regions(memory));
    let mapping = regions.map(|(region, here)| {
        let host = region.as_ptr() as u64;
        Mapping::new((host, here.len), here.offset, page)
    });
    mapping.collect()
}

/// What was plugged of a device's memory, where KVM has it.
fn plugged(absent: &Absent) -> impl Iterator<Item = Mapping> {
    let region = &absent.region;
    absent.plugged.iter().map(|piece| {
        let range = (region.address() + piece.start, piece.end - piece.start);
        Mapping::new(range, absent.offset + piece.start, region.page())
    })
}

fn send(stream: &UnixStream, mappings: &[Mapping], uffd: &Uffd) -> io::Result<()> {
    let text = serde_json::to_vec(mappings)?;
    socket::send(stream, &text, &[uffd.as_fd().as_raw_fd()])
}

impl Provider for Connected {
    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether the handler's end is closed. What it says is not listened to.
    fn attend(&mut self) -> Result<(), HandlerLost> {
        let mut buffer = [0; 4096];
        let stream = self.stream.as_raw_fd();
        match recv(stream, &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(1..) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Ok(0) | Err(_) => Err(HandlerLost::Closed {
                path: self.path.clone(),
            }),
        }
    }

    fn silent(&self, what: &'static str, patience: Duration) -> HandlerLost {
        let path = self.path.clone();
        HandlerLost::Silent {
            path,
            what,
            patience,
        }
    }
}
