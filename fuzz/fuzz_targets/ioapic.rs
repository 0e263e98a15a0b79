#![no_main]
//! See the module of the same subject in the library.

viaduct_fuzz::target!(viaduct_fuzz::ioapic::run);
