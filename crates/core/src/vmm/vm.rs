//! A machine for Python: `viaduct._core.Vm`.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use viaduct_vmm::bus::Bus;
use viaduct_vmm::engine::kvm::{self, Options};
use viaduct_vmm::engine::{EngineError, Interrupts, Vm as EngineVm};
use viaduct_vmm::gdb::GdbServer;
use viaduct_vmm::machine::{Event, Machine, Owner, Place};

use super::bus_device::BusDevice;
use super::python_device::PythonDevice;
use super::registers;
use crate::memory::GuestMemory;

/// What a machine's owner is told by.
pub(super) struct EventCallback {
    function: parking_lot::Mutex<Option<Py<PyAny>>>,
}

impl EventCallback {
    /// Tells the owner. What it raises is reported as any exception that nobody can catch.
    pub(super) fn call(&self, py: Python<'_>, kind: &str, detail: &Bound<'_, PyDict>) {
        let function = self.function.lock().as_ref().map(|function| function.clone_ref(py));
        if let Some(function) = function
            && let Err(error) = function.call1(py, (kind, detail))
        {
            error.write_unraisable(py, Some(function.bind(py)));
        }
    }
}

struct EventOwner(Arc<EventCallback>);

impl Owner for EventOwner {
    fn event(&self, vcpu: usize, event: Event) {
        // Without an interpreter there is no owner.
        Python::try_attach(|py| {
            let detail = PyDict::new(py);
            match describe(&detail, vcpu, event) {
                Ok(kind) => self.0.call(py, kind, &detail),
                Err(error) => error.write_unraisable(py, None),
            }
        });
    }
}

/// Fills an event's details in and returns its kind.
fn describe(detail: &Bound<'_, PyDict>, vcpu: usize, event: Event) -> PyResult<&'static str> {
    detail.set_item("vcpu", vcpu)?;
    Ok(match event {
        Event::Paused => "paused",
        Event::Halted => "halted",
        Event::TripleFault { at } => {
            describe_place(detail, at)?;
            "triple-fault"
        }
        Event::SystemEvent { kind, data } => {
            detail.set_item("type", kind)?;
            detail.set_item("data", data)?;
            "system-event"
        }
        Event::Failed { reason, at } => {
            detail.set_item("reason", reason)?;
            describe_place(detail, at)?;
            "failed"
        }
        Event::Debug { address, dr6 } => {
            detail.set_item("address", address)?;
            detail.set_item("dr6", dr6)?;
            "debug"
        }
    })
}

fn describe_place(detail: &Bound<'_, PyDict>, at: Place) -> PyResult<()> {
    let registers = PyDict::new(detail.py());
    for (name, value) in at.registers {
        registers.set_item(name, value)?;
    }
    detail.set_item("address", at.address)?;
    detail.set_item("registers", registers)?;
    detail.set_item("code", PyBytes::new(detail.py(), &at.code))
}

fn to_python(error: EngineError) -> PyErr {
    match error {
        EngineError::System { what, source } => match source.raw_os_error() {
            Some(number) => PyOSError::new_err((number, format!("{what}: {source}"))),
            None => PyOSError::new_err(format!("{what}: {source}")),
        },
        EngineError::Invalid(_) => PyValueError::new_err(error.to_string()),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

/// vCPU, reason, port or address, device, count, nanoseconds.
type ExitRow = (usize, &'static str, Option<u64>, String, u64, u64);

/// A virtual machine.
#[pyclass(module = "viaduct._core", frozen)]
pub struct Vm {
    machine: Arc<Machine>,
    gdb: parking_lot::Mutex<Option<GdbServer>>,
    events: Arc<EventCallback>,
}

impl Vm {
    /// The machine as its devices see it.
    pub(crate) fn engine(&self) -> Arc<dyn EngineVm> {
        self.machine.vm()
    }

    /// The bus of ports.
    pub(crate) fn ports(&self) -> &Arc<Bus> {
        self.machine.ports()
    }

    /// The bus of addresses.
    pub(crate) fn addresses(&self) -> &Arc<Bus> {
        self.machine.addresses()
    }

    fn add(&self, bus: &Bus, base: u64, size: u64, device: &Bound<'_, PyAny>, name: Option<String>) -> PyResult<()> {
        let device: Arc<dyn viaduct_vmm::bus::BusDevice> = match device.cast::<BusDevice>() {
            Ok(device) => device.get().inner.clone(),
            Err(_) => Arc::new(PythonDevice::new(device, name, self.events.clone())?),
        };
        bus.insert(base, size, device).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(signature = (engine, memory, vcpus, *, interrupts = "kernel", dirty_ring = None, on_event = None))]
    fn new(
        py: Python<'_>,
        engine: &str,
        memory: &Bound<'_, GuestMemory>,
        vcpus: usize,
        interrupts: &str,
        dirty_ring: Option<u32>,
        on_event: Option<Py<PyAny>>,
    ) -> PyResult<Vm> {
        if engine != "kvm" {
            return Err(PyValueError::new_err(format!("engine {engine}: there is kvm")));
        }
        let interrupts = match interrupts {
            "kernel" => Interrupts::Engine,
            "split" => Interrupts::Split,
            "none" => Interrupts::None,
            other => {
                return Err(PyValueError::new_err(format!("interrupts {other}: allowed are kernel, split and none")));
            }
        };
        let inner = &memory.get().inner;
        let options = Options { vcpus, interrupts, dirty_ring };
        let parts = py.detach(|| kvm::create(inner, options)).map_err(to_python)?;
        let events = Arc::new(EventCallback { function: parking_lot::Mutex::new(on_event) });
        let machine = Machine::new(parts, Box::new(EventOwner(events.clone()))).map_err(to_python)?;
        Ok(Vm { machine: Arc::new(machine), gdb: parking_lot::Mutex::new(None), events })
    }

    #[pyo3(signature = (base, size, device, name = None))]
    fn add_pio(&self, base: u64, size: u64, device: &Bound<'_, PyAny>, name: Option<String>) -> PyResult<()> {
        self.add(self.machine.ports(), base, size, device, name)
    }

    #[pyo3(signature = (base, size, device, name = None))]
    fn add_mmio(&self, base: u64, size: u64, device: &Bound<'_, PyAny>, name: Option<String>) -> PyResult<()> {
        self.add(self.machine.addresses(), base, size, device, name)
    }

    fn remove_pio(&self, base: u64) -> PyResult<()> {
        self.machine.ports().remove(base).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn remove_mmio(&self, base: u64) -> PyResult<()> {
        self.machine.addresses().remove(base).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn set_memory(&self, py: Python<'_>, memory: &Bound<'_, GuestMemory>) -> PyResult<()> {
        let inner = &memory.get().inner;
        py.detach(|| self.machine.owned().set_memory(inner)).map_err(to_python)
    }

    fn log_dirty_pages(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        py.detach(|| self.machine.owned().log_dirty_pages(on)).map_err(to_python)
    }

    fn take_dirty_pages(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        let regions = py.detach(|| self.machine.owned().take_dirty_pages()).map_err(to_python)?;
        Ok(regions.iter().flat_map(|region| region.addresses()).collect())
    }

    fn set_line(&self, gsi: u32, level: bool) -> PyResult<()> {
        self.machine.vm().set_line(gsi, level).map_err(to_python)
    }

    fn signal_msi(&self, address: u64, data: u32) -> PyResult<()> {
        let msi = viaduct_vmm::engine::Msi { address, data };
        self.machine.vm().signal_msi(msi).map_err(to_python)
    }

    #[getter]
    fn vcpus(&self) -> usize {
        self.machine.vcpus()
    }

    fn registers<'py>(&self, py: Python<'py>, vcpu: usize) -> PyResult<Bound<'py, PyDict>> {
        let values = self.machine.with_vcpu(vcpu, |vcpu| vcpu.registers()).map_err(to_python)?;
        registers::to_dict(py, values)
    }

    fn set_registers(&self, vcpu: usize, values: &Bound<'_, PyDict>) -> PyResult<()> {
        let mut new = self.machine.with_vcpu(vcpu, |vcpu| vcpu.registers()).map_err(to_python)?;
        registers::update(&mut new, values)?;
        self.machine.with_vcpu(vcpu, |vcpu| vcpu.set_registers(&new)).map_err(to_python)
    }

    #[pyo3(signature = (*, paused = false))]
    fn start(&self, py: Python<'_>, paused: bool) -> PyResult<()> {
        py.detach(|| if paused { self.machine.start_paused() } else { self.machine.start() }).map_err(to_python)
    }

    #[pyo3(signature = (port, *, wait = false))]
    fn serve_gdb(&self, py: Python<'_>, port: u16, wait: bool) -> PyResult<u16> {
        py.detach(|| {
            let already =
                |server: &GdbServer| EngineError::Invalid(format!("gdb is served already, on {}", server.address()));
            if let Some(server) = &*self.gdb.lock() {
                return Err(already(server));
            }
            // Without the lock: the owner may be told that the machine is paused, and look who has done that.
            let make = if wait { GdbServer::awaited } else { GdbServer::new };
            let server = make(self.machine.clone(), port)?;
            let mut gdb = self.gdb.lock();
            if let Some(other) = &*gdb {
                return Err(already(other));
            }
            Ok(gdb.insert(server).address().port())
        })
        .map_err(to_python)
    }

    #[getter]
    fn gdb(&self, py: Python<'_>) -> Option<&'static str> {
        let machine = &self.machine;
        let served = py.detach(|| self.gdb.lock().is_some());
        match (served, machine.is_debugged(), machine.is_paused_for_debugger()) {
            (false, ..) => None,
            (true, false, true) => Some("awaited"),
            (true, false, false) => Some("absent"),
            (true, true, true) => Some("stopped"),
            (true, true, false) => Some("running"),
        }
    }

    fn request_pause(&self, py: Python<'_>) {
        py.detach(|| self.machine.request_pause());
    }

    fn wait_paused(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let patience = Duration::try_from_secs_f64(seconds)
            .map_err(|error| PyValueError::new_err(format!("{seconds} seconds: {error}")))?;
        Ok(py.detach(|| self.machine.wait_paused(patience)))
    }

    #[getter]
    fn paused(&self) -> bool {
        self.machine.is_paused()
    }

    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.machine.resume()).map_err(to_python)
    }

    fn save(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| {
            let state = self.machine.save()?;
            serde_json::to_string(&state).map_err(|error| EngineError::Invalid(error.to_string()))
        })
        .map_err(to_python)
    }

    fn restore(&self, py: Python<'_>, state: &str) -> PyResult<()> {
        py.detach(|| {
            let state = serde_json::from_str(state)
                .map_err(|error| EngineError::Invalid(format!("the saved state of a machine: {error}")))?;
            self.machine.restore(&state)
        })
        .map_err(to_python)
    }

    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.machine.reset()).map_err(to_python)
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.machine.stop());
    }

    /// The owner usually has the machine, and its method is what the machine calls: Python's collector has to see that.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // A collector does not wait. Who holds the function just now is about to call it, so it is not garbage.
        self.events.function.try_lock().map_or(Ok(()), |function| visit.call(&*function))
    }

    fn __clear__(&self) {
        let function = self.events.function.lock().take();
        drop(function);
    }

    fn close(&self, py: Python<'_>) {
        self.stop(py);
        py.detach(|| self.end_gdb());
        let function = self.events.function.lock().take();
        drop(function);
        for bus in [self.machine.ports(), self.machine.addresses()] {
            for (range, _) in bus.ranges() {
                // Gone already, if another thread removes it just now.
                let _ = bus.remove(range.base);
            }
        }
    }

    fn exits(&self) -> Vec<ExitRow> {
        let of = |vcpu| self.machine.exits(vcpu).map(|table| table.counts()).unwrap_or_default();
        (0..self.machine.vcpus())
            .flat_map(|vcpu| of(vcpu).into_iter().map(move |count| (vcpu, count)))
            .map(|(vcpu, c)| (vcpu, c.reason.name(), c.address, c.device, c.count, c.nanoseconds))
            .collect()
    }

    fn guest_time(&self) -> Vec<u64> {
        (0..self.machine.vcpus()).filter_map(|vcpu| self.machine.exits(vcpu)).map(|table| table.guest_time()).collect()
    }
}

impl Vm {
    /// Waits for the thread that serves gdb, which may want the interpreter lock, and this one's lock.
    fn end_gdb(&self) {
        let server = self.gdb.lock().take();
        drop(server);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // A vCPU may be in a Python device: it needs the interpreter lock to come back.
        Python::try_attach(|py| {
            py.detach(|| {
                self.machine.stop();
                // It holds the machine.
                self.end_gdb();
            });
        });
    }
}
