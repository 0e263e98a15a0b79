//! What people ask when no packets pass: the state of every queue, and the next packets as they stand in the rings.

use std::sync::Arc;

use super::{Switch, SwitchError};
use crate::mac_rights::Taken;
use crate::port::{Input, Output};
use crate::trace::Trace;

/// A virtqueue of a port as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Virtqueue: even ones receive, odd ones transmit, as seen by the driver (virtio 1.2, 5.1.2).
    pub index: u16,
    /// The front-end has started it.
    pub started: bool,
    /// The front-end has enabled it (vhost-user, "Ring states").
    pub enabled: bool,
    /// The driver broke it, or its memory is gone.
    pub broken: bool,
    /// The file behind its memory became shorter than the front-end said.
    pub faulted: bool,
    /// Descriptors in the ring.
    pub size: u32,
    /// Of them, available and not taken yet: frames to come, or buffers for frames to go.
    pub waiting: u32,
    /// The driver can notify us.
    pub can_kick: bool,
    /// Times that its notification woke us.
    pub kicks: u64,
}

impl Switch {
    /// The state of the virtqueues of a port; ports of other kinds have none.
    pub fn queue_states(&self, number: u16) -> Result<Vec<QueueState>, SwitchError> {
        let fabric = self.fabric.read();
        let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
        let mut states = Vec::new();
        for (pair, (input, output)) in (0u16..).zip(port.inputs.iter().zip(&port.outputs)) {
            let mut state = QueueState { index: 2 * pair, ..QueueState::default() };
            if let Output::Vhost(vhost) = &mut output.state.lock().output {
                state.started = true;
                state.enabled = vhost.ring_enabled();
                state.broken = !vhost.is_enabled() && state.enabled;
                state.faulted = vhost.faulted();
                (state.size, state.waiting, state.can_kick) = vhost.standing();
            }
            states.push(state);
            let mut state = QueueState { index: 2 * pair + 1, kicks: input.kicks.get(), ..QueueState::default() };
            let slot = &mut *input.state.lock();
            state.broken = slot.broken;
            if let Input::Vhost(vhost) = &mut slot.input {
                state.started = true;
                state.enabled = vhost.is_enabled();
                state.faulted = vhost.faulted();
                state.size = vhost.queue().config().size;
                state.waiting = vhost.queue().waiting();
                state.can_kick = vhost.kick.is_some();
            }
            states.push(state);
        }
        Ok(states)
    }

    /// The last address that the port lost to another one: address, VLAN and the port's number, if it has lost any.
    pub fn taken_address(&self, number: u16) -> Option<Taken> {
        self.macs.taken(number)
    }

    /// Shows the next packets of a port to `trace`, beside others.
    pub fn add_trace(&self, number: u16, trace: Arc<Trace>) -> Result<(), SwitchError> {
        self.with_port(number, |port| port.traces.push(trace))
    }

    /// Ends what [`add_trace`](Switch::add_trace) began.
    pub fn remove_trace(&self, number: u16, trace: &Arc<Trace>) -> Result<(), SwitchError> {
        self.with_port(number, |port| port.traces.retain(|each| !Arc::ptr_eq(each, trace)))
    }
}
