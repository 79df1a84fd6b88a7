//! The metadata service.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};

/// How the guest reaches the metadata service. What it finds there comes over the API or with
/// `--metadata`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether the guest needs tokens.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The service's address, between 169.254.1.0 and 169.254.254.255.
    #[serde(default = "default_address", deserialize_with = "address")]
    pub ipv4_address: Ipv4Addr,
    /// The network interfaces on which the service is.
    pub network_interfaces: Vec<String>,
    /// Always answer in the format of EC2's IMDS, whatever a request accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// Version of the metadata service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Who reads may have a token.
    #[default]
    V1,
    /// Who reads needs a token.
    V2,
}

impl MmdsConfig {
    /// The first version on `network_interfaces`.
    pub fn on(network_interfaces: Vec<String>) -> Self {
        Self {
            version: MmdsVersion::default(),
            ipv4_address: default_address(),
            network_interfaces,
            imds_compat: false,
        }
    }
}

fn default_address() -> Ipv4Addr {
    Ipv4Addr::new(169, 254, 169, 254)
}

/// `null` is what an absent address is.
fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    let address = Option::deserialize(deserializer)?;
    Ok(address.unwrap_or_else(default_address))
}
