//! The virtqueues of a vhost-user port: how they start, change and stop while the others run.

use viaduct_memory::{Call, GuestMemory};
use viaduct_ring::RingError;

use super::attach::find_live;
use super::{Switch, SwitchError};
use crate::event::Event;
use crate::fabric::{Fabric, SourceId};
use crate::forward::Forwarder;
use crate::port::{Input, Output, Port};
use crate::vhost::{VhostInput, VhostOutput, VhostQueue};

impl Switch {
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
                base = Some(output.queue().leave());
            }
        } else {
            let source = SourceId { port: number, queue: index / 2 };
            // Frames that overtook a waiting one go back, or the next to serve the ring would deliver them again.
            let mut forwarder = Forwarder::new();
            forwarder.settle(&fabric, source, false);
            for (port, queue, message) in forwarder.broken {
                self.events.push(Event { port, queue: 2 * queue, message });
            }
            let port = fabric.ports[usize::from(number)].take().ok_or(SwitchError::NoPort(number))?;
            self.forget_source(&mut fabric, source, &port.inputs[pair]);
            stopped_input = std::mem::take(&mut *port.inputs[pair].state.lock());
            fabric.ports[usize::from(number)] = Some(port);
            drop(fabric);
            if let Input::Vhost(mut input) = stopped_input.input {
                base = Some(input.queue().leave());
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

    /// Replaces the descriptor by which a started queue notifies its driver (vhost-user, SET_VRING_CALL).
    pub fn set_call(&self, number: u16, index: u16, call: Option<Call>) -> Result<(), SwitchError> {
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

    /// Says where writes to the device part of a started queue are logged (vhost-user, VHOST_VRING_F_LOG).
    pub fn set_log_addr(&self, number: u16, index: u16, addr: Option<u64>) -> Result<(), SwitchError> {
        self.with_queue(number, index, |port, pair| {
            if is_receive(index) {
                if let Output::Vhost(output) = &mut port.outputs[pair].state.lock().output {
                    output.queue().set_log_addr(addr);
                }
            } else if let Input::Vhost(input) = &mut port.inputs[pair].state.lock().input {
                input.queue().set_log_addr(addr);
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
                    let moved = output.set_memory(memory.clone());
                    result = result.clone().and(moved);
                }
            }
        })?;
        Ok(result?)
    }

    fn with_queue(&self, number: u16, index: u16, act: impl FnOnce(&mut Port, usize)) -> Result<(), SwitchError> {
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, index)?;
        self.with_port_of(&mut fabric, number, |port| act(port, usize::from(index / 2)))
    }
}

pub(super) fn check_queue(fabric: &mut Fabric, number: u16, index: u16) -> Result<(), SwitchError> {
    let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
    let allowed = 2 * port.inputs.len();
    if usize::from(index) < allowed {
        return Ok(());
    }
    Err(SwitchError::NoQueue { port: port.name.clone(), queue: index, allowed })
}

/// Whether a virtqueue is one in which the driver receives (virtio 1.2, 5.1.2).
fn is_receive(index: u16) -> bool {
    index.is_multiple_of(2)
}
