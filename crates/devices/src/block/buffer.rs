//! The data part of a request: guest memory, perhaps in many pieces.

use viaduct_memory::{GuestMemory, Span};

/// Most pieces that one system call takes.
pub(super) const PIECES: usize = libc::UIO_MAXIOV as usize;

/// Pieces of guest memory and what keeps them mapped.
#[derive(Debug)]
pub struct GuestBuffer {
    spans: Vec<Span>,
    _memory: GuestMemory,
}

impl GuestBuffer {
    /// # Safety
    /// The spans were translated by `memory`.
    pub unsafe fn new(spans: Vec<Span>, memory: GuestMemory) -> GuestBuffer {
        GuestBuffer { spans, _memory: memory }
    }

    /// The pieces.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> u64 {
        self.spans.iter().map(|span| u64::from(span.len())).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `bytes` into the buffer, from `offset` on; what does not fit is left out.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        // SAFETY: `_memory` keeps the pieces mapped.
        unsafe { write(&self.spans, offset, bytes) };
    }

    /// Fills `bytes` from the buffer, from `offset` on, as far as it goes.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let mut at = 0;
        for span in pieces(&self.spans, offset, bytes.len() as u64) {
            let end = at + span.len() as usize;
            // SAFETY: `_memory` keeps it mapped, and the piece has this length.
            unsafe { span.read(0, &mut bytes[at..end]) };
            at = end;
        }
    }

    /// Zeroes everything from `offset` on.
    pub fn zero_from(&self, offset: u64) {
        // SAFETY: `_memory` keeps the pieces mapped.
        unsafe { zero_from(&self.spans, offset) };
    }
}

/// Copies `bytes` into the spans, from `offset` on; what does not fit is left out.
///
/// # Safety
/// The spans' memory is alive.
pub(super) unsafe fn write(spans: &[Span], offset: u64, bytes: &[u8]) {
    let mut left = bytes;
    for span in pieces(spans, offset, bytes.len() as u64) {
        let (now, later) = left.split_at(span.len() as usize);
        // SAFETY: the caller keeps it mapped, and the piece has this length.
        unsafe { span.write(0, now) };
        left = later;
    }
}

/// Zeroes the spans from `offset` on.
///
/// # Safety
/// The spans' memory is alive.
pub(super) unsafe fn zero_from(spans: &[Span], offset: u64) {
    const ZEROES: [u8; 4096] = [0; 4096];
    for span in pieces(spans, offset, u64::MAX) {
        let mut at = 0;
        while at < span.len() {
            let now = (span.len() - at).min(ZEROES.len() as u32);
            // SAFETY: the caller keeps it mapped, and the range lies inside.
            unsafe { span.write(at, &ZEROES[..now as usize]) };
            at += now;
        }
    }
}

/// The part of `spans` that begins `skip` bytes in and has `len` bytes, or what there is of it. No piece is empty.
pub(super) fn pieces(spans: &[Span], mut skip: u64, mut len: u64) -> impl Iterator<Item = Span> {
    spans.iter().filter_map(move |&span| {
        if skip >= u64::from(span.len()) {
            skip -= u64::from(span.len());
            return None;
        }
        // Less than the length of a span.
        let rest = span.skip(skip as u32);
        skip = 0;
        let now = u64::from(rest.len()).min(len);
        len -= now;
        (now > 0).then(|| Span::new(rest.start(), now as u32))
    })
}

/// The first [`PIECES`] pieces of `spans` from `skip` on, as the system takes them.
pub(super) fn as_iovecs(spans: &[Span], skip: u64, iovecs: &mut Vec<libc::iovec>) {
    iovecs.clear();
    iovecs.extend(
        pieces(spans, skip, u64::MAX)
            .take(PIECES)
            .map(|span| libc::iovec { iov_base: span.as_ptr().cast(), iov_len: span.len() as usize }),
    );
}
