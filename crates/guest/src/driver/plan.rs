//! How large buffers are, and where they lie.

use viaduct_ring::{Layout, RingLayout};

use crate::features;

/// Bytes of the virtio-net header of a device that follows the standard (virtio 1.2, 5.1.6.1).
pub const HEADER: u32 = 12;
/// Ethernet header with a VLAN tag.
const ETHERNET: u32 = 18;
/// The longest frame that segmentation offload makes (virtio 1.2, 5.1.6.3.1).
const LONGEST: u32 = 65550;
/// A mergeable buffer, unless longer frames come as the rule.
const MERGEABLE: u32 = 2048;
/// The same, when the MTU lets them come.
const MERGEABLE_LARGE: u32 = 4096;
/// The same, when segments come: 64 KiB take 4 of them, so that a queue of 256 holds the windows of several connections.
const MERGEABLE_SEGMENTS: u32 = 16384;

const LINE: u32 = 64;
const PAGE: u64 = 4096;

/// Sizes of buffers, header included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferPlan {
    /// Of a receive queue.
    pub receive: u32,
    /// Of a transmit queue.
    pub transmit: u32,
    /// Transmit buffers have an indirect table each.
    pub indirect: bool,
}

/// The buffers of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    /// Guest-physical address of the first.
    pub start: u64,
    /// Bytes of each.
    pub size: u32,
    /// From one to the next.
    pub stride: u32,
    pub count: u32,
    /// Place and length of the indirect tables.
    pub tables: Option<(u64, u32)>,
}

impl Area {
    pub fn len(&self) -> u32 {
        self.stride * self.count
    }
}

/// Descriptors of an indirect table: header and frame.
const TABLE: u32 = 2;

impl BufferPlan {
    /// The plan for these negotiated features and this MTU.
    pub fn new(features: u64, mtu: usize) -> BufferPlan {
        // MTUs are at most 65521.
        let whole = HEADER + ETHERNET + mtu as u32;
        let segments = features & features::GUEST_SEGMENTS != 0;
        let receive = match (features & features::NET_MRG_RXBUF != 0, segments) {
            (true, true) => MERGEABLE_SEGMENTS,
            (true, false) if mtu <= 1500 => MERGEABLE,
            (true, false) => MERGEABLE_LARGE,
            (false, true) => HEADER + LONGEST,
            (false, false) => whole,
        };
        let transmit = if features & features::NET_HOST_TSO4 != 0 { HEADER + LONGEST } else { whole };
        BufferPlan { receive, transmit, indirect: features & features::RING_INDIRECT_DESC != 0 }
    }

    /// The areas of queues with `sizes` descriptors, receive and transmit in turn, from `start` on, and where they end.
    pub(super) fn place(&self, start: u64, sizes: &[u32]) -> (Vec<Area>, u64) {
        let mut at = start.next_multiple_of(PAGE);
        let mut areas = Vec::new();
        for (index, &count) in sizes.iter().enumerate() {
            let transmits = index % 2 == 1;
            let size = if transmits { self.transmit } else { self.receive };
            let mut area = Area { start: at, size, stride: stride(size), count, tables: None };
            at = (at + u64::from(area.stride) * u64::from(count)).next_multiple_of(PAGE);
            if transmits && self.indirect {
                let len = 16 * TABLE * count;
                area.tables = Some((at, len));
                at = (at + u64::from(len)).next_multiple_of(PAGE);
            }
            areas.push(area);
        }
        (areas, at)
    }
}

/// An odd number of cache lines: with an even one the beginnings of all buffers would share a part of the cache's sets.
fn stride(size: u32) -> u32 {
    (size.div_ceil(LINE) | 1) * LINE
}

/// Bytes of memory for rings and buffers, whatever subset of `features` is negotiated. What is not used is never touched,
/// and so costs nothing.
pub fn required_memory(features: u64, mtu: usize, sizes: &[u32]) -> u64 {
    let rings: u64 = sizes
        .iter()
        .filter_map(|&size| RingLayout::new(Layout::Split, size.next_power_of_two(), true).ok())
        .map(|layout| layout.place(0).3)
        .sum();
    let without = |bit: u64| features & !bit;
    let plans = [features, without(features::NET_MRG_RXBUF), without(features::NET_HOST_TSO4)];
    let largest = plans.iter().map(|&features| {
        BufferPlan { indirect: true, ..BufferPlan::new(features, mtu) }.place(rings.next_multiple_of(PAGE), sizes).1
    });
    // A whole number of 2 MiB pages, which the memory may be made of.
    largest.max().unwrap_or(rings).next_multiple_of(2 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_features() {
        use features::{NET_GUEST_TSO4, NET_HOST_TSO4, NET_MRG_RXBUF};
        let sizes = |features, mtu| {
            let plan = BufferPlan::new(features, mtu);
            (plan.receive, plan.transmit)
        };
        assert_eq!(sizes(0, 1500), (1530, 1530));
        assert_eq!(sizes(0, 65521), (65551, 65551));
        assert_eq!(sizes(NET_MRG_RXBUF, 1500), (2048, 1530));
        assert_eq!(sizes(NET_MRG_RXBUF, 9000), (4096, 9030));
        assert_eq!(sizes(NET_MRG_RXBUF | NET_GUEST_TSO4 | NET_HOST_TSO4, 9000), (16384, 65562));
        assert_eq!(sizes(NET_GUEST_TSO4, 1500), (65562, 1530));
    }

    #[test]
    fn areas_do_not_meet() {
        let (areas, end) = BufferPlan::new(features::RING_INDIRECT_DESC, 1500).place(100, &[256, 128, 17, 1]);
        let mut at = 100;
        for area in &areas {
            assert!(area.start >= at && area.stride >= area.size && area.stride / LINE % 2 == 1);
            at = area.start + u64::from(area.len());
            if let Some((tables, len)) = area.tables {
                assert!(tables >= at && tables % 16 == 0);
                at = tables + u64::from(len);
            }
        }
        assert!(end >= at);
        assert_eq!(areas.iter().map(|a| a.tables.is_some()).collect::<Vec<_>>(), [false, true, false, true]);
    }

    #[test]
    fn enough_for_any_subset() {
        let all = features::SUPPORTED;
        let need = required_memory(all, 1500, &[256, 256]);
        for subset in [all, all & !features::NET_MRG_RXBUF, all & !features::NET_HOST_TSO4, 0] {
            assert!(BufferPlan::new(subset, 1500).place(64 << 10, &[256, 256]).1 <= need);
        }
    }
}
