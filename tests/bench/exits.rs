//! How often the vCPUs of another process left the guest, by KVM's own count
//! (Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD).

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;

fn descriptor(result: libc::c_long) -> std::io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: a new descriptor that nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Exits of the first vCPU of process `pid` so far.
pub fn of(pid: u32) -> std::io::Result<u64> {
    let name = |path: &std::path::Path| fs::read_link(path).unwrap_or_default();
    let fd = fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .find(|entry| name(&entry.path()).to_string_lossy().contains("kvm-vcpu:0"))
        .and_then(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .ok_or(std::io::ErrorKind::NotFound)?;
    // SAFETY: plain system calls; what they return is checked.
    let vcpu = unsafe {
        let process = descriptor(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        descriptor(libc::syscall(
            libc::SYS_pidfd_getfd,
            process.as_raw_fd(),
            fd,
            0,
        ))?
    };
    // SAFETY: as above; the request has no argument.
    let stats = descriptor(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) }.into())?;
    statistic(&File::from(stats), "exits")
}

/// One value of a statistics file.
fn statistic(file: &File, wanted: &str) -> std::io::Result<u64> {
    let word = |at: u64| -> std::io::Result<u64> {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_ne_bytes(bytes).into())
    };
    let (name_size, count, descs, data) = (word(4)?, word(8)?, word(16)?, word(20)?);
    for n in 0..count {
        let at = descs + n * (16 + name_size);
        let mut name = vec![0; name_size as usize];
        file.read_exact_at(&mut name, at + 16)?;
        if name.split(|byte| *byte == 0).next() == Some(wanted.as_bytes()) {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, data + word(at + 8)?)?;
            return Ok(u64::from_ne_bytes(bytes));
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}
