//! What a debugger and the threads of vCPUs share: who stopped and why, and which breakpoint instructions are not the guest's.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::EngineError;
use crate::machine::Event;

/// See the module.
pub(crate) struct Debugger {
    attached: AtomicBool,
    stops: Mutex<VecDeque<(usize, Event)>>,
    /// The end of the guest that the debugger was told of, and the owner was not yet.
    end: Mutex<Option<(usize, Event)>>,
    event: EventFd,
    /// Linear addresses, and the bytes that breakpoint instructions have replaced.
    breakpoints: Mutex<BTreeMap<u64, u8>>,
}

impl Debugger {
    pub(crate) fn new() -> Result<Debugger, EngineError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|error| EngineError::system("making an eventfd for a debugger", error))?;
        Ok(Debugger {
            attached: AtomicBool::new(false),
            stops: Mutex::default(),
            end: Mutex::default(),
            event,
            breakpoints: Mutex::default(),
        })
    }

    /// From now on a debugger is told what stops vCPUs, or no longer.
    pub(crate) fn attach(&self, attached: bool) {
        self.attached.store(attached, Ordering::SeqCst);
        self.forget_stops();
    }

    /// Whether one is.
    pub(crate) fn is_attached(&self) -> bool {
        self.attached.load(Ordering::SeqCst)
    }

    /// A vCPU has stopped. Returns whether that is the debugger's affair, for now. What a guest asks of its owner is not.
    pub(crate) fn stopped(&self, vcpu: usize, event: &Event) -> bool {
        if !self.attached.load(Ordering::SeqCst) {
            return false;
        }
        self.stops.lock().push_back((vcpu, event.clone()));
        let ends = matches!(event, Event::TripleFault { .. } | Event::Failed { .. });
        if ends {
            self.end.lock().get_or_insert_with(|| (vcpu, event.clone()));
        }
        self.wake();
        ends || matches!(event, Event::Debug { .. })
    }

    /// The end of the guest that the owner shall be told of.
    pub(crate) fn take_end(&self) -> Option<(usize, Event)> {
        self.end.lock().take()
    }

    /// Makes who waits for the eventfd look.
    pub(crate) fn wake(&self) {
        // A counter that is full wakes as well.
        let _ = self.event.write(1);
    }

    /// Signalled when there may be a stop, or the machine may have ended.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// The first stop since the last resume.
    pub(crate) fn take_stop(&self) -> Option<(usize, Event)> {
        // Cleared first, so that a stop that comes now signals again.
        let _ = self.event.read();
        self.stops.lock().pop_front()
    }

    pub(crate) fn forget_stops(&self) {
        self.stops.lock().clear();
        let _ = self.event.read();
    }

    pub(crate) fn has_breakpoint(&self, address: u64) -> bool {
        self.breakpoints.lock().contains_key(&address)
    }

    pub(crate) fn breakpoints(&self) -> &Mutex<BTreeMap<u64, u8>> {
        &self.breakpoints
    }
}
