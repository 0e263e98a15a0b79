//! Traffic sources and sinks for Python: `viaduct._core.TrafficSource` and `TrafficSink`.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use viaduct_guest::driver::NetDriver;
use viaduct_guest::link::LinkCounters;
use viaduct_guest::traffic::{Engine, EngineEvent, Job, Sink, SinkConfig, Source, SourceConfig};

use crate::guest::{QueueTuple, driver, link_counts, mac, seconds, summary};
use crate::memory::GuestMemory;

/// An engine that may have been closed, and the MTU of its links.
struct Running<J: Job> {
    engine: Option<Engine<J>>,
    /// Has its rings, and waits for the back-end to start them.
    prepared: Option<NetDriver>,
    mtu: usize,
}

impl<J: Job> Running<J> {
    fn new(job: J, mtu: usize) -> PyResult<Running<J>> {
        Ok(Running { engine: Some(Engine::new(job, Arc::<LinkCounters>::default())?), prepared: None, mtu })
    }

    fn open(&self) -> PyResult<&Engine<J>> {
        self.engine.as_ref().ok_or_else(|| PyValueError::new_err("the traffic is closed"))
    }

    fn prepare(
        &mut self,
        py: Python<'_>,
        memory: &GuestMemory,
        features: u64,
        data: (u64, u64),
        queues: Vec<QueueTuple>,
    ) -> PyResult<()> {
        let engine = self.open()?;
        let counters = engine.counters().clone();
        let mtu = self.mtu;
        let driver = py.detach(|| driver(memory, features, mtu, data, queues, counters))?;
        self.prepared = Some(driver);
        Ok(())
    }

    fn attach(&mut self) -> PyResult<()> {
        if let Some(driver) = self.prepared.take() {
            self.open()?.attach(driver);
        }
        Ok(())
    }

    fn detach(&mut self, py: Python<'_>) -> PyResult<()> {
        self.prepared = None;
        let engine = self.open()?;
        py.detach(|| engine.detach());
        Ok(())
    }

    fn event_fd(&self) -> PyResult<RawFd> {
        Ok(self.open()?.event_fd())
    }

    fn take_events(&self) -> PyResult<Vec<(&'static str, String)>> {
        let events = self.open()?.take_events();
        Ok(events
            .into_iter()
            .map(|event| match event {
                EngineEvent::Done => ("done", String::new()),
                EngineEvent::LinkBroken(why) => ("link-broken", why),
            })
            .collect())
    }

    fn close(&mut self, py: Python<'_>) {
        self.prepared = None;
        let engine = self.engine.take();
        py.detach(|| drop(engine));
    }
}

/// Sends frames that can be judged, on a thread of its own.
#[pyclass(module = "viaduct._core")]
pub struct TrafficSource {
    running: Running<Source>,
}

#[pymethods]
impl TrafficSource {
    #[new]
    #[pyo3(signature = (source, destination, *, macs, flows, size, rate, burst, count, seconds, session, mtu))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        source: &[u8],
        destination: &[u8],
        macs: u16,
        flows: u16,
        size: usize,
        rate: Option<f64>,
        burst: u32,
        count: Option<u64>,
        seconds: Option<f64>,
        session: u16,
        mtu: usize,
    ) -> PyResult<TrafficSource> {
        let time = match seconds {
            Some(seconds) => Some(u64::try_from(self::seconds(seconds)?.as_nanos()).unwrap_or(u64::MAX)),
            None => None,
        };
        let (source, destination) = (mac(source)?, mac(destination)?);
        let config = SourceConfig { source, destination, macs, flows, size, rate, burst, count, time, session };
        let source = Source::new(config, mtu).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(TrafficSource { running: Running::new(source, mtu)? })
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
        self.running.prepare(py, memory, features, (data_addr, data_end), queues)
    }

    fn attach(&mut self) -> PyResult<()> {
        self.running.attach()
    }

    fn detach(&mut self, py: Python<'_>) -> PyResult<()> {
        self.running.detach(py)
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = self.running.open()?.report();
        let dict = PyDict::new(py);
        dict.set_item("sent", report.sent)?;
        dict.set_item("bytes", report.bytes)?;
        dict.set_item("elapsed", report.elapsed)?;
        dict.set_item("full", report.full)?;
        Ok(dict)
    }

    #[getter]
    fn event_fd(&self) -> PyResult<RawFd> {
        self.running.event_fd()
    }

    /// ("done" or "link-broken", why) for each event
    fn take_events(&self) -> PyResult<Vec<(&'static str, String)>> {
        self.running.take_events()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        link_counts(py, self.running.open()?.counters())
    }

    fn close(&mut self, py: Python<'_>) {
        self.running.close(py);
    }
}

/// Receives and judges such frames, on a thread of its own.
#[pyclass(module = "viaduct._core")]
pub struct TrafficSink {
    running: Running<Sink>,
}

#[pymethods]
impl TrafficSink {
    #[new]
    #[pyo3(signature = (mac, *, macs, verify, count, mtu))]
    fn new(mac: &[u8], macs: u16, verify: bool, count: Option<u64>, mtu: usize) -> PyResult<TrafficSink> {
        let config = SinkConfig { mac: self::mac(mac)?, macs, verify, count };
        Ok(TrafficSink { running: Running::new(Sink::new(config), mtu)? })
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
        self.running.prepare(py, memory, features, (data_addr, data_end), queues)
    }

    fn attach(&mut self) -> PyResult<()> {
        self.running.attach()
    }

    fn detach(&mut self, py: Python<'_>) -> PyResult<()> {
        self.running.detach(py)
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = self.running.open()?.report();
        let dict = PyDict::new(py);
        let counts = [
            ("received", report.received),
            ("bytes", report.bytes),
            ("lost", report.lost),
            ("duplicated", report.duplicated),
            ("reordered", report.reordered),
            ("corrupted", report.corrupted),
            ("foreign", report.foreign),
            ("flows", report.flows),
            ("elapsed", report.elapsed),
        ];
        counts.iter().try_for_each(|(name, value)| dict.set_item(name, value))?;
        dict.set_item("latency", summary(py, report.latency.as_ref())?)?;
        Ok(dict)
    }

    #[getter]
    fn event_fd(&self) -> PyResult<RawFd> {
        self.running.event_fd()
    }

    /// ("done" or "link-broken", why) for each event
    fn take_events(&self) -> PyResult<Vec<(&'static str, String)>> {
        self.running.take_events()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        link_counts(py, self.running.open()?.counters())
    }

    fn close(&mut self, py: Python<'_>) {
        self.running.close(py);
    }
}
