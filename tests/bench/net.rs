//! Frames through a tap interface: a guest that drives virtio-net without an operating system, against a
//! process that reads and writes the same file descriptor.
//!
//! What is sent is for another machine, so the host's kernel drops it at once. What is received comes
//! from a packet socket that sends all the time.

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::Guest;
use super::turns::{self, Turn};

/// Bytes of the header in front of a frame of a tap, and of a packet socket.
const HEADER: usize = 12;
const SHORT_HEADER: usize = 10;
/// Longest frame: 45 segments of 1448 bytes.
const LONG: usize = 54 + 45 * 1448;
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
/// Frames that the packet socket is given at once.
const BATCH: usize = 32;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An interface that goes with its file descriptor.
struct Tap {
    file: File,
    index: libc::c_int,
}

impl Tap {
    fn new() -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: all of `ifreq` may be zero.
        let mut request: libc::ifreq = unsafe { zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"bench%d") {
            *to = *from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: takes one `ifreq`, and writes the name to it.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        // SAFETY: no pointers.
        let socket = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) })?;
        // SAFETY: a new file descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        // SAFETY: takes one `ifreq`.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
        // SAFETY: the name ends with a zero byte.
        let index = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) };
        let index = index as libc::c_int;
        Ok(Self { file, index })
    }

    /// As a process needs it that takes long frames as they are. A guest's VMM changes that.
    fn set_up(&self) {
        let fd = self.file.as_raw_fd();
        let size = HEADER as libc::c_int;
        // SAFETY: this one takes a pointer to a number, the others a number.
        unsafe {
            check(libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const size)).unwrap();
            check(libc::ioctl(
                fd,
                libc::TUNSETOFFLOAD,
                TUN_F_CSUM | TUN_F_TSO4,
            ))
            .unwrap();
            check(libc::fcntl(fd, libc::F_SETFL, 0)).unwrap();
        }
    }
}

/// A frame with its header, as the payload makes it.
fn frame(size: usize, header: usize) -> Vec<u8> {
    let mut bytes = vec![0; header + size];
    let (head, frame) = bytes.split_at_mut(header);
    if size > 1514 {
        head[..2].fill(1);
        for (at, number) in [(2, 54u16), (4, 1448), (6, 34), (8, 16)] {
            head[at..at + 2].copy_from_slice(&number.to_le_bytes());
        }
    }
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0]);
    let [high, low] = (size as u16 - 14).to_be_bytes();
    frame[14..26].copy_from_slice(&[0x45, 0, high, low, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame[26..34].copy_from_slice(&[192, 0, 2, 1, 192, 0, 2, 2]);
    frame[46] = 0x50;
    bytes
}

/// Sends frames out of the interface until `end`.
fn flood(index: libc::c_int, size: usize, end: &AtomicBool) {
    let bytes = frame(size, SHORT_HEADER);
    let one: libc::c_int = 1;
    // SAFETY: all of both structures may be zero; what they point to lives as long as the calls.
    unsafe {
        let socket = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)).unwrap();
        let socket = OwnedFd::from_raw_fd(socket);
        let length = size_of::<libc::c_int>() as libc::socklen_t;
        let (fd, level) = (socket.as_raw_fd(), libc::SOL_PACKET);
        for option in [libc::PACKET_VNET_HDR, libc::PACKET_QDISC_BYPASS] {
            check(libc::setsockopt(
                fd,
                level,
                option,
                (&raw const one).cast(),
                length,
            ))
            .unwrap();
        }
        let mut address: libc::sockaddr_ll = zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index;
        address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), length)).unwrap();
        let mut piece = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut messages: [libc::mmsghdr; BATCH] = zeroed();
        for message in &mut messages {
            message.msg_hdr.msg_iov = &raw mut piece;
            message.msg_hdr.msg_iovlen = 1;
        }
        while !end.load(Ordering::Relaxed) {
            // A full queue is no error here.
            libc::sendmmsg(fd, messages.as_mut_ptr(), BATCH as u32, 0);
        }
    }
}

/// Does `what` while frames come, if `receive` says so.
fn with_frames<T>(tap: &Tap, receive: bool, size: usize, what: impl FnOnce() -> T) -> T {
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        if receive {
            scope.spawn(|| flood(tap.index, size, &end));
        }
        let result = what();
        end.store(true, Ordering::Relaxed);
        result
    })
}

fn host(tap: &Tap, receive: bool, size: usize, count: usize) -> Turn {
    tap.set_up();
    let mut bytes = match receive {
        true => vec![0; HEADER + 65549],
        false => frame(size, HEADER),
    };
    let fd = tap.file.as_raw_fd();
    let mut transfer = |_| {
        let (at, len) = (bytes.as_mut_ptr().cast(), bytes.len());
        // SAFETY: `bytes` is readable and writable for its length.
        let done = unsafe {
            match receive {
                true => libc::read(fd, at, len),
                false => libc::write(fd, at, len),
            }
        };
        assert!(done > 0, "{}", io::Error::last_os_error());
    };
    with_frames(tap, receive, size, || turns::host(count, &mut transfer))
}

/// A file descriptor of the same file that other programs get.
fn inherited(file: &File) -> RawFd {
    // SAFETY: no pointers.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 100) };
    check(fd).unwrap()
}

/// A turn of a guest in bulle, or in the peer if it is named.
fn guest(tap: &Tap, peer: bool, receive: bool, size: usize, count: usize) -> Option<Guest> {
    let op = if receive { "receive" } else { "send" };
    let append = format!("op={op} size={size} count={count}");
    let fd = inherited(&tap.file);
    // SAFETY: just made, and nobody else here uses it.
    let _close = unsafe { OwnedFd::from_raw_fd(fd) };
    if !peer {
        let net = ["--net".to_owned(), format!("fd={fd}")];
        return Some(Guest::start("net_bench", &append, &net));
    }
    let netdev = format!("tap,id=net,fd={fd}");
    let device = "virtio-net-device,netdev=net";
    let more = ["-netdev", &netdev, "-device", device].map(str::to_owned);
    turns::qemu("net_bench", &append, &more).map(Guest::spawn)
}

fn turn(mut guest: Guest, count: usize, hertz: f64) -> Turn {
    let line = guest.line();
    let numbers: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
    let [_, cycles, median, p99, kicks] = numbers[..] else {
        panic!("the guest said {line:?}")
    };
    let times = [median, p99].map(|cycles| Duration::from_secs_f64(cycles / hertz));
    Turn {
        rate: count as f64 * hertz / cycles,
        times: Some(times),
        kicks: kicks / count as f64,
        cpu: turns::vmm_time(guest.child.id()) / count as f64,
    }
}

/// Measures and prints the table, where there is a tap to be had.
pub fn print(rounds: usize, hertz: f64) {
    let tap = match Tap::new() {
        Ok(tap) => tap,
        Err(error) => {
            println!("\nabsent: network (no tap interface: {error})");
            return;
        }
    };
    turns::head("network, 64 buffers", rounds);
    for (name, size, receive) in [
        ("64 B frames, guest to tap", 64, false),
        ("64 B frames, tap to guest", 64, true),
        ("64 KiB frames, guest to tap", LONG, false),
        ("64 KiB frames, tap to guest", LONG, true),
    ] {
        let count = if size == LONG { 5000 } else { 50_000 };
        let host = || host(&tap, receive, size, count);
        let guest = |peer| {
            with_frames(&tap, receive, size, || {
                guest(&tap, peer, receive, size, count).map(|guest| turn(guest, count, hertz))
            })
        };
        let own = || guest(false).expect("bulle is there");
        turns::compare(name, size, rounds, host, own, || guest(true));
    }
}
