//! The devices of a PC that a guest expects at fixed ports.
//!
//! All of them have byte registers. As on an 8-bit bus, a wider access is one byte access to each
//! register it covers, in rising order; registers a device lacks read as ones.

use crate::bus::Effect;

pub mod boot_timer;
mod calendar;
pub mod debug_exit;
pub mod i8042;
pub mod keyboard;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod watchdog;

/// Splits a read into byte registers.
fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (i, byte) in (0..).zip(data) {
        *byte = read(offset.wrapping_add(i));
    }
}

/// Splits a write into byte registers, up to the first one with an effect.
fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8) -> Effect) -> Effect {
    for (i, byte) in (0..).zip(data) {
        let effect = write(offset.wrapping_add(i), *byte);
        if effect != Effect::None {
            return effect;
        }
    }
    Effect::None
}
