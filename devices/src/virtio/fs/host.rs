//! The confined system calls: all that the server does to the host's files starts here.
//!
//! A file is found by one name in one open directory, never by a path, and nothing is followed on
//! the way: neither `..`, nor symbolic links, nor magic links. What is found is an O_PATH file
//! descriptor, which reads and writes nothing and wakes no device. To act on the file behind it,
//! its entry in /proc/self/fd is followed, which leads to that very file wherever it is by now.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, Timestamps, accessat,
    chmodat, fstatfs, linkat, openat, openat2, statx, utimensat,
};
use rustix::io::{Errno, Result};
use rustix::path::DecInt;

/// Longest name of a directory entry in bytes.
pub(super) const NAME_MAX: usize = 255;
/// How names are looked up.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);
/// The magic number of /proc.
const PROC_SUPER_MAGIC: u32 = 0x9fa0;

/// Filesystems that are windows into the host's kernel, by magic number. Writing to /proc/self/mem
/// would be writing to this process.
const KERNEL_FILESYSTEMS: [u32; 24] = [
    PROC_SUPER_MAGIC,
    0x9fa2,      // usbdevfs
    0x6265_6572, // sysfs
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xf97c_ff8c, // selinuxfs
    0x4341_5d53, // smackfs
    0x5a3c_69f0, // AppArmor
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0xcafe_4a11, // bpf
    0x6265_6570, // configfs
    0x6165_676c, // pstore
    0xde5e_81e4, // efivarfs
    0x4249_4e4d, // binfmt_misc
    0x1cd1,      // devpts
    0x1980_0202, // mqueue
    0x6e73_6673, // nsfs
    0x6759_6969, // rpc_pipefs
    0x0765_5821, // resctrl
    0x6573_5543, // fusectl
    0x6c6f_6f70, // binderfs
    0x6e66_7364, // nfsd
];

/// Checks that `name` is one component that leads downwards.
pub(super) fn component(name: &CStr) -> Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        _ => Ok(name),
    }
}

/// Opens the directory to be shared. This path is the user's, and followed as any path is.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(rustix::fs::CWD, path, flags, Mode::empty())
}

/// Fails where the host has no openat2.
pub(super) fn probe(root: &OwnedFd) -> Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat2(root, c".", flags, Mode::empty(), CONFINED).map(drop)
}

/// Finds `name` in `dir`: an O_PATH file descriptor of the entry itself, whatever it is.
pub(super) fn find(dir: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(dir, component(name)?, flags, Mode::empty(), CONFINED)
}

/// Creates the regular file `name` in `dir`, which must not exist, and opens it.
pub(super) fn create(dir: impl AsFd, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    openat2(dir, component(name)?, flags | new, mode, CONFINED)
}

/// Attributes of an open file.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(fd, c"", AtFlags::EMPTY_PATH, mask)
}

/// The kind of file that `stat` is of.
pub(super) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// Whether an open file is on a filesystem that is a window into the kernel.
pub(super) fn is_kernels(fd: impl AsFd) -> Result<bool> {
    // The number has 32 bits, whatever the field has.
    let magic = fstatfs(fd)?.f_type as u32;
    Ok(KERNEL_FILESYSTEMS.contains(&magic))
}

/// /proc/self/fd of this process, which is kept open for when no path leads there any more.
#[derive(Debug)]
pub(super) struct ProcFds(OwnedFd);

impl ProcFds {
    /// To be called in the process that will use it.
    pub fn open() -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(rustix::fs::CWD, c"/proc/self/fd", flags, Mode::empty())?;
        match fstatfs(&fd)?.f_type as u32 {
            PROC_SUPER_MAGIC => Ok(Self(fd)),
            _ => Err(Errno::NOENT),
        }
    }

    /// Opens the file behind `fd` again. The caller has made sure that it is a regular file or a
    /// directory: opening others has effects of its own, or waits.
    pub fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags.difference(OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL);
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        openat(&self.0, DecInt::from_fd(fd), flags, Mode::empty())
    }

    pub fn chmod(&self, fd: impl AsFd, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        chmodat(&self.0, DecInt::from_fd(fd), mode, AtFlags::empty())
    }

    pub fn set_times(&self, fd: impl AsFd, times: &Timestamps) -> Result<()> {
        utimensat(&self.0, DecInt::from_fd(fd), times, AtFlags::empty())
    }

    pub fn access(&self, fd: impl AsFd, access: Access) -> Result<()> {
        accessat(&self.0, DecInt::from_fd(fd), access, AtFlags::EACCESS)
    }

    /// Makes a hard link `name` in `dir` to the file behind `fd`.
    pub fn link(&self, fd: impl AsFd, dir: impl AsFd, name: &CStr) -> Result<()> {
        let follow = AtFlags::SYMLINK_FOLLOW;
        linkat(&self.0, DecInt::from_fd(fd), dir, component(name)?, follow)
    }
}
