//! Watchdog action table (Microsoft, "Hardware Watchdog Timers Design Specification"): what to do
//! with which register. Linux's driver for it is `wdat_wdt`.

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::tables::{bytes, table};
use crate::layout;

/// A watchdog with the registers of `layout::WATCHDOG_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchdogFacts {
    /// First of the `layout::WATCHDOG_PORT_SIZE` ports.
    pub port: u16,
    /// The unit of countdowns, in milliseconds.
    pub period_ms: u32,
    /// Shortest countdown.
    pub min_count: u32,
    /// Longest countdown.
    pub max_count: u32,
}

/// How an instruction uses its register.
mod instruction {
    pub const READ_VALUE: u8 = 0;
    pub const READ_COUNTDOWN: u8 = 1;
    pub const WRITE_VALUE: u8 = 2;
    pub const WRITE_COUNTDOWN: u8 = 3;
}

use instruction::{READ_COUNTDOWN, READ_VALUE, WRITE_COUNTDOWN, WRITE_VALUE};

const CONTROL: u16 = layout::WATCHDOG_CONTROL;
const COUNTDOWN: u16 = layout::WATCHDOG_COUNTDOWN;
const FEED: u16 = layout::WATCHDOG_FEED;
const STATUS: u16 = layout::WATCHDOG_STATUS;
const ALL: u32 = u32::MAX;

/// Action, instruction, register, value, mask.
const ENTRIES: [(u8, u8, u16, u32, u32); 10] = [
    // Reset the countdown: feed.
    (1, WRITE_VALUE, FEED, 1, ALL),
    // Query what is left of the countdown, and the countdown; set it.
    (4, READ_COUNTDOWN, FEED, 0, ALL),
    (5, READ_COUNTDOWN, COUNTDOWN, 0, ALL),
    (6, WRITE_COUNTDOWN, COUNTDOWN, 0, ALL),
    // Query and set: running.
    (8, READ_VALUE, CONTROL, 1, 1),
    (9, WRITE_VALUE, CONTROL, 1, ALL),
    // Query and set: stopped.
    (10, READ_VALUE, CONTROL, 0, 1),
    (11, WRITE_VALUE, CONTROL, 0, ALL),
    // Query and clear: it has expired.
    (32, READ_VALUE, STATUS, 1, 1),
    (33, WRITE_VALUE, STATUS, 1, ALL),
];

/// The whole table.
pub(super) fn wdat(facts: &WatchdogFacts) -> Vec<u8> {
    const HEADER_SIZE: u32 = 32;
    /// The timer is there for the operating system.
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    let mut word = |value: u32| body.extend(value.to_le_bytes());
    word(HEADER_SIZE);
    // No PCI device: segment (16 bits, but 0xff), bus and device, then function and three reserved
    // bytes.
    word(0xffff_00ff);
    word(0xff);
    word(facts.period_ms);
    word(facts.max_count);
    word(facts.min_count);
    word(ENABLED);
    word(ENTRIES.len() as u32);
    for (action, instruction, register, value, mask) in ENTRIES {
        body.extend([action, instruction, 0, 0]);
        let port = u64::from(facts.port) + u64::from(register);
        let register = GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, port);
        body.extend(bytes(&register));
        body.extend([value, mask].map(u32::to_le_bytes).as_flattened());
    }
    table(*b"WDAT", 1, &body)
}
