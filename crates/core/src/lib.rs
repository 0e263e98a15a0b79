//! The extension module `viaduct._core`: the pure crates as Python sees them. Nothing else knows Python.

mod block;
mod descriptors;
mod guest;
mod iotlb;
mod memory;
mod queue;
mod sandbox;
mod switch;
mod trace;
mod traffic;
mod vmm;

use pyo3::prelude::*;

/// The Rust half of Viaduct.
#[pymodule]
mod _core {
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    use super::block::{BlockDevice, ImageError};
    #[pymodule_export]
    use super::descriptors::signal_call;
    #[pymodule_export]
    use super::guest::{Station, guest_memory_size};
    #[pymodule_export]
    use super::iotlb::{Iotlb, TranslationMissing};
    #[pymodule_export]
    use super::memory::{DirtyLog, GuestMemory};
    #[pymodule_export]
    use super::queue::{Chain, DeviceQueue, DriverQueue, RingError, inflight_bytes, ring_parts};
    #[pymodule_export]
    use super::sandbox::{drop_capabilities, filter_system_calls, refused_system_calls, restrict_access};
    #[pymodule_export]
    use super::switch::{Capture, Switch, drop_reasons};
    #[pymodule_export]
    use super::trace::{Trace, queue_states, taken_address, trace_port, untrace_port};
    #[pymodule_export]
    use super::traffic::{TrafficSink, TrafficSource};
    #[pymodule_export]
    use super::vmm::e1000::E1000;
    #[pymodule_export]
    use super::vmm::platform::{DebugExit, I8042, Pvpanic, ResetControl, Rtc, Serial, SleepControl};
    #[pymodule_export]
    use super::vmm::{BusDevice, PciFunction, PciRoot, VirtioMmio, VirtioPci, Vm};
}
