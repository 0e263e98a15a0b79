//! An emulated network card: Intel's 82540EM, which Linux drives with `e1000` (Intel, "PCI/PCI-X Family of Gigabit Ethernet
//! Controllers Software Developer's Manual", revision 4.0; sections named in this directory are that manual's).
//!
//! # Theory of operation
//!
//! Every access to a register is an exit. What it changes at once is in [`registers`]; descriptors and frames are the
//! [`worker`]'s, a thread that the write of a ring's tail wakes. So a vCPU never copies a frame, and never waits for one.
//!
//! What drivers use is there: the EEPROM and the transceiver behind their serial wires, descriptor rings with legacy,
//! context and data descriptors, checksums and segmentation, address, multicast and VLAN filters, VLAN tags, statistics,
//! interrupts with their throttling. What has no meaning without a wire is not: flow control, wake-up, LEDs, and the timers
//! that delay an interrupt by a packet's arrival (RDTR, RADV, TIDV, TADV) are registers that only remember.
//!
//! A ring whose driver has no descriptors for a frame makes the other end wait instead of losing it. Descriptors outside
//! the guest's memory stop their ring; [`E1000::take_complaint`] says so.

mod eeprom;
mod interrupts;
mod offload;
mod phy;
mod receive;
mod register;
mod registers;
#[cfg(test)]
mod tests;
mod traffic;
mod transmit;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use viaduct_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::FrameEnd;
use super::dma::Dma;
use crate::bus::Range;
use crate::pci::{Bar, BarKind, ConfigSpace, Description, Identity, PciFunction, Pins, register as config_register};
use crate::platform::BadState;
use registers::{Effect, Registers};
use transmit::Transmit;
use worker::{Complaints, Path, Shared};

const VENDOR: u16 = 0x8086;
const DEVICE: u16 = 0x100E;
const SUBSYSTEM: u16 = 0x001E;
const ETHERNET: u32 = 0x02_0000;
const MEMORY_BAR: usize = 0;
/// IOADDR and IODATA, by which Linux resets the card (13.3).
const IO_BAR: usize = 1;
const IO_ADDRESS: u64 = 0;
const IO_DATA: u64 = 4;

/// Registers that only remember: pause frames, of which this card knows nothing, and the gaps between frames on a wire that
/// there is not.
const POSTED: &[Range] = &[
    Range { base: register::FCAL as u64, last: register::FCT as u64 + 3 },
    Range { base: register::FCTTV as u64, last: register::FCTTV as u64 + 3 },
    Range { base: register::TIPG as u64, last: register::TIPG as u64 + 3 },
];

/// What a snapshot keeps of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct E1000State {
    registers: Registers,
    transmit: Transmit,
    waiting: Option<Vec<u8>>,
    io_address: u32,
}

/// The card. Its thread ends with it.
pub struct E1000 {
    name: String,
    shared: Arc<Shared>,
    io_address: AtomicU32,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl E1000 {
    /// A card with the address `mac`, nothing plugged in, that reaches `memory`.
    ///
    /// # Errors
    /// The system's, if there is no thread or no descriptor.
    pub fn new(name: String, mac: [u8; 6], memory: GuestMemory) -> std::io::Result<E1000> {
        let card = E1000::without_worker(name, mac, memory)?;
        let run = card.shared.clone();
        let worker = std::thread::Builder::new().name("e1000".to_owned()).spawn(move || run.run())?;
        *card.worker.lock() = Some(worker);
        Ok(card)
    }

    fn without_worker(name: String, mac: [u8; 6], memory: GuestMemory) -> std::io::Result<E1000> {
        let shared = Arc::new(Shared {
            registers: Mutex::new(Registers::new(mac)),
            path: Mutex::new(Path::new(Dma::new(memory))),
            pins: Default::default(),
            doorbell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stop: Default::default(),
            paused: Default::default(),
            complaints: Complaints::new()?,
        });
        Ok(E1000 { name, shared, io_address: AtomicU32::new(0), worker: Mutex::default() })
    }

    /// A card that moves frames only in [`step`](E1000::step), so that the same accesses always do the same.
    ///
    /// # Errors
    /// As for [`new`](E1000::new).
    #[cfg(feature = "fuzzing")]
    pub fn stepped(name: String, mac: [u8; 6], memory: GuestMemory) -> std::io::Result<E1000> {
        E1000::without_worker(name, mac, memory)
    }

    /// What the thread does between two sleeps. Returns whether there may be more to do.
    #[cfg(feature = "fuzzing")]
    pub fn step(&self) -> bool {
        self.shared.step()
    }

    /// Plugs a cable in, whose other end is `end`, in place of the one that was there.
    pub fn attach(&self, end: Box<dyn FrameEnd>) {
        self.set_end(Some(end));
    }

    /// Pulls the cable out: when this returns, its other end has been dropped.
    pub fn detach(&self) {
        self.set_end(None);
    }

    fn set_end(&self, end: Option<Box<dyn FrameEnd>>) {
        let there = end.is_some();
        let before = {
            let mut path = self.shared.path.lock();
            self.shared.registers.lock().set_cable(there);
            std::mem::replace(&mut path.end, end)
        };
        drop(before);
        self.shared.wake();
    }

    /// From now on the guest's memory is this.
    pub fn set_memory(&self, memory: GuestMemory) {
        self.shared.path.lock().dma.set_memory(memory);
    }

    /// What went wrong: something that no driver does, or the loss of the other end. Each is told once, and only a few in a
    /// card's life.
    pub fn take_complaint(&self) -> Option<String> {
        self.shared.complaints.take()
    }

    /// Readable while there is a complaint.
    pub fn complaint_event(&self) -> &EventFd {
        self.shared.complaints.event()
    }

    /// Stops moving frames: when this returns, guest memory is not touched any more.
    pub fn pause(&self) {
        self.shared.paused.store(true, Ordering::Release);
        drop(self.shared.path.lock());
    }

    /// Moves frames again.
    pub fn resume(&self) {
        self.shared.paused.store(false, Ordering::Release);
        self.shared.wake();
    }

    /// What it has to remember. The card is paused.
    pub fn save(&self) -> E1000State {
        let path = self.shared.path.lock();
        E1000State {
            registers: self.shared.registers.lock().clone(),
            transmit: path.transmit.clone(),
            waiting: path.waiting.clone(),
            io_address: self.io_address.load(Ordering::Relaxed),
        }
    }

    /// Goes on from what another one remembered, with the cable of this one. The card is in its slot, and paused.
    ///
    /// # Errors
    /// [`BadState`].
    pub fn restore(&self, state: E1000State) -> Result<(), BadState> {
        if !state.registers.are_whole() || !state.transmit.is_sane() {
            return Err(BadState {
                device: "e1000",
                what: "not all registers, or too many bytes of a packet".to_owned(),
            });
        }
        let mut path = self.shared.path.lock();
        let mut registers = self.shared.registers.lock();
        let generation = registers.generation + 1;
        *registers = state.registers;
        registers.generation = generation;
        registers.set_cable(path.end.is_some());
        path.transmit = state.transmit;
        path.waiting = state.waiting;
        self.io_address.store(state.io_address, Ordering::Relaxed);
        self.shared.refresh(&mut registers);
        Ok(())
    }

    fn read_register(&self, offset: u32) -> u32 {
        let mut registers = self.shared.registers.lock();
        let value = registers.read(offset);
        let later = self.shared.refresh(&mut registers);
        drop(registers);
        if later.is_some() {
            self.shared.wake();
        }
        value
    }

    fn write_register(&self, offset: u32, value: u32) {
        let mut registers = self.shared.registers.lock();
        let effect = registers.write(offset, value);
        let later = self.shared.refresh(&mut registers);
        drop(registers);
        match effect {
            Effect::Settle => {
                self.settle();
                self.shared.wake();
            }
            Effect::None if later.is_none() => {}
            Effect::None | Effect::Work => self.shared.wake(),
        }
    }

    /// Returns when what was begun before has ended.
    fn settle(&self) {
        let mut path = self.shared.path.lock();
        if self.shared.registers.lock().transmit_ring().is_none() {
            path.transmit.abandon();
        }
    }
}

/// The value of an access of four bytes to one register; others reach none (13.2).
fn register_access(offset: u64, data: &[u8]) -> Option<(u32, u32)> {
    let value = u32::from_le_bytes(data.try_into().ok()?);
    let offset = u32::try_from(offset).ok().filter(|offset| offset.is_multiple_of(4))?;
    Some((offset, value))
}

impl PciFunction for E1000 {
    fn name(&self) -> &str {
        &self.name
    }

    fn describe(&self) -> Description {
        let mut bars = [None; 6];
        bars[MEMORY_BAR] = Some(Bar { kind: BarKind::Memory32, size: 0x2_0000 });
        bars[IO_BAR] = Some(Bar { kind: BarKind::Io, size: 64 });
        Description {
            identity: Identity {
                vendor: VENDOR,
                device: DEVICE,
                revision: 2,
                class: ETHERNET,
                subsystem_vendor: VENDOR,
                subsystem: SUBSYSTEM,
            },
            bars,
            capabilities: Vec::new(),
            msix: None,
            pin: true,
        }
    }

    fn attached(&self, pins: &Arc<Pins>) {
        // Only the first slot counts; there is no second one.
        let _ = self.shared.pins.set(pins.clone());
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        let value = match (bar, offset) {
            (IO_BAR, IO_ADDRESS) => self.io_address.load(Ordering::Relaxed),
            (IO_BAR, IO_DATA) => self.read_register(self.io_address.load(Ordering::Relaxed) & !3),
            (MEMORY_BAR, _) => self.read_register((offset & 0x1_FFFC) as u32),
            _ => 0,
        };
        let shift = if bar == MEMORY_BAR { (offset & 3) as usize } else { 0 };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes().into_iter().skip(shift)) {
            *byte = value;
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        let Some((offset, value)) = register_access(offset, data) else { return };
        match (bar, u64::from(offset)) {
            (IO_BAR, IO_ADDRESS) => self.io_address.store(value & 0x1_FFFF, Ordering::Relaxed),
            (IO_BAR, IO_DATA) => self.write_register(self.io_address.load(Ordering::Relaxed) & !3, value),
            (MEMORY_BAR, _) => self.write_register(offset, value),
            _ => {}
        }
    }

    fn posted(&self, bar: usize) -> &[Range] {
        if bar == MEMORY_BAR { POSTED } else { &[] }
    }

    fn config_written(&self, _: &ConfigSpace, offset: usize, data: &[u8]) {
        // Bus mastering may have come, or gone.
        if offset < config_register::COMMAND + 2 && offset + data.len() > config_register::COMMAND {
            self.settle();
            self.shared.wake();
        }
    }

    fn reset(&self) {
        let mut registers = self.shared.registers.lock();
        registers.reset();
        registers.phy.reset();
        drop(registers);
        self.io_address.store(0, Ordering::Relaxed);
        let mut path = self.shared.path.lock();
        path.transmit = Transmit::default();
        path.waiting = None;
    }
}

impl Drop for E1000 {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(worker) = self.worker.get_mut().take() {
            let _ = worker.join();
        }
    }
}
