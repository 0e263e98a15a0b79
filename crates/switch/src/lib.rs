//! The packet switch.

pub mod net_header;
