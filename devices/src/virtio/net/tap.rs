//! The host's tap interfaces.
//!
//! One file descriptor is one queue of the interface, and frames carry a
//! [`Header`](super::header::Header). Unsafe: ioctls, whose argument is one structure or number.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_uint, ifreq};
use virtio_bindings::virtio_net::*;

use super::header::HEADER;

const TUN: &str = "/dev/net/tun";
/// Longest name of an interface.
const MAX_NAME: usize = 15;

/// A tap interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A name that no interface can have.
    #[error("'{name}' cannot be the name of a network interface: give 1 to 15 bytes without '/'")]
    Name {
        /// As given.
        name: String,
    },
    /// No tun driver.
    #[error(
        "{TUN} cannot be opened, so there are no tap interfaces; {}",
        driver_advice(_0)
    )]
    Driver(#[source] io::Error),
    /// No interface of this name.
    #[error(
        "there is no network interface '{name}': make it with 'ip tuntap add dev {name} mode tap user \
         USER', or give a pattern such as bulle%d to have one made, which needs CAP_NET_ADMIN"
    )]
    Missing {
        /// As given.
        name: String,
    },
    /// Another process uses it.
    #[error("tap interface '{name}' is in use by another process: give each VM its own")]
    Busy {
        /// As given.
        name: String,
    },
    /// It belongs to somebody else.
    #[error(
        "no permission for tap interface '{name}': it needs CAP_NET_ADMIN, or an interface of your \
         own, which root makes with 'ip tuntap add dev {name} mode tap user USER'"
    )]
    Permission {
        /// As given.
        name: String,
    },
    /// It is no tap interface, or has one queue only.
    #[error(
        "'{name}' is not a tap interface that can have {queues} queue(s): make it with 'ip tuntap \
         add dev {name} mode tap{}'", if *queues > 1 { " multi_queue" } else { "" }
    )]
    Kind {
        /// As given.
        name: String,
        /// As asked.
        queues: u16,
    },
    /// A file descriptor that is no tap.
    #[error("file descriptor {fd} is not a tap interface")]
    Descriptor {
        /// As given.
        fd: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tap without headers.
    #[error(
        "the tap interface behind file descriptor {fd} has no virtio headers: open it with IFF_VNET_HDR and IFF_NO_PI"
    )]
    Headers {
        /// As given.
        fd: i32,
    },
    /// The host failed.
    #[error("cannot {what} tap interface '{name}'")]
    Host {
        /// The operation.
        what: &'static str,
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn driver_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "you may not read and write it: have root permit it (on most hosts all may: chmod 0666), \
             or, in a container, have the device allowed"
        }
        _ => "load the host's tun module (modprobe tun), or pass the device into the container",
    }
}

/// An interface, one file descriptor for each queue.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<OwnedFd>,
    /// It takes and gives UDP segments.
    uso: bool,
}

fn check(result: c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn request(name: &str) -> ifreq {
    // SAFETY: all of `ifreq` may be zero.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(MAX_NAME)) {
        *to = from as libc::c_char;
    }
    request
}

/// An ioctl that reads and writes a structure.
fn with_request(fd: BorrowedFd<'_>, code: libc::Ioctl, request: &mut ifreq) -> io::Result<()> {
    // SAFETY: the codes used here take one `ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, request) })
}

/// Fails where the kernel does not know one of `flags`.
fn set_offload(fd: BorrowedFd<'_>, flags: c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    })
}

fn set_header_size(fd: BorrowedFd<'_>) -> io::Result<()> {
    let size = HEADER as c_int;
    // SAFETY: the ioctl reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

fn name_of(request: &ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|c| *c as u8);
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn flags_of(request: &ifreq) -> c_int {
    // SAFETY: the requests that are looked at have flags.
    c_int::from(unsafe { request.ifr_ifru.ifru_flags } as u16)
}

fn exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else {
        return false;
    };
    // SAFETY: the name ends with NUL.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// Switches an interface on, unless it is.
fn bring_up(name: &str) -> io::Result<()> {
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    let mut request = request(name);
    with_request(socket.as_fd(), libc::SIOCGIFFLAGS, &mut request)?;
    let flags = flags_of(&request);
    if flags & libc::IFF_UP != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = (flags | libc::IFF_UP) as libc::c_short;
    with_request(socket.as_fd(), libc::SIOCSIFFLAGS, &mut request)
}

impl Tap {
    /// Opens `queues` queues of the interface `name`, which is there, or is made where the name is
    /// a pattern with `%d`; such a one goes with the last file descriptor.
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        let owned = || name.to_string();
        let fits = (1..=MAX_NAME).contains(&name.len()) && !name.contains(['/', '\0', ' ']);
        let pattern = name.contains('%');
        if !fits || name == "." || name == ".." || pattern && name.matches("%d").count() != 1 {
            return Err(TapError::Name { name: owned() });
        }
        if !pattern && !exists(name) {
            return Err(TapError::Missing { name: owned() });
        }
        let mut actual = owned();
        let mut fds = Vec::new();
        for _ in 0..queues.max(1) {
            let (fd, called) = Self::attach(&actual, queues)?;
            actual = called;
            fds.push(fd);
        }
        if let Err(error) = bring_up(&actual) {
            log::warn!(
                "tap interface '{actual}' is down and cannot be switched on: {error}; \
                 run 'ip link set {actual} up'"
            );
        }
        Self::with(actual, fds)
    }

    /// One more queue.
    fn attach(name: &str, queues: u16) -> Result<(OwnedFd, String), TapError> {
        let mut options = File::options();
        options.read(true).write(true);
        options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let fd: OwnedFd = options.open(TUN).map_err(TapError::Driver)?.into();
        let mut request = request(name);
        let mut set = |more: c_int| {
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            with_request(fd.as_fd(), libc::TUNSETIFF, &mut request)
        };
        let result = match queues {
            // One made for several queues may be used with one.
            0 | 1 => set(0).or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => set(libc::IFF_MULTI_QUEUE),
                _ => Err(error),
            }),
            _ => set(libc::IFF_MULTI_QUEUE),
        };
        let owned = name.to_string();
        match result {
            Ok(()) => Ok((fd, name_of(&request))),
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy { name: owned },
                Some(libc::EPERM) => TapError::Permission { name: owned },
                Some(libc::EINVAL | libc::E2BIG) => TapError::Kind {
                    name: owned,
                    queues,
                },
                _ => TapError::Host {
                    what: "open",
                    name: owned,
                    source: error,
                },
            }),
        }
    }

    /// Takes an open tap with one queue.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let number = fd.as_raw_fd();
        let mut request = request("");
        let got = with_request(fd.as_fd(), libc::TUNGETIFF, &mut request);
        got.map_err(|source| TapError::Descriptor { fd: number, source })?;
        let flags = flags_of(&request);
        if flags & libc::IFF_TAP == 0 {
            let source = io::Error::from_raw_os_error(libc::ENOTTY);
            return Err(TapError::Descriptor { fd: number, source });
        }
        if flags & libc::IFF_VNET_HDR == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(TapError::Headers { fd: number });
        }
        let name = name_of(&request);
        // SAFETY: these commands take a number.
        let nonblocking = unsafe {
            let flags = libc::fcntl(number, libc::F_GETFL);
            check(libc::fcntl(number, libc::F_SETFL, flags | libc::O_NONBLOCK))
        };
        nonblocking.map_err(|source| TapError::Host {
            what: "use",
            name: name.clone(),
            source,
        })?;
        Self::with(name, vec![fd])
    }

    fn with(name: String, queues: Vec<OwnedFd>) -> Result<Self, TapError> {
        let mut tap = Self {
            name,
            queues,
            uso: false,
        };
        let sized = tap
            .queues
            .iter()
            .try_for_each(|fd| set_header_size(fd.as_fd()));
        sized.map_err(|source| TapError::Host {
            what: "set the header size of",
            name: tap.name.clone(),
            source,
        })?;
        let all = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        tap.uso = tap.offload(all).is_ok();
        let plain = tap.offload(0);
        plain.map_err(|source| TapError::Host {
            what: "set the offloads of",
            name: tap.name.clone(),
            source,
        })?;
        Ok(tap)
    }

    /// What the interface is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The file descriptor of a queue.
    pub(super) fn fd(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(queue).map(AsFd::as_fd)
    }

    /// Feature bits that the interface can keep.
    pub(super) fn features(&self) -> u64 {
        let uso = [
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
            VIRTIO_NET_F_HOST_USO,
        ];
        let always = [
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_GUEST_UFO,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_HOST_UFO,
        ];
        let uso = uso.iter().filter(|_| self.uso);
        always.iter().chain(uso).fold(0, |all, bit| all | 1 << bit)
    }

    /// Lets the host give what the driver takes.
    pub(super) fn configure(&self, has: impl Fn(u32) -> bool) -> io::Result<()> {
        if !has(VIRTIO_NET_F_GUEST_CSUM) {
            return self.offload(0);
        }
        let tso = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        let uso = has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6);
        let flags = [
            (true, libc::TUN_F_CSUM),
            (has(VIRTIO_NET_F_GUEST_TSO4), libc::TUN_F_TSO4),
            (has(VIRTIO_NET_F_GUEST_TSO6), libc::TUN_F_TSO6),
            (tso && has(VIRTIO_NET_F_GUEST_ECN), libc::TUN_F_TSO_ECN),
            (has(VIRTIO_NET_F_GUEST_UFO), libc::TUN_F_UFO),
            (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ];
        let flags = flags.iter().filter(|(on, _)| *on);
        self.offload(flags.fold(0, |all, (_, flag)| all | flag))
    }

    fn offload(&self, flags: c_uint) -> io::Result<()> {
        match self.queues.first() {
            Some(fd) => set_offload(fd.as_fd(), flags),
            None => Ok(()),
        }
    }

    /// Has the host use the first `active` queues from now on, where `before` were used.
    pub(super) fn use_queues(&self, before: u16, active: u16) -> io::Result<()> {
        for (index, fd) in (0..).zip(&self.queues) {
            let (was, is) = (index < before, index < active);
            if was == is {
                continue;
            }
            let mut request = request("");
            let flags = match is {
                true => libc::IFF_ATTACH_QUEUE,
                false => libc::IFF_DETACH_QUEUE,
            };
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            with_request(fd.as_fd(), libc::TUNSETQUEUE, &mut request)?;
        }
        Ok(())
    }
}
