//! The switch's end of a virtio-net device's queues: the guest's transmit queue is where frames come from, its receive
//! queue is where they go (virtio 1.2, 5.1.2).

mod fill;
mod input;
mod output;

use std::os::fd::OwnedFd;

use viaduct_memory::Call;
use viaduct_ring::{Chain, DeviceQueue};

pub(crate) use input::VhostInput;
pub(crate) use output::VhostOutput;

/// What the two directions have in common.
#[derive(Debug)]
struct Vring {
    queue: DeviceQueue,
    /// Notifies the driver; none if it polls.
    call: Option<Call>,
    /// Length of the virtio-net header: 12, or 10 for a legacy driver without mergeable buffers.
    header_len: u32,
    enabled: bool,
}

impl Vring {
    /// Makes used buffers visible and notifies the driver if it wants that. Returns whether it was notified.
    #[inline(always)]
    fn publish(&mut self) -> bool {
        self.queue.publish() && self.notify()
    }

    fn notify(&mut self) -> bool {
        self.call.as_ref().is_some_and(Call::signal)
    }
}

/// A started queue as the protocol describes it.
#[derive(Debug)]
pub struct VhostQueue {
    /// The ring.
    pub queue: DeviceQueue,
    /// Eventfd on which the driver notifies us; none: the queue has to be polled.
    pub kick: Option<OwnedFd>,
    /// What notifies the driver; none: it polls.
    pub call: Option<Call>,
    /// Whether the front-end has enabled it (vhost-user, "Ring states").
    pub enabled: bool,
    /// Length of the virtio-net header in its buffers.
    pub header_len: u32,
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
}

#[cold]
fn wrong_direction(chain: &Chain, queue: &str, found: &str) -> String {
    format!(
        "buffer {} of a {queue} queue has {found} parts ({} readable, {} writable spans, {} writable bytes): a transmit buffer is \
         only read and a receive buffer only written, and has room for the header (virtio 1.2, 5.1.6.2 and 5.1.6.3)",
        chain.id, chain.readable, chain.writable, chain.writable_len
    )
}
