//! pvpanic: the port by which a guest kernel reports that it panicked.
//!
//! As specified by QEMU's docs/specs/pvpanic.rst; runs on the writing vCPU's thread, has no state.

use crate::bus::{BusDevice, Effect, ExitReason};

/// The port QEMU uses. The guest learns it from the ACPI device `QEMU0001`.
pub const PORT: u64 = 0x505;

/// The guest panicked and will not go on.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and starts its own crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic device: one register, at offset 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct PvPanic;

impl BusDevice for PvPanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(offset, data, |register| match register {
            0 => PANICKED | CRASH_LOADED,
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        super::write_bytes(offset, data, |register, value| match register {
            0 if value & PANICKED != 0 => Effect::Exit(ExitReason::Panicked),
            0 if value & CRASH_LOADED != 0 => Effect::CrashLoaded,
            _ => Effect::None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_and_takes_both_events() {
        let mut data = [0; 2];
        PvPanic.read(0, &mut data);
        assert_eq!(data, [3, 0xff]);
        assert_eq!(PvPanic.write(0, &[1]), Effect::Exit(ExitReason::Panicked));
        assert_eq!(PvPanic.write(0, &[3]), Effect::Exit(ExitReason::Panicked));
        assert_eq!(PvPanic.write(0, &[2]), Effect::CrashLoaded);
        assert_eq!(PvPanic.write(0, &[4]), Effect::None);
        assert_eq!(PvPanic.write(1, &[1]), Effect::None);
    }
}
