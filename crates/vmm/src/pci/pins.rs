//! How one function interrupts: its INTA, and its events, which are messages or levels as the driver has chosen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::intx::{IntxThread, Lines};
use super::msix::{Msix, MsixState};
use super::{MsixBar, command};
use crate::engine::{EngineError, Vm};

struct Source {
    event: EventFd,
    on_intx: Arc<dyn Fn() + Send + Sync>,
    /// Its number in MSI-X.
    message: Option<usize>,
    /// Its key in the thread, while there are no messages.
    watched: Option<u64>,
}

#[derive(Default)]
struct Intx {
    asserted: bool,
    sources: Vec<Source>,
}

/// What of it a snapshot has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinsState {
    asserted: bool,
    msix: Option<MsixState>,
}

/// One function's interrupts.
pub struct Pins {
    slot: u8,
    has_pin: bool,
    lines: Arc<Lines>,
    thread: Arc<IntxThread>,
    msix: Option<Msix>,
    command: AtomicU16,
    intx: Mutex<Intx>,
}

impl Pins {
    pub(super) fn new(
        vm: Arc<dyn Vm>,
        slot: u8,
        has_pin: bool,
        msix: Option<MsixBar>,
        lines: Arc<Lines>,
        thread: Arc<IntxThread>,
    ) -> Pins {
        let msix = msix.map(|msix| Msix::new(vm, msix.vectors));
        Pins { slot, has_pin, lines, thread, msix, command: AtomicU16::new(0), intx: Mutex::default() }
    }

    /// The level of INTA; a level that the driver has disabled is remembered (PCI 3.0, 6.2.2, bit 10).
    pub fn set_intx(&self, asserted: bool) {
        let mut intx = self.intx.lock();
        intx.asserted = asserted;
        self.drive(&intx);
    }

    /// Whether the function asserts INTA, disabled or not.
    pub fn intx(&self) -> bool {
        self.intx.lock().asserted
    }

    fn drive(&self, intx: &Intx) {
        let enabled = self.command.load(Ordering::Acquire) & command::INTERRUPT_DISABLE == 0;
        // A function whose messages are on never asserts its pin (6.8.2.3).
        let level = self.has_pin && intx.asserted && enabled && !self.messages();
        self.lines.set(self.slot, level);
    }

    /// Whether the driver lets the function reach memory and send messages.
    pub fn bus_master(&self) -> bool {
        self.command.load(Ordering::Acquire) & command::BUS_MASTER != 0
    }

    /// Whether the driver has MSI-X on.
    pub fn messages(&self) -> bool {
        self.msix.as_ref().is_some_and(Msix::enabled)
    }

    /// The messages, if the function has any.
    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    /// Adds an event that interrupts: as the message of the vector it gets by [`Pins::set_vector`] while MSI-X is on, else
    /// `on_intx` is called on another thread for each signal. Returns its number.
    ///
    /// # Errors
    /// [`EngineError`]: no descriptors or no thread.
    pub fn attach(&self, event: &EventFd, on_intx: Arc<dyn Fn() + Send + Sync>) -> Result<usize, EngineError> {
        let failed = |source| EngineError::System { what: "an interrupt's event".to_owned(), source };
        let message = self.msix.as_ref().map(|msix| msix.add_source(event)).transpose().map_err(failed)?;
        let event = event.try_clone().map_err(failed)?;
        let mut intx = self.intx.lock();
        let mut source = Source { event, on_intx, message, watched: None };
        self.watch(&mut source).map_err(failed)?;
        intx.sources.push(source);
        Ok(intx.sources.len() - 1)
    }

    /// The driver chooses the vector of an event, or none.
    ///
    /// # Errors
    /// [`EngineError`]: the event has no vector now.
    pub fn set_vector(&self, number: usize, vector: Option<u16>) -> Result<(), EngineError> {
        let message = self.intx.lock().sources.get(number).and_then(|source| source.message);
        match (&self.msix, message) {
            (Some(msix), Some(message)) => msix.set_vector(message, vector),
            _ => Ok(()),
        }
    }

    /// Starts or stops waiting for an event, as MSI-X is off or on.
    fn watch(&self, source: &mut Source) -> std::io::Result<()> {
        let levels = self.has_pin && !self.messages();
        match source.watched {
            None if levels => source.watched = Some(self.thread.add(&source.event, source.on_intx.clone())?),
            Some(key) if !levels => {
                self.thread.remove(key);
                source.watched = None;
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn set_command(&self, value: u16) {
        self.command.store(value, Ordering::Release);
        self.drive(&self.intx.lock());
    }

    pub(super) fn set_msix_control(&self, control: u16) {
        let Some(msix) = &self.msix else { return };
        let mut intx = self.intx.lock();
        // The thread lets go of the events before the engine has them, and gets them after it.
        if control & 1 << 15 == 0 {
            msix.set_control(control);
            self.watch_all(&mut intx);
        } else {
            for source in &mut intx.sources {
                if let Some(key) = source.watched.take() {
                    self.thread.remove(key);
                }
            }
            msix.set_control(control);
        }
        self.drive(&intx);
    }

    fn watch_all(&self, intx: &mut Intx) {
        for source in &mut intx.sources {
            // Without a thread there is no interrupt; a guest cannot be told more about its host.
            let _ = self.watch(source);
        }
    }

    pub(super) fn save(&self) -> PinsState {
        PinsState { asserted: self.intx(), msix: self.msix.as_ref().map(Msix::save) }
    }

    pub(super) fn restore(&self, state: &PinsState) -> bool {
        let good = match (&self.msix, &state.msix) {
            (Some(msix), Some(state)) => msix.restore(state),
            (None, None) => true,
            _ => false,
        };
        if good {
            let mut intx = self.intx.lock();
            intx.asserted = state.asserted;
            self.watch_all(&mut intx);
            self.drive(&intx);
        }
        good
    }

    pub(super) fn reset(&self) {
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.command.store(0, Ordering::Release);
        let mut intx = self.intx.lock();
        intx.asserted = false;
        self.watch_all(&mut intx);
        self.drive(&intx);
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for source in &self.intx.get_mut().sources {
            if let Some(key) = source.watched {
                self.thread.remove(key);
            }
        }
        self.lines.set(self.slot, false);
    }
}
