//! The record of a split queue (vhost-user, `QueueRegionSplit`).
//!
//! Each head descriptor has a mark, `inflight`, and the number of the order in which it was taken. Chains that are about
//! to be given back are pushed onto a list; then `idx` of the used ring moves, which is the store that counts; then the
//! marks are cleared and `used_idx` follows. When `used_idx` and `idx` differ, the process died in between, and the marks
//! of the topmost so many of the list are cleared by the next one.
//!
//! What is taken in turn is either back or in flight, so the available ring goes on at the used index plus the marks.

use std::collections::VecDeque;

use super::Region;
use crate::RingError;

const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// In a descriptor's state: the mark shares a word with padding, as which it is written.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

#[derive(Debug)]
pub(crate) struct SplitRecord {
    region: Region,
    counter: u64,
    /// Chains completed and not published.
    staged: Vec<u16>,
    /// Heads that an earlier process took, in the order in which it did, and that have not been taken again.
    pub again: VecDeque<u16>,
}

impl SplitRecord {
    /// Reads what an earlier process left, `used` being `idx` of the used ring now.
    pub fn attach(region: Region, used: u16) -> Result<SplitRecord, RingError> {
        let size = region.size;
        let mut again: Vec<(u64, u16)> = Vec::new();
        if region.is_new()? {
            for index in 0..size {
                region.put_u64(region.state(index), 0);
                region.put_u64(region.state(index) + COUNTER, 0);
            }
            region.put_u16(LAST_BATCH_HEAD, 0);
            region.put_u16(USED_IDX, used);
            region.finish_new();
        } else {
            let batch = used.wrapping_sub(region.get_u16(USED_IDX));
            if batch > size {
                return Err(RingError::InflightRecord {
                    what: "used index",
                    found: batch.into(),
                    allowed: size.into(),
                });
            }
            let mut head = region.get_u16(LAST_BATCH_HEAD);
            for _ in 0..batch {
                if head >= size {
                    return Err(RingError::InflightRecord { what: "index", found: head.into(), allowed: size.into() });
                }
                region.put_u16(region.state(head) + INFLIGHT, 0);
                head = region.get_u16(region.state(head) + NEXT);
            }
            region.put_u16(USED_IDX, used);
            again.extend(
                (0..size)
                    .filter(|&index| region.get_u8(region.state(index) + INFLIGHT) == 1)
                    .map(|index| (region.get_u64(region.state(index) + COUNTER), index)),
            );
            again.sort_unstable();
        }
        let counter = again.last().map_or(0, |last| last.0.wrapping_add(1));
        let again = again.into_iter().map(|(_, head)| head).collect();
        Ok(SplitRecord { region, counter, staged: Vec::with_capacity(size.into()), again })
    }

    /// The chain at `head` is taken.
    pub fn take(&mut self, head: u16) {
        let state = self.region.state(head);
        self.region.put_u64(state + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.put_u16(state + INFLIGHT, 1);
    }

    /// The chain at `head` is completed.
    #[inline]
    pub fn stage(&mut self, head: u16) {
        self.staged.push(head);
    }

    /// Before `idx` moves.
    pub fn before_publish(&mut self) {
        for &head in &self.staged {
            self.region.put_u16(self.region.state(head) + NEXT, self.region.get_u16(LAST_BATCH_HEAD));
            self.region.put_u16(LAST_BATCH_HEAD, head);
        }
    }

    /// After `idx` has moved to `used`.
    pub fn after_publish(&mut self, used: u16) {
        for head in self.staged.drain(..) {
            self.region.put_u16(self.region.state(head) + INFLIGHT, 0);
        }
        self.region.put_u16(USED_IDX, used);
    }
}
