//! The conversation with a backend (vhost-user protocol, "Communication" and "Message types").
//!
//! Requests are sent by the I/O thread, and by the VMM's for the configuration space. Each conversation
//! has [`PATIENCE`]: then the socket is shut, whoever waits for an answer gets an error, and the
//! connection is of no use any more.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::options::{PATIENCE, Spawn, VhostUserError, VhostUserOptions};
use super::space::{LEN, OFFERED};
use crate::virtio::GuestRam;
use crate::virtio::block::MAX_QUEUES;
use crate::virtio::core::CORE_FEATURES;
use crate::virtio::io::Lent;

const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A queue that the backend is to serve.
pub(super) struct Served<'a> {
    /// Its index.
    pub index: usize,
    /// Its rings.
    pub lent: Lent<'a>,
    /// The backend's interrupts.
    pub call: &'a EventFd,
}

/// A connection. Its clones are the same one.
#[derive(Clone)]
pub(super) struct Link {
    path: PathBuf,
    socket: Arc<UnixStream>,
    frontend: Frontend,
    spawn: Spawn,
}

/// What a backend has.
pub(super) struct Found {
    pub link: Link,
    /// Features of virtio, of those that are offered.
    pub features: u64,
    pub queues: u16,
    pub config: [u8; LEN],
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Link {
    /// Connects, and asks the backend for all that a driver is told.
    pub fn open(options: &VhostUserOptions) -> Result<Found, VhostUserError> {
        let path = options.socket.clone();
        let socket = connect(&path).map_err(|source| VhostUserError::Connect {
            path: path.clone(),
            source,
        })?;
        let own = socket.try_clone();
        let own = own.map_err(|source| host("duplicate a socket", source))?;
        let link = Self {
            path,
            socket: Arc::new(own),
            frontend: Frontend::from_stream(socket, MAX_QUEUES.into()),
            spawn: options.spawn,
        };
        let features = link.talk("tell its features", |backend| {
            backend.set_owner()?;
            backend.get_features()
        })?;
        if features >> VIRTIO_F_VERSION_1 & 1 == 0 {
            return Err(link.lacks("VIRTIO_F_VERSION_1"));
        }
        if features & PROTOCOL == 0 {
            return Err(link.lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let most = link.protocol()?;
        let queues = match (most, options.queues) {
            (most, Some(wanted)) if u64::from(wanted) > most => {
                let path = link.path.clone();
                return Err(VhostUserError::Queues { path, wanted, most });
            }
            (_, Some(wanted)) => wanted,
            (0, None) => return Err(link.lacks("a queue")),
            (most, None) => options
                .vcpus
                .clamp(1, u16::try_from(most).unwrap_or(MAX_QUEUES)),
        };
        let mut offered = OFFERED | CORE_FEATURES;
        if !options.flush {
            offered &= !(1 << VIRTIO_BLK_F_FLUSH);
        }
        if queues == 1 {
            offered &= !(1 << VIRTIO_BLK_F_MQ);
        }
        Ok(Found {
            features: features & offered,
            queues: if features >> VIRTIO_BLK_F_MQ & 1 == 0 {
                1
            } else {
                queues
            },
            config: link.config()?,
            link,
        })
    }

    /// Agrees on the protocol: the most queues.
    fn protocol(&self) -> Result<u64, VhostUserError> {
        let has = self.talk(
            "tell its protocol features",
            Frontend::get_protocol_features,
        )?;
        if !has.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(self.lacks("VHOST_USER_PROTOCOL_F_CONFIG"));
        }
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        self.talk("agree on the protocol", |backend| {
            backend.set_protocol_features(has & wanted)?;
            if has.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                backend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            match has.contains(VhostUserProtocolFeatures::MQ) {
                true => Ok(backend.get_queue_num()?.min(MAX_QUEUES.into())),
                false => Ok(1),
            }
        })
    }

    /// Reads the configuration space.
    pub fn config(&self) -> Result<[u8; LEN], VhostUserError> {
        let what = "tell the configuration space";
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, config) = self.talk(what, |backend| {
            backend.get_config(0, LEN as u32, flags, &[0; LEN])
        })?;
        let config: Result<[u8; LEN], _> = config.try_into();
        config.map_err(|_| self.failed(what, io::ErrorKind::InvalidData.into()))
    }

    /// Has the backend serve `queues` of a driver that took `features`.
    pub fn start(
        &self,
        features: u64,
        ram: &GuestRam,
        queues: &[Served<'_>],
    ) -> Result<(), VhostUserError> {
        let table = self.table(ram)?;
        let rings = queues.iter().map(|queue| self.rings(ram, &queue.lent));
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        self.talk("take the queues over", |backend| {
            backend.set_features(features | PROTOCOL)?;
            backend.set_mem_table(&table)?;
            for (Served { index, lent, call }, rings) in queues.iter().zip(&rings) {
                backend.set_vring_num(*index, lent.size)?;
                backend.set_vring_addr(*index, rings)?;
                backend.set_vring_base(*index, lent.next_avail)?;
                backend.set_vring_call(*index, call)?;
                backend.set_vring_kick(*index, lent.kick)?;
                backend.set_vring_enable(*index, true)?;
            }
            Ok(())
        })
    }

    /// Has the backend leave `queues` alone: the chain of each that it would take next.
    pub fn stop(&self, queues: &[usize]) -> Result<Vec<u16>, VhostUserError> {
        self.talk("give the queues back", |backend| {
            let queues = queues.iter().map(|queue| {
                backend.set_vring_enable(*queue, false)?;
                Ok(backend.get_vring_base(*queue)? as u16)
            });
            queues.collect()
        })
    }

    /// RAM, as another process maps it.
    fn table(&self, ram: &GuestRam) -> Result<Vec<VhostUserMemoryRegionInfo>, VhostUserError> {
        let regions = ram.iter().map(|region| {
            let file = region.file_offset()?;
            // What is private shows others the file as it was.
            if region.flags() & libc::MAP_SHARED == 0 {
                return None;
            }
            Some(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: file.start(),
                mmap_handle: file.file().as_raw_fd(),
            })
        });
        let regions: Option<Vec<_>> = regions.collect();
        let path = self.path.clone();
        regions.ok_or(VhostUserError::Private { path })
    }

    /// The rings by addresses of this process, as the protocol has them.
    fn rings(&self, ram: &GuestRam, lent: &Lent<'_>) -> Result<VringConfigData, VhostUserError> {
        let size = usize::from(lent.size);
        let [desc, avail, used] = lent.rings;
        let at = |addr, len| {
            let slice = GuestMemoryBackend::get_slice(ram, GuestAddress(addr), len);
            let slice = slice.map_err(|_| {
                host(
                    "find a ring in one piece",
                    io::ErrorKind::InvalidInput.into(),
                )
            })?;
            Ok(slice.ptr_guard().as_ptr() as u64)
        };
        Ok(VringConfigData {
            queue_max_size: lent.size,
            queue_size: lent.size,
            flags: 0,
            desc_table_addr: at(desc, 16 * size)?,
            avail_ring_addr: at(avail, 6 + 2 * size)?,
            used_ring_addr: at(used, 6 + 8 * size)?,
            log_addr: None,
        })
    }

    /// Asks the backend, which has [`PATIENCE`].
    fn talk<T>(
        &self,
        what: &'static str,
        ask: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        let late = Arc::new(AtomicBool::new(false));
        let (done, ended) = channel::<()>();
        let (is_late, socket) = (Arc::clone(&late), Arc::clone(&self.socket));
        let watch = move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                is_late.store(true, Ordering::SeqCst);
                // Fails where there is no connection any more.
                let _ = socket.shutdown(Shutdown::Both);
            }
        };
        (self.spawn)(Box::new(watch)).map_err(|source| host("create a thread", source))?;
        let answer = ask(&mut self.frontend.clone());
        drop(done);
        answer.map_err(|error| {
            self.failed(
                what,
                match late.load(Ordering::SeqCst) {
                    true => io::Error::new(io::ErrorKind::TimedOut, "it did not answer in time"),
                    false => io::Error::other(error.to_string()),
                },
            )
        })
    }

    /// Whether the backend hung up.
    pub fn is_closed(&self) -> bool {
        let mut polled = [PollFd::new(&*self.socket, PollFlags::empty())];
        let now = Timespec::default();
        let polled_any = poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0);
        polled_any
            && polled
                .iter()
                .any(|p| p.revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// That the backend has not `what` is needed.
    pub fn lacks(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Lacks {
            path: self.path.clone(),
            what,
        }
    }

    /// That the backend went away.
    pub fn gone(&self) -> VhostUserError {
        let closed = io::Error::new(io::ErrorKind::ConnectionReset, "it closed the connection");
        self.failed("serve the disk", closed)
    }

    fn failed(&self, what: &'static str, source: io::Error) -> VhostUserError {
        VhostUserError::Answer {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

fn host(what: &'static str, source: io::Error) -> VhostUserError {
    VhostUserError::Host { what, source }
}

/// Connects within [`PATIENCE`], also where the backend's queue of connections is full.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}
