//! virtio-pci: a device as a PCI function (virtio 1.2, 4.1), for drivers of virtio 1.0 and later and, if it is
//! transitional, for those of before ([`super::legacy`]).
//!
//! # Theory of operation
//!
//! One memory BAR has all structures that the capabilities name, a page each. A driver rings queue n by a write to its own
//! four bytes of the notification structure, of whatever width and value, so that the write needs no exit to this process:
//! as soon as the queue runs and the BAR has an address, the engine signals the queue's kick eventfd. Offered as well, and
//! first, if the owner wants it: the same structure in a BAR of ports.
//!
//! Interrupts are the events of the queues, and one for configuration changes, attached to the function's
//! [`Pins`]: messages of MSI-X, which no code of ours sees, or the level of INTA. Only for the latter there
//! is an ISR status.

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pci_identity::{TRANSITIONAL_REVISION, class, device};
use super::{
    FrontEnd, FrontEndState, Interface, Parameters, StatusChange, VirtioBackend, common_configuration as common,
    interrupt, legacy,
};
use crate::engine::{Attachment, Doorbell, Vm};
use crate::pci::{Bar, BarKind, Capability, ConfigSpace, Description, Identity, MsixBar, PciFunction, Pins, register};

/// The vector that is none (virtio 1.2, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xFFFF;
const VENDOR: u16 = 0x1AF4;

const LEGACY_BAR: usize = 0;
const MSIX_BAR: usize = 1;
const PORT_NOTIFY_BAR: usize = 2;
const MEMORY_BAR: usize = 4;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;
/// Bytes of the notification structure for each queue.
const NOTIFY_STRIDE: u64 = 4;
/// Queues whose notifications fit into a page; and into the 256 ports of a BAR.
const QUEUES_MAX: usize = (PAGE / NOTIFY_STRIDE) as usize;
const PORT_QUEUES_MAX: usize = (256 / NOTIFY_STRIDE) as usize;

/// Kinds of capabilities (virtio 1.2, 4.1.4).
mod kind {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}
const VENDOR_CAPABILITY: u8 = 9;
/// Offsets in the capability by which configuration space reaches the BARs (4.1.4.9).
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// Whether the kind of device existed before virtio 1.0, so that there can be a transitional one (virtio 1.2, 4.1.2.1).
pub fn has_transitional_id(device_id: u16) -> bool {
    device(device_id, true).is_some()
}

/// How a device is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciOptions {
    /// To drivers of before virtio 1.0 as well.
    pub transitional: bool,
    /// With a notification structure of ports.
    pub port_notify: bool,
}

/// Everything that a driver wrote, for a snapshot; the function's configuration space is the root's to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciTransportState {
    front_end: FrontEndState,
    legacy: bool,
    isr: u8,
    vectors: Vec<u16>,
}

/// What of the queues is attached to the engine.
struct Wiring {
    /// Where the BARs are.
    bars: [Option<u64>; 6],
    interface: Interface,
    running: Vec<u16>,
    doorbells: Vec<Box<dyn Attachment>>,
    /// By queue, and then the configuration: the number of the event at the pins, and its vector.
    sources: Vec<(Option<usize>, u16)>,
}

/// A virtio device in a slot.
pub struct VirtioPci {
    front_end: FrontEnd,
    options: PciOptions,
    vm: Arc<dyn Vm>,
    pins: OnceLock<Arc<Pins>>,
    config_event: EventFd,
    isr: Mutex<u8>,
    wiring: Mutex<Wiring>,
    /// Where the last capability is, the window to the BARs.
    window: usize,
    this: Weak<VirtioPci>,
}

impl VirtioPci {
    /// A device that has not been put into a slot yet.
    ///
    /// # Errors
    /// What of `parameters` and `options` cannot be.
    pub fn new(
        vm: Arc<dyn Vm>,
        backend: Box<dyn VirtioBackend>,
        parameters: Parameters,
        options: PciOptions,
    ) -> Result<Arc<VirtioPci>, String> {
        let (name, queues) = (&parameters.name, parameters.queue_sizes.len());
        let most = if options.port_notify { PORT_QUEUES_MAX } else { QUEUES_MAX };
        if queues > most {
            return Err(format!("{name}: {queues} queues; at most {most} have room in the notification structure"));
        }
        if device(parameters.device_id, options.transitional).is_none() {
            return Err(format!(
                "{name}: device {} has no transitional PCI device id (virtio 1.2, 4.1.2.1); make it a modern one",
                parameters.device_id
            ));
        }
        let config_event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| format!("{name}: {error}"))?;
        let front_end = FrontEnd::new(parameters, backend)?;
        let wiring = Wiring {
            bars: [None; 6],
            interface: Interface::Modern,
            running: Vec::new(),
            doorbells: Vec::new(),
            sources: vec![(None, NO_VECTOR); queues + 1],
        };
        Ok(Arc::new_cyclic(|this| VirtioPci {
            front_end,
            options,
            vm,
            pins: OnceLock::new(),
            config_event,
            isr: Mutex::new(0),
            wiring: Mutex::new(wiring),
            window: window(&capabilities(options, queues)),
            this: this.clone(),
        }))
    }

    /// What driver and device have agreed upon.
    pub fn front_end(&self) -> &FrontEnd {
        &self.front_end
    }

    /// The device has another configuration: keeps it and tells the driver (virtio 1.2, 2.5).
    ///
    /// # Errors
    /// [`FrontEnd::set_config`].
    pub fn config_changed(&self, bytes: &[u8]) -> Result<(), String> {
        if self.front_end.set_config(bytes)? {
            self.raise_config();
        }
        Ok(())
    }

    /// The device cannot go on until it is reset; tells the driver.
    pub fn needs_reset(&self) {
        self.front_end.needs_reset();
        self.raise_config();
    }

    fn raise_config(&self) {
        if self.front_end.running() {
            let _ = self.config_event.write(1);
        }
    }

    /// Everything that the driver wrote. The vCPUs are paused.
    ///
    /// # Errors
    /// [`FrontEnd::save`].
    pub fn save(&self) -> Result<PciTransportState, String> {
        let front_end = self.front_end.save()?;
        let wiring = self.wiring.lock();
        let vectors = wiring.sources.iter().map(|(_, vector)| *vector).collect();
        let legacy = wiring.interface == Interface::Legacy;
        Ok(PciTransportState { front_end, legacy, isr: *self.isr.lock(), vectors })
    }

    /// Goes on from a saved state, after the root has. The owner activates the back-end.
    ///
    /// # Errors
    /// [`FrontEnd::restore`].
    pub fn restore(&self, state: &PciTransportState) -> Result<(), String> {
        let (saved, own) = (state.vectors.len(), self.front_end.events().len() + 1);
        if saved != own {
            return Err(format!("the saved device has {saved} vectors, this one has {own}; give it the same queues"));
        }
        let interface = if state.legacy { Interface::Legacy } else { Interface::Modern };
        self.front_end.restore(&state.front_end, |queues| {
            self.connect(interface, queues.iter().map(|queue| queue.index).collect())
        })?;
        for (index, vector) in state.vectors.iter().enumerate() {
            self.set_vector(index, *vector);
        }
        *self.isr.lock() = state.isr;
        Ok(())
    }

    /// A driver's write to the status register.
    pub(super) fn write_status(&self, value: u8, interface: Interface) {
        let change = self.front_end.write_status(value, interface, |queues| {
            self.connect(interface, queues.iter().map(|queue| queue.index).collect())
        });
        match change {
            StatusChange::Reset => self.disconnect(),
            StatusChange::NeedsReset => self.raise_config(),
            StatusChange::Activated | StatusChange::Bits => {}
        }
    }

    /// After a reset no event has a vector (4.1.5.1.2), and nothing is pending.
    fn disconnect(&self) {
        for index in 0..=self.front_end.events().len() {
            self.set_vector(index, NO_VECTOR);
        }
        let _ = self.config_event.read();
        self.take_isr();
    }

    fn connect(&self, interface: Interface, running: Vec<u16>) -> Result<(), String> {
        let mut wiring = self.wiring.lock();
        let config = self.front_end.events().len();
        for index in running.iter().map(|&index| usize::from(index)).chain([config]) {
            self.source(&mut wiring, index)?;
        }
        if (wiring.interface, &wiring.running) != (interface, &running) || wiring.doorbells.is_empty() {
            (wiring.interface, wiring.running) = (interface, running);
            self.attach_doorbells(&mut wiring);
        }
        Ok(())
    }

    /// The number at the pins of a queue's event, or of the configuration's behind the last queue.
    fn source(&self, wiring: &mut Wiring, index: usize) -> Result<usize, String> {
        if let (Some(number), _) = wiring.sources[index] {
            return Ok(number);
        }
        let pins = self.pins.get().ok_or("it is in no PCI slot")?;
        let events = self.front_end.events().get(index);
        let (event, bit) = match events {
            Some(events) => (&events.call, interrupt::QUEUE),
            None => (&self.config_event, interrupt::CONFIG),
        };
        let this = self.this.clone();
        let on_intx = Arc::new(move || {
            if let Some(this) = this.upgrade() {
                this.set_isr(bit);
            }
        });
        let number = pins.attach(event, on_intx).map_err(|error| error.to_string())?;
        wiring.sources[index].0 = Some(number);
        Ok(number)
    }

    /// Rings that need no exit, for the queues that run. What the engine refuses arrives in [`VirtioPci::write_bar`].
    fn attach_doorbells(&self, wiring: &mut Wiring) {
        wiring.doorbells.clear();
        let port = |base: u64| u16::try_from(base).ok();
        for &queue in &wiring.running {
            let offset = NOTIFY_STRIDE * u64::from(queue);
            let mut places = Vec::with_capacity(2);
            match wiring.interface {
                Interface::Legacy => {
                    let notify = wiring.bars[LEGACY_BAR].and_then(|base| port(base + legacy::register::QUEUE_NOTIFY));
                    places.extend(notify.map(|port| Doorbell::Port { port, value: Some(queue) }));
                }
                Interface::Modern => {
                    let memory = wiring.bars[MEMORY_BAR].map(|base| base + NOTIFY + offset);
                    places.extend(memory.map(|address| Doorbell::Address { address, value: None }));
                    let ports = wiring.bars[PORT_NOTIFY_BAR].and_then(|base| port(base + offset));
                    places.extend(ports.map(|port| Doorbell::Port { port, value: None }));
                }
            }
            let kick = &self.front_end.events()[usize::from(queue)].kick;
            let attached = places.into_iter().filter_map(|place| self.vm.attach_doorbell(place, kick).ok());
            wiring.doorbells.extend(attached);
        }
    }

    /// The driver chooses the vector of a queue, or behind the last queue that of the configuration.
    pub(super) fn set_vector(&self, index: usize, vector: u16) {
        let mut wiring = self.wiring.lock();
        let Some(pins) = self.pins.get().filter(|_| index < wiring.sources.len()) else { return };
        let vectors = pins.msix().map_or(0, crate::pci::Msix::vectors);
        let chosen = Some(vector).filter(|&vector| vector < vectors);
        let number = match (wiring.sources[index].0, chosen) {
            (None, None) => None,
            _ => self.source(&mut wiring, index).ok(),
        };
        let set = number.is_some_and(|number| pins.set_vector(number, chosen).is_ok());
        // What could not be had reads back as none (4.1.5.1.2.1).
        wiring.sources[index].1 = chosen.filter(|_| set).unwrap_or(NO_VECTOR);
    }

    /// The vector of a queue, or of the configuration.
    pub(super) fn vector(&self, index: usize) -> u16 {
        self.wiring.lock().sources.get(index).map_or(NO_VECTOR, |(_, vector)| *vector)
    }

    /// Whether the driver has MSI-X on, which moves the legacy configuration space.
    pub(super) fn messages(&self) -> bool {
        self.pins.get().is_some_and(|pins| pins.messages())
    }

    fn set_isr(&self, bit: u8) {
        let mut isr = self.isr.lock();
        *isr |= bit;
        if let Some(pins) = self.pins.get() {
            pins.set_intx(true);
        }
    }

    /// The ISR status, which is cleared by being read, and INTA with it (4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock();
        if let Some(pins) = self.pins.get() {
            pins.set_intx(false);
        }
        std::mem::take(&mut isr)
    }

    /// What the window shows, if an access of configuration space from `offset` on meets its data: BAR, offset, length.
    fn through_window(&self, config: &ConfigSpace, offset: usize, len: usize) -> Option<(usize, u64, usize)> {
        let window = self.window;
        let data = window + WINDOW_DATA;
        if offset >= data + 4 || offset.checked_add(len)? <= data {
            return None;
        }
        let bar = usize::from(config.word(window + WINDOW_BAR) as u8);
        let (at, length) = (u64::from(config.dword(window + WINDOW_OFFSET)), config.dword(window + WINDOW_LENGTH));
        // Accesses that a driver must not make (4.1.4.9.2) have no effect.
        let size = config.bars().get(bar).copied().flatten().filter(|_| bar != MSIX_BAR)?.size;
        let fits = matches!(length, 1 | 2 | 4) && at % u64::from(length) == 0 && at + u64::from(length) <= size;
        fits.then_some((bar, at, length as usize))
    }

    fn notified(&self, offset: u64) {
        if offset.is_multiple_of(NOTIFY_STRIDE)
            && let Ok(queue) = u32::try_from(offset / NOTIFY_STRIDE)
        {
            self.front_end.notify(queue);
        }
    }
}

/// The capabilities that say where everything is (4.1.4).
fn capabilities(options: PciOptions, queues: usize) -> Vec<Capability> {
    let structure = |kind: u8, bar: usize, offset: u64, length: u64, more: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, bar as u8, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        Capability { id: VENDOR_CAPABILITY, body, writable: Vec::new() }
    };
    let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
    let notified = NOTIFY_STRIDE * queues.max(1) as u64;
    let mut all = vec![structure(kind::COMMON, MEMORY_BAR, COMMON, common::SIZE, &[])];
    // The first one is the one that the device prefers (4.1.4.1).
    if options.port_notify {
        all.push(structure(kind::NOTIFY, PORT_NOTIFY_BAR, 0, notified, &stride));
    }
    all.push(structure(kind::NOTIFY, MEMORY_BAR, NOTIFY, notified, &stride));
    all.push(structure(kind::ISR, MEMORY_BAR, ISR, 1, &[]));
    all.push(structure(kind::DEVICE, MEMORY_BAR, DEVICE, PAGE, &[]));
    let mut window = structure(kind::PCI, 0, 0, 0, &[0; 4]);
    window.writable = vec![0; window.body.len()];
    // BAR; offset and length; data. The body is without the capability's two first bytes.
    window.writable[WINDOW_BAR - 2] = 0xFF;
    window.writable[WINDOW_OFFSET - 2..].fill(0xFF);
    all.push(window);
    all
}

/// Where the last of these is.
fn window(capabilities: &[Capability]) -> usize {
    let before = capabilities.split_last().map_or(capabilities, |(_, before)| before);
    let sizes = before.iter().map(|capability| (2 + capability.body.len()).next_multiple_of(4));
    register::FIRST_CAPABILITY + sizes.sum::<usize>()
}

impl PciFunction for VirtioPci {
    fn name(&self) -> &str {
        &self.front_end.parameters().name
    }

    fn describe(&self) -> Description {
        let Parameters { device_id, queue_sizes, .. } = self.front_end.parameters();
        let PciOptions { transitional, port_notify } = self.options;
        let mut bars = [None; 6];
        bars[MEMORY_BAR] = Some(Bar { kind: BarKind::Memory64, size: 4 * PAGE });
        if transitional {
            bars[LEGACY_BAR] = Some(Bar { kind: BarKind::Io, size: legacy::SIZE });
        }
        if port_notify {
            let size = (NOTIFY_STRIDE * queue_sizes.len().max(1) as u64).next_power_of_two();
            bars[PORT_NOTIFY_BAR] = Some(Bar { kind: BarKind::Io, size });
        }
        let identity = Identity {
            vendor: VENDOR,
            // The constructor has seen that there is one.
            device: device(*device_id, transitional).unwrap_or(0),
            revision: if transitional { TRANSITIONAL_REVISION } else { 1 },
            class: class(*device_id),
            subsystem_vendor: VENDOR,
            subsystem: if transitional { *device_id } else { 0x40 + *device_id },
        };
        let msix = Some(MsixBar { bar: MSIX_BAR, vectors: queue_sizes.len() as u16 + 1 });
        Description { identity, bars, capabilities: capabilities(self.options, queue_sizes.len()), msix, pin: true }
    }

    fn attached(&self, pins: &Arc<Pins>) {
        // A function is put into one slot, once.
        let _ = self.pins.set(pins.clone());
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (bar, offset / PAGE * PAGE) {
            (LEGACY_BAR, _) => legacy::read(self, offset, data),
            (MEMORY_BAR, COMMON) => common::read(self, offset, data),
            (MEMORY_BAR, ISR) if offset == ISR => data[0] = self.take_isr(),
            (MEMORY_BAR, DEVICE) => self.front_end.read_config(offset - DEVICE, data),
            _ => {}
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        match (bar, offset / PAGE * PAGE) {
            (LEGACY_BAR, _) => legacy::write(self, offset, data),
            (PORT_NOTIFY_BAR, _) => self.notified(offset),
            (MEMORY_BAR, COMMON) => common::write(self, offset, data),
            (MEMORY_BAR, DEVICE) => self.front_end.write_config(offset - DEVICE, data),
            (MEMORY_BAR, NOTIFY) => self.notified(offset - NOTIFY),
            _ => {}
        }
    }

    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        let mut wiring = self.wiring.lock();
        wiring.bars[bar] = address;
        self.attach_doorbells(&mut wiring);
    }

    fn read_config(&self, config: &ConfigSpace, offset: usize, data: &mut [u8]) {
        let Some((bar, at, length)) = self.through_window(config, offset, data.len()) else { return };
        let mut seen = [0; 4];
        self.read_bar(bar, at, &mut seen[..length]);
        let window = self.window + WINDOW_DATA;
        for (at, byte) in (offset..).zip(data) {
            if let Some(seen) = at.checked_sub(window).and_then(|at| seen.get(at)) {
                *byte = *seen;
            }
        }
    }

    fn config_written(&self, config: &ConfigSpace, offset: usize, data: &[u8]) {
        let Some((bar, at, length)) = self.through_window(config, offset, data.len()) else { return };
        let written = config.dword(self.window + WINDOW_DATA).to_le_bytes();
        self.write_bar(bar, at, &written[..length]);
    }

    fn reset(&self) {
        self.front_end.power_on();
        self.disconnect();
    }
}
