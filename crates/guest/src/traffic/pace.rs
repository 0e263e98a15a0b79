//! How many frames are due.

/// Gives out frames at a steady rate, in bursts.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Frames a second; `None`: without limit.
    rate: Option<f64>,
    burst: u64,
    /// When frame number `base` was due.
    since: u64,
    base: u64,
}

/// A sender that could not keep up for so many nanoseconds does not make up for more than that.
const FORGIVEN: u64 = 10_000_000;

impl Pace {
    /// Starts at `now`, with frame number 0.
    pub fn new(rate: Option<f64>, burst: u64, now: u64) -> Pace {
        Pace { rate, burst: burst.max(1), since: now, base: 0 }
    }

    /// How many frames may leave at `now`, after `sent` have.
    #[inline]
    pub fn due(&mut self, sent: u64, now: u64) -> u64 {
        let Some(rate) = self.rate else { return u64::MAX };
        let next = self.time_of(sent, rate);
        if now > next.saturating_add(FORGIVEN) {
            (self.since, self.base) = (now - FORGIVEN, sent);
        }
        let elapsed = now.saturating_sub(self.since);
        // One burst is due at once.
        let bursts = (elapsed as f64 * rate / 1e9) as u64 / self.burst + 1;
        (self.base + bursts * self.burst).saturating_sub(sent)
    }

    /// When the next frame after `sent` is due.
    pub fn next(&self, sent: u64) -> u64 {
        self.rate.map_or(0, |rate| self.time_of(sent, rate))
    }

    fn time_of(&self, sent: u64, rate: f64) -> u64 {
        let bursts = sent.saturating_sub(self.base) / self.burst;
        self.since + ((bursts * self.burst) as f64 * 1e9 / rate) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate() {
        let mut pace = Pace::new(Some(1000.0), 1, 5_000_000);
        assert_eq!(pace.due(0, 5_000_000), 1);
        assert_eq!(pace.due(1, 5_000_000), 0);
        assert_eq!(pace.next(1), 6_000_000);
        assert_eq!(pace.due(1, 6_000_000), 1);
        assert_eq!(pace.due(1, 8_500_000), 3);
    }

    #[test]
    fn bursts_come_whole() {
        let mut pace = Pace::new(Some(1000.0), 4, 0);
        assert_eq!(pace.due(0, 0), 4);
        assert_eq!(pace.due(3, 0), 1);
        assert_eq!(pace.due(4, 3_900_000), 0);
        assert_eq!(pace.next(4), 4_000_000);
        assert_eq!(pace.due(4, 4_000_000), 4);
    }

    #[test]
    fn what_was_missed_long_ago_is_forgiven() {
        let mut pace = Pace::new(Some(1000.0), 1, 0);
        assert_eq!(pace.due(1, 1_000_000_000), 11);
        assert!(Pace::new(None, 1, 0).due(1 << 40, 1) > 1 << 40);
    }
}
