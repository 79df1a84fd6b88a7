//! userfaultfd: page faults of guest RAM that a process answers (ioctl_userfaultfd(2)).
//!
//! Here are the descriptor and its ioctls; who answers is in [`handler`] (with [`relay`]) and [`lazy`]. A fault of a vCPU comes from
//! the kernel's side of KVM, so a descriptor for faults of user mode alone is of no use.

pub mod handler;
pub mod lazy;
pub mod relay;
pub mod watch;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

/// The device that gives descriptors to whoever may open it.
const DEVICE: &str = "/dev/userfaultfd";
/// Whether processes without privileges may have descriptors.
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_EVENT_*`.
const PAGEFAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;

/// Features that are asked for (`UFFD_FEATURE_*`).
pub mod feature {
    /// Says when memory is given back to the host.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// Tells of writes to protected pages.
    pub const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// Shared memory and reserved huge pages can be protected, also where there are no pages yet.
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
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

/// `struct uffdio_copy`.
#[repr(C)]
pub struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
pub struct ZeroArg {
    range: RangeArg,
    mode: u64,
    zeropage: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
pub struct ProtectArg {
    range: RangeArg,
    mode: u64,
}

/// Which faults of a range are told (`UFFDIO_REGISTER_MODE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Of pages that are not there.
    Missing = 1,
    /// Of writes to pages that are protected.
    WriteProtected = 2,
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

nix::ioctl_readwrite!(
    /// `UFFDIO_COPY`.
    copy,
    0xaa,
    0x03,
    CopyArg
);
nix::ioctl_readwrite!(
    /// `UFFDIO_ZEROPAGE`.
    zeropage,
    0xaa,
    0x04,
    ZeroArg
);
nix::ioctl_readwrite!(
    /// `UFFDIO_WRITEPROTECT`.
    writeprotect,
    0xaa,
    0x06,
    ProtectArg
);
nix::ioctl_read!(
    /// `UFFDIO_WAKE`.
    wake,
    0xaa,
    0x02,
    RangeArg
);

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for the page with this address.
    Fault(u64),
    /// Memory was given back to the host, from the one address to before the other.
    Removed(u64, u64),
}

/// What became of pages that were to be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes are there, and who waited for them goes on.
    Bytes(u64),
    /// The first page was there already.
    Present,
    /// Nothing before the next events are taken.
    Later,
    /// There is no such memory, or its process ends.
    Nowhere,
}

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
            since: if features & feature::WP_HUGETLBFS_SHMEM == 0 {
                "5.7"
            } else {
                "5.19"
            },
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

impl Uffd {
    /// The next event, if there is one.
    ///
    /// # Errors
    /// Of reading.
    pub fn next(&self) -> io::Result<Option<Event>> {
        // `struct uffd_msg`: the event's number, and at 8 its arguments.
        let mut message = [0; 32];
        loop {
            match nix::unistd::read(self.0.as_fd(), &mut message) {
                Ok(32) => {}
                Ok(_) | Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let word = |at: usize| {
                let bytes = message.get(at..).and_then(<[u8]>::first_chunk);
                u64::from_ne_bytes(bytes.copied().unwrap_or_default())
            };
            match message.first() {
                Some(&PAGEFAULT) => return Ok(Some(Event::Fault(word(16)))),
                Some(&REMOVE) => return Ok(Some(Event::Removed(word(8), word(16)))),
                // No others were asked for.
                _ => {}
            }
        }
    }

    /// Fills the missing pages at `address` with `bytes`, whole pages.
    ///
    /// # Errors
    /// Where the host has no memory for it, or for an address that is no page's.
    pub fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Filled> {
        let mut arg = CopyArg {
            dst: address,
            src: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads `bytes`, and writes to nothing but missing pages of ranges that were
        // registered, which is guest RAM.
        let done = unsafe { copy(self.0.as_raw_fd(), &raw mut arg) };
        filled(done, arg.copy)
    }

    /// Fills `len` bytes of missing pages at `address` with zeros; not of reserved huge pages.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn zero(&self, address: u64, len: u64) -> io::Result<Filled> {
        let mut arg = ZeroArg {
            range: RangeArg {
                start: address,
                len,
            },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: as for `copy`.
        let done = unsafe { zeropage(self.0.as_raw_fd(), &raw mut arg) };
        filled(done, arg.zeropage)
    }

    /// Protects `len` bytes at `address`, whole pages of a range registered for that, from being written, or no
    /// more: then who waited goes on.
    ///
    /// # Errors
    /// Of memory that is not registered, or no memory for page tables.
    pub fn protect(&self, address: u64, len: u64, on: bool) -> io::Result<()> {
        let mut arg = ProtectArg {
            range: RangeArg {
                start: address,
                len,
            },
            mode: on.into(),
        };
        // SAFETY: the structure is the one that the kernel reads; it changes no content.
        let done = unsafe { writeprotect(self.0.as_raw_fd(), &raw mut arg) };
        done.map(drop).map_err(io::Error::from)
    }

    /// Has whoever waits for the `len` bytes at `address` look again.
    ///
    /// # Errors
    /// For an address that is no page's.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        let mut arg = RangeArg {
            start: address,
            len,
        };
        // SAFETY: the structure is the one that the kernel reads; it changes no memory.
        let woken = unsafe { wake(self.0.as_raw_fd(), &raw mut arg) };
        woken.map(drop).map_err(io::Error::from)
    }
}

fn filled(done: nix::Result<i32>, count: i64) -> io::Result<Filled> {
    match (done, u64::try_from(count)) {
        (Ok(_), Ok(count)) | (Err(Errno::EAGAIN), Ok(count @ 1..)) => Ok(Filled::Bytes(count)),
        (Ok(_) | Err(Errno::EAGAIN), _) => Ok(Filled::Later),
        (Err(Errno::EEXIST), _) => Ok(Filled::Present),
        (Err(Errno::ENOENT | Errno::ESRCH), _) => Ok(Filled::Nowhere),
        (Err(errno), _) => Err(errno.into()),
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
