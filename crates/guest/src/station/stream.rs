//! One TCP connection that carries checkable content (see [`content`](crate::content)) to or from a service.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

use super::runner::earlier;
use super::task::{Outcome, Step, Task, source_for};
use crate::content::{self, Checker};
use crate::stack::Stack;

/// Which way the content goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To a sink, which checks it and says what it got.
    Send,
    /// From a source.
    Receive,
    /// To an echo service and back.
    Echo,
}

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// After so many bytes.
    Bytes(u64),
    /// After so long.
    Time(Duration),
}

/// What to stream and how.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// To whom.
    pub remote: IpAddr,
    /// To which port.
    pub port: u16,
    /// Which way.
    pub direction: Direction,
    /// How much.
    pub limit: Limit,
    /// How long to wait for the connection, and for any progress after it. A link that comes back in this time is
    /// survived.
    pub patience: Duration,
    /// What the content is made from.
    pub seed: u64,
}

/// How a stream went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StreamReport {
    /// Content bytes that the other side acknowledged.
    pub sent: u64,
    /// Content bytes received.
    pub received: u64,
    /// From the established connection to the last content byte.
    pub elapsed: Duration,
    /// Offset of the first received byte that is wrong.
    pub first_mismatch: Option<u64>,
    /// What the sink said it got: one line of JSON.
    pub peer: Option<String>,
    /// Why the stream ended before its time.
    pub error: Option<String>,
}

/// Longest answer of a sink that is looked at.
const LONGEST_ANSWER: usize = 512;

pub(super) struct Stream {
    config: StreamConfig,
    socket: SocketHandle,
    /// Content bytes put into the socket.
    written: u64,
    checker: Checker,
    answer: Vec<u8>,
    established: Option<Instant>,
    /// When the last content byte was acknowledged or received.
    finished: Option<Instant>,
    closed: bool,
    /// Bytes moved at the last step, and since when no more.
    progress: (u64, Instant),
    report: StreamReport,
}

impl Stream {
    pub(super) fn new(config: StreamConfig, stack: &mut Stack) -> Result<Stream, String> {
        source_for(stack, config.remote)?;
        let socket = stack.tcp();
        if let Err(error) = stack.connect(socket, config.remote, config.port) {
            stack.remove(socket);
            return Err(format!("cannot connect to {} port {}: {error}", config.remote, config.port));
        }
        Ok(Stream {
            config,
            socket,
            written: 0,
            checker: Checker::default(),
            answer: Vec::new(),
            established: None,
            finished: None,
            closed: false,
            progress: (0, Instant::now()),
            report: StreamReport::default(),
        })
    }

    fn sends(&self) -> bool {
        self.config.direction != Direction::Receive
    }

    /// How many content bytes may still move at `now`.
    fn budget(&self, moved: u64, now: Instant) -> u64 {
        match (self.config.limit, self.established) {
            (_, None) => 0,
            (Limit::Bytes(bytes), _) => bytes.saturating_sub(moved),
            (Limit::Time(time), Some(since)) => {
                if now < since + time {
                    u64::MAX
                } else {
                    0
                }
            }
        }
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>, now: Instant) -> bool {
        let mut moved = false;
        while socket.can_send() {
            let budget = self.budget(self.written, now);
            if budget == 0 {
                break;
            }
            let (seed, offset) = (self.config.seed, self.written);
            let written = socket.send(|room| {
                let n = room.len().min(usize::try_from(budget).unwrap_or(usize::MAX));
                content::fill(seed, offset, &mut room[..n]);
                (n, n)
            });
            let Ok(n @ 1..) = written else { break };
            self.written += n as u64;
            moved = true;
        }
        if !self.closed && self.budget(self.written, now) == 0 && self.established.is_some() {
            socket.close();
            self.closed = true;
        }
        moved
    }

    fn receive(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let mut moved = false;
        while socket.can_recv() {
            let n = socket.recv(|bytes| {
                if self.config.direction == Direction::Send {
                    let room = LONGEST_ANSWER.saturating_sub(self.answer.len());
                    self.answer.extend_from_slice(&bytes[..bytes.len().min(room)]);
                } else {
                    self.checker.push(bytes);
                }
                (bytes.len(), bytes.len())
            });
            if !matches!(n, Ok(1..)) {
                break;
            }
            moved = true;
        }
        moved
    }

    /// Why the connection, which has ended, ended too early.
    fn failure(&self) -> String {
        let StreamConfig { remote, port, .. } = self.config;
        if self.established.is_none() {
            return format!(
                "{remote} refused the connection to port {port}: is a service there? (viaduct guest serve)"
            );
        }
        format!("{remote} closed the connection to port {port} too early")
    }

    fn give_up(&mut self, why: String) -> Step {
        self.report.error = Some(why);
        Step::Done
    }
}

impl Task for Stream {
    fn step(&mut self, stack: &mut Stack, now: Instant) -> Step {
        let handle = self.socket;
        let socket: &mut tcp::Socket<'_> = stack.socket(handle);
        if self.established.is_none() && socket.may_send() {
            self.established = Some(now);
            self.progress.1 = now;
        }
        let mut moved = self.receive(socket);
        if self.sends() {
            moved |= self.send(socket, now);
        }
        self.report.sent = self.written - (socket.send_queue() as u64).min(self.written);
        self.report.received = self.checker.bytes();
        let content = self.report.sent + self.report.received;
        if content != self.progress.0 {
            self.progress = (content, now);
            self.finished = Some(now);
        }
        let (state, open) = (socket.state(), socket.may_recv() || socket.can_recv());
        let complete = match self.config.direction {
            // The sink has answered and closed, or closed without a word.
            Direction::Send => self.closed && !open && self.report.sent == self.written,
            Direction::Echo => self.closed && !open && self.report.received >= self.written,
            Direction::Receive => self.established.is_some() && self.budget(self.report.received, now) == 0,
        };
        if complete {
            return Step::Done;
        }
        let started = self.established.is_some();
        if state == tcp::State::Closed || (started && !open && (!self.sends() || self.closed)) {
            return self.give_up(self.failure());
        }
        let give_up = self.progress.1 + self.config.patience;
        if now >= give_up {
            let StreamConfig { remote, port, patience, .. } = self.config;
            let why = if started { "no progress" } else { "no answer" };
            return self.give_up(format!("{remote} port {port}: {why} for {:.1} s", patience.as_secs_f64()));
        }
        if moved {
            return Step::Again;
        }
        let stop = match (self.config.limit, self.established) {
            (Limit::Time(time), Some(since)) => Some(since + time).filter(|&stop| stop > now),
            _ => None,
        };
        Step::Wait(earlier(Some(give_up), stop))
    }

    fn end(mut self: Box<Self>, stack: &mut Stack) -> Outcome {
        let socket: &mut tcp::Socket<'_> = stack.socket(self.socket);
        if socket.state() != tcp::State::TimeWait {
            socket.abort();
        }
        // The reset, or the last acknowledgement, leaves before the socket is forgotten.
        stack.poll();
        stack.remove(self.socket);
        self.report.first_mismatch = match (self.config.direction, self.checker.first_mismatch()) {
            (Direction::Echo, None) if self.report.received > self.written => Some(self.written),
            (_, mismatch) => mismatch,
        };
        if let (Some(from), Some(to)) = (self.established, self.finished) {
            self.report.elapsed = to.saturating_duration_since(from);
        }
        let answer = String::from_utf8_lossy(&self.answer).trim().to_owned();
        self.report.peer = (!answer.is_empty()).then_some(answer);
        Outcome::Stream(self.report)
    }
}
