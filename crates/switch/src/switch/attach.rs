//! Inputs and outputs: who polls them, and those that are no virtqueues.

use std::os::fd::{AsFd, OwnedFd};

use super::queues::check_queue;
use super::{Switch, SwitchError};
use crate::fabric::{Fabric, SourceId};
use crate::frame::Offloads;
use crate::null::Null;
use crate::pcap::{PcapInput, PcapOutput};
use crate::port::{Input, InputQueue, InputState, Output, OutputQueue, OutputState, Port};
use crate::tap;

impl Switch {
    /// Attaches a queue of a tap interface as a queue pair: `tap` has IFF_VNET_HDR with headers of 12 bytes, and accepts
    /// `accepts` (TUNSETOFFLOAD).
    pub fn attach_tap(&self, number: u16, pair: u16, tap: OwnedFd, accepts: Offloads) -> Result<(), SwitchError> {
        let (input, output) =
            tap::open(tap).map_err(|error| SwitchError::System("the tap interface cannot be used", error))?;
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, 2 * pair)?;
        let pair = usize::from(pair);
        self.rouse(&mut fabric);
        self.with_port_of(&mut fabric, number, |port| {
            port.accepts = accepts;
            port.outputs[pair].state.lock().output = Output::Tap(output);
            find_live(port);
        })?;
        self.start_input(&mut fabric, number, pair, Input::Tap(Box::new(input)))
    }

    /// Replays a capture file into the switch, as the port's input, without its first `skip` frames.
    pub fn attach_replay(&self, number: u16, file: OwnedFd, skip: u64) -> Result<(), SwitchError> {
        let input = PcapInput::open(file.into(), skip).map_err(SwitchError::File)?;
        let mut fabric = self.fabric.write();
        check_queue(&mut fabric, number, 1)?;
        self.start_input(&mut fabric, number, 0, Input::Replay(Box::new(input)))
    }

    /// Records what is sent to the port; `begun`: the file has its header already.
    pub fn attach_record(&self, number: u16, file: OwnedFd, begun: bool) -> Result<(), SwitchError> {
        let output = PcapOutput::create(file.into(), begun).map_err(SwitchError::File)?;
        self.attach_output(number, Output::Record(Box::new(output)))
    }

    /// Swallows what is sent to the port.
    pub fn attach_null(&self, number: u16) -> Result<(), SwitchError> {
        self.attach_output(number, Output::Null(Null))
    }

    fn attach_output(&self, number: u16, output: Output) -> Result<(), SwitchError> {
        let mut fabric = self.fabric.write();
        self.rouse(&mut fabric);
        self.with_port_of(&mut fabric, number, |port| {
            *port.outputs[0].state.lock() = OutputState { output, ..OutputState::default() };
            find_live(port);
        })
    }

    /// Assigns an input to the poller with the fewest and starts it.
    pub(super) fn start_input(
        &self,
        fabric: &mut Fabric,
        number: u16,
        pair: usize,
        input: Input,
    ) -> Result<(), SwitchError> {
        let source = SourceId { port: number, queue: pair as u16 };
        let slot = |fabric: &mut Fabric| fabric.ports[usize::from(number)].take().ok_or(SwitchError::NoPort(number));
        let mut port = slot(fabric)?;
        self.forget_source(fabric, source, &port.inputs[pair]);
        let poller = (0..fabric.sources.len()).min_by_key(|&poller| fabric.sources[poller].len()).unwrap_or(0);
        let watched = match &input {
            Input::Vhost(vhost) => {
                vhost.kick.as_ref().map_or(Ok(()), |kick| self.links[poller].watch(kick, source.token()))
            }
            Input::Tap(tap) => self.links[poller].watch(&tap.poll_fd().as_fd(), source.token()),
            Input::Replay(replay) => self.links[poller].watch(&replay.poll_fd().as_fd(), source.token()),
            Input::Stopped => Ok(()),
        };
        if watched.is_ok() {
            port.inputs[pair].poller = poller;
            *port.inputs[pair].state.lock() = InputState { input, ..InputState::default() };
            fabric.sources[poller].push(source);
            fabric.generation += 1;
        }
        fabric.ports[usize::from(number)] = Some(port);
        self.links[poller].wake();
        watched.map_err(|error| {
            SwitchError::System("the kick descriptor cannot be waited on; it should be an eventfd", error)
        })
    }

    /// Lets all pollers look at all their inputs again: a receiver has come or gone.
    pub(super) fn rouse(&self, fabric: &mut Fabric) {
        fabric.generation += 1;
        for link in &self.links {
            link.wake();
        }
    }

    pub(super) fn forget_source(&self, fabric: &mut Fabric, source: SourceId, slot: &InputQueue) {
        let link = &self.links[slot.poller];
        match &slot.state.lock().input {
            Input::Vhost(vhost) => {
                if let Some(kick) = &vhost.kick {
                    link.unwatch(kick.as_fd());
                }
            }
            Input::Tap(tap) => link.unwatch(tap.poll_fd()),
            Input::Replay(replay) => link.unwatch(replay.poll_fd()),
            Input::Stopped => {}
        }
        fabric.sources[slot.poller].retain(|each| *each != source);
        fabric.generation += 1;
    }
}

/// Lists the outputs of a port that can take frames.
pub(super) fn find_live(port: &mut Port) {
    let alive = |slot: &OutputQueue| match &slot.state.lock().output {
        Output::Vhost(output) => output.is_enabled(),
        Output::Down => false,
        _ => true,
    };
    port.live = (0u16..).zip(&port.outputs).filter(|(_, slot)| alive(slot)).map(|(index, _)| index).collect();
}
