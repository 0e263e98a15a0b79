//! Translations of an IOMMU for Python: `viaduct._core.Iotlb`.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use viaduct_memory::iotlb::{Access, Miss, Translation};

use crate::descriptors::duplicate;

create_exception!(
    _core,
    TranslationMissing,
    PyValueError,
    "A ring has I/O virtual addresses whose translation is not known yet; it has been asked for."
);

/// What an IOMMU lets a device reach.
#[pyclass(module = "viaduct._core", frozen)]
pub struct Iotlb {
    pub(crate) inner: Arc<viaduct_memory::iotlb::Iotlb>,
}

fn pairs(misses: Vec<Miss>) -> Vec<(u64, bool)> {
    misses.into_iter().map(|miss| (miss.iova, miss.access == Access::Write)).collect()
}

#[pymethods]
impl Iotlb {
    #[new]
    fn new(event_fd: RawFd) -> PyResult<Iotlb> {
        Ok(Iotlb { inner: Arc::new(viaduct_memory::iotlb::Iotlb::new(duplicate(event_fd)?)) })
    }

    fn update(&self, iova: u64, size: u64, user_addr: u64, permissions: u8) -> PyResult<Option<(u64, u64)>> {
        let new = Translation::new(iova, size, user_addr, permissions);
        Ok(self.inner.update(new.map_err(|error| PyValueError::new_err(error.to_string()))?))
    }

    fn invalidate(&self, iova: u64, size: u64) -> (u64, u64) {
        // QEMU says "all" with a size of 2^64, which is 0; more than was meant is never wrong.
        let (first, last) = match size.checked_sub(1) {
            Some(more) => (iova, iova.saturating_add(more)),
            None => (0, u64::MAX),
        };
        self.inner.invalidate(first, last);
        (first, last)
    }

    fn refuse(&self, iova: u64, write: bool) -> bool {
        self.inner.refuse(Miss::at(iova, if write { Access::Write } else { Access::Read }))
    }

    fn forget_refusals(&self) {
        self.inner.forget_refusals();
    }

    fn take_misses(&self) -> Vec<(u64, bool)> {
        pairs(self.inner.take_misses())
    }

    fn take_forbidden(&self) -> Vec<(u64, bool)> {
        pairs(self.inner.take_forbidden())
    }

    /// (address, size, user address, permissions) of each range; of the whole space all but the last byte
    #[getter]
    fn translations(&self) -> Vec<(u64, u64, u64, u8)> {
        let tuple = |range: &Translation| {
            (range.iova, (range.last - range.iova).saturating_add(1), range.user_addr, range.permissions.bits())
        };
        self.inner.translations().iter().map(tuple).collect()
    }

    /// (ranges, updates, invalidations, misses, refused)
    #[getter]
    fn counts(&self) -> (u64, u64, u64, u64, u64) {
        let stats = self.inner.stats();
        (stats.ranges, stats.updates, stats.invalidations, stats.misses, stats.refused)
    }
}
