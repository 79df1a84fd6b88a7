//! System calls that rustix has no safe face for.
//!
//! Unsafe: raw system calls. Each wrapper says why its call is sound.

use core::ffi::{CStr, c_char};
use core::fmt::{self, Write};

use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{self, opcode};
use rustix::process::Pid;
use syscalls::{Sysno, syscall};

use crate::text::Text;

const SIGCHLD: usize = 17;
const SIG_SETMASK: usize = 2;
const CLOCK_MONOTONIC: usize = 1;
/// `SFD_CLOEXEC | SFD_NONBLOCK`.
const SFD_FLAGS: usize = 0o2_004_000;
/// `IFF_UP | IFF_RUNNING`.
const IFF_UP_RUNNING: u16 = 0x41;
const SIOCSIFFLAGS: usize = 0x8914;
const SIOCSIFADDR: usize = 0x8916;
const SIOCSIFNETMASK: usize = 0x891c;
const SIOCSIFHWADDR: usize = 0x8924;
const SIOCADDRT: usize = 0x890b;
const SIOCGIFINDEX: usize = 0x8933;
const AF_INET: u8 = 2;
const EV_KEY: u8 = 1;

fn errno(e: syscalls::Errno) -> Errno {
    Errno::from_raw_os_error(e.into_raw())
}

/// Ends the process.
pub fn exit(code: u8) -> ! {
    loop {
        // SAFETY: exit_group takes no pointer.
        let _ = unsafe { syscall!(Sysno::exit_group, usize::from(code)) };
    }
}

/// Prints one line to standard error: the console when this is init.
pub fn complain(message: fmt::Arguments<'_>) {
    let mut line = Text::<512>::new();
    let _ = writeln!(line, "bulle agent: {message}\r");
    // SAFETY: standard error is never closed by this program.
    let stderr = unsafe { rustix::stdio::stderr() };
    let _ = rustix::io::write(stderr, line.as_bytes());
}

/// Milliseconds on a clock that only goes forward.
pub fn now_ms() -> u64 {
    let mut time = [0i64; 2];
    // SAFETY: struct timespec is two 64-bit integers.
    let _ = unsafe { syscall!(Sysno::clock_gettime, CLOCK_MONOTONIC, time.as_mut_ptr()) };
    (time[0] as u64) * 1000 + (time[1] as u64) / 1_000_000
}

/// Waits.
pub fn sleep_ms(ms: u64) {
    let time = [ms / 1000, ms % 1000 * 1_000_000];
    // SAFETY: struct timespec is two 64-bit integers; what is left of an interrupted sleep is not
    // asked for.
    let _ = unsafe { syscall!(Sysno::nanosleep, time.as_ptr(), 0) };
}

/// Makes a copy of this process; `None` in the child.
pub fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: with only SIGCHLD as flags, clone is fork; the program has one thread, so the child
    // finds no lock held.
    let pid = unsafe { syscall!(Sysno::clone, SIGCHLD, 0, 0, 0, 0) }.map_err(errno)?;
    Ok(Pid::from_raw(pid as i32))
}

/// Replaces the program of this process; returns only on failure.
///
/// # Safety
/// `argv` and `envp` must be arrays of pointers to NUL-terminated strings that end with null.
pub unsafe fn execve(path: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> Errno {
    // SAFETY: the path is NUL-terminated; the arrays are right by this function's contract.
    match unsafe { syscall!(Sysno::execve, path.as_ptr(), argv, envp) } {
        Ok(_) => Errno::INVAL,
        Err(e) => errno(e),
    }
}

/// Sends a signal to every process but this one and kernel threads. For process 1 only.
pub fn kill_everyone(signal: i32) {
    // SAFETY: kill takes no pointer.
    let _ = unsafe { syscall!(Sysno::kill, -1isize, signal) };
}

/// Blocks these signals (bit n-1 for signal n), or none.
pub fn block_signals(mask: u64) {
    // SAFETY: the kernel's signal set is 64 bits; no old set is wanted.
    let _ = unsafe {
        syscall!(
            Sysno::rt_sigprocmask,
            SIG_SETMASK,
            &raw const mask,
            0,
            size_of::<u64>()
        )
    };
}

/// A file from which the blocked signals of `mask` can be read.
pub fn signal_file(mask: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: -1 asks for a new file; the mask is 64 bits.
    let fd = unsafe {
        syscall!(
            Sysno::signalfd4,
            -1isize,
            &raw const mask,
            size_of::<u64>(),
            SFD_FLAGS
        )
    }
    .map_err(errno)?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `struct ifreq`: a name, and 24 bytes of what the request is about.
fn interface_request(
    socket: &OwnedFd,
    code: usize,
    name: &[u8],
    data: &[u8; 8],
) -> Result<(), Errno> {
    let mut request = [0u8; 40];
    let len = name.len().min(15);
    request[..len].copy_from_slice(&name[..len]);
    request[16..24].copy_from_slice(data);
    // SAFETY: these requests read one struct ifreq of 40 bytes.
    unsafe { syscall!(Sysno::ioctl, socket.as_raw_fd(), code, request.as_ptr()) }
        .map(drop)
        .map_err(errno)
}

/// `struct sockaddr_in` without its end, which is zero.
fn internet(address: [u8; 4]) -> [u8; 8] {
    let [a, b, c, d] = address;
    [AF_INET, 0, 0, 0, a, b, c, d]
}

/// Sets an interface up; `socket` is any of the Internet's.
pub fn interface_up(socket: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    let [low, high] = IFF_UP_RUNNING.to_le_bytes();
    interface_request(socket, SIOCSIFFLAGS, name, &[low, high, 0, 0, 0, 0, 0, 0])
}

/// Gives an interface another Ethernet address.
pub fn interface_ethernet(socket: &OwnedFd, name: &[u8], mac: [u8; 6]) -> Result<(), Errno> {
    // struct sockaddr: ARPHRD_ETHER, then the address.
    let [a, b, c, d, e, f] = mac;
    interface_request(socket, SIOCSIFHWADDR, name, &[1, 0, a, b, c, d, e, f])
}

/// Gives an interface its address.
pub fn interface_address(socket: &OwnedFd, name: &[u8], address: [u8; 4]) -> Result<(), Errno> {
    interface_request(socket, SIOCSIFADDR, name, &internet(address))
}

/// Gives an interface the mask of its network.
pub fn interface_mask(socket: &OwnedFd, name: &[u8], mask: [u8; 4]) -> Result<(), Errno> {
    interface_request(socket, SIOCSIFNETMASK, name, &internet(mask))
}

/// Sends what is for no other network to a gateway.
pub fn add_default_route(socket: &OwnedFd, gateway: [u8; 4]) -> Result<(), Errno> {
    /// `RTF_UP | RTF_GATEWAY`.
    const FLAGS: u8 = 3;
    // struct rtentry: destination, gateway and mask from 8 on, 16 bytes each; then the flags.
    let mut route = [0u8; 120];
    route[8] = AF_INET;
    route[24..32].copy_from_slice(&internet(gateway));
    route[40] = AF_INET;
    route[56] = FLAGS;
    // SAFETY: SIOCADDRT reads one struct rtentry of 120 bytes, whose one pointer is null.
    unsafe { syscall!(Sysno::ioctl, socket.as_raw_fd(), SIOCADDRT, route.as_ptr()) }
        .map(drop)
        .map_err(errno)
}

/// The number of an interface.
pub fn interface_index(socket: &OwnedFd, name: &[u8]) -> Result<i32, Errno> {
    let mut request = [0u8; 40];
    let len = name.len().min(15);
    request[..len].copy_from_slice(&name[..len]);
    // SAFETY: SIOCGIFINDEX reads and writes one struct ifreq of 40 bytes.
    unsafe {
        syscall!(
            Sysno::ioctl,
            socket.as_raw_fd(),
            SIOCGIFINDEX,
            request.as_mut_ptr()
        )
    }
    .map_err(errno)?;
    let [.., a, b, c, d] = *request.first_chunk::<20>().unwrap_or(&[0; 20]);
    Ok(i32::from_ne_bytes([a, b, c, d]))
}

/// Gives interface `index` an address of IPv6 whose prefix has 64 bits; `socket` is one of IPv6.
pub fn interface_address6(socket: &OwnedFd, index: i32, address: [u8; 16]) -> Result<(), Errno> {
    // struct in6_ifreq: address, length of the prefix, interface.
    let mut request = [0u8; 24];
    request[..16].copy_from_slice(&address);
    request[16] = 64;
    request[20..].copy_from_slice(&index.to_ne_bytes());
    // SAFETY: SIOCSIFADDR of such a socket reads one struct in6_ifreq of 24 bytes.
    unsafe {
        syscall!(
            Sysno::ioctl,
            socket.as_raw_fd(),
            SIOCSIFADDR,
            request.as_ptr()
        )
    }
    .map(drop)
    .map_err(errno)
}

/// The same as [`add_default_route`] for IPv6, over interface `index`.
pub fn add_default_route6(socket: &OwnedFd, index: i32, gateway: [u8; 16]) -> Result<(), Errno> {
    // struct in6_rtmsg: destination, source and gateway; type, both prefixes, metric; info, flags
    // (as above) and interface.
    let mut route = [0u8; 80];
    route[32..48].copy_from_slice(&gateway);
    route[56] = 1;
    route[72] = 3;
    route[76..].copy_from_slice(&index.to_ne_bytes());
    // SAFETY: SIOCADDRT of such a socket reads one struct in6_rtmsg of 80 bytes.
    unsafe { syscall!(Sysno::ioctl, socket.as_raw_fd(), SIOCADDRT, route.as_ptr()) }
        .map(drop)
        .map_err(errno)
}

/// The keys that an input device has, one bit each (`EVIOCGBIT`).
pub fn input_keys(device: impl AsFd) -> Result<[u8; 96], Errno> {
    const EVIOCGBIT_KEY: ioctl::Opcode = opcode::read::<[u8; 96]>(b'E', 0x20 + EV_KEY);
    let mut keys = [0; 96];
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: the opcode carries the size of the buffer, which the kernel does not exceed.
    unsafe { syscall!(Sysno::ioctl, fd, EVIOCGBIT_KEY as usize, keys.as_mut_ptr()) }
        .map_err(errno)?;
    Ok(keys)
}
