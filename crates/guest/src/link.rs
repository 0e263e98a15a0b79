//! What the stack needs of a network interface card: frames in, frames out, and a way to sleep until something happens.
//!
//! Two things implement it: the virtio-net driver, and for tests a cable between two stacks in one process.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the link does for the stack and what it can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkCapabilities {
    /// Largest IP packet.
    pub mtu: usize,
    /// Frames may be handed over with only the pseudo-header's sum in their TCP or UDP checksum.
    pub checksum: bool,
    /// TCP over IPv4 may be handed over in segments longer than the MTU.
    pub segmentation: bool,
}

/// A network interface as the stack sees it.
pub trait Link: Send {
    /// What it can do; constant for the life of the link.
    fn capabilities(&self) -> LinkCapabilities;

    /// Replaces `frame` with the next frame received, whose transport checksum is known to be good. `false`: there is
    /// none.
    fn receive(&mut self, frame: &mut Vec<u8>) -> bool;

    /// Whether [`transmit`](Link::transmit) has room for a frame.
    fn can_transmit(&mut self) -> bool;

    /// Stages a frame. With `checksum` its checksum is zero and the link's to fill in; with `segment` it is a TCP packet
    /// to be cut into segments of so many payload bytes. `false`: no room, and the frame is dropped and counted.
    fn transmit(&mut self, frame: &mut [u8], segment: Option<u16>) -> bool;

    /// Hands over what was staged and gives back what was received.
    fn flush(&mut self);

    /// Arms the file descriptors: for received frames, and with `until_room` for room to transmit as well. `false`: there
    /// is work already, sleeping would miss it.
    fn prepare_to_sleep(&mut self, until_room: bool) -> bool;

    /// What becomes readable when there is work.
    fn wake_fds(&self) -> &[RawFd];

    /// Undoes [`prepare_to_sleep`](Link::prepare_to_sleep) and drains the file descriptors.
    fn awake(&mut self);

    /// Why the link cannot be used any more, if so.
    fn broken(&self) -> Option<String>;
}

/// Counts of one link. They go on when the link is replaced. One thread writes, any reads.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Frames received.
    pub rx_frames: AtomicU64,
    /// Bytes of these, virtio-net header not counted.
    pub rx_bytes: AtomicU64,
    /// Frames sent.
    pub tx_frames: AtomicU64,
    /// Bytes of these.
    pub tx_bytes: AtomicU64,
    /// Received frames dropped: TCP or UDP checksum wrong and nobody had vouched for it.
    pub rx_bad_checksum: AtomicU64,
    /// Received frames dropped: the device used an offload that was not negotiated, or a header that contradicts itself.
    pub rx_violations: AtomicU64,
    /// Frames dropped because the transmit ring was full.
    pub tx_full: AtomicU64,
    /// Kicks sent to the device.
    pub kicks: AtomicU64,
    /// Times that the thread slept.
    pub sleeps: AtomicU64,
}

impl LinkCounters {
    /// Adds to a counter of which this thread is the only writer: a plain load and store, no locked instruction.
    #[inline]
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Names and values.
    pub fn snapshot(&self) -> [(&'static str, u64); 9] {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        [
            ("rx_frames", get(&self.rx_frames)),
            ("rx_bytes", get(&self.rx_bytes)),
            ("tx_frames", get(&self.tx_frames)),
            ("tx_bytes", get(&self.tx_bytes)),
            ("rx_bad_checksum", get(&self.rx_bad_checksum)),
            ("rx_violations", get(&self.rx_violations)),
            ("tx_full", get(&self.tx_full)),
            ("kicks", get(&self.kicks)),
            ("sleeps", get(&self.sleeps)),
        ]
    }
}
