//! What the driver remembers of the buffers that the device holds.
//!
//! Nothing about a buffer is read back from the ring, where the device could have changed it: the token, the number of
//! descriptors, how they are linked and how much may be written into them are kept here, by buffer id.

use super::fifo::Fifo;
use crate::RingError;

/// One buffer id.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    token: u64,
    /// Device-writable bytes.
    room: u32,
    /// Descriptors in the ring or table; 0 when the device does not hold the buffer.
    descriptors: u16,
    /// Split: the descriptor that follows this one in its chain.
    next: u16,
}

/// The buffers by id, and with IN_ORDER the order in which they were added.
#[derive(Debug)]
pub(super) struct Holdings {
    held: Box<[Held]>,
    order: Option<Fifo>,
    /// With IN_ORDER: how many of the oldest buffers the last used element has returned (virtio 1.2, 2.7.9 and 2.8.8).
    batch: usize,
    /// What the device wrote into the last of them.
    written: u32,
}

/// A buffer that came back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Returned {
    pub id: u16,
    pub token: u64,
    pub written: u32,
    pub descriptors: u16,
}

impl Holdings {
    pub fn new(size: u16, in_order: bool) -> Holdings {
        Holdings {
            held: vec![Held::default(); size.into()].into(),
            order: in_order.then(|| Fifo::empty(size)),
            batch: 0,
            written: 0,
        }
    }

    /// The device gets buffer `id`.
    #[inline]
    pub fn give(&mut self, id: u16, token: u64, room: u32, descriptors: u16) {
        if let Some(held) = self.held.get_mut(usize::from(id)) {
            (held.token, held.room, held.descriptors) = (token, room, descriptors);
        }
        if let Some(order) = &mut self.order {
            order.push(id);
        }
    }

    /// Split: `next` follows `index` in a chain.
    #[inline]
    pub fn link(&mut self, index: u16, next: u16) {
        if let Some(held) = self.held.get_mut(usize::from(index)) {
            held.next = next;
        }
    }

    /// Split: what follows `index` in its chain.
    #[inline]
    pub fn next(&self, index: u16) -> u16 {
        self.held.get(usize::from(index)).map_or(0, |held| held.next)
    }

    /// The rest of a batch that an earlier used element returned.
    #[inline]
    pub fn take_batched(&mut self) -> Option<Returned> {
        if self.batch == 0 { None } else { self.next_of_batch() }
    }

    /// A used element says that the device wrote `written` bytes into buffer `id`. With IN_ORDER this returns all older
    /// buffers first, at most `elements` in all; the rest comes from [`take_batched`](Holdings::take_batched).
    #[inline]
    pub fn take(&mut self, id: u32, written: u32, elements: u32) -> Result<Returned, RingError> {
        let not_outstanding = RingError::NotOutstanding { found: id };
        let held = match self.held.get(id as usize) {
            Some(held) if held.descriptors != 0 => held,
            _ => return Err(not_outstanding),
        };
        let id = id as u16;
        if written > held.room {
            return Err(RingError::UsedLength { id, found: written, allowed: held.room });
        }
        match &self.order {
            None => Ok(self.remove(id, Some(written))),
            Some(order) => {
                let batch = order.position(id).ok_or(not_outstanding.clone())? + 1;
                if batch > elements as usize {
                    return Err(RingError::UsedJump { found: batch as u32, allowed: elements });
                }
                (self.batch, self.written) = (batch, written);
                self.next_of_batch().ok_or(not_outstanding)
            }
        }
    }

    fn next_of_batch(&mut self) -> Option<Returned> {
        self.batch -= 1;
        let id = self.order.as_mut()?.pop()?;
        // A buffer without a used element of its own counts as completely written (2.7.9 and 2.8.8).
        let written = (self.batch == 0).then_some(self.written);
        Some(self.remove(id, written))
    }

    /// `written`: `None` for all of it.
    #[inline]
    fn remove(&mut self, id: u16, written: Option<u32>) -> Returned {
        let Some(held) = self.held.get_mut(usize::from(id)) else {
            return Returned { id, token: 0, written: 0, descriptors: 0 };
        };
        let descriptors = std::mem::take(&mut held.descriptors);
        Returned { id, token: held.token, written: written.unwrap_or(held.room), descriptors }
    }
}
