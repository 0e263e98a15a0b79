//! What Python may put on a machine's bus: `viaduct._core.BusDevice`, the base of every device made in Rust.

use std::sync::Arc;

use pyo3::prelude::*;

/// A device made in Rust. Classes of such devices derive from this one; Python cannot make a bare one.
#[pyclass(module = "viaduct._core", subclass, frozen)]
pub struct BusDevice {
    pub(crate) inner: Arc<dyn viaduct_vmm::bus::BusDevice>,
}

impl BusDevice {
    /// What a derived class's constructor gives as its base.
    pub(crate) fn new(inner: Arc<dyn viaduct_vmm::bus::BusDevice>) -> BusDevice {
        BusDevice { inner }
    }
}

#[pymethods]
impl BusDevice {
    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }
}
