//! The block device for Python: `viaduct._core.BlockDevice`.
//!
//! Every call lets go of the interpreter while it waits for a queue's thread or the disk. Descriptors are duplicated; the
//! caller keeps his.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyOSError, PyValueError};
use pyo3::prelude::*;
use viaduct_devices::block::{self, BlockError, BlockQueue, EventKind, Format};
use viaduct_ring::{DeviceQueue, QueueConfig};

use crate::descriptors::{call_of, duplicate};
use crate::memory::GuestMemory;
use crate::queue::{attach_inflight, parse_layout};

create_exception!(
    _core,
    ImageError,
    PyException,
    "A disk image that cannot be used; the text names the image, what was found and what to do."
);

fn to_python(error: BlockError) -> PyErr {
    match error {
        BlockError::System(..) => PyOSError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// A disk and the threads that serve it.
#[pyclass(module = "viaduct._core", frozen)]
pub struct BlockDevice {
    inner: block::BlockDevice,
}

#[pymethods]
impl BlockDevice {
    #[new]
    #[pyo3(signature = (path, event_fd, *, format = None, read_only = false, serial = Vec::new(), io_uring = true))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        event_fd: RawFd,
        format: Option<&str>,
        read_only: bool,
        serial: Vec<u8>,
        io_uring: bool,
    ) -> PyResult<BlockDevice> {
        let format = match format {
            None => None,
            Some("raw") => Some(Format::Raw),
            Some("qcow2") => Some(Format::Qcow2),
            Some(other) => return Err(PyValueError::new_err(format!("format {other:?} must be \"raw\" or \"qcow2\""))),
        };
        let event_fd = duplicate(event_fd)?;
        let image = py
            .detach(|| block::image::open(&path, format, read_only))
            .map_err(|error| ImageError::new_err(error.to_string()))?;
        let inner = block::BlockDevice::new(Arc::from(image), read_only, &serial, event_fd, io_uring)?;
        Ok(BlockDevice { inner })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.image().size()
    }

    #[getter]
    fn format(&self) -> String {
        self.inner.image().format().to_string()
    }

    fn set_features(&self, features: u64) {
        self.inner.set_features(features);
    }

    fn set_write_back(&self, py: Python<'_>, write_back: bool) -> PyResult<()> {
        Ok(py.detach(|| self.inner.set_write_back(write_back))?)
    }

    #[pyo3(signature = (index, memory, *, layout, size, descriptor_addr, driver_addr, device_addr, base, event_idx, indirect,
                        kick_fd, call_fd, log_addr, inflight = None))]
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    fn start_queue(
        &self,
        py: Python<'_>,
        index: u16,
        memory: &GuestMemory,
        layout: &str,
        size: u32,
        descriptor_addr: u64,
        driver_addr: u64,
        device_addr: u64,
        base: u32,
        event_idx: bool,
        indirect: bool,
        kick_fd: Option<RawFd>,
        call_fd: Option<RawFd>,
        log_addr: Option<u64>,
        inflight: Option<(RawFd, u64)>,
    ) -> PyResult<()> {
        let layout = parse_layout(layout)?;
        let in_order = false;
        let config = QueueConfig {
            layout,
            size,
            descriptor_addr,
            driver_addr,
            device_addr,
            base,
            event_idx,
            indirect,
            in_order,
        };
        let queue = py.detach(|| DeviceQueue::new(memory.inner.clone(), &config));
        let mut queue = queue.map_err(|error| PyValueError::new_err(error.to_string()))?;
        queue.set_log_addr(log_addr);
        if let Some((fd, offset)) = inflight {
            attach_inflight(&mut queue, fd, offset)?;
        }
        let kick = kick_fd.map(duplicate).transpose()?;
        let call = call_fd.map(call_of).transpose()?;
        py.detach(|| self.inner.start_queue(index, BlockQueue { queue, kick, call })).map_err(to_python)
    }

    fn enable_queue(&self, py: Python<'_>, index: u16, enabled: bool) -> PyResult<()> {
        py.detach(|| self.inner.enable_queue(index, enabled)).map_err(to_python)
    }

    fn set_call(&self, py: Python<'_>, index: u16, fd: Option<RawFd>) -> PyResult<()> {
        let call = fd.map(call_of).transpose()?;
        py.detach(|| self.inner.set_call(index, call)).map_err(to_python)
    }

    fn set_log_addr(&self, py: Python<'_>, index: u16, addr: Option<u64>) -> PyResult<()> {
        py.detach(|| self.inner.set_log_addr(index, addr)).map_err(to_python)
    }

    fn set_memory(&self, py: Python<'_>, memory: &GuestMemory) -> PyResult<()> {
        py.detach(|| self.inner.set_memory(&memory.inner)).map_err(to_python)
    }

    fn drain_queue(&self, index: u16) -> PyResult<()> {
        self.inner.drain_queue(index).map_err(to_python)
    }

    fn stop_queue(&self, py: Python<'_>, index: u16) -> PyResult<u32> {
        py.detach(|| self.inner.stop_queue(index)).map_err(to_python)
    }

    /// kind, queue, message, how many others were left out before it
    fn take_events(&self) -> Vec<(&'static str, u16, String, u64)> {
        let name = |kind| match kind {
            EventKind::Disk => "disk",
            EventKind::Request => "request",
            EventKind::Drained => "drained",
            EventKind::Ring => "ring",
            EventKind::Memory => "memory",
        };
        let events = self.inner.take_events().into_iter();
        events.map(|event| (name(event.kind), event.queue, event.message, event.missed)).collect()
    }

    fn stats(&self) -> BTreeMap<&'static str, u64> {
        let stats = self.inner.stats();
        BTreeMap::from([
            ("reads", stats.reads),
            ("bytes_read", stats.bytes_read),
            ("writes", stats.writes),
            ("bytes_written", stats.bytes_written),
            ("flushes", stats.flushes),
            ("discards", stats.discards),
            ("failed", stats.failed),
            ("refused", stats.refused),
        ])
    }
}
