//! Capture files as a port: one is replayed into the switch, what is sent to the port is recorded in another.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pcap_file::pcap::{PcapHeader, PcapReader};
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use pcap_file::{DataLink, TsResolution};
use viaduct_ring::Batch;

use crate::counters::DropReason;
use crate::frame::Outgoing;
use crate::frame_pool::{FramePool, SLOT_SIZE};
use crate::net_header::NetHeader;
use crate::sink::{Put, Sink};

/// pcapng's magic, the same in either byte order.
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

enum Reader {
    Pcap(PcapReader<BufReader<File>>),
    PcapNg(Box<PcapNgReader<BufReader<File>>>),
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reader::Pcap(_) => "pcap",
            Reader::PcapNg(_) => "pcapng",
        })
    }
}

impl Reader {
    fn open(mut file: File) -> Result<Reader, String> {
        use std::io::{Read, Seek};
        let describe = |error: &dyn std::fmt::Display| format!("not a capture file (pcap or pcapng): {error}");
        let mut magic = [0; 4];
        file.read_exact(&mut magic).map_err(|error| describe(&error))?;
        file.rewind().map_err(|error| describe(&error))?;
        if magic == PCAPNG_MAGIC {
            let reader = PcapNgReader::new(BufReader::new(file)).map_err(|error| describe(&error))?;
            return Ok(Reader::PcapNg(Box::new(reader)));
        }
        let reader = PcapReader::new(BufReader::new(file)).map_err(|error| describe(&error))?;
        if reader.header().datalink != DataLink::ETHERNET {
            return Err(format!(
                "captured on {:?}, but only Ethernet frames can be replayed",
                reader.header().datalink
            ));
        }
        Ok(Reader::Pcap(reader))
    }

    /// The next frame and when it was captured.
    fn next(&mut self) -> Option<Result<(Duration, Vec<u8>), String>> {
        let describe = |error: pcap_file::PcapError| format!("the capture file is damaged: {error}");
        match self {
            Reader::Pcap(reader) => {
                Some(reader.next_packet()?.map(|packet| (packet.timestamp, packet.data.into_owned())).map_err(describe))
            }
            Reader::PcapNg(reader) => loop {
                match reader.next_block()? {
                    Ok(Block::EnhancedPacket(packet)) => {
                        let (interface, raw) = (packet.interface_id, packet.timestamp.as_nanos() as u64);
                        let data = packet.data.into_owned();
                        return Some(Ok((in_units_of(reader, interface, raw), data)));
                    }
                    Ok(_) => {}
                    Err(error) => return Some(Err(describe(error))),
                }
            },
        }
    }
}

/// A pcapng time stamp. The crate takes every time stamp for nanoseconds, but its unit is an option of the interface
/// and microseconds where that is missing (pcapng, 4.2, if_tsresol).
fn in_units_of(reader: &PcapNgReader<BufReader<File>>, interface: u32, raw: u64) -> Duration {
    let options = reader.interfaces().get(interface as usize).map(|interface| &interface.options[..]);
    let resolution = options.unwrap_or_default().iter().find_map(|option| match option {
        InterfaceDescriptionOption::IfTsResol(resolution) => Some(*resolution),
        _ => None,
    });
    let resolution = resolution.unwrap_or(6);
    let exponent = u32::from(resolution & 0x7f);
    let units = if resolution & 0x80 == 0 { 10u128.checked_pow(exponent) } else { 1u128.checked_shl(exponent) };
    let nanoseconds = u128::from(raw) * 1_000_000_000 / units.unwrap_or(u128::MAX).max(1);
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

/// The frames of a file and when each is due.
#[derive(Debug)]
struct Script {
    reader: Reader,
    /// When the first frame went in, and its time in the file.
    began: Option<(Instant, Duration)>,
    next: Option<(Duration, Vec<u8>)>,
    /// Frames that have gone.
    taken: u64,
    /// The file is at its end.
    ended: bool,
    /// Why what follows cannot be read.
    damage: Option<String>,
}

impl Script {
    /// When the next frame is due; none at the end.
    fn due(&mut self) -> Result<Option<Instant>, String> {
        if self.next.is_none() && !self.ended && self.damage.is_none() {
            match self.reader.next() {
                Some(Ok(packet)) => self.next = Some(packet),
                Some(Err(error)) => self.damage = Some(error),
                None => self.ended = true,
            }
        }
        if let Some(damage) = &self.damage {
            return Err(damage.clone());
        }
        let Some((captured, _)) = &self.next else { return Ok(None) };
        let (began, first) = *self.began.get_or_insert_with(|| (Instant::now(), *captured));
        Ok(Some(began + captured.saturating_sub(first)))
    }

    /// Puts the next frame into `slot` if it is due. Returns its length with the header.
    fn read(&mut self, slot: &mut [u8]) -> Result<Option<usize>, String> {
        if self.due()?.is_none_or(|due| due > Instant::now()) {
            return Ok(None);
        }
        let Some((_, frame)) = self.next.take() else { return Ok(None) };
        self.taken += 1;
        let len = frame.len().min(SLOT_SIZE - NetHeader::LEN);
        slot[..NetHeader::LEN].fill(0);
        slot[NetHeader::LEN..NetHeader::LEN + len].copy_from_slice(&frame[..len]);
        Ok(Some(NetHeader::LEN + len))
    }
}

/// Replays a file once, with the intervals at which its frames were captured.
#[derive(Debug)]
pub(crate) struct PcapInput {
    script: Script,
    pool: FramePool,
    timer: OwnedFd,
    /// Nothing is sent before this is set.
    pub started: bool,
}

impl PcapInput {
    /// Opens a pcap or pcapng file, whose first `skip` frames have been replayed before.
    pub fn open(file: File, skip: u64) -> Result<PcapInput, String> {
        let mut reader = Reader::open(file)?;
        for _ in 0..skip {
            // Damage shows when it is read again.
            let Some(Ok(_)) = reader.next() else { break };
        }
        // SAFETY: creates a descriptor, which the next line takes over.
        let timer = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
        if timer < 0 {
            return Err(format!("no timer: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: just created, owned by nobody else.
        let timer = unsafe { OwnedFd::from_raw_fd(timer) };
        let script = Script { reader, began: None, next: None, taken: skip, ended: false, damage: None };
        Ok(PcapInput { script, pool: FramePool::new(), timer, started: false })
    }

    /// Reads to the end, or to the first damage: how many frames, and the bytes of the longest.
    #[cfg(feature = "fuzzing")]
    pub fn read_all(&mut self) -> Result<(usize, usize), String> {
        let (mut frames, mut longest) = (0, 0);
        let mut slot = vec![0; SLOT_SIZE];
        while let Ok(Some(due)) = self.script.due() {
            if due <= Instant::now() {
                longest = self.script.read(&mut slot)?.map_or(longest, |len| longest.max(len - NetHeader::LEN));
            } else {
                self.script.next = None;
            }
            frames += 1;
        }
        Ok((frames, longest))
    }

    pub fn receive(&mut self, batch: &mut Batch, max: usize) -> Result<usize, String> {
        let PcapInput { script, pool, started, .. } = self;
        if !*started {
            return Ok(0);
        }
        pool.receive(batch, max, |slot| script.read(slot))
    }

    pub fn release(&mut self, count: usize) {
        self.pool.release(count);
    }

    /// How many frames have been replayed.
    pub fn taken(&self) -> u64 {
        self.script.taken
    }

    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Sets the timer for the next frame. Returns whether one is due already.
    pub fn arm(&mut self) -> bool {
        if !self.started {
            return false;
        }
        let due = match self.script.due() {
            Ok(Some(due)) => due,
            Ok(None) => return false,
            // The next round reports it.
            Err(_) => return true,
        };
        let wait = due.saturating_duration_since(Instant::now());
        if wait.is_zero() {
            return true;
        }
        // SAFETY: all-zero is a valid itimerspec.
        let mut at: libc::itimerspec = unsafe { std::mem::zeroed() };
        at.it_value.tv_sec = wait.as_secs() as libc::time_t;
        at.it_value.tv_nsec = libc::c_long::from(wait.subsec_nanos());
        // SAFETY: the descriptor is ours and the structure is a valid local.
        unsafe { libc::timerfd_settime(self.timer.as_raw_fd(), 0, &at, std::ptr::null_mut()) };
        false
    }
}

/// Records what is sent to the port, with nanoseconds.
#[derive(Debug)]
pub(crate) struct PcapOutput {
    file: BufWriter<File>,
    buffer: Vec<u8>,
}

impl PcapOutput {
    /// Starts a capture file in `file`, or goes on with one that a switch before this one has begun.
    pub fn create(file: File, begun: bool) -> Result<PcapOutput, String> {
        let mut file = BufWriter::with_capacity(1 << 16, file);
        if begun {
            return Ok(PcapOutput { file, buffer: Vec::new() });
        }
        let resolution = TsResolution::NanoSecond;
        PcapHeader { ts_resolution: resolution, snaplen: SLOT_SIZE as u32, ..PcapHeader::default() }
            .write_to(&mut file)
            .map_err(|error| error.to_string())
            .and_then(|_| file.flush().map_err(|error| error.to_string()))
            .map_err(|error| format!("the capture file cannot be written: {error}"))?;
        Ok(PcapOutput { file, buffer: Vec::new() })
    }
}

impl Sink for PcapOutput {
    fn reserve(&mut self, _frames: usize) {}

    fn put(&mut self, frame: &Outgoing) -> Put {
        self.buffer.clear();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The record header (pcap file format, "Packet Record"), in the byte order of the file header, which is big-endian.
        for field in [now.as_secs() as u32, now.subsec_nanos(), frame.len, frame.len] {
            self.buffer.extend_from_slice(&field.to_be_bytes());
        }
        frame.append_to(&mut self.buffer);
        if self.file.write_all(&self.buffer).is_ok() { Put::Done } else { Put::Failed(DropReason::Io) }
    }

    fn flush(&mut self) -> bool {
        // A failure shows with the next frame.
        let _ = self.file.flush();
        false
    }
}
