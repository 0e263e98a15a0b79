//! Step 4: sources are learned, and each frame gets a route.

use super::{BATCH, Forwarder, bits};
use crate::clock;
use crate::counters::DropReason;
use crate::fabric::Fabric;
use crate::frame::Frame;
use crate::mac_table::MacKey;
use crate::port::{InputState, Port};

/// A route is a port in the upper half and one of its queues in the lower; this instead of a queue: to be chosen for
/// each flow.
const SPREAD: u32 = 0x8000;
const PORT: u32 = 0xffff_0000;
/// Not one receiver but all in the VLAN. Ports are numbered below this.
pub(super) const FLOOD: u32 = 0xfff0_0000;
/// The frame goes nowhere, for the [`DropReason`] of this number.
pub(super) const NOWHERE: u32 = 0xfff1_0000;

fn nowhere(reason: DropReason) -> u32 {
    NOWHERE + reason as u32
}

impl Forwarder {
    /// Learns sources and decides where each frame goes.
    #[inline(always)]
    pub(super) fn route(&mut self, fabric: &Fabric, port: &Port, pending: u64, state: &mut InputState) {
        let news = pending & !self.like_before;
        let first = news.trailing_zeros() as usize % BATCH;
        let known = port.admission.sources.is_none() && fabric.macs.unheard(&self.sources, news, port.number) == 0;
        let (route, distinct) = if known && news & !self.same_destination == 1 << first {
            // All go to one place, and there is nothing to learn.
            self.routes[first] = route_to(fabric, port, &self.frames[first], self.destinations[first]);
            (self.routes[first], 1)
        } else {
            self.learn_and_route(fabric, port, news)
        };
        self.one_route = distinct == 1 && route & SPREAD == 0;
        if !self.one_route {
            self.route_each(fabric, pending);
        }
        if distinct > 1 || (route ^ state.last_route) & PORT != 0 {
            self.note_receivers(pending, state);
        }
        state.last_route = route;
    }

    /// The same for the frames in `news`, one by one. Returns the last one's route and how often routes changed.
    #[inline(never)]
    fn learn_and_route(&mut self, fabric: &Fabric, port: &Port, news: u64) -> (u32, u32) {
        let (mut to, mut route, mut distinct) = (0, 0, 0);
        for index in bits(news) {
            let frame = &self.frames[index];
            if self.same_destination >> index & 1 == 0 {
                to = route_to(fabric, port, frame, self.destinations[index]);
            }
            let next = if frame.source() & 1 == 1 {
                nowhere(DropReason::BadSource)
            } else if !port.admission.admits(frame.source()) {
                nowhere(DropReason::Spoofed)
            } else if !fabric.macs.learn(self.sources[index], port.number) {
                nowhere(DropReason::Pinned)
            } else {
                to
            };
            distinct += u32::from(next != route || distinct == 0);
            route = next;
            self.routes[index] = next;
        }
        (route, distinct)
    }

    /// Keeps in mind whether the sender has frames for several receivers.
    #[inline(never)]
    fn note_receivers(&self, pending: u64, state: &mut InputState) {
        let routes = bits(pending & !self.like_before).map(|index| self.routes[index]);
        for route in routes.filter(|route| *route < FLOOD) {
            state.company.meet((route >> 16) as u16, clock::ticks);
        }
    }

    /// Gives the frames that follow another one its route; the flow may choose another queue of the same port.
    #[inline(never)]
    fn route_each(&mut self, fabric: &Fabric, pending: u64) {
        let mut route = 0;
        for index in bits(pending) {
            if self.like_before >> index & 1 == 0 {
                route = self.routes[index];
            }
            self.routes[index] = if route & SPREAD == 0 { route } else { self.spread(fabric, route, index) };
        }
    }

    /// The receiver's queue for a frame: the flow's hash spreads flows over queues and keeps each in order.
    #[inline(never)]
    fn spread(&self, fabric: &Fabric, route: u32, index: usize) -> u32 {
        let port = route & PORT;
        let live = fabric.port((port >> 16) as u16).map_or(&[][..], |receiver| &receiver.live);
        let hash = self.frames[index].flow_hash(&self.batch.spans) as usize;
        port | live.get(hash % live.len().max(1)).map_or(0, |queue| u32::from(*queue))
    }
}

/// Where a frame from `port` to this destination goes.
#[inline(always)]
fn route_to(fabric: &Fabric, port: &Port, frame: &Frame, destination: MacKey) -> u32 {
    if frame.destination() & 1 == 1 {
        return if is_reserved_group(frame.destination()) { nowhere(DropReason::ReservedGroup) } else { FLOOD };
    }
    let Some(number) = fabric.macs.lookup(destination) else { return FLOOD };
    if number == port.number {
        return nowhere(DropReason::NoDestination);
    }
    match fabric.port(number) {
        Some(receiver) if receiver.vlan.carries(frame.vlan) => {
            if port.admission.private && receiver.admission.private {
                return nowhere(DropReason::Private);
            }
            let port = u32::from(number) << 16;
            match receiver.live.as_slice() {
                [] => port,
                [only] => port | u32::from(*only),
                _ => port | SPREAD,
            }
        }
        _ => FLOOD,
    }
}

/// 01-80-C2-00-00-00 to -0F: for the bridge itself, which speaks none of the protocols there (IEEE 802.1Q, 8.6.3).
#[inline(always)]
fn is_reserved_group(destination: u64) -> bool {
    destination & 0xf0ff_ffff_ffff == 0x0000_00c2_8001
}
