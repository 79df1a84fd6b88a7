//! userfaultfd: page faults of guest RAM that a process answers (ioctl_userfaultfd(2)).
//!
//! Here are the descriptor and its ioctls; who answers is in [`handler`]. A fault of a vCPU comes from
//! the kernel's side of KVM, so a descriptor for faults of user mode alone is of no use.

pub mod handler;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

/// The device that gives descriptors to whoever may open it.
const DEVICE: &str = "/dev/userfaultfd";
/// Whether processes without privileges may have descriptors.
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// `UFFD_API`.
const API: u64 = 0xaa;

/// Features that are asked for (`UFFD_FEATURE_*`).
pub mod feature {
    /// Says when memory is given back to the host.
    pub const EVENT_REMOVE: u64 = 1 << 3;
}

/// No userfaultfd can be had.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither the device nor the system call gives one.
    #[error(
        "Cannot have a userfaultfd: {DEVICE} {device}, and vm.unprivileged_userfaultfd is {sysctl}: let this \
         user read and write the device, or set the sysctl to 1, or run with CAP_SYS_PTRACE"
    )]
    Forbidden {
        /// What is the matter with the device.
        device: &'static str,
        /// The setting, as far as it can be read.
        sysctl: String,
        /// What the system call says.
        #[source]
        source: io::Error,
    },
    /// The kernel has none, or none that knows these features.
    #[error(
        "This host's kernel has no userfaultfd {what} (CONFIG_USERFAULTFD, Linux {since} or newer)"
    )]
    Unsupported {
        /// What is missing.
        what: &'static str,
        /// Release that has it.
        since: &'static str,
        /// What it says.
        #[source]
        source: io::Error,
    },
    /// It does not take the memory.
    #[error(
        "Cannot register {len:#x} bytes of guest memory at {address:#x} of this process with userfaultfd"
    )]
    Register {
        /// Address in this process.
        address: u64,
        /// Bytes.
        len: u64,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// `struct uffdio_api`.
#[repr(C)]
pub struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
pub struct RangeArg {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
pub struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

/// Which faults of a range are told (`UFFDIO_REGISTER_MODE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Of pages that are not there.
    Missing = 1,
}

nix::ioctl_write_int_bad!(
    /// `USERFAULTFD_IOC_NEW`: a descriptor with these flags.
    new_descriptor,
    nix::request_code_none!(0xaa, 0x00)
);
nix::ioctl_readwrite!(
    /// `UFFDIO_API`.
    handshake,
    0xaa,
    0x3f,
    ApiArg
);
nix::ioctl_readwrite!(
    /// `UFFDIO_REGISTER`.
    register,
    0xaa,
    0x00,
    RegisterArg
);

/// A userfaultfd. Faults wait for as long as any process has it open; then memory is as if it had never
/// been registered.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Opens one that does not block and knows these features.
    ///
    /// # Errors
    /// [`UffdError`] says what is missing on this host.
    pub fn new(features: u64) -> Result<Self, UffdError> {
        let fd = open()?;
        let mut arg = ApiArg {
            api: API,
            features,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that the kernel reads and writes.
        let done = unsafe { handshake(fd.as_raw_fd(), &raw mut arg) };
        done.map_err(|errno| UffdError::Unsupported {
            what: "with the features that are needed",
            since: "5.7",
            source: errno.into(),
        })?;
        Ok(Self(fd))
    }

    /// Has faults of `len` bytes at `address` told.
    ///
    /// # Errors
    /// Of memory that the kernel does not do that for.
    ///
    /// # Safety
    /// The range is a mapping of guest RAM; its content is whatever the faults are answered with.
    pub unsafe fn register(&self, (address, len): (u64, u64), mode: Mode) -> Result<(), UffdError> {
        let mut arg = RegisterArg {
            range: RangeArg {
                start: address,
                len,
            },
            mode: mode as u64,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that the kernel reads and writes; the caller answers for
        // the range.
        let done = unsafe { register(self.0.as_raw_fd(), &raw mut arg) };
        done.map(drop).map_err(|errno| UffdError::Register {
            address,
            len,
            source: errno.into(),
        })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// From the device, or where there is none for this user, by the system call.
fn open() -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let options = File::options().read(true).write(true).open(DEVICE);
    let device = match options {
        Ok(device) => {
            // SAFETY: the argument is a number.
            match unsafe { new_descriptor(device.as_raw_fd(), flags) } {
                // SAFETY: the kernel has just given us this descriptor.
                Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
                Err(_) => "gives none",
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => "is not there",
        Err(_) => "cannot be opened by this user",
    };
    // SAFETY: the argument is a number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd >= 0 {
        // SAFETY: the kernel has just given us this descriptor.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::ENOSYS) => Err(UffdError::Unsupported {
            what: "at all",
            since: "4.11",
            source,
        }),
        _ => Err(UffdError::Forbidden {
            device,
            sysctl: setting(Path::new(SYSCTL)),
            source,
        }),
    }
}

fn setting(path: &Path) -> String {
    let text = std::fs::read_to_string(path);
    text.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}
