//! The balloon's part of the plan.

use std::time::Duration;

use devices::virtio::balloon::{BalloonOptions, PAGE};
use devices::virtio::registry::DeviceConfig;

use super::Plan;
use crate::config::{Balloon, Spec};

pub(super) fn plan(balloon: &Balloon, spec: &Spec) -> Plan {
    let pages = |bytes: u64| u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
    let reserved = spec.machine().huge_pages.reserved_mib();
    let options = BalloonOptions {
        num_pages: pages(balloon.amount_mib << 20),
        max_pages: pages(spec.ram_size()),
        host_page: reserved.map_or(PAGE, |mib| mib << 20),
        deflate_on_oom: balloon.deflate_on_oom,
        statistics: match balloon.stats_polling_interval_s {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        },
        reporting: balloon.free_page_reporting,
        hinting: balloon.free_page_hinting,
    };
    Plan {
        id: "balloon".to_string(),
        config: DeviceConfig::Balloon(options),
    }
}
