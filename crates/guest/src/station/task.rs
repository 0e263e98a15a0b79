//! What a station can be asked to do, and what comes out of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::datagrams::{DatagramConfig, DatagramReport, Datagrams};
use super::ping::{Ping, PingConfig, PingReport};
use super::services::{Ports, ServiceCounters, Services};
use super::stream::{Stream, StreamConfig, StreamReport};
use crate::stack::{self, Stack};

/// A task to start.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TaskSpec {
    /// Echo requests to one address.
    Ping(PingConfig),
    /// One TCP connection.
    Stream(StreamConfig),
    /// UDP datagrams to one address.
    Datagrams(DatagramConfig),
    /// Services for other guests, until the task is cancelled.
    Serve(Ports),
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// Of a ping.
    Ping(PingReport),
    /// Of a TCP stream.
    Stream(StreamReport),
    /// Of UDP datagrams.
    Datagrams(DatagramReport),
    /// The services were stopped; their counts are in [`ServiceCounters`].
    Served,
    /// It could not be done; the text says who, what and what next.
    Failed(String),
}

/// What a task wants after a step.
pub(super) enum Step {
    /// To be called again at once.
    Again,
    /// To be called again when frames came, or at this time.
    Wait(Option<Instant>),
    /// To be ended.
    Done,
}

/// A task in progress. It owns sockets of the stack.
pub(super) trait Task: Send {
    /// Does what can be done without waiting.
    fn step(&mut self, stack: &mut Stack, now: Instant) -> Step;

    /// Gives back the sockets and says how it went.
    fn end(self: Box<Self>, stack: &mut Stack) -> Outcome;
}

impl TaskSpec {
    pub(super) fn into_task(self, stack: &mut Stack, services: &Arc<ServiceCounters>) -> Result<Box<dyn Task>, String> {
        Ok(match self {
            TaskSpec::Ping(config) => Box::new(Ping::new(config, stack)?),
            TaskSpec::Stream(config) => Box::new(Stream::new(config, stack)?),
            TaskSpec::Datagrams(config) => Box::new(Datagrams::new(config, stack)?),
            TaskSpec::Serve(ports) => Box::new(Services::new(ports, stack, services.clone())?),
        })
    }
}

/// The address from which `remote` can be sent to, or why it cannot. Asks for its MAC address, so that it is known soon.
pub(super) fn source_for(stack: &mut Stack, remote: IpAddr) -> Result<IpAddr, String> {
    if !stack::is_host(remote) {
        return Err(format!("{remote} is not the address of one host"));
    }
    let version = if remote.is_ipv4() { 4 } else { 6 };
    let own = &stack.config().addresses;
    let none = || format!("the guest has no IPv{version} address to reach {remote} from; give it one (ADDRESS/PREFIX)");
    if !own.iter().any(|(address, _)| address.is_ipv4() == remote.is_ipv4()) {
        return Err(none());
    }
    let reachable = stack.config().gateways.iter().any(|g| g.is_ipv4() == remote.is_ipv4())
        || own.iter().any(|&(address, prefix)| same_network(address, remote, prefix))
        || matches!(remote, IpAddr::V6(v6) if v6.is_unicast_link_local());
    if !reachable {
        return Err(format!(
            "{remote} is in none of the guest's networks and there is no gateway; give the guest an address in the same \
             network (ADDRESS/PREFIX) or a gateway"
        ));
    }
    let source = stack.source_address(remote).ok_or_else(none)?;
    stack.solicit(remote);
    Ok(source)
}

fn same_network(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    use IpAddr::{V4, V6};
    let prefix = u32::from(prefix);
    match (a, b) {
        (V4(a), V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
        (V6(a), V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let same = |a: &str, b: &str, prefix| {
            same_network(a.parse().expect("an address"), b.parse().expect("an address"), prefix)
        };
        assert!(same("10.0.0.1", "10.0.0.2", 24));
        assert!(!same("10.0.0.1", "10.0.1.2", 24));
        assert!(same("10.0.0.1", "192.168.0.1", 0));
        assert!(same("10.0.0.1", "10.0.0.1", 32));
        assert!(same("fd00::1", "fd00::2", 64));
        assert!(!same("fd00::1", "10.0.0.1", 0));
    }
}
