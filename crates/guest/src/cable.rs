//! A cable between two stacks in one process: the [`Link`] without any queue, for tests of what lies above.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::checksum;
use crate::link::{Link, LinkCapabilities};

/// Decides what happens to a frame.
pub type Fault = Box<dyn FnMut(&[u8]) -> Fate + Send>;

/// What the cable does with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Carries it.
    Deliver,
    /// Loses it.
    Drop,
    /// Carries it twice.
    Duplicate,
    /// Flips a bit in its last byte.
    Corrupt,
}

struct Lane {
    frames: Mutex<VecDeque<Vec<u8>>>,
    arrived: EventFd,
}

/// One end of a cable.
pub struct CableEnd {
    capabilities: LinkCapabilities,
    capacity: usize,
    incoming: Arc<Lane>,
    outgoing: Arc<Lane>,
    fds: [RawFd; 1],
    fault: Option<Fault>,
}

/// A cable that holds `capacity` frames each way.
///
/// # Errors
/// When no eventfd can be made.
pub fn cable(capabilities: LinkCapabilities, capacity: usize) -> std::io::Result<(CableEnd, CableEnd)> {
    let lane = || -> std::io::Result<Arc<Lane>> {
        Ok(Arc::new(Lane { frames: Mutex::default(), arrived: EventFd::new(EFD_NONBLOCK)? }))
    };
    let (there, back) = (lane()?, lane()?);
    let end = |incoming: &Arc<Lane>, outgoing: &Arc<Lane>| CableEnd {
        capabilities,
        capacity,
        incoming: incoming.clone(),
        outgoing: outgoing.clone(),
        fds: [incoming.arrived.as_raw_fd()],
        fault: None,
    };
    Ok((end(&back, &there), end(&there, &back)))
}

impl CableEnd {
    /// What this end sends meets `fault`.
    pub fn with_fault(mut self, fault: Fault) -> CableEnd {
        self.fault = Some(fault);
        self
    }
}

impl Link for CableEnd {
    fn capabilities(&self) -> LinkCapabilities {
        self.capabilities
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        while let Some(next) = self.incoming.frames.lock().pop_front() {
            if checksum::verify(&next) {
                *frame = next;
                return true;
            }
        }
        false
    }

    fn can_transmit(&mut self) -> bool {
        self.outgoing.frames.lock().len() < self.capacity
    }

    fn transmit(&mut self, frame: &mut [u8], _segment: Option<u16>) -> bool {
        if !self.can_transmit() {
            return false;
        }
        if self.capabilities.checksum
            && let Some((start, offset)) = checksum::prepare_partial(frame)
        {
            checksum::complete(frame, start, offset);
        }
        let fate = self.fault.as_mut().map_or(Fate::Deliver, |fault| fault(frame));
        let mut frames = self.outgoing.frames.lock();
        match fate {
            Fate::Deliver => frames.push_back(frame.to_vec()),
            Fate::Drop => {}
            Fate::Duplicate => frames.extend([frame.to_vec(), frame.to_vec()]),
            Fate::Corrupt => {
                let mut frame = frame.to_vec();
                if let Some(last) = frame.last_mut() {
                    *last ^= 0x40;
                }
                frames.push_back(frame);
            }
        }
        true
    }

    fn flush(&mut self) {
        if !self.outgoing.frames.lock().is_empty() {
            // It can fail only when the counter is full, and then it is readable already.
            let _ = self.outgoing.arrived.write(1);
        }
    }

    fn prepare_to_sleep(&mut self, until_room: bool) -> bool {
        // Nobody says when the other end has taken a frame.
        self.incoming.frames.lock().is_empty() && !(until_room && self.can_transmit())
    }

    fn wake_fds(&self) -> &[RawFd] {
        &self.fds
    }

    fn awake(&mut self) {
        // An error means that it was not readable.
        let _ = self.incoming.arrived.read();
    }

    fn broken(&self) -> Option<String> {
        None
    }
}
