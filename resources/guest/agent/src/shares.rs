//! Shared directories of the host, each mounted where the host says; one of them may be the root.
//!
//! [`LIST`] has a line for each: tag, `ro` or `rw`, and the place, which may have spaces in it.
//! Parents come before what is mounted below them.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::root::{PATIENCE_MS, PAUSE_MS, Trouble, trouble};
use crate::sys;

/// Lists the shares. It lies beside the agent, so it is read before another root is entered.
pub const LIST: &str = "/.bulle/shares";

/// A share to mount.
#[derive(Clone, Copy)]
pub struct Share<'a> {
    /// Its name.
    pub tag: &'a str,
    /// Whether the guest is to know that it cannot write; the host sees to it in any case.
    pub read_only: bool,
    /// Where, from the root.
    pub path: &'a str,
}

/// The shares of a list.
pub fn parse(list: &[u8]) -> impl Iterator<Item = Share<'_>> {
    let lines = core::str::from_utf8(list).unwrap_or_default().lines();
    lines.filter_map(|line| {
        let mut words = line.splitn(3, ' ');
        let (tag, mode, path) = (words.next()?, words.next()?, words.next()?);
        Some(Share {
            tag,
            read_only: mode == "ro",
            path,
        })
    })
}

/// The share that is to be the root.
pub fn root(list: &[u8]) -> Option<Share<'_>> {
    parse(list).find(|share| share.path == "/")
}

/// Mounts `share` on a directory that is there.
pub fn mount_on(share: Share<'_>, target: &str) -> Result<(), Trouble> {
    let flags = if share.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let end = sys::now_ms() + PATIENCE_MS;
    let errno = loop {
        match mount(share.tag, target, "virtiofs", flags, None) {
            Ok(()) => return Ok(()),
            // No such tag: its device may still be on its way.
            Err(Errno::INVAL) if sys::now_ms() < end => sys::sleep_ms(PAUSE_MS),
            Err(errno) => break errno,
        }
    };
    let Share { tag, path, .. } = share;
    Err(match (errno, path) {
        (Errno::NODEV, "/") => trouble(format_args!(
            "the kernel has no virtiofs for a directory as root; use --root-copy, or a kernel \
             with CONFIG_VIRTIO_FS"
        )),
        (Errno::NODEV, _) => trouble(format_args!(
            "the kernel has no virtiofs for the share on {path}; use one with CONFIG_VIRTIO_FS"
        )),
        (Errno::INVAL, _) => trouble(format_args!(
            "there is no share {tag}: does the kernel lack a virtio driver?"
        )),
        _ => trouble(format_args!("the share {tag} cannot be mounted on {path}")),
    }(errno))
}

/// Mounts all shares but the root, on directories that are made where they are missing.
pub fn mount_all(list: &[u8]) -> Result<(), Trouble> {
    for share in parse(list).filter(|share| share.path != "/") {
        let Share { tag, path, .. } = share;
        make_directories(path).map_err(trouble(format_args!(
            "the directory {path} for the share {tag} cannot be made"
        )))?;
        mount_on(share, path)?;
    }
    Ok(())
}

/// Makes a directory and those above it.
fn make_directories(path: &str) -> Result<(), Errno> {
    let ends = path.match_indices('/').map(|(at, _)| at).skip(1);
    for end in ends.chain([path.len()]) {
        match rustix::fs::mkdir(&path[..end], Mode::from_raw_mode(0o755)) {
            // On a root that is read-only, what is there is said to be read-only.
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
