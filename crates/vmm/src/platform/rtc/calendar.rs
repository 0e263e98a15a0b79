//! Days and dates of the Gregorian calendar, from 1970 on and before.

/// A date and a time of day, as a clock shows them: the month and the day of the month begin at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    pub year: i64,
    pub month: u8,
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

const SECONDS_A_DAY: i64 = 86_400;
/// Days of 400 years, after which everything repeats.
const DAYS_AN_ERA: i64 = 146_097;
/// Days from 1 March 0000 to 1 January 1970. Years that begin in March end with the day that is not always there.
const EPOCH: i64 = 719_468;

impl Date {
    /// The date `seconds` after the beginning of 1970.
    pub fn at(seconds: i64) -> Date {
        let days = seconds.div_euclid(SECONDS_A_DAY) + EPOCH;
        let rest = seconds.rem_euclid(SECONDS_A_DAY);
        let (era, day) = (days.div_euclid(DAYS_AN_ERA), days.rem_euclid(DAYS_AN_ERA));
        // Of an era: every fourth year has a day more, every hundredth has not, and the last one has.
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        // Months from March on have 31 and 30 days in turn, five of them 153 together.
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let small = |value: i64| value as u8;
        Date {
            year: year + era * 400,
            month: small(month),
            day: small(day),
            hour: small(rest / 3600),
            minute: small(rest / 60 % 60),
            second: small(rest % 60),
        }
    }

    /// Seconds from the beginning of 1970. What is no date is one all the same: the 31st of April is the 1st of May.
    pub fn seconds(&self) -> i64 {
        let months = self.year * 12 + i64::from(self.month) - 3;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
        let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
        let day = (153 * month + 2) / 5 + i64::from(self.day) - 1;
        let days = era * DAYS_AN_ERA + year * 365 + year / 4 - year / 100 + day - EPOCH;
        days * SECONDS_A_DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// The day of the week: Sunday is 1 (MC146818A, table 3).
    pub fn weekday(&self) -> u8 {
        // 1 January 1970 was a Thursday.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let day = (self.seconds().div_euclid(SECONDS_A_DAY) + 4).rem_euclid(7) as u8;
        day + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_c_library() {
        for seconds in (-2_208_988_800..253_402_300_800i64).step_by(86_400 * 13 + 12_345) {
            // SAFETY: a structure of integers and a pointer that nobody reads.
            let mut tm: libc::tm = unsafe { std::mem::zeroed() };
            // SAFETY: both point to locals.
            assert!(!unsafe { libc::gmtime_r(&seconds, &mut tm) }.is_null());
            let date = Date::at(seconds);
            let got = [
                date.year - 1900,
                i64::from(date.month) - 1,
                date.day.into(),
                date.hour.into(),
                date.minute.into(),
                date.second.into(),
                i64::from(date.weekday()) - 1,
            ];
            let want = [tm.tm_year, tm.tm_mon, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, tm.tm_wday];
            assert_eq!(got, want.map(i64::from), "{seconds}");
            assert_eq!(date.seconds(), seconds);
        }
    }

    #[test]
    fn what_is_no_date_is_one_all_the_same() {
        let date = Date { year: 2023, month: 2, day: 29, hour: 24, minute: 60, second: 60 };
        assert_eq!(Date::at(date.seconds()), Date { day: 2, month: 3, hour: 1, minute: 1, second: 0, ..date });
        for byte in [0, 255] {
            let date = Date { year: 25_655, month: byte, day: byte, hour: byte, minute: byte, second: byte };
            Date::at(date.seconds());
        }
    }
}
