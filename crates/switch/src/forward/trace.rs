//! What is shown of packets that a traced port sends.

use viaduct_ring::Batch;

use super::Forwarder;
use super::route::{FLOOD, NOWHERE};
use crate::counters::DropReason;
use crate::fabric::Fabric;
use crate::frame::Frame;
use crate::port::{Input, InputState, Port};
use crate::trace::{Outcome, TracedPacket, first_bytes, now};

impl Forwarder {
    /// Shows the first `finished` frames of the batch, which are about to go back to the sender. `pending`: those that had
    /// a route in this round. The spans of the batch have been trimmed, so the chains are looked at once more.
    #[cold]
    pub(super) fn trace(
        &self,
        fabric: &Fabric,
        port: &Port,
        pair: u16,
        state: &mut InputState,
        pending: u64,
        finished: usize,
    ) {
        let most = port.traces.iter().map(|trace| trace.wanted()).max().unwrap_or(0).min(finished);
        let (header_len, trusted_flags) = (state.input.header_len(), state.input.trusted_flags());
        let Input::Vhost(input) = &mut state.input else { return };
        let mut batch = Batch::default();
        // Those that an IOMMU does not let us reach by now are not shown.
        let found = input.queue().look(&mut batch, most);
        for index in 0..found {
            let (before, chain) = (&batch.chains[..index], batch.chains[index]);
            let (position, descriptors) = (input.queue().position(before), input.queue().descriptors(before, &chain));
            // SAFETY: the input holds the memory of the batch.
            let data = unsafe { first_bytes(batch.readable(&chain), chain.readable_len as usize) };
            let outcome = if pending >> index & 1 == 1 {
                routed(self.routes[index])
            } else {
                // It was refused before it got a route, or overtook an older one in an earlier round.
                let mut frame = Frame::default();
                match frame.parse(&mut batch.spans, &chain, header_len, trusted_flags) {
                    Err(reason) => Outcome::Dropped(reason.name()),
                    Ok(()) if !port.vlan.admit(&mut frame) => Outcome::Dropped(DropReason::VlanDenied.name()),
                    Ok(()) => match fabric.macs.lookup(fabric.macs.key(frame.destination(), frame.vlan)) {
                        Some(number) => Outcome::Forwarded(number, 0),
                        None => Outcome::Flooded,
                    },
                }
            };
            let packet = TracedPacket {
                time: now(),
                queue: 2 * pair + 1,
                position,
                id: chain.id,
                descriptors,
                header_len,
                len: chain.readable_len,
                data,
                outcome,
            };
            port.traces.iter().for_each(|trace| trace.record(packet.clone()));
        }
    }
}

fn routed(route: u32) -> Outcome {
    match route {
        FLOOD => Outcome::Flooded,
        NOWHERE.. => Outcome::Dropped(DropReason::ALL[(route - NOWHERE) as usize % DropReason::ALL.len()].name()),
        _ => Outcome::Forwarded((route >> 16) as u16, route as u16),
    }
}
