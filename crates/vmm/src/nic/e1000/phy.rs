//! The card's transceiver: what a driver sees of a Marvell 88E1011 by the register MDIC (13.4.5 and IEEE 802.3, 22.2.4).
//!
//! It negotiates in no time, always with a partner that can do 1000 Mb/s in both directions, as long as there is a cable.

use serde::{Deserialize, Serialize};

const CONTROL: usize = 0;
const STATUS: usize = 1;
const ID_1: usize = 2;
const ID_2: usize = 3;
const ADVERTISEMENT: usize = 4;
const PARTNER: usize = 5;
const EXPANSION: usize = 6;
const GIGABIT_CONTROL: usize = 9;
const GIGABIT_STATUS: usize = 10;
const EXTENDED_STATUS: usize = 15;
const SPECIFIC_CONTROL: usize = 16;
const SPECIFIC_STATUS: usize = 17;
const EXTENDED_CONTROL: usize = 20;

const RESET: u16 = 1 << 15;
const POWER_DOWN: u16 = 1 << 11;
const RESTART: u16 = 1 << 9;

/// MDIC.
const REGISTER_SHIFT: u32 = 16;
const ADDRESS_SHIFT: u32 = 21;
const WRITE: u32 = 1 << 26;
const READ: u32 = 2 << 26;
const READY: u32 = 1 << 28;
const INTERRUPT: u32 = 1 << 29;
const ERROR: u32 = 1 << 30;
/// The transceiver of an 82540EM.
const ADDRESS: u32 = 1;

/// Values after a reset, while there is a link.
const AFTER_RESET: [(usize, u16); 12] = [
    (CONTROL, 0x1140),
    (STATUS, 0x796D),
    (ID_1, 0x0141),
    (ID_2, 0x0C20),
    (ADVERTISEMENT, 0x0DE1),
    (PARTNER, 0x41E1),
    (EXPANSION, 0x0001),
    (GIGABIT_CONTROL, 0x0E00),
    (GIGABIT_STATUS, 0x7C00),
    (EXTENDED_STATUS, 0x3000),
    (SPECIFIC_CONTROL, 0x0360),
    (EXTENDED_CONTROL, 0x0D60),
];
/// What is there only with a link: status, partner, gigabit status.
const LINK_AND_NEGOTIATED: u16 = 1 << 2 | 1 << 5;
/// 1000 Mb/s, both directions, resolved, link.
const SPECIFIC_STATUS_LINK: u16 = 0xAC00;

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The driver wants to be told that it has ended.
    pub interrupt: bool,
    /// It started a negotiation, or switched the transceiver on or off.
    pub link: bool,
}

/// The transceiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phy {
    registers: [u16; 32],
    cable: bool,
    mdic: u32,
}

impl Phy {
    /// One without a cable.
    pub fn new() -> Phy {
        let mut phy = Phy { registers: [0; 32], cable: false, mdic: READY };
        phy.reset();
        phy
    }

    /// Starts anew.
    pub fn reset(&mut self) {
        self.registers = [0; 32];
        for (register, value) in AFTER_RESET {
            self.registers[register] = value;
        }
    }

    /// Whether there is a cable.
    pub fn set_cable(&mut self, there: bool) {
        self.cable = there;
    }

    /// Whether there is a link.
    pub fn link(&self) -> bool {
        self.cable && self.registers[CONTROL] & POWER_DOWN == 0
    }

    /// Reads MDIC.
    pub fn mdic(&self) -> u32 {
        self.mdic
    }

    /// Writes MDIC, which reads or writes a register of the transceiver.
    pub fn set_mdic(&mut self, value: u32) -> Access {
        let register = (value >> REGISTER_SHIFT & 0x1F) as usize;
        let mut access = Access { interrupt: value & INTERRUPT != 0, link: false };
        // Only what is ready and in error has to be told.
        let kept = value & !(READY | ERROR);
        self.mdic = kept | READY;
        if value >> ADDRESS_SHIFT & 0x1F != ADDRESS {
            self.mdic |= ERROR;
        } else if value & READ != 0 {
            self.mdic = kept & !0xFFFF | READY | u32::from(self.read(register));
        } else if value & WRITE != 0 {
            access.link = self.write(register, (value & 0xFFFF) as u16);
        }
        access
    }

    fn read(&self, register: usize) -> u16 {
        let value = self.registers[register];
        let without_link = match register {
            STATUS => value & !LINK_AND_NEGOTIATED,
            PARTNER | GIGABIT_STATUS => 0,
            SPECIFIC_STATUS => 0,
            _ => value,
        };
        match register {
            _ if !self.link() => without_link,
            SPECIFIC_STATUS => SPECIFIC_STATUS_LINK,
            _ => value,
        }
    }

    fn write(&mut self, register: usize, value: u16) -> bool {
        match register {
            CONTROL => {
                let before = self.link();
                if value & RESET != 0 {
                    self.reset();
                } else {
                    self.registers[CONTROL] = value & !RESTART;
                }
                before != self.link() || value & (RESET | RESTART) != 0
            }
            STATUS | ID_1 | ID_2 | PARTNER | EXPANSION | GIGABIT_STATUS | EXTENDED_STATUS | SPECIFIC_STATUS => false,
            _ => {
                self.registers[register] = value;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(phy: &mut Phy, register: usize) -> u16 {
        phy.set_mdic(READ | ADDRESS << ADDRESS_SHIFT | (register as u32) << REGISTER_SHIFT);
        assert_eq!(phy.mdic() & (READY | ERROR), READY);
        phy.mdic() as u16
    }

    fn write(phy: &mut Phy, register: usize, value: u16) -> Access {
        phy.set_mdic(WRITE | ADDRESS << ADDRESS_SHIFT | (register as u32) << REGISTER_SHIFT | u32::from(value))
    }

    #[test]
    fn linux_knows_it() {
        let mut phy = Phy::new();
        let id = u32::from(read(&mut phy, 2)) << 16 | u32::from(read(&mut phy, 3));
        assert_eq!(id & !0xF, 0x0141_0C20, "an M88E1011");
    }

    #[test]
    fn the_link_is_that_of_the_cable() {
        let mut phy = Phy::new();
        assert_eq!(read(&mut phy, 1) & LINK_AND_NEGOTIATED, 0);
        phy.set_cable(true);
        assert_eq!(read(&mut phy, 1) & LINK_AND_NEGOTIATED, LINK_AND_NEGOTIATED);
        assert_eq!(read(&mut phy, 17), 0xAC00);
        assert!(write(&mut phy, 0, POWER_DOWN).link);
        assert!(!phy.link());
        assert!(write(&mut phy, 0, RESET).link);
        assert_eq!(read(&mut phy, 0), 0x1140, "the bit has cleared itself");
        assert!(phy.link());
        assert!(write(&mut phy, 0, 0x1340).link, "a negotiation");
        assert_eq!(read(&mut phy, 0), 0x1140);
        assert!(!write(&mut phy, 4, 0x0401).link);
        assert_eq!(read(&mut phy, 4), 0x0401);
        write(&mut phy, 2, 7);
        assert_eq!(read(&mut phy, 2), 0x0141);
    }

    #[test]
    fn there_is_one_transceiver() {
        let mut phy = Phy::new();
        assert!(phy.set_mdic(READ | INTERRUPT).interrupt);
        assert_eq!(phy.mdic() & (READY | ERROR), READY | ERROR);
    }
}
