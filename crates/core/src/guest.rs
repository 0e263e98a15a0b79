//! Guests in this process for Python: `viaduct._core.Station`.
//!
//! No call waits for the network: what takes time gets a ticket, and its end is an event that the event descriptor
//! announces.

use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use viaduct_guest::driver::{DriverConfig, DriverError, DriverLink, NetDriver, QueueSetup, required_memory};
use viaduct_guest::features;
use viaduct_guest::histogram::Summary;
use viaduct_guest::link::LinkCounters;
use viaduct_guest::stack::StackConfig;
use viaduct_guest::station::{
    DatagramConfig, Direction, Event, Limit, Outcome, PingConfig, Ports, StationError, StreamConfig, TaskSpec, Ticket,
};
use viaduct_ring::{Layout, QueueConfig};

use crate::descriptors::duplicate;
use crate::memory::GuestMemory;

/// size, descriptor address, driver address, device address, base, kick descriptor, call descriptor
pub(crate) type QueueTuple = (u32, u64, u64, u64, u32, RawFd, RawFd);

/// Bytes of memory that rings and buffers need, whatever subset of `features` is negotiated; `sizes` are those of the
/// queues.
#[pyfunction]
pub fn guest_memory_size(features: u64, mtu: usize, sizes: Vec<u32>) -> u64 {
    required_memory(features, mtu, &sizes)
}

/// Takes over queues that a front-end has started.
pub(crate) fn driver(
    memory: &GuestMemory,
    features: u64,
    mtu: usize,
    data: (u64, u64),
    queues: Vec<QueueTuple>,
    counters: Arc<LinkCounters>,
) -> PyResult<NetDriver> {
    let has = |bit| features & bit != 0;
    let layout = if has(features::RING_PACKED) { Layout::Packed } else { Layout::Split };
    let queues = queues
        .into_iter()
        .map(|(size, descriptor_addr, driver_addr, device_addr, base, kick, call)| {
            let config = QueueConfig {
                layout,
                size,
                descriptor_addr,
                driver_addr,
                device_addr,
                base,
                event_idx: has(features::RING_EVENT_IDX),
                indirect: has(features::RING_INDIRECT_DESC),
                in_order: has(features::IN_ORDER),
            };
            Ok(QueueSetup { config, kick: duplicate(kick)?, call: duplicate(call)? })
        })
        .collect::<PyResult<_>>()?;
    let (data_addr, data_end) = data;
    let config = DriverConfig { memory: memory.inner.clone(), data_addr, data_end, features, mtu, queues };
    NetDriver::new(config, counters).map_err(|error: DriverError| PyValueError::new_err(error.to_string()))
}

pub(crate) fn mac(bytes: &[u8]) -> PyResult<[u8; 6]> {
    bytes.try_into().map_err(|_| PyValueError::new_err(format!("a MAC address has 6 bytes, not {}", bytes.len())))
}

pub(crate) fn address(text: &str) -> PyResult<IpAddr> {
    text.parse().map_err(|_| PyValueError::new_err(format!("{text:?} is not an IP address")))
}

pub(crate) fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|error| PyValueError::new_err(format!("{value} seconds: {error}")))
}

pub(crate) fn limit(bytes: Option<u64>, time: Option<f64>) -> PyResult<Limit> {
    match (bytes, time) {
        (Some(bytes), None) => Ok(Limit::Bytes(bytes)),
        (None, Some(time)) => Ok(Limit::Time(seconds(time)?)),
        _ => Err(PyValueError::new_err("give either bytes or seconds")),
    }
}

/// Nanoseconds by name.
pub(crate) fn summary<'py>(py: Python<'py>, summary: Option<&Summary>) -> PyResult<Option<Bound<'py, PyDict>>> {
    let Some(s) = summary else { return Ok(None) };
    let dict = PyDict::new(py);
    let fields = [
        ("count", s.count),
        ("min", s.min),
        ("mean", s.mean),
        ("p50", s.p50),
        ("p90", s.p90),
        ("p99", s.p99),
        ("p999", s.p999),
        ("max", s.max),
    ];
    fields.into_iter().try_for_each(|(name, value)| dict.set_item(name, value))?;
    Ok(Some(dict))
}

fn counts<'py>(py: Python<'py>, counts: &[(&'static str, u64)]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    counts.iter().try_for_each(|(name, value)| dict.set_item(name, value))?;
    Ok(dict)
}

/// Counts of a link by name.
pub(crate) fn link_counts<'py>(py: Python<'py>, counters: &LinkCounters) -> PyResult<Bound<'py, PyDict>> {
    counts(py, &counters.snapshot())
}

/// What a task came to: its kind and its fields.
fn outcome<'py>(py: Python<'py>, outcome: &Outcome) -> PyResult<(&'static str, Bound<'py, PyDict>)> {
    let dict = PyDict::new(py);
    let kind = match outcome {
        Outcome::Ping(report) => {
            dict.set_item("sent", report.sent)?;
            dict.set_item("received", report.received)?;
            dict.set_item("duplicated", report.duplicated)?;
            dict.set_item("corrupted", report.corrupted)?;
            let times: Vec<(u32, f64)> = report.round_trips.iter().map(|(n, t)| (*n, t.as_secs_f64())).collect();
            dict.set_item("round_trips", times)?;
            dict.set_item("summary", summary(py, report.summary.as_ref())?)?;
            "ping"
        }
        Outcome::Stream(report) => {
            dict.set_item("sent", report.sent)?;
            dict.set_item("received", report.received)?;
            dict.set_item("elapsed", report.elapsed.as_secs_f64())?;
            dict.set_item("first_mismatch", report.first_mismatch)?;
            dict.set_item("peer", report.peer.as_deref())?;
            dict.set_item("error", report.error.as_deref())?;
            "stream"
        }
        Outcome::Datagrams(report) => {
            dict.set_item("sent", report.sent)?;
            dict.set_item("elapsed", report.elapsed.as_secs_f64())?;
            dict.set_item("peer", report.peer.as_deref())?;
            "datagrams"
        }
        Outcome::Served => "served",
        Outcome::Failed(why) => {
            dict.set_item("why", why)?;
            "failed"
        }
        _ => "unknown",
    };
    Ok((kind, dict))
}

/// A guest: a TCP/IP stack on a thread of its own, over queues that a front-end has set up.
#[pyclass(module = "viaduct._core")]
pub struct Station {
    inner: Option<viaduct_guest::station::Station>,
    /// Has its rings, and waits for the back-end to start them.
    prepared: Option<NetDriver>,
    mtu: usize,
}

impl Station {
    fn open(&mut self) -> PyResult<&mut viaduct_guest::station::Station> {
        self.inner.as_mut().ok_or_else(|| PyValueError::new_err("the guest is closed"))
    }

    fn shared(&self) -> PyResult<&viaduct_guest::station::Station> {
        self.inner.as_ref().ok_or_else(|| PyValueError::new_err("the guest is closed"))
    }
}

#[pymethods]
impl Station {
    #[new]
    fn new(
        mac: &[u8],
        addresses: Vec<(String, u8)>,
        gateways: Vec<String>,
        mtu: usize,
        seed: u64,
    ) -> PyResult<Station> {
        let config = StackConfig {
            mac: self::mac(mac)?,
            addresses: addresses.iter().map(|(text, prefix)| Ok((address(text)?, *prefix))).collect::<PyResult<_>>()?,
            gateways: gateways.iter().map(|text| address(text)).collect::<PyResult<_>>()?,
            mtu,
            seed,
        };
        let station = viaduct_guest::station::Station::new(config, Arc::default()).map_err(|error| match error {
            StationError::System { .. } => PyOSError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        })?;
        Ok(Station { inner: Some(station), prepared: None, mtu })
    }

    fn prepare(
        &mut self,
        py: Python<'_>,
        memory: &GuestMemory,
        features: u64,
        data_addr: u64,
        data_end: u64,
        queues: Vec<QueueTuple>,
    ) -> PyResult<()> {
        let mtu = self.mtu;
        let station = self.open()?;
        let counters = station.counters().clone();
        let driver = py.detach(|| driver(memory, features, mtu, (data_addr, data_end), queues, counters))?;
        self.prepared = Some(driver);
        Ok(())
    }

    fn attach(&mut self) -> PyResult<()> {
        if let Some(driver) = self.prepared.take() {
            self.shared()?.attach(Box::new(DriverLink::new(driver)));
        }
        Ok(())
    }

    fn detach(&mut self, py: Python<'_>) -> PyResult<()> {
        self.prepared = None;
        let station = self.shared()?;
        py.detach(|| station.detach());
        Ok(())
    }

    fn ping(&mut self, remote: &str, count: u32, interval: f64, timeout: f64, size: usize) -> PyResult<Ticket> {
        let (interval, timeout) = (seconds(interval)?, seconds(timeout)?);
        let config = PingConfig { remote: address(remote)?, count, interval, timeout, size };
        Ok(self.open()?.start(TaskSpec::Ping(config)))
    }

    #[pyo3(signature = (remote, port, direction, bytes, seconds, patience, seed))]
    #[allow(clippy::too_many_arguments)]
    fn stream(
        &mut self,
        remote: &str,
        port: u16,
        direction: &str,
        bytes: Option<u64>,
        seconds: Option<f64>,
        patience: f64,
        seed: u64,
    ) -> PyResult<Ticket> {
        let direction = match direction {
            "send" => Direction::Send,
            "receive" => Direction::Receive,
            "echo" => Direction::Echo,
            _ => return Err(PyValueError::new_err(format!("direction is send, receive or echo, not {direction:?}"))),
        };
        let (limit, patience) = (limit(bytes, seconds)?, self::seconds(patience)?);
        let config = StreamConfig { remote: address(remote)?, port, direction, limit, patience, seed };
        Ok(self.open()?.start(TaskSpec::Stream(config)))
    }

    #[pyo3(signature = (remote, port, size, rate, bytes, seconds, patience, seed))]
    #[allow(clippy::too_many_arguments)]
    fn datagrams(
        &mut self,
        remote: &str,
        port: u16,
        size: usize,
        rate: Option<f64>,
        bytes: Option<u64>,
        seconds: Option<f64>,
        patience: f64,
        seed: u64,
    ) -> PyResult<Ticket> {
        let (limit, patience) = (limit(bytes, seconds)?, self::seconds(patience)?);
        let config = DatagramConfig { remote: address(remote)?, port, size, rate, limit, patience, seed };
        Ok(self.open()?.start(TaskSpec::Datagrams(config)))
    }

    fn serve(&mut self, echo: u16, sink: u16, source: u16) -> PyResult<Ticket> {
        Ok(self.open()?.start(TaskSpec::Serve(Ports { echo, sink, source })))
    }

    fn cancel(&self, ticket: Ticket) -> PyResult<()> {
        self.shared()?.cancel(ticket);
        Ok(())
    }

    fn announce(&self) -> PyResult<()> {
        self.shared()?.announce();
        Ok(())
    }

    #[getter]
    fn link_up(&self) -> bool {
        self.inner.as_ref().is_some_and(viaduct_guest::station::Station::link_up)
    }

    #[getter]
    fn event_fd(&self) -> PyResult<RawFd> {
        Ok(self.shared()?.event_fd())
    }

    /// (ticket, kind, fields) of each task that has ended; ticket 0 and kind "link-broken" when the link was lost
    fn take_events<'py>(&self, py: Python<'py>) -> PyResult<Vec<(Ticket, &'static str, Bound<'py, PyDict>)>> {
        let events = self.shared()?.take_events();
        let mut found = Vec::new();
        for event in &events {
            match event {
                Event::Finished(ticket, result) => {
                    let (kind, fields) = outcome(py, result)?;
                    found.push((*ticket, kind, fields));
                }
                Event::LinkBroken(why) => {
                    let fields = PyDict::new(py);
                    fields.set_item("why", why)?;
                    found.push((0, "link-broken", fields));
                }
                _ => {}
            }
        }
        Ok(found)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        link_counts(py, self.shared()?.counters())
    }

    fn services<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        counts(py, &self.shared()?.services().snapshot())
    }

    fn close(&mut self, py: Python<'_>) {
        self.prepared = None;
        let station = self.inner.take();
        py.detach(|| drop(station));
    }
}
