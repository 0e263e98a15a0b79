//! What a driver and its device have agreed upon, whatever transport it came by: the registers that mmio and PCI share.
//!
//! # Theory of operation
//!
//! A driver talks in this order (virtio 1.2, 3.1.1): status ACKNOWLEDGE and DRIVER, features, FEATURES_OK, queues, DRIVER_OK.
//! Everything before DRIVER_OK is only kept here. With DRIVER_OK the queues are checked, the transport connects their
//! eventfds with the virtual machine, and the [`VirtioBackend`] gets them; from then on nothing of what it was told can be
//! changed, until the driver writes status 0, and reads 0 again as soon as the device has let go of the queues (2.4.1).
//!
//! Two locks, never held together. `registers` is held while the back-end is activated or reset, which may take another
//! thread's time: a second vCPU that reaches for the same device waits. What a *device* changes at any time, the
//! configuration and DEVICE_NEEDS_RESET, is not behind that lock, so a device never waits for a vCPU.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue_registers::QueueRegisters;
use super::{QueueSetup, VirtioBackend, feature, status};

/// Mistakes of a driver that are reported, in a device's whole life.
const REPORTS: u8 = 16;
/// A configuration space longer than this is refused: no device has one.
const CONFIG_MAX: usize = 4096;
/// Descriptors in the largest queue (virtio 1.2, 2.6 and 2.7.10.1).
const QUEUE_SIZE_MAX: u16 = 32768;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// What traces and errors call it.
    pub name: String,
    /// Its number (virtio 1.2, 5).
    pub device_id: u16,
    /// The feature bits it offers; those that the transport does not have are left out.
    pub features: u64,
    /// The largest size of each of its queues: powers of two.
    pub queue_sizes: Vec<u16>,
    /// Its configuration space.
    pub config: Vec<u8>,
}

/// The eventfds of one queue.
#[derive(Debug)]
pub struct QueueEvents {
    /// Signalled by the driver.
    pub kick: EventFd,
    /// Signalled by the device.
    pub call: EventFd,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    /// Windows of 32 bits each; the upper two must stay zero.
    driver_features: [u32; 4],
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    /// The back-end has been activated, and not been reset since.
    active: bool,
}

/// Everything that a driver wrote, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontEndState {
    status: u8,
    generation: u32,
    registers: Registers,
}

/// How the driver talks: virtio 1.0 or later, or as before (virtio 1.2, 7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// By the specification.
    Modern,
    /// As before virtio 1.0: no FEATURES_OK, no VERSION_1.
    Legacy,
}

/// What a write to the status register has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusChange {
    /// Nothing but other bits in it.
    Bits,
    /// The queues run.
    Activated,
    /// The device could not be activated: the driver is to be told by a configuration change (virtio 1.2, 2.1.2).
    NeedsReset,
    /// Everything is as in the beginning.
    Reset,
}

/// The registers that all transports have.
pub struct FrontEnd {
    parameters: Parameters,
    backend: Box<dyn VirtioBackend>,
    events: Vec<QueueEvents>,
    status: AtomicU8,
    generation: AtomicU32,
    config: Mutex<Vec<u8>>,
    registers: Mutex<Registers>,
    reports: AtomicU8,
}

impl FrontEnd {
    /// A device after reset.
    ///
    /// # Errors
    /// A queue size that is none, or no descriptors for eventfds.
    pub fn new(mut parameters: Parameters, backend: Box<dyn VirtioBackend>) -> Result<FrontEnd, String> {
        let name = &parameters.name;
        if let Some(size) =
            parameters.queue_sizes.iter().find(|size| !size.is_power_of_two() || **size > QUEUE_SIZE_MAX)
        {
            return Err(format!(
                "{name}: a queue of {size} descriptors; allowed are powers of two up to {QUEUE_SIZE_MAX} (virtio 1.2, 2.7)"
            ));
        }
        let event = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| {
                format!("{name}: no eventfd for a queue: {error}; allow this process more descriptors (ulimit -n)")
            })
        };
        let events = parameters
            .queue_sizes
            .iter()
            .map(|_| Ok(QueueEvents { kick: event()?, call: event()? }))
            .collect::<Result<Vec<_>, String>>()?;
        let config = std::mem::take(&mut parameters.config);
        check_config(name, &config)?;
        parameters.features = parameters.features & !feature::NOT_OURS | feature::VERSION_1;
        let registers = Registers::of(&parameters);
        Ok(FrontEnd {
            parameters,
            backend,
            events,
            status: AtomicU8::new(0),
            generation: AtomicU32::new(0),
            config: Mutex::new(config),
            registers: Mutex::new(registers),
            reports: AtomicU8::new(0),
        })
    }

    /// What the device is, with the features that it offers by this transport.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The eventfds of each queue.
    pub fn events(&self) -> &[QueueEvents] {
        &self.events
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Whether the queues run.
    pub fn running(&self) -> bool {
        self.status() & status::DRIVER_OK != 0
    }

    /// The number of the configuration (virtio 1.2, 2.5.2).
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// A driver's write to the status register. `connect` joins the eventfds of the queues it is given with the virtual
    /// machine, before the back-end uses them.
    pub fn write_status(
        &self,
        value: u8,
        interface: Interface,
        connect: impl FnOnce(&[QueueSetup]) -> Result<(), String>,
    ) -> StatusChange {
        let mut registers = self.registers.lock();
        if value == 0 {
            self.reset(&mut registers);
            return StatusChange::Reset;
        }
        // A driver must not clear bits (2.1.1), and DEVICE_NEEDS_RESET is not the driver's.
        let mut set = value & !status::DEVICE_NEEDS_RESET & !self.status();
        if set & status::FEATURES_OK != 0
            && let Err(text) = registers.check_features(self.parameters.features, interface)
        {
            self.report(&text);
            set &= !status::FEATURES_OK;
        }
        let before = self.status.fetch_or(set, Ordering::AcqRel);
        if set & status::DRIVER_OK == 0 {
            return StatusChange::Bits;
        }
        let activated = self.activate(&mut registers, before | set, interface, connect);
        let Err(text) = activated else { return StatusChange::Activated };
        self.report(&text);
        self.needs_reset();
        StatusChange::NeedsReset
    }

    fn activate(
        &self,
        registers: &mut Registers,
        status: u8,
        interface: Interface,
        connect: impl FnOnce(&[QueueSetup]) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut features = registers.features();
        match interface {
            Interface::Modern if status & status::FEATURES_OK == 0 => {
                return Err("DRIVER_OK without FEATURES_OK (virtio 1.2, 3.1.1)".to_owned());
            }
            Interface::Modern => {}
            // There is no way to refuse features (7.4): what was not offered is not on.
            Interface::Legacy => {
                features &= self.parameters.features & u64::from(u32::MAX);
                registers.driver_features = [features as u32, 0, 0, 0];
            }
        }
        let queues = self.setup(registers, features)?;
        connect(&queues)?;
        // Even if it fails: what it has begun, its reset ends.
        registers.active = true;
        self.backend.activate(features, &queues)
    }

    fn reset(&self, registers: &mut Registers) {
        if registers.active {
            self.backend.reset();
        }
        *registers = Registers::of(&self.parameters);
        // What the driver of before did not wait for is not the next one's.
        for events in &self.events {
            let _ = events.kick.read();
            let _ = events.call.read();
        }
        // Last: a driver that reads 0 here may use the queues' memory for something else.
        self.status.store(0, Ordering::Release);
    }

    /// Back to the state after power-on, as a bus reset does. Returns when no queue is touched any more.
    pub fn power_on(&self) {
        self.reset(&mut self.registers.lock());
    }

    /// The queues that are enabled, if each is one.
    fn setup(&self, registers: &Registers, features: u64) -> Result<Vec<QueueSetup>, String> {
        let enabled = registers.queues.iter().zip(&self.events).enumerate().filter(|(_, (queue, _))| queue.enabled);
        enabled
            .map(|(index, (queue, events))| {
                let most = self.parameters.queue_sizes[index];
                let size = queue.check(most, features).map_err(|text| format!("queue {index}: {text}"))?;
                Ok(QueueSetup {
                    index: index as u16,
                    size,
                    descriptor: queue.descriptor,
                    driver: queue.driver,
                    device: queue.device,
                    kick: events.kick.as_raw_fd(),
                    call: events.call.as_raw_fd(),
                })
            })
            .collect()
    }

    /// The device cannot go on (virtio 1.2, 2.1.2). The transport raises a configuration change after it.
    pub fn needs_reset(&self) {
        self.status.fetch_or(status::DEVICE_NEEDS_RESET, Ordering::AcqRel);
    }

    /// Tells the back-end what the driver did wrong, a few times.
    pub fn report(&self, text: &str) {
        let count = |reports: u8| (reports < REPORTS).then_some(reports + 1);
        if self.reports.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count).is_ok() {
            self.backend.driver_error(text);
        }
    }

    /// Which 32 features the next register shows.
    pub fn select_device_features(&self, window: u32) {
        self.registers.lock().device_features_select = window;
    }

    /// The selection of device features.
    pub fn device_features_select(&self) -> u32 {
        self.registers.lock().device_features_select
    }

    /// The 32 features offered that were selected; beyond the last feature none.
    pub fn device_features(&self) -> u32 {
        match self.registers.lock().device_features_select {
            0 => self.parameters.features as u32,
            1 => (self.parameters.features >> 32) as u32,
            _ => 0,
        }
    }

    /// Which 32 features the next register takes.
    pub fn select_driver_features(&self, window: u32) {
        self.registers.lock().driver_features_select = window;
    }

    /// The selection of driver features.
    pub fn driver_features_select(&self) -> u32 {
        self.registers.lock().driver_features_select
    }

    /// The 32 features accepted that were selected.
    pub fn driver_features(&self) -> u32 {
        let registers = self.registers.lock();
        registers.driver_features.get(registers.driver_features_select as usize).copied().unwrap_or(0)
    }

    /// The driver accepts these of the selected 32 features. Not any more when they are agreed upon (virtio 1.2, 3.1.1).
    pub fn accept_features(&self, bits: u32) {
        let mut registers = self.registers.lock();
        if self.status() & (status::FEATURES_OK | status::DRIVER_OK) != 0 {
            return;
        }
        let window = registers.driver_features_select as usize;
        match registers.driver_features.get_mut(window) {
            Some(features) => *features = bits,
            // Features behind the 128 that registers can name: kept as one of them, so that they are refused.
            None if bits != 0 => registers.driver_features[3] |= bits,
            None => {}
        }
    }

    /// Which queue the next registers are of.
    pub fn select_queue(&self, index: u32) {
        self.registers.lock().queue_select = index;
    }

    /// The number of the selected queue, whether there is one or not.
    pub fn queue_select(&self) -> u32 {
        self.registers.lock().queue_select
    }

    /// The registers of the selected queue and its largest size, if there is one.
    pub fn queue(&self) -> Option<(QueueRegisters, u16)> {
        let registers = self.registers.lock();
        let index = registers.queue_select as usize;
        Some((registers.queues.get(index)?.clone(), self.parameters.queue_sizes[index]))
    }

    /// Changes the registers of the selected queue, unless it is enabled or runs (virtio 1.2, 4.1.4.3.2).
    pub fn change_queue(&self, change: impl FnOnce(&mut QueueRegisters)) {
        let mut registers = self.registers.lock();
        let index = registers.queue_select as usize;
        let running = self.running();
        if let Some(queue) = registers.queues.get_mut(index).filter(|queue| !queue.enabled && !running) {
            change(queue);
        }
    }

    /// Enables the selected queue if it can be one, or disables it; not while the device runs.
    pub fn enable_queue(&self, enabled: bool) {
        let mut registers = self.registers.lock();
        let (index, features, running) = (registers.queue_select as usize, registers.features(), self.running());
        let Some(queue) = registers.queues.get_mut(index).filter(|_| !running) else { return };
        if !enabled {
            queue.enabled = false;
            return;
        }
        match queue.check(self.parameters.queue_sizes[index], features) {
            Ok(_) => queue.enabled = true,
            Err(text) => {
                drop(registers);
                self.report(&format!("queue {index}: {text}"));
            }
        }
    }

    /// A notification that arrived as a register access, because the engine has no doorbell there.
    pub fn notify(&self, index: u32) {
        if let Some(events) = self.events.get(index as usize).filter(|_| self.running()) {
            // It can only fail when 2^64 - 2 notifications wait: then one is enough.
            let _ = events.kick.write(1);
        }
    }

    /// Reads configuration space; zero behind its end.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes configuration space, inside of it.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let len = self.config.lock().len() as u64;
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > len) {
            return;
        }
        // At most CONFIG_MAX.
        let changed = self.backend.write_config(offset as u32, data);
        if let Some(Err(text)) = changed.map(|bytes| self.set_config(&bytes)) {
            self.report(&text);
        }
    }

    /// The device has this configuration space now. Returns whether it is another one than before.
    ///
    /// # Errors
    /// It is longer than any device's.
    pub fn set_config(&self, bytes: &[u8]) -> Result<bool, String> {
        check_config(&self.parameters.name, bytes)?;
        let mut config = self.config.lock();
        if *config == bytes {
            return Ok(false);
        }
        *config = bytes.to_vec();
        self.generation.fetch_add(1, Ordering::AcqRel);
        Ok(true)
    }

    /// The queues that run, for who goes on with them after [`FrontEnd::restore`], and the features agreed upon.
    ///
    /// # Errors
    /// The state that was restored is not one that this device can have.
    pub fn running_queues(&self) -> Result<(u64, Vec<QueueSetup>), String> {
        let registers = self.at_rest()?;
        let features = registers.features();
        let queues = if serves(self.status()) { self.setup(&registers, features)? } else { Vec::new() };
        Ok((features, queues))
    }

    /// The registers, for who must not wait: a vCPU that changes them may be waiting for the one who asks.
    fn at_rest(&self) -> Result<MutexGuard<'_, Registers>, String> {
        self.registers
            .try_lock()
            .ok_or_else(|| format!("{}: a vCPU is changing it; wait until the machine is paused", self.parameters.name))
    }

    /// Everything that the driver wrote. The vCPUs are paused.
    ///
    /// # Errors
    /// They are not.
    pub fn save(&self) -> Result<FrontEndState, String> {
        let registers = self.at_rest()?.clone();
        Ok(FrontEndState { status: self.status(), generation: self.generation(), registers })
    }

    /// Goes on from a saved state; `connect` as in [`FrontEnd::write_status`]. The owner activates the back-end, with the
    /// positions that it saved itself.
    ///
    /// # Errors
    /// The state is of another device; nothing has changed.
    pub fn restore(
        &self,
        state: &FrontEndState,
        connect: impl FnOnce(&[QueueSetup]) -> Result<(), String>,
    ) -> Result<(), String> {
        let name = &self.parameters.name;
        let (saved, own) = (state.registers.queues.len(), self.events.len());
        if saved != own {
            return Err(format!("{name}: the saved device has {saved} queues, this one has {own}; give it the same"));
        }
        // What a driver has only proposed yet may be anything.
        let agreed = state.status & (status::FEATURES_OK | status::DRIVER_OK) != 0;
        let missing = state.registers.features() & !self.parameters.features;
        if agreed && missing != 0 && state.status & status::DEVICE_NEEDS_RESET == 0 {
            return Err(format!("{name}: the driver uses features {missing:#x}, which this device does not offer"));
        }
        if serves(state.status) {
            connect(&self.setup(&state.registers, state.registers.features())?)?;
        }
        let mut registers = self.at_rest()?;
        *registers = state.registers.clone();
        self.generation.store(state.generation, Ordering::Release);
        self.status.store(state.status, Ordering::Release);
        Ok(())
    }
}

/// Whether queues are served: not those of a device that could not start, or cannot go on.
fn serves(status: u8) -> bool {
    status & status::DRIVER_OK != 0 && status & status::DEVICE_NEEDS_RESET == 0
}

fn check_config(name: &str, bytes: &[u8]) -> Result<(), String> {
    let len = bytes.len();
    if len > CONFIG_MAX {
        return Err(format!("{name}: a configuration space of {len} bytes; at most {CONFIG_MAX} are possible"));
    }
    Ok(())
}

impl Registers {
    fn of(parameters: &Parameters) -> Registers {
        let queue = |&size: &u16| QueueRegisters { size: size.into(), ..QueueRegisters::default() };
        Registers { queues: parameters.queue_sizes.iter().map(queue).collect(), ..Registers::default() }
    }

    fn features(&self) -> u64 {
        u64::from(self.driver_features[1]) << 32 | u64::from(self.driver_features[0])
    }

    /// Whether the device agrees (virtio 1.2, 2.2.2 and 6.2).
    fn check_features(&self, offered: u64, interface: Interface) -> Result<(), String> {
        let accepted = self.features();
        let more = accepted & !offered;
        if more != 0 || self.driver_features[2] != 0 || self.driver_features[3] != 0 {
            return Err(format!(
                "the driver accepts features {accepted:#x} of the offered {offered:#x}, and {more:#x} or bits from 64 on \
                 that were not offered (virtio 1.2, 2.2.1)"
            ));
        }
        if interface == Interface::Modern && accepted & feature::VERSION_1 == 0 {
            return Err(
                "the driver does not accept VERSION_1, and this interface has no other (virtio 1.2, 6.1)".to_owned()
            );
        }
        Ok(())
    }
}
