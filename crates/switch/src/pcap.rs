//! Capture files as a port: one is replayed into the switch, what is sent to the port is recorded in another.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom, Write};
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

/// Blocks that may come between two packets of a pcapng file; as many interfaces have been seen in one file.
const BLOCKS_BETWEEN: usize = 10_000;
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
        use std::io::Read;
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
            return Err(not_ethernet(reader.header().datalink));
        }
        Ok(Reader::Pcap(reader))
    }

    /// The next frame and when it was captured.
    fn next(&mut self) -> Option<Result<(Duration, Vec<u8>), String>> {
        let describe = |error: pcap_file::PcapError| format!("the capture file is damaged: {error}");
        let mut skipped = 0;
        match self {
            Reader::Pcap(reader) => {
                Some(reader.next_packet()?.map(|packet| (packet.timestamp, packet.data.into_owned())).map_err(describe))
            }
            Reader::PcapNg(reader) => loop {
                match reader.next_block()? {
                    Ok(Block::EnhancedPacket(packet)) => {
                        let (interface, raw) = (packet.interface_id, packet.timestamp.as_nanos() as u64);
                        let data = packet.data.into_owned();
                        let link = reader.interfaces().get(interface as usize).map(|interface| interface.linktype);
                        if link != Some(DataLink::ETHERNET) {
                            return Some(Err(link.map_or_else(
                                || format!("the capture file is damaged: a packet of interface {interface}, which is not described"),
                                not_ethernet,
                            )));
                        }
                        return Some(Ok((in_units_of(reader, interface, raw), data)));
                    }
                    // A poller reads this, and must not be kept from its other ports.
                    Ok(_) if skipped == BLOCKS_BETWEEN => {
                        return Some(Err(format!(
                            "the capture file is damaged: more than {BLOCKS_BETWEEN} blocks without a packet"
                        )));
                    }
                    Ok(_) => skipped += 1,
                    Err(error) => return Some(Err(describe(error))),
                }
            },
        }
    }
}

fn not_ethernet(link: DataLink) -> String {
    format!("captured on {link:?}, but only Ethernet frames can be replayed")
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
        check_regular(&file)?;
        let reader = Reader::open(file)?;
        // SAFETY: creates a descriptor, which the next line takes over.
        let timer = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
        if timer < 0 {
            return Err(format!("no timer: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: just created, owned by nobody else.
        let timer = unsafe { OwnedFd::from_raw_fd(timer) };
        let script = Script { reader, began: None, next: None, taken: 0, ended: false, damage: None };
        let mut input = PcapInput { script, pool: FramePool::new(), timer, started: false };
        input.skip_to(skip);
        Ok(input)
    }

    /// Somebody else has replayed the first `frames` frames.
    pub fn skip_to(&mut self, frames: u64) {
        let script = &mut self.script;
        for _ in script.taken..frames {
            // Damage shows when it is read again.
            if script.next.take().is_none() && !matches!(script.reader.next(), Some(Ok(_))) {
                break;
            }
        }
        script.taken = script.taken.max(frames);
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

/// A poller reads and writes the file, and would wait for whoever has the other end of a pipe or a terminal.
fn check_regular(file: &File) -> Result<(), String> {
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err("not a regular file, so that the switch might have to wait for it; to look into a port with \
                      another program, use viaduct capture"
            .to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Records what is sent to the port, with nanoseconds.
///
/// Records are gathered and written together. A write that fails is taken back as a whole, so that a file whose disk was
/// full for a while has only whole records.
#[derive(Debug)]
pub(crate) struct PcapOutput {
    file: File,
    /// Where the file ends, if all has gone well.
    end: u64,
    /// Records that are not in the file yet.
    buffer: Vec<u8>,
    /// The last write failed: the next ones are tried at once, one record each.
    failing: bool,
}

/// Bytes that are gathered.
const GATHERED: usize = 1 << 16;

impl PcapOutput {
    /// Starts a capture file in `file`, or goes on with one that a switch before this one has begun.
    pub fn create(mut file: File, begun: bool) -> Result<PcapOutput, String> {
        check_regular(&file)?;
        let failed = |error: &dyn std::fmt::Display| format!("the capture file cannot be written: {error}");
        if !begun {
            let resolution = TsResolution::NanoSecond;
            PcapHeader { ts_resolution: resolution, snaplen: SLOT_SIZE as u32, ..PcapHeader::default() }
                .write_to(&mut file)
                .map_err(|error| failed(&error))?;
        }
        let end = if begun { file.seek(SeekFrom::End(0)) } else { file.stream_position() };
        let end = end.map_err(|error| failed(&error))?;
        Ok(PcapOutput { file, end, buffer: Vec::with_capacity(2 * GATHERED), failing: false })
    }

    /// Writes what is gathered, or none of it. Returns whether it is written.
    fn write_out(&mut self) -> bool {
        let written = self.file.write_all(&self.buffer).is_ok();
        if written {
            self.end += self.buffer.len() as u64;
        } else {
            // What of it is in the file would make all that follows unreadable. If this fails too, so does the next write.
            let _ = self.file.set_len(self.end).and_then(|()| self.file.seek(SeekFrom::Start(self.end)));
        }
        self.failing = !written;
        self.buffer.clear();
        written
    }
}

impl Sink for PcapOutput {
    fn reserve(&mut self, _frames: usize) {}

    fn put(&mut self, frame: &Outgoing) -> Put {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The record header (pcap file format, "Packet Record"), in the byte order of the file header, which is big-endian.
        for field in [now.as_secs() as u32, now.subsec_nanos(), frame.len, frame.len] {
            self.buffer.extend_from_slice(&field.to_be_bytes());
        }
        frame.append_to(&mut self.buffer);
        if (self.failing || self.buffer.len() >= GATHERED) && !self.write_out() {
            return Put::Failed(DropReason::Io);
        }
        Put::Done
    }

    fn flush(&mut self) -> bool {
        // Of those gathered that cannot be written now, nobody hears; the next frame is counted.
        if !self.buffer.is_empty() {
            self.write_out();
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::span_of;

    /// A file that takes so many bytes and no more, page by page, as a disk that becomes full.
    fn small_disk(bytes: u64) -> File {
        // SAFETY: a fresh descriptor, taken over at once.
        let file = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), flags))
        };
        file.set_len(bytes).expect("it can grow");
        // SAFETY: a plain fcntl call.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) }, 0);
        file
    }

    #[test]
    fn a_recording_on_a_full_disk_ends_with_a_whole_record() {
        let disk = small_disk(8192);
        let mut output = PcapOutput::create(disk.try_clone().expect("a descriptor"), false).expect("a regular file");
        let mut frame = vec![0x5a; 984];
        let body = [span_of(&mut frame).expect("a frame")];
        let outgoing =
            Outgoing { net: 0, csum_offset: 0, prefix: [0; 3], prefix_len: 0, body: &body, skip: 0, len: 984 };
        for _ in 0..5 {
            assert_eq!(output.put(&outgoing), Put::Done);
        }
        output.flush();
        // The next five do not fit: three of them and a bit of the fourth would.
        for _ in 0..5 {
            assert_eq!(output.put(&outgoing), Put::Done);
        }
        output.flush();
        assert_eq!(disk.metadata().expect("a file").len(), 24 + 5 * 1000);
        assert_eq!(output.put(&outgoing), Put::Failed(DropReason::Io), "it is known now");
        assert_eq!(disk.metadata().expect("a file").len(), 24 + 5 * 1000);
    }

    #[test]
    fn pipes_are_refused() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let refused = PcapInput::open(OwnedFd::from(reader).into(), 0).expect_err("a pipe").to_string();
        assert!(refused.contains("regular file"), "{refused}");
        assert!(PcapOutput::create(OwnedFd::from(writer).into(), false).is_err());
    }

    #[test]
    fn endless_blocks_without_packets_end() {
        let mut bytes =
            [&0x0a0d_0d0au32.to_le_bytes()[..], &28u32.to_le_bytes(), &0x1a2b_3c4du32.to_le_bytes()].concat();
        bytes.extend([1, 0, 0, 0]);
        bytes.extend([0xff; 8]);
        bytes.extend(28u32.to_le_bytes());
        for _ in 0..=BLOCKS_BETWEEN {
            bytes.extend(0x7777u32.to_le_bytes());
            bytes.extend(12u32.to_le_bytes());
            bytes.extend(12u32.to_le_bytes());
        }
        let mut file = small_disk(bytes.len() as u64);
        file.write_all(&bytes).and_then(|()| file.rewind()).expect("room");
        let mut reader = Reader::open(file).expect("a capture");
        let said = reader.next().expect("not the end").expect_err("damaged");
        assert!(said.contains("without a packet"), "{said}");
    }
}
