//! A histogram of durations with a relative error below 1.6 %: log-linear, 64 steps for each power of two.

/// Steps for each power of two, as a power of two.
const STEP_BITS: u32 = 6;
const STEPS: usize = 1 << STEP_BITS;
/// Values from 2^40 ns (18 minutes) on share the last bucket.
const LARGEST_BITS: u32 = 40;
const BUCKETS: usize = (LARGEST_BITS - STEP_BITS + 1) as usize * STEPS;

/// Counts of durations in nanoseconds.
#[derive(Clone)]
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: vec![0; BUCKETS].into(), count: 0, sum: 0, min: u64::MAX, max: 0 }
    }
}

#[inline]
fn bucket(value: u64) -> usize {
    // The top STEP_BITS + 1 bits of the value, of which the first is always one, and how far they were moved.
    let shift = (u64::BITS - (value | (STEPS as u64 - 1)).leading_zeros()).saturating_sub(STEP_BITS + 1);
    let index = (shift as usize) * STEPS + (value >> shift) as usize;
    index.min(BUCKETS - 1)
}

/// The middle of a bucket.
fn value(bucket: usize) -> u64 {
    if bucket < 2 * STEPS {
        return bucket as u64;
    }
    let shift = bucket / STEPS - 1;
    let low = ((bucket % STEPS + STEPS) as u64) << shift;
    low + (1 << shift) / 2
}

impl Histogram {
    /// Counts `n` durations of `nanoseconds`.
    #[inline]
    pub fn record(&mut self, nanoseconds: u64, n: u64) {
        self.buckets[bucket(nanoseconds)] += n;
        self.count += n;
        self.sum = self.sum.wrapping_add(nanoseconds.wrapping_mul(n));
        self.min = self.min.min(nanoseconds);
        self.max = self.max.max(nanoseconds);
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum = self.sum.wrapping_add(other.sum);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Numbers that describe the distribution; `None` when it is empty.
    pub fn summary(&self) -> Option<Summary> {
        (self.count > 0).then(|| Summary {
            count: self.count,
            min: self.min,
            mean: self.sum / self.count,
            p50: self.quantile(0.5),
            p90: self.quantile(0.9),
            p99: self.quantile(0.99),
            p999: self.quantile(0.999),
            max: self.max,
        })
    }

    /// The value below which the share `q` of the durations lies.
    pub fn quantile(&self, q: f64) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let rank = ((self.count as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return value(index).clamp(self.min, self.max);
            }
        }
        self.max
    }
}

/// Nanoseconds that describe a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// How many.
    pub count: u64,
    /// Smallest, exact.
    pub min: u64,
    /// Mean, exact.
    pub mean: u64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Largest, exact.
    pub max: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_narrow() {
        let mut last = 0;
        for exponent in 0..LARGEST_BITS {
            for offset in [0u64, 1, 2, 3] {
                let nanoseconds = (1u64 << exponent) + offset * (1 << exponent) / 4;
                let index = bucket(nanoseconds);
                assert!(index >= last, "{nanoseconds}");
                last = index;
                let error = value(index).abs_diff(nanoseconds) as f64 / nanoseconds as f64;
                assert!(error < 0.016, "{nanoseconds} stands for {}", value(index));
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let (mut low, mut high) = (Histogram::default(), Histogram::default());
        (1..=500).for_each(|n| low.record(n * 1000, 1));
        (501..=1000).for_each(|n| high.record(n * 1000, 1));
        low.merge(&high);
        let s = low.summary().expect("not empty");
        assert_eq!((s.count, s.min, s.max, s.mean), (1000, 1000, 1_000_000, 500_500));
        for (found, exact) in [(s.p50, 500_000u64), (s.p90, 900_000), (s.p99, 990_000), (s.p999, 999_000)] {
            assert!(found.abs_diff(exact) * 60 < exact, "{found} for {exact}");
        }
        assert_eq!(Histogram::default().summary(), None);
    }
}
