//! What people ask when no packets pass, for Python: the state of a port's queues, and its next packets.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_switch::{Outcome, QueueState, TracedPacket};

use crate::descriptors::duplicate;
use crate::switch::{Switch, to_python};

/// index, started, enabled, broken, faulted, size, waiting, can kick, kicks
type StateTuple = (u16, bool, bool, bool, bool, u32, u32, bool, u64);

/// The virtqueues of a port as they are now.
#[pyfunction]
pub fn queue_states(py: Python<'_>, switch: &Switch, port: u16) -> PyResult<Vec<StateTuple>> {
    let states = py.detach(|| switch.inner.queue_states(port)).map_err(to_python)?;
    let tuple = |state: QueueState| {
        let QueueState { index, started, enabled, broken, faulted, size, waiting, can_kick, kicks } = state;
        (index, started, enabled, broken, faulted, size, waiting, can_kick, kicks)
    };
    Ok(states.into_iter().map(tuple).collect())
}

/// The last address that a port lost to another: address, VLAN, the other's number.
#[pyfunction]
pub fn taken_address(py: Python<'_>, switch: &Switch, port: u16) -> Option<(String, u16, u16)> {
    let taken = py.detach(|| switch.inner.taken_address(port))?;
    let bytes = taken.mac.to_le_bytes();
    let text: Vec<String> = bytes[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    Some((text.join(":"), taken.vlan, taken.by))
}

/// The next packets of a port as they stand in its rings.
#[pyclass(module = "viaduct._core", frozen)]
pub struct Trace {
    inner: Arc<viaduct_switch::Trace>,
}

/// time, virtqueue, position, id, descriptors (index, in table, address, length, flags), header length, length, first
/// bytes, outcome (word, port, queue)
type PacketTuple<'py> =
    (u64, u16, u16, u16, Vec<(u16, bool, u64, u32, u16)>, u32, u32, Bound<'py, PyBytes>, (&'static str, u16, u16));

#[pymethods]
impl Trace {
    #[new]
    fn new(count: usize, event_fd: RawFd) -> PyResult<Trace> {
        Ok(Trace { inner: Arc::new(viaduct_switch::Trace::new(count, duplicate(event_fd)?)) })
    }

    fn take<'py>(&self, py: Python<'py>) -> Vec<PacketTuple<'py>> {
        let tuple = |packet: TracedPacket| {
            let descriptors = packet.descriptors.iter();
            let descriptors = descriptors.map(|each| (each.index, each.in_table, each.addr, each.len, each.flags));
            let outcome = match packet.outcome {
                Outcome::Written => ("written", 0, 0),
                Outcome::Forwarded(port, queue) => ("forwarded", port, queue),
                Outcome::Flooded => ("flooded", 0, 0),
                Outcome::Dropped(reason) => (reason, 0, 0),
            };
            (
                packet.time,
                packet.queue,
                packet.position,
                packet.id,
                descriptors.collect(),
                packet.header_len,
                packet.len,
                PyBytes::new(py, &packet.data),
                outcome,
            )
        };
        self.inner.take().into_iter().map(tuple).collect()
    }
}

/// Shows the next packets of a port to `trace`.
#[pyfunction]
pub fn trace_port(py: Python<'_>, switch: &Switch, port: u16, trace: &Trace) -> PyResult<()> {
    py.detach(|| switch.inner.add_trace(port, trace.inner.clone())).map_err(to_python)
}

/// Ends what `trace_port` began.
#[pyfunction]
pub fn untrace_port(py: Python<'_>, switch: &Switch, port: u16, trace: &Trace) -> PyResult<()> {
    py.detach(|| switch.inner.remove_trace(port, &trace.inner)).map_err(to_python)
}
