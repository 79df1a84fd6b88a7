//! The clock device, with the processor's counter beside the host's clocks.

use devices::virtio::registry::DeviceConfig;
use devices::virtio::rtc::{Counter, LeapSeconds, RtcOptions};

use super::Plan;
use crate::config;

pub(super) fn plan(rtc: &config::Rtc) -> Plan {
    let leap_seconds = match rtc.leap {
        config::LeapSeconds::Unknown => LeapSeconds::Unknown,
        config::LeapSeconds::Step => LeapSeconds::Step,
        config::LeapSeconds::Smeared => LeapSeconds::Smeared,
        config::LeapSeconds::NoonLinear => LeapSeconds::NoonLinear,
        config::LeapSeconds::UtcSls => LeapSeconds::UtcSls,
    };
    let counter = Some(Counter {
        id: arch::tsc::VIRTIO_COUNTER,
        read: arch::tsc::read,
    });
    Plan {
        id: "rtc".to_string(),
        config: DeviceConfig::Rtc(RtcOptions {
            leap_seconds,
            counter,
        }),
    }
}
