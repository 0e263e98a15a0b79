//! A virtual machine without processors, and a device that notes what it is told: what the tests of transports need.

#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use viaduct_vmm::engine::{Attachment, Doorbell, EngineError, Msi, MsiRoute, Vm};
use viaduct_vmm::virtio::{QueueSetup, VirtioBackend};
use vmm_sys_util::eventfd::EventFd;

/// What has been attached, by the order of attaching.
#[derive(Default)]
struct Attached {
    next: usize,
    lines: BTreeMap<usize, (u32, EventFd)>,
    doorbells: BTreeMap<usize, (Doorbell, EventFd)>,
    messages: BTreeMap<usize, (Option<Msi>, EventFd)>,
    levels: BTreeMap<u32, bool>,
    level_changes: Vec<(u32, bool)>,
    signalled: Vec<Msi>,
}

/// A machine that only remembers.
#[derive(Clone)]
pub struct QuietVm {
    attached: Arc<Mutex<Attached>>,
    has_doorbells: bool,
}

struct Hold(Arc<Mutex<Attached>>, usize);

impl Attachment for Hold {}

impl MsiRoute for Hold {
    fn set(&self, msi: Option<Msi>) -> Result<(), EngineError> {
        self.0.lock().messages.get_mut(&self.1).expect("a route that is attached").0 = msi;
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut attached = self.0.lock();
        attached.lines.remove(&self.1);
        attached.doorbells.remove(&self.1);
        attached.messages.remove(&self.1);
    }
}

impl QuietVm {
    pub fn new() -> QuietVm {
        QuietVm { attached: Arc::default(), has_doorbells: true }
    }

    pub fn without_doorbells() -> QuietVm {
        QuietVm { attached: Arc::default(), has_doorbells: false }
    }

    fn attach(&self, insert: impl FnOnce(&mut Attached, usize)) -> Hold {
        let mut attached = self.attached.lock();
        let key = attached.next;
        attached.next += 1;
        insert(&mut attached, key);
        Hold(self.attached.clone(), key)
    }

    /// Every doorbell there is now.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        self.attached.lock().doorbells.values().map(|(doorbell, _)| *doorbell).collect()
    }

    /// How many signals wait at this pin's events, taking them.
    pub fn pulses(&self, gsi: u32) -> u64 {
        let attached = self.attached.lock();
        attached.lines.values().filter(|(pin, _)| *pin == gsi).map(|(_, event)| event.read().unwrap_or(0)).sum()
    }

    /// Signals taken from the events of message routes that have a message, with the message.
    pub fn messages(&self) -> Vec<Msi> {
        let attached = self.attached.lock();
        let ready = attached.messages.values().filter_map(|(msi, event)| Some(((*msi)?, event)));
        ready.filter(|(_, event)| event.read().is_ok()).map(|(msi, _)| msi).collect()
    }

    /// Messages sent without an event, taking them.
    pub fn signalled(&self) -> Vec<Msi> {
        std::mem::take(&mut self.attached.lock().signalled)
    }

    /// How many message routes are attached.
    pub fn routes(&self) -> usize {
        self.attached.lock().messages.len()
    }

    /// The level of a pin.
    pub fn level(&self, gsi: u32) -> bool {
        self.attached.lock().levels.get(&gsi).copied().unwrap_or(false)
    }

    /// The guest writes to memory that has no bus: returns whether a doorbell rang.
    pub fn write_address(&self, at: u64, written: u32) -> bool {
        self.ring(|doorbell| {
            matches!(doorbell, Doorbell::Address { address, value }
                if *address == at && value.is_none_or(|value| value == written))
        })
    }

    /// The guest writes to a port: returns whether a doorbell rang.
    pub fn write_port(&self, at: u16, written: u16) -> bool {
        self.ring(|doorbell| {
            matches!(doorbell, Doorbell::Port { port, value }
                if *port == at && value.is_none_or(|value| value == written))
        })
    }

    fn ring(&self, matches: impl Fn(&Doorbell) -> bool) -> bool {
        let attached = self.attached.lock();
        let mut rang = false;
        for (_, event) in attached.doorbells.values().filter(|(doorbell, _)| matches(doorbell)) {
            event.write(1).unwrap();
            rang = true;
        }
        rang
    }
}

impl Vm for QuietVm {
    fn set_line(&self, gsi: u32, level: bool) -> Result<(), EngineError> {
        let mut attached = self.attached.lock();
        attached.levels.insert(gsi, level);
        attached.level_changes.push((gsi, level));
        Ok(())
    }

    fn signal_msi(&self, msi: Msi) -> Result<(), EngineError> {
        self.attached.lock().signalled.push(msi);
        Ok(())
    }

    fn attach_line(&self, gsi: u32, event: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        let event = event.try_clone().unwrap();
        Ok(Box::new(self.attach(|attached, key| drop(attached.lines.insert(key, (gsi, event))))))
    }

    fn attach_msi(&self, event: &EventFd) -> Result<Box<dyn MsiRoute>, EngineError> {
        let event = event.try_clone().unwrap();
        Ok(Box::new(self.attach(|attached, key| drop(attached.messages.insert(key, (None, event))))))
    }

    fn attach_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        if !self.has_doorbells {
            return Err(EngineError::Unsupported("this machine has no doorbells".to_owned()));
        }
        let taken = self.doorbells().contains(&doorbell);
        if taken {
            let source = std::io::Error::from_raw_os_error(libc::EEXIST);
            return Err(EngineError::System { what: format!("{doorbell:?}"), source });
        }
        let event = event.try_clone().unwrap();
        Ok(Box::new(self.attach(|attached, key| drop(attached.doorbells.insert(key, (doorbell, event))))))
    }
}

/// What a [`NotingBackend`] was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Activate { features: u64, queues: Vec<QueueSetup> },
    Reset,
    WriteConfig(u32, Vec<u8>),
    Error(String),
}

/// A device with a configuration space of sixteen bytes that can be written.
#[derive(Clone, Default)]
pub struct NotingBackend {
    told: Arc<Mutex<Vec<Told>>>,
    pub config: Arc<Mutex<[u8; 16]>>,
    /// What it answers to activation, if it is not ready.
    pub refusal: Arc<Mutex<Option<String>>>,
}

impl NotingBackend {
    /// What it was told since it was last asked.
    pub fn told(&self) -> Vec<Told> {
        std::mem::take(&mut self.told.lock())
    }
}

impl VirtioBackend for NotingBackend {
    fn activate(&self, features: u64, queues: &[QueueSetup]) -> Result<(), String> {
        self.told.lock().push(Told::Activate { features, queues: queues.to_vec() });
        self.refusal.lock().clone().map_or(Ok(()), Err)
    }

    fn reset(&self) {
        self.told.lock().push(Told::Reset);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Option<Vec<u8>> {
        self.told.lock().push(Told::WriteConfig(offset, data.to_vec()));
        let mut config = self.config.lock();
        config[offset as usize..][..data.len()].copy_from_slice(data);
        Some(config.to_vec())
    }

    fn driver_error(&self, text: &str) {
        self.told.lock().push(Told::Error(text.to_owned()));
    }
}
