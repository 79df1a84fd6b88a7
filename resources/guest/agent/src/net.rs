//! Network interfaces that the host describes: address, route and resolver.
//!
//! `bulle.net=MAC,ADDRESS/PREFIX,GATEWAY,RESOLVER[,ADDRESS6,GATEWAY6]` on the kernel command line, once
//! for each interface. What failed is noted; a kernel without IPv6 does without. A guest that is loaded may get other
//! Ethernet addresses.

use core::fmt::Write;
use core::net::Ipv6Addr;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::mount_bind;

use crate::setup::{self, Notes};
use crate::sys;
use crate::text::Text;

/// How long the kernel may take to find an interface.
const PATIENCE_MS: u64 = 5000;
const PAUSE_MS: u64 = 5;
const MAX_LINE: usize = 16 * 1024;
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where the text is that goes over a root's own.
const OURS: &str = "/run/bulle-resolv.conf";

/// What one word says.
struct Interface<'a> {
    mac: &'a [u8],
    address: [u8; 4],
    prefix: u8,
    gateway: [u8; 4],
    /// Of either family, as it is written to resolv.conf.
    dns: &'a str,
    /// Address and gateway.
    ipv6: Option<[Ipv6Addr; 2]>,
}

/// Configures the interfaces of the kernel command line.
pub fn configure(notes: &mut Notes) {
    let mut buffer = [0; MAX_LINE];
    let line = setup::read_file("/proc/cmdline", &mut buffer);
    let words = line.split(|b| b.is_ascii_whitespace());
    let mut first = true;
    for word in words.filter_map(|word| word.strip_prefix(b"bulle.net=")) {
        let Some(interface) = parse(word) else {
            setup::note(notes, format_args!("a bulle.net= word makes no sense"));
            continue;
        };
        let result = bring_up(&interface, first);
        if let Err((what, errno)) = result {
            let errno = errno.raw_os_error();
            let text = format_args!("cannot {what} the network interface: error {errno}");
            setup::note(notes, text);
        }
        if first && let Err(errno) = name_resolver(interface.dns) {
            let errno = errno.raw_os_error();
            let text = format_args!("cannot make {RESOLV_CONF}: error {errno}");
            setup::note(notes, text);
        }
        first = false;
    }
}

fn parse(word: &[u8]) -> Option<Interface<'_>> {
    let mut fields = word.split(|&b| b == b',');
    let mac = fields.next()?;
    let mut network = fields.next()?.split(|&b| b == b'/');
    let mut interface = Interface {
        mac,
        address: address(network.next()?)?,
        prefix: number(network.next()?)?,
        gateway: address(fields.next()?)?,
        dns: resolver(fields.next()?)?,
        ipv6: None,
    };
    if let Some(field) = fields.next() {
        let ipv6 = |text| core::str::from_utf8(text).ok()?.parse().ok();
        interface.ipv6 = Some([ipv6(field)?, ipv6(fields.next()?)?]);
    }
    (interface.prefix <= 32 && fields.next().is_none()).then_some(interface)
}

fn resolver(text: &[u8]) -> Option<&str> {
    let text = core::str::from_utf8(text).ok()?;
    let sound = address(text.as_bytes()).is_some() || text.parse::<Ipv6Addr>().is_ok();
    sound.then_some(text)
}

fn number(text: &[u8]) -> Option<u8> {
    core::str::from_utf8(text).ok()?.parse().ok()
}

fn address(text: &[u8]) -> Option<[u8; 4]> {
    let mut address = [0; 4];
    let mut parts = text.split(|&b| b == b'.');
    for byte in &mut address {
        *byte = number(parts.next()?)?;
    }
    parts.next().is_none().then_some(address)
}

fn bring_up(interface: &Interface<'_>, default_route: bool) -> Result<(), (&'static str, Errno)> {
    use rustix::net::{AddressFamily, SocketType, socket};
    let name = wait_for(interface.mac).ok_or(("find", Errno::NODEV))?;
    let name = name.as_bytes();
    let socket: OwnedFd =
        socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(|e| ("reach", e))?;
    let mask = (u32::MAX)
        .checked_shl(32 - u32::from(interface.prefix))
        .unwrap_or(0);
    sys::interface_address(&socket, name, interface.address).map_err(|e| ("address", e))?;
    sys::interface_mask(&socket, name, mask.to_be_bytes()).map_err(|e| ("mask", e))?;
    if interface.ipv6.is_some() {
        trust_addresses(name);
    }
    sys::interface_up(&socket, name).map_err(|e| ("switch on", e))?;
    if default_route {
        sys::add_default_route(&socket, interface.gateway).map_err(|e| ("route over", e))?;
    }
    match interface.ipv6 {
        Some(ipv6) => bring_up_ipv6(name, ipv6, default_route),
        None => Ok(()),
    }
}

/// Gives the interface with the one Ethernet address the other. The kernel tells the network where its addresses
/// are now.
pub fn change(from: [u8; 6], to: [u8; 6]) -> Result<(), (&'static str, Errno)> {
    use rustix::net::{AddressFamily, SocketType, socket};
    let [a, b, c, d, e, f] = from;
    let mut mac = Text::<32>::new();
    let _ = write!(mac, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let name = find(mac.as_bytes()).ok_or(("find", Errno::NODEV))?;
    let name = name.as_bytes();
    let socket: OwnedFd =
        socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(|e| ("reach", e))?;
    // It does so while the address changes, if it is told to.
    let notify = [("ipv4", "arp_notify"), ("ipv6", "ndisc_notify")];
    let before = notify.map(|(family, key)| setting(family, name, key, b"1"));
    let result = sys::interface_ethernet(&socket, name, to);
    for ((family, key), before) in notify.into_iter().zip(before) {
        setting(family, name, key, &[before]);
    }
    result.map_err(|e| ("change", e))
}

/// Nobody else is there who could have an address of IPv6: it need not be asked for, which takes a second.
fn trust_addresses(name: &[u8]) {
    setting("ipv6", name, "accept_dad", b"0");
}

/// Sets what an interface does, and says what it was, one digit. What cannot be set stays.
fn setting(family: &str, name: &[u8], key: &str, value: &[u8]) -> u8 {
    let mut path = Text::<64>::new();
    let _ = write!(path, "/proc/sys/net/{family}/conf/");
    path.push(name);
    let _ = write!(path, "/{key}");
    let mut buffer = [0; 8];
    let before = setup::read_file(path.as_str(), &mut buffer);
    let before = before.first().copied().unwrap_or(b'0');
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(path.as_str(), flags, Mode::empty()) {
        let _ = rustix::io::write(&file, value);
    }
    before
}

/// Beside what the kernel takes from router advertisements: at once, and an address that is known.
fn bring_up_ipv6(
    name: &[u8],
    [address, gateway]: [Ipv6Addr; 2],
    default_route: bool,
) -> Result<(), (&'static str, Errno)> {
    use rustix::net::{AddressFamily, SocketType, socket};
    let Ok(socket) = socket(AddressFamily::INET6, SocketType::DGRAM, None) else {
        return Ok(());
    };
    let index = sys::interface_index(&socket, name).map_err(|e| ("number", e))?;
    let result = sys::interface_address6(&socket, index, address.octets());
    result.map_err(|e| ("address (IPv6)", e))?;
    if default_route {
        let result = sys::add_default_route6(&socket, index, gateway.octets());
        result.map_err(|e| ("route over (IPv6)", e))?;
    }
    Ok(())
}

/// The name of the interface with this address, once it is there.
fn wait_for(mac: &[u8]) -> Option<Text<16>> {
    let end = sys::now_ms() + PATIENCE_MS;
    loop {
        let found = find(mac);
        if found.is_some() || sys::now_ms() > end {
            return found;
        }
        sys::sleep_ms(PAUSE_MS);
    }
}

/// The name of the interface with this address.
fn find(mac: &[u8]) -> Option<Text<16>> {
    let mut found = None;
    setup::any_entry("/sys/class/net", |name| {
        let mut path = Text::<64>::new();
        path.push(b"/sys/class/net/");
        path.push(name);
        path.push(b"/address");
        let mut buffer = [0; 64];
        let here = setup::read_file(path.as_str(), &mut buffer).trim_ascii_end() == mac;
        if here {
            let mut text = Text::new();
            text.push(name);
            found = Some(text);
        }
        here
    });
    found
}

/// Names the resolver: a file where the root has none, over the one that it has otherwise, so that
/// nothing of a root's own is changed.
fn name_resolver(dns: &str) -> Result<(), Errno> {
    let mut text = Text::<64>::new();
    let _ = writeln!(text, "nameserver {dns}");
    let write = |path: &str, more: OFlags| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | more;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?;
        rustix::io::write(&file, text.as_bytes()).map(drop)
    };
    if rustix::fs::access(RESOLV_CONF, rustix::fs::Access::EXISTS).is_ok() {
        write(OURS, OFlags::TRUNC)?;
        return mount_bind(OURS, RESOLV_CONF);
    }
    let directory = |path| rustix::fs::mkdir(path, Mode::from_raw_mode(0o755));
    let _ = directory("/etc");
    match write(RESOLV_CONF, OFlags::EXCL) {
        // A link into /run, where what would make its target does not run.
        Err(Errno::EXIST) => {
            let _ = (directory("/run/systemd"), directory("/run/systemd/resolve"));
            write(RESOLV_CONF, OFlags::empty())
        }
        other => other,
    }
}
