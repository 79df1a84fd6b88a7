//! The host's own kernel as the guest of a share: its FUSE client speaks to the server through
//! /dev/fuse. Used by this example and by the unit tests of the device.
//!
//! `unsafe` is for mounting, and for a mount namespace of the calling thread's own.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Fs, GuestRam, Segment};

const MIB: usize = 1 << 20;
/// Where requests and answers lie in RAM, each with this much room.
const REQUEST: GuestAddress = GuestAddress(0);
const ANSWER: GuestAddress = GuestAddress(4 << 20);
const ROOM: usize = 2 * MIB;

fn mount(kind: &str, target: &Path, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let [kind, data] = [kind, data].map(CString::new);
    let (kind, data) = (kind?, data?);
    let target = CString::new(target.as_os_str().as_encoded_bytes())?;
    let (source, data) = (kind.as_ptr(), data.as_ptr().cast());
    // SAFETY: all are strings that live until the call is over.
    match unsafe { libc::mount(source, target.as_ptr(), kind.as_ptr(), flags, data) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Mounts a share on `target`, seen by this thread and its children only, and returns where its
/// requests come from. Until those are answered, whoever looks at `target` waits.
pub fn mount_share(target: &Path) -> io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    // SAFETY: this thread alone gets a mount namespace of its own.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    mount("none", Path::new("/"), libc::MS_REC | libc::MS_PRIVATE, "")?;
    let fd = device.as_raw_fd();
    let options = "rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other";
    mount("fuse", target, 0, &format!("fd={fd},{options}"))?;
    Ok(device)
}

/// Lets `fs` answer the requests of `device` until the share is unmounted.
pub fn serve(mut device: File, mut fs: Fs) -> io::Result<()> {
    let ranges = [(GuestAddress(0), 8 * MIB)];
    let ram: GuestRam = GuestMemoryMmap::from_ranges(&ranges).map_err(io::Error::other)?;
    let segment = |addr, len: usize| Segment {
        addr,
        len: len as u32,
    };
    let mut bytes = vec![0; ROOM];
    loop {
        let len = match device.read(&mut bytes) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            // The request was taken back.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => return Err(error),
        };
        let request = bytes.get(..len).unwrap_or_default();
        ram.write_slice(request, REQUEST)
            .map_err(io::Error::other)?;
        let len = fs
            .serve(&ram, &[segment(REQUEST, len)], &[segment(ANSWER, ROOM)])
            .map_err(io::Error::other)?;
        if len > 0 {
            let mut answer = vec![0; len as usize];
            ram.read_slice(&mut answer, ANSWER)
                .map_err(io::Error::other)?;
            match device.write_all(&answer) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
