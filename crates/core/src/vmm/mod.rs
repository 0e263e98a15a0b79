//! The machine for Python.

pub(crate) mod bus_device;
pub(crate) mod e1000;
pub(crate) mod pci;
pub(crate) mod platform;
mod python_device;
mod registers;
pub(crate) mod virtio;
pub(crate) mod vm;

pub(crate) use bus_device::BusDevice;
pub(crate) use pci::{PciFunction, PciRoot};
pub(crate) use virtio::{VirtioMmio, VirtioPci};
pub(crate) use vm::Vm;
