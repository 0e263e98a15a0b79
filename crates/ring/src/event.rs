//! Notification suppression: when one side wants to hear from the other.
//!
//! Both sides play the same game. Whoever publishes writes its index (or flags), then reads what the other side asked
//! for; whoever goes to sleep writes what it asks for, then reads the index (or flags) again. With a full fence between
//! each write and read at least one of the two sees the other's write, so no wake-up is lost (virtio 1.2, 2.7.7,
//! 2.7.10, 2.8.10 and 2.8.21.3.1).

use std::sync::atomic::Ordering;

use viaduct_memory::access::{load_u32, store_u32};

use crate::descriptor::Position;

/// Split: `flags` of the available ring, "do not interrupt", or of the used ring, "do not notify".
pub(crate) const SUPPRESS: u16 = 1;

/// Orders all earlier writes before all later reads, the one order that x86 does not give for free.
#[inline(always)]
pub(crate) fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

/// Whether an index that goes from `old` to `new` passes `event` (virtio 1.2, 2.7.7.2): the other side wants to hear of
/// the entry at `event`, so `event + 1` lies in `old + 1 ..= new`, all modulo 2^16.
#[inline(always)]
pub(crate) const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A packed event suppression structure (virtio 1.2, 2.8.14), read or written in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suppression {
    /// RING_EVENT_FLAGS_ENABLE
    Enable,
    /// RING_EVENT_FLAGS_DISABLE
    Disable,
    /// RING_EVENT_FLAGS_DESC: when the descriptor at this position changes.
    At(Position),
}

impl Suppression {
    /// Reads the structure.
    ///
    /// # Safety
    /// `at` is mapped and aligned to 4.
    #[inline(always)]
    pub unsafe fn load(at: *const u8) -> Suppression {
        // SAFETY: given by the caller.
        let value = unsafe { load_u32(at.cast(), Ordering::Relaxed) };
        match value >> 16 & 3 {
            1 => Suppression::Disable,
            2 => Suppression::At(Position::decode(value as u16)),
            // 3 is reserved; a notification too many does no harm.
            _ => Suppression::Enable,
        }
    }

    /// Writes the structure.
    ///
    /// # Safety
    /// As for [`load`](Suppression::load).
    #[inline(always)]
    pub unsafe fn store(self, at: *mut u8) {
        let value = match self {
            Suppression::Enable => 0,
            Suppression::Disable => 1 << 16,
            Suppression::At(position) => 2 << 16 | u32::from(position.encode()),
        };
        // SAFETY: given by the caller.
        unsafe { store_u32(at.cast(), value, Ordering::Relaxed) }
    }

    /// Whether the other side wants to hear that `slots` descriptors from `old` on have changed.
    #[inline(always)]
    pub const fn wants(self, old: Position, slots: u32, size: u16) -> bool {
        match self {
            Suppression::Enable => true,
            Suppression::Disable => false,
            Suppression::At(event) => {
                // How far ahead of `old` the event lies: in this lap if the wrap counters agree, else in the next one.
                // An event that lies behind is from an earlier lap; the subtraction makes it very large.
                let lap = if event.wrap == old.wrap { 0 } else { size as u32 };
                (event.index as u32 + lap).wrapping_sub(old.index as u32) < slots
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sentence of the specification, entry by entry.
    fn passes(event: u16, new: u16, old: u16) -> bool {
        let mut index = old;
        while index != new {
            if index == event {
                return true;
            }
            index = index.wrapping_add(1);
        }
        false
    }

    #[test]
    fn split_event_is_the_entry_that_is_passed() {
        for old in [0u16, 1, 5, 32767, 32768, 65530, 65535] {
            for count in [0u16, 1, 2, 7, 255] {
                for distance in -3i32..=260 {
                    let event = old.wrapping_add(distance as u16);
                    let new = old.wrapping_add(count);
                    assert_eq!(need_event(event, new, old), passes(event, new, old), "{event} {new} {old}");
                }
            }
        }
    }

    #[test]
    fn packed_event_is_the_slot_that_is_passed() {
        for size in [1u16, 2, 3, 5, 8] {
            for start in 0..2 * size {
                for slots in 0..=size {
                    for event in 0..2 * size {
                        let position = |lap: u16| Position { index: lap % size, wrap: (lap / size).is_multiple_of(2) };
                        let passed = (0..slots).any(|i| position(start + i) == position(event));
                        let wants = Suppression::At(position(event)).wants(position(start), slots.into(), size);
                        assert_eq!(wants, passed, "size {size} start {start} slots {slots} event {event}");
                    }
                }
            }
        }
    }

    #[test]
    fn suppression_is_laid_out_as_the_specification_draws_it() {
        let mut value = 0u32;
        let at = (&raw mut value).cast::<u8>();
        let event = Suppression::At(Position { index: 0x1234, wrap: true });
        // SAFETY: a local, aligned to 4.
        unsafe {
            event.store(at);
            assert_eq!(Suppression::load(at), event);
        }
        assert_eq!(value.to_le_bytes(), [0x34, 0x92, 2, 0]);
    }
}
