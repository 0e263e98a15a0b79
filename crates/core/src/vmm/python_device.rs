//! A device written in Python: any object with `read(offset, size)` and `write(offset, data)`.
//!
//! Only its accesses take the interpreter lock, on the thread of the vCPU that made them. What it raises cannot reach a
//! guest: the access reads as ones, or is lost, and the machine's owner and the log are told. A guest may repeat such an
//! access as fast as it likes, so both are told less and less often: the first time, the second, the fourth, the eighth.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use viaduct_vmm::bus::BusDevice;

use super::vm::EventCallback;

pub(super) struct PythonDevice {
    name: String,
    object: Py<PyAny>,
    events: Arc<EventCallback>,
    failures: AtomicU64,
}

impl PythonDevice {
    /// The adapter for `object`; its class gives the name if there is no other.
    pub(super) fn new(
        object: &Bound<'_, PyAny>,
        name: Option<String>,
        events: Arc<EventCallback>,
    ) -> PyResult<PythonDevice> {
        for method in ["read", "write"] {
            if !object.getattr(method).is_ok_and(|method| method.is_callable()) {
                return Err(PyTypeError::new_err(format!(
                    "{} has no method {method}: a device has read(offset, size) and write(offset, data)",
                    object.get_type().name()?
                )));
            }
        }
        let name = match name {
            Some(name) => name,
            None => object.get_type().name()?.to_string(),
        };
        Ok(PythonDevice { name, object: object.clone().unbind(), events, failures: AtomicU64::new(0) })
    }

    fn call_read(&self, py: Python<'_>, offset: u64, data: &mut [u8]) -> PyResult<()> {
        let value = self.object.bind(py).call_method1("read", (offset, data.len()))?;
        if let Ok(bytes) = value.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            if bytes.len() != data.len() {
                return Err(PyValueError::new_err(format!("read returned {} bytes for {}", bytes.len(), data.len())));
            }
            data.copy_from_slice(bytes);
            return Ok(());
        }
        let number: u64 = value.extract().map_err(|_| {
            let kind = value.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
            PyTypeError::new_err(format!("read returned {kind}: it returns bytes, or an int from 0"))
        })?;
        let bytes = number.to_le_bytes();
        let (given, beyond) = bytes.split_at(data.len().min(8));
        if beyond.iter().any(|byte| *byte != 0) {
            return Err(PyValueError::new_err(format!("read returned {number:#x} for {} bytes", data.len())));
        }
        data.copy_from_slice(given);
        Ok(())
    }

    fn failed(&self, py: Python<'_>, access: &str, error: &PyErr) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if !failures.is_power_of_two() {
            return;
        }
        let text = format!("{}: {access}: {error}", self.name);
        let log = || -> PyResult<()> {
            let arguments = PyDict::new(py);
            let logger = py.import("logging")?.call_method1("getLogger", ("viaduct.vmm",))?;
            // Where in the device it was is said once.
            let level = if failures == 1 { "error" } else { "info" };
            if failures == 1 {
                let exception = error.value(py);
                exception.setattr("__traceback__", error.traceback(py))?;
                arguments.set_item("exc_info", exception)?;
            }
            logger.call_method(level, ("%s (failure %d of this device)", &text, failures), Some(&arguments))?;
            Ok(())
        };
        if let Err(error) = log() {
            error.write_unraisable(py, None);
        }
        let detail = PyDict::new(py);
        let filled = detail
            .set_item("device", &self.name)
            .and_then(|()| detail.set_item("error", text))
            .and_then(|()| detail.set_item("failures", failures));
        if filled.is_ok() {
            self.events.call(py, "device-error", &detail);
        }
    }
}

impl BusDevice for PythonDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        // Without an interpreter, as at its end, the device is not there.
        let done = Python::try_attach(|py| match self.call_read(py, offset, data) {
            Ok(()) => true,
            Err(error) => {
                self.failed(py, &format!("read of {} bytes at {offset:#x}", data.len()), &error);
                false
            }
        });
        if done != Some(true) {
            data.fill(0xFF);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        Python::try_attach(|py| {
            let bytes = PyBytes::new(py, data);
            if let Err(error) = self.object.bind(py).call_method1("write", (offset, bytes)) {
                self.failed(py, &format!("write of {} bytes at {offset:#x}", data.len()), &error);
            }
        });
    }
}
