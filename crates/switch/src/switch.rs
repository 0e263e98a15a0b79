//! The control side of the switch: what may be asked of it while frames flow.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use parking_lot::RwLock;
use viaduct_memory::GuestMemory;
use viaduct_ring::RingError;

use crate::capture::Capture;
use crate::counters::{PollerCounters, QueueCounters};
use crate::event::{Event, Events};
use crate::fabric::{Fabric, SourceId};
use crate::frame::Offloads;
use crate::mac_table::{MAX_PORTS, MacEntry, MacTable};
use crate::net_header::NetHeader;
use crate::null::Null;
use crate::pcap::{PcapInput, PcapOutput};
use crate::poller::{Poller, PollerLink, Polling};
use crate::port::{Input, InputQueue, InputState, Output, OutputQueue, OutputState, Port};
use crate::tap;
use crate::vhost::{VhostInput, VhostOutput, VhostQueue};
use crate::vlan::VlanMode;

/// Why the switch refused something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// No port has this number.
    #[error("there is no port number {0}")]
    NoPort(u16),
    /// The port does not have so many queues.
    #[error("port {port} has no queue {queue}: it has {allowed}, two for each pair (virtio 1.2, 5.1.2)")]
    NoQueue {
        /// The port's name.
        port: String,
        /// The virtqueue asked for.
        queue: u16,
        /// How many it has.
        allowed: usize,
    },
    /// The number of ports is limited.
    #[error("the switch has {MAX_PORTS} ports, the most it can have; remove one first")]
    TooManyPorts,
    /// A ring cannot be used.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A capture file cannot be used.
    #[error("{0}")]
    File(String),
    /// The system refused a descriptor or a thread.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}

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

/// A queue's counters, copied.
#[derive(Clone, Debug, Default)]
pub struct QueueStats {
    /// See [`QueueCounters`].
    pub frames: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// By [`DropReason`](crate::counters::DropReason).
    pub drops: Vec<u64>,
    /// Notifications sent to the driver.
    pub notifications: u64,
    /// Offloads completed here.
    pub completed_offloads: u64,
}

impl QueueStats {
    fn read(counters: &QueueCounters) -> QueueStats {
        QueueStats {
            frames: counters.frames.get(),
            bytes: counters.bytes.get(),
            drops: counters.drops.iter().map(|counter| counter.get()).collect(),
            notifications: counters.notifications.get(),
            completed_offloads: counters.completed_offloads.get(),
        }
    }
}

/// A port's counters, copied.
#[derive(Clone, Debug, Default)]
pub struct PortStats {
    /// Port number.
    pub number: u16,
    /// Its name.
    pub name: String,
    /// Frames can be delivered to it.
    pub up: bool,
    /// From the port into the switch, by queue pair.
    pub received: Vec<QueueStats>,
    /// From the switch to the port, by queue pair.
    pub sent: Vec<QueueStats>,
}

/// A poller's counters, copied.
#[derive(Clone, Debug, Default)]
pub struct PollerStats {
    /// Ticks in rounds that moved frames.
    pub busy_ticks: u64,
    /// Ticks in rounds that found nothing.
    pub idle_ticks: u64,
    /// Rounds.
    pub rounds: u64,
    /// Frames taken.
    pub frames: u64,
    /// Batches by size class, see [`BATCH_CLASSES`](crate::counters::BATCH_CLASSES).
    pub batches: Vec<u64>,
    /// Times asleep.
    pub sleeps: u64,
    /// Inputs being polled.
    pub active: u64,
    /// Inputs assigned.
    pub sources: usize,
}

impl PollerStats {
    fn read(counters: &PollerCounters, sources: usize) -> PollerStats {
        PollerStats {
            busy_ticks: counters.busy_ticks.get(),
            idle_ticks: counters.idle_ticks.get(),
            rounds: counters.rounds.get(),
            frames: counters.frames.get(),
            batches: counters.batches.iter().map(|counter| counter.get()).collect(),
            sleeps: counters.sleeps.get(),
            active: counters.active.load(Relaxed),
            sources,
        }
    }
}

/// The switch: ports, and pollers that carry frames between them. Every method may be called from any thread; pollers
/// stop at a batch boundary for the time of a change.
#[derive(Debug)]
pub struct Switch {
    fabric: Arc<RwLock<Fabric>>,
    macs: Arc<MacTable>,
    links: Vec<Arc<PollerLink>>,
    events: Arc<Events>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Switch {
    /// Starts one poller for each entry of `pollers`: pinned to that processor, or to none. `signal` is an eventfd that
    /// is written when there are events.
    pub fn new(pollers: &[Option<usize>], polling: Polling, signal: OwnedFd) -> Result<Switch, SwitchError> {
        let macs = Arc::new(MacTable::new());
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
            max_frame: if config.max_frame == 0 { u32::MAX } else { config.max_frame },
            accepts: Offloads::NONE,
            inputs: (0..pairs).map(|_| InputQueue::default()).collect(),
            outputs: (0..pairs).map(|_| OutputQueue::default()).collect(),
            live: Vec::new(),
            captures: Vec::new(),
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
        drop(fabric);
        self.macs.forget_port(number);
        // What the port had mapped is unmapped here, with the pollers running.
        drop(port);
        Ok(())
    }

    /// Changes what can be changed of a port while it runs: VLANs and frame size.
    pub fn change_port(&self, number: u16, vlan: VlanMode, max_frame: u32) -> Result<(), SwitchError> {
        self.with_port(number, |port| {
            port.vlan = vlan;
            port.max_frame = if max_frame == 0 { u32::MAX } else { max_frame };
        })?;
        self.macs.forget_port(number);
        Ok(())
    }

    /// What the port's receiver accepts, from its negotiated features.
    pub fn set_accepted(&self, number: u16, accepts: Offloads) -> Result<(), SwitchError> {
        self.with_port(number, |port| port.accepts = accepts)
    }

    /// Starts virtqueue `index` of a vhost-user port: even ones receive, odd ones transmit, as seen by the driver
    /// (virtio 1.2, 5.1.2).
    pub fn start_queue(&self, number: u16, index: u16, queue: VhostQueue) -> Result<(), SwitchError> {
        let pair = usize::from(index / 2);
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, index)?;
        if is_receive(index) {
            self.rouse(&mut fabric);
            return self.with_port_of(&mut fabric, number, |port| {
                port.outputs[pair].state.lock().output = Output::Vhost(Box::new(VhostOutput::new(queue)));
                find_live(port);
            });
        }
        let input = VhostInput::new(queue);
        self.start_input(&mut fabric, number, pair, Input::Vhost(Box::new(input)))
    }

    /// Stops a virtqueue. Returns where it stood, as GET_VRING_BASE wants it; none if it was not running.
    pub fn stop_queue(&self, number: u16, index: u16) -> Result<Option<u32>, SwitchError> {
        let pair = usize::from(index / 2);
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, index)?;
        // Dropped after the guard, so that unmapping does not hold up the pollers.
        let (stopped_output, stopped_input);
        let mut base = None;
        if is_receive(index) {
            stopped_output = self.with_port_of(&mut fabric, number, |port| {
                let state = std::mem::take(&mut *port.outputs[pair].state.lock());
                find_live(port);
                state
            })?;
            drop(fabric);
            if let Output::Vhost(mut output) = stopped_output.output {
                base = Some(output.queue().base());
            }
        } else {
            let port = fabric.ports[usize::from(number)].take().ok_or(SwitchError::NoPort(number))?;
            self.forget_source(&mut fabric, SourceId { port: number, queue: index / 2 }, &port.inputs[pair]);
            stopped_input = std::mem::take(&mut *port.inputs[pair].state.lock());
            fabric.ports[usize::from(number)] = Some(port);
            drop(fabric);
            if let Input::Vhost(mut input) = stopped_input.input {
                base = Some(input.queue().base());
            }
        }
        Ok(base)
    }

    /// Enables or disables a started queue (vhost-user, SET_VRING_ENABLE).
    pub fn enable_queue(&self, number: u16, index: u16, enabled: bool) -> Result<(), SwitchError> {
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, index)?;
        let pair = usize::from(index / 2);
        // Under the same guard: a poller must not look in between, find nothing changed, and sleep.
        self.rouse(&mut fabric);
        self.with_port_of(&mut fabric, number, |port| {
            if is_receive(index) {
                if let Output::Vhost(output) = &mut port.outputs[pair].state.lock().output {
                    output.set_enabled(enabled);
                }
                find_live(port);
            } else if let Input::Vhost(input) = &mut port.inputs[pair].state.lock().input {
                input.set_enabled(enabled);
            }
        })
    }

    /// Replaces the eventfd by which a started queue notifies its driver (vhost-user, SET_VRING_CALL).
    pub fn set_call(&self, number: u16, index: u16, call: Option<OwnedFd>) -> Result<(), SwitchError> {
        self.with_queue(number, index, |port, pair| {
            if is_receive(index) {
                if let Output::Vhost(output) = &mut port.outputs[pair].state.lock().output {
                    output.set_call(call);
                }
            } else if let Input::Vhost(input) = &mut port.inputs[pair].state.lock().input {
                input.set_call(call);
            }
        })
    }

    /// Gives all running queues of a port a new memory table. A queue whose ring is not in it is broken; the first such
    /// error is returned.
    pub fn set_memory(&self, number: u16, memory: &GuestMemory) -> Result<(), SwitchError> {
        // Dropped after the guard, so that unmapping does not hold up the pollers.
        let mut old = Vec::new();
        let mut result: Result<(), RingError> = Ok(());
        self.with_port(number, |port| {
            for slot in &port.inputs {
                if let Input::Vhost(input) = &mut slot.state.lock().input {
                    old.push(input.memory().clone());
                    let moved = input.queue().set_memory(memory.clone());
                    result = result.clone().and(moved);
                }
            }
            for slot in &port.outputs {
                if let Output::Vhost(output) = &mut slot.state.lock().output {
                    old.push(output.memory().clone());
                    let moved = output.queue().set_memory(memory.clone());
                    result = result.clone().and(moved);
                }
            }
        })?;
        Ok(result?)
    }

    /// Attaches a queue of a tap interface as a queue pair: `tap` has IFF_VNET_HDR with headers of 12 bytes, and accepts
    /// `accepts` (TUNSETOFFLOAD).
    pub fn attach_tap(&self, number: u16, pair: u16, tap: OwnedFd, accepts: Offloads) -> Result<(), SwitchError> {
        let (input, output) =
            tap::open(tap).map_err(|error| SwitchError::System("the tap interface cannot be used", error))?;
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, 2 * pair)?;
        let pair = usize::from(pair);
        self.rouse(&mut fabric);
        self.with_port_of(&mut fabric, number, |port| {
            port.accepts = accepts;
            port.outputs[pair].state.lock().output = Output::Tap(output);
            find_live(port);
        })?;
        self.start_input(&mut fabric, number, pair, Input::Tap(Box::new(input)))
    }

    /// Replays a capture file into the switch, as the port's input.
    pub fn attach_replay(&self, number: u16, file: OwnedFd) -> Result<(), SwitchError> {
        let input = PcapInput::open(file.into()).map_err(SwitchError::File)?;
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, 1)?;
        self.start_input(&mut fabric, number, 0, Input::Replay(Box::new(input)))
    }

    /// Records what is sent to the port.
    pub fn attach_record(&self, number: u16, file: OwnedFd) -> Result<(), SwitchError> {
        let output = PcapOutput::create(file.into()).map_err(SwitchError::File)?;
        self.attach_output(number, Output::Record(Box::new(output)))
    }

    /// Swallows what is sent to the port.
    pub fn attach_null(&self, number: u16) -> Result<(), SwitchError> {
        self.attach_output(number, Output::Null(Null))
    }

    fn attach_output(&self, number: u16, output: Output) -> Result<(), SwitchError> {
        let mut fabric = self.fabric.write();
        self.rouse(&mut fabric);
        self.with_port_of(&mut fabric, number, |port| {
            *port.outputs[0].state.lock() = OutputState { output, full_since: 0 };
            find_live(port);
        })
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

    /// Counters of all ports.
    pub fn port_stats(&self) -> Vec<PortStats> {
        let fabric = self.fabric.read();
        let read = |port: &Port| PortStats {
            number: port.number,
            name: port.name.clone(),
            up: !port.live.is_empty(),
            received: port.inputs.iter().map(|slot| QueueStats::read(&slot.counters)).collect(),
            sent: port.outputs.iter().map(|slot| QueueStats::read(&slot.counters)).collect(),
        };
        fabric.all().map(read).collect()
    }

    /// Counters of all pollers.
    pub fn poller_stats(&self) -> Vec<PollerStats> {
        let fabric = self.fabric.read();
        let pollers = self.links.iter().zip(&fabric.sources);
        pollers.map(|(link, sources)| PollerStats::read(&link.counters, sources.len())).collect()
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

    fn with_queue(&self, number: u16, index: u16, act: impl FnOnce(&mut Port, usize)) -> Result<(), SwitchError> {
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, index)?;
        self.with_port_of(&mut fabric, number, |port| act(port, usize::from(index / 2)))
    }

    /// Assigns an input to the poller with the fewest and starts it.
    fn start_input(&self, fabric: &mut Fabric, number: u16, pair: usize, input: Input) -> Result<(), SwitchError> {
        let source = SourceId { port: number, queue: pair as u16 };
        let slot = |fabric: &mut Fabric| fabric.ports[usize::from(number)].take().ok_or(SwitchError::NoPort(number));
        let mut port = slot(fabric)?;
        self.forget_source(fabric, source, &port.inputs[pair]);
        let poller = (0..fabric.sources.len()).min_by_key(|&poller| fabric.sources[poller].len()).unwrap_or(0);
        let watched = match &input {
            Input::Vhost(vhost) => {
                vhost.kick.as_ref().map_or(Ok(()), |kick| self.links[poller].watch(kick, source.token()))
            }
            Input::Tap(tap) => self.links[poller].watch(&tap.poll_fd().as_fd(), source.token()),
            Input::Replay(replay) => self.links[poller].watch(&replay.poll_fd().as_fd(), source.token()),
            Input::Stopped => Ok(()),
        };
        if watched.is_ok() {
            port.inputs[pair].poller = poller;
            *port.inputs[pair].state.lock() = InputState { input, ..InputState::default() };
            fabric.sources[poller].push(source);
            fabric.generation += 1;
        }
        fabric.ports[usize::from(number)] = Some(port);
        self.links[poller].wake();
        watched.map_err(|error| {
            SwitchError::System("the kick descriptor cannot be waited on; it should be an eventfd", error)
        })
    }

    /// Lets all pollers look at all their inputs again: a receiver has come or gone.
    fn rouse(&self, fabric: &mut Fabric) {
        fabric.generation += 1;
        for link in &self.links {
            link.wake();
        }
    }

    fn forget_source(&self, fabric: &mut Fabric, source: SourceId, slot: &InputQueue) {
        let link = &self.links[slot.poller];
        match &slot.state.lock().input {
            Input::Vhost(vhost) => {
                if let Some(kick) = &vhost.kick {
                    link.unwatch(kick.as_fd());
                }
            }
            Input::Tap(tap) => link.unwatch(tap.poll_fd()),
            Input::Replay(replay) => link.unwatch(replay.poll_fd()),
            Input::Stopped => {}
        }
        fabric.sources[slot.poller].retain(|each| *each != source);
        fabric.generation += 1;
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

/// Lists the outputs of a port that can take frames.
fn find_live(port: &mut Port) {
    let alive = |slot: &OutputQueue| match &slot.state.lock().output {
        Output::Vhost(output) => output.is_enabled(),
        Output::Down => false,
        _ => true,
    };
    port.live = (0u16..).zip(&port.outputs).filter(|(_, slot)| alive(slot)).map(|(index, _)| index).collect();
}

fn check_queue(fabric: &mut Fabric, number: u16, index: u16) -> Result<(), SwitchError> {
    let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
    let allowed = 2 * port.inputs.len();
    if usize::from(index) < allowed {
        return Ok(());
    }
    Err(SwitchError::NoQueue { port: port.name.clone(), queue: index, allowed })
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

/// Whether a virtqueue is one in which the driver receives (virtio 1.2, 5.1.2).
fn is_receive(index: u16) -> bool {
    index.is_multiple_of(2)
}
