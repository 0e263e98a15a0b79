//! The devices of a PC for Python: `viaduct._core.Serial`, `Rtc`, `I8042`, `ResetControl`, `SleepControl`, `Pvpanic` and
//! `DebugExit`.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_vmm::platform::{self, Line, Owner, Request, serial};

use super::virtio::{from_bytes, to_bytes};
use super::{BusDevice, Vm};

/// Calls `function(device, request, value)` on the thread of the vCPU that asks.
struct Callback(Py<PyAny>);

impl Owner for Callback {
    fn request(&self, device: &str, request: Request) {
        let (kind, value) = match request {
            Request::Reset => ("reset", 0),
            Request::PowerOff => ("power-off", 0),
            Request::Panicked => ("panicked", 0),
            Request::CrashLoaded => ("crash-loaded", 0),
            Request::Exit(value) => ("exit", value),
            other => {
                debug_assert!(false, "{other:?} has no name");
                return;
            }
        };
        // Without an interpreter there is no owner.
        Python::try_attach(|py| {
            if let Err(error) = self.0.call1(py, (device, kind, value)) {
                error.write_unraisable(py, Some(self.0.bind(py)));
            }
        });
    }
}

fn owner(on_request: Py<PyAny>) -> Arc<dyn Owner> {
    Arc::new(Callback(on_request))
}

/// A serial port.
#[pyclass(module = "viaduct._core", extends = BusDevice, frozen)]
pub struct Serial {
    inner: Arc<platform::Serial>,
}

#[pymethods]
impl Serial {
    #[new]
    #[pyo3(signature = (vm, gsi, *, output_limit = 1 << 20))]
    fn new(vm: &Bound<'_, Vm>, gsi: u32, output_limit: usize) -> PyResult<PyClassInitializer<Serial>> {
        let line = Line::new(vm.get().engine(), gsi)
            .map_err(|error| PyValueError::new_err(format!("serial: interrupt {gsi}: {error}")))?;
        let inner = Arc::new(platform::Serial::new(line, serial::Output::new(output_limit)?));
        Ok(PyClassInitializer::from(BusDevice::new(inner.clone())).add_subclass(Serial { inner }))
    }

    #[getter]
    fn event_fd(&self) -> RawFd {
        self.inner.output().event_fd()
    }

    fn take_output<'py>(&self, py: Python<'py>) -> (Bound<'py, PyBytes>, u64) {
        let (bytes, lost) = self.inner.output().take();
        (PyBytes::new(py, &bytes), lost)
    }

    fn input(&self, py: Python<'_>, data: &[u8]) -> usize {
        py.detach(|| self.inner.input(data))
    }

    fn await_room(&self) {
        self.inner.await_room();
    }

    #[getter]
    fn unread(&self) -> usize {
        self.inner.unread()
    }

    fn reset(&self) {
        self.inner.reset();
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        to_bytes(py, &self.inner.save())
    }

    fn restore(&self, state: &[u8]) -> PyResult<()> {
        let state = from_bytes("serial", state)?;
        self.inner.restore(state).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

/// A real-time clock.
#[pyclass(module = "viaduct._core", extends = BusDevice, frozen)]
pub struct Rtc {
    inner: Arc<platform::Rtc>,
}

#[pymethods]
impl Rtc {
    #[new]
    fn new() -> PyClassInitializer<Rtc> {
        let inner = Arc::new(platform::Rtc::new());
        PyClassInitializer::from(BusDevice::new(inner.clone())).add_subclass(Rtc { inner })
    }

    fn set_memory(&self, below: u64, above: u64) {
        self.inner.set_memory(below, above);
    }

    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        to_bytes(py, &self.inner.save())
    }

    fn restore(&self, state: &[u8]) -> PyResult<()> {
        let state = from_bytes("rtc", state)?;
        self.inner.restore(state).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

/// A device that is registers, and an owner whom it asks.
macro_rules! request_device {
    ($(#[$doc:meta])* $class:ident, $name:literal) => {
        $(#[$doc])*
        #[pyclass(module = "viaduct._core", extends = BusDevice, frozen)]
        pub struct $class {
            inner: Arc<platform::$class>,
        }

        #[pymethods]
        impl $class {
            #[new]
            fn new(on_request: Py<PyAny>) -> PyClassInitializer<$class> {
                let inner = Arc::new(platform::$class::new(owner(on_request)));
                PyClassInitializer::from(BusDevice::new(inner.clone())).add_subclass($class { inner })
            }

            fn reset(&self) {
                self.inner.reset();
            }

            fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
                to_bytes(py, &self.inner.save())
            }

            fn restore(&self, state: &[u8]) -> PyResult<()> {
                self.inner.restore(from_bytes($name, state)?);
                Ok(())
            }
        }
    };
}

request_device! {
    /// A keyboard controller without a keyboard.
    I8042, "i8042"
}
request_device! {
    /// The reset control register.
    ResetControl, "reset-control"
}
request_device! {
    /// The registers that switch off.
    SleepControl, "sleep-control"
}

/// A panic device.
#[pyclass(module = "viaduct._core", extends = BusDevice, frozen)]
pub struct Pvpanic;

#[pymethods]
impl Pvpanic {
    #[new]
    fn new(on_request: Py<PyAny>) -> PyClassInitializer<Pvpanic> {
        let inner = Arc::new(platform::Pvpanic::new(owner(on_request)));
        PyClassInitializer::from(BusDevice::new(inner)).add_subclass(Pvpanic)
    }
}

/// A port that ends the machine.
#[pyclass(module = "viaduct._core", extends = BusDevice, frozen)]
pub struct DebugExit;

#[pymethods]
impl DebugExit {
    #[new]
    fn new(on_request: Py<PyAny>) -> PyClassInitializer<DebugExit> {
        let inner = Arc::new(platform::DebugExit::new(owner(on_request)));
        PyClassInitializer::from(BusDevice::new(inner)).add_subclass(DebugExit)
    }
}
