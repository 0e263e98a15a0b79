//! A virtual machine, below Python.
//!
//! # Theory of operation
//!
//! An [`engine`] executes the guest's instructions until one of them needs something that a virtual machine may not own.
//! That is an *exit*: an access to a port or to an address without memory behind it goes to the [`bus`] of its kind, which
//! finds the device that was put there, and the guest goes on with the answer. Everything above an engine knows it only by
//! the traits in [`engine`], so that the same devices serve KVM and a software CPU.
//!
//! Guest memory is ordinary memory of this process (`viaduct_memory::GuestMemory`); devices reach it without an exit. A
//! virtio driver's doorbell is an eventfd that the engine signals itself, and a device's interrupt is one that the engine
//! listens to: between a running driver and its device no exit is left that this crate would have to handle.

pub mod bus;
mod debugger;
pub mod engine;
pub mod exits;
pub mod gdb;
pub mod machine;
pub mod nic;
pub mod pci;
pub mod platform;
mod vcpu_thread;
pub mod virtio;
