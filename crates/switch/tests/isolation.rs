//! What one guest may do to another: rules of a port, each with its own count of what it refused.

mod station;

use station::{BROADCAST, Options, Station, frame, mac, stats, switch, until};
use viaduct_switch::counters::DropReason;
use viaduct_switch::{Flap, Rate, Rules, Switch};

fn plug(switch: &Switch, rules: Rules) -> Station {
    let station = Station::plug(switch, Options::default());
    switch.set_rules(station.port, &rules).expect("the port is there");
    station
}

fn dropped(switch: &Switch, port: u16, reason: DropReason) -> u64 {
    let stats = stats(switch, port);
    stats.received.iter().chain(&stats.sent).map(|queue| queue.drops[reason as usize]).sum()
}

/// Waits until so many frames were dropped, and checks that there are no more.
fn expect_drops(switch: &Switch, port: u16, reason: DropReason, count: u64) {
    until(|| (dropped(switch, port, reason) >= count).then_some(()));
    assert_eq!(dropped(switch, port, reason), count);
}

fn ports_of(switch: &Switch, address: [u8; 6]) -> Vec<u16> {
    switch.stations().iter().filter(|entry| entry.mac == address).map(|entry| entry.port).collect()
}

#[test]
fn a_guest_cannot_send_with_an_address_that_is_not_its_own() {
    let switch = switch(1);
    let mut a = plug(&switch, Rules { macs: vec![mac(1)], spoofcheck: true, ..Rules::default() });
    let mut b = plug(&switch, Rules::default());
    for seed in 0..5 {
        a.send(&frame(BROADCAST, mac(66), 60, seed));
    }
    let honest = frame(BROADCAST, mac(1), 60, 9);
    a.send(&honest);
    b.expect(&honest);
    expect_drops(&switch, a.port, DropReason::Spoofed, 5);
    assert!(ports_of(&switch, mac(66)).is_empty(), "nothing was learned from it");
    // The rule goes while frames flow.
    switch.set_rules(a.port, &Rules::default()).expect("the port is there");
    let other = frame(BROADCAST, mac(66), 60, 10);
    a.send(&other);
    b.expect(&other);
}

#[test]
fn a_pinned_address_is_known_unheard_and_cannot_be_stolen() {
    let switch = switch(1);
    let mut owner = plug(&switch, Rules { macs: vec![mac(1)], ..Rules::default() });
    let mut thief = plug(&switch, Rules::default());
    let mut witness = plug(&switch, Rules::default());
    assert_eq!(ports_of(&switch, mac(1)), [owner.port]);
    thief.send(&frame(BROADCAST, mac(1), 60, 0));
    expect_drops(&switch, thief.port, DropReason::Pinned, 1);
    let question = frame(mac(1), mac(2), 60, 1);
    thief.send(&question);
    owner.expect(&question);
    assert!(witness.poll().is_none(), "it was known where the owner is");
    // Neither age nor a lost link frees the address.
    for _ in 0..20 {
        switch.age();
    }
    switch.forget_stations(owner.port);
    assert_eq!(ports_of(&switch, mac(1)), [owner.port]);
    thief.send(&frame(BROADCAST, mac(1), 60, 2));
    expect_drops(&switch, thief.port, DropReason::Pinned, 2);
    // But the end of the port does.
    switch.remove_port(owner.port).expect("the port is there");
    let free = frame(BROADCAST, mac(1), 60, 3);
    thief.send(&free);
    witness.expect(&free);
    assert_eq!(ports_of(&switch, mac(1)), [thief.port]);
}

#[test]
fn pinning_takes_an_address_from_who_has_it() {
    let switch = switch(1);
    let mut squatter = plug(&switch, Rules::default());
    let mut owner = plug(&switch, Rules::default());
    let hello = frame(BROADCAST, mac(1), 60, 0);
    squatter.send(&hello);
    owner.expect(&hello);
    assert_eq!(ports_of(&switch, mac(1)), [squatter.port]);
    switch.set_rules(owner.port, &Rules { macs: vec![mac(1)], ..Rules::default() }).expect("the port is there");
    assert_eq!(ports_of(&switch, mac(1)), [owner.port]);
}

#[test]
fn private_ports_hear_the_others_only() {
    let switch = switch(1);
    let private = Rules { private: true, ..Rules::default() };
    let [mut a, mut b] = [(); 2].map(|()| plug(&switch, private.clone()));
    let mut open = plug(&switch, Rules::default());
    let from_a = frame(BROADCAST, mac(1), 60, 1);
    a.send(&from_a);
    open.expect(&from_a);
    let from_b = frame(BROADCAST, mac(2), 60, 2);
    b.send(&from_b);
    open.expect(&from_b);
    a.send(&frame(mac(2), mac(1), 60, 3));
    expect_drops(&switch, a.port, DropReason::Private, 1);
    let to_all = frame(BROADCAST, mac(3), 60, 4);
    open.send(&to_all);
    a.expect(&to_all);
    b.expect(&to_all);
    let back = frame(mac(3), mac(1), 60, 5);
    a.send(&back);
    open.expect(&back);
    assert!(a.poll().is_none() && b.poll().is_none());
}

#[test]
fn a_storm_is_cut_and_stations_that_are_known_are_still_reached() {
    let switch = switch(1);
    let mut a = plug(&switch, Rules { storm: 1, ..Rules::default() });
    let mut b = plug(&switch, Rules::default());
    let hello = frame(BROADCAST, mac(2), 60, 0);
    b.send(&hello);
    a.expect(&hello);
    // One may pass in a second; so it ends soon, however slow the machine is.
    let storm = |a: &mut Station, to, reason| {
        let (mut sent, mut lost) = (0, 0);
        while lost == 0 {
            a.send(&frame(to, mac(1), 60, 7));
            a.reclaim();
            sent += 1;
            lost = dropped(&switch, a.port, reason);
        }
        sent - lost
    };
    let passed = storm(&mut a, BROADCAST, DropReason::Storm);
    assert!(passed >= 1, "the first may pass");
    let direct = frame(mac(2), mac(1), 60, 100);
    a.send(&direct);
    for _ in 0..passed {
        b.expect(&frame(BROADCAST, mac(1), 60, 7));
    }
    b.expect(&direct);
    // Stations that nobody knows are another matter.
    for _ in 0..10 {
        let unknown = frame(mac(77), mac(1), 60, 8);
        a.send(&unknown);
        b.expect(&unknown);
    }
    assert_eq!(dropped(&switch, a.port, DropReason::UnknownFlood), 0);
    switch.set_rules(a.port, &Rules { unknown: 1, ..Rules::default() }).expect("the port is there");
    let passed = storm(&mut a, mac(77), DropReason::UnknownFlood);
    assert!(passed >= 1, "the first may pass");
}

#[test]
fn a_guest_has_no_more_addresses_than_its_quota() {
    let switch = switch(1);
    let mut a = plug(&switch, Rules { learn_limit: 10, ..Rules::default() });
    let mut b = plug(&switch, Rules::default());
    for n in 0..30 {
        let sent = frame(BROADCAST, mac(n), 60, n);
        a.send(&sent);
        b.expect(&sent);
    }
    let learn = switch.rule_stats(a.port).expect("the port is there").learn;
    assert_eq!((learn.learned, learn.unlearned), (10, 20));
    assert_eq!(switch.stations().len(), 10);
    // Others have theirs, and what is forgotten makes room.
    let hello = frame(BROADCAST, mac(100), 60, 0);
    b.send(&hello);
    a.expect(&hello);
    assert_eq!(switch.stations().len(), 11);
    switch.forget_stations(a.port);
    let again = frame(BROADCAST, mac(29), 60, 0);
    a.send(&again);
    b.expect(&again);
    assert_eq!(ports_of(&switch, mac(29)), [a.port]);
}

#[test]
fn an_address_that_goes_back_and_forth_is_reported() {
    let switch = switch(1);
    let [mut a, mut b] = [(); 2].map(|()| plug(&switch, Rules::default()));
    let mut witness = plug(&switch, Rules::default());
    for seed in 0..3 {
        for station in [&mut a, &mut b] {
            let sent = frame(BROADCAST, mac(1), 60, seed);
            station.send(&sent);
            witness.expect(&sent);
        }
    }
    // To b, back to a: that is the first report; the others wait for the next second, which may have come.
    let flaps = until(|| Some(switch.take_flaps()).filter(|flaps| !flaps.is_empty()));
    let Flap { ports, times, .. } = &flaps[0];
    assert_eq!((flaps[0].mac(), *ports, *times), (mac(1), (b.port, a.port), 1));
    assert!(flaps.len() <= 2, "at most one a second: {flaps:?}");
    assert_eq!(switch.rule_stats(a.port).expect("the port is there").learn.moved, 2);
    assert_eq!(switch.rule_stats(b.port).expect("the port is there").learn.moved, 3);
}

#[test]
fn what_a_guest_sends_too_fast_waits_in_its_ring() {
    let switch = switch(1);
    // A burst of one frame, then a hundred a second.
    let rate = Rate { bits: 0, frames: 100, burst: 10_000 };
    let mut slow = plug(&switch, Rules { rate, ..Rules::default() });
    let mut other = plug(&switch, Rules::default());
    let mut b = plug(&switch, Rules::default());
    let began = std::time::Instant::now();
    for seed in 0..14 {
        slow.send(&frame(mac(9), mac(1), 60, seed));
    }
    // Meanwhile others pass.
    let passing = frame(mac(9), mac(2), 61, 0);
    other.send(&passing);
    let (mut received, mut passed) = (0, false);
    while received < 14 {
        let (_, got) = b.receive().expect("every frame arrives");
        if got == passing {
            passed = true;
        } else {
            assert_eq!(got, frame(mac(9), mac(1), 60, received), "in order");
            received += 1;
        }
    }
    assert!(passed);
    // Not sooner than the rate allows: that is no matter of luck.
    assert!(began.elapsed().as_millis() >= 100, "{:?}", began.elapsed());
    assert!(switch.rule_stats(slow.port).expect("the port is there").waits > 0);
    assert_eq!(stats(&switch, slow.port).received[0].drops.iter().sum::<u64>(), 0, "nothing was lost");
}

#[test]
fn what_is_sent_to_a_guest_too_fast_is_dropped() {
    let switch = switch(1);
    let mut a = plug(&switch, Rules::default());
    let rate_out = Rate { bits: 8000, frames: 0, burst: 100_000 };
    let mut b = plug(&switch, Rules { rate_out, ..Rules::default() });
    // A frame a second may pass; so it ends soon, however slow the machine is.
    let (mut sent, mut arrived, mut lost) = (0, 0, 0);
    while lost == 0 {
        a.send(&frame(mac(2), mac(1), 1000, 0));
        a.reclaim();
        sent += 1;
        arrived += u64::from(b.poll().is_some());
        lost = dropped(&switch, b.port, DropReason::RateLimited);
    }
    assert!(arrived >= 1, "a burst is allowed");
    assert_eq!(arrived + lost, sent);
}
