//! A virtio-net device as the other end of a card's cable: the card's frames go through the virtio driver of this process
//! to whatever implements the device, for example a port of a switch.
//!
//! No offloads are used, even if they were negotiated: what a card sends and takes is complete.

use std::os::fd::RawFd;

use viaduct_guest::driver::{Frame, NetDriver, Offload, Pair};

use super::FrameEnd;

/// Frames received at a time.
const BATCH: usize = 32;

/// The driver, of whose queue pairs the first is used.
pub struct DriverEnd {
    driver: NetDriver,
    frames: Vec<Frame>,
    next: usize,
    broken: Option<String>,
}

impl DriverEnd {
    /// Uses `driver`, which has at least one queue pair.
    pub fn new(driver: NetDriver) -> DriverEnd {
        DriverEnd { driver, frames: Vec::with_capacity(BATCH), next: 0, broken: None }
    }

    fn pair(&mut self) -> &mut Pair {
        &mut self.driver.pairs[0]
    }

    fn failed(&mut self, queue: &str, error: &dyn std::fmt::Display) {
        self.broken.get_or_insert_with(|| format!("{queue} queue: {error}"));
    }
}

impl FrameEnd for DriverEnd {
    fn send(&mut self, frame: &mut [u8]) -> bool {
        if self.pair().transmit.free() == 0 {
            self.pair().transmit.publish();
            match self.pair().transmit.reclaim() {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => {
                    self.failed("transmit", &error);
                    return true;
                }
            }
        }
        // There is a buffer, so what is not sent is longer than the device takes.
        self.pair().transmit.send(frame, Offload::default());
        true
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        if self.next == self.frames.len() {
            self.next = 0;
            self.frames.clear();
            let DriverEnd { driver, frames, .. } = self;
            let receive = &mut driver.pairs[0].receive;
            receive.recycle();
            match receive.receive(frames, BATCH) {
                // Frames that were dropped have buffers, too.
                Ok(0) => receive.recycle(),
                Ok(_) => {}
                Err(error) => self.failed("receive", &error),
            }
        }
        let Some(found) = self.frames.get(self.next) else { return false };
        self.driver.pairs[0].receive.copy(found, frame);
        self.next += 1;
        true
    }

    fn flush(&mut self) {
        self.pair().transmit.publish();
        if self.next == self.frames.len() {
            self.next = 0;
            self.frames.clear();
            self.pair().receive.recycle();
        }
    }

    fn prepare_to_sleep(&mut self, for_frames: bool, for_room: bool) -> bool {
        let frames = for_frames && (self.next < self.frames.len() || self.pair().receive.arm());
        let room = for_room && (self.pair().transmit.free() != 0 || self.pair().transmit.arm());
        !(frames || room)
    }

    fn wake(&self) -> Vec<(RawFd, i16)> {
        self.driver.call_fds().iter().map(|&fd| (fd, libc::POLLIN)).collect()
    }

    fn awake(&mut self) {
        self.pair().receive.disarm();
        self.pair().transmit.disarm();
    }

    fn broken(&self) -> Option<String> {
        if self.driver.faulted() {
            return Some("the memory shared with the back-end was cut short".into());
        }
        self.broken.clone()
    }
}
