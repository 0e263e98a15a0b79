//! Time as the pollers measure it: processor ticks, read without a system call.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The tick counter. Monotonic on one processor and, on anything that runs Linux today, across them.
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: RDTSC has no preconditions outside of a sandbox that forbids it.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// Ticks in a second, measured once (takes a millisecond the first time).
pub fn ticks_per_second() -> u64 {
    static RATE: OnceLock<u64> = OnceLock::new();
    *RATE.get_or_init(|| {
        if !cfg!(target_arch = "x86_64") {
            return 1_000_000_000;
        }
        let (began, from) = (Instant::now(), ticks());
        while began.elapsed() < Duration::from_millis(1) {
            std::hint::spin_loop();
        }
        let (spent, to) = (began.elapsed(), ticks());
        ((u128::from(to - from) * 1_000_000_000) / spent.as_nanos().max(1)) as u64
    })
}

/// A duration in ticks.
pub fn in_ticks(duration: Duration) -> u64 {
    ((u128::from(ticks_per_second()) * duration.as_nanos()) / 1_000_000_000) as u64
}
