//! VLANs: who hears whom, and with which tag (IEEE 802.1Q).

mod station;

use station::{BROADCAST, Options, Station, frame, mac, stats, switch, tagged, until};
use viaduct_switch::counters::DropReason;
use viaduct_switch::{Offloads, VlanMode};

fn plug(switch: &viaduct_switch::Switch, vlan: VlanMode) -> Station {
    Station::plug(switch, Options { vlan, ..Options::default() })
}

#[test]
fn access_ports_of_one_vlan_hear_each_other_and_trunks_hear_them_tagged() {
    let switch = switch(1);
    let [mut a10, mut b10, mut c20] = [10, 10, 20].map(|vlan| plug(&switch, VlanMode::Access(vlan)));
    let mut trunk = plug(&switch, VlanMode::trunk(&[(5, 15), (100, 100)]));
    let mut all = plug(&switch, VlanMode::All);
    for len in [14, 15, 16, 60, 61, 64, 1000] {
        let sent = frame(BROADCAST, mac(1), len, 7);
        a10.send(&sent);
        b10.expect(&sent);
        trunk.expect(&tagged(&sent, 10));
        all.expect(&tagged(&sent, 10));
        let sent = frame(BROADCAST, mac(3), len, 8);
        c20.send(&sent);
        all.expect(&tagged(&sent, 20));
        // The priority bits of the tag do not choose the VLAN.
        let sent = frame(BROADCAST, mac(4), len, 9);
        trunk.send(&tagged(&sent, 0xe000 | 10));
        a10.expect(&sent);
        b10.expect(&sent);
        all.expect(&tagged(&sent, 0xe000 | 10));
    }
    assert!(c20.poll().is_none() && trunk.poll().is_none());
}

#[test]
fn a_station_is_learned_for_each_vlan() {
    let switch = switch(1);
    let mut ten = plug(&switch, VlanMode::Access(10));
    let mut twenty = plug(&switch, VlanMode::Access(20));
    let mut trunk = plug(&switch, VlanMode::All);
    for station in [&mut ten, &mut twenty] {
        station.send(&frame(BROADCAST, mac(1), 60, 0));
        trunk.receive().expect("the announcement");
    }
    for (station, vlan) in [(&mut ten, 10), (&mut twenty, 20)] {
        let sent = frame(mac(1), mac(2), 60, vlan as u8);
        trunk.send(&tagged(&sent, vlan));
        station.expect(&sent);
    }
    assert!(ten.poll().is_none() && twenty.poll().is_none());
}

#[test]
fn what_a_port_may_not_send_is_dropped_and_counted() {
    let switch = switch(1);
    let mut access = plug(&switch, VlanMode::Access(10));
    let mut trunk = plug(&switch, VlanMode::trunk(&[(5, 15)]));
    let mut all = plug(&switch, VlanMode::All);
    let sent = frame(BROADCAST, mac(1), 60, 0);
    access.send(&tagged(&sent, 10));
    trunk.send(&sent);
    trunk.send(&tagged(&sent, 16));
    trunk.send(&tagged(&sent, 0));
    // A priority tag is no VLAN: this one passes.
    access.send(&tagged(&sent, 0x6000));
    trunk.expect(&tagged(&sent, 0x600a));
    all.expect(&tagged(&sent, 0x600a));
    let denied = |port| stats(&switch, port).received[0].drops[DropReason::VlanDenied as usize];
    until(|| (denied(access.port) == 1 && denied(trunk.port) == 3).then_some(()));
    assert!(all.poll().is_none());
}

#[test]
fn offsets_move_with_the_tag() {
    use viaduct_switch::net_header::NetHeader;
    let switch = switch(1);
    let offloads = Offloads::CSUM | Offloads::TSO4;
    let mut access =
        Station::plug(&switch, Options { vlan: VlanMode::Access(10), accepts: offloads, ..Options::default() });
    let mut all = Station::plug(&switch, Options { accepts: offloads, ..Options::default() });
    let sent = frame(BROADCAST, mac(1), 1000, 0);
    let header = NetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 400,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    access.send_in_pieces(header, &sent, &[]);
    let (received, bytes) = all.receive().expect("a frame arrives");
    assert_eq!(bytes, tagged(&sent, 10));
    assert_eq!(received, NetHeader { hdr_len: 58, csum_start: 38, num_buffers: 1, ..header });
    all.send_in_pieces(received, &bytes, &[]);
    let (received, bytes) = access.receive().expect("a frame arrives");
    assert_eq!(bytes, sent);
    assert_eq!(received, NetHeader { num_buffers: 1, ..header });
}

#[test]
fn a_tag_does_not_count_towards_the_longest_frame() {
    let switch = switch(1);
    let mut a = plug(&switch, VlanMode::All);
    let mut b = Station::plug(&switch, Options { max_frame: 1514, ..Options::default() });
    let sent = frame(BROADCAST, mac(1), 1514, 0);
    a.send(&tagged(&sent, 10));
    b.expect(&tagged(&sent, 10));
    a.send(&tagged(&frame(BROADCAST, mac(1), 1515, 0), 10));
    a.reclaim();
    assert_eq!(stats(&switch, b.port).sent[0].drops[DropReason::TooBig as usize], 1);
}

#[test]
fn no_checksum_begins_inside_a_tag() {
    use viaduct_switch::net_header::NetHeader;
    let switch = switch(1);
    let mut all = plug(&switch, VlanMode::All);
    let mut access =
        Station::plug(&switch, Options { vlan: VlanMode::Access(10), accepts: Offloads::CSUM, ..Options::default() });
    let sent = tagged(&frame(BROADCAST, mac(1), 60, 0), 10);
    let header = NetHeader { flags: 1, csum_start: 17, csum_offset: 6, ..NetHeader::default() };
    all.send_in_pieces(header, &sent, &[]);
    all.send_in_pieces(NetHeader { csum_start: 18, ..header }, &sent, &[]);
    let (received, _) = access.receive().expect("a frame arrives");
    assert_eq!(received.csum_start, 14);
    assert_eq!(stats(&switch, all.port).received[0].drops[DropReason::BadHeader as usize], 1);
}

#[test]
fn a_port_changes_its_vlan_under_traffic() {
    let switch = switch(1);
    let mut a = plug(&switch, VlanMode::Access(10));
    let mut b = plug(&switch, VlanMode::Access(20));
    a.send(&frame(BROADCAST, mac(1), 60, 0));
    a.reclaim();
    switch.change_port(b.port, VlanMode::Access(10), 0).expect("the port is there");
    let sent = frame(BROADCAST, mac(1), 60, 1);
    a.send(&sent);
    b.expect(&sent);
}
