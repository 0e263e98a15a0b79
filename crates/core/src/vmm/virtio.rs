//! Virtio transports for Python: `viaduct._core.VirtioMmio` and `VirtioPci`. Their back-end is a Python object.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde::de::DeserializeOwned;
use viaduct_vmm::virtio::pci::{self, PciOptions};
use viaduct_vmm::virtio::{FrontEnd, Parameters, QueueSetup, VirtioBackend, mmio};

use super::{BusDevice, PciFunction, Vm};

/// Index, size, descriptor, driver and device address, kick and call eventfd.
pub(super) type Queue = (u16, u16, u64, u64, u64, i32, i32);

fn queue(setup: &QueueSetup) -> Queue {
    (setup.index, setup.size, setup.descriptor, setup.driver, setup.device, setup.kick, setup.call)
}

pub(super) fn refused(text: String) -> PyErr {
    PyValueError::new_err(text)
}

/// What was saved, as Python keeps it.
pub(super) fn to_bytes<'py>(py: Python<'py>, state: &impl serde::Serialize) -> PyResult<Bound<'py, PyBytes>> {
    let bytes = serde_json::to_vec(state).map_err(|error| refused(error.to_string()))?;
    Ok(PyBytes::new(py, &bytes))
}

/// The reverse of [`to_bytes`].
pub(super) fn from_bytes<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> PyResult<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| refused(format!("{name}: this is no saved state of such a device: {error}")))
}

/// A Python object with `activate`, `reset`, `write_config` and `driver_error`. The interpreter lock is taken for each call,
/// on the thread of the vCPU that wrote the register; the object may let go of it while it waits.
pub(super) struct PythonBackend(Py<PyAny>);

impl PythonBackend {
    pub(super) fn new(object: &Bound<'_, PyAny>) -> PyResult<PythonBackend> {
        for method in ["activate", "reset", "write_config", "driver_error"] {
            if !object.getattr(method).is_ok_and(|method| method.is_callable()) {
                return Err(PyTypeError::new_err(format!(
                    "{} has no method {method}: what stands behind a transport has activate(features, queues), reset(), \
                     write_config(offset, data) and driver_error(text)",
                    object.get_type().name()?
                )));
            }
        }
        Ok(PythonBackend(object.clone().unbind()))
    }

    /// Calls a method of whose failure nobody can be told.
    fn call<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        arguments: impl pyo3::call::PyCallArgs<'py>,
    ) -> Option<Bound<'py, PyAny>> {
        let object = self.0.bind(py);
        let result = object.call_method1(name, arguments);
        result.inspect_err(|error| error.clone_ref(py).write_unraisable(py, Some(object))).ok()
    }
}

impl VirtioBackend for PythonBackend {
    fn activate(&self, features: u64, queues: &[QueueSetup]) -> Result<(), String> {
        let activated = Python::try_attach(|py| {
            let queues: Vec<Queue> = queues.iter().map(queue).collect();
            let result = self.0.bind(py).call_method1("activate", (features, queues));
            result.map(drop).map_err(|error| error.value(py).to_string())
        });
        activated.unwrap_or_else(|| Err("the interpreter has ended".to_owned()))
    }

    fn reset(&self) {
        Python::try_attach(|py| drop(self.call(py, "reset", ())));
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Option<Vec<u8>> {
        Python::try_attach(|py| {
            let now = self.call(py, "write_config", (offset, PyBytes::new(py, data)))?;
            now.cast::<PyBytes>().ok().map(|bytes| bytes.as_bytes().to_vec())
        })
        .flatten()
    }

    fn driver_error(&self, text: &str) {
        Python::try_attach(|py| drop(self.call(py, "driver_error", (text,))));
    }
}

/// Features agreed upon and the queues that run.
pub(super) fn running(front_end: &FrontEnd) -> PyResult<(u64, Vec<Queue>)> {
    let (features, queues) = front_end.running_queues().map_err(refused)?;
    Ok((features, queues.iter().map(queue).collect()))
}

/// A virtio device behind registers at an address.
#[pyclass(module = "viaduct._core", extends = BusDevice, frozen)]
pub struct VirtioMmio {
    inner: Arc<mmio::VirtioMmio>,
}

#[pymethods]
impl VirtioMmio {
    #[classattr]
    const SIZE: u64 = mmio::SIZE;

    #[new]
    #[expect(clippy::too_many_arguments, reason = "they have names where it is called")]
    #[pyo3(signature = (vm, backend, *, name, device_id, features, queue_sizes, address, gsi, config = Vec::new()))]
    fn new(
        py: Python<'_>,
        vm: &Bound<'_, Vm>,
        backend: &Bound<'_, PyAny>,
        name: String,
        device_id: u16,
        features: u64,
        queue_sizes: Vec<u16>,
        address: u64,
        gsi: u32,
        config: Vec<u8>,
    ) -> PyResult<PyClassInitializer<VirtioMmio>> {
        let (engine, backend) = (vm.get().engine(), Box::new(PythonBackend::new(backend)?));
        let parameters = Parameters { name, device_id, features, queue_sizes, config };
        let device = py.detach(|| mmio::VirtioMmio::new(engine, backend, parameters, address, gsi)).map_err(refused)?;
        let inner = Arc::new(device);
        Ok(PyClassInitializer::from(BusDevice::new(inner.clone())).add_subclass(VirtioMmio { inner }))
    }

    #[getter]
    fn status(&self) -> u8 {
        self.inner.front_end().status()
    }

    fn config_changed(&self, py: Python<'_>, config: Vec<u8>) -> PyResult<()> {
        py.detach(|| self.inner.config_changed(&config)).map_err(refused)
    }

    fn needs_reset(&self, py: Python<'_>) {
        py.detach(|| self.inner.needs_reset());
    }

    fn power_on(&self, py: Python<'_>) {
        py.detach(|| self.inner.power_on());
    }

    fn running_queues(&self) -> PyResult<(u64, Vec<Queue>)> {
        running(self.inner.front_end())
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        to_bytes(py, &self.inner.save().map_err(refused)?)
    }

    fn restore(&self, py: Python<'_>, state: &[u8]) -> PyResult<()> {
        let state = from_bytes(&self.inner.front_end().parameters().name, state)?;
        py.detach(|| self.inner.restore(&state)).map_err(refused)
    }
}

/// A virtio device as a PCI function.
#[pyclass(module = "viaduct._core", extends = PciFunction, frozen)]
pub struct VirtioPci {
    inner: Arc<pci::VirtioPci>,
}

#[pymethods]
impl VirtioPci {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "they have names where it is called")]
    #[pyo3(signature = (
        vm, backend, *, name, device_id, features, queue_sizes, config = Vec::new(), transitional = false,
        port_notify = false
    ))]
    fn new(
        py: Python<'_>,
        vm: &Bound<'_, Vm>,
        backend: &Bound<'_, PyAny>,
        name: String,
        device_id: u16,
        features: u64,
        queue_sizes: Vec<u16>,
        config: Vec<u8>,
        transitional: bool,
        port_notify: bool,
    ) -> PyResult<PyClassInitializer<VirtioPci>> {
        let (engine, backend) = (vm.get().engine(), Box::new(PythonBackend::new(backend)?));
        let parameters = Parameters { name, device_id, features, queue_sizes, config };
        let options = PciOptions { transitional, port_notify };
        let inner = py.detach(|| pci::VirtioPci::new(engine, backend, parameters, options)).map_err(refused)?;
        Ok(PyClassInitializer::from(PciFunction::new(inner.clone())).add_subclass(VirtioPci { inner }))
    }

    #[staticmethod]
    fn has_transitional_id(device_id: u16) -> bool {
        pci::has_transitional_id(device_id)
    }

    #[getter]
    fn status(&self) -> u8 {
        self.inner.front_end().status()
    }

    fn config_changed(&self, py: Python<'_>, config: Vec<u8>) -> PyResult<()> {
        py.detach(|| self.inner.config_changed(&config)).map_err(refused)
    }

    fn needs_reset(&self, py: Python<'_>) {
        py.detach(|| self.inner.needs_reset());
    }

    fn running_queues(&self) -> PyResult<(u64, Vec<Queue>)> {
        running(self.inner.front_end())
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let state = py.detach(|| self.inner.save()).map_err(refused)?;
        to_bytes(py, &state)
    }

    fn restore(&self, py: Python<'_>, state: &[u8]) -> PyResult<()> {
        let state = from_bytes(&self.inner.front_end().parameters().name, state)?;
        py.detach(|| self.inner.restore(&state)).map_err(refused)
    }
}
