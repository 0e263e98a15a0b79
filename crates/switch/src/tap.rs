//! A queue of a tap interface. Frames cross with a virtio-net header of 12 bytes in front (IFF_VNET_HDR), so checksum
//! and segmentation offloads travel between guests and the kernel as they do between guests.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use viaduct_ring::Batch;

use crate::counters::DropReason;
use crate::frame::Outgoing;
use crate::frame_pool::FramePool;
use crate::net_header::NetHeader;
use crate::sink::{Put, Sink};

/// The kernel transmits on the interface, we receive.
#[derive(Debug)]
pub(crate) struct TapInput {
    tap: Arc<File>,
    pool: FramePool,
}

impl TapInput {
    pub fn receive(&mut self, batch: &mut Batch, max: usize) -> Result<usize, String> {
        let mut tap = &*self.tap;
        self.pool
            .receive(batch, max, |slot| match tap.read(slot) {
                Ok(len) => Ok(Some(len)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
                Err(error) => Err(error),
            })
            .map_err(|error| format!("reading the interface failed: {error}; was it deleted?"))
    }

    pub fn release(&mut self, count: usize) {
        self.pool.release(count);
    }

    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }
}

/// We transmit, the kernel receives on the interface.
#[derive(Debug)]
pub(crate) struct TapOutput {
    tap: Arc<File>,
}

/// Both directions of a tap queue. The file is set to non-blocking.
pub(crate) fn open(tap: OwnedFd) -> std::io::Result<(TapInput, TapOutput)> {
    // SAFETY: plain fcntl calls on a descriptor that we own.
    let set = unsafe {
        let flags = libc::fcntl(tap.as_raw_fd(), libc::F_GETFL);
        flags >= 0 && libc::fcntl(tap.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
    };
    if !set {
        return Err(std::io::Error::last_os_error());
    }
    let tap = Arc::new(File::from(tap));
    Ok((TapInput { tap: tap.clone(), pool: FramePool::new() }, TapOutput { tap }))
}

impl Sink for TapOutput {
    fn reserve(&mut self, _frames: usize) {}

    fn put(&mut self, frame: &Outgoing) -> Put {
        let header = NetHeader::from_words(frame.net, u32::from(frame.csum_offset)).encode();
        let prefix = frame.prefix_bytes();
        let mut parts: Vec<libc::iovec> = [IoSlice::new(&header), IoSlice::new(&prefix[..frame.prefix_len as usize])]
            .map(|part| as_iovec(&part))
            .into();
        parts.extend(
            frame.rest().map(|span| libc::iovec { iov_base: span.as_ptr().cast(), iov_len: span.len() as usize }),
        );
        // SAFETY: header and prefix are locals; the spans' memory is alive while the batch is forwarded, and if a guest
        // has truncated it the kernel answers EFAULT.
        let written =
            unsafe { libc::writev(self.tap.as_raw_fd(), parts.as_ptr(), parts.len().min(1024) as libc::c_int) };
        if written >= 0 {
            return Put::Done;
        }
        match std::io::Error::last_os_error().kind() {
            ErrorKind::WouldBlock => Put::Full,
            _ => Put::Failed(DropReason::Io),
        }
    }

    fn flush(&mut self) -> bool {
        false
    }
}

fn as_iovec(slice: &IoSlice) -> libc::iovec {
    libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() }
}
