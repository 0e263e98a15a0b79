//! The machine for Python.

pub(crate) mod bus_device;
mod python_device;
mod registers;
pub(crate) mod vm;

pub(crate) use bus_device::BusDevice;
pub(crate) use vm::Vm;
