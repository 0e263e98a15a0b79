//! Frames of any kind through the whole switch: rings, virtio-net headers, VLANs, forwarding table, offloads. One port is
//! hostile; what arrives at the others must be what their drivers agreed on.

use std::os::fd::OwnedFd;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};
use viaduct_switch::fuzzing::{Round, Stepper, switch_without_threads};
use viaduct_switch::net_header::{GSO_NONE, NEEDS_CSUM, NetHeader};
use viaduct_switch::{Offloads, PortConfig, Switch, VhostQueue, VlanMode};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest_memory::{Guest, SECOND};
use crate::ring::{placed, poke};

const RECEIVERS: usize = 3;
const SLOTS: u32 = 16;
/// Bytes of each receive buffer.
const BUFFER: u32 = 1024;
/// Where they begin, and where the sender has its frames.
const BUFFERS: u64 = SECOND;
const RINGS: [u64; 2] = [0, 0x800];

thread_local!(static GUESTS: [Guest; RECEIVERS + 1] = Default::default());

struct Receiver<'a> {
    guest: &'a Guest,
    port: u16,
    queue: DriverQueue,
    header_len: usize,
    mergeable: bool,
    accepts: Offloads,
    accepts_checksums: bool,
    max_frame: u32,
    vlan: VlanMode,
}

fn event() -> OwnedFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    // SAFETY: handed over.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

fn vlan(u: &mut Unstructured) -> Result<VlanMode> {
    Ok(match u.int_in_range(0..=3u8)? {
        0 => VlanMode::Access(5),
        1 => VlanMode::trunk(&[(4, 6), (100, 4095)]),
        _ => VlanMode::All,
    })
}

fn start(
    switch: &Switch,
    guest: &Guest,
    port: u16,
    index: u16,
    config: &QueueConfig,
    header_len: usize,
    mergeable: bool,
) {
    let queue = DeviceQueue::new(guest.memory.clone(), config).expect("a legal queue");
    let header_len = header_len as u32;
    let start = VhostQueue { queue, kick: None, call: None, enabled: true, header_len, mergeable };
    switch.start_queue(port, index, start).expect("the port is there");
}

fn port(switch: &Switch, vlan: VlanMode, max_frame: u32) -> u16 {
    switch.add_port(PortConfig { vlan, max_frame, pairs: 1, ..PortConfig::default() }).expect("there is room")
}

impl<'a> Receiver<'a> {
    fn plug(u: &mut Unstructured, switch: &Switch, guest: &'a Guest) -> Result<Receiver<'a>> {
        let (options, vlan) = (u.arbitrary::<u8>()?, vlan(u)?);
        let layout = if options & 1 != 0 { Layout::Packed } else { Layout::Split };
        let mergeable = options & 2 != 0;
        let header_len = if options & 4 != 0 && !mergeable { NetHeader::LEGACY_LEN } else { NetHeader::LEN };
        let max_frame = if options & 8 != 0 { 600 } else { u32::MAX };
        let accepts = match options >> 4 & 3 {
            0 => Offloads::NONE,
            1 => Offloads::CSUM,
            _ => Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::USO | Offloads::ECN,
        };
        let port = port(switch, vlan.clone(), max_frame);
        switch.set_accepted(port, accepts).expect("the port is there");
        let config = QueueConfig { event_idx: options & 64 != 0, ..placed(layout, SLOTS, 0) };
        let mut queue = DriverQueue::new(guest.memory.clone(), &config).expect("a legal queue");
        for slot in 0..u64::from(SLOTS) {
            queue.add_single(BUFFERS + slot * u64::from(BUFFER), BUFFER, true, slot);
        }
        queue.publish();
        start(switch, guest, port, 0, &config, header_len, mergeable);
        let accepts_checksums = options >> 4 & 3 != 0;
        Ok(Receiver { guest, port, queue, header_len, mergeable, accepts, accepts_checksums, max_frame, vlan })
    }

    /// Takes what has arrived and judges it.
    fn drain(&mut self) {
        while let Some((slot, written)) = self.queue.take().expect("the switch keeps the rules") {
            let mut frame = self.take(slot, written);
            let mut bytes = [0; NetHeader::LEN];
            bytes[..self.header_len].copy_from_slice(&frame[..self.header_len]);
            let header = NetHeader::parse(&bytes);
            frame.drain(..self.header_len);
            if self.mergeable {
                assert!((1..=SLOTS as u16).contains(&header.num_buffers), "{header:?}");
                for _ in 1..header.num_buffers {
                    let next = self.queue.take().expect("the switch keeps the rules");
                    let (slot, written) = next.expect("all buffers of a frame come together");
                    frame.extend(self.take(slot, written));
                }
            }
            self.judge(&header, &frame);
        }
        self.queue.publish();
    }

    fn take(&mut self, slot: u64, written: u32) -> Vec<u8> {
        assert!(written <= BUFFER);
        let addr = BUFFERS + slot * u64::from(BUFFER);
        let bytes = self.guest.read(addr, written as usize);
        assert!(self.queue.add_single(addr, BUFFER, true, slot));
        bytes
    }

    fn judge(&self, header: &NetHeader, frame: &[u8]) {
        assert!(frame.len() >= 14, "a frame of {} bytes", frame.len());
        let asked = if header.flags == 0 { Offloads::NONE } else { Offloads::CSUM };
        assert!(self.accepts.include(asked), "{header:?} for a driver that did not agree to checksums");
        if header.flags & NEEDS_CSUM != 0 {
            let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
            assert!(header.csum_start >= 14 && end <= frame.len(), "{header:?} for {} bytes", frame.len());
        }
        if header.gso_type != GSO_NONE {
            assert!(self.accepts.include(Offloads::TSO4) && self.accepts_checksums);
            assert!(header.flags & NEEDS_CSUM != 0 && header.gso_size != 0, "{header:?}");
        } else {
            assert!(frame.len() <= self.max_frame.saturating_add(4) as usize, "{} bytes", frame.len());
        }
        let tag = (frame[12..14] == [0x81, 0]).then(|| u16::from_be_bytes([frame[14], frame[15]]) & 0xfff);
        match &self.vlan {
            VlanMode::Trunk(_) => assert!(tag.is_some_and(|vlan| (4..=6).contains(&vlan) || vlan >= 100), "{tag:?}"),
            VlanMode::Access(_) | VlanMode::All => {}
        }
    }
}

/// A frame with its header in the sender's memory, and where.
fn write_frame(u: &mut Unstructured, guest: &Guest, at: u64) -> Result<u32> {
    let mut header = NetHeader::default();
    if u.int_in_range(0..=2u8)? == 0 {
        let kinds = [0, 1, 3, 4, 5, 0x81, 0x84, 2];
        header = NetHeader {
            flags: u.int_in_range(0..=3)?,
            gso_type: kinds[u.choose_index(kinds.len())?],
            gso_size: u.arbitrary()?,
            hdr_len: u.arbitrary::<u8>()?.into(),
            csum_start: u.int_in_range(0..=80)?,
            csum_offset: [16, 6, 0, 65535][u.choose_index(4)?],
            num_buffers: 0,
        };
    }
    let station = |u: &mut Unstructured| -> Result<[u8; 6]> {
        Ok(match u.int_in_range(0..=7u8)? {
            0 => [0xff; 6],
            1 => [1, 0x80, 0xc2, 0, 0, u.arbitrary()?],
            n => [2, 0, 0, 0, 0, n],
        })
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend(station(u)?);
    bytes.extend(station(u)?);
    if u.arbitrary()? {
        bytes.extend([0x81, 0]);
        bytes.extend(u.int_in_range(0..=8u16)?.to_be_bytes());
    }
    match u.int_in_range(0..=3u8)? {
        0 => bytes.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]),
        1 => {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 17, 64]);
            bytes.extend([0xfd; 32]);
        }
        _ => bytes.extend([0x88, 0xb5]),
    }
    let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
    bytes.extend(u.bytes(len)?);
    guest.write(at, &bytes);
    let longer = if u.int_in_range(0..=3u8)? == 0 { u.int_in_range(0..=16_000)? } else { 0 };
    Ok(bytes.len() as u32 + longer)
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    GUESTS.with(|guests| {
        guests.iter().for_each(Guest::reset);
        let result = play(&mut Unstructured::new(data), guests);
        guests.iter().for_each(Guest::check);
        result
    })
}

fn play(u: &mut Unstructured, guests: &[Guest; RECEIVERS + 1]) -> Result<()> {
    let switch = switch_without_threads(event()).expect("descriptors");
    let (bad, others) = guests.split_first().expect("there are several");
    let layout = if u.arbitrary()? { Layout::Packed } else { Layout::Split };
    let configs = RINGS.map(|start| QueueConfig { indirect: true, ..placed(layout, SLOTS, start) });
    let from = port(&switch, vlan(u)?, 0);
    let mut sender = DriverQueue::new(bad.memory.clone(), &configs[1]).expect("a legal queue");
    for index in 0..2 {
        start(&switch, bad, from, index, &configs[usize::from(index)], NetHeader::LEN, true);
    }
    let mut receivers = Vec::new();
    for guest in others {
        receivers.push(Receiver::plug(u, &switch, guest)?);
    }
    let mut stepper = Stepper::default();
    let mut sent = 0;
    while !u.is_empty() {
        match u.int_in_range(0..=15u8)? {
            0..=7 => {
                let at = BUFFERS + 0x400 * (sent % 16);
                sent += 1;
                let len = write_frame(u, bad, at)?;
                let cut = u.int_in_range(0..=len.min(60))?;
                // The address is not checked by the driver; the ring may be full or ruined.
                let pieces = [(at, cut), (at + u64::from(cut), len - cut)];
                let pieces = if cut == 0 { &pieces[1..] } else { &pieces[..] };
                let _ = sender.add(pieces, &[], 0);
                sender.publish();
            }
            8 | 9 => {
                let queue = usize::from(u.arbitrary::<bool>()?);
                poke(u, bad, &configs[queue])?;
            }
            10 => {
                let addr = u64::from(u.arbitrary::<u16>()?);
                bad.write(addr, &u.arbitrary::<[u8; 4]>()?);
            }
            11 => {
                // A station is learned behind a receiver.
                let receiver = &receivers[u.choose_index(RECEIVERS)?];
                let source = [2, 0, 0, 0, 0, u.int_in_range(2..=7)?];
                let frame = [&[0xff; 6][..], &source, &[0x88, 0xb5], &[0; 46]].concat();
                switch.announce(receiver.port, &frame).expect("the port is there");
            }
            12 => drop(switch.age()),
            13 => {
                let memory = if u.arbitrary()? { &bad.half } else { &bad.memory };
                switch.set_memory(from, memory).expect("the rings lie in either");
            }
            _ => {
                for _ in 0..4 {
                    let round = stepper.step(&switch, from, 0);
                    if round != Round::Waiting {
                        break;
                    }
                }
                for (port, _, message) in stepper.broken() {
                    assert_eq!(port, from, "an honest port is broken: {message}");
                }
                receivers.iter_mut().for_each(Receiver::drain);
                let _ = sender.take_many(&mut Vec::new(), 64);
            }
        }
    }
    Ok(())
}
