//! The opaque copy: `memcpy` for memory that others write meanwhile.
//!
//! # Theory of operation
//!
//! Calling `memcpy` on such memory is a data race, which the language leaves undefined: the compiler may merge the copy
//! with later reads of the source and so undo the rule "read once, check, use". Here each load and store is an `asm!`
//! statement, which the compiler must carry out once, in its place, knowing nothing about the value.
//!
//! Lengths up to 64 bytes (headers, small frames) are done by pairs of overlapping moves, larger ones by a function with the widest vectors
//! the processor has. There is no loop over single bytes: a length between two powers of two is covered by loads from
//! both ends that overlap in the middle, all made before the first store. Long copies go by four vectors a round, with
//! the stores aligned, and an overlapping end.
//!
//! Architectures other than x86-64 copy by volatile words or bytes.

/// Copies `len` bytes between places of which either may be guest memory that others write at the same time.
///
/// # Safety
/// `src` must be mapped for reads and `dst` for writes over `len` bytes, and they must not overlap.
#[inline(always)]
pub unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: given by the caller.
    unsafe {
        x86_64::copy(dst, src, len);
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: given by the caller.
    unsafe {
        portable::copy(dst, src, len);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;
    use std::arch::x86_64::{__m128i, __m256i, __m512i};
    use std::sync::atomic::{AtomicU8, Ordering};

    /// Declares an opaque load and store of one width.
    macro_rules! move_through {
        ($value:ty, $class:ident, $load_op:literal, $store_op:literal, $load:ident, $store:ident $(, $feature:literal)?) => {
            // SAFETY: `src` must be mapped for reads over the width.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            unsafe fn $load(src: *const u8) -> $value {
                let value;
                // SAFETY: the caller's promise.
                unsafe {
                    asm!($load_op, value = out($class) value, src = in(reg) src,
                         options(nostack, preserves_flags, readonly));
                }
                value
            }

            // SAFETY: `dst` must be mapped for writes over the width.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            unsafe fn $store(dst: *mut u8, value: $value) {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!($store_op, value = in($class) value, dst = in(reg) dst,
                         options(nostack, preserves_flags));
                }
            }
        };
    }

    move_through!(u8, reg_byte, "mov {value}, byte ptr [{src}]", "mov byte ptr [{dst}], {value}", load1, store1);
    move_through!(u16, reg, "movzx {value:e}, word ptr [{src}]", "mov word ptr [{dst}], {value:x}", load2, store2);
    move_through!(u32, reg, "mov {value:e}, dword ptr [{src}]", "mov dword ptr [{dst}], {value:e}", load4, store4);
    move_through!(u64, reg, "mov {value}, qword ptr [{src}]", "mov qword ptr [{dst}], {value}", load8, store8);
    move_through!(
        __m128i,
        xmm_reg,
        "movdqu {value}, xmmword ptr [{src}]",
        "movdqu xmmword ptr [{dst}], {value}",
        load16,
        store16
    );
    move_through!(
        __m256i,
        ymm_reg,
        "vmovdqu {value}, ymmword ptr [{src}]",
        "vmovdqu ymmword ptr [{dst}], {value}",
        load32,
        store32,
        "avx"
    );
    move_through!(
        __m512i,
        zmm_reg,
        "vmovdqu64 {value}, zmmword ptr [{src}]",
        "vmovdqu64 zmmword ptr [{dst}], {value}",
        load64,
        store64,
        "avx512f"
    );

    /// Two values of one width, from both ends.
    macro_rules! both_ends {
        ($dst:ident, $src:ident, $len:ident, $width:literal, $load:ident, $store:ident) => {{
            let (first, last) = ($load($src), $load($src.add($len - $width)));
            $store($dst, first);
            $store($dst.add($len - $width), last);
        }};
    }

    /// As for [`super::copy`]. What is left of the shortest Ethernet frame behind its head goes by the first branch.
    // SAFETY: as for `super::copy`.
    #[inline(always)]
    pub(super) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: every access lies in the first `len` bytes, by the comparison above it.
        unsafe {
            if len.wrapping_sub(33) <= 64 - 33 {
                let values = [load16(src), load16(src.add(16)), load16(src.add(len - 32)), load16(src.add(len - 16))];
                store16(dst, values[0]);
                store16(dst.add(16), values[1]);
                store16(dst.add(len - 32), values[2]);
                store16(dst.add(len - 16), values[3]);
            } else if len > 64 {
                long(dst, src, len);
            } else {
                short(dst, src, len);
            }
        }
    }

    // SAFETY: as for `super::copy`; `len` must be at most 32.
    #[inline(never)]
    unsafe fn short(dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: every access lies in the first `len` bytes, by the comparison above it.
        unsafe {
            if len >= 16 {
                both_ends!(dst, src, len, 16, load16, store16);
            } else if len >= 8 {
                both_ends!(dst, src, len, 8, load8, store8);
            } else if len >= 4 {
                both_ends!(dst, src, len, 4, load4, store4);
            } else if len >= 2 {
                both_ends!(dst, src, len, 2, load2, store2);
            } else if len == 1 {
                store1(dst, load1(src));
            }
        }
    }

    /// Which way to take for long copies.
    static WAY: AtomicU8 = AtomicU8::new(UNKNOWN);
    const UNKNOWN: u8 = 0;
    const SSE2: u8 = 1;
    const AVX: u8 = 2;
    const AVX512: u8 = 3;
    /// Added to the others: `rep movsb` is fast.
    const ERMS: u8 = 4;
    /// From here on `rep movsb`, where it is fast, moves whole cache lines and beats vectors unless everything is in
    /// L1.
    const ERMS_FROM: usize = 16 << 10;

    #[cold]
    fn detect() -> u8 {
        // The first processors with AVX-512 lower their clock when its registers are used; VBMI2 marks the later ones.
        let vectors = if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vbmi2") {
            AVX512
        } else if is_x86_feature_detected!("avx") {
            AVX
        } else {
            SSE2
        };
        let way = vectors | if is_x86_feature_detected!("ermsb") { ERMS } else { 0 };
        WAY.store(way, Ordering::Relaxed);
        way
    }

    // SAFETY: as for `super::copy`; `len` must be more than 64.
    #[inline(never)]
    unsafe fn long(dst: *mut u8, src: *const u8, len: usize) {
        let mut way = WAY.load(Ordering::Relaxed);
        if way == UNKNOWN {
            way = detect();
        }
        // SAFETY: `len` is more than 64, and the features are there.
        unsafe {
            if len >= ERMS_FROM && way & ERMS != 0 {
                return by_string(dst, src, len);
            }
            match way & !ERMS {
                AVX512 => by_64::long(dst, src, len),
                AVX => by_32::long(dst, src, len),
                _ => by_16::long(dst, src, len),
            }
        }
    }

    // SAFETY: as for `super::copy`.
    unsafe fn by_string(dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: the caller's promise; the direction flag is clear in all Rust code.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rsi") src => _, inout("rdi") dst => _,
                 options(nostack, preserves_flags));
        }
    }

    /// Declares the copy of more than two vectors of `$width` bytes.
    macro_rules! long {
        ($name:ident, $width:literal, $value:ty, $load:ident, $store:ident $(, $feature:literal)?) => {
            mod $name {
                use super::*;
                const W: usize = $width;

                // SAFETY: `src` must be mapped for reads over four vectors.
                #[inline]
                $(#[target_feature(enable = $feature)])?
                unsafe fn load4(src: *const u8) -> [$value; 4] {
                    // SAFETY: the caller's promise.
                    unsafe { [$load(src), $load(src.add(W)), $load(src.add(2 * W)), $load(src.add(3 * W))] }
                }

                // SAFETY: `dst` must be mapped for writes over four vectors.
                #[inline]
                $(#[target_feature(enable = $feature)])?
                unsafe fn store4(dst: *mut u8, values: [$value; 4]) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        $store(dst, values[0]);
                        $store(dst.add(W), values[1]);
                        $store(dst.add(2 * W), values[2]);
                        $store(dst.add(3 * W), values[3]);
                    }
                }

                // SAFETY: as for `super::copy`; `len` must be at least one vector's width.
                $(#[target_feature(enable = $feature)])?
                pub(super) unsafe fn long(dst: *mut u8, src: *const u8, len: usize) {
                    // SAFETY: the accesses lie in the first `len` bytes by the comparisons; in the loop, because it
                    // ends where the last four vectors begin or less than four before.
                    unsafe {
                        if len <= 2 * W {
                            return both_ends!(dst, src, len, $width, $load, $store);
                        }
                        let end = [
                            $load(src.add(len - 2 * W)),
                            $load(src.add(len - W)),
                        ];
                        if len <= 4 * W {
                            let start = [$load(src), $load(src.add(W))];
                            $store(dst, start[0]);
                            $store(dst.add(W), start[1]);
                        } else {
                            let end4 = [$load(src.add(len - 4 * W)), $load(src.add(len - 3 * W))];
                            let start = $load(src);
                            // The first vector goes where the destination begins, the others where it is aligned.
                            let mut at = W - (dst as usize) % W;
                            $store(dst, start);
                            // A round's loads come before the stores of the round before it: where source and
                            // destination lie alike in their pages, a load right behind a store would be taken for its
                            // reader and wait.
                            if at < len - 4 * W {
                                let mut values = load4(src.add(at));
                                while at + 4 * W < len - 4 * W {
                                    let next = load4(src.add(at + 4 * W));
                                    store4(dst.add(at), values);
                                    values = next;
                                    at += 4 * W;
                                }
                                store4(dst.add(at), values);
                            }
                            $store(dst.add(len - 4 * W), end4[0]);
                            $store(dst.add(len - 3 * W), end4[1]);
                        }
                        $store(dst.add(len - 2 * W), end[0]);
                        $store(dst.add(len - W), end[1]);
                    }
                }
            }
        };
    }

    long!(by_16, 16, __m128i, load16, store16);
    long!(by_32, 32, __m256i, load32, store32, "avx");
    long!(by_64, 64, __m512i, load64, store64, "avx512f");

    #[cfg(test)]
    pub(super) mod tests {
        use super::*;

        /// Every way this processor has: its name, the least length it takes, and itself.
        pub(in super::super) type Way = (&'static str, usize, unsafe fn(*mut u8, *const u8, usize));

        pub(in super::super) fn ways() -> Vec<Way> {
            let mut ways: Vec<Way> = vec![("copy", 0, copy), ("sse2", 16, by_16::long), ("string", 0, by_string)];
            if is_x86_feature_detected!("avx") {
                // SAFETY: the feature is there; the rest is given by the caller.
                ways.push(("avx", 32, |dst, src, len| unsafe { by_32::long(dst, src, len) }));
            }
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the feature is there; the rest is given by the caller.
                ways.push(("avx512", 64, |dst, src, len| unsafe { by_64::long(dst, src, len) }));
            }
            ways
        }
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable {
    /// As for [`super::copy`].
    // SAFETY: as for `super::copy`.
    pub(super) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
        const WORD: usize = size_of::<usize>();
        // Words where both can be aligned together, bytes before, behind, and otherwise.
        let head =
            if (dst as usize ^ src as usize).is_multiple_of(WORD) { (src.align_offset(WORD)).min(len) } else { len };
        let words = (len - head) / WORD;
        // SAFETY: all places lie in the first `len` bytes, and those of words are aligned.
        unsafe {
            bytes(dst, src, head);
            for word in 0..words {
                let at = head + word * WORD;
                dst.add(at).cast::<usize>().write_volatile(src.add(at).cast::<usize>().read_volatile());
            }
            let done = head + words * WORD;
            bytes(dst.add(done), src.add(done), len - done);
        }
    }

    // SAFETY: as for `super::copy`.
    unsafe fn bytes(dst: *mut u8, src: *const u8, len: usize) {
        for at in 0..len {
            // SAFETY: the caller's promise.
            unsafe { dst.add(at).write_volatile(src.add(at).read_volatile()) };
        }
    }
}

#[cfg(test)]
mod tests {
    /// All lengths around every boundary, at all alignments that matter, on every way: exact, and nothing beside.
    #[test]
    fn copies_exactly() {
        const ROOM: usize = 128;
        let lengths = (0..=600).chain([1500, 1514, 2047, 4096, 9000, 16383, 16384, 16385, 65536, 65537]);
        let mut ways = vec![("portable", 0, super::portable::copy as unsafe fn(*mut u8, *const u8, usize))];
        #[cfg(target_arch = "x86_64")]
        ways.extend(super::x86_64::tests::ways());
        let source: Vec<u8> = (0..66_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut target = vec![0u8; 66_000 + ROOM];
        for len in lengths {
            for (name, least, way) in &ways {
                if len < *least {
                    continue;
                }
                for (from, to) in [(0, 0), (1, 0), (0, 1), (10, 12), (7, 63), (64, 33), (31, 17)] {
                    let used = &mut target[..to + len + ROOM];
                    used.fill(0xEE);
                    // SAFETY: both ranges lie inside their vectors.
                    unsafe { way(used.as_mut_ptr().add(to), source.as_ptr().add(from), len) };
                    assert!(used[..to].iter().all(|byte| *byte == 0xEE), "{name}, {len}: before");
                    assert!(used[to..to + len] == source[from..from + len], "{name}, {len}, {from} -> {to}");
                    assert!(used[to + len..].iter().all(|byte| *byte == 0xEE), "{name}, {len}: behind");
                }
            }
        }
    }
}
