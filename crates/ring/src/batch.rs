//! What a device takes from a queue in one go.

use viaduct_memory::Span;

/// One buffer that the driver made available: its spans lie in [`Batch::spans`], device-readable ones first
/// (virtio 1.2, 2.7.4.2).
#[derive(Clone, Copy, Debug, Default)]
pub struct Chain {
    /// Split: index of the head descriptor. Packed: the buffer id.
    pub id: u16,
    /// Packed: how many slots of the descriptor ring it occupies. Split: 1.
    pub slots: u16,
    /// Index of the first span.
    pub first: u32,
    /// Number of device-readable spans.
    pub readable: u16,
    /// Number of device-writable spans, which follow the readable ones.
    pub writable: u16,
    /// Bytes in the readable spans.
    pub readable_len: u32,
    /// Bytes in the writable spans.
    pub writable_len: u32,
}

/// Chains and their spans; made once and reused.
#[derive(Debug, Default)]
pub struct Batch {
    /// The chains, in the order in which the driver made them available.
    pub chains: Vec<Chain>,
    /// The spans of all chains.
    pub spans: Vec<Span>,
}

impl Batch {
    /// A batch with room for `chains` chains before it has to grow.
    pub fn with_capacity(chains: usize) -> Batch {
        Batch { chains: Vec::with_capacity(chains), spans: Vec::with_capacity(4 * chains) }
    }

    /// Makes room so that `chains` chains of one span each can be pushed without growing.
    #[inline]
    pub(crate) fn reserve(&mut self, chains: usize) {
        self.chains.reserve(chains);
        self.spans.reserve(chains);
    }

    /// Appends a chain of one span, the common case, without a branch.
    ///
    /// # Safety
    /// There is room, by [`reserve`](Batch::reserve).
    #[inline(always)]
    pub(crate) unsafe fn push_single(&mut self, id: u16, span: Span, write: bool) {
        let (chain, at) = (self.chains.len(), self.spans.len());
        debug_assert!(chain < self.chains.capacity() && at < self.spans.capacity());
        // All ones for a device-writable span, zero for a readable one.
        let mask = u32::from(write).wrapping_neg();
        let new = Chain {
            id,
            slots: 1,
            first: at as u32,
            readable: u16::from(!write),
            writable: u16::from(write),
            readable_len: span.len() & !mask,
            writable_len: span.len() & mask,
        };
        // SAFETY: there is room for one more in each, says the caller.
        unsafe {
            self.chains.as_mut_ptr().add(chain).write(new);
            self.chains.set_len(chain + 1);
            self.spans.as_mut_ptr().add(at).write(span);
            self.spans.set_len(at + 1);
        }
    }

    /// Forgets all chains and spans and keeps the room.
    #[inline]
    pub fn clear(&mut self) {
        self.chains.clear();
        self.spans.clear();
    }

    /// The device-readable spans of `chain`.
    #[inline]
    pub fn readable(&self, chain: &Chain) -> &[Span] {
        let first = chain.first as usize;
        &self.spans[first..first + chain.readable as usize]
    }

    /// The device-writable spans of `chain`.
    #[inline]
    pub fn writable(&self, chain: &Chain) -> &[Span] {
        let first = chain.first as usize + chain.readable as usize;
        &self.spans[first..first + chain.writable as usize]
    }
}
