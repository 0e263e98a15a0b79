//! The control side of the switch: what may be asked of it while frames flow.

mod attach;
mod error;
mod hold;
mod inspect;
mod queues;
mod rules;
mod stats;
mod translation;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use parking_lot::RwLock;

use crate::admission::Admission;
use crate::capture::Capture;
use crate::event::{Event, Events};
use crate::fabric::{Fabric, SourceId};
use crate::frame::Offloads;
use crate::mac_table::{MacEntry, MacTable};
use crate::net_header::NetHeader;
use crate::poller::{Poller, PollerLink, Polling};
use crate::port::{InputQueue, OutputQueue, Port};
use crate::vlan::VlanMode;

pub use error::SwitchError;
pub use hold::QueuePosition;
pub use inspect::QueueState;
pub use rules::RuleStats;
pub use stats::{PollerStats, PortStats, QueueStats};

/// What a port is when it is made; its queues start later.
#[derive(Clone, Debug, Default)]
pub struct PortConfig {
    /// The name that people gave it.
    pub name: String,
    /// VLANs.
    pub vlan: VlanMode,
    /// Longest frame that may be sent there unsegmented, Ethernet header included, tag not; 0: no limit.
    pub max_frame: u32,
    /// Number of queue pairs.
    pub pairs: usize,
}

/// The switch: ports, and pollers that carry frames between them. Every method may be called from any thread; pollers
/// stop at a batch boundary for the time of a change.
#[derive(Debug)]
pub struct Switch {
    pub(crate) fabric: Arc<RwLock<Fabric>>,
    pub(crate) macs: Arc<MacTable>,
    pub(crate) links: Vec<Arc<PollerLink>>,
    pub(crate) events: Arc<Events>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

impl Switch {
    /// Starts one poller for each entry of `pollers`: pinned to that processor, or to none. `signal` is an eventfd that
    /// is written when there are events.
    pub fn new(pollers: &[Option<usize>], polling: Polling, signal: OwnedFd) -> Result<Switch, SwitchError> {
        let macs = Arc::new(MacTable::new());
        let twin = signal.try_clone().map_err(|error| SwitchError::System("the eventfd cannot be shared", error))?;
        macs.rights.signal(twin);
        let mut switch = Switch {
            fabric: Arc::new(RwLock::new(Fabric::new(pollers.len(), macs.clone()))),
            macs,
            links: Vec::new(),
            events: Arc::new(Events::new(signal)),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for (index, cpu) in pollers.iter().enumerate() {
            let failed = |error| SwitchError::System("a poller cannot be started", error);
            let link = Arc::new(PollerLink::new().map_err(failed)?);
            switch.links.push(link.clone());
            let poller = Poller {
                index,
                fabric: switch.fabric.clone(),
                link,
                events: switch.events.clone(),
                stop: switch.stop.clone(),
                polling,
            };
            let (pinned, told) = std::sync::mpsc::channel();
            let cpu = *cpu;
            let body = move || {
                let result = cpu.map_or(Ok(()), pin);
                let runs = result.is_ok();
                let _ = pinned.send(result);
                if runs {
                    poller.run();
                }
            };
            let thread = std::thread::Builder::new().name(format!("poller{index}")).spawn(body).map_err(failed)?;
            switch.threads.push(thread);
            if let Ok(Err(error)) = told.recv() {
                return Err(SwitchError::System(
                    "a poller cannot be pinned to its CPU; is it online and allowed?",
                    error,
                ));
            }
        }
        Ok(switch)
    }

    /// Adds a port without running queues. Returns its number.
    pub fn add_port(&self, config: PortConfig) -> Result<u16, SwitchError> {
        let mut fabric = self.fabric.write();
        let number = fabric.free_number().ok_or(SwitchError::TooManyPorts)?;
        let pairs = config.pairs.max(1);
        let port = Port {
            name: config.name,
            number,
            vlan: config.vlan,
            admission: Admission::default(),
            max_frame: if config.max_frame == 0 { u32::MAX } else { config.max_frame },
            accepts: Offloads::NONE,
            inputs: (0..pairs).map(|_| InputQueue::default()).collect(),
            outputs: (0..pairs).map(|_| OutputQueue::default()).collect(),
            live: Vec::new(),
            captures: Vec::new(),
            traces: Vec::new(),
        };
        let index = usize::from(number);
        if index == fabric.ports.len() {
            fabric.ports.push(None);
        }
        fabric.ports[index] = Some(Box::new(port));
        Ok(number)
    }

    /// Removes a port: its queues stop and its stations are forgotten.
    pub fn remove_port(&self, number: u16) -> Result<(), SwitchError> {
        let mut fabric = self.fabric.write();
        let port =
            fabric.ports.get_mut(usize::from(number)).and_then(Option::take).ok_or(SwitchError::NoPort(number))?;
        for (queue, slot) in port.inputs.iter().enumerate() {
            self.forget_source(&mut fabric, SourceId { port: number, queue: queue as u16 }, slot);
        }
        self.macs.rights.reset(number);
        drop(fabric);
        self.macs.forget_port(number);
        // What the port had mapped is unmapped here, with the pollers running.
        drop(port);
        Ok(())
    }

    /// Changes what can be changed of a port while it runs: VLANs and frame size.
    pub fn change_port(&self, number: u16, vlan: VlanMode, max_frame: u32) -> Result<(), SwitchError> {
        let vlan_of_pins = vlan.clone();
        self.with_port(number, |port| {
            port.vlan = vlan;
            port.max_frame = if max_frame == 0 { u32::MAX } else { max_frame };
        })?;
        self.macs.rights.move_pins(number, &vlan_of_pins);
        self.macs.forget_port(number);
        Ok(())
    }

    /// What the port's receiver accepts, from its negotiated features.
    pub fn set_accepted(&self, number: u16, accepts: Offloads) -> Result<(), SwitchError> {
        self.with_port(number, |port| port.accepts = accepts)
    }

    /// Copies what passes the port into `capture`, beside others.
    pub fn add_capture(&self, number: u16, capture: Arc<Capture>) -> Result<(), SwitchError> {
        self.with_port(number, |port| port.captures.push(capture))
    }

    /// Ends what [`add_capture`](Switch::add_capture) began.
    pub fn remove_capture(&self, number: u16, capture: &Arc<Capture>) -> Result<(), SwitchError> {
        self.with_port(number, |port| port.captures.retain(|each| !Arc::ptr_eq(each, capture)))
    }

    /// Sends an Ethernet frame as if the port's guest had sent it (vhost-user SEND_RARP).
    pub fn announce(&self, number: u16, frame: &[u8]) -> Result<(), SwitchError> {
        let mut with_header = vec![0; NetHeader::LEN];
        with_header.extend_from_slice(frame);
        let fabric = self.fabric.read();
        let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
        let mut forwarder = crate::forward::Forwarder::new();
        forwarder.announce(&fabric, port, &mut with_header);
        for (port, queue, message) in forwarder.broken {
            self.events.push(Event { port, queue: 2 * queue, message });
        }
        Ok(())
    }

    /// Begins an ageing epoch; stations not heard for [`AGE_EPOCHS`](crate::mac_table::AGE_EPOCHS) of them are forgotten.
    pub fn age(&self) -> usize {
        self.macs.tick()
    }

    /// Forgets the stations behind a port, for instance when its guest has left.
    pub fn forget_stations(&self, number: u16) {
        self.macs.forget_port(number);
    }

    /// The stations that are known.
    pub fn stations(&self) -> Vec<MacEntry> {
        self.macs.entries()
    }

    /// Takes what the pollers reported.
    pub fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }

    fn with_port<R>(&self, number: u16, act: impl FnOnce(&mut Port) -> R) -> Result<R, SwitchError> {
        self.with_port_of(&mut self.fabric.write(), number, act)
    }

    fn with_port_of<R>(
        &self,
        fabric: &mut Fabric,
        number: u16,
        act: impl FnOnce(&mut Port) -> R,
    ) -> Result<R, SwitchError> {
        let port = fabric.ports.get_mut(usize::from(number)).and_then(Option::as_mut);
        port.map(|port| act(port)).ok_or(SwitchError::NoPort(number))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for link in &self.links {
            link.wake();
        }
        for thread in self.threads.drain(..) {
            // A poller that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

/// Runs the calling thread on one processor only.
fn pin(cpu: usize) -> std::io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: all-zero is an empty set; the index is within it, and the call reads a valid local.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
