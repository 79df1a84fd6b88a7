//! Network interfaces: names, addresses, and what goes with which mode.

use crate::config::{Config, NetMode, NetworkInterface};

/// Most interfaces: each in mode `user` has a network of its own.
const MAX_INTERFACES: usize = 64;
/// Most pairs of queues of an interface.
const MAX_QUEUES: u16 = 64;
/// Smallest and largest packet (section 5.1.4.1 of virtio 1.2).
const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;

/// A network interface that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NetError {
    /// Two interfaces of one name, or one without.
    #[error("network interface id '{id}' is empty or given twice: give each interface its own id")]
    Id {
        /// As given.
        id: String,
    },
    /// No Ethernet address of an interface.
    #[error(
        "'{mac}' cannot be the guest's Ethernet address: write six pairs of hexadecimal digits, \
         such as 02:00:00:00:00:01, for an address that is neither zero nor multicast"
    )]
    Mac {
        /// As given.
        mac: String,
    },
    /// Two interfaces of one address.
    #[error(
        "The MAC address is already in use: {mac} is given to two network interfaces, give each its own"
    )]
    Macs {
        /// As given.
        mac: String,
    },
    /// Packets too small or large.
    #[error(
        "network interface '{id}' cannot have an MTU of {mtu}: give 68 to 65535, with passt up to 65520"
    )]
    Mtu {
        /// The interface.
        id: String,
        /// As asked.
        mtu: u16,
    },
    /// Queues that cannot be had.
    #[error(
        "network interface '{id}' cannot have {queues} pairs of queues: give 1, or up to {MAX_QUEUES} with a tap"
    )]
    Queues {
        /// The interface.
        id: String,
        /// As asked.
        queues: u16,
    },
    /// What the mode needs, or cannot use.
    #[error(
        "network interface '{id}': mode tap goes with host_dev_name, mode fd with fd, and mode user \
         with neither; only mode user publishes ports"
    )]
    Mode {
        /// The interface.
        id: String,
    },
    /// What the host's kernel cannot do.
    #[error(
        "network interface '{id}' with vhost=on goes with mode tap or a tap's fd, without limits, metadata \
         service or hot-pluggable memory: leave vhost=on or those out"
    )]
    Vhost {
        /// The interface.
        id: String,
    },
    /// A port for two.
    #[error("port {port} of the host is published twice: leave one out")]
    Port {
        /// The host's port.
        port: u16,
    },
    /// Too many.
    #[error("{count} network interfaces cannot be had: give at most {MAX_INTERFACES}")]
    TooMany {
        /// As given.
        count: usize,
    },
}

pub(super) fn validate(config: &Config) -> Result<(), NetError> {
    let all = &config.network_interfaces;
    if all.len() > MAX_INTERFACES {
        return Err(NetError::TooMany { count: all.len() });
    }
    for (index, interface) in all.iter().enumerate() {
        let earlier = || all.iter().take(index);
        let id = interface.iface_id.clone();
        if id.is_empty() || earlier().any(|other| other.iface_id == id) {
            return Err(NetError::Id { id });
        }
        one(interface)?;
        if interface.vhost && !can_vhost(config, interface) {
            return Err(NetError::Vhost { id });
        }
        let mac = interface.mac();
        if let (Some(text), true) = (
            &interface.guest_mac,
            mac.is_some() && earlier().any(|other| other.mac() == mac),
        ) {
            return Err(NetError::Macs { mac: text.clone() });
        }
    }
    let ports: Vec<_> = all.iter().flat_map(|one| &one.publish).collect();
    for (index, publish) in ports.iter().enumerate() {
        let mut earlier = ports.iter().take(index);
        let same = |other: &&&crate::config::Publish| {
            let any = other.host_ip.is_unspecified() || publish.host_ip.is_unspecified();
            let any = any && other.host_ip.is_ipv4() == publish.host_ip.is_ipv4();
            other.host_port == publish.host_port
                && other.protocol == publish.protocol
                && (any || other.host_ip == publish.host_ip)
        };
        if earlier.any(|other| same(&other)) {
            let port = publish.host_port;
            return Err(NetError::Port { port });
        }
    }
    Ok(())
}

/// vhost-net knows frames and RAM as it was when the driver started the device, and nothing else.
fn can_vhost(config: &Config, interface: &NetworkInterface) -> bool {
    let limited = interface.rx_rate_limiter.is_some() || interface.tx_rate_limiter.is_some();
    let id = &interface.iface_id;
    let mmds = config.mmds_config.as_ref();
    let detour = mmds.is_some_and(|mmds| mmds.network_interfaces.contains(id));
    interface.mode != NetMode::User && !limited && !detour && config.memory_hotplug.is_none()
}

fn one(interface: &NetworkInterface) -> Result<(), NetError> {
    let id = || interface.iface_id.clone();
    if let Some(text) = &interface.guest_mac {
        let mac = interface
            .mac()
            .filter(|mac| *mac != [0; 6] && mac[0] & 1 == 0);
        if mac.is_none() {
            return Err(NetError::Mac { mac: text.clone() });
        }
    }
    let user = interface.mode == NetMode::User;
    if let Some(mtu) = interface.mtu
        && (!MTUS.contains(&mtu) || user && mtu > crate::config::USER_MTU)
    {
        return Err(NetError::Mtu { id: id(), mtu });
    }
    if let Some(queues) = interface.queues {
        let most = if interface.mode == NetMode::Tap {
            MAX_QUEUES
        } else {
            1
        };
        if !(1..=most).contains(&queues) {
            return Err(NetError::Queues { id: id(), queues });
        }
    }
    let has = (interface.host_dev_name.is_some(), interface.fd.is_some());
    let fits = match interface.mode {
        NetMode::Tap => has == (true, false),
        NetMode::Fd => has == (false, true),
        NetMode::User => has == (false, false),
    };
    if !fits || !user && !interface.publish.is_empty() {
        return Err(NetError::Mode { id: id() });
    }
    Ok(())
}
