//! Chains in flight, recorded so that the next process can go on where this one was killed (vhost-user, "Inflight I/O
//! tracking").
//!
//! # Theory of operation
//!
//! What a device has taken and not given back cannot be told from the rings: chains may come back in any order, and in a
//! packed ring used descriptors overwrite available ones. So the device keeps a record in memory that the front-end holds
//! for it and hands to the next back-end. The record is written so that whichever store is the last one a killed process
//! made, the next one finds either the state before a step or the state after it:
//!
//! - taking a chain has one store that counts: `inflight` of its descriptor ([`split`]), `old_free_head` ([`packed`]);
//! - giving chains back has one store that counts, the one that shows them to the driver. Before it, what is about to
//!   happen is written down; after it, that it has happened. A record that says only the first is checked against the ring.
//!
//! A kill is not a power failure: every store that was executed arrives, in the order of the program, so all it takes is
//! that the compiler keeps the order. The stores are releases, which also cover other processors.
//!
//! The record comes back from the front-end and is as hostile as everything else: it is checked when it is attached, and
//! after that only written.

pub(crate) mod packed;
mod region;
pub(crate) mod split;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use region::Region;
pub use region::inflight_bytes;

/// A place where a test may kill the device: before each store that another process can see.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn may_die() {}

#[cfg(test)]
pub(crate) use tests::may_die;
