//! The card's EEPROM: 64 words in a 93C46, read bit by bit over a Microwire bus (register EECD, 13.4.3) or by word
//! (EERD, 13.4.4). It cannot be written: its first three words are the address that the machine's owner gave.

use serde::{Deserialize, Serialize};

const WORDS: usize = 64;
/// All words together (5.6.35).
const CHECKSUM: u16 = 0xBABA;
const CHECKSUM_WORD: usize = 0x3F;

/// EECD.
const CLOCK: u32 = 1 << 0;
const SELECT: u32 = 1 << 1;
const DATA_IN: u32 = 1 << 2;
const DATA_OUT: u32 = 1 << 3;
const FLASH_WRITE: u32 = 3 << 4;
const REQUEST: u32 = 1 << 6;
const GRANT: u32 = 1 << 7;
const PRESENT: u32 = 1 << 8;

/// EERD.
const START: u32 = 1 << 0;
const DONE: u32 = 1 << 4;

/// A start bit, two of an operation, six of an address.
const COMMAND_BITS: u8 = 9;
const READ: u16 = 0b110;

/// The wires and what has come over them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Wires {
    lines: u32,
    /// Bits of the command so far, from its start bit on.
    command: u16,
    bits: u8,
    /// Bits of data that have been clocked out.
    read: u16,
    data_low: bool,
}

/// The memory and its wires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eeprom {
    words: Vec<u16>,
    wires: Wires,
    word_read: u32,
}

impl Eeprom {
    /// One with this address.
    pub fn new(mac: [u8; 6]) -> Eeprom {
        let mut words = vec![0; WORDS];
        for (word, bytes) in words.iter_mut().zip(mac.chunks_exact(2)) {
            *word = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        // Initialization control 1: the signature 01, and identifiers to be loaded from here (5.6.4).
        words[0x0A] = 0x4003;
        words[0x0B] = super::SUBSYSTEM;
        words[0x0C] = super::VENDOR;
        words[0x0D] = super::DEVICE;
        words[0x0E] = super::VENDOR;
        let sum = words[..CHECKSUM_WORD].iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
        words[CHECKSUM_WORD] = CHECKSUM.wrapping_sub(sum);
        Eeprom { words, wires: Wires::default(), word_read: DONE }
    }

    /// Whether a saved one has all its words.
    pub fn is_whole(&self) -> bool {
        self.words.len() == WORDS
    }

    /// The address.
    pub fn mac(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        for (bytes, word) in mac.chunks_exact_mut(2).zip(&self.words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        mac
    }

    fn word(&self, address: usize) -> u16 {
        self.words[address % WORDS]
    }

    /// Reads EECD.
    pub fn wires(&self) -> u32 {
        let grant = if self.wires.lines & REQUEST != 0 { GRANT } else { 0 };
        let out = if self.wires.data_low { 0 } else { DATA_OUT };
        self.wires.lines | grant | out | PRESENT
    }

    /// Writes EECD.
    pub fn set_wires(&mut self, value: u32) {
        let lines = value & (CLOCK | SELECT | DATA_IN | FLASH_WRITE | REQUEST);
        let rises = |line| lines & line != 0 && self.wires.lines & line == 0;
        let clocked = rises(CLOCK);
        let selected = rises(SELECT) || lines & SELECT == 0;
        self.wires.lines = lines;
        if selected {
            // A chip that is not busy holds its output high.
            self.wires = Wires { lines, ..Wires::default() };
        } else if clocked {
            self.clock(lines & DATA_IN != 0);
        }
    }

    fn clock(&mut self, bit: bool) {
        let wires = &mut self.wires;
        if wires.bits < COMMAND_BITS {
            // Zeroes before the start bit are nothing.
            if bit || wires.bits > 0 {
                wires.command = wires.command << 1 | u16::from(bit);
                wires.bits += 1;
            }
            // A zero comes before the data.
            wires.data_low = wires.bits == COMMAND_BITS && wires.command >> 6 == READ;
        } else if wires.command >> 6 == READ {
            // One word after the other, for as long as the driver clocks.
            let address = usize::from(wires.command & 0x3F) + usize::from(wires.read / 16);
            let bit = 15 - wires.read % 16;
            wires.read = (wires.read + 1) % (WORDS as u16 * 16);
            self.wires.data_low = self.word(address) >> bit & 1 == 0;
        }
    }

    /// Reads EERD.
    pub fn word_read(&self) -> u32 {
        self.word_read
    }

    /// Writes EERD: the word is there at once.
    pub fn read_word(&mut self, value: u32) {
        if value & START != 0 {
            let address = value >> 8 & 0xFF;
            self.word_read = u32::from(self.word(address as usize)) << 16 | address << 8 | DONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux's e1000_read_eeprom() does it.
    fn read_by_wires(eeprom: &mut Eeprom, address: u16) -> u16 {
        eeprom.set_wires(REQUEST);
        assert_ne!(eeprom.wires() & GRANT, 0);
        eeprom.set_wires(REQUEST | SELECT);
        let command = READ << 6 | address;
        for bit in (0..9).rev() {
            let data = if command >> bit & 1 == 1 { DATA_IN } else { 0 };
            eeprom.set_wires(REQUEST | SELECT | data);
            eeprom.set_wires(REQUEST | SELECT | data | CLOCK);
            eeprom.set_wires(REQUEST | SELECT | data);
        }
        let mut word = 0;
        for _ in 0..16 {
            eeprom.set_wires(REQUEST | SELECT | CLOCK);
            word = word << 1 | u16::from(eeprom.wires() & DATA_OUT != 0);
            eeprom.set_wires(REQUEST | SELECT);
        }
        eeprom.set_wires(REQUEST);
        eeprom.set_wires(0);
        word
    }

    #[test]
    fn both_ways_read_the_same_and_the_sum_is_right() {
        let mac = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];
        let mut eeprom = Eeprom::new(mac);
        let words: Vec<u16> = (0..64).map(|address| read_by_wires(&mut eeprom, address)).collect();
        assert_eq!(words[..3], [0x1102, 0x3322, 0x5544]);
        assert_eq!(words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word)), CHECKSUM);
        for (address, word) in words.iter().enumerate() {
            eeprom.read_word((address as u32) << 8 | START);
            assert_eq!(eeprom.word_read(), u32::from(*word) << 16 | (address as u32) << 8 | DONE);
        }
        assert_eq!(eeprom.mac(), mac);
    }

    #[test]
    fn other_commands_change_nothing() {
        let mut eeprom = Eeprom::new([2; 6]);
        let before = eeprom.words.clone();
        for command in 0..=u16::MAX {
            eeprom.set_wires(SELECT);
            for bit in (0..16).rev() {
                let data = if command >> bit & 1 == 1 { DATA_IN } else { 0 };
                eeprom.set_wires(SELECT | data | CLOCK);
                eeprom.set_wires(SELECT | data);
            }
            eeprom.set_wires(0);
        }
        for _ in 0..10_000 {
            eeprom.set_wires(SELECT | CLOCK | DATA_IN);
            eeprom.set_wires(SELECT);
        }
        assert_eq!(eeprom.words, before);
    }
}
