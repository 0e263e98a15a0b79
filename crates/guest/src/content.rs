//! What streams carry: bytes that tell where they belong.
//!
//! A stream's first eight bytes are a seed; word *n* after it is a function of the seed and *n*. So the receiver, who
//! knows nothing beforehand, checks every byte, and a byte that is missing, repeated or from elsewhere shows at once.

/// The word at position `index` of the stream with `seed` (the mixing function of SplitMix64).
#[inline]
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[inline]
fn word_of_stream(seed: u64, index: u64) -> u64 {
    if index == 0 { seed } else { word(seed, index) }
}

/// Fills `buf` with the stream's bytes from `offset` on.
pub fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    let mut index = offset / 8;
    let skip = (offset % 8) as usize;
    let mut rest = buf;
    if skip != 0 {
        let bytes = word_of_stream(seed, index).to_le_bytes();
        let n = rest.len().min(8 - skip);
        rest[..n].copy_from_slice(&bytes[skip..skip + n]);
        rest = &mut rest[n..];
        index += 1;
    }
    let mut words = rest.chunks_exact_mut(8);
    for chunk in &mut words {
        chunk.copy_from_slice(&word_of_stream(seed, index).to_le_bytes());
        index += 1;
    }
    let last = words.into_remainder();
    let n = last.len();
    last.copy_from_slice(&word_of_stream(seed, index).to_le_bytes()[..n]);
}

/// Checks a stream as it arrives, in pieces of any size.
#[derive(Clone, Debug, Default)]
pub struct Checker {
    seed: u64,
    seen: u64,
    first_mismatch: Option<u64>,
    expected: Vec<u8>,
}

impl Checker {
    /// The next bytes of the stream.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while self.seen < 8 && !bytes.is_empty() {
            self.seed |= u64::from(bytes[0]) << (8 * self.seen);
            self.seen += 1;
            bytes = &bytes[1..];
        }
        for piece in bytes.chunks(4096) {
            if self.first_mismatch.is_none() {
                self.expected.resize(piece.len(), 0);
                fill(self.seed, self.seen, &mut self.expected);
                if piece != self.expected {
                    let at = piece.iter().zip(&self.expected).position(|(a, b)| a != b);
                    self.first_mismatch = at.map(|at| self.seen + at as u64);
                }
            }
            self.seen += piece.len() as u64;
        }
    }

    /// Bytes seen.
    pub fn bytes(&self) -> u64 {
        self.seen
    }

    /// Offset of the first byte that is not the stream's.
    pub fn first_mismatch(&self) -> Option<u64> {
        self.first_mismatch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_gives_the_same_bytes() {
        let mut whole = vec![0; 1000];
        fill(42, 0, &mut whole);
        assert_eq!(whole[..8], 42u64.to_le_bytes());
        for cut in [1, 3, 8, 9, 500, 993] {
            let mut tail = vec![0; 1000 - cut];
            fill(42, cut as u64, &mut tail);
            assert_eq!(tail, whole[cut..]);
        }
    }

    #[test]
    fn the_checker_finds_the_first_wrong_byte() {
        let mut bytes = vec![0; 20_000];
        fill(7, 0, &mut bytes);
        let check = |bytes: &[u8], step: usize| {
            let mut checker = Checker::default();
            bytes.chunks(step).for_each(|piece| checker.push(piece));
            assert_eq!(checker.bytes(), bytes.len() as u64);
            checker.first_mismatch()
        };
        for step in [1, 5, 4096, 20_000] {
            assert_eq!(check(&bytes, step), None);
        }
        let mut missing = bytes.clone();
        missing.remove(12_345);
        assert_eq!(check(&missing, 1448), Some(12_345));
        bytes[19_999] ^= 0x80;
        assert_eq!(check(&bytes, 1448), Some(19_999));
    }
}
