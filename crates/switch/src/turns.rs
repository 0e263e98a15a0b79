//! Whose turn it is: no input of a poller starves another.
//!
//! # Theory of operation
//!
//! A poller visits its inputs one after the other and takes a batch from each. That is fair by visits but not by time: a
//! batch of 64 KB segments costs a hundred times as much as one of small frames. So each input has an account of what its
//! visits have cost, in bytes copied and what goes with them ([`COPY`], [`SPAN`]), and the one with the least, of those that
//! have more to send than one visit takes, is the *floor*. An input that is further above the floor than [`LEAD`] is passed
//! over until the others have caught up. The input at the floor is never passed over, so somebody always goes on.
//!
//! An input that has nothing more to send rises with the floor: it saves no turns for later, and owes none. One visit
//! costs at most [`VISIT`] and a frame, so a frame of a port that obeys its fair share waits for at most one visit to
//! each of the others.
//!
//! An input whose port is at its rate limit is not visited before it may send again.

/// A visit takes no more than so many bytes, and the frame with which it reaches them.
pub(crate) const VISIT: u64 = 256 << 10;
/// What it costs to deliver a frame once, beside its bytes.
pub(crate) const COPY: u64 = 192;
/// What it costs to look at a descriptor.
pub(crate) const SPAN: u64 = 64;
/// How far an input may be above the floor: a few full batches of small frames, one of large ones.
const LEAD: u64 = 128 << 10;

/// One input's account.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Account {
    spent: u64,
    /// In ticks.
    not_before: u64,
}

/// The round over a poller's inputs.
#[derive(Debug)]
pub(crate) struct Turns {
    floor: u64,
    /// The least among those that have more to send, as far as this round has come.
    next_floor: u64,
    /// When the first of the inputs at their rate limit may send again.
    opens: u64,
    visited: bool,
}

impl Turns {
    pub fn new() -> Turns {
        Turns { floor: 0, next_floor: u64::MAX, opens: u64::MAX, visited: false }
    }

    /// Begins a round.
    #[inline(always)]
    pub fn begin(&mut self) {
        if self.next_floor != u64::MAX {
            self.floor = self.next_floor;
        }
        (self.next_floor, self.opens, self.visited) = (u64::MAX, u64::MAX, false);
    }

    /// Whether the input is to be visited now.
    #[inline(always)]
    pub fn may_go(&mut self, account: &mut Account, now: u64) -> bool {
        if account.not_before > now {
            self.opens = self.opens.min(account.not_before);
            return false;
        }
        account.spent = account.spent.max(self.floor);
        if account.spent - self.floor > LEAD {
            self.next_floor = self.next_floor.min(account.spent);
            return false;
        }
        self.visited = true;
        true
    }

    /// A visit has cost so much. `more`: the input has more to send.
    #[inline(always)]
    pub fn charge(&mut self, account: &mut Account, cost: u64, more: bool) {
        account.spent += cost;
        if more {
            self.next_floor = self.next_floor.min(account.spent);
        }
    }

    /// The input may not send before `time`.
    pub fn hold(&mut self, account: &mut Account, time: u64) {
        account.not_before = time;
        self.opens = self.opens.min(time);
    }

    /// At the end of a round: until when there is nothing to do, if all inputs are at their rate limits.
    #[inline(always)]
    pub fn pause(&self) -> Option<u64> {
        (!self.visited && self.next_floor == u64::MAX && self.opens != u64::MAX).then_some(self.opens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rounds over inputs that always have more, each visit of input n costing `costs[n]`. Returns what each has spent.
    fn rounds(costs: &[u64], rounds: usize) -> Vec<u64> {
        let (mut turns, mut accounts) = (Turns::new(), vec![Account::default(); costs.len()]);
        let mut spent = vec![0; costs.len()];
        for _ in 0..rounds {
            turns.begin();
            for (input, account) in accounts.iter_mut().enumerate() {
                if turns.may_go(account, 0) {
                    turns.charge(account, costs[input], true);
                    spent[input] += costs[input];
                }
            }
        }
        spent
    }

    #[test]
    fn a_sender_of_segments_gets_no_more_than_one_of_small_frames() {
        // 64 frames of 64 bytes, and four segments of 64 KB.
        let spent = rounds(&[64 * (64 + COPY + SPAN), 4 * (65_536 + COPY + 17 * SPAN)], 10_000);
        let [small, large] = spent[..] else { unreachable!() };
        assert!(small.abs_diff(large) <= LEAD + 4 * 70_000, "{spent:?}");
    }

    #[test]
    fn who_paused_has_saved_nothing() {
        let mut turns = Turns::new();
        let (mut busy, mut late) = (Account::default(), Account::default());
        for _ in 0..1000 {
            turns.begin();
            if turns.may_go(&mut busy, 0) {
                turns.charge(&mut busy, VISIT, true);
            }
        }
        let mut visits = [0u32, 0];
        for _ in 0..1000 {
            turns.begin();
            for (account, count) in [&mut busy, &mut late].into_iter().zip(&mut visits) {
                if turns.may_go(account, 0) {
                    turns.charge(account, VISIT, true);
                    *count += 1;
                }
            }
        }
        assert!(visits[0].abs_diff(visits[1]) <= 2, "{visits:?}");
    }

    #[test]
    fn one_that_sends_little_does_not_hold_up_one_that_sends_much() {
        let mut turns = Turns::new();
        let (mut much, mut little) = (Account::default(), Account::default());
        let mut visits = 0;
        for _ in 0..1000 {
            turns.begin();
            if turns.may_go(&mut much, 0) {
                turns.charge(&mut much, VISIT, true);
                visits += 1;
            }
            assert!(turns.may_go(&mut little, 0), "it is always let through");
            turns.charge(&mut little, 100, false);
        }
        assert!(visits >= 999, "{visits}");
    }

    #[test]
    fn who_is_at_its_limit_is_not_visited() {
        let mut turns = Turns::new();
        let (mut held, mut other) = (Account::default(), Account::default());
        turns.begin();
        assert!(turns.may_go(&mut held, 100));
        turns.hold(&mut held, 500);
        assert_eq!(turns.pause(), None, "this round has done something");
        turns.begin();
        assert!(!turns.may_go(&mut held, 499));
        assert_eq!(turns.pause(), Some(500));
        assert!(turns.may_go(&mut other, 499));
        assert_eq!(turns.pause(), None);
        turns.begin();
        assert!(turns.may_go(&mut held, 500));
    }

    proptest! {
        /// Whatever visits cost: nobody who has more to send gets ahead of another by more than the lead and a visit.
        #[test]
        fn nobody_gets_ahead(costs in prop::collection::vec(1u64..400_000, 1..8)) {
            let spent = rounds(&costs, 3000);
            let (least, most) = (spent.iter().min().unwrap(), spent.iter().max().unwrap());
            // Inputs whose visits are cheap need more rounds than there were to catch up.
            if *least > 2 * 400_000 {
                prop_assert!(most - least <= LEAD + 2 * 400_000, "{spent:?}");
            }
        }

        /// Somebody goes on in each round, or in the one after it.
        #[test]
        fn it_never_stops(costs in prop::collection::vec(1u64..400_000, 1..8)) {
            let (mut turns, mut accounts) = (Turns::new(), vec![Account::default(); costs.len()]);
            let mut idle = 0;
            for _ in 0..500 {
                turns.begin();
                let mut went = false;
                for (account, cost) in accounts.iter_mut().zip(&costs) {
                    if turns.may_go(account, 0) {
                        turns.charge(account, *cost, true);
                        went = true;
                    }
                }
                idle = if went { 0 } else { idle + 1 };
                prop_assert!(idle < 2);
            }
        }
    }
}
