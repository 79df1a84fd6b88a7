//! The clock device.

use serde::{Deserialize, Serialize};

/// A device that reads the host's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rtc {
    /// What the host's clock does around leap seconds.
    #[serde(default)]
    pub leap: LeapSeconds,
}

/// What a clock does around leap seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeapSeconds {
    /// Nobody knows.
    #[default]
    Unknown,
    /// It steps.
    Step,
    /// It is smeared in some way.
    Smeared,
    /// It is smeared from noon to noon.
    NoonLinear,
    /// It is smeared over the last 1000 seconds of the day.
    UtcSls,
}
