//! virtio-mmio: a device as a page of registers at a fixed address (virtio 1.2, 4.2), version 2.
//!
//! # Theory of operation
//!
//! Registers below 0x100 are 32 bits wide and are accessed so; behind them is the device's configuration space, accessed in
//! any width (4.2.2.2). The device has one interrupt line. Each queue's call eventfd is attached to it, and so is one of
//! the transport's own for configuration changes, so that an interrupt is a pulse of the line: it has to be described to
//! the guest as edge-triggered.
//!
//! As a device signals its used buffers past this file, nobody knows here whether bit 0 of InterruptStatus would be set.
//! It reads as set whenever queues run: a driver that finds nothing in its rings has lost a moment, one that is not told to
//! look has lost an interrupt.
//!
//! So all that an acknowledgement can change is bit 1. It is posted, like the writes of registers that only remember, and
//! costs the guest no exit at each interrupt: it is about the changes that the driver has seen in InterruptStatus, however
//! many there were before it arrives, and reading that register makes it arrive.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{FrontEnd, FrontEndState, Interface, Parameters, QueueSetup, StatusChange, VirtioBackend, interrupt};
use crate::bus::{BusDevice, Range};
use crate::engine::{Attachment, Doorbell, EngineError, Vm};

/// Bytes of addresses that a device takes.
pub const SIZE: u64 = 0x200;

/// Offsets of the registers (virtio 1.2, table 4.1).
pub mod register {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00C;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0A0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0A4;
    pub const SHM_LEN_LOW: u64 = 0x0B0;
    pub const SHM_LEN_HIGH: u64 = 0x0B4;
    pub const SHM_BASE_LOW: u64 = 0x0B8;
    pub const SHM_BASE_HIGH: u64 = 0x0BC;
    pub const CONFIG_GENERATION: u64 = 0x0FC;
    pub const CONFIG: u64 = 0x100;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"VIAD");

/// Everything that a driver wrote, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    front_end: FrontEndState,
    interrupt_status: u8,
}

/// Changes of the configuration: bit 1 of InterruptStatus is set until the driver has acknowledged all of them.
#[derive(Debug, Default)]
struct Changes {
    made: AtomicU32,
    /// Of these, as the driver last looked.
    seen: AtomicU32,
    acknowledged: AtomicU32,
}

impl Changes {
    fn bit(&self) -> u8 {
        let all = self.made.load(Ordering::Acquire) == self.acknowledged.load(Ordering::Acquire);
        if all { 0 } else { interrupt::CONFIG }
    }

    /// The driver looks.
    fn show(&self) -> u8 {
        self.seen.store(self.made.load(Ordering::Acquire), Ordering::Release);
        self.bit()
    }

    /// The driver has looked, some time ago.
    fn acknowledge(&self) {
        self.acknowledged.store(self.seen.load(Ordering::Acquire), Ordering::Release);
    }

    /// There are none.
    fn forget(&self) {
        self.show();
        self.acknowledge();
    }
}

/// A queue's connections with the virtual machine: made when it first runs, and kept.
struct Connected {
    _doorbell: Option<Box<dyn Attachment>>,
    _line: Box<dyn Attachment>,
}

/// A virtio device at an address.
pub struct VirtioMmio {
    front_end: FrontEnd,
    vm: Arc<dyn Vm>,
    address: u64,
    gsi: u32,
    changes: Changes,
    config_event: EventFd,
    _config_line: Box<dyn Attachment>,
    connected: Mutex<Vec<Option<Connected>>>,
}

impl VirtioMmio {
    /// A device at `address` with the interrupt pin `gsi`. The owner puts it on the bus there.
    ///
    /// # Errors
    /// What of `parameters` cannot be, or what the engine refused.
    pub fn new(
        vm: Arc<dyn Vm>,
        backend: Box<dyn VirtioBackend>,
        parameters: Parameters,
        address: u64,
        gsi: u32,
    ) -> Result<VirtioMmio, String> {
        let name = parameters.name.clone();
        if address.checked_add(SIZE).is_none() {
            return Err(format!("{name}: {SIZE:#x} bytes of registers from {address:#x} exceed the address space"));
        }
        let front_end = FrontEnd::new(parameters, backend)?;
        let config_event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| format!("{name}: {error}"))?;
        let line = vm.attach_line(gsi, &config_event).map_err(|error| format!("{name}: interrupt {gsi}: {error}"))?;
        let connected = Mutex::new(front_end.events().iter().map(|_| None).collect());
        Ok(VirtioMmio {
            front_end,
            vm,
            address,
            gsi,
            changes: Changes::default(),
            config_event,
            _config_line: line,
            connected,
        })
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

    /// Back to the state after power-on.
    pub fn power_on(&self) {
        self.front_end.power_on();
        self.changes.forget();
    }

    /// Everything that the driver wrote. The vCPUs are paused.
    ///
    /// # Errors
    /// [`FrontEnd::save`].
    pub fn save(&self) -> Result<MmioState, String> {
        let interrupt_status = self.changes.bit();
        Ok(MmioState { front_end: self.front_end.save()?, interrupt_status })
    }

    /// Goes on from a saved state. The owner activates the back-end.
    ///
    /// # Errors
    /// [`FrontEnd::restore`].
    pub fn restore(&self, state: &MmioState) -> Result<(), String> {
        self.front_end.restore(&state.front_end, |queues| self.connect(queues))?;
        self.changes.forget();
        if state.interrupt_status & interrupt::CONFIG != 0 {
            self.changes.made.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Without DRIVER_OK nobody is told (virtio 1.2, 2.1.2); whoever comes later reads the configuration anyway.
    fn raise_config(&self) {
        if self.front_end.running() {
            self.changes.made.fetch_add(1, Ordering::AcqRel);
            let _ = self.config_event.write(1);
        }
    }

    fn connect(&self, queues: &[QueueSetup]) -> Result<(), String> {
        let mut connected = self.connected.lock();
        for queue in queues {
            let slot = &mut connected[usize::from(queue.index)];
            if slot.is_none() {
                let made = self.connect_queue(queue.index);
                *slot = Some(made.map_err(|error| format!("queue {}: {error}", queue.index))?);
            }
        }
        Ok(())
    }

    fn connect_queue(&self, index: u16) -> Result<Connected, EngineError> {
        let events = &self.front_end.events()[usize::from(index)];
        let doorbell =
            Doorbell::Address { address: self.address + register::QUEUE_NOTIFY, value: Some(u32::from(index)) };
        let doorbell = match self.vm.attach_doorbell(doorbell, &events.kick) {
            Ok(attachment) => Some(attachment),
            Err(EngineError::Unsupported(_)) => None,
            Err(error) => return Err(error),
        };
        Ok(Connected { _doorbell: doorbell, _line: self.vm.attach_line(self.gsi, &events.call)? })
    }

    fn read_register(&self, offset: u64) -> u32 {
        let device = &self.front_end;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => u32::from(device.parameters().device_id),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => device.device_features(),
            register::QUEUE_SIZE_MAX => device.queue().map_or(0, |(_, most)| u32::from(most)),
            register::QUEUE_READY => device.queue().map_or(0, |(queue, _)| u32::from(queue.enabled)),
            register::INTERRUPT_STATUS => {
                let queue = if device.running() { interrupt::QUEUE } else { 0 };
                u32::from(queue | self.changes.show())
            }
            register::STATUS => u32::from(device.status()),
            // There is no shared memory: its length and its base are -1 (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => device.generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let device = &self.front_end;
        let low = |old: u64| old & !u64::from(u32::MAX) | u64::from(value);
        let high = |old: u64| old & u64::from(u32::MAX) | u64::from(value) << 32;
        match offset {
            register::DEVICE_FEATURES_SEL => device.select_device_features(value),
            register::DRIVER_FEATURES => device.accept_features(value),
            register::DRIVER_FEATURES_SEL => device.select_driver_features(value),
            register::QUEUE_SEL => device.select_queue(value),
            register::QUEUE_SIZE => device.change_queue(|queue| queue.size = value),
            register::QUEUE_READY => device.enable_queue(value & 1 != 0),
            register::QUEUE_NOTIFY => device.notify(value),
            register::INTERRUPT_ACK if value & u32::from(interrupt::CONFIG) != 0 => self.changes.acknowledge(),
            register::STATUS => self.write_status(value as u8),
            register::QUEUE_DESC_LOW => device.change_queue(|queue| queue.descriptor = low(queue.descriptor)),
            register::QUEUE_DESC_HIGH => device.change_queue(|queue| queue.descriptor = high(queue.descriptor)),
            register::QUEUE_DRIVER_LOW => device.change_queue(|queue| queue.driver = low(queue.driver)),
            register::QUEUE_DRIVER_HIGH => device.change_queue(|queue| queue.driver = high(queue.driver)),
            register::QUEUE_DEVICE_LOW => device.change_queue(|queue| queue.device = low(queue.device)),
            register::QUEUE_DEVICE_HIGH => device.change_queue(|queue| queue.device = high(queue.device)),
            _ => {}
        }
    }

    fn write_status(&self, value: u8) {
        match self.front_end.write_status(value, Interface::Modern, |queues| self.connect(queues)) {
            StatusChange::Reset => self.changes.forget(),
            StatusChange::NeedsReset => self.raise_config(),
            StatusChange::Activated | StatusChange::Bits => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn name(&self) -> &str {
        &self.front_end.parameters().name
    }

    fn posted(&self) -> &[Range] {
        &[Range { base: register::INTERRUPT_ACK, last: register::INTERRUPT_ACK + 3 }]
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.front_end.read_config(offset, data);
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(data) => *data = self.read_register(offset).to_le_bytes(),
            // Only accesses of 32 bits are (4.2.2.2).
            Err(_) => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.front_end.write_config(offset, data);
        }
        if let Ok(&data) = <&[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}
