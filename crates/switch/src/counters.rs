//! Counters: written by one thread, read by anyone.
//!
//! Each counter has a single writer at a time (the poller that owns the queue, or the one that holds its lock), so an
//! increment is a plain load and store; a reader may see values of slightly different moments but never a torn one. Each
//! block of counters fills cache lines of its own, so that pollers do not slow one another down. What a poller counts of
//! its own time is in [`poller_counters`](crate::poller_counters).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. To be called by the counter's one writer.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Why a frame went no further.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum DropReason { $($(#[doc = $doc])+ $variant,)+ }

        impl DropReason {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)+];

            /// The name under which statistics show it.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)+ }
            }
        }
    };
}

drop_reasons! {
    /// Received: shorter than an Ethernet header.
    Runt = "runt",
    /// Received: longer than any frame can be.
    Oversize = "oversize",
    /// Received: the virtio-net header contradicts the frame or itself (virtio 1.2, 5.1.6.2).
    BadHeader = "bad_header",
    /// Received: the source address is a group address.
    BadSource = "bad_source",
    /// Received: the port may not use this VLAN.
    VlanDenied = "vlan_denied",
    /// Received: addressed to the bridge itself (01-80-C2-00-00-00 to -0F, IEEE 802.1Q 8.6.3).
    ReservedGroup = "reserved_group",
    /// Received: its destination is behind the port from which it came, or no other port is in the VLAN.
    NoDestination = "no_destination",
    /// Received: its source address is none of the port's own (spoofcheck).
    Spoofed = "spoofed",
    /// Received: its source address belongs to another port (mac).
    Pinned = "pinned",
    /// Received: for a private port, from another private port.
    Private = "private",
    /// Received: more broadcasts and multicasts than the port may send.
    Storm = "storm",
    /// Received: more frames for stations that nobody has heard than the port may send.
    UnknownFlood = "unknown_flood",
    /// Received while the queue was disabled by the front-end.
    QueueDisabled = "queue_disabled",
    /// The IOMMU does not let the switch reach the sender's buffer, or the receiver's (virtio 1.2, 6.1, ACCESS_PLATFORM).
    Iommu = "iommu",
    /// To send: nobody is connected to the port, or its driver has not started the queue.
    LinkDown = "link_down",
    /// To send: the receiver supplied no buffers.
    NoBuffers = "no_buffers",
    /// To send: faster than the port may receive.
    RateLimited = "rate_limited",
    /// To send: larger than the port's MTU or than the receiver's buffers.
    TooBig = "too_big",
    /// To send: an offload the receiver did not accept cannot be completed because the frame is not what its header says.
    Offload = "offload",
    /// To send: the host's interface or file refused it.
    Io = "io",
}

/// Number of [`DropReason`]s.
pub const DROP_REASONS: usize = DropReason::ALL.len();

/// What one queue has carried in one direction.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueCounters {
    /// Well-formed frames that were taken from the queue, or frames that were put into it.
    pub frames: Counter,
    /// Their bytes, without virtio-net headers.
    pub bytes: Counter,
    /// Frames dropped, by [`DropReason`].
    pub drops: [Counter; DROP_REASONS],
    /// Notifications sent to the driver.
    pub notifications: Counter,
    /// Frames whose checksum or segmentation was completed here.
    pub completed_offloads: Counter,
}

impl QueueCounters {
    /// Counts `n` frames as dropped.
    #[inline]
    pub fn drop_frames(&self, reason: DropReason, n: u64) {
        self.drops[reason as usize].add(n);
    }
}
