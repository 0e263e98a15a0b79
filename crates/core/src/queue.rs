//! Virtqueues for Python: `viaduct._core.DeviceQueue`, `Chain` and `DriverQueue`.
//!
//! One buffer at a time: these are for devices and drivers that are written in Python and for tests. Packets take the
//! batches of the ring crate and never come this way.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_memory::{Mapping, Span};
use viaduct_ring::{Batch, Layout, PACKED_START, QueueConfig, RingLayout, Segment};

use crate::memory::GuestMemory;

create_exception!(
    _core,
    RingError,
    PyValueError,
    "A virtqueue that breaks the rules; the text names what was found, what is allowed and the section of virtio 1.2."
);

fn ring_error(error: viaduct_ring::RingError) -> PyErr {
    RingError::new_err(error.to_string())
}

/// "split" or "packed".
pub(crate) fn parse_layout(layout: &str) -> PyResult<Layout> {
    match layout {
        "split" => Ok(Layout::Split),
        "packed" => Ok(Layout::Packed),
        _ => Err(PyValueError::new_err(format!("layout {layout:?} must be \"split\" or \"packed\""))),
    }
}

/// Size and alignment in bytes of the descriptor, driver and device part of a queue.
#[pyfunction]
#[pyo3(signature = (layout, size, *, event_idx = true))]
pub fn ring_parts(layout: &str, size: u32, event_idx: bool) -> PyResult<[(u64, u64); 3]> {
    let parts = RingLayout::new(parse_layout(layout)?, size, event_idx).map_err(ring_error)?;
    Ok([parts.descriptor, parts.driver, parts.device].map(|part| (part.size, part.align)))
}

/// Bytes of one queue's part of the record of chains in flight.
#[pyfunction]
pub fn inflight_bytes(layout: &str, size: u32) -> PyResult<u64> {
    let layout = parse_layout(layout)?;
    RingLayout::new(layout, size, true).map_err(ring_error)?;
    Ok(viaduct_ring::inflight_bytes(layout, size))
}

#[allow(clippy::too_many_arguments)]
fn config(
    layout: &str,
    size: u32,
    descriptor_addr: u64,
    driver_addr: u64,
    device_addr: u64,
    base: Option<u32>,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
) -> PyResult<QueueConfig> {
    let layout = parse_layout(layout)?;
    let base = base.unwrap_or(if layout == Layout::Packed { PACKED_START } else { 0 });
    Ok(QueueConfig { layout, size, descriptor_addr, driver_addr, device_addr, base, event_idx, indirect, in_order })
}

/// Records the chains of `queue` that are in flight at `offset` of a file; returns how many there were already.
pub(crate) fn attach_inflight(queue: &mut viaduct_ring::DeviceQueue, fd: RawFd, offset: u64) -> PyResult<usize> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{fd} is not a file descriptor")));
    }
    let config = queue.config();
    let bytes = viaduct_ring::inflight_bytes(config.layout, config.size);
    // SAFETY: borrowed only while it is mapped, which fails if it is not open.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let mapping = Mapping::new(file, offset, bytes).map_err(|error| PyValueError::new_err(error.to_string()))?;
    queue.attach_inflight(Arc::new(mapping), 0).map_err(ring_error)
}

/// A buffer that the driver made available and a device has taken.
#[pyclass(module = "viaduct._core")]
pub struct Chain {
    chain: viaduct_ring::Chain,
    spans: Vec<Span>,
    written: u32,
    // The spans point into it, and it may no longer be the queue's.
    _memory: viaduct_memory::GuestMemory,
    /// Until it is pushed: the number of the queue it came from.
    queue: Option<u64>,
}

impl Chain {
    /// Marks what was written in the log of a migration, which may have begun after the chain was taken.
    fn mark_written(&self, memory: &viaduct_memory::GuestMemory, written: u32) {
        let mut left = written.max(self.written);
        for span in &self.spans[self.chain.readable.into()..] {
            let here = left.min(span.len());
            memory.mark_written(*span, here);
            left -= here;
        }
    }
}

#[pymethods]
impl Chain {
    #[getter]
    fn id(&self) -> u16 {
        self.chain.id
    }

    #[getter]
    fn readable_len(&self) -> u32 {
        self.chain.readable_len
    }

    #[getter]
    fn writable_len(&self) -> u32 {
        self.chain.writable_len
    }

    #[getter]
    fn written(&self) -> u32 {
        self.written
    }

    #[pyo3(signature = (offset = 0, size = None))]
    fn read<'py>(&self, py: Python<'py>, offset: u32, size: Option<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let rest = self.chain.readable_len.saturating_sub(offset);
        PyBytes::new_with(py, size.unwrap_or(rest).min(rest) as usize, |mut bytes| {
            let mut skip = offset;
            for span in &self.spans[..self.chain.readable.into()] {
                if skip >= span.len() {
                    skip -= span.len();
                    continue;
                }
                let (now, later) = bytes.split_at_mut(bytes.len().min((span.len() - skip) as usize));
                // SAFETY: `_memory` keeps the span's mapping alive, and the bytes end within the span.
                unsafe { span.read(skip, now) };
                (bytes, skip) = (later, 0);
                if bytes.is_empty() {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Gives the whole pages of the writable elements back to the system; the bytes given back.
    fn discard(&self) -> PyResult<u64> {
        if self.queue.is_none() {
            return Err(PyValueError::new_err("the chain has been given back: it belongs to the driver"));
        }
        let mut bytes = 0;
        for span in &self.spans[self.chain.readable.into()..] {
            // SAFETY: `_memory` keeps the span's mapping alive.
            bytes += unsafe { viaduct_memory::discard(*span) }?;
        }
        Ok(bytes)
    }

    fn write(&mut self, mut data: &[u8]) -> PyResult<()> {
        if self.queue.is_none() {
            return Err(PyValueError::new_err("the chain has been given back: it belongs to the driver"));
        }
        let room = self.chain.writable_len - self.written;
        if data.len() > room as usize {
            return Err(PyValueError::new_err(format!("{} bytes where there is room for {room}", data.len())));
        }
        let mut skip = self.written;
        self.written += data.len() as u32;
        for span in &self.spans[self.chain.readable.into()..] {
            if skip >= span.len() {
                skip -= span.len();
                continue;
            }
            let (now, later) = data.split_at(data.len().min((span.len() - skip) as usize));
            // SAFETY: `_memory` keeps the span's mapping alive, and the bytes end within the span.
            unsafe { span.write(skip, now) };
            (data, skip) = (later, 0);
            if data.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// The device side of a virtqueue.
#[pyclass(module = "viaduct._core")]
pub struct DeviceQueue {
    queue: viaduct_ring::DeviceQueue,
    batch: Batch,
    number: u64,
}

#[pymethods]
impl DeviceQueue {
    #[new]
    #[pyo3(signature = (memory, *, layout, size, descriptor_addr, driver_addr, device_addr, base = None, event_idx = false,
        indirect = false, in_order = false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        memory: &GuestMemory,
        layout: &str,
        size: u32,
        descriptor_addr: u64,
        driver_addr: u64,
        device_addr: u64,
        base: Option<u32>,
        event_idx: bool,
        indirect: bool,
        in_order: bool,
    ) -> PyResult<DeviceQueue> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let config =
            config(layout, size, descriptor_addr, driver_addr, device_addr, base, event_idx, indirect, in_order)?;
        let queue = viaduct_ring::DeviceQueue::new(memory.inner.clone(), &config).map_err(ring_error)?;
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(DeviceQueue { queue, batch: Batch::with_capacity(1), number })
    }

    fn set_memory(&mut self, memory: &GuestMemory) -> PyResult<()> {
        self.queue.set_memory(memory.inner.clone()).map_err(ring_error)
    }

    fn set_log_addr(&mut self, addr: Option<u64>) {
        self.queue.set_log_addr(addr);
    }

    fn attach_inflight(&mut self, fd: RawFd, offset: u64) -> PyResult<usize> {
        attach_inflight(&mut self.queue, fd, offset)
    }

    fn pop(&mut self) -> PyResult<Option<Chain>> {
        self.batch.clear();
        self.queue.peek(&mut self.batch, 1).map_err(ring_error)?;
        self.queue.consume(&self.batch.chains);
        Ok(self.batch.chains.first().map(|&chain| Chain {
            chain,
            spans: self.batch.spans.clone(),
            written: 0,
            _memory: self.queue.memory().clone(),
            queue: Some(self.number),
        }))
    }

    #[pyo3(signature = (chain, written = None))]
    fn push(&mut self, chain: &mut Chain, written: Option<u32>) -> PyResult<()> {
        let written = written.unwrap_or(chain.written);
        if written > chain.chain.writable_len {
            let room = chain.chain.writable_len;
            return Err(PyValueError::new_err(format!("{written} bytes written where there is room for {room}")));
        }
        match chain.queue.take() {
            Some(number) if number == self.number => {
                chain.mark_written(self.queue.memory(), written);
                self.queue.complete(&chain.chain, written);
            }
            Some(number) => {
                chain.queue = Some(number);
                return Err(PyValueError::new_err("the chain came from another queue"));
            }
            None => return Err(PyValueError::new_err("the chain has been given back already")),
        }
        Ok(())
    }

    fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    fn enable_notifications(&mut self) -> bool {
        self.queue.enable_notifications()
    }

    fn disable_notifications(&mut self) {
        self.queue.disable_notifications();
    }

    #[getter]
    fn base(&self) -> u32 {
        self.queue.base()
    }

    #[getter]
    fn error(&self) -> Option<String> {
        self.queue.broken().map(ToString::to_string)
    }
}

/// The driver side of a virtqueue.
#[pyclass(module = "viaduct._core")]
pub struct DriverQueue {
    queue: viaduct_ring::DriverQueue,
}

#[pymethods]
impl DriverQueue {
    #[new]
    #[pyo3(signature = (memory, *, layout, size, descriptor_addr, driver_addr, device_addr, base = None, event_idx = false,
        in_order = false, tables = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        memory: &GuestMemory,
        layout: &str,
        size: u32,
        descriptor_addr: u64,
        driver_addr: u64,
        device_addr: u64,
        base: Option<u32>,
        event_idx: bool,
        in_order: bool,
        tables: Option<Segment>,
    ) -> PyResult<DriverQueue> {
        let indirect = tables.is_some();
        let config =
            config(layout, size, descriptor_addr, driver_addr, device_addr, base, event_idx, indirect, in_order)?;
        let mut queue = viaduct_ring::DriverQueue::new(memory.inner.clone(), &config).map_err(ring_error)?;
        if let Some((addr, len)) = tables {
            queue.set_indirect_area(addr, len).map_err(ring_error)?;
        }
        Ok(DriverQueue { queue })
    }

    fn add(&mut self, out: Vec<Segment>, input: Vec<Segment>, token: u64) -> PyResult<bool> {
        self.queue.add(&out, &input, token).map_err(ring_error)
    }

    fn kick(&mut self) -> bool {
        self.queue.publish()
    }

    fn take(&mut self) -> PyResult<Option<(u64, u32)>> {
        self.queue.take().map_err(ring_error)
    }

    fn enable_notifications(&mut self) -> bool {
        self.queue.enable_notifications()
    }

    fn disable_notifications(&mut self) {
        self.queue.disable_notifications();
    }

    #[getter]
    fn free(&self) -> usize {
        self.queue.free()
    }

    #[getter]
    fn base(&self) -> u32 {
        self.queue.base()
    }
}
