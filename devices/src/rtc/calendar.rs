//! Seconds since 1970 to calendar fields and back (proleptic Gregorian, no time zone).

/// A point in time as the clock's registers hold it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fields {
    pub(super) year: i64,
    pub(super) month: u8,
    pub(super) day: u8,
    /// Sunday is 1.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

/// Days from 1970-01-01; years start in March so that the leap day is the last.
pub(super) fn to_unix(f: &Fields) -> i64 {
    let month = i64::from(f.month.clamp(1, 12));
    let year = f.year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(f.day) - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    days * 86_400 + i64::from(f.hour) * 3600 + i64::from(f.minute) * 60 + i64::from(f.second)
}

pub(super) fn from_unix(seconds: i64) -> Fields {
    let days = seconds.div_euclid(86_400);
    let rest = seconds.rem_euclid(86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let month = (from_march + 2) % 12 + 1;
    Fields {
        year: era * 400 + year_of_era + i64::from(month <= 2),
        month: month as u8,
        day: (day_of_year - (153 * from_march + 2) / 5 + 1) as u8,
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        hour: (rest / 3600) as u8,
        minute: (rest / 60 % 60) as u8,
        second: (rest % 60) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        // date -u -d @N
        for (unix, y, mo, d, wd, h, mi, s) in [
            (0, 1970, 1, 1, 5, 0, 0, 0),
            (951_782_400, 2000, 2, 29, 3, 0, 0, 0),
            (1_704_067_199, 2023, 12, 31, 1, 23, 59, 59),
            (4_107_542_400, 2100, 3, 1, 2, 0, 0, 0),
        ] {
            let f = Fields { year: y, month: mo, day: d, weekday: wd, hour: h, minute: mi, second: s };
            assert_eq!(from_unix(unix), f);
            assert_eq!(to_unix(&f), unix);
        }
    }
}
