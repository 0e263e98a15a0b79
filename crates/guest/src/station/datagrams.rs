//! UDP datagrams that can be counted and checked: the sender's task and the sink that judges them.
//!
//! ```text
//! 0        4         8                16      20
//! | magic  | session | sequence       | crc   | content ...
//! ```
//!
//! All numbers are big-endian; the CRC-32C covers the whole datagram with the field itself as zero. A session is one run
//! of a sender. After the last datagram the sender asks with another magic number how many arrived; the sink answers in
//! one line of JSON.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use smoltcp::iface::SocketHandle;
use smoltcp::socket::udp;
use smoltcp::wire::{IpAddress, IpEndpoint};

use super::runner::earlier;
use super::services::ServiceCounters;
use super::stream::Limit;
use super::task::{Outcome, Step, Task, source_for};
use crate::content;
use crate::crc::crc32c;
use crate::stack::Stack;
use crate::tally::Tally;

const DATA: [u8; 4] = *b"VDCT";
const QUESTION: [u8; 4] = *b"VDC?";
const HEADER: usize = 20;
const CRC_AT: usize = 16;

/// Datagrams to send.
#[derive(Clone, Debug)]
pub struct DatagramConfig {
    /// To whom.
    pub remote: IpAddr,
    /// To which port: a sink's.
    pub port: u16,
    /// UDP payload of each, at least 20 bytes.
    pub size: usize,
    /// Datagrams for each second; `None`: as fast as they go.
    pub rate: Option<f64>,
    /// How much; bytes are those of UDP payload.
    pub limit: Limit,
    /// How long to wait for the sink's answer.
    pub patience: Duration,
    /// Makes this session different from others.
    pub seed: u64,
}

/// What became of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DatagramReport {
    /// Datagrams sent.
    pub sent: u64,
    /// From the first to the last.
    pub elapsed: Duration,
    /// What the sink said it got: one line of JSON.
    pub peer: Option<String>,
}

fn encode(magic: [u8; 4], session: u32, sequence: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size.max(HEADER)];
    content::fill(u64::from(session) << 32 ^ sequence, 8, &mut bytes[HEADER..]);
    bytes[..4].copy_from_slice(&magic);
    bytes[4..8].copy_from_slice(&session.to_be_bytes());
    bytes[8..16].copy_from_slice(&sequence.to_be_bytes());
    let crc = crc32c(&bytes);
    bytes[CRC_AT..HEADER].copy_from_slice(&crc.to_be_bytes());
    bytes
}

enum Decoded {
    Data { session: u32, sequence: u64 },
    Question { session: u32 },
    Foreign,
    Corrupted,
}

fn decode(bytes: &[u8]) -> Decoded {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Decoded::Foreign };
    let number = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let magic = [header[0], header[1], header[2], header[3]];
    if magic != DATA && magic != QUESTION {
        return Decoded::Foreign;
    }
    let mut copy = bytes.to_vec();
    copy[CRC_AT..HEADER].fill(0);
    if crc32c(&copy) != number(CRC_AT) {
        return Decoded::Corrupted;
    }
    let (session, sequence) = (number(4), u64::from(number(8)) << 32 | u64::from(number(12)));
    if magic == QUESTION { Decoded::Question { session } } else { Decoded::Data { session, sequence } }
}

/// Datagrams sent in one step before the stack is served again.
const BURST: usize = 32;
/// Between two questions to the sink.
const ASK_AGAIN: Duration = Duration::from_millis(200);

pub(super) struct Datagrams {
    config: DatagramConfig,
    socket: SocketHandle,
    session: u32,
    /// When the first one left.
    started: Option<Instant>,
    /// When to ask, once all are sent.
    ask: Option<Instant>,
    finished: Instant,
    report: DatagramReport,
}

impl Datagrams {
    pub(super) fn new(config: DatagramConfig, stack: &mut Stack) -> Result<Datagrams, String> {
        source_for(stack, config.remote)?;
        let largest = if config.remote.is_ipv6() { stack.config().mtu - 48 } else { 65507 };
        if !(HEADER..=largest).contains(&config.size) {
            return Err(format!("datagrams of {} bytes are not possible here: {HEADER} to {largest}", config.size));
        }
        if config.port == 0 || config.rate.is_some_and(|rate| rate.is_nan() || rate <= 0.0) {
            return Err("port and rate must be greater than 0".into());
        }
        let (socket, local) = (stack.udp(), stack.ephemeral_port());
        // A port that is not zero can always be bound.
        stack.socket::<udp::Socket<'_>>(socket).bind(local).map_err(|e| e.to_string())?;
        let session = content::word(config.seed, u64::from(local)) as u32;
        let finished = Instant::now();
        Ok(Datagrams { config, socket, session, started: None, ask: None, finished, report: DatagramReport::default() })
    }

    /// Whether all are sent, or how many should have been by now.
    fn due(&self, now: Instant) -> Option<u64> {
        let elapsed = self.started.map_or(Duration::ZERO, |since| now - since);
        let limit = match self.config.limit {
            Limit::Bytes(bytes) => bytes.div_ceil(self.config.size as u64),
            Limit::Time(time) if elapsed >= time => self.report.sent,
            Limit::Time(_) => u64::MAX,
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let paced = self.config.rate.map_or(u64::MAX, |rate| (elapsed.as_secs_f64() * rate) as u64 + 1);
        (self.report.sent < limit).then(|| limit.min(paced))
    }

    fn send_data(&mut self, stack: &mut Stack, now: Instant, due: u64) -> Step {
        let remote = IpEndpoint::new(IpAddress::from(self.config.remote), self.config.port);
        let socket: &mut udp::Socket<'_> = stack.socket(self.socket);
        for _ in 0..BURST {
            if self.report.sent >= due {
                break;
            }
            let datagram = encode(DATA, self.session, self.report.sent, self.config.size);
            if socket.send_slice(&datagram, remote).is_err() {
                // The stack takes them out as the link has room.
                return Step::Wait(Some(now + Duration::from_millis(1)));
            }
            self.started.get_or_insert(now);
            self.report.sent += 1;
            self.finished = now;
        }
        if self.report.sent < due {
            return Step::Again;
        }
        #[allow(clippy::cast_precision_loss)]
        let next = match (self.config.rate, self.started) {
            (Some(rate), Some(since)) => since + Duration::from_secs_f64(self.report.sent as f64 / rate),
            _ => now,
        };
        if next > now { Step::Wait(Some(next)) } else { Step::Again }
    }

    fn ask_sink(&mut self, stack: &mut Stack, now: Instant) -> Step {
        let remote = IpEndpoint::new(IpAddress::from(self.config.remote), self.config.port);
        let socket: &mut udp::Socket<'_> = stack.socket(self.socket);
        while let Ok((bytes, from)) = socket.recv() {
            if from.endpoint == remote && bytes.starts_with(b"{") {
                self.report.peer = Some(String::from_utf8_lossy(bytes).trim().to_owned());
                return Step::Done;
            }
        }
        let give_up = self.finished + self.config.patience;
        if now >= give_up {
            return Step::Done;
        }
        let ask = *self.ask.get_or_insert(now);
        if now >= ask && socket.send_queue() == 0 {
            // No room is no reason to stop: it will be asked again.
            let _ = socket.send_slice(&encode(QUESTION, self.session, 0, HEADER), remote);
            self.ask = Some(now + ASK_AGAIN);
            return Step::Again;
        }
        Step::Wait(earlier(Some(give_up), Some(ask.max(now + Duration::from_millis(1)))))
    }
}

impl Task for Datagrams {
    fn step(&mut self, stack: &mut Stack, now: Instant) -> Step {
        match self.due(now) {
            Some(due) => self.send_data(stack, now, due),
            None => self.ask_sink(stack, now),
        }
    }

    fn end(mut self: Box<Self>, stack: &mut Stack) -> Outcome {
        stack.remove(self.socket);
        self.report.elapsed = self.started.map_or(Duration::ZERO, |since| self.finished - since);
        Outcome::Datagrams(self.report)
    }
}

#[derive(Default)]
struct Session {
    tally: Tally,
    bytes: u64,
}

/// Sessions that a sink remembers; the one begun first is forgotten first.
const SESSIONS: usize = 64;

/// The UDP side of the sink.
pub(super) struct DatagramSink {
    socket: SocketHandle,
    sessions: BTreeMap<(IpAddr, u16, u32), Session>,
    order: std::collections::VecDeque<(IpAddr, u16, u32)>,
    corrupted: u64,
}

impl DatagramSink {
    pub(super) fn new(port: u16, stack: &mut Stack) -> Result<DatagramSink, String> {
        let socket = stack.udp();
        stack.socket::<udp::Socket<'_>>(socket).bind(port).map_err(|e| e.to_string())?;
        Ok(DatagramSink { socket, sessions: BTreeMap::new(), order: [].into(), corrupted: 0 })
    }

    pub(super) fn step(&mut self, stack: &mut Stack, counters: &ServiceCounters) -> bool {
        let mut moved = false;
        let socket: &mut udp::Socket<'_> = stack.socket(self.socket);
        while let Ok((bytes, from)) = socket.recv() {
            moved = true;
            counters.datagrams.fetch_add(1, Ordering::Relaxed);
            let sender = (from.endpoint.addr.into(), from.endpoint.port);
            match decode(bytes) {
                Decoded::Foreign => {}
                Decoded::Corrupted => self.corrupted += 1,
                Decoded::Data { session, sequence } => {
                    let length = bytes.len() as u64;
                    let session = self.session((sender.0, sender.1, session));
                    session.tally.record(sequence);
                    session.bytes += length;
                }
                Decoded::Question { session } => {
                    let corrupted = self.corrupted;
                    let answer = self.session((sender.0, sender.1, session)).answer(corrupted);
                    // Without room the sender asks again.
                    let _ = socket.send_slice(answer.as_bytes(), from);
                }
            }
        }
        moved
    }

    fn session(&mut self, key: (IpAddr, u16, u32)) -> &mut Session {
        if !self.sessions.contains_key(&key) {
            self.order.push_back(key);
            if self.order.len() > SESSIONS
                && let Some(oldest) = self.order.pop_front()
            {
                self.sessions.remove(&oldest);
            }
        }
        self.sessions.entry(key).or_default()
    }

    pub(super) fn close(self, stack: &mut Stack) {
        stack.remove(self.socket);
    }
}

impl Session {
    fn answer(&self, corrupted: u64) -> String {
        format!(
            "{{\"received\": {}, \"bytes\": {}, \"duplicated\": {}, \"reordered\": {}, \"corrupted\": {corrupted}}}\n",
            self.tally.unique(),
            self.bytes,
            self.tally.duplicated(),
            self.tally.reordered(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_tells_what_it_is() {
        let mut bytes = encode(DATA, 7, 1 << 40, 100);
        assert_eq!(bytes.len(), 100);
        assert!(matches!(decode(&bytes), Decoded::Data { session: 7, sequence: 0x100_0000_0000 }));
        assert!(matches!(decode(&encode(QUESTION, 7, 0, 0)), Decoded::Question { session: 7 }));
        bytes[99] ^= 1;
        assert!(matches!(decode(&bytes), Decoded::Corrupted));
        assert!(matches!(decode(b"hello"), Decoded::Foreign));
        assert!(matches!(decode(&[0; 100]), Decoded::Foreign));
    }
}
