use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;

/// 2024-12-31 23:59:58 UTC.
const NEW_YEARS_EVE: i64 = 1_735_689_598;

struct Guest {
    cmos: Cmos,
    now: Arc<AtomicI64>,
}

impl Guest {
    fn new() -> Self {
        let now = Arc::new(AtomicI64::new(NEW_YEARS_EVE));
        let clock = now.clone();
        let cmos = Cmos::new(
            Box::new(move || clock.load(Ordering::SeqCst)),
            CmosState::default(),
        );
        Self { cmos, now }
    }

    fn pass(&self, seconds: i64) {
        self.now.fetch_add(seconds, Ordering::SeqCst);
    }

    fn read(&self, register: u8) -> u8 {
        // Linux leaves the NMI mask in bit 7 now and then.
        assert_eq!(self.cmos.write(INDEX, &[register | 0x80]), Effect::None);
        let mut data = [0];
        self.cmos.read(DATA, &mut data);
        data[0]
    }

    fn write(&self, register: u8, value: u8) {
        assert_eq!(self.cmos.write(INDEX, &[register]), Effect::None);
        assert_eq!(self.cmos.write(DATA, &[value]), Effect::None);
    }

    fn date(&self) -> Vec<u8> {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS]
            .map(|r| self.read(r))
            .to_vec()
    }

    /// Linux's mc146818_set_time.
    fn set_date(&self, date: [u8; 7]) {
        let control = self.read(REGISTER_B);
        self.write(REGISTER_B, control | B_SET);
        let frequency = self.read(REGISTER_A);
        self.write(REGISTER_A, frequency | 0x70);
        let registers = [YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, CENTURY];
        let [century, rest @ ..] = date;
        for (register, value) in registers.into_iter().zip(rest.into_iter().chain([century])) {
            self.write(register, value);
        }
        self.write(REGISTER_B, control);
        self.write(REGISTER_A, frequency);
    }
}

#[test]
fn linux_reads_the_hosts_time() {
    let guest = Guest::new();
    assert_eq!(guest.read(REGISTER_A), A_DEFAULT);
    assert_eq!(guest.read(REGISTER_D), 0x80);
    assert_eq!(guest.read(REGISTER_C), 0);
    // rtc_cmos refuses a clock that is not in 24-hour mode.
    assert_eq!(guest.read(REGISTER_B) & (B_24H | B_BINARY), B_24H);
    assert_eq!(guest.date(), [0x20, 0x24, 0x12, 0x31, 0x23, 0x59, 0x58]);
    assert_eq!(guest.read(WEEKDAY), 3);
    guest.pass(2);
    assert_eq!(guest.date(), [0x20, 0x25, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn binary_and_twelve_hours() {
    let guest = Guest::new();
    guest.write(REGISTER_B, B_24H | B_BINARY);
    assert_eq!(guest.date(), [20, 24, 12, 31, 23, 59, 58]);
    guest.write(REGISTER_B, B_BINARY);
    assert_eq!(guest.read(HOURS), 11 | PM);
    guest.write(REGISTER_B, 0);
    assert_eq!(guest.read(HOURS), 0x11 | PM);
    for (hour, shown) in [(0, 0x12), (1, 0x01), (12, 0x92), (13, 0x81), (23, 0x91)] {
        guest.write(HOURS, shown);
        assert_eq!(guest.read(HOURS), shown);
        guest.write(REGISTER_B, B_24H | B_BINARY);
        assert_eq!(guest.read(HOURS), hour);
        guest.write(REGISTER_B, 0);
    }
}

#[test]
fn linux_sets_the_time_and_it_goes_on() {
    let guest = Guest::new();
    guest.set_date([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x50]);
    assert_eq!(guest.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x50]);
    guest.pass(10);
    assert_eq!(guest.date(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    assert_eq!(guest.read(REGISTER_A), A_DEFAULT);
}

#[test]
fn the_time_stands_still_while_it_is_set() {
    let guest = Guest::new();
    guest.write(REGISTER_B, B_24H | B_SET);
    guest.pass(1);
    assert_eq!(guest.read(SECONDS), 0x58);
    guest.write(SECONDS, 0x07);
    assert_eq!(guest.read(SECONDS), 0x07);
    guest.write(REGISTER_B, B_24H);
    assert_eq!(guest.read(SECONDS), 0x07);
}

#[test]
fn a_date_that_does_not_exist_is_ignored() {
    let guest = Guest::new();
    guest.set_date([0x20, 0x25, 0x02, 0x30, 0x00, 0x00, 0x00]);
    assert_eq!(guest.date(), [0x20, 0x24, 0x12, 0x31, 0x23, 0x59, 0x58]);
    guest.set_date([0xff; 7]);
    assert_eq!(guest.date(), [0x20, 0x24, 0x12, 0x31, 0x23, 0x59, 0x58]);
}

#[test]
fn an_update_is_never_in_progress() {
    let guest = Guest::new();
    guest.write(REGISTER_A, 0xff);
    assert_eq!(guest.read(REGISTER_A), 0x7f);
}

#[test]
fn ram_keeps_what_is_written_and_reports_no_memory() {
    let guest = Guest::new();
    for register in [
        0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5b, 0x5c, 0x5d,
    ] {
        assert_eq!(guest.read(register), 0, "{register:#x}");
    }
    for register in [0x01, 0x0e, 0x40, 0x7f] {
        guest.write(register, register);
    }
    for register in [0x01, 0x0e, 0x40, 0x7f] {
        assert_eq!(guest.read(register), register);
    }
    guest.write(REGISTER_D, 0);
    assert_eq!(guest.read(REGISTER_D), 0x80);
}

#[test]
fn a_restored_clock_keeps_the_guests_time_of_day() {
    let guest = Guest::new();
    guest.set_date([0x20, 0x30, 0x06, 0x01, 0x12, 0x00, 0x00]);
    let state = guest.cmos.save();
    let cmos = Cmos::new(Box::new(|| NEW_YEARS_EVE + 60), state);
    let restored = Guest {
        cmos,
        ..Guest::new()
    };
    assert_eq!(restored.date(), [0x20, 0x30, 0x06, 0x01, 0x12, 0x01, 0x00]);
}

#[test]
fn a_hostile_offset_and_clock_are_harmless() {
    for offset in [i64::MIN, i64::MAX] {
        for now in [i64::MIN, i64::MAX] {
            let state = CmosState {
                index: 0xff,
                offset,
                ..CmosState::default()
            };
            let cmos = Cmos::new(Box::new(move || now), state);
            let guest = Guest {
                cmos,
                ..Guest::new()
            };
            guest.date();
            guest.set_date([0x20, 0x30, 0x06, 0x01, 0x12, 0x00, 0x00]);
        }
    }
}

#[test]
fn the_host_clock_is_the_hosts() {
    let host = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(host_clock()().abs_diff(host as i64) <= 5);
}
