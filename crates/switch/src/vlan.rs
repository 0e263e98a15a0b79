//! Which VLANs a port carries and how its frames look (IEEE 802.1Q).

use crate::frame::Frame;

/// A port's place in the VLANs.
#[derive(Clone, Debug, Default)]
pub enum VlanMode {
    /// Carries all VLANs, frames keep their tags; untagged frames are VLAN 0.
    #[default]
    All,
    /// Frames are untagged outside and belong to this VLAN inside.
    Access(u16),
    /// Only frames tagged with one of these VLANs pass: one bit each.
    Trunk(Box<[u64; 64]>),
}

impl VlanMode {
    /// A trunk of the VLANs in `ranges`, first and last included.
    pub fn trunk(ranges: &[(u16, u16)]) -> VlanMode {
        let mut bits = Box::new([0u64; 64]);
        for &(first, last) in ranges {
            for vlan in first..=last.min(4095) {
                bits[usize::from(vlan) / 64] |= 1 << (vlan % 64);
            }
        }
        VlanMode::Trunk(bits)
    }

    /// Gives a received frame its VLAN. False: this port may not send it.
    #[inline(always)]
    pub(crate) fn admit(&self, frame: &mut Frame) -> bool {
        match self {
            VlanMode::All => true,
            VlanMode::Access(vlan) => {
                // A priority tag carries no VLAN (IEEE 802.1Q, 6.9.1).
                let admitted = !frame.tagged || frame.vlan == 0;
                frame.set_vlan(*vlan);
                admitted
            }
            VlanMode::Trunk(_) => frame.tagged && self.carries(frame.vlan),
        }
    }

    /// The VLAN of frames that come without a tag, if those may come at all.
    #[inline(always)]
    pub(crate) fn untagged(&self) -> Option<u16> {
        match self {
            VlanMode::All => Some(0),
            VlanMode::Access(vlan) => Some(*vlan),
            VlanMode::Trunk(_) => None,
        }
    }

    /// Whether frames of the VLAN may leave through the port.
    #[inline(always)]
    pub(crate) fn carries(&self, vlan: u16) -> bool {
        match self {
            VlanMode::All => true,
            VlanMode::Access(own) => *own == vlan,
            VlanMode::Trunk(bits) => bits[usize::from(vlan & 0xfff) / 64] >> (vlan % 64) & 1 == 1,
        }
    }

    /// Whether a frame leaves with a tag.
    #[inline(always)]
    pub(crate) fn tags(&self, frame: &Frame) -> bool {
        match self {
            VlanMode::All => frame.vlan != 0 || frame.tagged,
            VlanMode::Access(_) => false,
            VlanMode::Trunk(_) => true,
        }
    }
}
