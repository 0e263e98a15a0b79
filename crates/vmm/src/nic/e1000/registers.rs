//! The card's registers, and what reading and writing them does at once; what takes longer is the worker's.

use serde::{Deserialize, Serialize};

use super::eeprom::Eeprom;
use super::interrupts::Interrupts;
use super::phy::Phy;
use super::register::{self as reg, cause, ctrl, statistics as stat};

const WORDS: usize = (reg::END / 4) as usize;

/// What a write asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The worker has something to do.
    Work,
    /// What was begun before has to end first: the driver takes memory back, or wants frames to be handled differently.
    Settle,
}

/// A descriptor ring as its registers say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Guest-physical address.
    pub base: u64,
    /// Descriptors in it, at most 65528.
    pub count: u32,
    /// The next descriptor that is the card's.
    pub head: u32,
    /// The first one that is the driver's.
    pub tail: u32,
}

impl Ring {
    /// Guest-physical address of a descriptor. Wraps where the guest's base does.
    pub fn descriptor(&self, index: u32) -> u64 {
        self.base.wrapping_add(u64::from(index) * 16)
    }

    /// The one behind `index`.
    pub fn after(&self, index: u32) -> u32 {
        if index + 1 >= self.count { 0 } else { index + 1 }
    }

    /// How many are the card's from `index` on.
    pub fn available(&self, index: u32) -> u32 {
        if self.tail >= index { self.tail - index } else { self.count - index + self.tail }
    }
}

/// Everything a driver can see of the card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    words: Vec<u32>,
    /// Causes, mask and throttling.
    pub interrupts: Interrupts,
    /// EECD and EERD.
    pub eeprom: Eeprom,
    /// MDIC.
    pub phy: Phy,
    /// Distinguishes what was begun before a reset.
    pub generation: u64,
}

impl Registers {
    /// Those of a card with this address, without a cable.
    pub fn new(mac: [u8; 6]) -> Registers {
        let mut registers = Registers {
            words: vec![0; WORDS],
            interrupts: Interrupts::default(),
            eeprom: Eeprom::new(mac),
            phy: Phy::new(),
            generation: 0,
        };
        registers.reset();
        registers
    }

    /// Whether saved ones are all there.
    pub fn are_whole(&self) -> bool {
        self.words.len() == WORDS && self.eeprom.is_whole()
    }

    /// The device's own reset (CTRL.RST); the transceiver keeps its state (14.2).
    pub fn reset(&mut self) {
        self.words.fill(0);
        for &(offset, value) in reg::AFTER_RESET {
            self.set(offset, value);
        }
        let [a, b, c, d, e, f] = self.eeprom.mac();
        self.set(reg::RA, u32::from_le_bytes([a, b, c, d]));
        self.set(reg::RA + 4, u32::from_le_bytes([e, f, 0, 0]) | reg::RAH_AV);
        self.interrupts = Interrupts::default();
        self.generation += 1;
    }

    /// The value of a register of [`register`](reg) that is only remembered.
    pub fn get(&self, offset: u32) -> u32 {
        self.words[(offset / 4) as usize]
    }

    /// Changes one.
    pub fn set(&mut self, offset: u32, value: u32) {
        self.words[(offset / 4) as usize] = value;
    }

    /// The transmit ring, if the driver has enabled it and it can be one.
    pub fn transmit_ring(&self) -> Option<Ring> {
        (self.get(reg::TCTL) & reg::tctl::EN != 0).then(|| self.ring(reg::TDBAL)).flatten()
    }

    /// The receive ring, likewise.
    pub fn receive_ring(&self) -> Option<Ring> {
        self.receives().then(|| self.ring(reg::RDBAL)).flatten()
    }

    /// Whether the driver has enabled the receiver.
    pub fn receives(&self) -> bool {
        self.get(reg::RCTL) & reg::rctl::EN != 0
    }

    fn ring(&self, base: u32) -> Option<Ring> {
        let register = |other: u32| self.get(base + (other - reg::TDBAL));
        let ring = Ring {
            base: u64::from(register(reg::TDBAH)) << 32 | u64::from(register(reg::TDBAL)),
            count: register(reg::TDLEN) / 16,
            head: register(reg::TDH),
            tail: register(reg::TDT),
        };
        (ring.head < ring.count && ring.tail < ring.count).then_some(ring)
    }

    /// Plugs a cable in or out.
    pub fn set_cable(&mut self, there: bool) {
        let before = self.phy.link();
        self.phy.set_cable(there);
        if self.phy.link() != before {
            self.interrupts.raise(cause::LSC);
        }
    }

    fn status(&self) -> u32 {
        let link = if self.phy.link() { reg::status::LU } else { 0 };
        reg::status::FD | reg::status::SPEED_1000 | reg::status::ASDV_1000 | link
    }

    /// Reads a register; the offset is a multiple of four.
    pub fn read(&mut self, offset: u32) -> u32 {
        match offset {
            reg::STATUS => self.status(),
            reg::EECD => self.eeprom.wires(),
            reg::EERD => self.eeprom.word_read(),
            reg::MDIC => self.phy.mdic(),
            reg::ICR => self.interrupts.take_causes(),
            reg::IMS => self.interrupts.mask(),
            reg::ITR => self.interrupts.throttle(),
            stat::FIRST..=stat::LAST => self.take_statistic(offset),
            reg::CTRL | reg::RCTL | reg::TCTL | reg::RDT | reg::TDT => self.get(offset),
            _ if reg::writable(offset).is_some() => self.get(offset),
            _ => 0,
        }
    }

    /// Writes a register; the offset is a multiple of four.
    pub fn write(&mut self, offset: u32, value: u32) -> Effect {
        match offset {
            reg::CTRL => return self.control(value),
            reg::EECD => self.eeprom.set_wires(value),
            reg::EERD => self.eeprom.read_word(value),
            reg::MDIC => {
                let access = self.phy.set_mdic(value);
                let told = [(access.interrupt, cause::MDAC), (access.link, cause::LSC)];
                let causes = told.iter().filter(|(is, _)| *is).fold(0, |causes, (_, cause)| causes | cause);
                self.interrupts.raise(causes);
            }
            reg::ICR => self.interrupts.clear_causes(value),
            reg::ICS => self.interrupts.raise(value),
            reg::IMS => self.interrupts.change_mask(value, 0),
            reg::IMC => self.interrupts.change_mask(0, value),
            reg::ITR => self.interrupts.set_throttle(value),
            reg::RCTL | reg::TCTL => return self.change(offset, value),
            reg::RXCSUM | reg::VET => return self.change(offset, value & reg::writable(offset).unwrap_or(0)),
            reg::TDT | reg::RDT => {
                self.set(offset, value & 0xFFFF);
                return Effect::Work;
            }
            _ => {
                if let Some(bits) = reg::writable(offset) {
                    self.set(offset, value & bits);
                }
            }
        }
        Effect::None
    }

    fn control(&mut self, value: u32) -> Effect {
        if value & ctrl::RST != 0 {
            self.reset();
            return Effect::Settle;
        }
        if value & ctrl::PHY_RST != 0 {
            self.phy.reset();
            self.interrupts.raise(cause::LSC);
        }
        self.change(reg::CTRL, value & !ctrl::PHY_RST)
    }

    /// Changes how frames are handled.
    fn change(&mut self, offset: u32, value: u32) -> Effect {
        let before = self.get(offset);
        self.set(offset, value);
        if before == value { Effect::None } else { Effect::Settle }
    }

    /// Counts in a register of [`statistics`](stat), which stays at its largest value.
    pub fn count(&mut self, offset: u32, more: u32) {
        self.set(offset, self.get(offset).saturating_add(more));
    }

    /// Counts bytes in a pair of them.
    pub fn count_bytes(&mut self, low: u32, more: u32) {
        let bytes = u64::from(self.get(low + 4)) << 32 | u64::from(self.get(low));
        let bytes = bytes.saturating_add(u64::from(more));
        self.set(low, (bytes & 0xFFFF_FFFF) as u32);
        self.set(low + 4, (bytes >> 32) as u32);
    }

    fn take_statistic(&mut self, offset: u32) -> u32 {
        let value = self.get(offset);
        // Of a pair, the low half is read first and is still there afterwards; the high half clears both (13.7).
        match offset {
            stat::GORCL | stat::GOTCL | stat::TORL | stat::TOTL => {}
            _ => {
                self.set(offset, 0);
                if matches!(offset - 4, stat::GORCL | stat::GOTCL | stat::TORL | stat::TOTL) {
                    self.set(offset - 4, 0);
                }
            }
        }
        value
    }
}
