//! The sender.

use viaduct_ring::RingError;

use super::engine::{Job, Step};
use super::pace::Pace;
use super::stamp::{self, FlowHeaders, SHORTEST, Stamp};
use super::{BATCH, monotonic};
use crate::announce::{self, Mac};
use crate::crc::Crc32c;
use crate::driver::{Frame, HEADER_LEN, NetDriver, Offload};

/// What to send.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// From whom: the first of `macs` addresses, which count up.
    pub source: Mac,
    /// To whom: the first of `macs` addresses.
    pub destination: Mac,
    /// Addresses on each side. Flow *n* goes from address *n* mod `macs` to address *n* mod `macs`.
    pub macs: u16,
    /// Flows: each with IP addresses and a port of its own, and numbered on its own.
    pub flows: u16,
    /// Bytes of a frame without its checksum.
    pub size: usize,
    /// Frames a second; `None`: as many as go.
    pub rate: Option<f64>,
    /// Frames that leave together when there is a rate.
    pub burst: u32,
    /// How many frames to send; `None`: no limit.
    pub count: Option<u64>,
    /// For how many nanoseconds; `None`: no limit.
    pub time: Option<u64>,
    /// Tells this sender from others.
    pub session: u16,
}

/// Why a source cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Frames cannot be that short or long.
    #[error("frames of {0} bytes are not possible: {SHORTEST} to {1} bytes at this MTU, Ethernet header included")]
    Size(usize, usize),
    /// There has to be something.
    #[error("{0} must be greater than 0")]
    Zero(&'static str),
}

/// How sending goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceReport {
    /// Frames handed to the device.
    pub sent: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Nanoseconds from the first frame to now, or to the last one when all are sent.
    pub elapsed: u64,
    /// How often there was no free buffer.
    pub full: u64,
}

/// Looks in vain before the thread sleeps.
const PATIENCE: u32 = 2000;
/// How long, after the last frame, the device may take to fetch it, in nanoseconds.
const LINGER: u64 = 1_000_000_000;

/// Sends frames.
pub struct Source {
    config: SourceConfig,
    flows: Vec<FlowHeaders>,
    sequences: Vec<u64>,
    /// Of each buffer of each pair: the checksum of its filling.
    fillings: Vec<Vec<Crc32c>>,
    /// Of each queue pair: the flow that comes next. Flow *n* stays on pair *n* mod their number, so it stays in order.
    next_flow: Vec<usize>,
    next_pair: usize,
    pace: Option<Pace>,
    started: u64,
    /// When the last frame was handed over, if all were.
    finished: Option<u64>,
    in_vain: u32,
    received: Vec<Frame>,
    report: SourceReport,
}

impl Source {
    /// A source that begins when it gets a driver.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn new(config: SourceConfig, mtu: usize) -> Result<Source, SourceError> {
        let longest = mtu + 14;
        if !(SHORTEST..=longest).contains(&config.size) {
            return Err(SourceError::Size(config.size, longest));
        }
        let zeroes = [
            (config.flows == 0, "the number of flows"),
            (config.macs == 0, "the number of addresses"),
            (config.burst == 0, "the burst"),
            (config.rate.is_some_and(|rate| rate.is_nan() || rate <= 0.0), "the rate"),
        ];
        if let Some((_, what)) = zeroes.into_iter().find(|(zero, _)| *zero) {
            return Err(SourceError::Zero(what));
        }
        let flows = (0..config.flows).map(|flow| {
            let n = flow % config.macs;
            FlowHeaders::new(nth(config.source, n), nth(config.destination, n), flow, config.size)
        });
        Ok(Source {
            flows: flows.collect(),
            sequences: vec![0; config.flows.into()],
            fillings: Vec::new(),
            next_flow: Vec::new(),
            next_pair: 0,
            pace: None,
            started: 0,
            finished: None,
            in_vain: 0,
            received: Vec::with_capacity(BATCH),
            report: SourceReport::default(),
            config,
        })
    }

    /// Frames left to send at `now`.
    #[inline]
    fn left(&self, now: u64) -> u64 {
        if self.config.time.is_some_and(|time| now - self.started >= time) {
            return 0;
        }
        self.config.count.map_or(u64::MAX, |count| count - self.report.sent)
    }

    /// Waits until the device has fetched the last frames, so that they are not taken back with the link.
    fn linger(&mut self, driver: &mut NetDriver, now: u64, finished: u64) -> Result<Step, RingError> {
        let mut outstanding = false;
        for pair in &mut driver.pairs {
            outstanding |= pair.transmit.reclaim()? < pair.transmit.capacity();
        }
        Ok(if !outstanding || now >= finished + LINGER { Step::Done } else { Step::Wait(now + 100_000) })
    }

    /// Frames for us are of no interest, but their buffers have to go back.
    fn discard(&mut self, driver: &mut NetDriver) -> Result<(), RingError> {
        for pair in &mut driver.pairs {
            self.received.clear();
            pair.receive.receive(&mut self.received, BATCH)?;
            pair.receive.recycle();
        }
        Ok(())
    }

    #[inline]
    fn send(&mut self, driver: &mut NetDriver, n: usize, now: u64) {
        let size = self.config.size as u32;
        let transmit = &mut driver.pairs[self.next_pair].transmit;
        let fillings = &self.fillings[self.next_pair];
        let (pairs, mut sent) = (self.next_flow.len(), 0);
        let mut next = self.next_flow[self.next_pair];
        while sent < n {
            let Some((index, span)) = transmit.take() else { break };
            let flow = next;
            next = if flow + pairs < self.flows.len() { flow + pairs } else { self.next_pair };
            let sequence = self.sequences[flow];
            self.sequences[flow] = sequence + 1;
            let stamp = Stamp { flow: flow as u16, session: self.config.session, sequence, time: now };
            let head = stamp::write(&self.flows[flow], &stamp, fillings[index as usize], size);
            // SAFETY: the buffer is not the device's now, and is longer than both headers.
            unsafe { span.write(HEADER_LEN, &head) };
            transmit.stage(index, size);
            sent += 1;
        }
        transmit.publish();
        self.next_flow[self.next_pair] = next;
        self.report.sent += sent as u64;
        self.report.bytes += (sent * self.config.size) as u64;
    }
}

/// The n-th address from `first` on.
pub(super) fn nth(first: Mac, n: u16) -> Mac {
    let number = first.iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte)) + u64::from(n);
    let [_, _, mac @ ..] = number.to_be_bytes();
    mac
}

impl Job for Source {
    type Report = SourceReport;

    fn attached(&mut self, driver: &mut NetDriver) {
        self.fillings.clear();
        for (number, pair) in driver.pairs.iter_mut().enumerate() {
            let (count, size) = (pair.transmit.capacity(), self.config.size);
            let fillings = (0..count).map(|index| {
                let seed = u64::from(self.config.session) << 32 | (number * count + index) as u64;
                let (bytes, crc) = stamp::filling(seed, size);
                pair.transmit.fill(index as u64, SHORTEST as u32, &bytes);
                crc
            });
            self.fillings.push(fillings.collect());
        }
        // Say who we are first. These frames are shorter than what is rewritten for each frame anyway.
        let transmit = &mut driver.pairs[0].transmit;
        for n in 0..self.config.macs.min(self.config.flows) {
            if !transmit.send(&mut announce::rarp(nth(self.config.source, n)), Offload::default()) {
                break;
            }
        }
        transmit.publish();
        // A pair without a flow stays idle.
        self.next_flow = (0..driver.pairs.len().min(self.flows.len())).collect();
        self.next_pair = 0;
    }

    #[inline]
    fn step(&mut self, driver: &mut NetDriver) -> Result<Step, RingError> {
        let now = monotonic();
        if let Some(finished) = self.finished {
            return self.linger(driver, now, finished);
        }
        let sent = self.report.sent;
        if self.started == 0 {
            self.started = now;
        }
        let (rate, burst) = (self.config.rate, u64::from(self.config.burst));
        let pace = self.pace.get_or_insert_with(|| Pace::new(rate, burst, now));
        let due = pace.due(sent, now);
        let next = pace.next(sent);
        let left = self.left(now);
        self.report.elapsed = now - self.started;
        if left == 0 {
            self.finished = Some(now);
            return Ok(Step::Again);
        }
        if due == 0 {
            self.discard(driver)?;
            return Ok(Step::Wait(next));
        }
        let transmit = &mut driver.pairs[self.next_pair].transmit;
        let mut free = transmit.free();
        if free < BATCH {
            free = transmit.reclaim()?;
        }
        let n = (free as u64).min(due).min(left).min(BATCH as u64) as usize;
        if n > 0 {
            self.in_vain = 0;
            self.send(driver, n, now);
        } else {
            self.report.full += u64::from(self.in_vain == 0);
            self.in_vain += 1;
        }
        self.next_pair = (self.next_pair + 1) % self.next_flow.len();
        if sent / 1024 != self.report.sent / 1024 || self.in_vain != 0 {
            self.discard(driver)?;
        }
        Ok(if self.in_vain > PATIENCE { Step::WaitForRoom } else { Step::Again })
    }

    fn report(&self) -> SourceReport {
        self.report.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_count_up() {
        assert_eq!(nth([2, 0, 0, 0, 0, 1], 0), [2, 0, 0, 0, 0, 1]);
        assert_eq!(nth([2, 0, 0, 0, 0, 0xff], 0x101), [2, 0, 0, 0, 2, 0]);
    }
}
