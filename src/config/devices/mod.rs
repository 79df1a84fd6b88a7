//! Virtio devices of a machine, a file each, and how they are reached.
//!
//! The names are Firecracker's; the aliases are those of the command line's `key=value` lists
//! (see [`super::parse_list`]), which fill the same types.

mod balloon;
mod drive;
mod duration;
mod memory_hotplug;
mod mmds;
mod net;
mod pmem;
mod port;
mod rtc;
mod serial;
mod share;
mod units;
mod vsock;
mod watchdog;

use serde::{Deserialize, Deserializer, Serialize};

pub use balloon::Balloon;
pub use drive::{CacheType, Drive, Format, IoEngine};
pub use memory_hotplug::MemoryHotplug;
pub use mmds::{MmdsConfig, MmdsVersion};
pub use net::{
    NetMode, NetworkInterface, Protocol, Publish, USER_MTU, UserNetwork, parse_mac, parse_net,
};
pub use pmem::Pmem;
pub use port::{AGENT_PORT, Port, PortTo};
pub use rtc::{LeapSeconds, Rtc};
pub use serial::Serial;
pub use share::{Share, ShareCache, ShareOwnership};
use units::{mib, seconds};
pub use vsock::Vsock;
pub use watchdog::{Watchdog, WatchdogAction};

/// How the guest reaches its virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Windows of registers that ACPI lists, one interrupt line each.
    #[default]
    Mmio,
    /// Functions on a PCI bus, with MSI-X.
    Pci,
}

/// An entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits of requests and of random bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Limits of a device; what is absent is not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Devices that name the same group share its limits. One of them states the limits; another
    /// that does so too states the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Whether it states limits, and does not only name a group.
    pub fn states_limits(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }
}

/// `size` tokens every `refill_time` milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens it holds: bytes, or operations.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills; absent: a second.
    #[serde(default = "one_second")]
    pub refill_time: u64,
    /// Tokens on top that are there once and do not come back.
    #[serde(default, deserialize_with = "null_is_default")]
    pub one_time_burst: u64,
}

/// `null` is what an absent field is: some clients write down all that they know of.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn one_second() -> u64 {
    1000
}
