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
        // More than writev takes: a frame in so many pieces is put together first.
        let mut whole = Vec::new();
        if parts.len() > libc::UIO_MAXIOV as usize {
            frame.append_to(&mut whole);
            parts.truncate(1);
            parts.push(as_iovec(&IoSlice::new(&whole)));
        }
        // SAFETY: header, prefix and copy are locals; the spans' memory is alive while the batch is forwarded, and if a guest
        // has truncated it the kernel answers EFAULT.
        let written = unsafe { libc::writev(self.tap.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::ptr::NonNull;

    use viaduct_memory::Span;

    use super::*;

    #[test]
    fn a_frame_in_more_pieces_than_writev_takes_is_whole() {
        // A socket, like an interface, takes each write as one frame.
        let (near, far) = UnixDatagram::pair().expect("sockets");
        let (_, mut output) = open(near.into()).expect("it can be made non-blocking");
        let mut bytes: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        let pieces: Vec<Span> = bytes.iter_mut().map(|byte| Span::new(NonNull::from(byte), 1)).collect();
        let frame =
            Outgoing { net: 0, csum_offset: 0, prefix: [0; 3], prefix_len: 0, body: &pieces, skip: 0, len: 3000 };
        assert_eq!(output.put(&frame), Put::Done);
        let mut received = vec![0; 4000];
        let len = far.recv(&mut received).expect("a frame");
        assert_eq!(received[NetHeader::LEN..len], bytes);
    }
}
