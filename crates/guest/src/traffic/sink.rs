//! The receiver.

use viaduct_memory::access::read_bytes;
use viaduct_ring::RingError;

use super::engine::{Job, Step};
use super::source::nth;
use super::stamp::{self, SHORTEST};
use super::{BATCH, monotonic};
use crate::announce::{self, Mac};
use crate::crc::Crc32c;
use crate::driver::{Frame, NetDriver, Offload, ReceiveQueue};
use crate::histogram::{Histogram, Summary};
use crate::tally::Tally;

/// What to receive.
#[derive(Clone, Debug)]
pub struct SinkConfig {
    /// Who we are: the first of `macs` addresses, which count up.
    pub mac: Mac,
    /// How many addresses to announce.
    pub macs: u16,
    /// Check the content of every frame, not only the stamp's place.
    pub verify: bool,
    /// Stop after so many frames of ours; `None`: no limit.
    pub count: Option<u64>,
}

/// What arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SinkReport {
    /// Frames of ours with good content, each counted once.
    pub received: u64,
    /// Bytes of all frames of ours.
    pub bytes: u64,
    /// Numbers missing between the lowest and the highest seen of each flow.
    pub lost: u64,
    /// Frames that came again.
    pub duplicated: u64,
    /// Frames that came after a later one of their flow.
    pub reordered: u64,
    /// Frames whose content does not fit their checksum.
    pub corrupted: u64,
    /// Frames of others.
    pub foreign: u64,
    /// Flows seen.
    pub flows: u64,
    /// Nanoseconds from the first frame to the last.
    pub elapsed: u64,
    /// Nanoseconds from sending to here.
    pub latency: Option<Summary>,
}

/// Nanoseconds between two announcements: switches forget addresses that are silent.
const ANNOUNCE_EVERY: u64 = 1_000_000_000;
/// Announcements sent at a time.
const ANNOUNCE_BATCH: u16 = 64;
/// Looks in vain before the thread sleeps.
const PATIENCE: u32 = 200;

/// Receives frames.
pub struct Sink {
    config: SinkConfig,
    /// By session, then flow. There are few sessions, and frames of the same one come together.
    sessions: Vec<(u16, Vec<Option<Tally>>)>,
    /// The session of the last frame.
    current: usize,
    histogram: Histogram,
    frames: Vec<Frame>,
    scratch: Vec<u8>,
    in_vain: u32,
    announced: u64,
    next_announced: u16,
    first: u64,
    last: u64,
    received: u64,
    bytes: u64,
    corrupted: u64,
    foreign: u64,
}

impl Sink {
    /// A sink that begins when it gets a driver.
    pub fn new(config: SinkConfig) -> Sink {
        Sink {
            config,
            sessions: Vec::new(),
            current: 0,
            histogram: Histogram::default(),
            frames: Vec::with_capacity(BATCH),
            scratch: Vec::new(),
            in_vain: 0,
            announced: 0,
            next_announced: 0,
            first: 0,
            last: 0,
            received: 0,
            bytes: 0,
            corrupted: 0,
            foreign: 0,
        }
    }

    /// Says who we are, a batch of addresses at a time.
    #[cold]
    fn announce(&mut self, driver: &mut NetDriver, now: u64) -> Result<(), RingError> {
        let transmit = &mut driver.pairs[0].transmit;
        transmit.reclaim()?;
        let last = self.next_announced.saturating_add(ANNOUNCE_BATCH).min(self.config.macs);
        while self.next_announced < last {
            let mut frame = announce::rarp(nth(self.config.mac, self.next_announced));
            if !transmit.send(&mut frame, Offload::default()) {
                break;
            }
            self.next_announced += 1;
        }
        transmit.publish();
        if self.next_announced == self.config.macs {
            (self.announced, self.next_announced) = (now, 0);
        }
        Ok(())
    }

    #[inline]
    fn judge(&mut self, queue: &ReceiveQueue, frame: &Frame, now: u64) {
        if frame.first.len() < SHORTEST as u32 {
            self.foreign += 1;
            return;
        }
        // SAFETY: the first part is long enough, and the buffer is ours until it is recycled.
        let head = unsafe { read_bytes::<SHORTEST>(frame.first.as_ptr()) };
        if !stamp::is_ours(&head) {
            self.foreign += 1;
            return;
        }
        if self.first == 0 {
            self.first = now;
        }
        self.last = now;
        self.bytes += u64::from(frame.len);
        let filling = if self.config.verify && frame.len > SHORTEST as u32 {
            queue.copy(frame, &mut self.scratch);
            Crc32c::default().update(&self.scratch[SHORTEST..])
        } else {
            Crc32c::default()
        };
        let (stamp, good) = stamp::read(&head, filling, frame.len);
        // Without the filling, the check of a frame that has one cannot be made.
        if !good && (self.config.verify || frame.len == SHORTEST as u32) {
            self.corrupted += 1;
            return;
        }
        self.received += 1;
        self.histogram.record(now.saturating_sub(stamp.time), 1);
        if self.sessions.get(self.current).is_none_or(|(session, _)| *session != stamp.session) {
            self.find_session(stamp.session);
        }
        let flows = &mut self.sessions[self.current].1;
        let flow = usize::from(stamp.flow);
        if flow >= flows.len() {
            flows.resize_with(flow + 1, || None);
        }
        flows[flow].get_or_insert_with(Tally::default).record(stamp.sequence);
    }

    #[cold]
    fn find_session(&mut self, session: u16) {
        self.current = self.sessions.iter().position(|(known, _)| *known == session).unwrap_or_else(|| {
            self.sessions.push((session, Vec::new()));
            self.sessions.len() - 1
        });
    }
}

impl Job for Sink {
    type Report = SinkReport;

    fn attached(&mut self, _driver: &mut NetDriver) {
        (self.announced, self.next_announced) = (0, 0);
    }

    #[inline]
    fn step(&mut self, driver: &mut NetDriver) -> Result<Step, RingError> {
        let now = monotonic();
        if now - self.announced > ANNOUNCE_EVERY {
            self.announce(driver, now)?;
        }
        let mut found = 0;
        for pair in &mut driver.pairs {
            let mut frames = std::mem::take(&mut self.frames);
            frames.clear();
            let result = pair.receive.receive(&mut frames, BATCH);
            // After the frames were seen: none of them was sent later than that.
            let now = monotonic();
            for frame in &frames {
                self.judge(&pair.receive, frame, now);
            }
            pair.receive.recycle();
            found += frames.len();
            self.frames = frames;
            result?;
        }
        if self.config.count.is_some_and(|count| self.received >= count) {
            return Ok(Step::Done);
        }
        self.in_vain = if found == 0 { self.in_vain + 1 } else { 0 };
        if self.in_vain <= PATIENCE {
            return Ok(Step::Again);
        }
        self.in_vain = 0;
        Ok(Step::WaitForFrames(self.announced + ANNOUNCE_EVERY))
    }

    fn report(&self) -> SinkReport {
        let mut report = SinkReport {
            bytes: self.bytes,
            corrupted: self.corrupted,
            foreign: self.foreign,
            elapsed: self.last - self.first,
            latency: self.histogram.summary(),
            ..SinkReport::default()
        };
        for tally in self.sessions.iter().flat_map(|(_, flows)| flows).flatten() {
            report.flows += 1;
            report.received += tally.unique();
            report.lost += tally.lost();
            report.duplicated += tally.duplicated();
            report.reordered += tally.reordered();
        }
        report
    }
}
