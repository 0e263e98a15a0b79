//! How long a frame may wait for a receiver without buffers: back-pressure that nobody can turn against others.
//!
//! # Theory of operation
//!
//! A frame without room stays in its sender's ring, so that a receiver that is only a little slower loses nothing. That
//! holds up what stands behind it, hence two bounds.
//!
//! **What a receiver may cost** ([`Patience`]): [`MOST`] in one go, and what it has spent of that comes back only by
//! taking frames, [`A_FRAME`] for each. So with `n` frames delivered to it, frames have waited for it no longer than
//! `MOST + n * A_FRAME` in all: one that frees a buffer now and then is worth no more waiting than one that is gone.
//!
//! **What a sender may be held up** ([`Company`]): one that has had frames for another receiver within [`ALONE`] waits at
//! most `MOST` and one part in [`SHARE`] of the time, for all receivers together. Only one that sends to nobody else waits
//! for a receiver as long as that keeps taking frames; there is nobody whom it could hold up.
//!
//! Floods never wait.

use std::time::Duration;

use crate::clock;

/// The longest wait for a receiver that takes nothing.
const MOST: Duration = Duration::from_micros(50);
/// What a receiver earns by taking a frame.
const A_FRAME: Duration = Duration::from_micros(10);
/// Who has sent to one receiver alone for so long is taken to go on like that.
const ALONE: Duration = Duration::from_secs(1);
/// The others wait for one part in so many of their time.
const SHARE: u64 = 16;

/// The durations in ticks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub most: u64,
    pub a_frame: u64,
    pub alone: u64,
}

impl Bounds {
    pub fn new() -> Bounds {
        Bounds { most: clock::in_ticks(MOST), a_frame: clock::in_ticks(A_FRAME), alone: clock::in_ticks(ALONE) }
    }
}

/// Of a receiver's queue.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// How much of it is used up, in ticks.
    spent: u64,
    /// When it was last looked at while frames waited; 0: none do.
    since: u64,
}

impl Patience {
    /// Whether there is nothing to settle.
    #[inline(always)]
    pub fn is_whole(&self) -> bool {
        self.spent | self.since == 0
    }

    /// The receiver took `taken` frames, and all that there were.
    #[cold]
    pub fn settle(&mut self, taken: u32, now: u64, bounds: &Bounds) {
        self.pass(taken, now, bounds);
        self.since = 0;
    }

    /// The receiver took `taken` frames and left some. Returns whether these may wait.
    pub fn wait(&mut self, taken: u32, now: u64, bounds: &Bounds) -> bool {
        self.pass(taken, now, bounds);
        self.since = now.max(1);
        self.spent < bounds.most
    }

    /// The frames that were left do not wait.
    pub fn give_up(&mut self) {
        self.since = 0;
    }

    fn pass(&mut self, taken: u32, now: u64, bounds: &Bounds) {
        if self.since != 0 {
            self.spent = self.spent.saturating_add(now.saturating_sub(self.since)).min(bounds.most);
        }
        self.spent = self.spent.saturating_sub(bounds.a_frame.saturating_mul(taken.into()));
    }
}

/// Of a sender's queue: for whom its frames are.
#[derive(Debug, Default)]
pub(crate) struct Company {
    /// The last frame for a single receiver was for this port, numbered from 1.
    receiver: u32,
    /// When it was another one than before, in ticks; 0: never.
    changed: u64,
    /// Time that frames have waited, less a part in [`SHARE`] of the time since.
    waited: u64,
    /// Until when that is known.
    known: u64,
    /// Frames were left waiting by the last visit.
    waiting: bool,
}

impl Company {
    /// A frame for one receiver.
    pub fn meet(&mut self, receiver: u16, now: impl FnOnce() -> u64) {
        let receiver = u32::from(receiver) + 1;
        if self.receiver != receiver {
            if self.receiver != 0 {
                self.changed = now().max(1);
            }
            self.receiver = receiver;
        }
    }

    /// Whether a visit left frames waiting.
    #[inline(always)]
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// The wait is over, or a new visit decides anew.
    #[cold]
    pub fn end_wait(&mut self, now: u64) {
        self.pass(now);
        self.waiting = false;
    }

    /// Whether a frame may wait at all.
    pub fn may_wait(&mut self, now: u64, bounds: &Bounds) -> bool {
        if self.changed == 0 || now.saturating_sub(self.changed) > bounds.alone {
            return true;
        }
        self.pass(now);
        self.waiting |= self.waited < bounds.most;
        self.waited < bounds.most
    }

    fn pass(&mut self, now: u64) {
        let elapsed = now.saturating_sub(std::mem::replace(&mut self.known, now));
        if self.waiting {
            self.waited = self.waited.saturating_add(elapsed);
        }
        self.waited = self.waited.saturating_sub(elapsed / SHARE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { most: 50_000, a_frame: 10_000, alone: 1_000_000_000 };

    #[test]
    fn a_receiver_that_takes_nothing_is_waited_for_once() {
        let mut patience = Patience::default();
        assert!(patience.wait(0, 1000, &BOUNDS));
        assert!(patience.wait(0, 50_999, &BOUNDS));
        assert!(!patience.wait(0, 51_000, &BOUNDS));
        assert!(!patience.wait(0, 1 << 40, &BOUNDS), "and never again");
    }

    #[test]
    fn a_receiver_that_only_sleeps_for_a_moment_keeps_its_patience() {
        let mut patience = Patience::default();
        for round in 0..1000 {
            let began = 1 + round * 100_000;
            assert!(patience.wait(0, began, &BOUNDS));
            assert!(patience.wait(0, began + 40_000, &BOUNDS));
            patience.settle(64, began + 45_000, &BOUNDS);
            assert!(patience.is_whole());
        }
    }

    #[test]
    fn a_buffer_now_and_then_earns_little() {
        let mut patience = Patience::default();
        // A buffer each 49 microseconds: today's look, one frame taken, the others left.
        let waited = (0..1000u64).filter(|n| patience.wait(1, 1 + n * 49_000, &BOUNDS)).count();
        assert!(waited > 1 && waited <= 1000, "{waited}");
        let mut patience = Patience::default();
        let mut total = 0;
        let mut before = None;
        for n in 0..100_000u64 {
            // Looked at each microsecond; a buffer comes each 49.
            let now = 1 + n * 1000;
            let may = patience.wait(u32::from(n % 49 == 48), now, &BOUNDS);
            if let Some(before) = before {
                total += now - before;
            }
            before = may.then_some(now);
        }
        let delivered = 100_000 / 49;
        assert!(total <= 50_000 + 1000 + delivered * 11_000, "waited {total} for {delivered} frames");
    }

    #[test]
    fn who_sends_to_one_waits_as_long_as_it_is_worth_it() {
        let mut company = Company::default();
        company.meet(7, || unreachable!("the first is no change"));
        company.meet(7, || unreachable!("nor the same again"));
        assert!((1..1000).all(|n| company.may_wait(n * 1_000_000, &BOUNDS)));
    }

    #[test]
    fn who_sends_to_several_is_held_up_for_a_small_part_of_the_time() {
        let mut company = Company::default();
        let (mut held, mut before) = (0, None);
        for n in 1..1_000_000u64 {
            let now = n * 1000;
            company.meet((n % 2) as u16, || now);
            if company.is_waiting() {
                company.end_wait(now);
            }
            if let Some(before) = before {
                held += now - before;
            }
            before = company.may_wait(now, &BOUNDS).then_some(now);
        }
        assert!(held > 0, "bursts may be waited for");
        assert!(held <= 1_000_000_000 / 16 + 50_000 + 2000, "held up for {held} of 1000000000");
    }

    #[test]
    fn after_a_second_with_one_receiver_one_is_alone_with_it() {
        let mut company = Company::default();
        company.meet(1, || 5);
        company.meet(2, || 5);
        while company.may_wait(10, &BOUNDS) && company.waited < BOUNDS.most {
            company.waited += 10_000;
        }
        assert!(!company.may_wait(20, &BOUNDS));
        assert!(company.may_wait(5 + BOUNDS.alone + 1, &BOUNDS));
    }

    proptest! {
        /// Whatever a receiver does: the waits granted are bounded by what it took.
        #[test]
        fn waits_are_bounded(steps in prop::collection::vec((1u64..20_000, 0u32..4, any::<bool>()), 1..500)) {
            let mut patience = Patience::default();
            let (mut now, mut total, mut taken, mut waiting) = (1, 0u64, 0u64, false);
            for (step, frames, all) in steps {
                now += step;
                total += if waiting { step } else { 0 };
                taken += u64::from(frames);
                if all {
                    patience.settle(frames, now, &BOUNDS);
                    waiting = false;
                } else {
                    waiting = patience.wait(frames, now, &BOUNDS);
                }
            }
            // A wait is seen to be over only when one looks, at most a step later.
            prop_assert!(total <= BOUNDS.most + taken * (BOUNDS.a_frame + 20_000) + 20_000, "{total} for {taken}");
        }
    }
}
