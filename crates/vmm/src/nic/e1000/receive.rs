//! From frames to descriptors (3.2): which frames the driver wants, and where they go.

use viaduct_guest::checksum::{fold, sum, transport, verify};

use super::register::{self as reg, cause, ctrl, rctl, rxcsum};
use super::registers::{Registers, Ring};
use super::transmit::words;
use crate::nic::dma::Dma;

/// Longest frame without long-packet reception, check sequence included (13.4.22, LPE).
const LONG: usize = 1522;
/// Longest frame with it.
const LONGEST: usize = 16_384;
const FCS: usize = 4;
const SHORTEST: usize = 60;
const VLAN_TAG: usize = 4;
const ETHER_TYPE: usize = 12;

/// Status of a receive descriptor.
const DONE: u8 = 1 << 0;
const END_OF_PACKET: u8 = 1 << 1;
const VLAN_PACKET: u8 = 1 << 3;
const TRANSPORT_CHECKED: u8 = 1 << 5;
const IP_CHECKED: u8 = 1 << 6;
/// Errors.
const TRANSPORT_ERROR: u8 = 1 << 5;
const IP_ERROR: u8 = 1 << 6;
const DATA_ERROR: u8 = 1 << 7;

/// What registers say about a frame that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The ring.
    pub ring: Ring,
    /// Bytes of each buffer.
    pub buffer: usize,
    /// When so many descriptors are left, the driver wants to know.
    pub few: u32,
    strip_vlan: bool,
    vlan_type: u16,
    keep_fcs: bool,
    check_ip: bool,
    check_transport: bool,
}

impl Settings {
    /// Those of a card whose receiver is on, and whose ring can be one.
    pub fn of(registers: &Registers) -> Option<Settings> {
        let ring = registers.receive_ring()?;
        let (control, checksums) = (registers.get(reg::RCTL), registers.get(reg::RXCSUM));
        let size = 2048usize >> (control >> rctl::BSIZE_SHIFT & 3);
        let extended = control & rctl::BSEX != 0 && size != 2048;
        Some(Settings {
            ring,
            buffer: if extended { size * 16 } else { size },
            few: ring.count >> ((control >> rctl::RDMTS_SHIFT & 3).min(2) + 1),
            strip_vlan: registers.get(reg::CTRL) & ctrl::VME != 0,
            vlan_type: vlan_type(registers),
            keep_fcs: control & rctl::SECRC == 0,
            check_ip: checksums & rxcsum::IPOFL != 0,
            check_transport: checksums & rxcsum::TUOFL != 0,
        })
    }
}

fn vlan_type(registers: &Registers) -> u16 {
    (registers.get(reg::VET) & 0xFFFF) as u16
}

fn ether_type(frame: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes([*frame.get(ETHER_TYPE)?, *frame.get(ETHER_TYPE + 1)?]))
}

/// Why a frame is not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwanted {
    /// It is for others.
    Filtered,
    /// It is longer than the driver allows.
    TooLong,
}

/// Whether the driver wants the frame (3.2.1).
pub fn wanted(registers: &Registers, frame: &[u8]) -> Result<(), Unwanted> {
    let control = registers.get(reg::RCTL);
    let Some(destination) = frame.first_chunk::<6>() else { return Err(Unwanted::Filtered) };
    let for_us = if *destination == [0xFF; 6] {
        control & rctl::BAM != 0
    } else if destination[0] & 1 != 0 {
        control & rctl::MPE != 0 || hashed(registers, destination) || exact(registers, destination)
    } else {
        control & rctl::UPE != 0 || exact(registers, destination) || hashed(registers, destination)
    };
    if !for_us || !vlan_wanted(registers, frame) {
        return Err(Unwanted::Filtered);
    }
    let longest = if control & rctl::LPE != 0 { LONGEST } else { LONG };
    if frame.len() + FCS > longest { Err(Unwanted::TooLong) } else { Ok(()) }
}

fn exact(registers: &Registers, destination: &[u8; 6]) -> bool {
    let [a, b, c, d, e, f] = *destination;
    let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from(u16::from_le_bytes([e, f])));
    (0..16).any(|pair| {
        let at = reg::RA + 8 * pair;
        let stored = registers.get(at + 4);
        stored & reg::RAH_AV != 0 && stored & 0xFFFF == high && registers.get(at) == low
    })
}

/// The multicast table: 12 bits of the address choose one of its 4096 bits (13.5.1).
fn hashed(registers: &Registers, destination: &[u8; 6]) -> bool {
    let shift = [4, 3, 2, 0][(registers.get(reg::RCTL) >> rctl::MO_SHIFT & 3) as usize];
    let hash = u32::from(u16::from_le_bytes([destination[4], destination[5]])) >> shift & 0xFFF;
    registers.get(reg::MTA + 4 * (hash >> 5)) >> (hash & 31) & 1 != 0
}

fn vlan_wanted(registers: &Registers, frame: &[u8]) -> bool {
    let filtered = registers.get(reg::RCTL) & rctl::VFE != 0 && ether_type(frame) == Some(vlan_type(registers));
    let Some(&[high, low]) = frame.get(14..16).filter(|_| filtered) else { return !filtered };
    let id = u32::from(u16::from_be_bytes([high, low]) & 0xFFF);
    registers.get(reg::VFTA + 4 * (id >> 5)) >> (id & 31) & 1 != 0
}

/// What a frame came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// It is in the ring; the next descriptor.
    At(u32),
    /// There are not enough descriptors.
    Full,
    /// A descriptor is outside memory, at this address.
    Outside(u64),
}

/// Puts a frame into the ring from `head` on. The frame is changed to what the driver sees.
pub fn deliver(dma: &mut Dma, settings: &Settings, head: u32, frame: &mut Vec<u8>) -> Delivered {
    let ring = settings.ring;
    let needed = |len: usize| u32::try_from(len.div_ceil(settings.buffer)).unwrap_or(u32::MAX);
    // The longest that it can become.
    if ring.available(head) < needed(frame.len().max(SHORTEST) + FCS) {
        return Delivered::Full;
    }
    let (mut status, errors) = checked(settings, frame);
    let mut tag = 0;
    if settings.strip_vlan && ether_type(frame) == Some(settings.vlan_type) && frame.len() >= ETHER_TYPE + VLAN_TAG {
        tag = u16::from_be_bytes([frame[14], frame[15]]);
        status |= VLAN_PACKET;
        frame.drain(ETHER_TYPE..ETHER_TYPE + VLAN_TAG);
    }
    if frame.len() < SHORTEST {
        frame.resize(SHORTEST, 0);
    }
    if settings.keep_fcs {
        let fcs = crc32fast::hash(frame);
        frame.extend_from_slice(&fcs.to_le_bytes());
    }
    let mut at = head;
    let pieces = needed(frame.len()) as usize;
    for (index, piece) in frame.chunks(settings.buffer).enumerate() {
        let descriptor = ring.descriptor(at);
        let mut bytes = [0; 16];
        if dma.read(descriptor, &mut bytes).is_err() {
            return Delivered::Outside(descriptor);
        }
        let [address, _] = words(&bytes);
        let lost = if dma.write(address, piece).is_err() { DATA_ERROR } else { 0 };
        let last = index + 1 == pieces;
        let (status, errors) = if last { (status | END_OF_PACKET, errors) } else { (0, 0) };
        let word = piece.len() as u64
            | u64::from(status | DONE) << 32
            | u64::from(errors | lost) << 40
            | if last { u64::from(tag) << 48 } else { 0 };
        if dma.publish(descriptor + 8, word).is_err() {
            return Delivered::Outside(descriptor);
        }
        at = ring.after(at);
    }
    Delivered::At(at)
}

/// Status and errors of the checksums that the driver wants to have checked (3.2.9).
fn checked(settings: &Settings, frame: &[u8]) -> (u8, u8) {
    let (mut status, mut errors) = (0, 0);
    if settings.check_ip
        && ether_type(frame) == Some(0x0800)
        && let Some(first) = frame.get(14)
        && let Some(header) = frame.get(14..14 + usize::from(first & 0xF) * 4).filter(|header| header.len() >= 20)
    {
        status |= IP_CHECKED;
        if fold(sum(header)) != 0xFFFF {
            errors |= IP_ERROR;
        }
    }
    if settings.check_transport && transport(frame).is_some() {
        status |= TRANSPORT_CHECKED;
        if !verify(frame) {
            errors |= TRANSPORT_ERROR;
        }
    }
    (status, errors)
}

/// The causes of an interrupt after a batch that began with `before` descriptors and left `after`.
pub fn causes(settings: &Settings, before: u32, after: u32) -> u32 {
    let few = before > settings.few && after <= settings.few;
    if before == after { 0 } else { cause::RXT0 | if few { cause::RXDMT0 } else { 0 } }
}
