//! When the card's pin is high: causes, their mask, and the time that has to pass between two interrupts (13.4.17-13.4.21).

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::register::cause;

/// The unit of the throttling register (13.4.18).
const THROTTLE_UNIT: Duration = Duration::from_nanos(256);

/// What the pin should do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// Be low.
    Low,
    /// Be high.
    High,
    /// Stay low until then.
    Later(Instant),
}

/// Causes and mask.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupts {
    causes: u32,
    mask: u32,
    throttle: u32,
    #[serde(skip)]
    high: bool,
    #[serde(skip)]
    last: Option<Instant>,
}

impl Interrupts {
    /// Something has happened.
    pub fn raise(&mut self, causes: u32) {
        self.causes |= causes & cause::ALL;
    }

    /// Reads ICR, which clears it.
    pub fn take_causes(&mut self) -> u32 {
        std::mem::take(&mut self.causes)
    }

    /// Writes ICR: what is one is cleared.
    pub fn clear_causes(&mut self, bits: u32) {
        self.causes &= !bits;
    }

    /// Reads IMS.
    pub fn mask(&self) -> u32 {
        self.mask
    }

    /// Writes IMS and IMC.
    pub fn change_mask(&mut self, set: u32, clear: u32) {
        self.mask = (self.mask | set & cause::ALL) & !clear;
    }

    /// Reads ITR.
    pub fn throttle(&self) -> u32 {
        self.throttle
    }

    /// Writes ITR.
    pub fn set_throttle(&mut self, value: u32) {
        self.throttle = value & 0xFFFF;
    }

    /// What the pin should do.
    pub fn pin(&mut self, now: Instant) -> Pin {
        if self.causes & self.mask == 0 {
            self.high = false;
            return Pin::Low;
        }
        if self.high {
            return Pin::High;
        }
        let due = self.last.map(|last| last + THROTTLE_UNIT * self.throttle);
        match due {
            Some(due) if due > now => Pin::Later(due),
            _ => {
                self.high = true;
                self.last = Some(now);
                Pin::High
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_is_enabled_is_shown_until_it_is_read() {
        let mut interrupts = Interrupts::default();
        let now = Instant::now();
        interrupts.raise(cause::RXT0);
        assert_eq!(interrupts.pin(now), Pin::Low);
        interrupts.change_mask(cause::RXT0 | cause::LSC, 0);
        assert_eq!(interrupts.pin(now), Pin::High);
        assert_eq!(interrupts.take_causes(), cause::RXT0);
        assert_eq!(interrupts.pin(now), Pin::Low);
        interrupts.raise(cause::LSC | cause::TXDW);
        interrupts.clear_causes(cause::LSC);
        assert_eq!(interrupts.pin(now), Pin::Low);
        assert_eq!(interrupts.take_causes(), cause::TXDW);
    }

    #[test]
    fn two_interrupts_are_so_far_apart() {
        let mut interrupts = Interrupts::default();
        let start = Instant::now();
        interrupts.set_throttle(1000);
        interrupts.change_mask(cause::RXT0, 0);
        interrupts.raise(cause::RXT0);
        assert_eq!(interrupts.pin(start), Pin::High, "the first is not kept waiting");
        interrupts.take_causes();
        interrupts.pin(start);
        interrupts.raise(cause::RXT0);
        let due = start + Duration::from_micros(256);
        assert_eq!(interrupts.pin(start + Duration::from_micros(255)), Pin::Later(due));
        assert_eq!(interrupts.pin(due), Pin::High);
        assert_eq!(interrupts.pin(due), Pin::High, "and stays");
    }
}
