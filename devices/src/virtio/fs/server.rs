//! The FUSE server: one request from the guest's buffers to its answer.
//!
//! Whatever a request says is checked here and in the operations, against what there is and not
//! against what the guest should know: a share that is read-only refuses changes before it looks at
//! anything else. A bad request gets an error; only buffers outside of RAM break the device.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use fuse_abi::os::{
    FUSE_ASYNC_DIO, FUSE_ASYNC_READ, FUSE_ATOMIC_O_TRUNC, FUSE_AUTO_INVAL_DATA, FUSE_BIG_WRITES,
    FUSE_CACHE_SYMLINKS, FUSE_CREATE_SUPP_GROUP, FUSE_DIRECT_IO_ALLOW_MMAP, FUSE_DO_READDIRPLUS,
    FUSE_HANDLE_KILLPRIV_V2, FUSE_INIT_EXT, FUSE_KERNEL_MINOR_VERSION, FUSE_KERNEL_VERSION,
    FUSE_MAX_PAGES, FUSE_PARALLEL_DIROPS, FUSE_READDIRPLUS_AUTO, FUSE_WRITEBACK_CACHE, fuse_attr,
    fuse_attr_out, fuse_entry_out, fuse_in_header, fuse_init_in, fuse_init_out, fuse_opcode,
    fuse_out_header,
};
use rustix::fs::Statx;
use rustix::io::{Errno, Result};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::CachePolicy;
use super::handles::Handle;
use super::host::ProcFds;
use super::message::{Body, Buffers, Fault, IN_HEADER, MAX_BODY, MAX_DATA, OUT_HEADER};
use super::nodes::{Key, Nodes};
use super::owner::Owners;
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Segment, total};

/// The first protocol with virtio-fs in Linux (5.4).
const OLDEST_MINOR: u32 = 31;
/// Size of the guest's pages that requests are counted in.
const PAGE: u32 = 4096;
/// Requests in the background that the guest may have under way, and when it holds back.
const BACKGROUND: (u16, u16) = (64, 48);

/// What guest and server agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    pub minor: u32,
    pub flags: u64,
}

/// What the server is told once.
#[derive(Debug)]
pub(super) struct Policy {
    pub read_only: bool,
    pub cache: CachePolicy,
    pub timeout: Duration,
    pub writeback: bool,
    pub xattr: bool,
    /// The file mode creation mask of this process.
    pub umask: u32,
}

/// The server of one share.
#[derive(Debug)]
pub(super) struct Server {
    pub policy: Policy,
    pub owners: Owners,
    pub proc: ProcFds,
    pub nodes: Nodes,
    pub handles: HashMap<u64, Handle>,
    pub next_handle: u64,
    pub session: Option<Session>,
    pub root_dev: u64,
    /// The answer under construction, without its header.
    pub out: Vec<u8>,
    body: Vec<u8>,
}

/// Where the answer is.
#[derive(Debug)]
pub(super) enum Done {
    /// In `Server::out`.
    Out,
    /// So many bytes are in the guest's buffers already.
    Written(u32),
}

impl Server {
    pub fn new(
        policy: Policy,
        owners: Owners,
        proc: ProcFds,
        root: (Arc<OwnedFd>, &Statx),
        (max_fds, max_nodes): (usize, usize),
    ) -> Self {
        let (root, stat) = root;
        Self {
            policy,
            owners,
            proc,
            root_dev: Key::of(stat).dev,
            nodes: Nodes::new(root, stat, max_fds, max_nodes),
            handles: HashMap::new(),
            next_handle: 1,
            session: None,
            out: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Forgets the guest.
    pub fn clear(&mut self) {
        self.handles.clear();
        self.nodes.handles = 0;
        self.nodes.clear();
        self.next_handle = 1;
        self.session = None;
    }

    /// Carries the request in `readable` out and answers in `writable`. Returns how many bytes that
    /// were.
    pub fn serve(
        &mut self,
        ram: &GuestRam,
        readable: &[Segment],
        writable: &[Segment],
    ) -> std::result::Result<u32, DeviceError> {
        let buffers = Buffers {
            ram,
            readable,
            writable,
        };
        let mut header = [0; IN_HEADER];
        if buffers.read(0, &mut header)? < IN_HEADER {
            return Ok(0);
        }
        let Ok(header) = fuse_in_header::read_from_bytes(&header) else {
            return Ok(0);
        };
        let opcode = fuse_opcode::try_from(header.opcode).ok();
        self.out.clear();
        let result = match opcode {
            Some(opcode) => self.request(opcode, &header, &buffers),
            None => Err(Errno::NOSYS.into()),
        };
        if opcode.is_some_and(is_silent) || total(writable) < OUT_HEADER as u64 {
            return match result {
                Err(Fault::Device(error)) => Err(error),
                _ => Ok(0),
            };
        }
        let (error, len) = match result {
            Ok(Done::Written(len)) => (0, len as usize),
            Ok(Done::Out) if self.out.len() > buffers.room() => (Errno::RANGE.raw_os_error(), 0),
            Ok(Done::Out) => {
                buffers.write(OUT_HEADER, &self.out)?;
                (0, self.out.len())
            }
            Err(Fault::Errno(errno)) => (errno.raw_os_error(), 0),
            Err(Fault::Device(error)) => return Err(error),
        };
        let len = (OUT_HEADER + len) as u32;
        let reply = fuse_out_header {
            len,
            error: -error,
            unique: header.unique,
        };
        buffers.write(0, reply.as_bytes())?;
        Ok(len)
    }

    /// Reads what is behind the header and carries the request out.
    fn request(
        &mut self,
        opcode: fuse_opcode,
        header: &fuse_in_header,
        buffers: &Buffers<'_>,
    ) -> std::result::Result<Done, Fault> {
        let len = header.len as usize;
        if len < IN_HEADER || len as u64 > total(buffers.readable) {
            return Err(Errno::INVAL.into());
        }
        if self.session.is_none() && opcode != fuse_opcode::FUSE_INIT {
            return Err(Errno::NOTCONN.into());
        }
        if self.policy.read_only && changes(opcode) {
            return Err(Errno::ROFS.into());
        }
        let len = len - IN_HEADER;
        let wanted = match opcode {
            // The data stays where it is.
            fuse_opcode::FUSE_WRITE => len.min(super::files::WRITE_IN),
            _ if len > MAX_BODY => return Err(Errno::TOOBIG.into()),
            _ => len,
        };
        let mut body = std::mem::take(&mut self.body);
        body.resize(wanted, 0);
        let read = buffers.read(IN_HEADER, &mut body);
        let result = match read {
            Ok(_) => self.dispatch(opcode, header, Body(&body), buffers, len),
            Err(error) => Err(error.into()),
        };
        self.body = body;
        result
    }

    fn dispatch(
        &mut self,
        opcode: fuse_opcode,
        head: &fuse_in_header,
        body: Body<'_>,
        buffers: &Buffers<'_>,
        len: usize,
    ) -> std::result::Result<Done, Fault> {
        use fuse_opcode as op;
        match opcode {
            op::FUSE_INIT => self.init(body)?,
            op::FUSE_DESTROY => self.clear(),
            op::FUSE_FORGET => self.forget(head.nodeid, body)?,
            op::FUSE_BATCH_FORGET => self.batch_forget(body)?,
            // All requests before this one are answered already.
            op::FUSE_INTERRUPT => {}
            op::FUSE_LOOKUP => self.look_up(head.nodeid, body)?,
            op::FUSE_GETATTR => self.get_attr(head.nodeid, body)?,
            op::FUSE_SETATTR => self.set_attr(head.nodeid, body)?,
            op::FUSE_READLINK => self.read_link(head.nodeid)?,
            op::FUSE_SYMLINK => self.symlink(head, body)?,
            op::FUSE_MKNOD => self.mknod(head, body)?,
            op::FUSE_MKDIR => self.mkdir(head, body)?,
            op::FUSE_UNLINK => self.unlink(head.nodeid, body, false)?,
            op::FUSE_RMDIR => self.unlink(head.nodeid, body, true)?,
            op::FUSE_RENAME => self.rename(head.nodeid, body)?,
            op::FUSE_RENAME2 => self.rename2(head.nodeid, body)?,
            op::FUSE_LINK => self.link(head.nodeid, body)?,
            op::FUSE_ACCESS => self.access(head.nodeid, body)?,
            op::FUSE_STATFS => self.statfs(head.nodeid)?,
            op::FUSE_SETXATTR => self.set_xattr(head.nodeid, body)?,
            op::FUSE_GETXATTR => self.get_xattr(head.nodeid, body)?,
            op::FUSE_LISTXATTR => self.list_xattr(head.nodeid, body)?,
            op::FUSE_REMOVEXATTR => self.remove_xattr(head.nodeid, body)?,
            op::FUSE_OPEN => self.open(head.nodeid, body)?,
            op::FUSE_CREATE => self.create(head, body)?,
            op::FUSE_READ => return self.read(body, buffers),
            op::FUSE_WRITE => self.write(body, buffers, len)?,
            op::FUSE_FLUSH => self.flush(body)?,
            op::FUSE_FSYNC => self.fsync(body, false)?,
            op::FUSE_RELEASE => self.release(body, false)?,
            op::FUSE_LSEEK => self.seek(body)?,
            op::FUSE_FALLOCATE => self.allocate(body)?,
            op::FUSE_COPY_FILE_RANGE => self.copy_range(body)?,
            op::FUSE_SYNCFS => self.syncfs(head.nodeid)?,
            op::FUSE_OPENDIR => self.open_dir(head.nodeid)?,
            op::FUSE_READDIR => self.read_dir(body, buffers.room(), false)?,
            op::FUSE_READDIRPLUS => self.read_dir(body, buffers.room(), true)?,
            op::FUSE_RELEASEDIR => self.release(body, true)?,
            op::FUSE_FSYNCDIR => self.fsync(body, true)?,
            // Locks are the guest's own; mappings, polls and the like are not offered.
            _ => return Err(Errno::NOSYS.into()),
        }
        Ok(Done::Out)
    }

    /// Starts a session, and forgets one that was there.
    fn init(&mut self, mut body: Body<'_>) -> Result<()> {
        // Older guests send the first four fields only.
        let [major, minor, readahead, flags]: [u32; 4] = body.take()?;
        let flags2 = match flags & FUSE_INIT_EXT {
            0 => 0,
            _ => body.take::<u32>()?,
        };
        const { assert!(size_of::<fuse_init_in>() == 64) };
        self.clear();
        if major > FUSE_KERNEL_VERSION {
            // The guest tries again with this one.
            return self.reply(&fuse_init_out {
                major: FUSE_KERNEL_VERSION,
                minor: FUSE_KERNEL_MINOR_VERSION,
                ..Default::default()
            });
        }
        if major < FUSE_KERNEL_VERSION || minor < OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let flags = self.wanted_flags() & (u64::from(flags2) << 32 | u64::from(flags));
        let minor = minor.min(FUSE_KERNEL_MINOR_VERSION);
        self.session = Some(Session { minor, flags });
        self.reply(&fuse_init_out {
            major: FUSE_KERNEL_VERSION,
            minor,
            max_readahead: readahead,
            flags: flags as u32,
            max_background: BACKGROUND.0,
            congestion_threshold: BACKGROUND.1,
            max_write: MAX_DATA,
            time_gran: 1,
            max_pages: (MAX_DATA / PAGE) as u16,
            flags2: (flags >> 32) as u32,
            ..Default::default()
        })
    }

    /// Flags of INIT that this server knows how to keep. Not among them, on purpose: POSIX_ACL and
    /// ALLOW_IDMAP, each of which breaks guests without the other; SUBMOUNTS, which overlayfs
    /// cannot have below it; EXPORT_SUPPORT, which means to look up `..`.
    fn wanted_flags(&self) -> u64 {
        let mut flags = FUSE_ASYNC_READ
            | FUSE_ASYNC_DIO
            | FUSE_ATOMIC_O_TRUNC
            | FUSE_BIG_WRITES
            | FUSE_DO_READDIRPLUS
            | FUSE_READDIRPLUS_AUTO
            | FUSE_PARALLEL_DIROPS
            | FUSE_MAX_PAGES
            | FUSE_HANDLE_KILLPRIV_V2
            | FUSE_INIT_EXT;
        let mut flags2 = FUSE_CREATE_SUPP_GROUP;
        match self.policy.cache {
            CachePolicy::None => flags2 |= FUSE_DIRECT_IO_ALLOW_MMAP,
            CachePolicy::Auto => flags |= FUSE_AUTO_INVAL_DATA,
            CachePolicy::Always => flags |= FUSE_CACHE_SYMLINKS,
        }
        if self.policy.writeback {
            flags |= FUSE_WRITEBACK_CACHE;
        }
        flags2 | u64::from(flags)
    }

    /// Whether `flag` was agreed on.
    pub fn has(&self, flag: u32) -> bool {
        let flags = self.session.map_or(0, |session| session.flags);
        flags & u64::from(flag) != 0
    }

    /// Adds a structure to the answer.
    pub fn reply(&mut self, value: &(impl IntoBytes + Immutable + ?Sized)) -> Result<()> {
        self.out.extend_from_slice(value.as_bytes());
        Ok(())
    }

    /// Attributes as the guest sees them.
    pub fn attr(&self, stat: &Statx) -> fuse_attr {
        let (uid, gid) = self.owners.show(stat.stx_uid, stat.stx_gid);
        fuse_attr {
            ino: self.inode_number(Key::of(stat).dev, stat.stx_ino),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec as u64,
            mtime: stat.stx_mtime.tv_sec as u64,
            ctime: stat.stx_ctime.tv_sec as u64,
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid,
            gid,
            rdev: device_number(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }

    /// Several filesystems of the host are one of the guest, and each counts from 1: the numbers
    /// of those below the root's differ in their upper bits.
    pub fn inode_number(&self, dev: u64, ino: u64) -> u64 {
        let other = (dev ^ self.root_dev).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ino ^ (other >> 48 << 48)
    }

    /// The answer about a file that the guest looked up.
    pub fn entry(&self, id: u64, stat: &Statx) -> fuse_entry_out {
        let timeout = self.policy.timeout;
        fuse_entry_out {
            nodeid: id,
            generation: 0,
            entry_valid: timeout.as_secs(),
            attr_valid: timeout.as_secs(),
            entry_valid_nsec: timeout.subsec_nanos(),
            attr_valid_nsec: timeout.subsec_nanos(),
            attr: self.attr(stat),
        }
    }

    /// Answers with attributes.
    pub fn reply_attr(&mut self, stat: &Statx) -> Result<()> {
        let attr = self.attr(stat);
        let timeout = self.policy.timeout;
        self.reply(&fuse_attr_out {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr,
        })
    }
}

/// The kernel's encoding of device numbers in 32 bits.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// Requests that have no answer.
fn is_silent(opcode: fuse_opcode) -> bool {
    use fuse_opcode as op;
    matches!(
        opcode,
        op::FUSE_FORGET | op::FUSE_BATCH_FORGET | op::FUSE_INTERRUPT
    )
}

/// Requests that change the host's files whatever they say. OPEN and ACCESS look for themselves;
/// what is not offered at all must say so: overlayfs cannot copy a file whose IOCTL fails otherwise.
fn changes(opcode: fuse_opcode) -> bool {
    use fuse_opcode as op;
    matches!(
        opcode,
        op::FUSE_SETATTR
            | op::FUSE_SYMLINK
            | op::FUSE_MKNOD
            | op::FUSE_MKDIR
            | op::FUSE_UNLINK
            | op::FUSE_RMDIR
            | op::FUSE_RENAME
            | op::FUSE_RENAME2
            | op::FUSE_LINK
            | op::FUSE_WRITE
            | op::FUSE_SETXATTR
            | op::FUSE_REMOVEXATTR
            | op::FUSE_CREATE
            | op::FUSE_FALLOCATE
            | op::FUSE_COPY_FILE_RANGE
    )
}
