//! The watchdog.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A watchdog timer, which the guest starts and feeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watchdog {
    /// Longest time that the guest can choose between two feedings.
    #[serde(default = "Watchdog::default_timeout", with = "super::duration")]
    pub timeout: Duration,
    /// Shortest time that it can choose.
    #[serde(default = "Watchdog::default_min", with = "super::duration")]
    pub min: Duration,
    /// What happens when a started watchdog is not fed in time.
    #[serde(default)]
    pub action: WatchdogAction,
}

impl Watchdog {
    /// The unit that times are rounded up to.
    pub const PERIOD: Duration = Duration::from_millis(100);

    fn default_timeout() -> Duration {
        Duration::from_secs(600)
    }

    fn default_min() -> Duration {
        Self::PERIOD
    }
}

impl Default for Watchdog {
    fn default() -> Self {
        Self {
            timeout: Self::default_timeout(),
            min: Self::default_min(),
            action: WatchdogAction::default(),
        }
    }
}

/// What happens when a watchdog is not fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// The VM ends, with an exit code of its own.
    #[default]
    Exit,
    /// As if the guest had reset itself.
    Reset,
    /// As if the guest had switched itself off.
    Poweroff,
    /// The first vCPU gets a non-maskable interrupt.
    Nmi,
    /// bulle logs it.
    Log,
}
