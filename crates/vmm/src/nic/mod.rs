//! Emulated network cards: registers that a stock driver writes, and an end from which frames leave and come.

mod dma;
mod driver_end;
pub mod e1000;
mod tap_end;

use std::os::fd::RawFd;

pub use driver_end::DriverEnd;
pub use tap_end::TapEnd;

/// The other end of a card's cable. One thread uses it.
///
/// Frames are whole: Ethernet header, payload, all checksums in place, no frame check sequence.
pub trait FrameEnd: Send {
    /// Sends a frame. `false`: there is no room for it now.
    fn send(&mut self, frame: &mut [u8]) -> bool;

    /// Replaces `frame` by the next one received. `false`: there is none.
    fn receive(&mut self, frame: &mut Vec<u8>) -> bool;

    /// Hands over what was sent, and gives back what was received.
    fn flush(&mut self);

    /// From now on [`wake`](FrameEnd::wake) wakes for received frames, if `for_frames`, and for room to send, if `for_room`.
    /// Returns whether there is nothing of these already.
    fn prepare_to_sleep(&mut self, for_frames: bool, for_room: bool) -> bool;

    /// What to poll for, as descriptors and events of `poll`.
    fn wake(&self) -> Vec<(RawFd, i16)>;

    /// Undoes [`prepare_to_sleep`](FrameEnd::prepare_to_sleep).
    fn awake(&mut self);

    /// Why it cannot be used any more, if so.
    fn broken(&self) -> Option<String>;
}
