use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// 2024-02-29 13:14:15 UTC, a Thursday.
const NOW: u64 = 1_709_212_455;

/// A clock, and the nanoseconds that have passed since then.
fn rtc() -> (Arc<AtomicU64>, Rtc) {
    let passed = Arc::new(AtomicU64::new(0));
    let reader = passed.clone();
    let clock = move || Duration::from_secs(NOW) + Duration::from_nanos(reader.load(Ordering::Relaxed));
    (passed, Rtc::with_clock(Box::new(clock)))
}

fn pass(passed: &AtomicU64, time: Duration) {
    passed.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
}

fn read(rtc: &Rtc, index: u8) -> u8 {
    rtc.write(0, &[index]);
    let mut data = [0];
    rtc.read(1, &mut data);
    data[0]
}

fn write(rtc: &Rtc, index: u8, byte: u8) {
    rtc.write(0, &[index | 0x80]);
    rtc.write(1, &[byte]);
}

fn shown(rtc: &Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|index| read(rtc, index))
}

#[test]
fn it_shows_the_date_as_it_is_asked_to() {
    let (_, rtc) = rtc();
    assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x29, 0x13, 0x14, 0x15, 5]);
    write(&rtc, B, HOURS_24 | BINARY);
    assert_eq!(shown(&rtc), [20, 24, 2, 29, 13, 14, 15, 5]);
    write(&rtc, B, 0);
    assert_eq!(read(&rtc, HOURS), 0x81, "one in the afternoon");
    assert_eq!(read(&rtc, D), 0x80);
    let mut data = [0];
    rtc.read(0, &mut data);
    assert_eq!(data, [0xFF], "the index cannot be read");
}

#[test]
fn an_update_is_announced() {
    let (passed, rtc) = rtc();
    assert_eq!(read(&rtc, A), 0x26);
    pass(&passed, Duration::from_micros(999_700));
    assert_eq!(read(&rtc, A), 0x26);
    pass(&passed, Duration::from_micros(100));
    assert_eq!(read(&rtc, A), 0xA6);
    assert_eq!(read(&rtc, SECONDS), 0x15);
    pass(&passed, Duration::from_micros(200));
    assert_eq!(read(&rtc, A), 0x26);
    assert_eq!(read(&rtc, SECONDS), 0x16);
}

#[test]
fn flags_tell_those_who_poll() {
    let (passed, rtc) = rtc();
    assert_eq!(read(&rtc, C), 0);
    pass(&passed, Duration::from_millis(1));
    assert_eq!(read(&rtc, C), PERIODIC, "1024 Hz");
    write(&rtc, A, 0x20);
    pass(&passed, Duration::from_millis(500));
    assert_eq!(read(&rtc, C), 0);
    write(&rtc, B, HOURS_24 | UPDATE_ENDED);
    pass(&passed, Duration::from_millis(500));
    assert_eq!(read(&rtc, C), ANY_INTERRUPT | UPDATE_ENDED);
    assert_eq!(read(&rtc, C), 0);
}

#[test]
fn linux_sets_it() {
    let (passed, rtc) = rtc();
    // mc146818_set_time(): SET, the divider into reset, the fields, and both back.
    write(&rtc, B, HOURS_24 | SET);
    write(&rtc, A, 0x76);
    for (index, byte) in [(YEAR, 0x99), (CENTURY, 0x19), (MONTH, 0x12), (DAY, 0x31)] {
        write(&rtc, index, byte);
    }
    for (index, byte) in [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)] {
        write(&rtc, index, byte);
    }
    pass(&passed, Duration::from_secs(100));
    assert_eq!(read(&rtc, SECONDS), 0x59, "time stands still");
    assert_eq!(read(&rtc, A), 0x76, "and no update is in progress");
    write(&rtc, B, HOURS_24);
    write(&rtc, A, 0x26);
    assert_eq!(shown(&rtc), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6]);
    pass(&passed, Duration::from_millis(499));
    assert_eq!(read(&rtc, SECONDS), 0x59);
    pass(&passed, Duration::from_millis(2));
    assert_eq!(shown(&rtc), [0x20, 0x00, 0x01, 0x01, 0, 0, 0, 7]);
}

#[test]
fn one_field_alone_is_set_at_once() {
    let (passed, rtc) = rtc();
    write(&rtc, HOURS, 0x07);
    pass(&passed, Duration::from_secs(46));
    assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x29, 0x07, 0x15, 0x01, 5]);
}

#[test]
fn other_bytes_are_kept() {
    let (_, rtc) = rtc();
    for index in [0x0E, 0x0F, 0x33, 0x7F, 0x01] {
        write(&rtc, index, index ^ 0x55);
    }
    for index in [0x0E, 0x0F, 0x33, 0x7F, 0x01] {
        assert_eq!(read(&rtc, index), index ^ 0x55);
    }
    rtc.set_memory(3 << 30, 5 << 30);
    let word = |index| u16::from_le_bytes([read(&rtc, index), read(&rtc, index + 1)]);
    assert_eq!([0x15, 0x17, 0x34, 0x5B].map(word), [640, 0xFFFF, (3 << 14) - 256, 0xFFFF]);
}

#[test]
fn nonsense_is_some_date() {
    let (_, rtc) = rtc();
    for byte in [0xFF, 0x00, 0x9A] {
        for b in [HOURS_24, BINARY, BINARY | HOURS_24, 0] {
            write(&rtc, B, b | SET);
            for index in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
                write(&rtc, index, byte);
            }
            write(&rtc, B, b);
            shown(&rtc);
            read(&rtc, C);
        }
    }
}

#[test]
fn a_restored_clock_has_not_stood_still() {
    let (_, before) = rtc();
    write(&before, HOURS, 0x07);
    let text = serde_json::to_string(&before.save()).unwrap();
    let (passed, after) = rtc();
    after.restore(serde_json::from_str(&text).unwrap()).unwrap();
    pass(&passed, Duration::from_secs(3600));
    assert_eq!(shown(&after), [0x20, 0x24, 0x02, 0x29, 0x08, 0x14, 0x15, 5]);
    let damaged = RtcState { bytes: vec![0; 3], ..after.save() };
    assert!(after.restore(damaged).unwrap_err().to_string().contains("3 bytes of 128"));
}

#[test]
fn a_clock_may_be_set_to_any_year() {
    let (_, before) = rtc();
    write(&before, CENTURY, 0x99);
    let text = serde_json::to_string(&before.save()).unwrap();
    let (_, after) = rtc();
    after.restore(serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(shown(&after)[..4], [0x99, 0x24, 0x02, 0x29]);
}

#[test]
fn the_date_is_the_hosts() {
    let rtc = Rtc::new();
    let host = || {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let date = Date::at(i64::try_from(seconds).unwrap());
        [(date.year / 100) as u8, (date.year % 100) as u8, date.month, date.day, date.hour, date.minute]
    };
    write(&rtc, B, HOURS_24 | BINARY);
    // Again, if a minute ended meanwhile.
    loop {
        let before = host();
        let shown = shown(&rtc);
        if before == host() {
            return assert_eq!(shown[..6], before);
        }
    }
}
