//! Dates of the Gregorian calendar for the real-time clock, in UTC; pure arithmetic.

const SECONDS_PER_DAY: i64 = 86_400;
/// 9999-12-31 23:59:59, the last moment the clock can show.
const LAST: i64 = 253_402_300_799;

/// A moment as a clock shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    /// 1970 to 9999.
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 1 (Sunday) to 7.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_month(year: i64, month: u8) -> u8 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to January 1st of `year`.
fn days_before_year(year: i64) -> i64 {
    let leap_years = |y: i64| y / 4 - y / 100 + y / 400;
    (year - 1970) * 365 + leap_years(year - 1) - leap_years(1969)
}

impl DateTime {
    /// The moment `seconds` after 1970-01-01 00:00, cut to the years 1970 to 9999.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(0, LAST);
        let days = seconds / SECONDS_PER_DAY;
        let rest = seconds % SECONDS_PER_DAY;
        // No year is longer than 366 days, so this is never too late and at most 22 years early.
        let mut year = 1970 + days / 366;
        while days_before_year(year + 1) <= days {
            year += 1;
        }
        let mut day = days - days_before_year(year);
        let mut month = 1;
        while day >= i64::from(days_in_month(year, month)) {
            day -= i64::from(days_in_month(year, month));
            month += 1;
        }
        Self {
            year: year as u16,
            month,
            day: day as u8 + 1,
            // 1970-01-01 was a Thursday.
            weekday: ((days + 4) % 7) as u8 + 1,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00, without regard to the weekday; `None` for a moment that does
    /// not exist or that the clock cannot show.
    pub(super) fn to_unix(self) -> Option<i64> {
        let year = i64::from(self.year);
        let exists = (1970..=9999).contains(&year)
            && (1..=12).contains(&self.month)
            && (1..=days_in_month(year, self.month)).contains(&self.day)
            && self.hour < 24
            && self.minute < 60
            && self.second < 60;
        if !exists {
            return None;
        }
        let months: i64 = (1..self.month)
            .map(|month| i64::from(days_in_month(year, month)))
            .sum();
        let days = days_before_year(year) + months + i64::from(self.day) - 1;
        let time =
            i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        Some(days * SECONDS_PER_DAY + time)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn show(seconds: i64) -> (u16, u8, u8, u8, u8, u8, u8) {
        let t = DateTime::from_unix(seconds);
        (
            t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday,
        )
    }

    // Expected values from `date -u -d @N +'%F %T %u'`.
    #[test]
    fn known_moments() {
        assert_eq!(show(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(show(951_782_400), (2000, 2, 29, 0, 0, 0, 3));
        assert_eq!(show(1_735_689_599), (2024, 12, 31, 23, 59, 59, 3));
        assert_eq!(show(4_107_542_400), (2100, 3, 1, 0, 0, 0, 2));
        assert_eq!(show(LAST), (9999, 12, 31, 23, 59, 59, 6));
        assert_eq!(show(i64::MAX), show(LAST));
        assert_eq!(show(i64::MIN), show(0));
    }

    #[test]
    fn moments_that_do_not_exist() {
        let good = DateTime::from_unix(951_782_400);
        for bad in [
            DateTime { day: 30, ..good },
            DateTime { year: 2001, ..good },
            DateTime { month: 0, ..good },
            DateTime { month: 13, ..good },
            DateTime { day: 0, ..good },
            DateTime { hour: 24, ..good },
            DateTime { minute: 60, ..good },
            DateTime { second: 60, ..good },
            DateTime { year: 1969, ..good },
        ] {
            assert_eq!(bad.to_unix(), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in 0..=LAST) {
            prop_assert_eq!(DateTime::from_unix(seconds).to_unix(), Some(seconds));
        }
    }
}
