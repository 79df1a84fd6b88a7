//! virtio-fs device (section 5.11): a directory of the host, served to the guest by this process.
//!
//! The device is owned by its I/O thread, which carries requests out one after the other with
//! system calls that wait for the host's filesystem: give a share a thread of its own. No request
//! is under way between calls, so there is nothing to drain. The layers: `message` (buffers of the
//! guest), `server` (FUSE), its operations in `names`, `files`, `dirs` and `attrs`, on `nodes` and
//! `handles`, and at the bottom `host`, the confined system calls.

mod attrs;
mod dirs;
mod files;
mod handles;
mod host;
mod message;
mod names;
mod nodes;
mod owner;
mod server;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use self::handles::HandleState;
use self::host::ProcFds;
use self::nodes::NodeState;
use self::owner::Owners;
pub use self::owner::Ownership;
use self::server::{Policy, Server, Session};
use super::GuestRam;
use super::device::{ConfigSpace, DeviceError, DeviceState, Traits, VirtioDevice, read_config};
use super::io::{Io, Segment};

/// Longest tag in bytes.
pub const MAX_TAG: usize = 36;
/// Most request queues.
pub const MAX_QUEUES: u16 = 64;
/// Fewest file descriptors that a share works with.
pub const MIN_FDS: u32 = 16;
/// Bytes of the configuration space: tag, number of request queues.
const CONFIG_LEN: usize = MAX_TAG + 4;
/// Timeout in the guest's caches for [`CachePolicy::Auto`].
const AUTO_TIMEOUT: Duration = Duration::from_secs(1);
/// The same for [`CachePolicy::Always`].
const ALWAYS_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What the guest may remember of files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// Nothing: each access comes to the host.
    None,
    /// Data until the file is opened again or seen to be changed; names and attributes for a
    /// second.
    #[default]
    Auto,
    /// All, for a day: only for what nobody changes on the host.
    Always,
}

/// What a share is.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// The name that the guest mounts, 1 to [`MAX_TAG`] bytes without a zero byte.
    pub tag: String,
    /// The directory to be shared.
    pub path: PathBuf,
    /// Refuse all changes, whatever the guest mounts.
    pub read_only: bool,
    /// What the guest may remember.
    pub cache: CachePolicy,
    /// For how long it remembers names and attributes, where not as the cache policy has it.
    pub timeout: Option<Duration>,
    /// Let the guest gather writes. Nobody on the host must write to the same files.
    pub writeback: bool,
    /// Offer extended attributes.
    pub xattr: bool,
    /// Whose files the guest creates.
    pub ownership: Ownership,
    /// Number of request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Size of each queue, a power of two from 2 to 32768. Linux sends requests of up to this many
    /// pages less 4.
    pub queue_size: u16,
    /// Most file descriptors to be open for the guest, at least [`MIN_FDS`]; `None` is a quarter
    /// of what this process may open, up to 65536.
    pub max_fds: Option<u32>,
    /// Most files to be known at a time.
    pub max_nodes: u32,
}

impl FsOptions {
    /// A read-only share of `path` with the usual options.
    pub fn new(tag: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            tag: tag.into(),
            path: path.into(),
            read_only: true,
            cache: CachePolicy::default(),
            timeout: None,
            writeback: false,
            xattr: true,
            ownership: Ownership::default(),
            queues: 1,
            queue_size: 1024,
            max_fds: None,
            max_nodes: 1 << 20,
        }
    }

    /// Whether a share can be made of this, as far as can be told without making it.
    pub fn check(&self) -> Result<(), FsError> {
        let size = self.tag.len();
        if size == 0 || size > MAX_TAG || self.tag.contains('\0') {
            let tag = self.tag.clone();
            return Err(FsError::Tag { tag });
        }
        let (queues, size) = (self.queues, self.queue_size);
        let sized = size.is_power_of_two() && (2..=1 << 15).contains(&size);
        if !(1..=MAX_QUEUES).contains(&queues) || !sized {
            return Err(FsError::Queues { queues, size });
        }
        let (fds, nodes) = (self.fds(), self.max_nodes);
        if fds < MIN_FDS || nodes < MIN_FDS {
            return Err(FsError::Limits { fds, nodes });
        }
        self.open().map(drop)
    }

    fn fds(&self) -> u32 {
        self.max_fds.unwrap_or_else(usual_max_fds)
    }

    /// Opens the directory.
    fn open(&self) -> Result<OwnedFd, FsError> {
        let root = host::open_root(&self.path).map_err(|errno| FsError::Open {
            path: self.path.clone(),
            source: errno.into(),
        })?;
        host::probe(&root).map_err(failed("use openat2 (Linux 5.6)"))?;
        if host::is_kernels(&root).map_err(failed("look at the filesystem"))? {
            let path = self.path.clone();
            return Err(FsError::Kernels { path });
        }
        Ok(root)
    }
}

/// A share could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// A tag that cannot be.
    #[error("tag {tag:?} of a share: want 1 to 36 bytes without a zero byte")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// A number of queues that cannot be.
    #[error(
        "{queues} queues of size {size}: want 1 to 64 queues of a power of two from 2 to 32768"
    )]
    Queues {
        /// Wanted number.
        queues: u16,
        /// Wanted size.
        size: u16,
    },
    /// Too few file descriptors or files.
    #[error("limits of {fds} file descriptors and {nodes} files for a share: want at least 16")]
    Limits {
        /// File descriptors.
        fds: u32,
        /// Files known at a time.
        nodes: u32,
    },
    /// The directory cannot be opened.
    #[error("cannot share {path:?}: want a directory that may be entered")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory is a window into the host's kernel.
    #[error("cannot share {path:?}: it is on a filesystem of the kernel, such as /proc or /sys")]
    Kernels {
        /// The directory.
        path: PathBuf,
    },
    /// The guest's users cannot be those of the host.
    #[error(
        "files for the guest's users need CAP_SETUID and CAP_SETGID; use the ownership `squash`"
    )]
    Ownership(#[source] io::Error),
    /// The host lacks something.
    #[error("cannot {what} for a share")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not the share that the saved guest knows.
    #[error("share {tag:?} was {saved:?} when the machine was saved")]
    Saved {
        /// In the saved state.
        saved: String,
        /// As configured.
        tag: String,
    },
    /// The saved state is broken.
    #[error("the saved state of share {tag:?} cannot be used: {why}")]
    State {
        /// The share.
        tag: String,
        /// What is wrong.
        why: &'static str,
    },
}

/// What is saved of a share: what the guest knows of its files, not the files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The tag that the guest knows; empty before there was a guest.
    #[serde(default)]
    tag: String,
    /// The mount that the directory was on.
    #[serde(default)]
    mount: u64,
    session: Option<Session>,
    nodes: Vec<NodeState>,
    handles: Vec<HandleState>,
}

/// The configuration space (section 5.11.4).
#[derive(Debug)]
struct Space([u8; CONFIG_LEN]);

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.0, offset, data);
    }
}

/// The virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    server: Server,
    space: Arc<Space>,
    queues: u16,
    queue_size: u16,
}

impl Fs {
    /// Opens the directory and makes the device. To be called in the process that runs it, with
    /// the user and limits that it will have.
    pub fn new(options: FsOptions, state: &FsState) -> Result<Self, FsError> {
        options.check()?;
        if !state.tag.is_empty() && state.tag != options.tag {
            return Err(FsError::Saved {
                saved: state.tag.clone(),
                tag: options.tag,
            });
        }
        let (root, max_fds) = (options.open()?, options.fds());
        let FsOptions {
            tag,
            queues,
            queue_size,
            max_nodes,
            ..
        } = options;
        let stat = host::stat(&root).map_err(failed("look at the directory"))?;
        let proc = ProcFds::open().map_err(failed("open /proc/self/fd"))?;
        let owners = Owners::new(options.ownership).map_err(|e| FsError::Ownership(e.into()))?;
        let policy = Policy {
            read_only: options.read_only,
            cache: options.cache,
            timeout: options.timeout.unwrap_or(match options.cache {
                CachePolicy::None => Duration::ZERO,
                CachePolicy::Auto => AUTO_TIMEOUT,
                CachePolicy::Always => ALWAYS_TIMEOUT,
            }),
            writeback: options.writeback && !options.read_only,
            xattr: options.xattr,
            umask: umask().map_err(|source| FsError::Host {
                what: "read the umask",
                source,
            })?,
        };
        let limits = (max_fds as usize, max_nodes as usize);
        let mut server = Server::new(policy, owners, proc, (Arc::new(root), &stat), limits);
        server.session = state.session;
        let loaded = server.nodes.load(&state.nodes, state.mount);
        let loaded = loaded.and_then(|()| server.load_handles(&state.handles));
        if let Err(why) = loaded {
            return Err(FsError::State { tag, why });
        }
        let mut space = [0; CONFIG_LEN];
        let number = u32::from(queues).to_le_bytes();
        for (to, from) in space.iter_mut().zip(tag.bytes()) {
            *to = from;
        }
        for (to, from) in space.iter_mut().skip(MAX_TAG).zip(number) {
            *to = from;
        }
        Ok(Self {
            tag,
            server,
            space: Arc::new(Space(space)),
            queues,
            queue_size,
        })
    }

    /// Carries out one FUSE request, which is in `readable`, and answers in `writable`; returns
    /// how many bytes were written there. This is all that the queues do, and can be fuzzed
    /// without them. Fails where a buffer is not in RAM.
    pub fn serve(
        &mut self,
        ram: &GuestRam,
        readable: &[Segment],
        writable: &[Segment],
    ) -> Result<u32, DeviceError> {
        self.server.serve(ram, readable, writable)
    }
}

/// For `map_err`: something that the host lacks.
fn failed(what: &'static str) -> impl Fn(Errno) -> FsError {
    move |errno| FsError::Host {
        what,
        source: errno.into(),
    }
}

/// A quarter of what this process may open.
fn usual_max_fds() -> u32 {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    u32::try_from(limit / 4)
        .unwrap_or(u32::MAX)
        .clamp(MIN_FDS, 1 << 16)
}

/// This process's file mode creation mask, which can only be asked for like this without being
/// changed (Linux 4.7).
fn umask() -> io::Result<u32> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    let umask = umask.and_then(|umask| u32::from_str_radix(umask.trim(), 8).ok());
    umask.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

impl VirtioDevice for Fs {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_FS,
            features: 0,
            // The first one is for requests that go ahead of others.
            queues: vec![self.queue_size; usize::from(self.queues) + 1],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            let len = self.serve(io.ram(), chain.readable(), chain.writable())?;
            io.complete(chain, len)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.server.clear();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState {
            tag: self.tag.clone(),
            mount: self.server.nodes.mount(),
            session: self.server.session,
            nodes: self.server.nodes.save(),
            handles: self.server.save_handles(),
        })
    }
}
