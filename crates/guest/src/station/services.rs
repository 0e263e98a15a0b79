//! Services for other guests, on the ports they have always had: echo (RFC 862) on 7, a sink (discard, RFC 863) on 9 and a
//! source (character generator, RFC 864) on 19; echo and sink over UDP as well.
//!
//! The sink differs from its ancestor in one thing: when the client has closed its half of the connection, it says in one
//! line of JSON what it got, and whether that was the [content](crate::content) our streams carry. So any program that can
//! send to a port (`nc -N 10.0.0.2 9 < file`) learns what arrived.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::{tcp, udp};

use super::datagrams::DatagramSink;
use super::task::{Outcome, Step, Task};
use crate::content::{self, Checker};
use crate::crc::Crc32c;
use crate::stack::Stack;

/// Where the services listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Gives back what it gets; TCP and UDP.
    pub echo: u16,
    /// Takes and checks; TCP and UDP.
    pub sink: u16,
    /// Gives content until the client goes; TCP.
    pub source: u16,
}

impl Default for Ports {
    fn default() -> Ports {
        Ports { echo: 7, sink: 9, source: 19 }
    }
}

/// Counts of the services.
#[derive(Debug, Default)]
pub struct ServiceCounters {
    /// TCP connections accepted.
    pub connections: AtomicU64,
    /// Bytes received over TCP.
    pub bytes_received: AtomicU64,
    /// Bytes sent over TCP.
    pub bytes_sent: AtomicU64,
    /// Streams to the sink whose every byte was right.
    pub streams_verified: AtomicU64,
    /// Streams to the sink with other content.
    pub streams_mismatched: AtomicU64,
    /// Datagrams received.
    pub datagrams: AtomicU64,
}

impl ServiceCounters {
    /// Names and values.
    pub fn snapshot(&self) -> [(&'static str, u64); 6] {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        [
            ("connections", get(&self.connections)),
            ("bytes_received", get(&self.bytes_received)),
            ("bytes_sent", get(&self.bytes_sent)),
            ("streams_verified", get(&self.streams_verified)),
            ("streams_mismatched", get(&self.streams_mismatched)),
            ("datagrams", get(&self.datagrams)),
        ]
    }
}

/// Sockets that wait for connections, for each port.
const BACKLOG: usize = 4;
/// Connections served at a time; more wait for their SYN to be repeated.
const CONNECTIONS: usize = 128;
/// A client that says nothing for so long has gone.
const IDLE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(300);

enum Role {
    Echo,
    Sink { checker: Checker, crc: Crc32c, answered: bool },
    Source { seed: u64, sent: u64 },
}

struct Connection {
    socket: SocketHandle,
    role: Role,
}

struct Listener {
    port: u16,
    role: fn(u64) -> Role,
    waiting: Vec<SocketHandle>,
}

pub(super) struct Services {
    listeners: Vec<Listener>,
    connections: Vec<Connection>,
    udp_echo: SocketHandle,
    udp_sink: DatagramSink,
    counters: Arc<ServiceCounters>,
    accepted: u64,
}

impl Services {
    pub(super) fn new(ports: Ports, stack: &mut Stack, counters: Arc<ServiceCounters>) -> Result<Services, String> {
        let Ports { echo, sink, source } = ports;
        if [echo, sink, source].contains(&0) || echo == sink || echo == source || sink == source {
            return Err(format!("ports {echo}, {sink} and {source} must be three different ones from 1 to 65535"));
        }
        let listeners = vec![
            Listener { port: echo, role: |_| Role::Echo, waiting: Vec::new() },
            Listener { port: sink, role: sink_role, waiting: Vec::new() },
            Listener { port: source, role: |seed| Role::Source { seed, sent: 0 }, waiting: Vec::new() },
        ];
        let udp_echo = stack.udp();
        // A port that is not zero can always be bound.
        stack.socket::<udp::Socket<'_>>(udp_echo).bind(echo).map_err(|e| e.to_string())?;
        let udp_sink = DatagramSink::new(sink, stack)?;
        let mut services = Services { listeners, connections: Vec::new(), udp_echo, udp_sink, counters, accepted: 0 };
        services.accept(stack);
        Ok(services)
    }

    /// Takes sockets that got a connection out of the waiting ones, and makes new ones wait.
    fn accept(&mut self, stack: &mut Stack) {
        for listener in &mut self.listeners {
            let (connected, mut waiting): (Vec<_>, Vec<_>) = listener
                .waiting
                .drain(..)
                .partition(|&handle| stack.socket::<tcp::Socket<'_>>(handle).state() != tcp::State::Listen);
            for socket in connected {
                self.accepted += 1;
                // Any number will do for a seed, as long as two connections do not share it.
                let role = (listener.role)(content::word(u64::from(listener.port), self.accepted));
                self.connections.push(Connection { socket, role });
                self.counters.connections.fetch_add(1, Ordering::Relaxed);
            }
            while waiting.len() < BACKLOG && self.connections.len() < CONNECTIONS {
                let handle = stack.tcp();
                let socket: &mut tcp::Socket<'_> = stack.socket(handle);
                socket.set_timeout(Some(IDLE));
                socket.set_keep_alive(Some(IDLE / 4));
                // It fails for port 0 only, which was refused.
                let _ = socket.listen(listener.port);
                waiting.push(handle);
            }
            listener.waiting = waiting;
        }
    }

    fn echo_datagrams(&mut self, stack: &mut Stack) -> bool {
        let socket: &mut udp::Socket<'_> = stack.socket(self.udp_echo);
        let mut moved = false;
        // While there is no room, datagrams wait in the socket, and then they are dropped: UDP.
        while socket.can_send() && socket.can_recv() {
            let Ok((bytes, from)) = socket.recv() else { break };
            let bytes = bytes.to_vec();
            let _ = socket.send_slice(&bytes, from);
            self.counters.datagrams.fetch_add(1, Ordering::Relaxed);
            moved = true;
        }
        moved
    }
}

fn sink_role(_seed: u64) -> Role {
    Role::Sink { checker: Checker::default(), crc: Crc32c::default(), answered: false }
}

/// Moves bytes; returns whether any did.
fn serve(role: &mut Role, socket: &mut tcp::Socket<'_>, counters: &ServiceCounters) -> bool {
    match role {
        Role::Echo => serve_echo(socket, counters),
        Role::Sink { checker, crc, answered } => serve_sink(socket, checker, crc, answered, counters),
        Role::Source { seed, sent } => serve_source(socket, *seed, sent, counters),
    }
}

fn serve_echo(socket: &mut tcp::Socket<'_>, counters: &ServiceCounters) -> bool {
    let mut moved = false;
    while socket.can_recv() && socket.can_send() {
        let room = socket.send_capacity() - socket.send_queue();
        let Ok(bytes) = socket.recv(|bytes| {
            let n = bytes.len().min(room);
            (n, bytes[..n].to_vec())
        }) else {
            break;
        };
        // There is room, as just computed.
        let sent = socket.send_slice(&bytes).unwrap_or(0) as u64;
        counters.bytes_received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        counters.bytes_sent.fetch_add(sent, Ordering::Relaxed);
        moved = true;
    }
    if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
        socket.close();
    }
    moved
}

fn serve_sink(
    socket: &mut tcp::Socket<'_>,
    checker: &mut Checker,
    crc: &mut Crc32c,
    answered: &mut bool,
    counters: &ServiceCounters,
) -> bool {
    let mut moved = false;
    while socket.can_recv() {
        let taken = socket.recv(|bytes| {
            checker.push(bytes);
            *crc = crc.update(bytes);
            (bytes.len(), bytes.len())
        });
        let Ok(n @ 1..) = taken else { break };
        counters.bytes_received.fetch_add(n as u64, Ordering::Relaxed);
        moved = true;
    }
    if socket.state() == tcp::State::CloseWait && !socket.can_recv() && !*answered {
        let mismatch = checker.first_mismatch();
        let verdict = if mismatch.is_none() { &counters.streams_verified } else { &counters.streams_mismatched };
        verdict.fetch_add(1, Ordering::Relaxed);
        let answer = format!(
            "{{\"bytes\": {}, \"verified\": {}, \"first_mismatch\": {}, \"crc32c\": \"{:08x}\"}}\n",
            checker.bytes(),
            mismatch.is_none(),
            mismatch.map_or("null".to_owned(), |at| at.to_string()),
            crc.finish(),
        );
        // The buffer is empty and larger than that.
        let _ = socket.send_slice(answer.as_bytes());
        socket.close();
        *answered = true;
        moved = true;
    }
    moved
}

fn serve_source(socket: &mut tcp::Socket<'_>, seed: u64, sent: &mut u64, counters: &ServiceCounters) -> bool {
    let mut moved = false;
    while socket.can_send() && socket.may_recv() {
        let written = socket.send(|room| {
            content::fill(seed, *sent, room);
            (room.len(), room.len())
        });
        let Ok(n @ 1..) = written else { break };
        *sent += n as u64;
        counters.bytes_sent.fetch_add(n as u64, Ordering::Relaxed);
        moved = true;
    }
    // What the client says does not matter, that it closes does.
    let _ = socket.recv(|bytes| (bytes.len(), ()));
    if socket.state() == tcp::State::CloseWait {
        socket.close();
    }
    moved
}

impl Task for Services {
    fn step(&mut self, stack: &mut Stack, _now: Instant) -> Step {
        self.accept(stack);
        let mut again = self.echo_datagrams(stack);
        again |= self.udp_sink.step(stack, &self.counters);
        let counters = &self.counters;
        self.connections.retain_mut(|Connection { socket, role }| {
            let tcp: &mut tcp::Socket<'_> = stack.socket(*socket);
            again |= serve(role, tcp, counters);
            let open = tcp.state() != tcp::State::Closed && tcp.state() != tcp::State::TimeWait;
            if !open {
                stack.remove(*socket);
            }
            open
        });
        if again { Step::Again } else { Step::Wait(None) }
    }

    fn end(self: Box<Self>, stack: &mut Stack) -> Outcome {
        for connection in &self.connections {
            stack.socket::<tcp::Socket<'_>>(connection.socket).abort();
        }
        // The resets leave with the next poll, before the sockets are forgotten.
        stack.poll();
        let waiting = self.listeners.iter().flat_map(|listener| listener.waiting.iter().copied());
        let connections = self.connections.iter().map(|connection| connection.socket);
        for socket in waiting.chain(connections).chain([self.udp_echo]) {
            stack.remove(socket);
        }
        self.udp_sink.close(stack);
        Outcome::Served
    }
}
