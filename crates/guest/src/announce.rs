//! Frames that say where a MAC address lives, so that learning switches know it before the first packet for it comes, and
//! frames that ask.

use std::net::{Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{EthernetAddress, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscRepr};

/// A MAC address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;

/// An Ethernet frame's length without its checksum is at least this.
pub const MINIMUM_FRAME: usize = 60;

/// A reverse ARP request for one's own address (RFC 903): what QEMU and vhost-user back-ends send after a migration. It
/// needs no IP address.
pub fn rarp(mac: Mac) -> Vec<u8> {
    arp_frame(mac, ETHERTYPE_RARP, 3, Ipv4Addr::UNSPECIFIED, mac, Ipv4Addr::UNSPECIFIED)
}

/// A gratuitous ARP request (RFC 5227, 3): neighbours take over the address at once.
pub fn gratuitous_arp(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp_frame(mac, ETHERTYPE_ARP, 1, address, [0; 6], address)
}

/// A question for the MAC address of `address` (RFC 826).
pub fn arp_request(mac: Mac, sender: Ipv4Addr, address: Ipv4Addr) -> Vec<u8> {
    arp_frame(mac, ETHERTYPE_ARP, 1, sender, [0; 6], address)
}

/// The same question over IPv6: a neighbour solicitation (RFC 4861, 4.3).
pub fn neighbor_solicitation(mac: Mac, sender: Ipv6Addr, address: Ipv6Addr) -> Vec<u8> {
    // The solicited-node group of the address (RFC 4291, 2.7.1).
    let low = address.segments();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (low[6] & 0xff), low[7]);
    let message = Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit {
        target_addr: address,
        lladdr: Some(EthernetAddress(mac).into()),
    });
    // The hop limit that proves that no router has passed it on (RFC 4861, 7.1.1).
    let ip = Ipv6Repr {
        src_addr: sender,
        dst_addr: group,
        next_header: IpProtocol::Icmpv6,
        payload_len: message.buffer_len(),
        hop_limit: 255,
    };
    let mut frame = vec![0; 14 + ip.buffer_len() + message.buffer_len()];
    // A group's MAC address: 33:33 and its last four bytes (RFC 2464, 7).
    frame[..2].copy_from_slice(&[0x33, 0x33]);
    frame[2..6].copy_from_slice(&group.octets()[12..]);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&[0x86, 0xdd]);
    ip.emit(&mut Ipv6Packet::new_unchecked(&mut frame[14..]));
    let payload = &mut frame[14 + ip.buffer_len()..];
    message.emit(&sender, &group, &mut Icmpv6Packet::new_unchecked(payload), &ChecksumCapabilities::default());
    frame
}

fn arp_frame(mac: Mac, ethertype: u16, operation: u16, sender: Ipv4Addr, target: Mac, address: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MINIMUM_FRAME);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    // Ethernet, IPv4, lengths of their addresses (RFC 826).
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&sender.octets());
    frame.extend_from_slice(&target);
    frame.extend_from_slice(&address.octets());
    frame.resize(MINIMUM_FRAME, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gratuitous_arp_is_a_broadcast_about_oneself() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(frame.len(), MINIMUM_FRAME);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6]);
        assert_eq!(frame[20..22], [0, 1]);
        assert_eq!(frame[28..32], frame[38..42]);
        assert_eq!(rarp([2, 0, 0, 0, 0, 1])[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    }
}
