//! Guest memory for Python: `viaduct._core.GuestMemory` and `viaduct._core.DirtyLog`.

use std::os::fd::{AsFd, BorrowedFd, RawFd};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_memory::{RegionCache, RegionSpec, Span};

use crate::descriptors::{call_of, duplicate};
use crate::iotlb::Iotlb;

/// An immutable table of memory regions that another process shares with us.
#[pyclass(module = "viaduct._core", frozen)]
pub struct GuestMemory {
    pub(crate) inner: viaduct_memory::GuestMemory,
}

impl GuestMemory {
    /// The spans of a guest-physical range, which may go on from one region into the next.
    fn spans(&self, addr: u64, len: usize) -> PyResult<Vec<Span>> {
        let mut cache = RegionCache::default();
        let mut spans = Vec::new();
        let mut done = 0u64;
        while done < len as u64 {
            let want = u32::try_from(len as u64 - done).unwrap_or(u32::MAX);
            let span =
                addr.checked_add(done).and_then(|addr| self.inner.translate_some(&mut cache, addr, want)).ok_or_else(
                    || PyValueError::new_err(format!("guest address {:#x} is in no region", addr.wrapping_add(done))),
                )?;
            done += u64::from(span.len());
            spans.push(span);
        }
        Ok(spans)
    }
}

#[pymethods]
impl GuestMemory {
    #[new]
    fn new() -> GuestMemory {
        GuestMemory { inner: viaduct_memory::GuestMemory::new() }
    }

    #[pyo3(signature = (guest_addr, size, user_addr, mmap_offset, fd, private = false))]
    fn with_region(
        &self,
        guest_addr: u64,
        size: u64,
        user_addr: u64,
        mmap_offset: u64,
        fd: Option<RawFd>,
        private: bool,
    ) -> PyResult<GuestMemory> {
        let file = match fd {
            None => None,
            Some(fd) if fd < 0 => return Err(PyValueError::new_err(format!("{fd} is not a file descriptor"))),
            // SAFETY: borrowed only for the call that duplicates it, which fails if it is not open.
            Some(fd) => Some(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?),
        };
        let spec = RegionSpec { guest_addr, size, user_addr, mmap_offset };
        let made = match file {
            None => self.inner.with_anonymous_region(spec),
            Some(file) if private => self.inner.with_private_region(spec, file),
            Some(file) => self.inner.with_region(spec, file),
        };
        let inner = made.map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(GuestMemory { inner })
    }

    fn without_region(&self, guest_addr: u64, size: u64, user_addr: u64) -> PyResult<GuestMemory> {
        let spec = RegionSpec { guest_addr, size, user_addr, mmap_offset: 0 };
        let inner = self.inner.without_region(&spec).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(GuestMemory { inner })
    }

    fn with_log(&self, log: Option<&DirtyLog>) -> PyResult<GuestMemory> {
        let log = log.map(|log| log.inner.clone());
        let inner = self.inner.with_log(log).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(GuestMemory { inner })
    }

    fn behind(&self, iotlb: &Iotlb) -> GuestMemory {
        GuestMemory { inner: self.inner.behind(iotlb.inner.clone()) }
    }

    fn read<'py>(&self, py: Python<'py>, addr: u64, len: usize) -> PyResult<Bound<'py, PyBytes>> {
        let spans = self.spans(addr, len)?;
        PyBytes::new_with(py, len, |mut bytes| {
            for span in spans {
                let (now, later) = bytes.split_at_mut(span.len() as usize);
                // SAFETY: `self` keeps the memory alive and the span has this length.
                unsafe { span.read(0, now) };
                bytes = later;
            }
            Ok(())
        })
    }

    fn write(&self, addr: u64, mut data: &[u8]) -> PyResult<()> {
        for span in self.spans(addr, data.len())? {
            let (now, later) = data.split_at(span.len() as usize);
            // SAFETY: `self` keeps the memory alive and the span has this length.
            unsafe { span.write(0, now) };
            self.inner.mark_written(span, span.len());
            data = later;
        }
        Ok(())
    }

    fn discard(&self, addr: u64, len: usize) -> PyResult<u64> {
        let mut bytes = 0;
        for span in self.spans(addr, len)? {
            // SAFETY: `self` keeps the memory alive.
            bytes += unsafe { viaduct_memory::discard(span) }?;
        }
        Ok(bytes)
    }

    /// (guest address, size, user address, offset in the file) of each region, by guest address
    #[getter]
    fn regions(&self) -> Vec<(u64, u64, u64, u64)> {
        self.inner.regions().map(|spec| (spec.guest_addr, spec.size, spec.user_addr, spec.mmap_offset)).collect()
    }

    /// (guest address, size, address in this process) of each region, by guest address
    #[getter]
    fn places(&self) -> Vec<(u64, u64, usize)> {
        let mut cache = RegionCache::default();
        let place = |addr, cache: &mut RegionCache| {
            self.inner.translate_some(cache, addr, 1).map(|span| span.as_ptr().expose_provenance())
        };
        let regions = self.inner.regions();
        regions.filter_map(|spec| Some((spec.guest_addr, spec.size, place(spec.guest_addr, &mut cache)?))).collect()
    }

    #[getter]
    fn faulted(&self) -> bool {
        self.inner.faulted()
    }
}

/// A log of written pages that a front-end shares with us.
#[pyclass(module = "viaduct._core", frozen)]
pub struct DirtyLog {
    inner: viaduct_memory::DirtyLog,
}

#[pymethods]
impl DirtyLog {
    #[new]
    #[pyo3(signature = (fd, size, offset = 0, event_fd = None))]
    fn new(fd: RawFd, size: u64, offset: u64, event_fd: Option<RawFd>) -> PyResult<DirtyLog> {
        let file = duplicate(fd)?;
        let log = viaduct_memory::DirtyLog::new(file.as_fd(), offset, size)
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        let inner = match event_fd {
            Some(event) => log.with_event(call_of(event)?),
            None => log,
        };
        Ok(DirtyLog { inner })
    }

    fn covers(&self, addr: u64, len: u64) -> bool {
        self.inner.covers(addr, len)
    }
}
