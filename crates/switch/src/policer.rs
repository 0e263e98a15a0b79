//! Rates: how much may pass in a time.
//!
//! # Theory of operation
//!
//! A [`TokenBucket`] fills at a rate, up to a depth, and what passes takes tokens out. Its level is counted in tokens
//! times ticks per second: then a tick adds exactly `rate` of these units and a token is exactly `ticks_per_second` of
//! them, so nothing is ever rounded and a bucket that is looked at a million times a second is as exact as one that is
//! looked at twice.
//!
//! Something passes while the level is above zero and may take more than there is; the debt is paid before the next.
//! So a frame that is larger than the bucket still passes, and the long-term rate holds for any sizes.
//!
//! A [`Limit`] is a pair of buckets, bytes and frames. A *shaper* leaves what is too much where it is: frames that a
//! guest sends too fast stay in its own ring, and none is lost. A *policer* drops it: what is sent to a guest too fast
//! has nowhere to wait but in rings of others.

use parking_lot::Mutex;
use viaduct_ring::Chain;

use crate::clock;
use crate::counters::Counter;

/// So much a second, and in one go. Nothing: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bits of frames a second, without virtio-net headers; 0: no limit.
    pub bits: u64,
    /// Frames a second; 0: no limit.
    pub frames: u64,
    /// How much may come at once after a pause: what the rate allows in so many microseconds.
    pub burst: u64,
}

/// What a bucket is refilled with and how deep it is.
#[derive(Clone, Debug)]
pub(crate) struct TokenBucket {
    /// Tokens a second.
    rate: u64,
    ticks_per_second: u64,
    /// In tokens times `ticks_per_second`, as is the level.
    depth: i128,
    level: i128,
    /// When it was last filled, in ticks.
    filled: u64,
}

impl TokenBucket {
    /// A full bucket. `depth` in tokens.
    pub fn new(rate: u64, depth: u64, ticks_per_second: u64, now: u64) -> TokenBucket {
        let depth = i128::from(depth.max(1)) * i128::from(ticks_per_second);
        TokenBucket { rate: rate.max(1), ticks_per_second, depth, level: depth, filled: now }
    }

    /// Adds what has come in since. Another processor's clock may be a little behind: nothing comes in twice.
    pub fn fill(&mut self, now: u64) {
        let Some(elapsed) = now.checked_sub(self.filled) else { return };
        self.filled = now;
        self.level = self.depth.min(self.level + i128::from(elapsed) * i128::from(self.rate));
    }

    /// Whether something may pass.
    pub fn is_open(&self) -> bool {
        self.level > 0
    }

    /// Takes tokens out, more than there are if need be.
    pub fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * i128::from(self.ticks_per_second);
    }

    /// Puts tokens back that were taken since it was last filled.
    pub fn give_back(&mut self, tokens: u64) {
        self.level += i128::from(tokens) * i128::from(self.ticks_per_second);
    }

    /// Ticks until the bucket, once closed, is worth another look: until it is a quarter full, so that not every frame
    /// takes a look of its own, but not longer than `most` after it opens.
    pub fn opens_in(&self, most: u64) -> u64 {
        let rate = i128::from(self.rate);
        let quarter = (self.depth / 4).min(i128::from(most) * rate);
        ((quarter - self.level).max(0) / rate + 1) as u64
    }
}

/// Bytes and frames.
#[derive(Debug)]
pub(crate) struct Limit {
    bytes: Option<TokenBucket>,
    frames: Option<TokenBucket>,
    /// See [`TokenBucket::opens_in`].
    most: u64,
}

/// The longest that what could pass again may have to wait for being looked at.
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(2);

impl Limit {
    /// None, if the rate is none.
    pub fn new(rate: Rate) -> Option<Limit> {
        let (now, second) = (clock::ticks(), clock::ticks_per_second());
        let bucket = |a_second: u64| {
            let depth = u128::from(a_second) * u128::from(rate.burst) / 1_000_000;
            (a_second != 0).then(|| TokenBucket::new(a_second, u64::try_from(depth).unwrap_or(u64::MAX), second, now))
        };
        let (bytes, frames) = (bucket(rate.bits / 8), bucket(rate.frames));
        (bytes.is_some() || frames.is_some()).then(|| Limit { bytes, frames, most: clock::in_ticks(LOOK_AGAIN) })
    }

    pub fn fill(&mut self, now: u64) {
        self.buckets().for_each(|bucket| bucket.fill(now));
    }

    pub fn is_open(&self) -> bool {
        [&self.bytes, &self.frames].into_iter().flatten().all(TokenBucket::is_open)
    }

    /// Takes a frame of `len` bytes out.
    pub fn take(&mut self, len: u32) {
        if let Some(bytes) = &mut self.bytes {
            bytes.take(len.into());
        }
        if let Some(frames) = &mut self.frames {
            frames.take(1);
        }
    }

    /// A frame of `len` bytes did not pass after all.
    pub fn give_back(&mut self, len: u32) {
        if let Some(bytes) = &mut self.bytes {
            bytes.give_back(len.into());
        }
        if let Some(frames) = &mut self.frames {
            frames.give_back(1);
        }
    }

    fn opens_in(&self) -> u64 {
        [&self.bytes, &self.frames].into_iter().flatten().map(|bucket| bucket.opens_in(self.most)).max().unwrap_or(0)
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut TokenBucket> {
        [&mut self.bytes, &mut self.frames].into_iter().flatten()
    }
}

/// Holds back what a port sends too fast. All queues of the port share it.
#[derive(Debug)]
pub(crate) struct Shaper {
    limit: Mutex<Limit>,
    /// Times that a queue had to wait. Written with `limit` held.
    pub waits: Counter,
}

/// What a shaper says to a batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Grant {
    /// So many of its frames, from the oldest on, may go on.
    Frames(usize),
    /// None, before that many ticks have passed.
    In(u64),
}

impl Shaper {
    /// None, if the rate is none.
    pub fn new(rate: Rate) -> Option<Box<Shaper>> {
        Limit::new(rate).map(|limit| Box::new(Shaper { limit: Mutex::new(limit), waits: Counter::default() }))
    }

    /// Decides how many of `chains` may go on. The first `charged` of them, which is counted up, have been paid for.
    #[cold]
    pub fn grant(&self, chains: &[Chain], header_len: u32, charged: &mut usize, now: u64) -> Grant {
        let mut limit = self.limit.lock();
        limit.fill(now);
        while let Some(chain) = chains.get(*charged)
            && limit.is_open()
        {
            limit.take(chain.readable_len.saturating_sub(header_len));
            *charged += 1;
        }
        match (*charged).min(chains.len()) {
            0 => {
                self.waits.add(1);
                Grant::In(limit.opens_in())
            }
            granted => Grant::Frames(granted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 2_500_000_123;

    /// Takes `len` whenever the bucket is open; it is looked at every `step` ticks. Returns the tokens taken.
    fn drain(bucket: &mut TokenBucket, from: u64, until: u64, step: u64, len: u64) -> u64 {
        let (mut now, mut taken) = (from, 0);
        while now <= until {
            bucket.fill(now);
            while bucket.is_open() {
                bucket.take(len);
                taken += len;
            }
            now += step;
        }
        taken
    }

    #[test]
    fn a_rate_is_kept_to_the_last_token() {
        let mut bucket = TokenBucket::new(1_000_003, 1, SECOND, 0);
        // Looked at at odd times for ten seconds, each look worth a fraction of a token.
        let taken = drain(&mut bucket, 0, 10 * SECOND, 1013, 1);
        assert!((10_000_030..=10_000_031).contains(&taken), "{taken}");
    }

    #[test]
    fn a_pause_is_worth_a_burst_and_no_more() {
        let mut bucket = TokenBucket::new(1000, 50, SECOND, 0);
        assert_eq!(drain(&mut bucket, 0, 0, 1, 1), 50);
        assert_eq!(drain(&mut bucket, 100 * SECOND, 100 * SECOND, 1, 1), 50);
    }

    #[test]
    fn a_clock_that_is_behind_gives_nothing_twice() {
        let mut bucket = TokenBucket::new(1000, 10, SECOND, SECOND);
        bucket.take(10);
        for now in [SECOND + SECOND / 1000, SECOND, SECOND + SECOND / 1000] {
            bucket.fill(now);
        }
        bucket.take(1);
        assert!(!bucket.is_open(), "a thousandth of a second is one token");
    }

    #[test]
    fn no_rate_is_no_limit() {
        assert!(Limit::new(Rate::default()).is_none());
        assert!(Shaper::new(Rate { burst: 10_000, ..Rate::default() }).is_none());
    }

    #[test]
    fn a_frame_is_paid_for_once() {
        let shaper = Shaper::new(Rate { bits: 8, frames: 0, burst: 1_000_000 }).expect("a rate");
        let chains = vec![Chain { readable_len: 112, ..Chain::default() }; 3];
        let (mut charged, now) = (0, clock::ticks());
        assert_eq!(shaper.grant(&chains, 12, &mut charged, now), Grant::Frames(1), "more than there was in the bucket");
        assert_eq!(shaper.grant(&chains, 12, &mut charged, now), Grant::Frames(1), "the same one again");
        charged = 0;
        assert!(matches!(shaper.grant(&chains, 12, &mut charged, now), Grant::In(ticks) if ticks > 0));
        assert_eq!(shaper.waits.get(), 1);
    }

    proptest! {
        /// Whatever is taken when: never more than rate times time, the depth, and one frame besides.
        #[test]
        fn no_pattern_gets_more(rate in 1u64..1 << 34, depth in 1u64..1 << 24,
                                steps in prop::collection::vec((0u64..1 << 32, 1u64..65_536), 1..200)) {
            let mut bucket = TokenBucket::new(rate, depth, SECOND, 0);
            let (mut now, mut taken) = (0u64, 0u128);
            for (step, len) in steps {
                now += step;
                bucket.fill(now);
                if bucket.is_open() {
                    bucket.take(len);
                    taken += u128::from(len);
                }
                let allowed = u128::from(rate) * u128::from(now) / u128::from(SECOND) + u128::from(depth) + 65_536;
                prop_assert!(taken <= allowed, "{taken} of {allowed}");
            }
        }

        /// A closed bucket is open when it said so.
        #[test]
        fn it_opens_when_it_says(rate in 1u64..1 << 34, depth in 1u64..1 << 24, debt in 0u64..1 << 20, most in 0u64..SECOND) {
            let mut bucket = TokenBucket::new(rate, depth, SECOND, 0);
            bucket.take(depth + debt);
            let wait = bucket.opens_in(most);
            bucket.fill(wait);
            prop_assert!(bucket.is_open());
        }
    }
}
