//! The metadata service: on interfaces that there are, at a link-local address.

use std::net::Ipv4Addr;

use crate::config::{MmdsConfig, NetworkInterface};

/// A metadata service that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MmdsConfigError {
    /// No interface.
    #[error(
        "The list of network interface IDs that allow forwarding MMDS requests is empty. Name at least \
         one in network_interfaces"
    )]
    NoInterface,
    /// An interface that there is not.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to \
         any existing network interface. There is no '{id}'"
    )]
    Interface {
        /// As given.
        id: String,
    },
    /// An address of somebody else's.
    #[error(
        "The MMDS IPv4 address is not link local. {address} is not between 169.254.1.0 and 169.254.254.255"
    )]
    Address {
        /// As given.
        address: Ipv4Addr,
    },
}

pub(super) fn validate(
    mmds: &MmdsConfig,
    interfaces: &[NetworkInterface],
) -> Result<(), MmdsConfigError> {
    let address = mmds.ipv4_address;
    // RFC 3927, section 2.1: the first and the last 256 are reserved.
    if !matches!(address.octets(), [169, 254, 1..=254, _]) {
        return Err(MmdsConfigError::Address { address });
    }
    if mmds.network_interfaces.is_empty() {
        return Err(MmdsConfigError::NoInterface);
    }
    let exists = |id: &&String| interfaces.iter().any(|one| one.iface_id == **id);
    match mmds.network_interfaces.iter().find(|id| !exists(id)) {
        Some(id) => Err(MmdsConfigError::Interface { id: id.clone() }),
        None => Ok(()),
    }
}
