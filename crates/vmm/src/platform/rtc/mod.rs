//! The real-time clock of a PC: an MC146818 (Motorola, MC146818A datasheet) with 128 bytes, behind the ports 0x70 (which
//! byte) and 0x71 (the byte).
//!
//! # Theory of operation
//!
//! The guest's time is the host's and a difference, so nothing ticks: a read computes the date. While the guest sets the
//! clock (SET in register B, or the divider held in reset by register A) time stands still in the registers; when it ends
//! that, the difference is made anew from what they say. A clock that was let go from the reset of its divider makes its
//! first step half a second later, which Linux counts on.
//!
//! The update-in-progress bit is there for the last 244 microseconds of each second, and the flags of register C by
//! reckoning, for those who poll. Pin 8 is never driven: there are no alarms, so a table that describes this clock to a
//! guest gives it no interrupt.

mod calendar;
#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::BadState;
use crate::bus::{BusDevice, Range};
use calendar::Date;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0A;
const B: u8 = 0x0B;
const C: u8 = 0x0C;
const D: u8 = 0x0D;
/// By custom of PCs, and of our FADT.
const CENTURY: u8 = 0x32;
const BYTES: usize = 128;

/// Register A: an update is coming; the divider (bits 4 to 6), of which 2 runs by a 32.768 kHz crystal and 6 and 7 stand
/// still; and the rate of the periodic flag.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
const DIVIDER_RESET: u8 = 6 << 4;
const RATE: u8 = 0x0F;
const A_DEFAULT: u8 = 0x26;
/// Register B: stand still; binary and not BCD; 24 hours and not 12; and the interrupts that are enabled.
const SET: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Register C: the periodic flag, and that an update has ended.
const PERIODIC: u8 = 1 << 6;
const UPDATE_ENDED: u8 = 1 << 4;
const ANY_INTERRUPT: u8 = 1 << 7;
/// Register D: the battery is good.
const VALID: u8 = 1 << 7;
/// Afternoon, in a clock of 12 hours.
const PM: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
/// From the update-in-progress bit to the update (MC146818A, table 6: t_BUC).
const BEFORE_UPDATE: i128 = 244_000;

/// What a snapshot keeps of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    index: u8,
    /// Everything that is not computed. While time stands still, the time as well.
    bytes: Vec<u8>,
    /// Nanoseconds by which the guest's clock is before the host's.
    #[serde(with = "in_seconds")]
    ahead: i128,
    /// When register C was read last, by the guest's clock: nanoseconds.
    #[serde(with = "in_seconds")]
    flags_read: i128,
}

/// Nanoseconds as seconds and the rest: no format has integers of any length, and a guest may set its clock to any year.
mod in_seconds {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::SECOND;

    pub fn serialize<S: Serializer>(time: &i128, serializer: S) -> Result<S::Ok, S::Error> {
        let seconds = i64::try_from(time.div_euclid(SECOND)).unwrap_or(i64::MAX);
        let rest = u32::try_from(time.rem_euclid(SECOND)).unwrap_or(0);
        (seconds, rest).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i128, D::Error> {
        let (seconds, rest) = <(i64, u32)>::deserialize(deserializer)?;
        Ok(i128::from(seconds) * SECOND + i128::from(rest))
    }
}

/// The clock.
pub struct Rtc {
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
    state: Mutex<RtcState>,
}

impl Default for Rtc {
    fn default() -> Rtc {
        Rtc::new()
    }
}

impl Rtc {
    /// A clock that shows the host's time, in UTC.
    pub fn new() -> Rtc {
        // A host before 1970 is one whose clock was never set.
        Rtc::with_clock(Box::new(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()))
    }

    fn with_clock(clock: Box<dyn Fn() -> Duration + Send + Sync>) -> Rtc {
        let mut bytes = vec![0; BYTES];
        bytes[usize::from(A)] = A_DEFAULT;
        bytes[usize::from(B)] = HOURS_24;
        let state = RtcState { index: 0, bytes, ahead: 0, flags_read: nanoseconds(clock()) };
        Rtc { clock, state: Mutex::new(state) }
    }

    /// Says how much memory there is, in bytes, where the firmware of a PC leaves it for its operating systems: below 4 GiB,
    /// and above.
    pub fn set_memory(&self, below: u64, above: u64) {
        let words = [
            (0x15, 640),
            (0x17, (below >> 10).saturating_sub(1 << 10)),
            (0x30, (below >> 10).saturating_sub(1 << 10)),
            (0x34, (below >> 16).saturating_sub(1 << 8)),
            (0x5B, above >> 16),
        ];
        let mut state = self.state.lock();
        for (at, size) in words {
            let size = u16::try_from(size).unwrap_or(u16::MAX);
            state.bytes[at..at + 2].copy_from_slice(&size.to_le_bytes());
        }
    }

    /// What it has to remember.
    pub fn save(&self) -> RtcState {
        self.state.lock().clone()
    }

    /// Goes on from what another one remembered. The guest's clock goes on by the host's: it has not stood still meanwhile.
    ///
    /// # Errors
    /// [`BadState`].
    pub fn restore(&self, state: RtcState) -> Result<(), BadState> {
        if state.bytes.len() != BYTES {
            return Err(BadState { device: "rtc", what: format!("{} bytes of {BYTES}", state.bytes.len()) });
        }
        *self.state.lock() = state;
        Ok(())
    }
}

impl BusDevice for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    /// Which byte: nobody can tell before the next access to that.
    fn posted(&self) -> &[Range] {
        &[Range { base: 0, last: 0 }]
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if offset == 1 {
            data[0] = self.state.lock().read(nanoseconds((self.clock)()));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        match offset {
            // Bit 7 masks the non-maskable interrupt, of which there is none.
            0 => state.index = data[0] & 0x7F,
            1 => state.write(data[0], nanoseconds((self.clock)())),
            _ => {}
        }
    }
}

fn nanoseconds(time: Duration) -> i128 {
    // At most 2^94.
    time.as_nanos() as i128
}

impl RtcState {
    fn byte(&self, index: u8) -> u8 {
        self.bytes[usize::from(index) % BYTES]
    }

    fn frozen(&self) -> bool {
        self.byte(B) & SET != 0 || self.byte(A) & DIVIDER_RESET == DIVIDER_RESET
    }

    fn read(&mut self, host: i128) -> u8 {
        let now = host.saturating_add(self.ahead);
        match self.index {
            A => {
                let soon = !self.frozen() && now.rem_euclid(SECOND) >= SECOND - BEFORE_UPDATE;
                self.byte(A) | if soon { UPDATE_IN_PROGRESS } else { 0 }
            }
            C => self.take_flags(now),
            D => VALID,
            _ => {
                self.show(now);
                self.byte(self.index)
            }
        }
    }

    fn write(&mut self, byte: u8, host: i128) {
        let now = host.saturating_add(self.ahead);
        let index = self.index;
        // The registers hold what time it is, and then what the guest makes of it.
        self.show(now);
        let stood = self.frozen();
        let was_reset = self.byte(A) & DIVIDER_RESET == DIVIDER_RESET;
        match index {
            A => self.bytes[usize::from(A)] = byte & !UPDATE_IN_PROGRESS,
            C | D => {}
            _ => self.bytes[usize::from(index) % BYTES] = byte,
        }
        let is_time = matches!(index, SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY);
        if !self.frozen() && (stood || is_time) {
            let within = if was_reset { SECOND / 2 } else { host.rem_euclid(SECOND) };
            self.ahead = i128::from(self.shown().seconds()) * SECOND + within - host;
            self.flags_read = host.saturating_add(self.ahead);
        }
    }

    /// Flags since the last time, by reckoning; reading clears them.
    fn take_flags(&mut self, now: i128) -> u8 {
        let before = std::mem::replace(&mut self.flags_read, now);
        if self.frozen() {
            return 0;
        }
        let mut flags = 0;
        if now.div_euclid(SECOND) != before.div_euclid(SECOND) {
            flags |= UPDATE_ENDED;
        }
        // Rates 1 and 2 are those of 8 and 9 (MC146818A, table 5).
        let period = match self.byte(A) & RATE {
            0 => None,
            rate @ 1..=2 => Some(SECOND << (rate + 6) >> 15),
            rate => Some(SECOND << (rate - 1) >> 15),
        };
        if period.is_some_and(|period| now.div_euclid(period) != before.div_euclid(period)) {
            flags |= PERIODIC;
        }
        let any = if flags & self.byte(B) != 0 { ANY_INTERRUPT } else { 0 };
        flags | any
    }

    /// Puts the time into the registers, unless it stands still there.
    fn show(&mut self, now: i128) {
        if self.frozen() {
            return;
        }
        let date = Date::at(i64::try_from(now.div_euclid(SECOND)).unwrap_or(0));
        let hour = if self.byte(B) & HOURS_24 != 0 {
            self.encode(date.hour)
        } else {
            let afternoon = if date.hour >= 12 { PM } else { 0 };
            self.encode((date.hour + 11) % 12 + 1) | afternoon
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let (century, year) = (date.year.div_euclid(100).clamp(0, 99) as u8, date.year.rem_euclid(100) as u8);
        for (index, value) in [
            (SECONDS, self.encode(date.second)),
            (MINUTES, self.encode(date.minute)),
            (HOURS, hour),
            (WEEKDAY, date.weekday()),
            (DAY, self.encode(date.day)),
            (MONTH, self.encode(date.month)),
            (YEAR, self.encode(year)),
            (CENTURY, self.encode(century)),
        ] {
            self.bytes[usize::from(index)] = value;
        }
    }

    /// The date that the registers say, whatever was written there.
    fn shown(&self) -> Date {
        let get = |index| self.decode(self.byte(index));
        let hour = self.byte(HOURS);
        let hour = if self.byte(B) & HOURS_24 != 0 {
            self.decode(hour)
        } else {
            self.decode(hour & !PM) % 12 + if hour & PM != 0 { 12 } else { 0 }
        };
        let year = i64::from(get(CENTURY)) * 100 + i64::from(get(YEAR));
        Date { year, month: get(MONTH), day: get(DAY), hour, minute: get(MINUTES), second: get(SECONDS) }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.byte(B) & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> u8 {
        if self.byte(B) & BINARY != 0 { byte } else { (byte >> 4) * 10 + (byte & 0x0F) }
    }
}
