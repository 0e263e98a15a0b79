//! The elements of one buffer, in the order in which a driver lists them.

use crate::RingError;
use crate::descriptor::WRITE;

/// Where an element lies: guest-physical address and length in bytes.
pub type Segment = (u64, u32);

/// A buffer to be added: device-readable elements, then device-writable ones (virtio 1.2, 2.7.4.2).
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments<'a> {
    pub out: &'a [Segment],
    pub input: &'a [Segment],
}

impl<'a> Segments<'a> {
    pub fn len(self) -> usize {
        self.out.len() + self.input.len()
    }

    /// Address, length and direction of each element.
    pub fn iter(self) -> impl Iterator<Item = (u64, u32, u16)> + 'a {
        let out = self.out.iter().map(|&(addr, len)| (addr, len, 0));
        out.chain(self.input.iter().map(|&(addr, len)| (addr, len, WRITE)))
    }

    /// Device-writable bytes.
    ///
    /// # Errors
    /// [`RingError::TotalLength`] if all bytes together do not fit into 32 bits (virtio 1.2, 2.7.5.2).
    pub fn room(self) -> Result<u32, RingError> {
        let total = |segments: &[Segment]| segments.iter().map(|&(_, len)| u64::from(len)).sum::<u64>();
        let (out, room) = (total(self.out), total(self.input));
        if out + room > u64::from(u32::MAX) {
            return Err(RingError::TotalLength { found: out + room });
        }
        Ok(room as u32)
    }
}
