//! What arrived of a numbered series: received, lost, repeated, overtaken.

/// How far back a late number is told from a repeated one.
const WINDOW: u64 = 1024;

/// Follows one series of numbers that its sender counts up by one.
#[derive(Clone, Debug)]
pub struct Tally {
    seen: Box<[u64]>,
    first: u64,
    highest: u64,
    unique: u64,
    duplicated: u64,
    reordered: u64,
}

impl Default for Tally {
    fn default() -> Tally {
        let seen = vec![0; (WINDOW / 64) as usize].into();
        Tally { seen, first: 0, highest: 0, unique: 0, duplicated: 0, reordered: 0 }
    }
}

impl Tally {
    /// The number `sequence` arrived.
    #[inline]
    pub fn record(&mut self, sequence: u64) {
        if sequence == self.highest.wrapping_add(1) && self.unique != 0 {
            self.highest = sequence;
            // The bit of the number that falls out of the window makes room for this one.
            self.set(sequence);
            self.unique += 1;
        } else {
            self.record_jump(sequence);
        }
    }

    #[cold]
    fn record_jump(&mut self, sequence: u64) {
        if self.unique == 0 {
            (self.first, self.highest, self.unique) = (sequence, sequence, 1);
            self.set(sequence);
        } else if sequence > self.highest {
            for skipped in (self.highest + 1).max(sequence.saturating_sub(WINDOW - 1))..sequence {
                self.clear(skipped);
            }
            self.highest = sequence;
            self.set(sequence);
            self.unique += 1;
        } else if self.highest - sequence >= WINDOW {
            // Too late to tell; a repetition after so long is the rarer explanation.
            self.late(sequence);
        } else if sequence >= self.first && self.seen[slot(sequence)] & bit(sequence) != 0 {
            self.duplicated += 1;
        } else {
            self.set(sequence);
            self.late(sequence);
        }
    }

    fn late(&mut self, sequence: u64) {
        self.reordered += 1;
        self.unique += 1;
        if sequence < self.first {
            for skipped in (sequence + 1).max(self.highest.saturating_sub(WINDOW - 1))..self.first {
                self.clear(skipped);
            }
            self.first = sequence;
        }
    }

    #[inline]
    fn set(&mut self, sequence: u64) {
        self.seen[slot(sequence)] |= bit(sequence);
    }

    fn clear(&mut self, sequence: u64) {
        self.seen[slot(sequence)] &= !bit(sequence);
    }

    /// Numbers that arrived, each counted once.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Numbers that arrived again.
    pub fn duplicated(&self) -> u64 {
        self.duplicated
    }

    /// Numbers that arrived after a higher one.
    pub fn reordered(&self) -> u64 {
        self.reordered
    }

    /// Numbers between the lowest and the highest seen that did not arrive.
    pub fn lost(&self) -> u64 {
        if self.unique == 0 { 0 } else { (self.highest - self.first + 1).saturating_sub(self.unique) }
    }
}

#[inline]
fn slot(sequence: u64) -> usize {
    ((sequence % WINDOW) / 64) as usize
}

#[inline]
fn bit(sequence: u64) -> u64 {
    1 << (sequence % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn tally(numbers: impl IntoIterator<Item = u64>) -> (u64, u64, u64, u64) {
        let mut tally = Tally::default();
        numbers.into_iter().for_each(|n| tally.record(n));
        (tally.unique(), tally.lost(), tally.duplicated(), tally.reordered())
    }

    #[test]
    fn each_kind() {
        assert_eq!(tally([]), (0, 0, 0, 0));
        assert_eq!(tally(0..100_000), (100_000, 0, 0, 0));
        assert_eq!(tally(1_000_000..1_000_010), (10, 0, 0, 0));
        assert_eq!(tally([0, 1, 5, 6]), (4, 3, 0, 0));
        assert_eq!(tally([0, 1, 1, 2, 0]), (3, 0, 2, 0));
        assert_eq!(tally([0, 2, 1, 3]), (4, 0, 0, 1));
        assert_eq!(tally([5, 4, 6]), (3, 0, 0, 1));
        assert_eq!(tally([0, 1_000_000]), (2, 999_999, 0, 0));
    }

    #[test]
    fn a_lap_of_the_window_is_no_repetition() {
        let lap = WINDOW;
        assert_eq!(tally([0, lap, 1, lap + 1]), (4, lap - 2, 0, 1));
        assert_eq!(tally((0..10).chain(lap..lap + 10)), (20, lap - 10, 0, 0));
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(numbers in prop::collection::vec(0..WINDOW, 0..500)) {
            let unique: HashSet<u64> = numbers.iter().copied().collect();
            let (found, lost, duplicated, _) = tally(numbers.iter().copied());
            prop_assert_eq!(found, unique.len() as u64);
            prop_assert_eq!(duplicated, (numbers.len() - unique.len()) as u64);
            let span = unique.iter().max().map_or(0, |max| max - unique.iter().min().unwrap_or(max) + 1);
            prop_assert_eq!(lost, span - found);
        }
    }
}
