//! User-mode networking: passt, a process of its own without privileges, on a socket of this VM's.
//!
//! passt ends when its socket closes, which is when the device goes, however bulle ends. So nothing
//! has to be kept of it, and VMs share no name, path or port with one another. What it complains of
//! goes into a pipe; what does not fit is lost, so that a guest cannot fill a disk with it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

pub(super) use self::keeper::{PasstKeeper, Recipe};
use crate::config::{Protocol, Publish, UserNetwork};

mod keeper;

const PROGRAM: &str = "passt";
/// How long passt may take to be ready.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most of what passt says that is looked at.
const MAX_TEXT: u64 = 16 << 10;

/// User-mode networking cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// No passt.
    #[error(
        "--net user and --publish need passt, which is not there: install the package passt (on \
         Debian: apt-get install passt)"
    )]
    Missing,
    /// It cannot be started.
    #[error("cannot start {PROGRAM}")]
    Start(#[source] io::Error),
    /// A published port cannot be had.
    #[error("cannot publish port {address} of the host{}", advice(source))]
    Port {
        /// As given.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A published port of a family that passt does not do here.
    #[error(
        "cannot publish port {address} of the host: passt does {0} only on a host with a default route of {0}; \
         see 'ip {1} route', or publish an {2} address",
        family(*address), if address.is_ipv6() { "-6" } else { "-4" },
        if address.is_ipv6() { "IPv4" } else { "IPv6" }
    )]
    NoRoute {
        /// As given.
        address: SocketAddr,
    },
    /// It ended.
    #[error("{PROGRAM} ended before the VM could start: {text}")]
    Ended {
        /// What it said.
        text: String,
    },
    /// It does not answer.
    #[error("{PROGRAM} does not answer within {} seconds: {text}", PATIENCE.as_secs())]
    Silent {
        /// What it said.
        text: String,
    },
}

fn family(address: SocketAddr) -> &'static str {
    if address.is_ipv6() { "IPv6" } else { "IPv4" }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ": another program has it; choose another port",
        io::ErrorKind::PermissionDenied => {
            ": ports below 1024 are root's; choose another, or lower net.ipv4.ip_unprivileged_port_start"
        }
        io::ErrorKind::AddrNotAvailable => ": the host has no such address",
        _ => "",
    }
}

/// A running passt.
pub(in crate::board) struct Passt {
    /// The VM's end of its socket, which does not block.
    pub socket: OwnedFd,
    /// The reading end of a pipe that does not block, with what it complains of.
    pub complaints: OwnedFd,
    /// Its process.
    pub child: Child,
}

/// Starts passt for the guest of `network`; it answers by now.
pub(super) fn start(
    network: &UserNetwork,
    mtu: u16,
    publish: &[Publish],
) -> Result<Passt, PasstError> {
    let families = families();
    publish
        .iter()
        .try_for_each(|port| can_listen(port, families))?;
    let (ours, theirs) = UnixStream::pair().map_err(PasstError::Start)?;
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let (complaints, stderr) = pipe2(flags).map_err(|e| PasstError::Start(e.into()))?;
    let mut command = command(network, families, (mtu, publish), theirs.as_raw_fd());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    let inherited = theirs.as_raw_fd();
    let prepare = move || {
        let all = (3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        // Nothing else is for passt, also what a crate opened without the flag; Linux before 5.11 does
        // not know this, and is left as it is.
        // SAFETY: takes numbers only and may be made between fork and exec.
        unsafe { libc::syscall(libc::SYS_close_range, all.0, all.1, all.2) };
        // A group of its own: what the terminal sends to bulle is not for passt.
        // SAFETY: both calls take numbers only and may be made between fork and exec.
        match unsafe { libc::fcntl(inherited, libc::F_SETFD, 0) | libc::setpgid(0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(prepare) };
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => PasstError::Missing,
        _ => PasstError::Start(error),
    })?;
    // It holds passt's end of the pipe.
    drop(command);
    drop(theirs);
    log::debug!("passt is process {}", child.id());
    if let Err(error) = wait_until_ready(&ours, network, families) {
        end(&mut child);
        let text = text(complaints);
        return Err(match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => PasstError::Silent { text },
            _ => PasstError::Ended { text },
        });
    }
    let ready = ours.set_read_timeout(None);
    ready
        .and_then(|()| ours.set_nonblocking(true))
        .map_err(PasstError::Start)?;
    Ok(Passt {
        socket: ours.into(),
        complaints,
        child,
    })
}

/// Ends a passt that is of no use.
fn end(child: &mut Child) {
    // Fails when it has ended by itself.
    let _ = child.kill();
    if let Err(error) = child.wait() {
        log::debug!("cannot wait for passt: {error}");
    }
}

/// The families that passt does on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::board) struct Families {
    pub ipv4: bool,
    pub ipv6: bool,
}

/// IPv6 where the host has a default route of it and a link-local address, which passt needs; IPv4 unless the
/// host has a default route of IPv6 alone.
pub(in crate::board) fn families() -> Families {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let addresses = read("/proc/net/if_inet6");
    let ipv6 = has_default_route(&read("/proc/net/ipv6_route"))
        && addresses.lines().any(|line| line.starts_with("fe80"));
    let ipv4 = !ipv6 || has_default_route_of_ipv4(&read("/proc/net/route"));
    Families { ipv4, ipv6 }
}

/// Fields of a line: interface, destination, gateway, flags, three numbers, mask, ….
fn has_default_route_of_ipv4(routes: &str) -> bool {
    const RTF_UP: u32 = 1;
    const RTF_REJECT: u32 = 0x200;
    routes.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [_, "00000000", _, flags, _, _, _, "00000000", ..] = fields[..] else {
            return false;
        };
        let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
        flags & (RTF_UP | RTF_REJECT) == RTF_UP
    })
}

/// Fields of a line: destination, its prefix, source, its prefix, next hop, metric, …, flags, interface.
fn has_default_route(routes: &str) -> bool {
    const RTF_UP: u32 = 1;
    const RTF_REJECT: u32 = 0x200;
    routes.lines().any(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [destination, "00", .., flags, interface] = fields[..] else {
            return false;
        };
        let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
        let leads = flags & (RTF_UP | RTF_REJECT) == RTF_UP && interface != "lo";
        leads && destination.bytes().all(|digit| digit == b'0')
    })
}

fn command(
    network: &UserNetwork,
    Families { ipv4, ipv6 }: Families,
    (mtu, publish): (u16, &[Publish]),
    fd: i32,
) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["--foreground", "--quiet", "--stderr"]);
    if ipv6 {
        let [address, gateway] = network.ipv6.map(|address| address.to_string());
        command.args(["--address", &address, "--gateway", &gateway]);
    } else {
        command.arg("--ipv4-only");
    }
    let mut options = vec![("--fd", fd.to_string())];
    if ipv4 {
        options.extend([
            ("--address", network.address.to_string()),
            ("--netmask", network.prefix.to_string()),
            ("--gateway", network.gateway.to_string()),
            ("--dns-forward", network.dns.to_string()),
        ]);
    } else {
        command.arg("--ipv6-only");
        options.push(("--dns-forward", network.dns_ipv6().to_string()));
    }
    options.push(("--mtu", mtu.to_string()));
    for (option, value) in options {
        command.arg(option).arg(value);
    }
    for (protocol, option) in [
        (Protocol::Tcp, "--tcp-ports"),
        (Protocol::Udp, "--udp-ports"),
    ] {
        let mut ports = publish
            .iter()
            .filter(|port| port.protocol == protocol)
            .peekable();
        if ports.peek().is_none() {
            command.args([option, "none"]);
        }
        for port in ports {
            let (ip, from, to) = (port.host_ip, port.host_port, port.guest_port);
            command.arg(option).arg(format!("{ip}/{from}:{to}"));
        }
    }
    command
}

/// Says which port cannot be had, and why, better than passt does.
fn can_listen(publish: &Publish, families: Families) -> Result<(), PasstError> {
    let address = SocketAddr::new(publish.host_ip, publish.host_port);
    let there = match address {
        SocketAddr::V4(_) => families.ipv4,
        SocketAddr::V6(_) => families.ipv6,
    };
    if !there {
        return Err(PasstError::NoRoute { address });
    }
    let bound = bind_to(address, publish.protocol);
    bound.map_err(|errno| PasstError::Port {
        address,
        source: errno.into(),
    })
}

/// As passt does: an address of IPv6 is not one of IPv4 as well.
fn bind_to(address: SocketAddr, protocol: Protocol) -> rustix::io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Protocol::Udp {
        return bind(&socket, &address);
    }
    // Past connections are not in the way.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, 1)
}

/// ARP (RFC 826): who has the gateway's address.
fn arp(network: &UserNetwork) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(network.mac);
    // Ethernet, IPv4, a request.
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(network.mac);
    frame.extend(network.address.octets());
    frame.extend([0; 6]);
    frame.extend(network.gateway.octets());
    frame
}

/// A neighbour solicitation (RFC 4861, section 4.3): who has the gateway's address of IPv6.
fn solicitation(network: &UserNetwork) -> Vec<u8> {
    const ICMP: u8 = 58;
    let [address, gateway] = network.ipv6.map(|address| address.octets());
    // Type and code, checksum, reserved, target, and the option with the sender's link-layer address.
    let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
    body.extend(gateway);
    body.extend([1, 1]);
    body.extend(network.mac);
    let len = body.len() as u16;
    // The pseudo-header of RFC 8200, section 8.1.
    let mut summed = [
        &address[..],
        &gateway,
        &[0, 0],
        &len.to_be_bytes(),
        &[0, 0, 0, ICMP],
    ]
    .concat();
    summed.extend(&body);
    let words = summed.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let mut frame = vec![0xff; 6];
    frame.extend(network.mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(len.to_be_bytes());
    frame.extend([ICMP, 255]);
    frame.extend(address);
    frame.extend(gateway);
    let checksum = (!(sum as u16)).to_be_bytes();
    frame.extend(
        body.iter()
            .take(2)
            .chain(&checksum)
            .chain(body.iter().skip(4)),
    );
    frame
}

/// Asks for the gateway's Ethernet address, which passt answers when it is up.
fn wait_until_ready(
    mut socket: &UnixStream,
    network: &UserNetwork,
    families: Families,
) -> io::Result<()> {
    let question = match families.ipv4 {
        true => arp(network),
        false => solicitation(network),
    };
    let mut frame = (question.len() as u32).to_be_bytes().to_vec();
    frame.extend(question);
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(&frame)?;
    let mut prefix = [0; 4];
    socket.read_exact(&mut prefix)?;
    let len = u32::from_be_bytes(prefix);
    let mut answer = vec![0; len.min(65536) as usize];
    socket.read_exact(&mut answer)
}

/// What passt said, in one line, with advice where there is some.
fn text(pipe: OwnedFd) -> String {
    let mut bytes = Vec::new();
    // An error is a pipe with nothing more in it.
    let _ = File::from(pipe).take(MAX_TEXT).read_to_end(&mut bytes);
    let all = String::from_utf8_lossy(&bytes);
    let noise = ["Failed to send ", "Don't run as root"];
    let lines = all.lines().map(str::trim);
    let lines = lines.filter(|line| {
        !line.is_empty() && !noise.iter().any(|beginning| line.starts_with(beginning))
    });
    let lines: Vec<_> = lines.collect();
    let mut text = lines.join("; ").replace(char::is_control, "?");
    if text.is_empty() {
        text.push_str("it said nothing");
    }
    if text.contains("routable interface") {
        text.push_str(
            "; this passt wants a default route on the host, over whatever interface: see 'ip route'",
        );
    }
    text
}

#[cfg(test)]
mod tests;
