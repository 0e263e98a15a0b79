//! What a port admits, and how much: the rules by which one guest is kept from harming others.
//!
//! Frames that break a rule are dropped and counted, each for its reason, at the port that sent them; the other ports
//! see nothing of them. A port without rules pays one branch for each batch, or for each frame with other addresses than
//! the one before.

use parking_lot::Mutex;

use crate::clock;
use crate::counters::DropReason;
use crate::policer::{Limit, Rate, Shaper};

/// What a port may do and what it is spared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The addresses of the stations behind the port: no other port may send with them.
    pub macs: Vec<[u8; 6]>,
    /// The port may send with none but these.
    pub spoofcheck: bool,
    /// Private ports hear others, but not one another.
    pub private: bool,
    /// So many addresses may be learned from it; 0: any number.
    pub learn_limit: u32,
    /// What the port sends. Too fast: it waits in the port's own ring.
    pub rate: Rate,
    /// What is sent to the port. Too fast: it is dropped.
    pub rate_out: Rate,
    /// Broadcast and multicast frames a second that the port may send; 0: any number.
    pub storm: u64,
    /// Frames a second that the port may send to stations that nobody has heard; 0: any number.
    pub unknown: u64,
}

/// Floods come in bursts: what is allowed in so many microseconds may come at once. It has to find room in the rings of
/// all ports.
const FLOOD_BURST: u64 = 100_000;

/// Rules made ready for use.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    /// Source addresses that are admitted, as [`Frame::source`](crate::frame::Frame::source) gives them; none: any.
    pub sources: Option<Box<[u64]>>,
    pub private: bool,
    pub shaper: Option<Box<Shaper>>,
    pub policer: Option<Box<Mutex<Limit>>>,
    pub floods: Option<Box<Mutex<FloodLimits>>>,
}

impl Admission {
    pub fn new(rules: &Rules) -> Admission {
        let sources = rules.spoofcheck.then(|| rules.macs.iter().map(|mac| address(*mac)).collect());
        Admission {
            sources,
            private: rules.private,
            shaper: Shaper::new(rules.rate),
            policer: Limit::new(rules.rate_out).map(|limit| Box::new(Mutex::new(limit))),
            floods: FloodLimits::new(rules),
        }
    }

    /// Whether the port may send with this source address.
    #[inline(always)]
    pub fn admits(&self, source: u64) -> bool {
        self.sources.as_ref().is_none_or(|sources| sources.contains(&source))
    }
}

/// An address as it is loaded from a frame: first byte lowest.
pub(crate) fn address(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// How many frames of a port may go to everybody.
#[derive(Debug)]
pub(crate) struct FloodLimits {
    groups: Option<Limit>,
    unknown: Option<Limit>,
}

impl FloodLimits {
    fn new(rules: &Rules) -> Option<Box<Mutex<FloodLimits>>> {
        let limit = |frames| Limit::new(Rate { bits: 0, frames, burst: FLOOD_BURST });
        let limits = FloodLimits { groups: limit(rules.storm), unknown: limit(rules.unknown) };
        (limits.groups.is_some() || limits.unknown.is_some()).then(|| Box::new(Mutex::new(limits)))
    }

    /// Time has passed.
    pub fn fill(&mut self) {
        let now = clock::ticks();
        self.groups.iter_mut().chain(&mut self.unknown).for_each(|limit| limit.fill(now));
    }

    /// Lets a frame to `destination` through, or says why not.
    pub fn admit(&mut self, destination: u64) -> Result<(), DropReason> {
        let (limit, reason) = match destination & 1 {
            1 => (&mut self.groups, DropReason::Storm),
            _ => (&mut self.unknown, DropReason::UnknownFlood),
        };
        match limit {
            Some(limit) if !limit.is_open() => Err(reason),
            Some(limit) => {
                limit.take(0);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROADCAST: u64 = 0xffff_ffff_ffff;
    const STATION: u64 = 0x0100_0000_0002;

    #[test]
    fn only_its_own_addresses() {
        let own = [2, 0, 0, 0, 0, 1];
        let rules = Rules { macs: vec![own, [2, 0, 0, 0, 0, 2]], spoofcheck: true, ..Rules::default() };
        let admission = Admission::new(&rules);
        assert!(admission.admits(address(own)));
        assert!(!admission.admits(address([2, 0, 0, 0, 0, 3])));
        assert!(Admission::new(&Rules { spoofcheck: false, ..rules }).admits(1 << 40));
    }

    #[test]
    fn broadcasts_and_unknown_stations_are_limited_apart() {
        let floods = FloodLimits::new(&Rules { storm: 10, unknown: 20, ..Rules::default() }).expect("limits");
        let mut floods = floods.lock();
        let mut passed = |destination| (0..10).filter(|_| floods.admit(destination).is_ok()).count();
        assert_eq!((passed(BROADCAST), passed(STATION), passed(BROADCAST)), (1, 2, 0));
    }

    #[test]
    fn one_limit_leaves_the_other_kind_alone() {
        let floods = FloodLimits::new(&Rules { storm: 1, ..Rules::default() }).expect("limits");
        let mut floods = floods.lock();
        assert_eq!(floods.admit(BROADCAST), Ok(()));
        assert_eq!(floods.admit(BROADCAST), Err(DropReason::Storm));
        assert!((0..1000).all(|_| floods.admit(STATION).is_ok()));
        assert!(FloodLimits::new(&Rules::default()).is_none());
    }
}
