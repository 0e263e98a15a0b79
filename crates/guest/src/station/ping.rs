//! Ping: ICMP echo requests and their replies, over IPv4 and IPv6.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress};

use super::runner::earlier;
use super::task::{Outcome, Step, Task, source_for};
use crate::content;
use crate::histogram::{Histogram, Summary};
use crate::stack::Stack;

/// What to ping and how.
#[derive(Clone, Debug)]
pub struct PingConfig {
    /// Whom.
    pub remote: IpAddr,
    /// How many requests; 0: until cancelled.
    pub count: u32,
    /// Between two requests.
    pub interval: Duration,
    /// How long to wait for a reply.
    pub timeout: Duration,
    /// Bytes behind the ICMP header; at most [`MAX_SIZE`].
    pub size: usize,
}

/// Largest payload: an IPv4 packet without its header and the ICMP header.
pub const MAX_SIZE: usize = 65507;

/// What came back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u32,
    /// Requests answered in time with the payload they carried.
    pub received: u32,
    /// Replies to requests that were answered already, or too late.
    pub duplicated: u32,
    /// Replies with another payload.
    pub corrupted: u32,
    /// Sequence numbers and round-trip times in the order of the replies, for the first million.
    pub round_trips: Vec<(u32, Duration)>,
    /// What describes all of them.
    pub summary: Option<Summary>,
}

/// Round-trip times kept one by one.
const KEPT: usize = 1_000_000;

pub(super) struct Ping {
    config: PingConfig,
    local: IpAddr,
    socket: SocketHandle,
    identifier: u16,
    next: Instant,
    /// Requests without a reply yet: their full sequence number and when they were sent.
    waiting: BTreeMap<u16, (u32, Instant)>,
    histogram: Histogram,
    report: PingReport,
}

impl Ping {
    pub(super) fn new(config: PingConfig, stack: &mut Stack) -> Result<Ping, String> {
        let local = source_for(stack, config.remote)?;
        let size = config.size;
        if size > MAX_SIZE {
            return Err(format!("a ping of {size} bytes is too large: at most {MAX_SIZE} fit (RFC 791, 3.1)"));
        }
        let mtu = stack.config().mtu;
        if config.remote.is_ipv6() && size + 48 > mtu {
            return Err(format!(
                "a ping of {size} bytes over IPv6 does not fit into an MTU of {mtu} and this guest does not fragment IPv6: \
                 at most {} bytes",
                mtu - 48
            ));
        }
        let identifier = stack.ephemeral_port();
        let socket = stack.icmp();
        let icmp: &mut icmp::Socket<'_> = stack.socket(socket);
        icmp.bind(icmp::Endpoint::Ident(identifier)).map_err(|e| e.to_string())?;
        Ok(Ping {
            config,
            local,
            socket,
            identifier,
            next: Instant::now(),
            waiting: BTreeMap::new(),
            histogram: Histogram::default(),
            report: PingReport::default(),
        })
    }

    fn all_sent(&self) -> bool {
        self.config.count != 0 && self.report.sent >= self.config.count
    }

    /// The payload says which request it belongs to.
    fn payload(&self, sequence: u16) -> Vec<u8> {
        let mut payload = vec![0; self.config.size];
        content::fill(u64::from(self.identifier) << 16 | u64::from(sequence), 0, &mut payload);
        payload
    }

    fn send(&mut self, stack: &mut Stack, now: Instant) -> bool {
        // The low bits: a long ping uses its numbers again.
        let sequence = self.report.sent as u16;
        let payload = self.payload(sequence);
        let socket: &mut icmp::Socket<'_> = stack.socket(self.socket);
        // The stack computes the checksum when the packet leaves.
        let none = ChecksumCapabilities::ignored();
        let sent = match (self.local, self.config.remote) {
            (IpAddr::V6(local), IpAddr::V6(remote)) => {
                let echo = Icmpv6Repr::EchoRequest { ident: self.identifier, seq_no: sequence, data: &payload };
                socket.send(echo.buffer_len(), IpAddress::Ipv6(remote)).map(|buffer| {
                    echo.emit(&local, &remote, &mut Icmpv6Packet::new_unchecked(buffer), &none);
                })
            }
            (_, remote) => {
                let echo = Icmpv4Repr::EchoRequest { ident: self.identifier, seq_no: sequence, data: &payload };
                socket.send(echo.buffer_len(), remote.into()).map(|buffer| {
                    echo.emit(&mut Icmpv4Packet::new_unchecked(buffer), &none);
                })
            }
        };
        // The socket fills up while the neighbour's address is being resolved.
        if sent.is_err() {
            return false;
        }
        self.waiting.insert(sequence, (self.report.sent, now));
        self.report.sent += 1;
        true
    }

    fn receive(&mut self, stack: &mut Stack, now: Instant) {
        loop {
            let socket: &mut icmp::Socket<'_> = stack.socket(self.socket);
            let Ok((bytes, from)) = socket.recv() else { return };
            if IpAddr::from(from) != self.config.remote {
                continue;
            }
            let Some((sequence, payload)) = echo_reply(bytes, self.identifier) else { continue };
            if payload != self.payload(sequence) {
                self.report.corrupted += 1;
            } else if let Some((number, sent)) = self.waiting.remove(&sequence) {
                let round_trip = now - sent;
                self.report.received += 1;
                self.histogram.record(u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX), 1);
                if self.report.round_trips.len() < KEPT {
                    self.report.round_trips.push((number, round_trip));
                }
            } else {
                self.report.duplicated += 1;
            }
        }
    }
}

/// Sequence number and payload of an echo reply (RFC 792; RFC 4443, 4.2): the two versions differ in the type alone. The
/// socket has seen to the checksum and gives only messages with our identifier, but error messages among them.
fn echo_reply(bytes: &[u8], identifier: u16) -> Option<(u16, Vec<u8>)> {
    let [kind, 0, _, _, i1, i0, s1, s0, payload @ ..] = bytes else { return None };
    let is_reply = matches!(kind, 0 | 129) && u16::from_be_bytes([*i1, *i0]) == identifier;
    is_reply.then(|| (u16::from_be_bytes([*s1, *s0]), payload.to_vec()))
}

impl Task for Ping {
    fn step(&mut self, stack: &mut Stack, now: Instant) -> Step {
        self.receive(stack, now);
        let timeout = self.config.timeout;
        self.waiting.retain(|_, (_, sent)| now < *sent + timeout);
        if !self.all_sent() && now >= self.next {
            if !self.send(stack, now) {
                if !self.waiting.is_empty() {
                    return Step::Wait(Some(now + Duration::from_millis(1)));
                }
                // The socket is full of requests that expired there: nobody has that address, so this one is lost too.
                self.report.sent += 1;
            }
            // No catching up: requests that are late would come in a burst.
            self.next = (self.next + self.config.interval).max(now);
            return Step::Again;
        }
        if self.all_sent() && self.waiting.is_empty() {
            return Step::Done;
        }
        let expiry = self.waiting.values().map(|(_, sent)| *sent + timeout).min();
        Step::Wait(earlier((!self.all_sent()).then_some(self.next), expiry))
    }

    fn end(mut self: Box<Self>, stack: &mut Stack) -> Outcome {
        stack.remove(self.socket);
        self.report.summary = self.histogram.summary();
        Outcome::Ping(self.report)
    }
}
