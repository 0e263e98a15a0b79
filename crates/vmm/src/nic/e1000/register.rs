//! The registers of an 82540EM (Intel, "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual",
//! chapter 13) that a driver has a use for: their offsets, bits and values after reset.

#![allow(missing_docs, reason = "the manual's names")]

pub const CTRL: u32 = 0x0000;
pub const STATUS: u32 = 0x0008;
pub const EECD: u32 = 0x0010;
pub const EERD: u32 = 0x0014;
pub const CTRL_EXT: u32 = 0x0018;
pub const MDIC: u32 = 0x0020;
pub const FCAL: u32 = 0x0028;
pub const FCAH: u32 = 0x002C;
pub const FCT: u32 = 0x0030;
pub const VET: u32 = 0x0038;
pub const ICR: u32 = 0x00C0;
pub const ITR: u32 = 0x00C4;
pub const ICS: u32 = 0x00C8;
pub const IMS: u32 = 0x00D0;
pub const IMC: u32 = 0x00D8;
pub const RCTL: u32 = 0x0100;
pub const FCTTV: u32 = 0x0170;
pub const TXCW: u32 = 0x0178;
pub const TCTL: u32 = 0x0400;
pub const TIPG: u32 = 0x0410;
pub const AIT: u32 = 0x0458;
pub const LEDCTL: u32 = 0x0E00;
pub const PBA: u32 = 0x1000;
pub const FCRTL: u32 = 0x2160;
pub const FCRTH: u32 = 0x2168;
pub const RDBAL: u32 = 0x2800;
pub const RDBAH: u32 = 0x2804;
pub const RDLEN: u32 = 0x2808;
pub const RDH: u32 = 0x2810;
pub const RDT: u32 = 0x2818;
pub const RDTR: u32 = 0x2820;
pub const RXDCTL: u32 = 0x2828;
pub const RADV: u32 = 0x282C;
pub const RSRPD: u32 = 0x2C00;
pub const TDBAL: u32 = 0x3800;
pub const TDBAH: u32 = 0x3804;
pub const TDLEN: u32 = 0x3808;
pub const TDH: u32 = 0x3810;
pub const TDT: u32 = 0x3818;
pub const TIDV: u32 = 0x3820;
pub const TXDCTL: u32 = 0x3828;
pub const TADV: u32 = 0x382C;
pub const TSPMT: u32 = 0x3830;
pub const RXCSUM: u32 = 0x5000;
/// Multicast table array, 128 words.
pub const MTA: u32 = 0x5200;
/// Receive addresses, 16 pairs of words.
pub const RA: u32 = 0x5400;
/// VLAN filter table array, 128 words.
pub const VFTA: u32 = 0x5600;
/// Wake up and management: remembered, and without effect.
pub const WUC: u32 = 0x5800;
pub const MANAGEMENT_END: u32 = 0x5900;
/// One behind the last register with words of its own.
pub const END: u32 = 0x6000;

/// The statistics, which a read clears (13.7).
pub mod statistics {
    pub const FIRST: u32 = 0x4000;
    pub const LAST: u32 = 0x4124;
    pub const PRC64: u32 = 0x405C;
    pub const GPRC: u32 = 0x4074;
    pub const BPRC: u32 = 0x4078;
    pub const MPRC: u32 = 0x407C;
    pub const GPTC: u32 = 0x4080;
    pub const GORCL: u32 = 0x4088;
    pub const GOTCL: u32 = 0x4090;
    pub const RNBC: u32 = 0x40A0;
    pub const ROC: u32 = 0x40AC;
    pub const TORL: u32 = 0x40C0;
    pub const TOTL: u32 = 0x40C8;
    pub const TPR: u32 = 0x40D0;
    pub const TPT: u32 = 0x40D4;
    pub const PTC64: u32 = 0x40D8;
    pub const MPTC: u32 = 0x40F0;
    pub const BPTC: u32 = 0x40F4;
    pub const TSCTC: u32 = 0x40F8;
}

pub mod ctrl {
    pub const FD: u32 = 1 << 0;
    pub const SLU: u32 = 1 << 6;
    pub const SPEED_1000: u32 = 2 << 8;
    pub const RST: u32 = 1 << 26;
    pub const VME: u32 = 1 << 30;
    pub const PHY_RST: u32 = 1 << 31;
}

pub mod status {
    pub const FD: u32 = 1 << 0;
    pub const LU: u32 = 1 << 1;
    pub const SPEED_1000: u32 = 2 << 6;
    pub const ASDV_1000: u32 = 2 << 8;
}

/// Interrupt causes (13.4.17).
pub mod cause {
    pub const TXDW: u32 = 1 << 0;
    pub const TXQE: u32 = 1 << 1;
    pub const LSC: u32 = 1 << 2;
    pub const RXDMT0: u32 = 1 << 4;
    pub const RXT0: u32 = 1 << 7;
    pub const MDAC: u32 = 1 << 9;
    pub const ALL: u32 = 0x0001_F7DF;
}

pub mod rctl {
    pub const EN: u32 = 1 << 1;
    pub const UPE: u32 = 1 << 3;
    pub const MPE: u32 = 1 << 4;
    pub const LPE: u32 = 1 << 5;
    pub const RDMTS_SHIFT: u32 = 8;
    pub const MO_SHIFT: u32 = 12;
    pub const BAM: u32 = 1 << 15;
    pub const BSIZE_SHIFT: u32 = 16;
    pub const VFE: u32 = 1 << 18;
    pub const BSEX: u32 = 1 << 25;
    pub const SECRC: u32 = 1 << 26;
}

pub mod tctl {
    pub const EN: u32 = 1 << 1;
    pub const PSP: u32 = 1 << 3;
}

pub mod rxcsum {
    pub const IPOFL: u32 = 1 << 8;
    pub const TUOFL: u32 = 1 << 9;
}

/// RAH: the address is valid.
pub const RAH_AV: u32 = 1 << 31;

/// What software may write where, apart from the registers that do something; `None`: it is not one of those.
pub fn writable(offset: u32) -> Option<u32> {
    Some(match offset {
        TDBAL | RDBAL => 0xFFFF_FFF0,
        // A multiple of 128 bytes (13.4.27).
        TDLEN | RDLEN => 0x000F_FF80,
        TDH | RDH => 0xFFFF,
        RADV | TIDV | TADV | FCTTV | FCT | VET => 0xFFFF,
        RDTR => 0xFFFF,
        RXCSUM => 0x3FF,
        FCRTL => 0x8000_FFF8,
        FCRTH => 0xFFF8,
        CTRL_EXT | FCAL | FCAH | TXCW | TIPG | AIT | LEDCTL | PBA | RDBAH | RXDCTL | RSRPD | TDBAH | TXDCTL | TSPMT => {
            u32::MAX
        }
        MTA..0x5400 | RA..0x5480 | VFTA..0x5800 | WUC..MANAGEMENT_END => u32::MAX,
        _ => return None,
    })
}

/// What is not zero after a reset, the receive address apart.
pub const AFTER_RESET: &[(u32, u32)] = &[
    (CTRL, ctrl::FD | ctrl::SLU | ctrl::SPEED_1000),
    (VET, 0x8100),
    (TIPG, 0x0060_2008),
    (LEDCTL, 0x0706_8302),
    (PBA, 0x0010_0030),
];
