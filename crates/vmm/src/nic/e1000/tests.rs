//! A driver of a few lines, in the order of Linux's, against a wire that remembers.

mod hostile;

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use viaduct_guest::checksum::{complete, prepare_partial, verify};

use super::register as reg;
use super::register::{cause, ctrl, rctl, statistics as stat, tctl};
use super::*;
use crate::bus::{Bus, Range};
use crate::pci::{PciRoot, Windows, command};
use crate::platform::mock;

const GSI: u32 = 5;
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x11];
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the driver has its things.
const TX_RING: u64 = 0x1000;
const RX_RING: u64 = 0x2000;
const TX_BUFFERS: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x8_0000;
const RING: u32 = 16;
const MEMORY: u64 = 1 << 20;

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Frames that were sent, frames to receive, and room for so many.
#[derive(Default)]
struct Wire {
    sent: Vec<Vec<u8>>,
    coming: VecDeque<Vec<u8>>,
    room: usize,
    broken: Option<String>,
}

struct WireEnd {
    wire: Arc<Mutex<Wire>>,
    event: EventFd,
}

impl FrameEnd for WireEnd {
    fn send(&mut self, frame: &mut [u8]) -> bool {
        let mut wire = self.wire.lock();
        if wire.room == 0 {
            return false;
        }
        wire.room -= 1;
        wire.sent.push(frame.to_vec());
        true
    }
    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        let Some(next) = self.wire.lock().coming.pop_front() else { return false };
        *frame = next;
        true
    }
    fn flush(&mut self) {}
    fn prepare_to_sleep(&mut self, for_frames: bool, for_room: bool) -> bool {
        let wire = self.wire.lock();
        !(for_frames && !wire.coming.is_empty() || for_room && wire.room > 0)
    }
    fn wake(&self) -> Vec<(RawFd, i16)> {
        use std::os::fd::AsRawFd;
        vec![(self.event.as_raw_fd(), libc::POLLIN)]
    }
    fn awake(&mut self) {
        let _ = self.event.read();
    }
    fn broken(&self) -> Option<String> {
        self.wire.lock().broken.clone()
    }
}

struct Computer {
    card: Arc<E1000>,
    vm: Arc<mock::Pins>,
    memory: GuestMemory,
    root: Arc<PciRoot>,
    slot: u8,
    wire: Arc<Mutex<Wire>>,
    event: EventFd,
    _buses: [Arc<Bus>; 2],
}

impl Computer {
    /// A card without a cable.
    fn new() -> Computer {
        Computer::with(E1000::new)
    }

    fn with(make: fn(String, [u8; 6], GuestMemory) -> std::io::Result<E1000>) -> Computer {
        let memory = GuestMemory::allocate(MEMORY).unwrap();
        let vm = mock::Pins::new();
        let buses = [Arc::new(Bus::ports()), Arc::new(Bus::addresses())];
        let windows = Windows {
            io: Range { base: 0xC000, last: 0xFFFF },
            memory32: Range { base: 0xC000_0000, last: 0xCFFF_FFFF },
            memory64: Range { base: 1 << 40, last: (1 << 41) - 1 },
        };
        let root = PciRoot::new(vm.clone(), &buses[0], &buses[1], windows, [GSI; 4]).unwrap();
        let card = Arc::new(make("e1000 0".to_owned(), MAC, memory.clone()).unwrap());
        let slot = root.add(card.clone(), None).unwrap();
        let wire = Arc::new(Mutex::new(Wire { room: usize::MAX, ..Wire::default() }));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let computer = Computer { card, vm, memory, root, slot, wire, event, _buses: buses };
        computer.set_command(command::MEMORY | command::IO | command::BUS_MASTER);
        computer
    }

    /// One with a cable, and with a driver that uses it.
    fn running() -> Computer {
        Computer::driven(Computer::new())
    }

    fn driven(computer: Computer) -> Computer {
        computer.plug();
        computer.start();
        computer
    }

    fn set_command(&self, value: u16) {
        self.root.write_config(u32::from(self.slot) << 3, config_register::COMMAND, &value.to_le_bytes());
    }

    fn plug(&self) {
        self.card.attach(Box::new(WireEnd { wire: self.wire.clone(), event: self.event.try_clone().unwrap() }));
    }

    fn start(&self) {
        self.write(reg::CTRL, ctrl::RST);
        self.write(reg::IMC, u32::MAX);
        self.read(reg::ICR);
        self.write(reg::TDBAL, TX_RING as u32);
        self.write(reg::TDLEN, RING * 16);
        self.write(reg::TCTL, tctl::EN | tctl::PSP);
        for index in 0..RING {
            let buffer = RX_BUFFERS + u64::from(index) * 2048;
            self.store(RX_RING + u64::from(index) * 16, &[buffer.to_le_bytes(), [0; 8]].concat());
        }
        self.write(reg::RDBAL, RX_RING as u32);
        self.write(reg::RDLEN, RING * 16);
        self.write(reg::RXCSUM, 0x300);
        self.write(reg::RCTL, rctl::EN | rctl::BAM | rctl::SECRC);
        self.write(reg::RDT, RING - 1);
        self.write(reg::IMS, cause::TXDW | cause::RXT0 | cause::RXDMT0 | cause::LSC);
    }

    fn read(&self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.card.read_bar(MEMORY_BAR, offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u32, value: u32) {
        self.card.write_bar(MEMORY_BAR, offset.into(), &value.to_le_bytes());
    }

    fn store(&self, addr: u64, bytes: &[u8]) {
        Dma::new(self.memory.clone()).write(addr, bytes).unwrap();
    }

    fn load(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Dma::new(self.memory.clone()).read(addr, &mut bytes).unwrap();
        bytes
    }

    fn descriptor(&self, ring: u64, index: u32) -> [u64; 2] {
        transmit::words(&self.load(ring + u64::from(index) * 16, 16).try_into().unwrap())
    }

    /// Puts descriptors into the transmit ring, and their number into its tail.
    fn post(&self, descriptors: &[[u64; 2]]) {
        let mut tail = self.read(reg::TDT);
        for words in descriptors {
            self.store(TX_RING + u64::from(tail) * 16, &words.map(u64::to_le_bytes).concat());
            tail = (tail + 1) % RING;
        }
        self.write(reg::TDT, tail);
    }

    fn sent(&self, count: usize) -> Vec<Vec<u8>> {
        until("sending", || self.wire.lock().sent.len() >= count);
        std::mem::take(&mut self.wire.lock().sent)
    }

    fn come(&self, frames: impl IntoIterator<Item = Vec<u8>>) {
        self.wire.lock().coming.extend(frames);
        self.event.write(1).unwrap();
    }

    /// Waits for a complaint.
    fn complaint(&self) -> String {
        let mut complaint = None;
        until("a complaint", || {
            complaint = self.card.take_complaint();
            complaint.is_some()
        });
        complaint.unwrap_or_default()
    }

    /// Waits for the interrupt and reads why.
    fn interrupt(&self) -> u32 {
        until("an interrupt", || self.vm.level(GSI));
        let causes = self.read(reg::ICR);
        assert!(!self.vm.level(GSI));
        causes
    }

    fn received(&self, index: u32) -> (u8, u8, Vec<u8>) {
        until("receiving", || self.descriptor(RX_RING, index)[1] >> 32 & 1 != 0);
        let [address, word] = self.descriptor(RX_RING, index);
        ((word >> 32) as u8, (word >> 40) as u8, self.load(address, (word & 0xFFFF) as usize))
    }
}

/// The words of a legacy descriptor.
fn legacy(address: u64, len: usize, command: u8) -> [u64; 2] {
    [address, len as u64 | u64::from(command) << 24]
}

const EOP_FCS_RS: u8 = 0x0B;
const DONE: u64 = 1 << 32;

fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([2; 6]);
    frame.extend([0x88, 0xB5]);
    frame.extend((frame.len()..len).map(|n| n as u8));
    frame
}

#[test]
fn linux_finds_address_link_and_speed() {
    let computer = Computer::new();
    assert_eq!(computer.read(reg::STATUS) & 2, 0, "no cable");
    computer.plug();
    assert_eq!(computer.read(reg::STATUS) & 0xC3, 0x83, "link, full duplex, 1000 Mb/s");
    computer.card.write_bar(IO_BAR, 0, &reg::CTRL.to_le_bytes());
    computer.card.write_bar(IO_BAR, 4, &ctrl::RST.to_le_bytes());
    assert_eq!(computer.read(reg::CTRL) & ctrl::RST, 0);
    assert_eq!([computer.read(reg::RA), computer.read(reg::RA + 4)], [2, 0x8000_1100]);
    computer.card.write_bar(IO_BAR, 0, &reg::STATUS.to_le_bytes());
    let mut data = [0; 4];
    computer.card.read_bar(IO_BAR, 4, &mut data);
    assert_eq!(u32::from_le_bytes(data), computer.read(reg::STATUS));
    let mut byte = [0];
    computer.card.read_bar(MEMORY_BAR, u64::from(reg::RA) + 7, &mut byte);
    assert_eq!(byte, [0x80], "any byte can be read");
    computer.card.write_bar(MEMORY_BAR, reg::RA.into(), &[9]);
    assert_eq!(computer.read(reg::RA), 2, "and none written alone");
}

#[test]
fn a_cable_that_comes_and_goes_interrupts() {
    let computer = Computer::new();
    computer.write(reg::IMS, cause::LSC);
    computer.plug();
    assert_eq!(computer.interrupt(), cause::LSC);
    computer.card.detach();
    assert_eq!(computer.interrupt(), cause::LSC);
    assert_eq!(computer.read(reg::STATUS) & 2, 0);
    computer.write(reg::IMC, cause::LSC);
    computer.write(reg::ICS, cause::LSC);
    assert!(!computer.vm.level(GSI));
    computer.write(reg::IMS, cause::LSC);
    assert!(computer.vm.level(GSI), "what was pending is shown when it is enabled");
    computer.write(reg::ICR, cause::LSC);
    assert!(!computer.vm.level(GSI), "and can be cleared by a write");
}

#[test]
fn frames_leave_in_order_and_their_descriptors_come_back() {
    let computer = Computer::running();
    for round in 0..5u8 {
        let frames: Vec<_> = (0..10).map(|n| frame([2, 0, 0, 0, round, n], 100 + usize::from(n))).collect();
        let mut descriptors = Vec::new();
        for (n, frame) in (0u64..).zip(&frames) {
            let at = TX_BUFFERS + n * 2048;
            computer.store(at, frame);
            // In two pieces.
            descriptors.push(legacy(at, 40, 0));
            descriptors.push(legacy(at + 40, frame.len() - 40, EOP_FCS_RS));
        }
        for some in descriptors.chunks(10) {
            computer.post(some);
            until("the ring's end", || computer.read(reg::TDH) == computer.read(reg::TDT));
        }
        assert_eq!(computer.sent(10), frames);
        assert_eq!(computer.interrupt() & cause::TXDW, cause::TXDW);
    }
    assert_eq!(computer.descriptor(TX_RING, 1)[1] & DONE, DONE);
    assert_eq!(computer.descriptor(TX_RING, 0)[1] & DONE, 0, "nobody asked for that one");
    assert_eq!(computer.read(stat::GPTC), 50);
    assert_eq!(computer.read(stat::GPTC), 0, "reading clears");
    let bytes: u32 = 5 * (0..10).map(|n| 100 + n + 4).sum::<u32>();
    assert_eq!([computer.read(stat::GOTCL), computer.read(stat::GOTCL + 4)], [bytes, 0]);
    assert_eq!(computer.read(stat::GOTCL), 0);
    assert_eq!(computer.read(stat::PTC64 + 4), 50);
}

#[test]
fn a_short_frame_is_filled_up_and_a_tag_inserted() {
    let computer = Computer::running();
    computer.write(reg::CTRL, computer.read(reg::CTRL) | ctrl::VME);
    let short = frame(MAC, 30);
    computer.store(TX_BUFFERS, &short);
    let [address, word] = legacy(TX_BUFFERS, 30, EOP_FCS_RS | 0x40);
    computer.post(&[[address, word | 0x2064 << 48]]);
    let sent = computer.sent(1).remove(0);
    assert_eq!(sent.len(), 60);
    assert_eq!(sent[12..18], [0x81, 0, 0x20, 0x64, 0x88, 0xB5]);
    assert_eq!(sent[18..34], short[14..]);
}

/// A TCP packet over IPv4 whose checksum is the driver's part of it: the sum of the pseudo-header.
fn tcp(payload: &[u8]) -> Vec<u8> {
    let mut packet = MAC.to_vec();
    packet.extend([2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0]);
    packet.extend((40 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    packet.extend(payload);
    let sum = viaduct_guest::checksum::sum(&packet[14..34]);
    packet[24..26].copy_from_slice(&(!viaduct_guest::checksum::fold(sum)).to_be_bytes());
    prepare_partial(&mut packet).unwrap();
    packet
}

#[test]
fn checksums_and_segments_are_made_as_contexts_say() {
    let computer = Computer::running();
    let packet = tcp(b"some bytes");
    computer.store(TX_BUFFERS, &packet);
    // IPCSS 14, IPCSO 24, IPCSE 33; TUCSS 34, TUCSO 50.
    let offsets = 14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40;
    let data = |len: usize, command: u64, options: u64| {
        [TX_BUFFERS, len as u64 | 1 << 20 | (0x20 | command) << 24 | options << 40]
    };
    computer.post(&[[offsets, 0x20 << 24], data(packet.len(), 0x0B, 2)]);
    let sent = computer.sent(1).remove(0);
    assert!(verify(&sent));
    assert_eq!(sent.len(), packet.len());

    let payload: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
    let mut long = tcp(&payload);
    // The length is not part of what the driver sums up, and the fields are left empty.
    long[16..18].fill(0);
    long[24..26].fill(0);
    let pseudo = viaduct_guest::checksum::sum(&long[26..34]) + 6;
    long[50..52].copy_from_slice(&viaduct_guest::checksum::fold(pseudo).to_be_bytes());
    computer.store(TX_BUFFERS, &long);
    let context = [offsets, 3000 | 0x27 << 24 | 54 << 40 | 1448 << 48];
    computer.post(&[context, data(54, 0x04, 3), [TX_BUFFERS + 54, data(3000, 0x0F, 3)[1]]]);
    let sent = computer.sent(3);
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1502, 1502, 158]);
    assert!(sent.iter().all(|frame| verify(frame)));
    assert_eq!(sent.iter().flat_map(|frame| &frame[54..]).copied().collect::<Vec<_>>(), payload);
    until("counting", || computer.read(stat::TSCTC) == 1);
}

#[test]
fn a_ring_stands_still_until_there_is_room() {
    let computer = Computer::running();
    computer.wire.lock().room = 1;
    computer.store(TX_BUFFERS, &frame(MAC, 60));
    computer.post(&[legacy(TX_BUFFERS, 60, EOP_FCS_RS); 3]);
    until("the first frame", || computer.read(reg::TDH) == 1);
    computer.wire.lock().room = 10;
    computer.event.write(1).unwrap();
    assert_eq!(computer.sent(3).len(), 3);
    until("the ring's end", || computer.read(reg::TDH) == 3);
}

#[test]
fn frames_arrive_with_what_was_checked() {
    let computer = Computer::running();
    let mut good = tcp(b"payload of some length, so that nothing has to be filled up");
    assert!(complete(&mut good, 34, 16));
    let mut bad = good.clone();
    bad[60] ^= 1;
    computer.come([good.clone(), bad.clone(), frame([0xFF; 6], 60), frame(MAC, 20)]);
    assert_eq!(computer.received(0), (0x63, 0, good));
    assert_eq!(computer.received(1), (0x63, 0x20, bad));
    assert_eq!(computer.received(2), (0x03, 0, frame([0xFF; 6], 60)));
    let (_, _, short) = computer.received(3);
    assert_eq!((short.len(), &short[..20]), (60, &frame(MAC, 20)[..]));
    assert_ne!(computer.interrupt() & cause::RXT0, 0);
    until("counting", || computer.read(reg::RDH) == 4);
    assert_eq!([stat::GPRC, stat::BPRC, stat::MPRC].map(|at| computer.read(at)), [4, 1, 0]);
}

#[test]
fn only_frames_that_are_wanted_arrive() {
    let computer = Computer::running();
    let multicast = [0x01, 0, 0x5E, 0, 0x12, 0x34];
    let hash = u32::from(u16::from_le_bytes([0x12, 0x34])) >> 4 & 0xFFF;
    computer.write(reg::MTA + 4 * (hash >> 5), 1 << (hash & 31));
    let other = [0x02, 9, 9, 9, 9, 9];
    let mut long = frame(MAC, 1519);
    computer.come([frame(other, 60), frame([0x01, 0, 0, 0, 0, 1], 60), long.clone(), frame(multicast, 60)]);
    assert_eq!(computer.received(0).2, frame(multicast, 60));
    until("counting", || computer.read(stat::ROC) == 1);
    let receive = rctl::EN | rctl::SECRC;
    computer.write(reg::RCTL, receive | rctl::UPE | rctl::LPE);
    long.resize(5000, 3);
    computer.come([frame([0xFF; 6], 60), frame(other, 60), long.clone()]);
    assert_eq!(computer.received(1).2, frame(other, 60));
    let pieces: Vec<_> = (2..5).map(|index| computer.received(index)).collect();
    assert_eq!(pieces.iter().map(|(status, ..)| status & 3).collect::<Vec<_>>(), [1, 1, 3]);
    assert_eq!(pieces.into_iter().flat_map(|(_, _, bytes)| bytes).collect::<Vec<_>>(), long);
    // VLAN 100 only, its tag taken off; the check sequence kept.
    computer.write(reg::CTRL, computer.read(reg::CTRL) | ctrl::VME);
    computer.write(reg::VFTA + 4 * 3, 1 << 4);
    computer.write(reg::RCTL, rctl::EN | rctl::UPE | rctl::VFE);
    let tagged = |id: u16| {
        let mut frame = frame(MAC, 70);
        offload::tag(&mut frame, 0x8100, id);
        frame
    };
    computer.come([tagged(101), tagged(100)]);
    let (status, _, bytes) = computer.received(5);
    assert_eq!(status, 0x0B);
    assert_eq!(computer.descriptor(RX_RING, 5)[1] >> 48, 100);
    assert_eq!(bytes[..70], frame(MAC, 70));
    assert_eq!(bytes[70..], crc32fast::hash(&frame(MAC, 70)).to_le_bytes());
}

#[test]
fn without_descriptors_frames_wait_and_few_are_told() {
    let computer = Computer::running();
    let frames: Vec<_> = (0..40u8).map(|n| frame([0x02, 0, 0, 0, 0, 0x11], 60 + usize::from(n))).collect();
    computer.come(frames.clone());
    let mut received = Vec::new();
    let mut causes = 0;
    let mut index = 0;
    while received.len() < 40 {
        received.push(computer.received(index).2);
        causes |= computer.read(reg::ICR);
        // Given back, empty.
        let buffer = computer.descriptor(RX_RING, index)[0];
        computer.store(RX_RING + u64::from(index) * 16, &[buffer.to_le_bytes(), [0; 8]].concat());
        computer.write(reg::RDT, index);
        index = (index + 1) % RING;
    }
    assert_eq!(received, frames);
    assert_eq!(causes & (cause::RXT0 | cause::RXDMT0), cause::RXT0 | cause::RXDMT0);
}

#[test]
fn a_reset_takes_everything_back() {
    let computer = Computer::running();
    computer.come([frame(MAC, 60)]);
    computer.received(0);
    computer.write(reg::CTRL, ctrl::RST);
    assert!(!computer.vm.level(GSI));
    assert_eq!([reg::RCTL, reg::TCTL, reg::TDLEN, reg::IMS].map(|at| computer.read(at)), [0; 4]);
    let before = computer.load(0, MEMORY as usize);
    computer.come((0..50).map(|_| frame(MAC, 60)));
    computer.post(&[legacy(TX_BUFFERS, 60, EOP_FCS_RS)]);
    until("the loss of frames that nobody receives", || computer.wire.lock().coming.is_empty());
    let after = computer.load(0, MEMORY as usize);
    // The driver's own descriptor is the only difference.
    let changed: Vec<_> = (0..MEMORY as usize).filter(|&at| before[at] != after[at]).collect();
    assert!(changed.iter().all(|&at| at < 0x1000 || (TX_RING as usize..TX_RING as usize + 256).contains(&at)));
    assert!(computer.wire.lock().sent.is_empty());
    computer.start();
    computer.come([frame(MAC, 77)]);
    assert_eq!(computer.received(0).2, frame(MAC, 77));
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let computer = Computer::new();
    computer.plug();
    computer.set_command(command::MEMORY);
    computer.start();
    computer.store(TX_BUFFERS, &frame(MAC, 60));
    computer.post(&[legacy(TX_BUFFERS, 60, EOP_FCS_RS)]);
    computer.come([frame(MAC, 60)]);
    until("the loss of a frame", || computer.wire.lock().coming.is_empty());
    assert!(computer.wire.lock().sent.is_empty());
    computer.set_command(command::MEMORY | command::BUS_MASTER);
    assert_eq!(computer.sent(1).len(), 1);
}

#[test]
fn interrupts_are_throttled_and_none_is_lost() {
    let computer = Computer::running();
    computer.write(reg::ITR, 2000);
    let mut index = 0;
    for round in 0..200 {
        computer.come([frame(MAC, 60 + round % 50)]);
        assert_ne!(computer.interrupt() & cause::RXT0, 0, "round {round}");
        computer.received(index);
        let buffer = computer.descriptor(RX_RING, index)[0];
        computer.store(RX_RING + u64::from(index) * 16, &[buffer.to_le_bytes(), [0; 8]].concat());
        computer.write(reg::RDT, index);
        index = (index + 1) % RING;
    }
    computer.write(reg::ICS, cause::LSC);
    assert_eq!(computer.interrupt(), cause::LSC);
}

#[test]
fn a_restored_card_goes_on() {
    let before = Computer::running();
    before.wire.lock().room = 0;
    before.store(TX_BUFFERS, &frame(MAC, 60));
    before.post(&[legacy(TX_BUFFERS, 30, 0), legacy(TX_BUFFERS + 30, 30, EOP_FCS_RS)]);
    until("the end of the packet", || before.read(reg::TDH) == 1);
    before.come((0..20).map(|n| frame(MAC, 60 + n)));
    until("a full ring", || before.read(reg::RDH) == RING - 1);
    before.card.pause();
    let state: E1000State = serde_json::from_slice(&serde_json::to_vec(&before.card.save()).unwrap()).unwrap();
    let after = Computer::new();
    after.card.pause();
    after.store(0, &before.load(0, MEMORY as usize));
    after.card.restore(state).unwrap();
    assert!(after.vm.level(GSI), "an interrupt was pending");
    after.plug();
    after.card.resume();
    assert_eq!(after.sent(1), [frame(MAC, 60)]);
    after.write(reg::RDT, 2);
    until("the frame that waited", || after.read(reg::RDH) == 0);
    assert_eq!(after.received(RING - 1).2, frame(MAC, 60 + 15));
    let mut damaged = before.card.save();
    damaged.registers = serde_json::from_str(&serde_json::to_string(&damaged.registers).unwrap().replacen(
        "\"words\":[",
        "\"words\":[7,",
        1,
    ))
    .unwrap();
    assert!(after.card.restore(damaged).is_err());
}

#[test]
fn the_loss_of_the_other_end_is_told() {
    let computer = Computer::running();
    computer.read(reg::ICR);
    computer.wire.lock().broken = Some("it has gone".to_owned());
    computer.event.write(1).unwrap();
    assert!(computer.complaint().contains("it has gone"));
    until("link down", || computer.read(reg::STATUS) & 2 == 0);
    computer.store(TX_BUFFERS, &frame(MAC, 60));
    computer.post(&[legacy(TX_BUFFERS, 60, EOP_FCS_RS)]);
    until("the ring's end", || computer.read(reg::TDH) == 1);
    computer.wire.lock().broken = None;
    computer.plug();
    computer.post(&[legacy(TX_BUFFERS, 60, EOP_FCS_RS)]);
    assert_eq!(computer.sent(1).len(), 1);
}
