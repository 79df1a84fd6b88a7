//! Network interfaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// A network interface of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name, unique among interfaces. Left out on the command line: `net` and a number.
    #[serde(alias = "id", default)]
    pub iface_id: String,
    /// What is on the host's side.
    #[serde(default)]
    pub mode: NetMode,
    /// Tap interface of the host, or a pattern such as `bulle%d` for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Inherited file descriptor of a tap, or of a Unix stream socket with passt or the like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
    /// The guest's Ethernet address, as `02:00:00:00:00:01`; absent: chosen.
    #[serde(alias = "mac", default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Largest packet that the guest is told to send, in bytes; absent: 1500, or with passt 65520.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Pairs of queues of a tap interface; absent: one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Have the host's kernel move the frames of a tap (vhost-net).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
    /// Limits of what the guest receives.
    #[serde(alias = "rx_rate", default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what it sends.
    #[serde(alias = "tx_rate", default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Ports of the host that lead into the guest, in mode `user`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
}

/// What is on the host's side of a network interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetMode {
    /// A tap interface.
    #[default]
    Tap,
    /// An inherited file descriptor.
    Fd,
    /// passt, which needs no privileges.
    User,
}

/// Transport protocol of a published port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// Address of the host; absent: 127.0.0.1, so that other machines do not reach the port.
    #[serde(default = "loopback")]
    pub host_ip: IpAddr,
    /// The host's port.
    pub host_port: u16,
    /// The guest's port.
    pub guest_port: u16,
    /// TCP or UDP.
    #[serde(default)]
    pub protocol: Protocol,
}

fn loopback() -> IpAddr {
    Ipv4Addr::LOCALHOST.into()
}

/// Text that is no published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write [ADDRESS:]HOST-PORT:GUEST-PORT[/udp], such as 8080:80, an IPv6 address in brackets: [::1]:8080:80"
)]
pub struct PublishError;

impl std::str::FromStr for Publish {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let (ports, protocol) = match text.rsplit_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(PublishError),
        };
        let mut parts = ports.rsplitn(3, ':');
        let mut port = || {
            let port = parts.next().and_then(|part| part.parse().ok());
            port.filter(|port| *port != 0).ok_or(PublishError)
        };
        let (guest_port, host_port) = (port()?, port()?);
        let in_brackets = |text: &str| -> Option<Ipv6Addr> {
            text.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
        };
        let host_ip = match parts.next() {
            Some(text) => match (text.parse::<Ipv4Addr>(), in_brackets(text)) {
                (Ok(address), _) => address.into(),
                (_, Some(address)) => address.into(),
                _ => return Err(PublishError),
            },
            None => loopback(),
        };
        Ok(Self {
            host_ip,
            host_port,
            guest_port,
            protocol,
        })
    }
}

/// The guest's side of an interface in mode `user`: a network of its own, of three addresses, and two of
/// IPv6 where the host has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserNetwork {
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Bits of the network's prefix.
    pub prefix: u8,
    /// The gateway, behind which the host is.
    pub gateway: Ipv4Addr,
    /// The guest's address of IPv6, whose prefix has 64 bits, and its gateway.
    pub ipv6: [Ipv6Addr; 2],
    /// The resolver.
    pub dns: Ipv4Addr,
}

impl UserNetwork {
    /// The resolver where there is no IPv4.
    pub fn dns_ipv6(&self) -> Ipv6Addr {
        let [_, gateway] = self.ipv6;
        Ipv6Addr::from_bits(gateway.to_bits() & !0xffff | 3)
    }
}

/// Largest packet of an interface in mode `user`: passt's own limit.
pub const USER_MTU: u16 = 65520;

impl NetworkInterface {
    /// The address that was asked for; `None` also for text that is none.
    pub fn mac(&self) -> Option<[u8; 6]> {
        parse_mac(self.guest_mac.as_deref()?)
    }

    /// Gives it limiters that limit nothing where none were asked for, so that limits can come later.
    /// vhost-net knows none.
    pub fn allow_limits(&mut self) {
        if !self.vhost {
            self.rx_rate_limiter.get_or_insert_default();
            self.tx_rate_limiter.get_or_insert_default();
        }
    }

    /// The network of interface number `index`, in mode `user`.
    pub fn user_network(&self, index: u8) -> Option<UserNetwork> {
        if self.mode != NetMode::User {
            return None;
        }
        let net = 2_u8.saturating_add(index);
        let host = |host| Ipv4Addr::new(10, 0, net, host);
        Some(UserNetwork {
            // Of its own network, so the same in each VM.
            mac: self.mac().unwrap_or([0x02, 0x62, 0x75, 0x6c, 0x6c, net]),
            address: host(15),
            prefix: 24,
            gateway: host(2),
            // Unique local addresses (RFC 4193); guests prefer IPv4 for what is elsewhere (RFC 6724).
            ipv6: [0x15, 2]
                .map(|host| Ipv6Addr::new(0xfd62, 0x756c, 0x6c65, net.into(), 0, 0, 0, host)),
            dns: host(3),
        })
    }
}

/// Six pairs of hexadecimal digits with colons.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        let digits = part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits)?;
    }
    parts.next().is_none().then_some(mac)
}

/// What one `--net` says; `None` for no network.
///
/// # Errors
/// An unknown mode, or a list that does not fit.
pub fn parse_net(text: &str) -> Result<Option<NetworkInterface>, super::super::ListError> {
    let (first, more) = match text.split_once(',') {
        Some((first, more)) => (first, Some(more)),
        None => (text, None),
    };
    let head = match (first, first.split_once('=')) {
        ("none", _) if more.is_none() => return Ok(None),
        ("user", _) => "mode=user".to_string(),
        (_, Some(("tap", name))) => format!("mode=tap,host_dev_name={name}"),
        (_, Some(("fd", number))) => format!("mode=fd,fd={number}"),
        _ => {
            return Err(serde::de::Error::custom(format_args!(
                "'{first}' is no network: write none, user, tap=NAME or fd=NUMBER"
            )));
        }
    };
    let list = match more {
        Some(more) => format!("{head},{more}"),
        None => head,
    };
    super::super::parse_list(&list).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_from_the_command_line() {
        assert_eq!(parse_net("none"), Ok(None));
        let user = parse_net("user,mtu=1500").unwrap().unwrap();
        assert!(user.mode == NetMode::User && user.mtu == Some(1500));
        let text = "tap=vm0,mac=02:00:00:00:00:01,queues=4,id=x,rx_rate.bandwidth.size=1M";
        let tap = parse_net(text).unwrap().unwrap();
        assert!(!tap.vhost && parse_net("tap=a,vhost=on").unwrap().unwrap().vhost);
        assert_eq!(tap.host_dev_name.as_deref(), Some("vm0"));
        assert_eq!(tap.mac(), Some([2, 0, 0, 0, 0, 1]));
        assert!(tap.queues == Some(4) && tap.rx_rate_limiter.is_some());
        assert_eq!(parse_net("fd=7").unwrap().unwrap().fd, Some(7));
        for text in ["", "nat", "none,mtu=1", "tap", "user,speed=1", "fd=x"] {
            assert!(parse_net(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_and_ports() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:",
            "2:0:0:0:0:1",
            "02:00:00:00:00:+1",
        ] {
            assert_eq!(parse_mac(text), None, "{text}");
        }
        let port = |text: &str| text.parse::<Publish>();
        let plain = port("8080:80").unwrap();
        assert_eq!((plain.host_port, plain.guest_port), (8080, 80));
        assert_eq!(plain.host_ip, Ipv4Addr::LOCALHOST);
        let six = port("[::1]:8080:80").unwrap();
        assert_eq!(six.host_ip, Ipv6Addr::LOCALHOST);
        assert_eq!(port("8080:80/tcp"), Ok(plain));
        let open = port("0.0.0.0:53:5353/udp").unwrap();
        assert!(open.host_ip.is_unspecified() && open.protocol == Protocol::Udp);
        for text in [
            "",
            "80",
            "0:80",
            "80:0",
            "x:80",
            "80:80/sctp",
            "1.2.3:80:80",
            "::1:80:80",
            "[1.2.3.4]:80:80",
            "[::1:80:80",
            "70000:1",
        ] {
            assert_eq!(port(text), Err(PublishError), "{text}");
        }
    }
}
