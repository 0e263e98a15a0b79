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
    /// Takes over where somebody else may have been killed.
    fn begin(&mut self) {
        if self.queue.close_gap() {
            self.notify();
        }
    }

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

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use viaduct_memory::{Call, GuestMemory};
    use viaduct_ring::{Batch, DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig};

    use super::{VhostInput, VhostOutput, VhostQueue};

    #[test]
    fn a_driver_hears_of_buffers_that_a_killed_switch_did_not_show() {
        for receive in [false, true] {
            let memory = GuestMemory::allocate(1 << 20).expect("memory");
            let config = QueueConfig {
                layout: Layout::Packed,
                size: 16,
                descriptor_addr: 0,
                driver_addr: 0x1000,
                device_addr: 0x2000,
                base: PACKED_START,
                event_idx: false,
                indirect: false,
                in_order: false,
            };
            let mut driver = DriverQueue::new(memory.clone(), &config).expect("a legal queue");
            for token in 0..3 {
                let (out, input) = ([(0x10000, 100)], [(0x10000, 2048)]);
                let (out, input) = if receive { (&[][..], &input[..]) } else { (&out[..], &[][..]) };
                assert!(driver.add(out, input, token).expect("a legal buffer"));
            }
            driver.publish();
            // All that there is: nothing comes behind it for which it would be notified.
            let mut killed = DeviceQueue::new(memory.clone(), &config).expect("a legal queue");
            let mut batch = Batch::default();
            assert_eq!(killed.peek(&mut batch, 8), Ok(3));
            killed.consume(&batch.chains);
            killed.complete_all(&batch.chains);
            // SAFETY: a fresh descriptor, taken over at once.
            let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) };
            let start = VhostQueue {
                queue: DeviceQueue::new(memory.clone(), &config).expect("a legal queue"),
                kick: None,
                call: Some(Call::new(event.try_clone().expect("a descriptor")).expect("an eventfd")),
                enabled: true,
                header_len: 12,
                mergeable: true,
            };
            let (_input, _output) =
                if receive { (None, Some(VhostOutput::new(start))) } else { (Some(VhostInput::new(start)), None) };
            let mut ready = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: polls a local.
            assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 60_000) }, 1, "the driver is notified");
            let taken: Vec<_> = std::iter::from_fn(|| driver.take().expect("a legal ring")).collect();
            assert_eq!(taken, [(0, 0), (1, 0), (2, 0)]);
        }
    }
}
