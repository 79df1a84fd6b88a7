//! The debug-exit port: a byte written ends the machine with that byte.
//!
//! Runs on the writing vCPU's thread; has no state.

use crate::bus::{BusDevice, Effect, ExitReason};

/// A port like QEMU's `isa-debug-exit`. Of a wider write the lowest byte counts; reads are ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct DebugExit;

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Effect {
        match data {
            [code, ..] => Effect::Exit(ExitReason::DebugExit(*code)),
            [] => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_ends_the_machine() {
        let expected = |code| Effect::Exit(ExitReason::DebugExit(code));
        assert_eq!(DebugExit.write(0, &[42]), expected(42));
        assert_eq!(DebugExit.write(0, &[7, 1, 0, 0]), expected(7));
        let mut data = [0];
        DebugExit.read(0, &mut data);
        assert_eq!(data, [0xff]);
    }
}
