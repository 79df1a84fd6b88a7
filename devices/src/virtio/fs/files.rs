//! Operations on open files.
//!
//! `unsafe` is for closing a file descriptor and seeing the error, which dropping it hides.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuse_abi::os::{
    FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FUSE_OPEN_KILL_SUIDGID,
    FUSE_WRITE_KILL_SUIDGID, FUSE_WRITEBACK_CACHE, fuse_copy_file_range_in, fuse_fallocate_in,
    fuse_flush_in, fuse_fsync_in, fuse_lseek_in, fuse_lseek_out, fuse_open_in, fuse_open_out,
    fuse_read_in, fuse_release_in, fuse_write_in, fuse_write_out,
};
use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek,
};
use rustix::io::{Errno, Result};

use super::CachePolicy;
use super::handles::Target;
use super::host;
use super::message::{Body, Buffers, Fault, IN_HEADER, MAX_DATA};
use super::nodes::Found;
use super::server::{Done, Server};

/// Bytes in front of the data of a write.
pub(super) const WRITE_IN: usize = size_of::<fuse_write_in>();
/// Most bytes that are copied in one request, so that others get their turn.
const MAX_COPY: u64 = 16 << 20;
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o0010;

impl Server {
    /// What of the guest's flags the host is told, if the share allows them.
    pub fn host_flags(&self, flags: u32) -> Result<OFlags> {
        let flags = OFlags::from_bits_retain(flags);
        let mut access = flags & OFlags::ACCMODE;
        if access == OFlags::ACCMODE {
            return Err(Errno::INVAL);
        }
        if self.policy.read_only && (access != OFlags::RDONLY || flags.contains(OFlags::TRUNC)) {
            return Err(Errno::ROFS);
        }
        let mut kept = OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
        if self.has(FUSE_WRITEBACK_CACHE) {
            // The guest reads what it fills its pages with, and knows where the end is.
            kept.remove(OFlags::APPEND);
            if access == OFlags::WRONLY {
                access = OFlags::RDWR;
            }
        }
        Ok(access | flags & kept)
    }

    /// Opens a node's file, which must be a regular one.
    pub fn open_file(&self, found: &Found, flags: OFlags) -> Result<OwnedFd> {
        match found.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            // Nothing else is ever opened: a device acts, a FIFO waits.
            _ => return Err(Errno::ACCESS),
        }
        if self.policy.read_only {
            // Reading changes nothing then, as far as the host lets that be asked for.
            match self.proc.reopen(&found.fd, flags | OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                opened => return opened,
            }
        }
        self.proc.reopen(&found.fd, flags)
    }

    pub fn open(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_open_in = body.take()?;
        let opened = self.open_node(node, arg.flags, arg.open_flags)?;
        self.reply(&opened)
    }

    pub fn open_node(&mut self, node: u64, flags: u32, open_flags: u32) -> Result<fuse_open_out> {
        let host_flags = self.host_flags(flags)?;
        let found = self.nodes.enter(node)?;
        self.nodes.make_room()?;
        let file = self.open_file(&found, host_flags)?;
        if host_flags.contains(OFlags::TRUNC) && open_flags & FUSE_OPEN_KILL_SUIDGID != 0 {
            self.kill_suid(&file)?;
        }
        let handle = self.add_handle(node, flags, Target::File(Arc::new(file)));
        Ok(self.opened(handle, flags))
    }

    /// The answer that a file is open.
    pub fn opened(&self, handle: u64, flags: u32) -> fuse_open_out {
        let mut open_flags = match self.policy.cache {
            CachePolicy::None => FOPEN_DIRECT_IO,
            CachePolicy::Auto => 0,
            CachePolicy::Always => FOPEN_KEEP_CACHE,
        };
        if OFlags::from_bits_retain(flags) & OFlags::ACCMODE == OFlags::RDONLY {
            // It has written nothing whose errors closing it could report.
            open_flags |= FOPEN_NOFLUSH;
        }
        fuse_open_out {
            fh: handle,
            open_flags,
            ..Default::default()
        }
    }

    /// Takes the bits away that let a program run as its file's owner.
    pub fn kill_suid(&self, fd: impl AsFd) -> Result<()> {
        let mode = u32::from(host::stat(&fd)?.stx_mode);
        let mut kill = mode & S_ISUID;
        if mode & S_IXGRP != 0 {
            kill |= mode & S_ISGID;
        }
        match kill {
            0 => Ok(()),
            _ => self.proc.chmod(&fd, mode & !kill),
        }
    }

    pub fn read(&mut self, mut body: Body<'_>, buffers: &Buffers<'_>) -> Served {
        let arg: fuse_read_in = body.take()?;
        let room = u32::try_from(buffers.room()).unwrap_or(u32::MAX);
        let len = arg.size.min(room).min(MAX_DATA);
        let read = buffers.read_file(self.file(arg.fh)?, arg.offset, len)?;
        Ok(Done::Written(read))
    }

    pub fn write(&mut self, mut body: Body<'_>, buffers: &Buffers<'_>, len: usize) -> Outcome {
        let arg: fuse_write_in = body.take()?;
        let there = u32::try_from(len - WRITE_IN).unwrap_or(u32::MAX);
        if arg.size > there {
            return Err(Errno::INVAL.into());
        }
        let file = self.file(arg.fh)?;
        if arg.write_flags & FUSE_WRITE_KILL_SUIDGID != 0 {
            self.kill_suid(file)?;
        }
        let size = arg.size.min(MAX_DATA);
        let size = buffers.write_file(file, IN_HEADER + WRITE_IN, arg.offset, size)?;
        self.reply(&fuse_write_out { size, padding: 0 })?;
        Ok(())
    }

    /// Closes a copy of the file descriptor, which is when some filesystems report errors.
    pub fn flush(&mut self, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_flush_in = body.take()?;
        let copy = rustix::io::fcntl_dupfd_cloexec(self.file(arg.fh)?, 0)?;
        // SAFETY: the copy is this function's own, and not used any more.
        match unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(copy)) } {
            0 => Ok(()),
            _ => Err(super::message::last_error()),
        }
    }

    pub fn fsync(&mut self, mut body: Body<'_>, dir: bool) -> Result<()> {
        let arg: fuse_fsync_in = body.take()?;
        let data_only = arg.fsync_flags & 1 != 0;
        let fd = match dir {
            true => match &self.handles.get(&arg.fh).ok_or(Errno::BADF)?.target {
                Target::Dir { fd, .. } => fd,
                Target::Sealed => return Ok(()),
                Target::Stale { .. } => return Err(Errno::STALE),
                Target::File(_) => return Err(Errno::BADF),
            },
            false => self.file(arg.fh)?,
        };
        match data_only {
            true => fdatasync(fd),
            false => fsync(fd),
        }
    }

    pub fn release(&mut self, mut body: Body<'_>, dir: bool) -> Result<()> {
        let arg: fuse_release_in = body.take()?;
        self.close(arg.fh, dir)
    }

    pub fn seek(&mut self, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_lseek_in = body.take()?;
        // The guest answers all other questions itself.
        let to = match arg.whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(arg.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(arg.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = seek(self.file(arg.fh)?, to)?;
        self.reply(&fuse_lseek_out { offset })
    }

    pub fn allocate(&mut self, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_fallocate_in = body.take()?;
        let mode = FallocateFlags::from_bits_retain(arg.mode);
        let keep = FallocateFlags::KEEP_SIZE;
        let punch = FallocateFlags::PUNCH_HOLE | keep;
        let zero = FallocateFlags::ZERO_RANGE;
        let known = [FallocateFlags::empty(), keep, punch, zero, zero | keep];
        if !known.contains(&mode) {
            return Err(Errno::OPNOTSUPP);
        }
        fallocate(self.file(arg.fh)?, mode, arg.offset, arg.length)
    }

    pub fn copy_range(&mut self, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_copy_file_range_in = body.take()?;
        if arg.flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.file(arg.fh_in)?, self.file(arg.fh_out)?);
        let (mut at, mut to_at) = (arg.off_in, arg.off_out);
        let len = arg.len.min(MAX_COPY) as usize;
        let copied = copy_file_range(from, Some(&mut at), to, Some(&mut to_at), len)?;
        let size = copied as u32;
        self.reply(&fuse_write_out { size, padding: 0 })
    }
}

/// An answer that may be in the guest's buffers.
type Served = std::result::Result<Done, Fault>;
/// An answer in `Server::out`.
type Outcome = std::result::Result<(), Fault>;
