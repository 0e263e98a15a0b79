//! Interrupts by the level of a pin, for guests that do not use messages (PCI 3.0, 2.2.6).
//!
//! A level stays until the driver has asked the device why, so that an eventfd alone cannot make one: somebody has to
//! remember the reason. While a function's driver has MSI-X off, the [`IntxThread`] waits for its events, and tells the
//! function, which sets its status register and its pin. Guests with MSI-X never wake this thread.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::Vm;

/// The four wires of the bus: each is high while any function on it asserts it.
pub struct Lines {
    vm: Arc<dyn Vm>,
    gsis: [u32; 4],
    /// By wire: the slots that assert it, a bit each.
    asserting: Mutex<[u32; 4]>,
}

impl Lines {
    /// Wires that end in these pins of the interrupt controller.
    pub fn new(vm: Arc<dyn Vm>, gsis: [u32; 4]) -> Lines {
        Lines { vm, gsis, asserting: Mutex::new([0; 4]) }
    }

    /// The pin of the interrupt controller at which INTA of `slot` arrives.
    pub fn gsi(&self, slot: u8) -> u32 {
        self.gsis[usize::from(slot) % 4]
    }

    /// INTA of `slot` has this level.
    pub fn set(&self, slot: u8, level: bool) {
        let wire = usize::from(slot) % 4;
        let mut asserting = self.asserting.lock();
        let before = asserting[wire];
        let bit = 1u32 << (slot % 32);
        asserting[wire] = if level { before | bit } else { before & !bit };
        let after = asserting[wire];
        if (before != 0) != (after != 0) {
            // Several wires may share one pin; one that the engine does not have interrupts nobody.
            let gsi = self.gsis[wire];
            let high = self.gsis.iter().zip(asserting.iter()).any(|(pin, slots)| *pin == gsi && *slots != 0);
            let _ = self.vm.set_line(gsi, high);
        }
    }
}

type Handler = Arc<dyn Fn() + Send + Sync>;

struct Watch {
    epoll: Epoll,
    handlers: Mutex<BTreeMap<u64, (EventFd, Handler)>>,
}

struct Started {
    watch: Arc<Watch>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Inside {
    started: Option<Started>,
    next: u64,
}

/// Waits for events that are to become levels. It starts with the first one.
#[derive(Default)]
pub struct IntxThread(Mutex<Inside>);

/// The key of the event that ends the thread.
const STOP: u64 = u64::MAX;

impl IntxThread {
    /// From now on calls `handler` after each signal of `event`, and takes the signals. Returns what [`IntxThread::remove`]
    /// wants.
    ///
    /// # Errors
    /// The host has no descriptors or no threads left.
    pub fn add(&self, event: &EventFd, handler: Handler) -> std::io::Result<u64> {
        let mut inside = self.0.lock();
        let key = inside.next;
        if inside.started.is_none() {
            inside.started = Some(Started::new()?);
        }
        let watch = inside.started.as_ref().expect("started just now").watch.clone();
        inside.next += 1;
        let event = event.try_clone()?;
        let fd = event.as_raw_fd();
        // Before the kernel knows it: the first event finds its handler.
        watch.handlers.lock().insert(key, (event, handler));
        let added = watch.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, key));
        if added.is_err() {
            watch.handlers.lock().remove(&key);
        }
        added.map(|()| key)
    }

    /// Does not wait for that event any more. A call of its handler may still be going on.
    pub fn remove(&self, key: u64) {
        let inside = self.0.lock();
        let Some(started) = &inside.started else { return };
        if let Some((event, _)) = started.watch.handlers.lock().remove(&key) {
            let _ = started.watch.epoll.ctl(ControlOperation::Delete, event.as_raw_fd(), EpollEvent::default());
        }
    }
}

impl Started {
    fn new() -> std::io::Result<Started> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let watch = Arc::new(Watch { epoll: Epoll::new()?, handlers: Mutex::default() });
        watch.epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        let thread = {
            let watch = watch.clone();
            std::thread::Builder::new().name("pci-intx".to_owned()).spawn(move || watch.run())?
        };
        Ok(Started { watch, stop, thread: Some(thread) })
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            // The last user of the bus may be a handler of this very thread.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Watch {
    fn run(&self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let Ok(count) = self.epoll.wait(-1, &mut events) else { continue };
            for event in &events[..count] {
                let key = event.data();
                if key == STOP {
                    return;
                }
                let handler = self.handlers.lock().get(&key).and_then(|(event, handler)| {
                    // Somebody else may have taken the signal: a message, when MSI-X came on meanwhile.
                    event.read().ok().map(|_| handler.clone())
                });
                if let Some(handler) = handler {
                    handler();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn each_event_calls_its_handler_until_it_is_removed() {
        let thread = IntxThread::default();
        let (send, calls) = mpsc::channel();
        let events: Vec<_> = (0..3).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let keys: Vec<_> = events
            .iter()
            .enumerate()
            .map(|(index, event)| {
                let send = send.clone();
                thread.add(event, Arc::new(move || send.send(index).unwrap())).unwrap()
            })
            .collect();
        for index in [2, 0, 1] {
            events[index].write(1).unwrap();
            assert_eq!(calls.recv_timeout(Duration::from_secs(30)), Ok(index));
            assert!(events[index].read().is_err(), "the signal was taken");
        }
        thread.remove(keys[1]);
        events[1].write(1).unwrap();
        events[0].write(1).unwrap();
        assert_eq!(calls.recv_timeout(Duration::from_secs(30)), Ok(0));
        assert_eq!(events[1].read().unwrap(), 1, "it is left alone");
        drop(thread);
        drop(send);
        assert!(calls.recv().is_err(), "the thread has ended, and its handlers with it");
    }
}
