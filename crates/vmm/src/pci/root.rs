//! Bus 0: up to 32 slots with one function each, their configuration spaces, and where their BARs are.
//!
//! # Theory of operation
//!
//! Nobody but the root puts BARs on the buses of ports and addresses. After each write to a command register or a BAR it
//! compares where each BAR of that function should answer with where it does, and moves it. Where something else already
//! answers a BAR is not put, as if the other were nearer to the processor; it comes as soon as there is room. Sizing a BAR
//! while decoding is on, which careless guests do, is therefore harmless.
//!
//! There is no firmware: the root gives each BAR an address in the [`Windows`] when its function is added, and leaves
//! decoding off; guests may keep the addresses, or choose others anywhere.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::config_space::{ConfigSpace, ConfigState, register};
use super::intx::{IntxThread, Lines};
use super::pins::PinsState;
use super::{BarKind, HostBridge, MsixBar, PciError, PciFunction, Pins};
use crate::bus::{Bus, BusDevice, Range};
use crate::engine::Vm;

const SLOTS: u8 = 32;
/// Bytes of ECAM for each function (PCI Express Base 4.0, 7.2.2).
const ECAM_FUNCTION: u64 = 4096;

/// Where BARs get their first addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// For ports.
    pub io: Range,
    /// For memory below 4 GiB.
    pub memory32: Range,
    /// For memory anywhere.
    pub memory64: Range,
}

/// What a snapshot has of the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    config_address: u32,
    slots: BTreeMap<u8, SlotState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SlotState {
    config: ConfigState,
    pins: PinsState,
}

struct Slot {
    number: u8,
    function: Arc<dyn PciFunction>,
    pins: Arc<Pins>,
    config: Mutex<ConfigSpace>,
    power_on: ConfigSpace,
    /// The BAR of MSI-X, and the offset of message control.
    msix: Option<(MsixBar, usize)>,
}

/// A BAR on a bus.
struct BarRegion {
    function: Arc<dyn PciFunction>,
    /// If this BAR is MSI-X's.
    messages: Option<Arc<Pins>>,
    bar: usize,
}

impl BusDevice for BarRegion {
    fn name(&self) -> &str {
        self.function.name()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.messages.as_ref().and_then(|pins| pins.msix()) {
            Some(msix) => msix.read(offset, data),
            None => self.function.read_bar(self.bar, offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.messages.as_ref().and_then(|pins| pins.msix()) {
            Some(msix) => msix.write(offset, data),
            None => self.function.write_bar(self.bar, offset, data),
        }
    }

    fn posted(&self) -> &[Range] {
        if self.messages.is_some() { &[] } else { self.function.posted(self.bar) }
    }
}

/// The next free addresses of the windows, and where BARs answer: by slot and number.
struct Places {
    free: Windows,
    answering: BTreeMap<(u8, usize), u64>,
}

/// Bus 0 and its host bridge.
pub struct PciRoot {
    vm: Arc<dyn Vm>,
    ports: Weak<Bus>,
    addresses: Weak<Bus>,
    lines: Arc<Lines>,
    thread: Arc<IntxThread>,
    slots: RwLock<[Option<Arc<Slot>>; SLOTS as usize]>,
    places: Mutex<Places>,
    config_address: AtomicU32,
}

impl PciRoot {
    /// A bus with a host bridge in slot 0. INTA of slot n arrives at `gsis[n % 4]`. The machine owns the buses that BARs are
    /// put on.
    ///
    /// # Errors
    /// [`PciError`].
    pub fn new(
        vm: Arc<dyn Vm>,
        ports: &Arc<Bus>,
        addresses: &Arc<Bus>,
        windows: Windows,
        gsis: [u32; 4],
    ) -> Result<Arc<PciRoot>, PciError> {
        let root = PciRoot {
            lines: Arc::new(Lines::new(vm.clone(), gsis)),
            vm,
            ports: Arc::downgrade(ports),
            addresses: Arc::downgrade(addresses),
            thread: Arc::default(),
            slots: RwLock::default(),
            places: Mutex::new(Places { free: windows, answering: BTreeMap::new() }),
            config_address: AtomicU32::new(0),
        };
        root.add(Arc::new(HostBridge), Some(0))?;
        Ok(Arc::new(root))
    }

    /// Puts a function into a slot, or into the first free one; returns which.
    ///
    /// # Errors
    /// [`PciError`]: nothing has changed.
    pub fn add(&self, function: Arc<dyn PciFunction>, slot: Option<u8>) -> Result<u8, PciError> {
        let name = || function.name().to_owned();
        let mut slots = self.slots.write();
        let free: Vec<u8> = (0..SLOTS).filter(|&slot| slots[usize::from(slot)].is_none()).collect();
        let number = match slot.or(free.first().copied()) {
            Some(number) if free.contains(&number) => number,
            other => {
                let slot = other.unwrap_or(SLOTS);
                let why = if slot < SLOTS { "is taken" } else { "does not exist" };
                let free = free.iter().map(u8::to_string).collect::<Vec<_>>().join(" ");
                return Err(PciError::Slot { name: name(), slot, why, free });
            }
        };
        let description = function.describe();
        let wrong = |what: String| PciError::Description { name: name(), what };
        let mut config = ConfigSpace::new(&description).map_err(wrong)?;
        let msix = match description.msix {
            Some(msix) if msix.vectors == 0 || msix.vectors > 2048 || msix.bar > 5 => {
                return Err(wrong(format!("MSI-X with {} vectors in BAR {}", msix.vectors, msix.bar)));
            }
            Some(msix) => {
                config.add_bar(msix.bar, msix.bar()).map_err(wrong)?;
                Some((msix, config.add_capability(&msix.capability()).map_err(wrong)? + 2))
            }
            None => None,
        };
        self.assign(&mut config, function.name())?;
        if description.pin {
            config.set(register::INTERRUPT_LINE, &[self.lines.gsi(number) as u8]);
        }
        let (vm, lines, thread) = (self.vm.clone(), self.lines.clone(), self.thread.clone());
        let pins = Arc::new(Pins::new(vm, number, description.pin, description.msix, lines, thread));
        function.attached(&pins);
        let slot = Slot { number, function, pins, config: Mutex::new(config.clone()), power_on: config, msix };
        slots[usize::from(number)] = Some(Arc::new(slot));
        Ok(number)
    }

    /// Gives the BARs of a new function their first addresses.
    fn assign(&self, config: &mut ConfigSpace, name: &str) -> Result<(), PciError> {
        let mut places = self.places.lock();
        let mut free = places.free;
        for (index, bar) in config.bars().clone().iter().enumerate() {
            let Some(bar) = bar else { continue };
            let (window, kind) = match bar.kind {
                BarKind::Io => (&mut free.io, "port"),
                BarKind::Memory32 => (&mut free.memory32, "32-bit"),
                BarKind::Memory64 => (&mut free.memory64, "64-bit"),
            };
            let base = window.base.checked_next_multiple_of(bar.size);
            let end = base.and_then(|base| base.checked_add(bar.size)).filter(|end| end - 1 <= window.last);
            let (Some(base), Some(end)) = (base, end) else {
                let (name, size) = (name.to_owned(), bar.size);
                return Err(PciError::Window { name, bar: index, size, window: kind });
            };
            window.base = end;
            config.assign_bar(index, base);
        }
        places.free = free;
        Ok(())
    }

    fn slot(&self, function: u32) -> Option<Arc<Slot>> {
        // Bus 0, and only function 0 of each slot.
        let number = function >> 3;
        if number >= u32::from(SLOTS) || function & 7 != 0 {
            return None;
        }
        self.slots.read()[number as usize].clone()
    }

    /// Reads configuration space of `function`: bus, device and function number as in the address register. Nobody's reads
    /// as ones.
    pub fn read_config(&self, function: u32, offset: usize, data: &mut [u8]) {
        let Some(slot) = self.slot(function) else { return data.fill(0xFF) };
        let config = {
            let mut config = slot.config.lock();
            config.show_interrupt(slot.pins.intx());
            config.read(offset, data);
            config.clone()
        };
        slot.function.read_config(&config, offset, data);
    }

    /// Writes configuration space of `function`.
    pub fn write_config(&self, function: u32, offset: usize, data: &[u8]) {
        let Some(slot) = self.slot(function) else { return };
        let config = {
            let mut places = self.places.lock();
            let (before, config) = {
                let mut config = slot.config.lock();
                let before = config.clone();
                config.write(offset, data);
                (before, config.clone())
            };
            if before != config {
                self.apply(&mut places, &slot, &config);
            }
            config
        };
        slot.function.config_written(&config, offset, data);
    }

    /// Makes everything as `config` says.
    fn apply(&self, places: &mut Places, slot: &Slot, config: &ConfigSpace) {
        slot.pins.set_command(config.command());
        if let Some((_, control)) = slot.msix {
            slot.pins.set_msix_control(config.word(control));
        }
        let mut vacated = false;
        for bar in 0..config.bars().len() {
            let (key, wanted) = ((slot.number, bar), config.bar_decoded(bar));
            let is = places.answering.get(&key).copied();
            let Some(is) = is.filter(|_| is != wanted) else { continue };
            places.answering.remove(&key);
            let _ = self.bus(config, bar).map(|bus| bus.remove(is));
            slot.function.bar_moved(bar, None);
            vacated = true;
        }
        self.place(places, slot, config);
        if vacated {
            let others: Vec<_> = self.slots.read().iter().flatten().cloned().collect();
            for other in others.iter().filter(|other| other.number != slot.number) {
                let config = other.config.lock().clone();
                self.place(places, other, &config);
            }
        }
    }

    /// Puts BARs that should answer and do not yet where nobody else does.
    fn place(&self, places: &mut Places, slot: &Slot, config: &ConfigSpace) {
        for (index, bar) in config.bars().iter().enumerate() {
            let key = (slot.number, index);
            let (Some(bar), Some(address)) = (bar, config.bar_decoded(index)) else { continue };
            if places.answering.contains_key(&key) {
                continue;
            }
            let messages = slot.msix.is_some_and(|(msix, _)| msix.bar == index).then(|| slot.pins.clone());
            let region = Arc::new(BarRegion { function: slot.function.clone(), messages, bar: index });
            if self.bus(config, index).is_some_and(|bus| bus.insert(address, bar.size, region).is_ok()) {
                places.answering.insert(key, address);
                slot.function.bar_moved(index, Some(address));
            }
        }
    }

    fn bus(&self, config: &ConfigSpace, bar: usize) -> Option<Arc<Bus>> {
        match config.bars()[bar]?.kind {
            BarKind::Io => self.ports.upgrade(),
            BarKind::Memory32 | BarKind::Memory64 => self.addresses.upgrade(),
        }
    }

    /// The address register at port 0xCF8.
    pub fn config_address(&self) -> u32 {
        self.config_address.load(Ordering::Acquire)
    }

    /// Writes it: bits 24 to 30, 0 and 1 are not there (PCI 3.0, figure 3-2).
    pub fn set_config_address(&self, address: u32) {
        self.config_address.store(address & 0x80FF_FFFC, Ordering::Release);
    }

    fn taken(&self) -> Vec<Arc<Slot>> {
        self.slots.read().iter().flatten().cloned().collect()
    }

    /// Everything as after power-on. Returns when no function does anything any more. The vCPUs are paused.
    pub fn reset(&self) {
        self.set_config_address(0);
        for slot in self.taken() {
            slot.function.reset();
            slot.pins.reset();
            *slot.config.lock() = slot.power_on.clone();
            self.apply(&mut self.places.lock(), &slot, &slot.power_on);
        }
    }

    /// What is to be saved of the bus; functions save themselves. The vCPUs are paused.
    pub fn save(&self) -> PciState {
        let state =
            |slot: Arc<Slot>| (slot.number, SlotState { config: slot.config.lock().save(), pins: slot.pins.save() });
        PciState { config_address: self.config_address(), slots: self.taken().into_iter().map(state).collect() }
    }

    /// Goes on from a saved bus, before the functions do.
    ///
    /// # Errors
    /// [`PciError::State`]: the functions are others. Nothing is certain then; the machine cannot be used.
    pub fn restore(&self, state: &PciState) -> Result<(), PciError> {
        let none = || "nothing".to_owned();
        for number in 0..SLOTS {
            let (own, saved) = (self.slot(u32::from(number) << 3), state.slots.get(&number));
            let (slot, saved) = match (own, saved) {
                (None, None) => continue,
                (Some(slot), Some(saved)) => (slot, saved),
                (Some(slot), None) => {
                    return Err(PciError::State { slot: number, saved: none(), own: slot.function.name().to_owned() });
                }
                (None, Some(_)) => {
                    return Err(PciError::State { slot: number, saved: "a function".to_owned(), own: none() });
                }
            };
            let config = {
                let mut config = slot.config.lock();
                if let Some((saved, own)) = config.differs(&saved.config) {
                    return Err(PciError::State { slot: number, saved, own });
                }
                config.restore(&saved.config);
                config.clone()
            };
            self.apply(&mut self.places.lock(), &slot, &config);
            if !slot.pins.restore(&saved.pins) {
                let (saved, own) = ("another MSI-X table".to_owned(), slot.function.name().to_owned());
                return Err(PciError::State { slot: number, saved, own });
            }
        }
        self.set_config_address(state.config_address);
        Ok(())
    }

    /// Slot, function, and where each of its BARs answers: for people.
    pub fn functions(&self) -> Vec<(u8, String, [Option<u64>; 6])> {
        let places = self.places.lock();
        let each = |slot: Arc<Slot>| {
            let bars = std::array::from_fn(|bar| places.answering.get(&(slot.number, bar)).copied());
            (slot.number, slot.function.name().to_owned(), bars)
        };
        self.taken().into_iter().map(each).collect()
    }
}

/// Configuration space by addresses: 4096 bytes for each function (PCI Express Base 4.0, 7.2.2).
pub struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// Bytes for one bus.
    pub const BUS_SIZE: u64 = 256 * ECAM_FUNCTION;

    /// The addresses for `root`.
    pub fn new(root: Arc<PciRoot>) -> Ecam {
        Ecam(root)
    }
}

impl BusDevice for Ecam {
    fn name(&self) -> &str {
        "pci-ecam"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match u32::try_from(offset / ECAM_FUNCTION) {
            Ok(function) => self.0.read_config(function, (offset % ECAM_FUNCTION) as usize, data),
            Err(_) => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(function) = u32::try_from(offset / ECAM_FUNCTION) {
            self.0.write_config(function, (offset % ECAM_FUNCTION) as usize, data);
        }
    }
}
