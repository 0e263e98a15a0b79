//! A tap interface of the host as the other end of a card's cable. It has no virtio-net header (no IFF_VNET_HDR): an
//! emulated card and the kernel exchange frames as a wire would carry them.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::FrameEnd;

/// Longest frame that is read: what does not fit was longer than any card takes.
const LONGEST: usize = 16_384;

/// One end of an interface.
pub struct TapEnd {
    tap: File,
    for_frames: bool,
    for_room: bool,
    broken: Option<String>,
}

impl TapEnd {
    /// Uses `tap` (IFF_TAP, IFF_NO_PI), which is set to non-blocking.
    ///
    /// # Errors
    /// The system's, if the descriptor does not allow that.
    pub fn new(tap: OwnedFd) -> std::io::Result<TapEnd> {
        // SAFETY: plain fcntl calls on a descriptor that we own.
        let set = unsafe {
            let flags = libc::fcntl(tap.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(tap.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
        };
        if !set {
            return Err(std::io::Error::last_os_error());
        }
        Ok(TapEnd { tap: tap.into(), for_frames: false, for_room: false, broken: None })
    }

    fn failed(&mut self, what: &str, error: &std::io::Error) {
        self.broken.get_or_insert_with(|| format!("{what} the interface failed: {error}; was it deleted?"));
    }
}

impl FrameEnd for TapEnd {
    fn send(&mut self, frame: &mut [u8]) -> bool {
        match self.tap.write(frame) {
            Ok(_) => true,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => false,
            // The interface is down, or does not like the frame: nobody receives it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => true,
            Err(error) => {
                self.failed("writing to", &error);
                true
            }
        }
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        frame.resize(LONGEST, 0);
        match self.tap.read(frame) {
            Ok(len) if len > 0 => {
                frame.truncate(len);
                return true;
            }
            Ok(_) => self.failed("reading from", &ErrorKind::UnexpectedEof.into()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // The interface is down.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            Err(error) => self.failed("reading from", &error),
        }
        frame.clear();
        false
    }

    fn flush(&mut self) {}

    fn prepare_to_sleep(&mut self, for_frames: bool, for_room: bool) -> bool {
        (self.for_frames, self.for_room) = (for_frames, for_room);
        true
    }

    fn wake(&self) -> Vec<(RawFd, i16)> {
        let frames = if self.for_frames { libc::POLLIN } else { 0 };
        let room = if self.for_room { libc::POLLOUT } else { 0 };
        if self.broken.is_some() { Vec::new() } else { vec![(self.tap.as_raw_fd(), frames | room)] }
    }

    fn awake(&mut self) {}

    fn broken(&self) -> Option<String> {
        self.broken.clone()
    }
}
