//! Operations on attributes, extended ones too, and on the filesystem as a whole.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use fuse_abi::os::{
    FATTR_ATIME, FATTR_ATIME_NOW, FATTR_FH, FATTR_GID, FATTR_KILL_SUIDGID, FATTR_MODE, FATTR_MTIME,
    FATTR_MTIME_NOW, FATTR_SIZE, FATTR_UID, FUSE_GETATTR_FH, fuse_access_in, fuse_getattr_in,
    fuse_getxattr_in, fuse_getxattr_out, fuse_kstatfs, fuse_setattr_in, fuse_statfs_out,
};
use rustix::fs::{
    Access, AtFlags, FileType, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    XattrFlags, chownat, fgetxattr, flistxattr, fremovexattr, fsetxattr, fstatfs, ftruncate,
    syncfs,
};
use rustix::io::{Errno, Result};

use super::host;
use super::message::Body;
use super::nodes::Found;
use super::server::Server;

/// Largest value and largest list of extended attributes.
const XATTR_MAX: usize = 64 << 10;
/// Longest name of an extended attribute.
const XATTR_NAME_MAX: usize = 255;

impl Server {
    pub fn get_attr(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_getattr_in = body.take()?;
        let open = match arg.getattr_flags & FUSE_GETATTR_FH {
            0 => None,
            _ => self.file(arg.fh).ok(),
        };
        let stat = match open {
            Some(file) => host::stat(file)?,
            None => host::stat(&self.nodes.get(node)?.fd)?,
        };
        self.reply_attr(&stat)
    }

    pub fn set_attr(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_setattr_in = body.take()?;
        let set = |flag| arg.valid & flag != 0;
        let found = self.nodes.enter(node)?;
        if set(FATTR_MODE) {
            if found.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            self.proc.chmod(&found.fd, arg.mode)?;
        }
        if set(FATTR_UID) || set(FATTR_GID) {
            let uid = set(FATTR_UID).then(|| self.owners.host_user(arg.uid));
            let gid = set(FATTR_GID).then(|| self.owners.host_group(arg.gid));
            if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
                return Err(Errno::INVAL);
            }
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            chownat(&found.fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if set(FATTR_SIZE) {
            match set(FATTR_FH) {
                true => ftruncate(self.file(arg.fh)?, arg.size)?,
                false => ftruncate(self.open_file(&found, OFlags::WRONLY)?, arg.size)?,
            }
            if set(FATTR_KILL_SUIDGID) {
                self.kill_suid(&found.fd)?;
            }
        }
        let time = |value: u64, nanos: u32, flag, now| Timespec {
            tv_sec: value.cast_signed(),
            tv_nsec: match (set(flag), set(now)) {
                (false, _) => UTIME_OMIT,
                (true, true) => UTIME_NOW,
                // Beyond a second there are numbers with other meanings.
                (true, false) => nanos.min(999_999_999).into(),
            },
        };
        if set(FATTR_ATIME) || set(FATTR_MTIME) {
            let times = Timestamps {
                last_access: time(arg.atime, arg.atimensec, FATTR_ATIME, FATTR_ATIME_NOW),
                last_modification: time(arg.mtime, arg.mtimensec, FATTR_MTIME, FATTR_MTIME_NOW),
            };
            self.proc.set_times(&found.fd, &times)?;
        }
        let stat = host::stat(&found.fd)?;
        self.reply_attr(&stat)
    }

    pub fn access(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_access_in = body.take()?;
        let access = Access::from_bits(arg.mask).ok_or(Errno::INVAL)?;
        if self.policy.read_only && access.contains(Access::WRITE_OK) {
            return Err(Errno::ROFS);
        }
        let found = self.nodes.get(node)?;
        self.proc.access(&found.fd, access)
    }

    pub fn statfs(&mut self, node: u64) -> Result<()> {
        let found = self.nodes.get(node)?;
        let stat = fstatfs(&found.fd)?;
        self.reply(&fuse_statfs_out {
            st: fuse_kstatfs {
                blocks: stat.f_blocks,
                bfree: stat.f_bfree,
                bavail: stat.f_bavail,
                files: stat.f_files,
                ffree: stat.f_ffree,
                bsize: stat.f_bsize as u32,
                namelen: host::NAME_MAX as u32,
                frsize: stat.f_frsize as u32,
                ..Default::default()
            },
        })
    }

    /// Writes all that the host keeps of the node's filesystem.
    pub fn syncfs(&mut self, node: u64) -> Result<()> {
        if self.policy.read_only {
            return Ok(());
        }
        let found = self.nodes.enter(node)?;
        if found.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        syncfs(self.proc.reopen(&found.fd, OFlags::RDONLY)?)
    }

    /// A file descriptor to reach a node's extended attributes by. Only regular files and
    /// directories have such; that is all there are of users on the host, too.
    fn xattr_fd(&mut self, node: u64, name: Option<&CStr>) -> Result<OwnedFd> {
        if !self.policy.xattr {
            // The guest does not ask again.
            return Err(Errno::NOSYS);
        }
        if let Some(name) = name.map(CStr::to_bytes) {
            if !is_visible(name) {
                return Err(Errno::OPNOTSUPP);
            }
            if name.len() > XATTR_NAME_MAX {
                return Err(Errno::RANGE);
            }
        }
        match self.nodes.enter(node)? {
            found @ Found {
                kind: FileType::RegularFile | FileType::Directory,
                ..
            } => self.proc.reopen(&found.fd, OFlags::RDONLY),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    pub fn set_xattr(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        // Without FUSE_SETXATTR_EXT there are two fields.
        let [size, flags]: [u32; 2] = body.take()?;
        let name = body.string()?;
        let value = body.0.get(..size as usize).ok_or(Errno::INVAL)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let file = self.xattr_fd(node, Some(name))?;
        fsetxattr(file, name, value, flags)
    }

    pub fn get_xattr(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_getxattr_in = body.take()?;
        let name = body.string()?;
        let file = self.xattr_fd(node, Some(name))?;
        let mut value = vec![0; XATTR_MAX];
        let len = fgetxattr(file, name, &mut value)?;
        self.reply_sized(arg.size, value.get(..len).unwrap_or_default())
    }

    pub fn list_xattr(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_getxattr_in = body.take()?;
        let file = match self.xattr_fd(node, None) {
            Err(Errno::OPNOTSUPP) => return self.reply_sized(arg.size, &[]),
            file => file?,
        };
        let mut list = vec![0; XATTR_MAX];
        let len = flistxattr(file, &mut list)?;
        let names = list.get(..len).unwrap_or_default();
        let names = names.split_inclusive(|byte| *byte == 0);
        let visible: Vec<u8> = names
            .filter(|name| is_visible(name))
            .flatten()
            .copied()
            .collect();
        self.reply_sized(arg.size, &visible)
    }

    pub fn remove_xattr(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let name = body.string()?;
        let file = self.xattr_fd(node, Some(name))?;
        fremovexattr(file, name)
    }

    /// Answers with `value` if it has room in `size` bytes, or with its size if that is 0.
    fn reply_sized(&mut self, size: u32, value: &[u8]) -> Result<()> {
        match size as usize {
            0 => self.reply(&fuse_getxattr_out {
                size: value.len() as u32,
                padding: 0,
            }),
            size if value.len() > size => Err(Errno::RANGE),
            _ => self.reply(value),
        }
    }
}

/// The extended attributes that the guest reads and writes: those of users, and what a program may
/// do without being root. Others are the host kernel's: labels, lists of access, overlays.
fn is_visible(name: &[u8]) -> bool {
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    name.starts_with(b"user.") || name == b"security.capability"
}
