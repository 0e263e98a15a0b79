//! One port misbehaves or goes away; the others do not notice.

mod station;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use station::{BROADCAST, Options, Station, frame, mac, stats, switch, until};
use viaduct_memory::{Call, GuestMemory, RegionSpec};
use viaduct_ring::{DeviceQueue, Layout};
use viaduct_switch::{Event, Switch, VhostQueue};

/// Frames pass between two honest stations, both ways.
fn check_honest(a: &mut Station, b: &mut Station, seed: u8) {
    let one_way = |from: &mut Station, to: &mut Station, address| {
        let sent = frame(BROADCAST, mac(address), 200, seed);
        from.send(&sent);
        to.expect(&sent);
        from.reclaim();
    };
    one_way(a, b, 1);
    one_way(b, a, 2);
}

fn next_event(switch: &Switch) -> Event {
    until(|| switch.take_events().into_iter().next())
}

#[test]
fn a_broken_ring_stops_its_queue_and_nothing_else() {
    for layout in [Layout::Split, Layout::Packed] {
        let switch = switch(1);
        let mut a = Station::plug(&switch, Options::default());
        let mut b = Station::plug(&switch, Options { layout, ..Options::default() });
        let mut bad = Station::plug(&switch, Options { layout, ..Options::default() });
        check_honest(&mut a, &mut b, 0);
        bad.transmit.add(&[(station::MEMORY - 10, 100)], &[], 0).expect("the driver does not check");
        bad.transmit.publish();
        bad.kick();
        let event = next_event(&switch);
        assert_eq!((event.port, event.queue), (bad.port, 1));
        assert!(event.message.contains("0x400000"), "names the address: {}", event.message);
        check_honest(&mut a, &mut b, 1);
        assert!(switch.take_events().is_empty(), "it is reported once");
    }
}

#[test]
fn buffers_of_the_wrong_direction_break_the_queue() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options::default());
    let mut bad = Station::plug(&switch, Options { buffers: 0, ..Options::default() });
    bad.transmit.add(&[(0x100000, 100)], &[(0x200000, 100)], 0).expect("a legal chain");
    bad.transmit.publish();
    bad.kick();
    let event = next_event(&switch);
    assert_eq!((event.port, event.queue), (bad.port, 1));
    assert!(event.message.contains("5.1.6.2"), "{}", event.message);
    bad.receive.add(&[(0x100000, 100)], &[], 0).expect("a legal chain");
    bad.receive.publish();
    a.send(&frame(BROADCAST, mac(1), 60, 0));
    b.receive().expect("the others hear it");
    let event = next_event(&switch);
    assert_eq!((event.port, event.queue), (bad.port, 0));
    check_honest(&mut a, &mut b, 1);
}

#[test]
fn buffers_that_shrink_while_they_are_looked_at_again_hurt_nobody() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options::default());
    let mut bad = Station::plug(&switch, Options { buffers: 0, ..Options::default() });
    for buffer in 0..3 {
        bad.receive.add(&[], &[(0x100000, 1500)], buffer).expect("a legal chain");
    }
    bad.receive.publish();
    // Fills two buffers; the third has been looked at.
    check_honest(&mut a, &mut b, 0);
    bad.receive.add(&[], &[(0x100000, 12)], 3).expect("a legal chain");
    for descriptor in 0..4u64 {
        bad.write(16 * descriptor + 8, &12u32.to_le_bytes());
    }
    bad.receive.publish();
    // Fits into 1500 + 12 bytes and not into twice 12.
    let sent = frame(BROADCAST, mac(1), 1500, 1);
    a.send(&sent);
    b.expect(&sent);
    check_honest(&mut a, &mut b, 2);
}

#[test]
fn a_broken_receive_queue_is_reported_in_a_steady_flow_too() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut bad = Station::plug(&switch, Options { buffers: 0, ..Options::default() });
    bad.send(&frame(BROADCAST, mac(9), 60, 0));
    a.receive().expect("the announcement");
    bad.receive.add(&[], &[(0x100000, 2000)], 0).expect("a legal chain");
    bad.receive.publish();
    // The second time its buffers are fetched before the frame is looked at.
    a.send(&frame(mac(9), mac(1), 60, 0));
    a.reclaim();
    bad.receive.add(&[(0x100000, 100)], &[], 0).expect("a legal chain");
    bad.receive.publish();
    a.send(&frame(mac(9), mac(1), 60, 1));
    let event = next_event(&switch);
    assert_eq!((event.port, event.queue), (bad.port, 0));
}

#[test]
fn truncated_memory_of_a_receive_queue_alone_is_reported() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let file = tempfile(station::MEMORY);
    let spec = RegionSpec { guest_addr: 0, size: station::MEMORY, user_addr: 0, mmap_offset: 0 };
    let memory = GuestMemory::new().with_region(spec, file.as_fd().try_clone_to_owned().expect("a descriptor"));
    let bad = Station::plug(&switch, Options::default());
    for index in 0..2 {
        switch.stop_queue(bad.port, index).expect("the port is there");
    }
    let queue = DeviceQueue::new(memory.expect("a legal region"), &station::config(&Options::default(), 0));
    let queue = queue.expect("a legal queue");
    let start = VhostQueue { queue, kick: None, call: None, enabled: true, header_len: 12, mergeable: true };
    switch.start_queue(bad.port, 0, start).expect("the port is there");
    file.set_len(0).expect("it can be truncated");
    a.send(&frame(BROADCAST, mac(1), 60, 0));
    let event = next_event(&switch);
    assert_eq!((event.port, event.queue), (bad.port, 0));
    assert!(event.message.contains("shorter"), "{}", event.message);
}

#[test]
fn a_broken_queue_is_not_polled_however_often_it_kicks() {
    let switch = switch(1);
    let mut bad = Station::plug(&switch, Options::default());
    bad.transmit.add(&[(station::MEMORY - 10, 100)], &[], 0).expect("the driver does not check");
    bad.transmit.publish();
    bad.kick();
    next_event(&switch);
    for _ in 0..5 {
        let sleeps = switch.poller_stats()[0].sleeps;
        bad.kick();
        until(|| (switch.poller_stats()[0].sleeps > sleeps).then_some(()));
    }
}

#[test]
fn a_full_eventfd_that_blocks_stops_nobody() {
    let switch = switch(1);
    // Its port comes first in a flood.
    let bad = Station::plug(&switch, Options::default());
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options::default());
    let call = station::event_fd();
    let given = Call::new(call.try_clone().expect("a descriptor")).expect("an eventfd");
    switch.set_call(bad.port, 0, Some(given)).expect("the port is there");
    let mut call = std::fs::File::from(call);
    call.write_all(&(u64::MAX - 1).to_ne_bytes()).expect("it was empty");
    // SAFETY: a plain fcntl call; the flag is that of all duplicates.
    assert_eq!(unsafe { libc::fcntl(call.as_raw_fd(), libc::F_SETFL, 0) }, 0);
    a.send(&frame(BROADCAST, mac(1), 60, 0));
    let heard = b.receive();
    call.read_exact(&mut [0; 8]).expect("a poller that waits goes on");
    assert!(heard.is_some());
}

#[test]
fn memory_whose_file_is_truncated_takes_its_port_down_only() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options::default());
    // The same station's rings, in a file of which we keep a handle.
    let file = tempfile(station::MEMORY);
    let spec = RegionSpec { guest_addr: 0, size: station::MEMORY, user_addr: 0, mmap_offset: 0 };
    let map = || {
        let file = file.as_fd().try_clone_to_owned().expect("a descriptor");
        GuestMemory::new().with_region(spec, file).expect("a legal region")
    };
    let memory = map();
    let bad = Station::plug(&switch, Options::default());
    for index in 0..2 {
        switch.stop_queue(bad.port, index).expect("the port is there");
        let config = station::config(&Options::default(), 0x40000 * u64::from(index));
        let queue = DeviceQueue::new(memory.clone(), &config).expect("a legal queue");
        let start = VhostQueue { queue, kick: None, call: None, enabled: true, header_len: 12, mergeable: true };
        switch.start_queue(bad.port, index, start).expect("the port is there");
    }
    file.set_len(0).expect("it can be truncated");
    let event = next_event(&switch);
    assert_eq!(event.port, bad.port);
    assert!(event.message.contains("shorter"), "{}", event.message);
    assert!(memory.faulted());
    check_honest(&mut a, &mut b, 1);
}

fn tempfile(len: u64) -> std::fs::File {
    // SAFETY: a fresh descriptor of an anonymous file.
    let file = unsafe {
        use std::os::fd::FromRawFd;
        std::fs::File::from_raw_fd(libc::memfd_create(c"truncated".as_ptr(), libc::MFD_CLOEXEC))
    };
    file.set_len(len).expect("it can grow");
    file
}

#[test]
fn ports_come_and_go_under_traffic() {
    fn count(directory: &str) -> usize {
        std::fs::read_dir(directory).expect("procfs").count()
    }
    let switch = switch(2);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options { layout: Layout::Packed, ..Options::default() });
    check_honest(&mut a, &mut b, 0);
    let descriptors = count("/proc/self/fd");
    for round in 0..100u8 {
        let mut guest = Station::plug(&switch, Options::default());
        let hello = frame(BROADCAST, mac(100), 90, round);
        guest.send(&hello);
        a.expect(&hello);
        b.expect(&hello);
        if round % 2 == 0 {
            assert!(switch.stop_queue(guest.port, 0).expect("the port is there").is_some());
        }
        check_honest(&mut a, &mut b, round);
        switch.remove_port(guest.port).expect("the port is there");
        check_honest(&mut a, &mut b, round);
    }
    assert!(switch.stations().iter().all(|entry| entry.port < 2), "the stations of removed ports are forgotten");
    // Other tests of this process run at the same time; a leak of 100 ports would stand out.
    assert!(count("/proc/self/fd") < descriptors + 100);
}

#[test]
fn a_queue_goes_on_where_it_stopped() {
    for layout in [Layout::Split, Layout::Packed] {
        let switch = switch(1);
        let mut a = Station::plug(&switch, Options { layout, ..Options::default() });
        let mut b = Station::plug(&switch, Options { layout, ..Options::default() });
        check_honest(&mut a, &mut b, 0);
        let bases = [0, 1].map(|index| switch.stop_queue(b.port, index).expect("there").expect("it ran"));
        for (index, base) in (0..).zip(bases) {
            let ring = 0x40000 * u64::from(index);
            let config =
                viaduct_ring::QueueConfig { base, ..station::config(&Options { layout, ..Options::default() }, ring) };
            let queue = DeviceQueue::new(b.memory.clone(), &config).expect("a legal queue");
            let kick = b.kick.try_clone().ok();
            let start = VhostQueue { queue, kick, call: None, enabled: true, header_len: 12, mergeable: true };
            switch.start_queue(b.port, index, start).expect("the port is there");
        }
        check_honest(&mut a, &mut b, 1);
    }
}

#[test]
fn a_disabled_queue_delivers_nothing_and_its_frames_are_discarded() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options::default());
    switch.enable_queue(b.port, 0, false).expect("the port is there");
    switch.enable_queue(b.port, 1, false).expect("the port is there");
    b.send(&frame(BROADCAST, mac(2), 60, 0));
    b.reclaim();
    a.send(&frame(BROADCAST, mac(1), 60, 0));
    a.reclaim();
    assert!(a.poll().is_none() && b.poll().is_none());
    assert!(!stats(&switch, b.port).up);
    switch.enable_queue(b.port, 0, true).expect("the port is there");
    switch.enable_queue(b.port, 1, true).expect("the port is there");
    check_honest(&mut a, &mut b, 1);
}

#[test]
fn memory_comes_and_goes_under_traffic() {
    const SLOTS: u64 = 508;
    const SIZE: u64 = 1 << 16;
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options { layout: Layout::Packed, ..Options::default() });
    let mappings = || std::fs::read_to_string("/proc/self/maps").expect("procfs").matches("memfd:truncated").count();
    let before = mappings();
    let slot = |n: u64| RegionSpec {
        guest_addr: (1 << 30) + n * SIZE,
        size: SIZE,
        user_addr: (1 << 40) + n * SIZE,
        mmap_offset: 0,
    };
    let mut memory = a.memory.clone();
    for n in 0..SLOTS {
        memory = memory.with_region(slot(n), tempfile(SIZE).into()).expect("there are 509 slots");
        switch.set_memory(a.port, &memory).expect("the rings lie in it");
        check_honest(&mut a, &mut b, n as u8);
    }
    assert!(mappings() >= before + SLOTS as usize);
    assert!(memory.with_region(slot(SLOTS), tempfile(SIZE).into()).is_err(), "the 510th slot");
    for n in (0..SLOTS).rev() {
        memory = memory.without_region(&slot(n)).expect("it is there");
        switch.set_memory(a.port, &memory).expect("the rings lie in it");
        check_honest(&mut a, &mut b, n as u8);
    }
    drop(memory);
    until(|| (mappings() <= before + 1).then_some(()));
}
