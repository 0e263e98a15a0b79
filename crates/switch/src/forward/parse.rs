//! Step 3: frames are parsed and checked.

use viaduct_memory::Span;
use viaduct_ring::{Batch, Chain};

use super::{BATCH, Forwarder, bits};
use crate::counters::{DropReason, QueueCounters};
use crate::fabric::Fabric;
use crate::frame::{Frame, LOW48};
use crate::port::{InputState, Port};

impl Forwarder {
    /// Parses the frames that are not dealt with yet; returns those that are good.
    #[inline(always)]
    pub(super) fn parse(
        &mut self,
        fabric: &Fabric,
        port: &Port,
        state: &mut InputState,
        counters: &QueueCounters,
    ) -> u64 {
        let header_len = state.input.header_len();
        let trusted_flags = state.input.trusted_flags();
        let Forwarder { batch: Batch { chains, spans, .. }, frames, sources, destinations, .. } = self;
        let all = u64::MAX.checked_shr((BATCH - chains.len()) as u32).unwrap_or(0);
        let parsed = port.vlan.untagged().map(|vlan| parse_plain(frames, chains, spans, header_len, vlan));
        let Plain { plain, mut bytes, longest } = parsed.unwrap_or_default();
        let mut pending = plain & !state.done;
        for index in bits(all & !plain & !state.done) {
            match parse_other(&mut frames[index], spans, &chains[index], header_len, trusted_flags, port) {
                Ok(()) => pending |= 1 << index,
                Err(reason) => {
                    counters.drop_frames(reason, 1);
                    state.done |= 1 << index;
                }
            }
        }
        let (mut like_before, mut same_destination) = (0u64, 0u64);
        // Of the frame before; no frame has this VLAN.
        let (mut addresses, mut vlan) = ([0; 2], u16::MAX);
        for index in bits(pending) {
            let frame = &frames[index];
            let before = std::mem::replace(&mut addresses, frame.addresses());
            let same_vlan = frame.vlan == vlan;
            if addresses == before && same_vlan {
                like_before |= 1 << index;
                continue;
            }
            vlan = frame.vlan;
            let source = fabric.macs.key(frame.source(), vlan);
            fabric.macs.prefetch(source);
            sources[index] = source;
            if (addresses[0] ^ before[0]) & LOW48 == 0 && same_vlan {
                same_destination |= 1 << index;
            } else {
                let destination = fabric.macs.key(frame.destination(), vlan);
                fabric.macs.prefetch(destination);
                destinations[index] = destination;
            }
        }
        let fresh = pending & !state.counted;
        if fresh != plain {
            bytes = bits(fresh).map(|index| u64::from(frames[index].len)).sum();
        }
        state.counted |= pending;
        counters.frames.add(u64::from(fresh.count_ones()));
        counters.bytes.add(bytes);
        for capture in &port.captures {
            for frame in bits(fresh).map(|index| &frames[index]) {
                capture.record(&frame.outgoing(spans, frame.tagged), true);
            }
        }
        (self.like_before, self.same_destination) = (like_before, same_destination);
        (self.plain, self.longest) = (plain, longest);
        pending
    }
}

/// The plain frames of a batch.
#[derive(Default)]
struct Plain {
    plain: u64,
    /// Sum of their lengths.
    bytes: u64,
    longest: u32,
}

/// Parses those frames of the batch that are plain, in a loop of its own, whose values fit into registers.
#[inline(never)]
fn parse_plain(frames: &mut [Frame; BATCH], chains: &[Chain], spans: &mut [Span], header_len: u32, vlan: u16) -> Plain {
    let mut found = Plain::default();
    for ((index, frame), chain) in frames.iter_mut().enumerate().zip(chains) {
        if frame.parse_plain(spans, chain, header_len, vlan) {
            found.plain |= 1 << index;
            found.bytes += u64::from(frame.len);
            found.longest = found.longest.max(frame.len);
        }
    }
    found
}

/// A frame that is not plain.
#[inline(never)]
fn parse_other(
    frame: &mut Frame,
    spans: &mut [Span],
    chain: &Chain,
    header_len: u32,
    trusted_flags: u8,
    port: &Port,
) -> Result<(), DropReason> {
    frame.parse(spans, chain, header_len, trusted_flags)?;
    if port.vlan.admit(frame) { Ok(()) } else { Err(DropReason::VlanDenied) }
}
