//! The MC146818 real-time clock and its CMOS RAM.
//!
//! The time is the host's clock plus an offset that the guest changes by setting the time, so
//! nothing ticks here and an update is never in progress. While a guest holds bit SET of register
//! B, the time stands still and can be written. Alarm and periodic interrupts are not raised:
//! their registers are kept, and Linux does not need them to boot or to read and set the time.
//! All memory-size bytes are 0. Runs on vCPU threads; one private mutex.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::calendar::DateTime;
use crate::bus::{BusDevice, Effect};
use crate::lock;

/// First port: the index; the data register follows.
pub const PORT: u64 = 0x70;
/// Ports it takes.
pub const LEN: u64 = 2;
/// The CMOS register of the century, as the FADT names it.
pub const CENTURY: u8 = 0x32;

const INDEX: u64 = 0;
const DATA: u64 = 1;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// Register A: an update is in progress.
const A_UIP: u8 = 1 << 7;
/// 32.768 kHz time base, 1024 Hz periodic rate: what a PC's firmware leaves.
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24H: u8 = 1 << 1;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// Gives the host's time in seconds since 1970-01-01 00:00 UTC.
pub type Clock = Box<dyn Fn() -> i64 + Send + Sync>;

/// The host's real-time clock; times before 1970 read as 1970.
pub fn host_clock() -> Clock {
    Box::new(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
    })
}

/// The CMOS as plain data; the default is the state after reset: BCD, 24 hours, the host's time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// The selected register, 0 to 127.
    pub index: u8,
    /// The 128 registers, in rows of 32. Those of the time only count while bit SET of register B
    /// is set.
    pub registers: [[u8; 32]; 4],
    /// Guest's time less host's, in seconds.
    pub offset: i64,
}

impl Default for CmosState {
    fn default() -> Self {
        let mut state = Self {
            index: 0,
            registers: [[0; 32]; 4],
            offset: 0,
        };
        state.set(REGISTER_A, A_DEFAULT);
        state.set(REGISTER_B, B_24H);
        state.set(REGISTER_D, D_VALID);
        state
    }
}

fn is_time(register: u8) -> bool {
    matches!(
        register,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

impl CmosState {
    fn get(&self, register: u8) -> u8 {
        let row = self.registers.get(usize::from(register >> 5));
        row.and_then(|row| row.get(usize::from(register & 31)))
            .map_or(0xff, |value| *value)
    }

    fn set(&mut self, register: u8, value: u8) {
        let row = self.registers.get_mut(usize::from(register >> 5));
        if let Some(place) = row.and_then(|row| row.get_mut(usize::from(register & 31))) {
            *place = value;
        }
    }

    fn is_set(&self, bit: u8) -> bool {
        self.get(REGISTER_B) & bit != 0
    }

    fn encode(&self, value: u8) -> u8 {
        match self.is_set(B_BINARY) {
            true => value,
            false => ((value / 10) << 4) | (value % 10),
        }
    }

    fn decode(&self, value: u8) -> u8 {
        match self.is_set(B_BINARY) {
            true => value,
            false => (value >> 4) * 10 + (value & 0xf),
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.is_set(B_24H) {
            return self.encode(hour);
        }
        let twelve = match hour % 12 {
            0 => self.encode(12),
            hour => self.encode(hour),
        };
        if hour < 12 { twelve } else { twelve | PM }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.is_set(B_24H) {
            return self.decode(value);
        }
        let hour = self.decode(value & !PM) % 12;
        if value & PM == 0 { hour } else { hour + 12 }
    }

    /// Puts the time into its registers.
    fn latch(&mut self, now: i64) {
        let t = DateTime::from_unix(now.saturating_add(self.offset));
        let century = self.encode((t.year / 100) as u8);
        let year = self.encode((t.year % 100) as u8);
        for (register, value) in [
            (SECONDS, self.encode(t.second)),
            (MINUTES, self.encode(t.minute)),
            (HOURS, self.encode_hour(t.hour)),
            (WEEKDAY, self.encode(t.weekday)),
            (DAY, self.encode(t.day)),
            (MONTH, self.encode(t.month)),
            (YEAR, year),
            (CENTURY, century),
        ] {
            self.set(register, value);
        }
    }

    /// Takes the time in its registers as the guest's time; one that does not exist is ignored.
    fn unlatch(&mut self, now: i64) {
        let field = |register| self.decode(self.get(register));
        let time = DateTime {
            year: u16::from(field(CENTURY)) * 100 + u16::from(field(YEAR)),
            month: field(MONTH),
            day: field(DAY),
            weekday: 1,
            hour: self.decode_hour(self.get(HOURS)),
            minute: field(MINUTES),
            second: field(SECONDS),
        };
        if let Some(seconds) = time.to_unix() {
            self.offset = seconds.saturating_sub(now);
        }
    }

    fn read_data(&mut self, now: i64) -> u8 {
        let register = self.index;
        if is_time(register) && !self.is_set(B_SET) {
            self.latch(now);
        }
        let value = self.get(register);
        if register == REGISTER_C {
            self.set(REGISTER_C, 0);
        }
        value
    }

    fn write_data(&mut self, value: u8, now: i64) {
        match self.index {
            REGISTER_A => self.set(REGISTER_A, value & !A_UIP),
            REGISTER_B => {
                let was_set = self.is_set(B_SET);
                if !was_set && value & B_SET != 0 {
                    self.latch(now);
                }
                self.set(REGISTER_B, value);
                if was_set && value & B_SET == 0 {
                    self.unlatch(now);
                }
            }
            REGISTER_C | REGISTER_D => {}
            register if is_time(register) && !self.is_set(B_SET) => {
                self.latch(now);
                self.set(register, value);
                self.unlatch(now);
            }
            register => self.set(register, value),
        }
    }
}

/// The real-time clock and CMOS RAM.
pub struct Cmos {
    clock: Clock,
    state: Mutex<CmosState>,
}

impl Cmos {
    /// A CMOS that takes its time from `clock`, usually [`host_clock`].
    pub fn new(clock: Clock, state: CmosState) -> Self {
        let cmos = Self {
            clock,
            state: Mutex::default(),
        };
        cmos.restore(state);
        cmos
    }

    /// Has these registers.
    pub fn restore(&self, mut state: CmosState) {
        state.index &= 0x7f;
        *lock(&self.state) = state;
    }

    /// The registers as they are.
    pub fn save(&self) -> CmosState {
        lock(&self.state).clone()
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = (self.clock)();
        let mut state = lock(&self.state);
        super::read_bytes(offset, data, |port| match port {
            DATA => state.read_data(now),
            // The index is write-only.
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let now = (self.clock)();
        let mut state = lock(&self.state);
        super::write_bytes(offset, data, |port, value| {
            match port {
                // Bit 7 masks non-maskable interrupts, of which there are none.
                INDEX => state.index = value & 0x7f,
                DATA => state.write_data(value, now),
                _ => {}
            }
            Effect::None
        })
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
