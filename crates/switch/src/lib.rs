//! The packet switch.

pub mod clock;
pub mod counters;
pub mod mac_table;
pub mod net_header;
