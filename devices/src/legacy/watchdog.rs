//! A watchdog timer in four 32-bit registers, which an ACPI WDAT table describes to guests.
//!
//! A countdown that runs to its end has expired; feeding starts it again. Registers are used on
//! vCPU threads; the thread that the [`Alarm`] wakes calls [`Watchdog::check`] and decides what an
//! expired watchdog means. Nothing is armed while the countdown does not run. One private mutex.

use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bus::{BusDevice, Effect};
use crate::lock;

/// Bytes the registers take.
pub const LEN: u64 = 16;
/// Offset of the control register: [`CONTROL_RUN`].
pub const CONTROL: u64 = 0;
/// Offset of the countdown that feeding starts again, in periods. What is written is brought
/// within the bounds.
pub const COUNTDOWN: u64 = 4;
/// Offset of the register that feeds when it is written, and has the periods left when it is read.
pub const FEED: u64 = 8;
/// Offset of the status register: [`STATUS_EXPIRED`].
pub const STATUS: u64 = 12;
/// The countdown runs.
pub const CONTROL_RUN: u32 = 1 << 0;
/// The watchdog has expired; writing the bit clears it.
pub const STATUS_EXPIRED: u32 = 1 << 0;
/// The unit of countdowns, in milliseconds.
pub const PERIOD_MS: u32 = 100;
/// Countdown after reset: 30 seconds.
const DEFAULT_COUNTDOWN: u32 = 300;

/// The host's clock and timer for one watchdog.
pub trait Alarm: Send + Sync {
    /// Time since some moment; it never goes back.
    fn now(&self) -> Duration;
    /// Has [`Watchdog::check`] called once, `after` this time; `None`: not at all. Replaces what
    /// was set before, and does not wait.
    fn set(&self, after: Option<Duration>);
}

/// The registers as plain data; the default is the state after reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    /// Periods that a fed watchdog counts down.
    pub countdown: u32,
    /// Periods left, while it runs.
    pub left: Option<u32>,
    /// It has expired.
    pub expired: bool,
}

impl Default for WatchdogState {
    fn default() -> Self {
        Self {
            countdown: DEFAULT_COUNTDOWN,
            left: None,
            expired: false,
        }
    }
}

struct Registers {
    countdown: u32,
    /// By the alarm's clock.
    deadline: Option<Duration>,
    expired: bool,
}

impl Registers {
    /// Those of a state, brought within the bounds, at the time `now` of the alarm's clock.
    fn new(state: &WatchdogState, bounds: &RangeInclusive<u32>, now: Duration) -> Self {
        let countdown = state.countdown.clamp(*bounds.start(), *bounds.end());
        let left = state.left.map(|left| left.min(countdown));
        Self {
            countdown,
            deadline: left.map(|left| now + periods(left)),
            expired: state.expired,
        }
    }
}

/// The watchdog.
pub struct Watchdog<A> {
    alarm: A,
    bounds: RangeInclusive<u32>,
    registers: Mutex<Registers>,
}

fn periods(count: u32) -> Duration {
    Duration::from_millis(u64::from(PERIOD_MS) * u64::from(count))
}

impl<A: Alarm> Watchdog<A> {
    /// A watchdog whose countdowns are `bounds` periods long, which are at least one.
    pub fn new(alarm: A, bounds: RangeInclusive<u32>, state: WatchdogState) -> Self {
        let least = (*bounds.start()).max(1);
        let bounds = least..=(*bounds.end()).max(least);
        let registers = Registers::new(&state, &bounds, alarm.now());
        alarm.set(registers.deadline.map(|at| at.saturating_sub(alarm.now())));
        Self {
            alarm,
            bounds,
            registers: Mutex::new(registers),
        }
    }

    /// Has these registers. The alarm is not set: it goes off anyway when time goes on that stood still.
    pub fn restore(&self, state: &WatchdogState) {
        *lock(&self.registers) = Registers::new(state, &self.bounds, self.alarm.now());
    }

    /// The registers as they are.
    pub fn save(&self) -> WatchdogState {
        let registers = lock(&self.registers);
        WatchdogState {
            countdown: registers.countdown,
            left: self.left(&registers),
            expired: registers.expired,
        }
    }

    /// The host's side of it.
    pub fn alarm(&self) -> &A {
        &self.alarm
    }

    /// Whether the watchdog has expired now; it then counts down again. Otherwise the alarm is set
    /// for when it will.
    pub fn check(&self) -> bool {
        let mut registers = lock(&self.registers);
        let Some(deadline) = registers.deadline else {
            return false;
        };
        let left = deadline.saturating_sub(self.alarm.now());
        if left > Duration::ZERO {
            self.alarm.set(Some(left));
            return false;
        }
        registers.expired = true;
        self.start(&mut registers);
        true
    }

    /// Periods left, where the countdown runs; one that has begun counts.
    fn left(&self, registers: &Registers) -> Option<u32> {
        let left = registers.deadline?.saturating_sub(self.alarm.now());
        let count = left.as_nanos().div_ceil(periods(1).as_nanos());
        Some(u32::try_from(count).unwrap_or(u32::MAX))
    }

    fn start(&self, registers: &mut Registers) {
        let after = periods(registers.countdown);
        registers.deadline = Some(self.alarm.now() + after);
        self.alarm.set(Some(after));
    }
}

impl<A: Alarm> BusDevice for Watchdog<A> {
    /// Registers are read whole.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = lock(&self.registers);
        let value = match offset {
            CONTROL if registers.deadline.is_some() => CONTROL_RUN,
            CONTROL => 0,
            COUNTDOWN => registers.countdown,
            FEED => self.left(&registers).unwrap_or(0),
            STATUS if registers.expired => STATUS_EXPIRED,
            STATUS => 0,
            _ => return,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    /// Registers are written whole.
    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return Effect::None;
        };
        let mut registers = lock(&self.registers);
        match offset {
            CONTROL if value & CONTROL_RUN == 0 => {
                registers.deadline = None;
                self.alarm.set(None);
            }
            // One that runs goes on.
            CONTROL if registers.deadline.is_none() => self.start(&mut registers),
            COUNTDOWN => {
                registers.countdown = value.clamp(*self.bounds.start(), *self.bounds.end());
            }
            FEED if registers.deadline.is_some() => self.start(&mut registers),
            STATUS if value & STATUS_EXPIRED != 0 => registers.expired = false,
            _ => {}
        }
        Effect::None
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    /// A clock that stands still, and what was set last.
    #[derive(Clone, Default)]
    pub(crate) struct Still(Arc<Mutex<(Duration, Option<Duration>)>>);

    impl Still {
        /// Lets time pass.
        pub(crate) fn pass(&self, time: Duration) {
            lock(&self.0).0 += time;
        }

        fn armed(&self) -> Option<Duration> {
            lock(&self.0).1
        }
    }

    impl Alarm for Still {
        fn now(&self) -> Duration {
            lock(&self.0).0
        }

        fn set(&self, after: Option<Duration>) {
            lock(&self.0).1 = after;
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn new() -> (Watchdog<Still>, Still) {
        let clock = Still::default();
        let dog = Watchdog::new(clock.clone(), 10..=600, WatchdogState::default());
        (dog, clock)
    }

    fn read(dog: &Watchdog<Still>, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        dog.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(dog: &Watchdog<Still>, offset: u64, value: u32) {
        assert_eq!(dog.write(offset, &value.to_le_bytes()), Effect::None);
    }

    #[test]
    fn it_is_at_rest_until_it_is_started() {
        let (dog, clock) = new();
        write(&dog, FEED, 1);
        write(&dog, COUNTDOWN, 20);
        assert_eq!(
            (clock.armed(), read(&dog, CONTROL), read(&dog, FEED)),
            (None, 0, 0)
        );
        clock.pass(SECOND * 1000);
        assert!(!dog.check());
        write(&dog, CONTROL, 1);
        assert_eq!((clock.armed(), read(&dog, CONTROL)), (Some(SECOND * 2), 1));
        write(&dog, CONTROL, 0);
        assert_eq!((clock.armed(), read(&dog, CONTROL)), (None, 0));
    }

    #[test]
    fn it_expires_unless_it_is_fed() {
        let (dog, clock) = new();
        write(&dog, COUNTDOWN, 20);
        write(&dog, CONTROL, 1);
        for _ in 0..5 {
            clock.pass(SECOND + SECOND / 2);
            // An alarm that comes too early is set again; a second start is no feeding.
            write(&dog, CONTROL, 1);
            assert!(!dog.check());
            assert_eq!((read(&dog, FEED), clock.armed()), (5, Some(SECOND / 2)));
            write(&dog, FEED, 0xdead);
            assert_eq!((read(&dog, FEED), clock.armed()), (20, Some(SECOND * 2)));
        }
        // A new countdown counts from the next feeding.
        write(&dog, COUNTDOWN, 30);
        clock.pass(SECOND * 2);
        assert_eq!((read(&dog, FEED), read(&dog, STATUS)), (0, 0));
        assert!(dog.check());
        assert_eq!((read(&dog, STATUS), clock.armed()), (1, Some(SECOND * 3)));
        assert!(!dog.check());
        write(&dog, STATUS, 0);
        assert_eq!(read(&dog, STATUS), 1);
        write(&dog, STATUS, 1);
        assert_eq!(read(&dog, STATUS), 0);
        clock.pass(SECOND * 3);
        assert!(dog.check());
    }

    #[test]
    fn countdowns_keep_within_the_bounds() {
        let (dog, _) = new();
        assert_eq!(read(&dog, COUNTDOWN), 300);
        for (written, kept) in [
            (0, 10),
            (9, 10),
            (10, 10),
            (600, 600),
            (601, 600),
            (!0, 600),
        ] {
            write(&dog, COUNTDOWN, written);
            assert_eq!(read(&dog, COUNTDOWN), kept);
        }
        let short = Watchdog::new(Still::default(), 0..=0, WatchdogState::default());
        assert_eq!(read(&short, COUNTDOWN), 1);
        let state = WatchdogState {
            countdown: u32::MAX,
            left: Some(u32::MAX),
            expired: true,
        };
        let clock = Still::default();
        let garbage = Watchdog::new(clock.clone(), 1..=50, state);
        assert_eq!(
            (read(&garbage, FEED), clock.armed()),
            (50, Some(SECOND * 5))
        );
    }

    #[test]
    fn only_whole_registers_are_there() {
        let (dog, clock) = new();
        for offset in 0..20 {
            for width in [1, 2, 3, 5, 8] {
                let _ = dog.write(offset, &vec![0xff; width]);
                let mut data = vec![0xff; width];
                dog.read(offset, &mut data);
                assert!(data.iter().all(|byte| *byte == 0xff));
            }
            if offset % 4 != 0 || offset >= LEN {
                write(&dog, offset, u32::MAX);
                assert_eq!(read(&dog, offset), u32::MAX);
            }
        }
        assert_eq!(dog.save(), WatchdogState::default());
        assert_eq!(clock.armed(), None);
    }

    #[test]
    fn a_saved_countdown_goes_on() {
        let (dog, clock) = new();
        write(&dog, CONTROL, 1);
        clock.pass(SECOND * 10);
        let state = dog.save();
        assert_eq!(state.left, Some(200));
        clock.pass(SECOND * 1000);
        let again = Watchdog::new(clock.clone(), 10..=600, state.clone());
        assert_eq!(again.save(), state);
        assert_eq!(clock.armed(), Some(SECOND * 20));
        clock.pass(SECOND * 20);
        assert!(again.check());
    }

    proptest! {
        /// The alarm is set exactly while the countdown runs, and never for longer than the guest
        /// may wait.
        #[test]
        fn an_alarm_is_set_while_it_runs(
            steps in prop::collection::vec((0u64..20, any::<u32>(), 0u64..100_000), 0..100),
        ) {
            let (dog, clock) = new();
            for (offset, value, time) in steps {
                write(&dog, offset, value);
                let running = read(&dog, CONTROL) == CONTROL_RUN;
                prop_assert_eq!(clock.armed().is_some(), running);
                prop_assert!(clock.armed().is_none_or(|after| after <= SECOND * 60));
                prop_assert!((10..=600).contains(&read(&dog, COUNTDOWN)));
                prop_assert!(read(&dog, FEED) <= 600);
                clock.pass(Duration::from_millis(time));
                prop_assert!(running || !dog.check());
            }
        }
    }
}
