//! Ports behind an IOMMU: what a change of its translations means for the queues (vhost-user, "IOMMU support").
//!
//! Only the port's own queues are looked at, each under its lock, which a poller holds for the length of a batch: the other
//! ports do not notice, whatever the guest does to its IOMMU.

use super::{Switch, SwitchError};
use crate::fabric::SourceId;
use crate::port::{Input, Output};

impl Switch {
    /// The front-end has answered for translations of a port: queues that waited for them go on.
    pub fn translations_changed(&self, number: u16) -> Result<(), SwitchError> {
        let fabric = self.fabric.read();
        let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
        for (queue, slot) in port.inputs.iter().enumerate() {
            let revived = match &mut slot.state.lock().input {
                Input::Vhost(input) => input.queue().translations_changed(),
                _ => false,
            };
            if revived {
                self.links[slot.poller].revive(SourceId { port: number, queue: queue as u16 });
            }
        }
        for slot in &port.outputs {
            if let Output::Vhost(output) = &mut slot.state.lock().output {
                output.translations_changed();
            }
        }
        Ok(())
    }

    /// What was known of a port's I/O virtual addresses from `first` to `last` does not hold any more. No poller uses it when
    /// this returns: what was under way has ended.
    pub fn translations_removed(&self, number: u16, first: u64, last: u64) -> Result<(), SwitchError> {
        let fabric = self.fabric.read();
        let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
        for slot in &port.inputs {
            if let Input::Vhost(input) = &mut slot.state.lock().input {
                input.queue().translations_removed(first, last);
            }
        }
        for slot in &port.outputs {
            if let Output::Vhost(output) = &mut slot.state.lock().output {
                output.translations_removed(first, last);
            }
        }
        Ok(())
    }
}
