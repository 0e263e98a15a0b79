//! The packet switch for Python: `viaduct._core.Switch` and `viaduct._core.Capture`.
//!
//! Every call lets go of the interpreter while it waits for the pollers. Descriptors are duplicated; the caller keeps his.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use viaduct_ring::{DeviceQueue, Layout, QueueConfig, RingError};
use viaduct_switch::counters::DropReason;
use viaduct_switch::mac_table::MacEntry;
use viaduct_switch::{
    Offloads, Polling, PortConfig, QueueStats, Rate, Rules, SwitchError, VhostQueue, VlanMode, clock,
};

use crate::descriptors::{call_of, duplicate};
use crate::iotlb::TranslationMissing;
use crate::memory::GuestMemory;
use crate::queue::attach_inflight;

pub(crate) fn to_python(error: SwitchError) -> PyErr {
    match error {
        SwitchError::System(..) => PyOSError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

fn vlan_mode(vlan: Option<u16>, trunk: Vec<(u16, u16)>) -> VlanMode {
    match vlan {
        Some(vlan) => VlanMode::Access(vlan),
        None if trunk.is_empty() => VlanMode::All,
        None => VlanMode::trunk(&trunk),
    }
}

/// frames, bytes, drops by reason (those that happened), notifications, completed offloads
type QueueTuple = (u64, u64, BTreeMap<&'static str, u64>, u64, u64);

fn queue_tuple(stats: &QueueStats) -> QueueTuple {
    let drops = DropReason::ALL.iter().zip(&stats.drops).filter(|(_, count)| **count != 0);
    (
        stats.frames,
        stats.bytes,
        drops.map(|(reason, count)| (reason.name(), *count)).collect(),
        stats.notifications,
        stats.completed_offloads,
    )
}

/// Why frames are dropped: every reason that statistics can name.
#[pyfunction]
pub fn drop_reasons() -> Vec<&'static str> {
    DropReason::ALL.iter().map(|reason| reason.name()).collect()
}

/// The same from Python, where reasons that this version does not know may come from another.
type CountedTuple = (u64, u64, BTreeMap<String, u64>, u64, u64);

fn queue_stats(counted: Vec<CountedTuple>) -> Vec<QueueStats> {
    let of = |(frames, bytes, drops, notifications, completed_offloads): CountedTuple| {
        let drops = DropReason::ALL.iter().map(|reason| drops.get(reason.name()).copied().unwrap_or(0)).collect();
        QueueStats { frames, bytes, drops, notifications, completed_offloads }
    };
    counted.into_iter().map(of).collect()
}

/// The data path: ports by number and poller threads that carry frames between them.
#[pyclass(module = "viaduct._core", frozen)]
pub struct Switch {
    pub(crate) inner: viaduct_switch::Switch,
}

#[pymethods]
impl Switch {
    #[new]
    fn new(py: Python<'_>, pollers: Vec<Option<usize>>, polling: &str, event_fd: RawFd) -> PyResult<Switch> {
        let polling = match polling {
            "adaptive" => Polling::Adaptive,
            "busy" => Polling::Busy,
            "interrupt" => Polling::Interrupt,
            _ => {
                let message = format!("polling is adaptive, busy or interrupt, not {polling:?}");
                return Err(PyValueError::new_err(message));
            }
        };
        let signal = duplicate(event_fd)?;
        let inner = py.detach(|| viaduct_switch::Switch::new(&pollers, polling, signal)).map_err(to_python)?;
        Ok(Switch { inner })
    }

    #[pyo3(signature = (name, pairs, vlan, trunk, max_frame))]
    fn add_port(
        &self,
        py: Python<'_>,
        name: String,
        pairs: usize,
        vlan: Option<u16>,
        trunk: Vec<(u16, u16)>,
        max_frame: u32,
    ) -> PyResult<u16> {
        let config = PortConfig { name, vlan: vlan_mode(vlan, trunk), max_frame, pairs };
        py.detach(|| self.inner.add_port(config)).map_err(to_python)
    }

    fn remove_port(&self, py: Python<'_>, port: u16) -> PyResult<()> {
        py.detach(|| self.inner.remove_port(port)).map_err(to_python)
    }

    fn change_port(
        &self,
        py: Python<'_>,
        port: u16,
        vlan: Option<u16>,
        trunk: Vec<(u16, u16)>,
        max_frame: u32,
    ) -> PyResult<()> {
        py.detach(|| self.inner.change_port(port, vlan_mode(vlan, trunk), max_frame)).map_err(to_python)
    }

    #[pyo3(signature = (port, *, macs, spoofcheck, private, learn_limit, rate, rate_out, storm, unknown))]
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    fn set_rules(
        &self,
        py: Python<'_>,
        port: u16,
        macs: Vec<[u8; 6]>,
        spoofcheck: bool,
        private: bool,
        learn_limit: u32,
        rate: (u64, u64, u64),
        rate_out: (u64, u64, u64),
        storm: u64,
        unknown: u64,
    ) -> PyResult<()> {
        let [rate, rate_out] = [rate, rate_out].map(|(bits, frames, burst)| Rate { bits, frames, burst });
        let rules = Rules { macs, spoofcheck, private, learn_limit, rate, rate_out, storm, unknown };
        py.detach(|| self.inner.set_rules(port, &rules)).map_err(to_python)
    }

    fn rule_stats(&self, py: Python<'_>, port: u16) -> PyResult<(u32, u64, u64, u64)> {
        let stats = py.detach(|| self.inner.rule_stats(port)).map_err(to_python)?;
        Ok((stats.learn.learned, stats.learn.unlearned, stats.learn.moved, stats.waits))
    }

    fn take_flaps(&self) -> Vec<(String, u16, u16, u16, u64)> {
        let flaps = self.inner.take_flaps().into_iter();
        flaps.map(|flap| (mac_text(flap.mac()), flap.vlan, flap.ports.0, flap.ports.1, flap.times)).collect()
    }

    fn set_accepted(&self, py: Python<'_>, port: u16, accepts: Vec<String>) -> PyResult<()> {
        let accepts = offloads(&accepts)?;
        py.detach(|| self.inner.set_accepted(port, accepts)).map_err(to_python)
    }

    #[pyo3(signature = (port, index, memory, *, layout, size, descriptor_addr, driver_addr, device_addr, base, event_idx,
                        indirect, in_order, mergeable, header_len, kick_fd, call_fd, log_addr, inflight = None, certain = false))]
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    fn start_queue(
        &self,
        py: Python<'_>,
        port: u16,
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
        in_order: bool,
        mergeable: bool,
        header_len: u32,
        kick_fd: Option<RawFd>,
        call_fd: Option<RawFd>,
        log_addr: Option<u64>,
        inflight: Option<(RawFd, u64)>,
        certain: bool,
    ) -> PyResult<()> {
        let layout = match layout {
            "split" => Layout::Split,
            "packed" => Layout::Packed,
            _ => return Err(PyValueError::new_err(format!("layout is split or packed, not {layout:?}"))),
        };
        if !matches!(header_len, 10 | 12) {
            return Err(PyValueError::new_err(format!("the header has 10 or 12 bytes, not {header_len}")));
        }
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
        let start = if certain { DeviceQueue::resume } else { DeviceQueue::new };
        // A packed ring that looks strange is looked at again for a while.
        let queue = py.detach(|| start(memory.inner.clone(), &config));
        let mut queue = queue.map_err(|error| match error {
            RingError::Untranslated { .. } => TranslationMissing::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        })?;
        queue.set_log_addr(log_addr);
        if let Some((fd, offset)) = inflight {
            attach_inflight(&mut queue, fd, offset)?;
        }
        let kick = kick_fd.map(duplicate).transpose()?;
        let call = call_fd.map(call_of).transpose()?;
        let queue = VhostQueue { queue, kick, call, enabled: false, header_len, mergeable };
        py.detach(|| self.inner.start_queue(port, index, queue)).map_err(to_python)
    }

    fn stop_queue(&self, py: Python<'_>, port: u16, index: u16) -> PyResult<Option<u32>> {
        py.detach(|| self.inner.stop_queue(port, index)).map_err(to_python)
    }

    fn enable_queue(&self, py: Python<'_>, port: u16, index: u16, enabled: bool) -> PyResult<()> {
        py.detach(|| self.inner.enable_queue(port, index, enabled)).map_err(to_python)
    }

    fn set_call(&self, py: Python<'_>, port: u16, index: u16, fd: Option<RawFd>) -> PyResult<()> {
        let call = fd.map(call_of).transpose()?;
        py.detach(|| self.inner.set_call(port, index, call)).map_err(to_python)
    }

    fn set_log_addr(&self, py: Python<'_>, port: u16, index: u16, addr: Option<u64>) -> PyResult<()> {
        py.detach(|| self.inner.set_log_addr(port, index, addr)).map_err(to_python)
    }

    fn set_memory(&self, py: Python<'_>, port: u16, memory: &GuestMemory) -> PyResult<()> {
        py.detach(|| self.inner.set_memory(port, &memory.inner)).map_err(to_python)
    }

    fn translations_changed(&self, py: Python<'_>, port: u16) -> PyResult<()> {
        py.detach(|| self.inner.translations_changed(port)).map_err(to_python)
    }

    fn translations_removed(&self, py: Python<'_>, port: u16, first: u64, last: u64) -> PyResult<()> {
        py.detach(|| self.inner.translations_removed(port, first, last)).map_err(to_python)
    }

    fn attach_tap(&self, py: Python<'_>, port: u16, pair: u16, fd: RawFd, accepts: Vec<String>) -> PyResult<()> {
        let (tap, accepts) = (duplicate(fd)?, offloads(&accepts)?);
        py.detach(|| self.inner.attach_tap(port, pair, tap, accepts)).map_err(to_python)
    }

    #[pyo3(signature = (port, fd, skip = 0))]
    fn attach_replay(&self, py: Python<'_>, port: u16, fd: RawFd, skip: u64) -> PyResult<()> {
        let file = duplicate(fd)?;
        py.detach(|| self.inner.attach_replay(port, file, skip)).map_err(to_python)
    }

    #[pyo3(signature = (port, fd, begun = false))]
    fn attach_record(&self, py: Python<'_>, port: u16, fd: RawFd, begun: bool) -> PyResult<()> {
        let file = duplicate(fd)?;
        py.detach(|| self.inner.attach_record(port, file, begun)).map_err(to_python)
    }

    fn attach_null(&self, py: Python<'_>, port: u16) -> PyResult<()> {
        py.detach(|| self.inner.attach_null(port)).map_err(to_python)
    }

    fn add_capture(&self, py: Python<'_>, port: u16, capture: &Capture) -> PyResult<()> {
        py.detach(|| self.inner.add_capture(port, capture.inner.clone())).map_err(to_python)
    }

    fn remove_capture(&self, py: Python<'_>, port: u16, capture: &Capture) -> PyResult<()> {
        py.detach(|| self.inner.remove_capture(port, &capture.inner)).map_err(to_python)
    }

    fn announce(&self, py: Python<'_>, port: u16, frame: Vec<u8>) -> PyResult<()> {
        py.detach(|| self.inner.announce(port, &frame)).map_err(to_python)
    }

    fn hold(&self, py: Python<'_>) -> Vec<(u16, u16, u32)> {
        let positions = py.detach(|| self.inner.hold());
        positions.iter().map(|position| (position.port, position.index, position.base)).collect()
    }

    fn resume(&self, py: Python<'_>) {
        py.detach(|| self.inner.resume());
    }

    fn restore_counters(
        &self,
        py: Python<'_>,
        port: u16,
        received: Vec<CountedTuple>,
        sent: Vec<CountedTuple>,
    ) -> PyResult<()> {
        let (received, sent) = (queue_stats(received), queue_stats(sent));
        py.detach(|| self.inner.restore_counters(port, &received, &sent)).map_err(to_python)
    }

    fn restore_stations(&self, py: Python<'_>, stations: Vec<([u8; 6], u16, u16, u8)>) {
        let entries: Vec<MacEntry> =
            stations.into_iter().map(|(mac, vlan, port, age)| MacEntry { mac, vlan, port, age }).collect();
        py.detach(|| self.inner.restore_stations(&entries));
    }

    fn skip_replay(&self, py: Python<'_>, port: u16, frames: u64) -> PyResult<()> {
        py.detach(|| self.inner.skip_replay(port, frames)).map_err(to_python)
    }

    fn replayed(&self, py: Python<'_>, port: u16) -> PyResult<u64> {
        py.detach(|| self.inner.replayed(port)).map_err(to_python)
    }

    fn age(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.age())
    }

    fn forget_stations(&self, py: Python<'_>, port: u16) {
        py.detach(|| self.inner.forget_stations(port));
    }

    fn stations(&self, py: Python<'_>) -> Vec<(String, u16, u16, u8)> {
        let entries = py.detach(|| self.inner.stations());
        entries.into_iter().map(|entry| (mac_text(entry.mac), entry.vlan, entry.port, entry.age)).collect()
    }

    fn port_stats(&self, py: Python<'_>) -> Vec<(u16, bool, Vec<QueueTuple>, Vec<QueueTuple>)> {
        let ports = py.detach(|| self.inner.port_stats());
        let tuples = |stats: &[QueueStats]| stats.iter().map(queue_tuple).collect();
        ports.iter().map(|port| (port.number, port.up, tuples(&port.received), tuples(&port.sent))).collect()
    }

    #[expect(clippy::type_complexity, reason = "spelled out in the stub")]
    fn poller_stats(&self, py: Python<'_>) -> Vec<(f64, f64, u64, u64, u64, Vec<u64>, u64, u64, u64, usize)> {
        let seconds = |ticks: u64| ticks as f64 / clock::ticks_per_second() as f64;
        let pollers = py.detach(|| self.inner.poller_stats());
        let tuple = |poller: viaduct_switch::PollerStats| {
            (
                seconds(poller.busy_ticks),
                seconds(poller.idle_ticks),
                poller.busy_ticks,
                poller.rounds,
                poller.frames,
                poller.batches,
                poller.sleeps,
                poller.wakeups,
                poller.active,
                poller.sources,
            )
        };
        pollers.into_iter().map(tuple).collect()
    }

    fn take_events(&self) -> Vec<(u16, u16, String)> {
        self.inner.take_events().into_iter().map(|event| (event.port, event.queue, event.message)).collect()
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn offloads(names: &[String]) -> PyResult<Offloads> {
    names.iter().try_fold(Offloads::NONE, |set, name| {
        let offload = match name.as_str() {
            "csum" => Offloads::CSUM,
            "tso4" => Offloads::TSO4,
            "tso6" => Offloads::TSO6,
            "ecn" => Offloads::ECN,
            "uso" => Offloads::USO,
            _ => return Err(PyValueError::new_err(format!("unknown offload {name:?}"))),
        };
        Ok(set | offload)
    })
}

/// Copies of the frames that pass a port.
#[pyclass(module = "viaduct._core", frozen)]
pub struct Capture {
    inner: Arc<viaduct_switch::Capture>,
}

#[pymethods]
impl Capture {
    #[new]
    fn new(snap: usize, event_fd: RawFd) -> PyResult<Capture> {
        Ok(Capture { inner: Arc::new(viaduct_switch::Capture::new(snap, duplicate(event_fd)?)) })
    }

    fn take<'py>(&self, py: Python<'py>) -> Vec<(u64, bool, u32, Bound<'py, PyBytes>)> {
        let frames = self.inner.take();
        let tuple = |frame: viaduct_switch::CapturedFrame| {
            (frame.time, frame.from_port, frame.len, PyBytes::new(py, &frame.data))
        };
        frames.into_iter().map(tuple).collect()
    }

    #[getter]
    fn missed(&self) -> u64 {
        self.inner.missed()
    }
}
