//! The emulated network card for Python: `viaduct._core.E1000`.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_guest::driver::NetDriver;
use viaduct_guest::link::LinkCounters;
use viaduct_vmm::nic::{DriverEnd, TapEnd, e1000};

use super::PciFunction;
use super::virtio::{from_bytes, to_bytes};
use crate::descriptors::duplicate;
use crate::guest::{QueueTuple, driver, link_counts, mac};
use crate::memory::GuestMemory;

/// A network card.
#[pyclass(module = "viaduct._core", extends = PciFunction, frozen)]
pub struct E1000 {
    inner: Arc<e1000::E1000>,
    /// Has its rings, and waits for the back-end to start them.
    prepared: Mutex<Option<NetDriver>>,
    counters: Arc<LinkCounters>,
    mtu: usize,
}

#[pymethods]
impl E1000 {
    #[new]
    #[pyo3(signature = (name, mac, memory, *, mtu = 1500))]
    fn new(name: String, mac: &[u8], memory: &GuestMemory, mtu: usize) -> PyResult<PyClassInitializer<E1000>> {
        let inner = Arc::new(e1000::E1000::new(name, self::mac(mac)?, memory.inner.clone())?);
        let base = PciFunction::new(inner.clone());
        let card = E1000 { inner, prepared: Mutex::default(), counters: Arc::default(), mtu };
        Ok(PyClassInitializer::from(base).add_subclass(card))
    }

    fn attach_tap(&self, py: Python<'_>, fd: RawFd) -> PyResult<()> {
        let tap: OwnedFd = duplicate(fd)?;
        let end = Box::new(TapEnd::new(tap)?);
        py.detach(|| self.inner.attach(end));
        Ok(())
    }

    fn prepare(
        &self,
        py: Python<'_>,
        memory: &GuestMemory,
        features: u64,
        data_addr: u64,
        data_end: u64,
        queues: Vec<QueueTuple>,
    ) -> PyResult<()> {
        let (mtu, counters) = (self.mtu, self.counters.clone());
        let driver = py.detach(|| driver(memory, features, mtu, (data_addr, data_end), queues, counters))?;
        *self.prepared.lock() = Some(driver);
        Ok(())
    }

    fn attach(&self, py: Python<'_>) {
        let driver = self.prepared.lock().take();
        if let Some(driver) = driver {
            py.detach(|| self.inner.attach(Box::new(DriverEnd::new(driver))));
        }
    }

    fn detach(&self, py: Python<'_>) {
        let prepared = self.prepared.lock().take();
        py.detach(|| {
            drop(prepared);
            self.inner.detach();
        });
    }

    fn set_memory(&self, py: Python<'_>, memory: &GuestMemory) {
        let memory = memory.inner.clone();
        py.detach(|| self.inner.set_memory(memory));
    }

    fn take_complaint(&self) -> Option<String> {
        self.inner.take_complaint()
    }

    #[getter]
    fn complaint_fd(&self) -> RawFd {
        self.inner.complaint_event().as_raw_fd()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyDict>> {
        link_counts(py, &self.counters)
    }

    fn pause(&self, py: Python<'_>) {
        py.detach(|| self.inner.pause());
    }

    fn resume(&self) {
        self.inner.resume();
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let state = py.detach(|| self.inner.save());
        to_bytes(py, &state)
    }

    fn restore(&self, py: Python<'_>, state: &[u8]) -> PyResult<()> {
        let state = from_bytes("e1000", state)?;
        py.detach(|| self.inner.restore(state)).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}
