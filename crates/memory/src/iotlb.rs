//! The IOTLB: what an IOMMU between guest and device lets the device reach (vhost-user, "IOMMU support").
//!
//! # Theory of operation
//!
//! With VIRTIO_F_ACCESS_PLATFORM a driver names its buffers and rings by I/O virtual addresses. The front-end, which plays
//! the IOMMU, tells us by IOTLB messages which range of them stands for which of its own addresses, and whether it may be
//! read or written. This is a cache of what it said: something that is missing is asked for, and the answer comes later.
//!
//! One [`Iotlb`] serves all queues of a connection. Pollers look up under a read lock, and each queue remembers its last
//! translation ([`RegionCache`](crate::RegionCache)) until [`Iotlb::removals`] says that something is gone, so they share
//! a counter and seldom the lock. An invalidation returns when no *later* look-up finds what it removed; whoever asked for
//! it waits for the batches under way as well, by taking each queue's lock once, before it answers the front-end.
//!
//! A look-up that finds nothing is a *miss*. It is put down once however many descriptors need it ([`Iotlb::request`]), and
//! at most [`MAX_WAITING`] are: a guest can name any address it likes. The control side sends them and says at last what
//! became of each: an update, or a refusal ([`Iotlb::refuse`]). Those who wait are told of a refusal, and then it is
//! forgotten ([`Iotlb::forget_refusals`]), because the driver may map the very page a moment later and tells nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

/// Misses are asked for in pages of this many bytes, the smallest that any IOMMU of today's machines maps.
pub const PAGE: u64 = 4096;

/// Most misses that wait for an answer.
pub const MAX_WAITING: usize = 256;

/// Most ranges that are kept: few enough that any change is done in the time of some batches. Adjacent ones are joined, so
/// this is rarely seen; a full table is emptied, as a cache may be.
pub const MAX_RANGES: usize = 1 << 14;

/// What a device does with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// It reads.
    Read = 1,
    /// It writes.
    Write = 2,
}

/// A set of [`Access`], as in IOTLB messages: 1 read, 2 write, 3 both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions(u8);

impl Permissions {
    /// Whether `access` is in the set.
    #[inline]
    pub const fn allow(self, access: Access) -> bool {
        self.0 & access as u8 != 0
    }

    /// As in IOTLB messages.
    pub const fn bits(self) -> u8 {
        self.0
    }
}

/// Why a translation cannot be right.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum IotlbError {
    /// It has no bytes, or ends beyond the last address.
    #[error(
        "{size:#x} bytes at I/O virtual address {iova:#x} and user address {user_addr:#x}: a translation has at least 1 byte and \
         ends below 2^64 (vhost-user, \"IOTLB message\")"
    )]
    Range {
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// First front-end-virtual address.
        user_addr: u64,
    },
    /// No such permissions.
    #[error("permissions {0}: 1 read, 2 write and 3 both are known (vhost-user, \"IOTLB message\")")]
    Permissions(u8),
}

/// A range of I/O virtual addresses and what it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// First I/O virtual address.
    pub iova: u64,
    /// Last one: the range may be the whole space.
    pub last: u64,
    /// Front-end-virtual address of the first byte.
    pub user_addr: u64,
    /// What a device may do there.
    pub permissions: Permissions,
}

impl Translation {
    /// From the fields of an IOTLB message.
    ///
    /// # Errors
    /// [`IotlbError`].
    pub fn new(iova: u64, size: u64, user_addr: u64, permissions: u8) -> Result<Translation, IotlbError> {
        let range = IotlbError::Range { iova, size, user_addr };
        let Some(more) = size.checked_sub(1) else { return Err(range) };
        let (Some(last), Some(_)) = (iova.checked_add(more), user_addr.checked_add(more)) else { return Err(range) };
        if !(1..=3).contains(&permissions) {
            return Err(IotlbError::Permissions(permissions));
        }
        Ok(Translation { iova, last, user_addr, permissions: Permissions(permissions) })
    }

    /// Whether `other`, where they meet, says the same. Two that differ by the whole space do not: joined, they would end
    /// beyond it.
    fn agrees_with(&self, other: &Translation) -> bool {
        let distance = |range: &Translation| i128::from(range.user_addr) - i128::from(range.iova);
        distance(self) == distance(other) && self.permissions == other.permissions
    }

    /// The part from `iova` to `last`, which lies inside.
    fn part(&self, iova: u64, last: u64) -> Translation {
        Translation { iova, last, user_addr: self.user_addr + (iova - self.iova), permissions: self.permissions }
    }
}

/// A page that has no translation, and what for it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Miss {
    /// I/O virtual address, a multiple of [`PAGE`].
    pub iova: u64,
    /// What the device wants there.
    pub access: Access,
}

impl Miss {
    /// The page of an address.
    pub const fn at(addr: u64, access: Access) -> Miss {
        Miss { iova: addr & !(PAGE - 1), access }
    }
}

/// Why there is no span for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// There is no IOMMU, and no region has the address.
    Outside,
    /// No translation is known yet.
    Missing(Miss),
    /// The front-end has said, or says by its silence, that there is none.
    Refused,
    /// There is one that does not allow this access, or that leads outside the memory.
    Forbidden,
}

/// Counts of what has happened, since the table was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IotlbStats {
    /// Ranges known now.
    pub ranges: u64,
    /// Updates taken.
    pub updates: u64,
    /// Invalidations carried out.
    pub invalidations: u64,
    /// Misses asked for.
    pub misses: u64,
    /// Of these, how many the front-end refused or left unanswered.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Requests {
    /// Asked for and not answered.
    waiting: BTreeSet<Miss>,
    /// Those of them that control has not seen.
    fresh: Vec<Miss>,
    /// Answered with no, until those who wait have been told.
    refused: BTreeSet<Miss>,
    /// Accesses that permissions forbade, for control.
    forbidden: Vec<Miss>,
}

/// The table. See the head of the module.
#[derive(Debug)]
pub struct Iotlb {
    /// Disjoint ranges, by first address.
    ranges: RwLock<BTreeMap<u64, Translation>>,
    removals: AtomicU64,
    requests: Mutex<Requests>,
    updates: AtomicU64,
    invalidations: AtomicU64,
    misses: AtomicU64,
    refused: AtomicU64,
    signal: File,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Iotlb {
    /// An empty table that writes to `signal`, an eventfd, when control has something to take.
    pub fn new(signal: OwnedFd) -> Iotlb {
        Iotlb {
            ranges: RwLock::default(),
            removals: AtomicU64::new(0),
            requests: Mutex::default(),
            updates: AtomicU64::new(0),
            invalidations: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            signal: signal.into(),
        }
    }

    /// Counts how often something known was taken away: a translation remembered elsewhere holds as long as it stays.
    #[inline]
    pub fn removals(&self) -> u64 {
        self.removals.load(Ordering::Acquire)
    }

    /// The translation at `addr` that allows `access`.
    pub(crate) fn find(&self, addr: u64, access: Access) -> Result<Translation, Unreachable> {
        match self.range_of(addr) {
            Some(range) if range.permissions.allow(access) => Ok(range),
            Some(_) => Err(self.forbid(Miss::at(addr, access))),
            None => Err(Unreachable::Missing(Miss::at(addr, access))),
        }
    }

    fn range_of(&self, addr: u64) -> Option<Translation> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        ranges.range(..=addr).next_back().map(|(_, range)| *range).filter(|range| addr <= range.last)
    }

    /// Puts down an access that permissions forbid.
    pub(crate) fn forbid(&self, what: Miss) -> Unreachable {
        let mut requests = locked(&self.requests);
        if requests.forbidden.len() < MAX_WAITING {
            requests.forbidden.push(what);
            self.tell();
        }
        Unreachable::Forbidden
    }

    /// Asks control for the translation of a page, once, unless too many are asked for already: then whoever waits looks
    /// again when one of those was answered. What has come since it was missed is not asked for either: by the time of
    /// the answer the driver may have taken it away again.
    pub fn request(&self, miss: Miss) {
        let mut requests = locked(&self.requests);
        if self.range_of(miss.iova).is_some_and(|range| range.last - miss.iova >= PAGE - 1) {
            return;
        }
        if requests.waiting.len() < MAX_WAITING && requests.waiting.insert(miss) {
            requests.fresh.push(miss);
            self.misses.fetch_add(1, Ordering::Relaxed);
            self.tell();
        }
    }

    /// Whether a page has just been refused.
    pub fn is_refused(&self, miss: Miss) -> bool {
        locked(&self.requests).refused.contains(&miss)
    }

    /// Everybody who waits has been told of refusals.
    pub fn forget_refusals(&self) {
        locked(&self.requests).refused.clear();
    }

    /// Whether the front-end has still to answer for a page.
    pub fn is_waiting(&self, miss: Miss) -> bool {
        locked(&self.requests).waiting.contains(&miss)
    }

    fn tell(&self) {
        // An eventfd that is full has told already.
        let _ = (&self.signal).write(&1u64.to_ne_bytes());
    }

    /// Takes what control has to ask the front-end for.
    pub fn take_misses(&self) -> Vec<Miss> {
        std::mem::take(&mut locked(&self.requests).fresh)
    }

    /// Takes the accesses that were forbidden.
    pub fn take_forbidden(&self) -> Vec<Miss> {
        std::mem::take(&mut locked(&self.requests).forbidden)
    }

    /// There is no translation for a page that was asked for. Whether it was waited for.
    pub fn refuse(&self, miss: Miss) -> bool {
        let mut requests = locked(&self.requests);
        if !requests.waiting.remove(&miss) {
            return false;
        }
        requests.refused.insert(miss);
        self.refused.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Takes over what the front-end said (VHOST_IOTLB_UPDATE). Returns the range of which something else was known: it has
    /// to be treated as invalidated.
    pub fn update(&self, new: Translation) -> Option<(u64, u64)> {
        let stale = self.insert(new);
        self.updates.fetch_add(1, Ordering::Relaxed);
        let mut requests = locked(&self.requests);
        // A page is answered for when it is there, even if it does not allow what was asked.
        let meets = |miss: &Miss| miss.iova <= new.last && new.iova <= miss.iova + (PAGE - 1);
        requests.waiting.retain(|miss| !meets(miss));
        requests.refused.retain(|miss| !meets(miss));
        stale
    }

    fn insert(&self, mut new: Translation) -> Option<(u64, u64)> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let mut stale = None;
        if ranges.len() >= MAX_RANGES {
            ranges.clear();
            stale = Some((0, u64::MAX));
        }
        let met = meeting(&ranges, new.iova, new.last);
        if met.iter().any(|old| !old.agrees_with(&new)) {
            remove(&mut ranges, new.iova, new.last);
            stale = stale.or(Some((new.iova, new.last)));
        }
        // What agrees with it, and touches it, becomes one with it.
        let below = new.iova.saturating_sub(1);
        for old in meeting(&ranges, below, new.last.saturating_add(1)) {
            if old.agrees_with(&new) {
                ranges.remove(&old.iova);
                let start = if old.iova < new.iova { old } else { new };
                new = Translation { last: old.last.max(new.last), ..start };
            }
        }
        ranges.insert(new.iova, new);
        if stale.is_some() {
            self.removals.fetch_add(1, Ordering::Release);
        }
        stale
    }

    /// Forgets what is known from `first` to `last` (VHOST_IOTLB_INVALIDATE).
    pub fn invalidate(&self, first: u64, last: u64) {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let whole = (first, last) == (0, u64::MAX);
        // Dropped with nobody waiting for the lock.
        let gone = if whole { std::mem::take(&mut *ranges) } else { BTreeMap::new() };
        if !whole {
            remove(&mut ranges, first, last);
        }
        self.removals.fetch_add(1, Ordering::Release);
        drop(ranges);
        drop(gone);
        self.invalidations.fetch_add(1, Ordering::Relaxed);
    }

    /// What is known, by address.
    pub fn translations(&self) -> Vec<Translation> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner).values().copied().collect()
    }

    /// What has happened.
    pub fn stats(&self) -> IotlbStats {
        IotlbStats {
            ranges: self.ranges.read().unwrap_or_else(PoisonError::into_inner).len() as u64,
            updates: self.updates.load(Ordering::Relaxed),
            invalidations: self.invalidations.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

/// The ranges that have an address from `first` to `last`.
fn meeting(ranges: &BTreeMap<u64, Translation>, first: u64, last: u64) -> Vec<Translation> {
    let before = ranges.range(..first).next_back().map(|(_, range)| *range).filter(|range| range.last >= first);
    before.into_iter().chain(ranges.range(first..=last).map(|(_, range)| *range)).collect()
}

/// Takes the addresses from `first` to `last` out; ranges that go beyond keep their rest.
fn remove(ranges: &mut BTreeMap<u64, Translation>, first: u64, last: u64) {
    for old in meeting(ranges, first, last) {
        ranges.remove(&old.iova);
        if old.iova < first {
            ranges.insert(old.iova, old.part(old.iova, first - 1));
        }
        if old.last > last {
            ranges.insert(last + 1, old.part(last + 1, old.last));
        }
    }
}
