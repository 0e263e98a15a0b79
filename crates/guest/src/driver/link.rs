//! The driver as the stack's [`Link`].

use std::os::fd::RawFd;

use viaduct_ring::RingError;
use viaduct_switch::net_header::{DATA_VALID, NEEDS_CSUM};

use super::{Frame, NetDriver, Offload};
use crate::link::{Link, LinkCapabilities, LinkCounters};
use crate::{checksum, features};

/// The driver and the frames that were received together and are handed over one by one.
pub struct DriverLink {
    driver: NetDriver,
    frames: Vec<Frame>,
    /// Which of them comes next, and the queue pair they are from.
    next: usize,
    from: usize,
}

/// Frames received at a time.
const BATCH: usize = 32;

impl DriverLink {
    /// A link over `driver`.
    pub fn new(driver: NetDriver) -> DriverLink {
        DriverLink { driver, frames: Vec::with_capacity(BATCH), next: 0, from: 0 }
    }

    /// Receives the next batch from the first pair, after the last one, that has any.
    fn refill(&mut self) -> bool {
        self.frames.clear();
        self.next = 0;
        self.driver.pairs[self.from].receive.recycle();
        for _ in 0..self.driver.pairs.len() {
            self.from = (self.from + 1) % self.driver.pairs.len();
            let result = self.driver.pairs[self.from].receive.receive(&mut self.frames, BATCH);
            match self.driver.check("receive", self.from, result) {
                Some(1..) => return true,
                // Frames that were dropped have buffers, too.
                _ => self.driver.pairs[self.from].receive.recycle(),
            }
        }
        false
    }
}

impl NetDriver {
    /// Remembers what broke a queue.
    fn check<T>(&mut self, kind: &str, pair: usize, result: Result<T, RingError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let index = 2 * pair + usize::from(kind == "transmit");
                self.broken.get_or_insert_with(|| format!("queue {index} ({kind}): {error}"));
                None
            }
        }
    }

    /// Packets of one flow stay on one queue, so they stay in order.
    fn pair_for(&self, frame: &[u8]) -> usize {
        if self.pairs.len() == 1 {
            return 0;
        }
        // The last bytes of both IP addresses and the ports, wherever they stand in this IP version.
        let hash = checksum::transport(frame).map_or(0, |t| {
            frame[t.start - 8..t.start + 4].iter().fold(0usize, |h, &b| h.wrapping_mul(31).wrapping_add(b.into()))
        });
        hash % self.pairs.len()
    }
}

impl Link for DriverLink {
    fn capabilities(&self) -> LinkCapabilities {
        let has = |bit| self.driver.features & bit != 0;
        LinkCapabilities {
            mtu: self.driver.mtu,
            checksum: has(features::NET_CSUM),
            segmentation: has(features::NET_CSUM) && has(features::NET_HOST_TSO4),
        }
    }

    fn receive(&mut self, bytes: &mut Vec<u8>) -> bool {
        loop {
            if self.next == self.frames.len() && !self.refill() {
                return false;
            }
            let frame = self.frames[self.next];
            self.next += 1;
            self.driver.pairs[self.from].receive.copy(&frame, bytes);
            // Nobody vouches for the others (virtio 1.2, 5.1.6.4.1). For a frame that needs its checksum completed there
            // is none to verify: it has not left the host.
            if frame.header.flags & (NEEDS_CSUM | DATA_VALID) != 0 || checksum::verify(bytes) {
                return true;
            }
            LinkCounters::add(&self.driver.counters.rx_bad_checksum, 1);
        }
    }

    fn can_transmit(&mut self) -> bool {
        // The pair is not known before the frame is, so there has to be room in each.
        (0..self.driver.pairs.len()).all(|pair| {
            let transmit = &mut self.driver.pairs[pair].transmit;
            if transmit.free() > transmit.capacity() / 2 {
                return true;
            }
            let result = transmit.reclaim();
            self.driver.check("transmit", pair, result).is_some_and(|free| free > 0)
        })
    }

    fn transmit(&mut self, frame: &mut [u8], segment: Option<u16>) -> bool {
        let offload = Offload { checksum: self.driver.features & features::NET_CSUM != 0, segment };
        let pair = self.driver.pair_for(frame);
        let transmit = &mut self.driver.pairs[pair].transmit;
        if transmit.free() == 0 {
            transmit.publish();
            let result = transmit.reclaim();
            self.driver.check("transmit", pair, result);
        }
        let sent = self.driver.pairs[pair].transmit.send(frame, offload);
        if !sent {
            LinkCounters::add(&self.driver.counters.tx_full, 1);
        }
        sent
    }

    fn flush(&mut self) {
        for pair in &mut self.driver.pairs {
            pair.transmit.publish();
        }
        if self.next == self.frames.len() {
            self.frames.clear();
            self.next = 0;
            self.driver.pairs[self.from].receive.recycle();
        }
    }

    fn prepare_to_sleep(&mut self, until_room: bool) -> bool {
        let mut idle = self.next == self.frames.len();
        for pair in &mut self.driver.pairs {
            idle &= !pair.receive.arm();
            if until_room {
                idle &= pair.transmit.free() != 0 || !pair.transmit.arm();
            }
        }
        idle
    }

    fn wake_fds(&self) -> &[RawFd] {
        &self.driver.fds
    }

    fn awake(&mut self) {
        for pair in &mut self.driver.pairs {
            pair.receive.disarm();
            pair.transmit.disarm();
        }
    }

    fn broken(&self) -> Option<String> {
        if self.driver.faulted() {
            return Some("the memory shared with the back-end was cut short".into());
        }
        self.driver.broken.clone()
    }
}
