//! The devices of a PC that a guest expects without looking: serial port, clock, the registers that reset and switch off,
//! and those by which a guest says how it ended.
//!
//! None of them takes a lock that somebody holds for long, and none knows who owns the machine: what concerns all of it is
//! a [`Request`] to the [`Owner`], which may come from any vCPU's thread.

mod debug_exit;
mod i8042;
mod line;
mod pvpanic;
mod reset_control;
pub mod rtc;
pub mod serial;
mod sleep_control;

pub use debug_exit::DebugExit;
pub use i8042::{I8042, I8042State};
pub use line::Line;
pub use pvpanic::Pvpanic;
pub use reset_control::{ResetControl, ResetControlState};
pub use rtc::{Rtc, RtcState};
pub use serial::{Serial, SerialState};
pub use sleep_control::{S5, SleepControl, SleepControlState};

/// What a device asks of the whole machine on the guest's behalf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// The guest resets the machine.
    Reset,
    /// The guest switches the machine off.
    PowerOff,
    /// The guest's kernel has panicked (QEMU, `docs/specs/pvpanic`: bit 0).
    Panicked,
    /// The guest's kernel has panicked, and its crash kernel takes over (bit 1).
    CrashLoaded,
    /// The guest ends the machine with a value.
    Exit(u32),
}

/// Who a device tells what the guest wants. Called by vCPU threads, with no lock of the device held.
pub trait Owner: Send + Sync {
    /// `device` is the name of the device that the guest asked. The vCPU goes on when this returns.
    fn request(&self, device: &str, request: Request);
}

impl<F: Fn(&str, Request) + Send + Sync> Owner for F {
    fn request(&self, device: &str, request: Request) {
        self(device, request);
    }
}

/// A saved state that no device can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved state of {device} is not one it can have: {what}; it was saved by something else, or is damaged")]
pub struct BadState {
    /// Whose state it would be.
    pub device: &'static str,
    /// What is wrong.
    pub what: String,
}

/// The little-endian value of an access of any width; what does not fit is cut off.
fn value(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

#[cfg(test)]
pub(crate) mod mock;
