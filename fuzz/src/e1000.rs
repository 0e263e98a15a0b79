//! The emulated card against a driver that writes any register, descriptor and buffer, on a wire on which anything comes:
//! frames that leave are no longer than frames can be, a card that was reset touches nothing, and one that was saved goes on.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_vmm::bus::{Bus, Range};
use viaduct_vmm::nic::FrameEnd;
use viaduct_vmm::nic::e1000::E1000;
use viaduct_vmm::pci::{PciFunction, PciRoot, Windows, command, register};

use crate::quiet_vm::QuietVm;

const MEMORY: u64 = 1 << 17;
/// Header, 16 KiB of buffer, VLAN tag; or the longest header that a context can say, and a segment of 64 KiB.
const LONGEST: usize = (1 << 16) + 256 + 4;
/// Registers that do something.
const OFTEN: &[u32] = &[
    0x0000, 0x0010, 0x0014, 0x0020, 0x0038, 0x00C0, 0x00C4, 0x00C8, 0x00D0, 0x00D8, 0x0100, 0x0400, 0x2800, 0x2804,
    0x2808, 0x2810, 0x2818, 0x3800, 0x3804, 0x3808, 0x3810, 0x3818, 0x5000, 0x5200, 0x5400, 0x5404, 0x5600,
];

#[derive(Default)]
struct Wire {
    coming: VecDeque<Vec<u8>>,
    room: u8,
    sent: usize,
}

struct End(Arc<Mutex<Wire>>);

impl FrameEnd for End {
    fn send(&mut self, frame: &mut [u8]) -> bool {
        assert!(frame.len() <= LONGEST, "a frame of {} bytes", frame.len());
        let mut wire = self.0.lock().unwrap();
        if wire.room == 0 {
            return false;
        }
        wire.room -= 1;
        wire.sent += 1;
        true
    }
    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        let Some(next) = self.0.lock().unwrap().coming.pop_front() else { return false };
        *frame = next;
        true
    }
    fn flush(&mut self) {}
    fn prepare_to_sleep(&mut self, _: bool, _: bool) -> bool {
        true
    }
    fn wake(&self) -> Vec<(RawFd, i16)> {
        Vec::new()
    }
    fn awake(&mut self) {}
    fn broken(&self) -> Option<String> {
        None
    }
}

struct Computer {
    card: Arc<E1000>,
    _root: Arc<PciRoot>,
    _buses: [Arc<Bus>; 2],
}

impl Computer {
    fn new(memory: &GuestMemory, wire: &Arc<Mutex<Wire>>) -> Computer {
        let buses = [Arc::new(Bus::ports()), Arc::new(Bus::addresses())];
        let windows = Windows {
            io: Range { base: 0xC000, last: 0xFFFF },
            memory32: Range { base: 0xC000_0000, last: 0xCFFF_FFFF },
            memory64: Range { base: 1 << 40, last: (1 << 41) - 1 },
        };
        let root = PciRoot::new(Arc::new(QuietVm { refuses: false }), &buses[0], &buses[1], windows, [5; 4])
            .expect("an empty bus");
        let card = E1000::stepped("e1000".to_owned(), [2; 6], memory.clone()).expect("there are descriptors");
        let card = Arc::new(card);
        let slot = root.add(card.clone(), None).expect("a free slot");
        let value = command::MEMORY | command::IO | command::BUS_MASTER;
        root.write_config(u32::from(slot) << 3, register::COMMAND, &value.to_le_bytes());
        card.attach(Box::new(End(wire.clone())));
        Computer { card, _root: root, _buses: buses }
    }
}

/// Values that often mean something: places in memory, lengths of rings, bits.
fn value(u: &mut Unstructured) -> Result<u32> {
    Ok(match u.int_in_range(0..=5u8)? {
        0 => u.arbitrary()?,
        1 => u.int_in_range(0..=MEMORY as u32 + 64)?,
        2 => u.int_in_range(0..=32)?,
        3 => u.int_in_range(0..=16)? * 128,
        4 => 1 << u.int_in_range(0..=31)?,
        _ => 0x0600_813E ^ 1 << u.int_in_range(0..=31)?,
    })
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let memory = GuestMemory::allocate(MEMORY).expect("there is memory");
    let all = memory.translate(&mut RegionCache::default(), 0, MEMORY as u32).expect("all of it");
    let wire = Arc::new(Mutex::new(Wire::default()));
    let mut computer = Computer::new(&memory, &wire);
    while !u.is_empty() {
        match u.int_in_range(0..=15u8)? {
            0..=5 => {
                let offset = if u.ratio(7, 8)? { *u.choose(OFTEN)? } else { u.int_in_range(0..=0x1_FFFF)? };
                let bytes = value(u)?.to_le_bytes();
                computer.card.write_bar(0, offset.into(), &bytes[..*u.choose(&[4, 4, 4, 4, 2, 1])?]);
            }
            6 => {
                let mut bytes = [0; 8];
                let len = *u.choose(&[4usize, 1, 2, 8])?;
                computer.card.read_bar(0, u.int_in_range(0..=0x1_FFFF)?, &mut bytes[..len]);
            }
            7 => {
                let bytes = value(u)?.to_le_bytes();
                computer.card.write_bar(1, u64::from(u.int_in_range(0..=2u8)?) * 4, &bytes);
            }
            8..=10 => {
                // A descriptor, or anything else.
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&value(u)?.to_le_bytes());
                u.fill_buffer(&mut bytes[8..])?;
                let at = u.int_in_range(0..=MEMORY as u32 / 16 - 1)? % 64;
                // SAFETY: inside the span, whose memory is ours.
                unsafe { all.write(at * 16, &bytes) };
            }
            11 => {
                let frame = vec![u.arbitrary()?; u.int_in_range(0..=2000)?];
                wire.lock().unwrap().coming.push_back(frame);
            }
            12 => wire.lock().unwrap().room = u.arbitrary()?,
            13 => {
                computer.card.pause();
                let state = computer.card.save();
                let other = Computer::new(&memory, &wire);
                other.card.pause();
                other.card.restore(state).expect("a state that was saved");
                other.card.resume();
                computer = other;
            }
            14 if u.ratio(1, 8)? => {
                computer.card.write_bar(0, 0, &(1u32 << 26).to_le_bytes());
                let before = wire.lock().unwrap().sent;
                computer.card.step();
                assert_eq!(wire.lock().unwrap().sent, before, "a card that was reset sends nothing");
            }
            _ => {
                // A guest may give work for ever, a round of it is small.
                for _ in 0..4 {
                    if !computer.card.step() {
                        break;
                    }
                }
            }
        }
    }
    Ok(())
}
