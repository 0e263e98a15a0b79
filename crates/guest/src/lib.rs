//! Guests without a VM.
