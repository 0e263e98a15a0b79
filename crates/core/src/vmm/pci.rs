//! PCI for Python: `viaduct._core.PciRoot`, and the base of what can be put into its slots, `PciFunction`.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_vmm::bus::Range;
use viaduct_vmm::pci::{self, ConfigPorts, Ecam, PciError, Windows};

use super::virtio::{from_bytes, to_bytes};
use super::{BusDevice, Vm};

fn refused(error: PciError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A function made in Rust. Classes of such functions derive from this one; Python cannot make a bare one.
#[pyclass(module = "viaduct._core", subclass, frozen)]
pub struct PciFunction {
    inner: Arc<dyn pci::PciFunction>,
}

impl PciFunction {
    /// What a derived class's constructor gives as its base.
    pub(crate) fn new(inner: Arc<dyn pci::PciFunction>) -> PciFunction {
        PciFunction { inner }
    }
}

#[pymethods]
impl PciFunction {
    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// Bus 0 of a machine.
#[pyclass(module = "viaduct._core", frozen)]
pub struct PciRoot {
    inner: Arc<pci::PciRoot>,
}

/// First address and number of addresses.
type Window = (u64, u64);

fn range((base, size): Window) -> PyResult<Range> {
    match size.checked_sub(1).and_then(|more| base.checked_add(more)) {
        Some(last) => Ok(Range { base, last }),
        None => Err(PyValueError::new_err(format!("a window of {size:#x} bytes from {base:#x} is none"))),
    }
}

#[pymethods]
impl PciRoot {
    #[new]
    #[pyo3(signature = (vm, *, ports, memory32, memory64, gsis))]
    fn new(vm: &Bound<'_, Vm>, ports: Window, memory32: Window, memory64: Window, gsis: [u32; 4]) -> PyResult<PciRoot> {
        let vm = vm.get();
        let windows = Windows { io: range(ports)?, memory32: range(memory32)?, memory64: range(memory64)? };
        let root = pci::PciRoot::new(vm.engine(), vm.ports(), vm.addresses(), windows, gsis);
        Ok(PciRoot { inner: root.map_err(refused)? })
    }

    #[pyo3(signature = (function, slot = None))]
    fn add(&self, py: Python<'_>, function: &Bound<'_, PciFunction>, slot: Option<u8>) -> PyResult<u8> {
        let function = function.get().inner.clone();
        py.detach(|| self.inner.add(function, slot)).map_err(refused)
    }

    fn ecam(&self) -> BusDevice {
        BusDevice::new(Arc::new(Ecam::new(self.inner.clone())))
    }

    #[pyo3(signature = (reset_control = None))]
    fn config_ports(&self, reset_control: Option<&Bound<'_, BusDevice>>) -> BusDevice {
        let reset_control = reset_control.map(|device| device.get().inner.clone());
        BusDevice::new(Arc::new(ConfigPorts::new(self.inner.clone(), reset_control)))
    }

    fn functions(&self, py: Python<'_>) -> Vec<(u8, String, [Option<u64>; 6])> {
        py.detach(|| self.inner.functions())
    }

    fn power_on(&self, py: Python<'_>) {
        py.detach(|| self.inner.reset());
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let state = py.detach(|| self.inner.save());
        to_bytes(py, &state)
    }

    fn restore(&self, py: Python<'_>, state: &[u8]) -> PyResult<()> {
        let state = from_bytes("the PCI bus", state)?;
        py.detach(|| self.inner.restore(&state)).map_err(refused)
    }
}
