//! The packet switch.
