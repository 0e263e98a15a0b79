//! The Internet checksum (RFC 1071).
//!
//! # Theory of operation
//!
//! The ones' complement sum of 16-bit words does not depend on their byte order (RFC 1071, 2 (B)): words are added as
//! they lie in memory, and the result is stored as it lies. Nor does it depend on the width in which one adds, as long
//! as carries come back in at the bottom (2 (C)): 32-bit words are added in 64-bit lanes, which have room for the
//! carries of four billion words, and folded at the end. The lanes are independent, so that the compiler makes vectors
//! of them.

/// A sum in progress.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes, the first of which lies at an even distance from the first one of all. An odd number of bytes is
    /// filled up with a zero: only the last call may add one.
    #[inline]
    #[must_use]
    pub fn add_bytes(self, bytes: &[u8]) -> Sum {
        let sum = self.0 + narrow(lanes(bytes));
        Sum(narrow(sum))
    }

    /// Adds one 16-bit number.
    #[inline]
    #[must_use]
    pub fn add_number(self, number: u16) -> Sum {
        Sum(self.0 + u64::from(number.to_be()))
    }

    /// The checksum as its two bytes go into the packet: the complement of the sum.
    #[inline]
    pub fn finish(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// Like [`finish`](Sum::finish), but never zero: that means "no checksum" in UDP over IPv4, and the other form of
    /// zero is as good (RFC 768).
    #[inline]
    pub fn finish_nonzero(self) -> [u8; 2] {
        match self.fold() {
            0xffff => [0xff, 0xff],
            sum => (!sum).to_ne_bytes(),
        }
    }

    #[inline]
    fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

/// To 33 bits, so that sums of sums do not overflow.
#[inline]
fn narrow(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

const LANES: usize = 8;

#[inline]
fn lanes(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= 64 && is_x86_feature_detected!("avx2") {
        // SAFETY: the feature is there.
        return unsafe { lanes_avx2(bytes) };
    }
    lanes_generic(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lanes_avx2(bytes: &[u8]) -> u64 {
    lanes_generic(bytes)
}

#[inline(always)]
fn lanes_generic(bytes: &[u8]) -> u64 {
    let word = |bytes: &[u8]| u64::from(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let mut lanes = [0u64; LANES];
    let (rows, rest) = bytes.split_at(bytes.len() - bytes.len() % (4 * LANES));
    for row in rows.chunks_exact(4 * LANES) {
        for (lane, bytes) in lanes.iter_mut().zip(row.chunks_exact(4)) {
            *lane += word(bytes);
        }
    }
    let mut sum: u64 = lanes.iter().map(|lane| narrow(*lane)).sum();
    let (words, rest) = rest.split_at(rest.len() & !3);
    sum += words.chunks_exact(4).map(word).sum::<u64>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + word(&last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, 4.1, word by word.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn example_of_rfc_1071() {
        // Section 3: the sum is ddf2.
        let sum = Sum::default().add_bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(u16::from_be_bytes(sum.finish()), !0xddf2);
    }

    #[test]
    fn zero_has_two_forms() {
        let sum = Sum::default().add_bytes(&[0xff, 0xff]);
        assert_eq!(sum.finish(), [0, 0]);
        assert_eq!(sum.finish_nonzero(), [0xff, 0xff]);
        assert_eq!(Sum::default().finish_nonzero(), [0xff, 0xff]);
    }

    #[test]
    fn carries_of_the_largest_sum() {
        let bytes = vec![0xff; 1 << 20];
        assert_eq!(u16::from_be_bytes(Sum::default().add_bytes(&bytes).finish()), naive(&bytes));
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_sum(bytes in prop::collection::vec(any::<u8>(), 0..3000), cut in any::<prop::sample::Index>(),
                                     number: u16, extreme: bool) {
            let bytes: Vec<u8> = if extreme { bytes.iter().map(|byte| if byte & 7 == 0 { 0 } else { 255 }).collect() } else { bytes };
            let cut = cut.index(bytes.len() + 1) & !1;
            let sum = Sum::default().add_bytes(&bytes[..cut]).add_number(number).add_bytes(&bytes[cut..]);
            let mut all = number.to_be_bytes().to_vec();
            all.extend(&bytes);
            let wanted = naive(&all);
            prop_assert_eq!(u16::from_be_bytes(sum.finish()), wanted);
            let nonzero = if wanted == 0 { 0xffff } else { wanted };
            prop_assert_eq!(u16::from_be_bytes(sum.finish_nonzero()), nonzero);
        }
    }
}
