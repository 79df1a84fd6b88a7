//! The jail's root directory: made, entered, and furnished with devices.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, makedev, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchdir, fchown, fchownat, pivot_root, unlink};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{JailError, host};
use crate::snapshot::pages::Pagemap;

/// Major number of /dev/kvm and other small devices (Documentation/admin-guide/devices.txt).
const MISC: u64 = 10;

/// Makes the directory `base`/`names`, in which no step is a symbolic link.
pub(super) fn make(base: &Path, names: [&str; 3]) -> Result<OwnedFd, JailError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source: Errno| JailError::Directory {
            path,
            source: source.into(),
        }
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    std::fs::create_dir_all(base).map_err(|source| JailError::Directory {
        path: base.to_owned(),
        source,
    })?;
    let mut path = base.to_owned();
    let mut dir = open(base, flags, Mode::empty()).map_err(error(base))?;
    for name in names {
        path.push(name);
        match mkdirat(&dir, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(error(&path)(errno)),
        }
        dir = openat(&dir, name, flags | OFlag::O_NOFOLLOW, Mode::empty()).map_err(error(&path))?;
    }
    Ok(dir)
}

/// A mount namespace of the process's own, in which directories have to be opened that it mounts.
pub(super) fn keep_mounts_apart() -> Result<(), JailError> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).map_err(host("make a mount namespace"))?;
    // What the host mounts or unmounts later under the jail is still seen.
    let all = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(none, "/", none, all, none).map_err(host("keep mounts apart"))
}

/// Makes `root` the process's `/`, and all else unseen.
pub(super) fn change(root: &OwnedFd) -> Result<(), JailError> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(root, "", clone).map_err(host("mount the jail"))?;
    let here = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&tree, "", root, "", here).map_err(host("mount the jail"))?;
    fchdir(&tree).map_err(host("enter the jail"))?;
    // The old root ends up on top of the new one (pivot_root(2)), and goes.
    pivot_root(".", ".").map_err(host("change the root directory"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(host("let go of the old root"))?;
    std::env::set_current_dir("/").map_err(host("enter the jail"))
}

/// /proc, for what is of the process that is going to be in the jail.
pub(super) fn proc() -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc", flags, Mode::empty())
}

/// Keeps which pages of memory this process has, which snapshots of changes need, and lets go of `proc`.
pub(super) fn keep_pagemap(proc: Result<OwnedFd, Errno>) {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    match proc.and_then(|proc| openat(proc, "self/pagemap", flags, Mode::empty())) {
        Ok(file) => Pagemap::keep(file.into()),
        Err(errno) => log::debug!("snapshots of changes will have all of memory: {errno}"),
    }
}

/// Devices that not every host has, as nodes with major and minor number.
pub(super) fn of_this_host() -> Vec<(&'static str, u64, u64)> {
    let misc = std::fs::read_to_string("/proc/misc").unwrap_or_default();
    let minor = |name: &str| -> Option<u64> {
        let mut fields = misc.lines().map(str::split_ascii_whitespace);
        let mut line = fields.find(|line| line.clone().nth(1) == Some(name))?;
        line.next()?.parse().ok()
    };
    let nodes = [
        ("userfaultfd", "/dev/userfaultfd"),
        ("vhost-net", "/dev/vhost-net"),
    ];
    let there = nodes.map(|(name, path)| Some((path, MISC, minor(name)?)));
    there.into_iter().flatten().collect()
}

/// Makes directories and devices inside, all of them `owner`'s alone.
pub(super) fn furnish(
    owner: (Uid, Gid),
    more: Vec<(&'static str, u64, u64)>,
) -> Result<(), JailError> {
    for path in ["/", "/dev", "/dev/net", "/run"] {
        directory(path, owner).map_err(|source| inside(path, source))?;
    }
    let mut nodes = vec![
        ("/dev/kvm", MISC, 232),
        ("/dev/net/tun", MISC, 200),
        ("/dev/urandom", 1, 9),
    ];
    nodes.extend(more);
    for (path, major, minor) in nodes {
        device(path, makedev(major, minor), owner).map_err(|source| inside(path, source))?;
    }
    Ok(())
}

fn inside(path: &str, source: Errno) -> JailError {
    JailError::Inside {
        path: path.to_owned(),
        source: source.into(),
    }
}

fn directory(path: &str, (uid, gid): (Uid, Gid)) -> Result<(), Errno> {
    let mode = Mode::S_IRWXU;
    match mkdirat(AT_FDCWD, path, mode) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = open(path, flags, Mode::empty())?;
    fchmod(&dir, mode)?;
    fchown(&dir, Some(uid), Some(gid))
}

/// A node that is there already is taken if it is that device.
fn device(path: &str, number: u64, (uid, gid): (Uid, Gid)) -> Result<(), Errno> {
    match mknodat(
        AT_FDCWD,
        path,
        SFlag::S_IFCHR,
        Mode::S_IRUSR | Mode::S_IWUSR,
        number,
    ) {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            let found = fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            let is_device = found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits();
            if !is_device || found.st_rdev != number {
                return Err(Errno::EEXIST);
            }
        }
        Err(errno) => return Err(errno),
    }
    fchownat(
        AT_FDCWD,
        path,
        Some(uid),
        Some(gid),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )
}

/// Writes a file anew: what is there goes, and is not followed.
pub(super) fn write_anew(path: &str, text: &str) -> io::Result<()> {
    match unlink(path) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o644);
    options.open(path)?.write_all(text.as_bytes())
}
