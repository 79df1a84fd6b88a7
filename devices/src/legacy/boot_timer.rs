//! The boot timer: a guest that writes a magic byte has booted, and the log says how long that took.
//!
//! Firecracker's pseudo device, on the writing vCPU's thread. Its only state is how often it spoke.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::bus::{BusDevice, Effect};

/// What a guest writes at offset 0 when it has booted.
const BOOTED: u8 = 123;
/// Lines of log; a guest can write at will.
const MAX_LOGGED: u32 = 16;

/// Two clocks: time that passed, and processor time of this process.
pub type Times = [Duration; 2];

/// The device.
#[derive(Debug)]
pub struct BootTimer {
    now: fn() -> Times,
    begin: Times,
    logged: AtomicU32,
}

impl BootTimer {
    /// A timer by the clocks `now` that started at `begin`.
    pub fn new(now: fn() -> Times, begin: Times) -> Self {
        let logged = AtomicU32::new(0);
        Self { now, begin, logged }
    }

    /// What the log says, in Firecracker's words.
    fn line(&self) -> String {
        let now = (self.now)().into_iter().zip(self.begin);
        let mut since = now.map(|(now, begin)| now.saturating_sub(begin).as_micros());
        let (wall, cpu) = (
            since.next().unwrap_or_default(),
            since.next().unwrap_or_default(),
        );
        let (wall_ms, cpu_ms) = (wall / 1000, cpu / 1000);
        format!("Guest-boot-time = {wall:>6} us {wall_ms} ms, {cpu:>6} CPU us {cpu_ms} CPU ms")
    }
}

impl BusDevice for BootTimer {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if offset == 0
            && data == [BOOTED]
            && self.logged.fetch_add(1, Ordering::Relaxed) < MAX_LOGGED
        {
            log::info!("{}", self.line());
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_both_times() {
        let now = || [Duration::from_micros(1_234_567), Duration::from_millis(20)];
        let timer = BootTimer::new(now, [Duration::from_micros(567), Duration::from_secs(1)]);
        assert_eq!(
            timer.line(),
            "Guest-boot-time = 1234000 us 1234 ms,      0 CPU us 0 CPU ms"
        );
    }

    #[test]
    fn only_the_magic_byte_counts_and_not_for_ever() {
        let timer = BootTimer::new(|| [Duration::ZERO; 2], [Duration::ZERO; 2]);
        for (offset, data) in [(0, &[0][..]), (1, &[BOOTED]), (0, &[BOOTED, 0]), (0, &[])] {
            assert_eq!(timer.write(offset, data), Effect::None);
        }
        assert_eq!(timer.logged.load(Ordering::Relaxed), 0);
        assert_eq!(timer.write(0, &[BOOTED]), Effect::None);
        assert_eq!(timer.logged.load(Ordering::Relaxed), 1);
    }
}
