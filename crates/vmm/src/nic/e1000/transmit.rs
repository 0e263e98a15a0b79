//! From descriptors to frames (3.3 to 3.5): gathers the pieces of a packet, makes frames of it, sends them.
//!
//! A packet's last descriptor is given back when all of its frames have been sent; until there is room for them the ring
//! stands still there. What cannot be sent as its descriptors say is dropped, and they are given back all the same.

use serde::{Deserialize, Serialize};

use super::offload::{self, Checksum, Context, Work};
use super::register::cause;
use super::registers::Ring;
use super::traffic::Traffic;
use crate::nic::FrameEnd;
use crate::nic::dma::Dma;

/// Bits of a descriptor's second word.
const END_OF_PACKET: u64 = 1 << 24;
const INSERT_FCS: u64 = 1 << 25;
/// In legacy descriptors: insert a checksum.
const INSERT_CHECKSUM: u64 = 1 << 26;
/// In context and data descriptors: segmentation.
const SEGMENTATION: u64 = 1 << 26;
const REPORT_STATUS: u64 = 1 << 27 | 1 << 28;
const EXTENDED: u64 = 1 << 29;
const VLAN: u64 = 1 << 30;
/// Type of extended descriptors.
const DATA: u64 = 1 << 20;
const TYPE: u64 = 0xF << 20;
const INSERT_IP: u64 = 1 << 40;
const INSERT_TRANSPORT: u64 = 1 << 41;
const DONE: u64 = 1 << 32;

/// Descriptors processed at a time.
const BATCH: u32 = 64;
/// Frames sent at a time: a driver chooses how small the segments of a packet are, and a vCPU may wait for the batch.
const FRAMES: usize = 256;
/// Longest frame that is no packet to be cut (the 16 KiB of the packet buffer).
const LONGEST_FRAME: usize = 16_288;
/// Longest packet to be cut: an IP packet behind the longest header that a context can say.
const LONGEST_PACKET: usize = 0x1_0000 + 256;
/// Shortest frame, without its check sequence (IEEE 802.3, 3.2.8).
const SHORTEST: usize = 60;

/// What registers say about transmission.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The ring.
    pub ring: Ring,
    /// Short frames are filled up.
    pub pad: bool,
    /// VLAN tags are inserted.
    pub vlan: bool,
    /// Their first two bytes.
    pub vlan_type: u16,
}

/// What a batch came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The first descriptor that is still the card's.
    pub head: u32,
    /// Interrupt causes.
    pub causes: u32,
    /// There was no room for a frame.
    pub full: bool,
    /// There are more frames than one batch may send.
    pub more: bool,
    /// A descriptor is outside memory, at this address.
    pub outside: Option<u64>,
}

/// How much of a packet has been sent.
enum Sent {
    /// All of it.
    All,
    /// Less, because there was no room for a frame.
    NoRoom,
    /// Less, because it is enough for now.
    Enough,
}

/// What is remembered from descriptor to descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transmit {
    checksums: Context,
    segmentation: Context,
    packet: Vec<u8>,
    work: Work,
    legacy: Option<Checksum>,
    own_fcs: bool,
    bad: bool,
    /// All pieces are there, and so many frames have been sent.
    sent: Option<usize>,
}

impl Transmit {
    /// Forgets a packet that was begun.
    pub fn abandon(&mut self) {
        self.packet.clear();
        (self.work, self.legacy, self.own_fcs, self.bad, self.sent) = (Work::default(), None, false, false, None);
    }

    /// Whether a saved one is not longer than it can be.
    pub fn is_sane(&self) -> bool {
        self.packet.len() <= LONGEST_PACKET
    }

    /// Processes descriptors. Without an `end`, frames go nowhere.
    pub fn run(
        &mut self,
        dma: &mut Dma,
        settings: &Settings,
        mut end: Option<&mut (dyn FrameEnd + 'static)>,
        traffic: &mut Traffic,
    ) -> Outcome {
        let ring = settings.ring;
        let mut outcome = Outcome { head: ring.head, ..Outcome::default() };
        let mut allowed = FRAMES;
        for _ in 0..ring.available(ring.head).min(BATCH) {
            let at = ring.descriptor(outcome.head);
            let mut bytes = [0; 16];
            if dma.read(at, &mut bytes).is_err() {
                outcome.outside = Some(at);
                break;
            }
            let [address, command] = words(&bytes);
            let context = command & EXTENDED != 0 && command & TYPE == 0;
            if context {
                let parsed = Context::parse([address, command]);
                if command & SEGMENTATION != 0 {
                    self.segmentation = parsed;
                } else {
                    self.checksums = parsed;
                }
            } else {
                if self.sent.is_none() {
                    self.gather(dma, address, command, settings);
                }
                if command & END_OF_PACKET != 0 {
                    match self.send(settings, end.as_deref_mut(), traffic, &mut allowed) {
                        Sent::All => self.abandon(),
                        Sent::NoRoom => outcome.full = true,
                        Sent::Enough => outcome.more = true,
                    }
                    if outcome.full || outcome.more {
                        break;
                    }
                }
            }
            if command & REPORT_STATUS != 0 {
                if dma.publish(at + 8, command | DONE).is_err() {
                    outcome.outside = Some(at);
                    break;
                }
                outcome.causes |= cause::TXDW;
            }
            outcome.head = ring.after(outcome.head);
        }
        if outcome.head == ring.tail && outcome.head != ring.head {
            outcome.causes |= cause::TXQE;
        }
        outcome
    }

    fn gather(&mut self, dma: &mut Dma, address: u64, command: u64, settings: &Settings) {
        let extended = command & EXTENDED != 0;
        let mut len = (command & 0xFFFF) as usize;
        if extended {
            len = (command & 0xF_FFFF) as usize;
            self.bad |= command & TYPE != DATA;
            self.work.segment |= command & SEGMENTATION != 0;
            self.work.ip |= command & INSERT_IP != 0;
            self.work.transport |= command & INSERT_TRANSPORT != 0;
        } else if command & INSERT_CHECKSUM != 0 {
            let field = (command >> 16 & 0xFF) as u8;
            self.legacy = Some(Checksum { start: (command >> 40 & 0xFF) as u8, field, end: 0 });
        }
        if command & VLAN != 0 && settings.vlan {
            self.work.tag = Some((command >> 48) as u16);
        }
        self.own_fcs |= command & END_OF_PACKET != 0 && command & INSERT_FCS == 0;
        let longest = if self.work.segment { LONGEST_PACKET } else { LONGEST_FRAME };
        let before = self.packet.len();
        if self.bad || before + len > longest {
            self.bad = true;
            return self.packet.clear();
        }
        self.packet.resize(before + len, 0);
        if dma.read(address, &mut self.packet[before..]).is_err() {
            self.bad = true;
            self.packet.clear();
        }
    }

    /// Sends what has been gathered, or the rest of it, in as many frames as are `allowed`.
    fn send(
        &mut self,
        settings: &Settings,
        mut end: Option<&mut (dyn FrameEnd + 'static)>,
        traffic: &mut Traffic,
        allowed: &mut usize,
    ) -> Sent {
        if self.sent.is_none() {
            self.finish();
        }
        let context = if self.work.segment { self.segmentation } else { self.checksums };
        let frames = if self.packet.is_empty() { 0 } else { offload::frames(&self.packet, &context, &self.work) };
        let first = self.sent.unwrap_or(0);
        let mut frame = Vec::new();
        for index in first..frames {
            if *allowed == 0 {
                self.sent = Some(index);
                return Sent::Enough;
            }
            offload::frame(&self.packet, &context, &self.work, index, &mut frame);
            if let Some(tag) = self.work.tag {
                offload::tag(&mut frame, settings.vlan_type, tag);
            }
            if settings.pad && frame.len() < SHORTEST {
                frame.resize(SHORTEST, 0);
            }
            if let Some(end) = end.as_deref_mut()
                && !end.send(&mut frame)
            {
                self.sent = Some(index);
                return Sent::NoRoom;
            }
            *allowed -= 1;
            traffic.count(&frame);
        }
        traffic.segmented += u32::from(self.work.segment && frames > 0);
        Sent::All
    }

    /// All pieces are there.
    fn finish(&mut self) {
        if self.own_fcs && !self.work.segment {
            let without = self.packet.len().saturating_sub(4);
            self.packet.truncate(without);
        }
        if let Some(checksum) = self.legacy {
            checksum.insert(&mut self.packet);
        }
    }
}

/// A descriptor's two words.
pub fn words(bytes: &[u8; 16]) -> [u64; 2] {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
    [word(0), word(8)]
}
