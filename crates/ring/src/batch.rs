//! What a device takes from a queue in one go.

use std::mem::offset_of;

use viaduct_memory::Span;
use viaduct_memory::iotlb::Miss;

/// One buffer that the driver made available: its spans lie in [`Batch::spans`], device-readable ones first
/// (virtio 1.2, 2.7.4.2).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Chain {
    /// Split: index of the head descriptor. Packed: the buffer id.
    pub id: u16,
    /// Packed: how many slots of the descriptor ring it occupies. Split: 1.
    pub slots: u16,
    /// Index of the first span.
    pub first: u32,
    /// Bytes in the readable spans.
    pub readable_len: u32,
    /// Bytes in the writable spans.
    pub writable_len: u32,
    /// Number of device-readable spans.
    pub readable: u16,
    /// Number of device-writable spans, which follow the readable ones.
    pub writable: u16,
}

impl Chain {
    /// [`first`](Chain::first) of a chain that the IOMMU refuses.
    const REFUSED: u32 = u32::MAX;

    /// A chain that the IOMMU does not let the device reach. It has no spans; it is consumed and completed, with nothing
    /// written, like any other.
    pub(crate) const fn refused(id: u16, slots: u16) -> Chain {
        let first = Chain::REFUSED;
        Chain { id, slots, first, readable: 0, writable: 0, readable_len: 0, writable_len: 0 }
    }

    /// Whether it is one of those.
    #[inline]
    pub const fn is_refused(&self) -> bool {
        self.first == Chain::REFUSED
    }
}

/// Chains and their spans; made once and reused.
#[derive(Debug, Default)]
pub struct Batch {
    /// The chains, in the order in which the driver made them available.
    pub chains: Vec<Chain>,
    /// The spans of all chains.
    pub spans: Vec<Span>,
    /// Translations that chains from [`blocked`](Batch::blocked) on need and that are not known; empty outside of a peek.
    pub(crate) misses: Vec<Miss>,
    /// How many chains and spans come before the first chain that has a miss, if one has.
    pub(crate) blocked: Option<(usize, usize)>,
}

impl Batch {
    /// A batch with room for `chains` chains before it has to grow.
    pub fn with_capacity(chains: usize) -> Batch {
        Batch { chains: Vec::with_capacity(chains), spans: Vec::with_capacity(4 * chains), ..Batch::default() }
    }

    /// Begins to append up to `max` chains of one span each, all device-writable or all device-readable.
    #[inline(always)]
    pub(crate) fn singles(&mut self, max: usize, write: bool) -> Singles<'_> {
        self.chains.reserve(max);
        self.spans.reserve(max);
        // SAFETY: the ends of what the vectors hold.
        let (chain, span) =
            unsafe { (self.chains.as_mut_ptr().add(self.chains.len()), self.spans.as_mut_ptr().add(self.spans.len())) };
        Singles { chain, span, first: self.spans.len() as u32, write, batch: self }
    }

    /// Forgets all chains and spans and keeps the room.
    #[inline]
    pub fn clear(&mut self) {
        self.chains.clear();
        self.spans.clear();
    }

    /// The device-readable spans of `chain`; a refused one has none.
    #[inline]
    pub fn readable(&self, chain: &Chain) -> &[Span] {
        let first = chain.first as usize;
        self.spans.get(first..first + chain.readable as usize).unwrap_or_default()
    }

    /// The device-writable spans of `chain`; a refused one has none.
    #[inline]
    pub fn writable(&self, chain: &Chain) -> &[Span] {
        let first = chain.first as usize + chain.readable as usize;
        self.spans.get(first..first + chain.writable as usize).unwrap_or_default()
    }
}

/// A run of chains of one span each being appended: the places and the direction are locals of the loop that does it.
#[derive(Debug)]
pub(crate) struct Singles<'a> {
    chain: *mut Chain,
    span: *mut Span,
    first: u32,
    write: bool,
    batch: &'a mut Batch,
}

impl Singles<'_> {
    /// Appends a chain. A few wide stores instead of one for each field: this is done for every packet, twice.
    ///
    /// # Safety
    /// The run has fewer chains than it was begun for.
    #[inline(always)]
    pub unsafe fn push(&mut self, id: u16, span: Span) {
        const { assert!(offset_of!(Chain, readable_len) == 8 && offset_of!(Chain, readable) == 16) };
        // SAFETY: there is room for one more in each, says the caller; the words are the chain's fields as it lays them out.
        unsafe {
            let words = self.chain.cast::<u32>();
            let word = u64::from(id) | 1 << 16 | u64::from(self.first) << 32;
            words.cast::<u64>().write_unaligned(word.to_le());
            let len = u64::from(span.len()) << if self.write { 32 } else { 0 };
            words.add(2).cast::<u64>().write_unaligned(len.to_le());
            words.add(4).write((1u32 << if self.write { 16 } else { 0 }).to_le());
            self.span.write(span);
            self.chain = self.chain.add(1);
            self.span = self.span.add(1);
        }
        self.first += 1;
    }

    /// Ends the run.
    #[inline(always)]
    pub fn finish(self) {
        let Singles { batch, first, .. } = self;
        let spans = first as usize;
        // SAFETY: as many chains as spans have been written behind what there was.
        unsafe {
            batch.chains.set_len(batch.chains.len() + (spans - batch.spans.len()));
            batch.spans.set_len(spans);
        }
    }
}
