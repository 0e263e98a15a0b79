//! A queue of 16-bit indexes that never grows.

/// First in, first out, up to the capacity it was made with.
///
/// Free descriptors are handed out in the order in which they came back: when a device works in order, as all network
/// devices do, descriptors stay in sequence and the other side's prefetching works.
#[derive(Debug)]
pub(super) struct Fifo {
    ring: Box<[u16]>,
    front: usize,
    back: usize,
    len: usize,
}

impl Fifo {
    pub fn empty(capacity: u16) -> Fifo {
        Fifo { ring: vec![0; capacity.into()].into(), front: 0, back: 0, len: 0 }
    }

    /// All indexes below `capacity`, in order.
    pub fn full(capacity: u16) -> Fifo {
        Fifo { ring: (0..capacity).collect(), front: 0, back: 0, len: capacity.into() }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds an index. When there is no room, which the owner's bookkeeping rules out, it is dropped.
    #[inline]
    pub fn push(&mut self, index: u16) {
        debug_assert!(self.len < self.ring.len());
        if let Some(place) = self.ring.get_mut(self.back) {
            *place = index;
            self.back = if self.back + 1 == self.ring.len() { 0 } else { self.back + 1 };
            self.len += 1;
        }
    }

    #[inline]
    pub fn pop(&mut self) -> Option<u16> {
        if self.len == 0 {
            return None;
        }
        let index = *self.ring.get(self.front)?;
        self.front = if self.front + 1 == self.ring.len() { 0 } else { self.front + 1 };
        self.len -= 1;
        Some(index)
    }

    /// How far from the front `index` is.
    pub fn position(&self, index: u16) -> Option<usize> {
        let (older, newer) = self.ring.split_at(self.front);
        newer.iter().chain(older).take(self.len).position(|&i| i == index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_around_the_end() {
        let mut fifo = Fifo::full(3);
        assert_eq!(fifo.pop(), Some(0));
        assert_eq!(fifo.pop(), Some(1));
        fifo.push(1);
        fifo.push(0);
        assert_eq!((fifo.position(2), fifo.position(0), fifo.position(7)), (Some(0), Some(2), None));
        assert_eq!([fifo.pop(), fifo.pop(), fifo.pop(), fifo.pop()], [Some(2), Some(1), Some(0), None]);
        assert_eq!(fifo.position(0), None);
    }
}
