//! A [`Link`] as smoltcp wants it: tokens that are good for one frame.
//!
//! Frames pass through two buffers of this process: smoltcp works on Rust slices, and there must never be one into memory
//! that another process writes. A station without a link (its back-end is being restarted) keeps this device: it
//! receives nothing and takes nothing.

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::link::{Link, LinkCapabilities};

/// Ethernet header in front of the IP packet.
const ETHERNET: usize = 14;

/// The device below a stack.
pub struct StackDevice {
    link: Option<Box<dyn Link>>,
    capabilities: LinkCapabilities,
    received: Vec<u8>,
    outgoing: Outgoing,
}

/// A frame to send, and what is known of the packet it belongs to.
#[derive(Default)]
struct Outgoing {
    frame: Vec<u8>,
    /// The last fragment of an IPv4 packet has not left yet.
    fragmenting: bool,
    /// The next transmit token may be used for a fragment.
    fragment_allowed: bool,
    /// The last frame was a fragment.
    was_fragment: bool,
}

impl StackDevice {
    /// A device without a link yet.
    pub fn new(mtu: usize) -> StackDevice {
        StackDevice {
            link: None,
            capabilities: LinkCapabilities { mtu, checksum: false, segmentation: false },
            received: Vec::new(),
            outgoing: Outgoing::default(),
        }
    }

    /// Plugs a link in. The stack has to make its interface anew, since capabilities may have changed.
    pub fn attach(&mut self, link: Box<dyn Link>) {
        self.capabilities = link.capabilities();
        self.link = Some(link);
    }

    /// Pulls the link out.
    pub fn detach(&mut self) -> Option<Box<dyn Link>> {
        self.link.take()
    }

    /// The link.
    pub fn link(&mut self) -> Option<&mut (dyn Link + 'static)> {
        self.link.as_deref_mut()
    }

    /// Whether TCP packets may be longer than the MTU.
    pub fn segmentation(&self) -> bool {
        self.capabilities.segmentation && self.capabilities.checksum
    }

    /// Whether smoltcp has fragments of a packet left to send.
    ///
    /// It keeps one such packet, forgets it for the next one, and when asked to send begins with the fragment that is due.
    /// So [`pass_fragment`](StackDevice::pass_fragment) gives out one token for that, and none for anything else
    /// until the last fragment has left.
    pub fn fragmenting(&self) -> bool {
        self.outgoing.fragmenting
    }

    /// Lets the next fragment pass while `send` runs. When none comes there are none left.
    pub fn pass_fragment(&mut self, send: impl FnOnce(&mut StackDevice)) {
        self.outgoing.fragment_allowed = true;
        self.outgoing.was_fragment = false;
        send(self);
        self.outgoing.fragmenting &= self.outgoing.was_fragment;
    }

    /// Sends a frame that did not come from smoltcp.
    pub fn send_raw(&mut self, frame: &mut [u8]) {
        if let Some(link) = &mut self.link {
            link.transmit(frame, None);
        }
    }
}

impl Device for StackDevice {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Slot<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Slot<'_>)> {
        let link = self.link.as_deref_mut()?;
        // A reply for which the ring has no room is dropped, as everywhere: to leave the received frame where it is would
        // let two full rings wait for each other.
        if !link.receive(&mut self.received) {
            return None;
        }
        Some((Received(&self.received), Slot { link, outgoing: &mut self.outgoing, segment: None }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Slot<'_>> {
        let link = self.link.as_deref_mut()?;
        if !link.can_transmit() || (self.outgoing.fragmenting && !std::mem::take(&mut self.outgoing.fragment_allowed)) {
            return None;
        }
        Some(Slot { link, outgoing: &mut self.outgoing, segment: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = self.capabilities.mtu + ETHERNET;
        // What is received was checked by the link, which knows which frames need it.
        let transport = if self.capabilities.checksum { Checksum::None } else { Checksum::Tx };
        caps.checksum.tcp = transport;
        caps.checksum.udp = transport;
        if self.segmentation() {
            // An IPv4 packet can be 65535 bytes long. Over IPv6 smoltcp 0.14 drops what exceeds the MTU, so that stays
            // off.
            caps.segmentation.tcpv4 = std::num::NonZeroUsize::new(usize::from(u16::MAX) + ETHERNET);
        }
        caps
    }
}

/// A received frame.
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one frame to send.
pub struct Slot<'a> {
    link: &'a mut (dyn Link + 'static),
    outgoing: &'a mut Outgoing,
    segment: Option<u16>,
}

impl TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // smoltcp writes every byte, so what was there need not be cleared.
        let frame = &mut self.outgoing.frame;
        frame.resize(len, 0);
        let result = f(frame);
        let fragment = more_fragments(frame);
        self.outgoing.was_fragment = fragment.is_some();
        self.outgoing.fragmenting = fragment.unwrap_or(self.outgoing.fragmenting);
        self.link.transmit(frame, self.segment);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(std::num::NonZero::get);
    }
}

/// For a fragment of an IPv4 packet: whether there are more behind it (RFC 791, 3.1).
fn more_fragments(frame: &[u8]) -> Option<bool> {
    let header = frame.get(ETHERNET..ETHERNET + 20)?;
    if frame[12..14] != [8, 0] {
        return None;
    }
    let field = u16::from_be_bytes([header[6], header[7]]);
    let (more, offset) = (field & 0x2000 != 0, field & 0x1fff);
    (more || offset != 0).then_some(more)
}
