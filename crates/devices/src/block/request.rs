//! Requests as the driver makes them (virtio 1.2, 5.2.6): a header to read, data, and a byte for the status to write.
//!
//! Where one part ends and the next begins in the descriptors is the driver's choice (2.7.4.1): the header is the first 16
//! bytes to read, the status is the last byte to write, and the data is what is left.

use viaduct_memory::Span;
use viaduct_ring::{Batch, Chain};

use super::buffer::pieces;
use super::image::SECTOR;
use super::operation::Range;

/// VIRTIO_BLK_F_RO (5.2.3).
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_DISCARD.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Bytes of a request's header.
pub const HEADER: usize = 16;
/// Bytes of one segment of a discard or write zeroes request.
pub const SEGMENT: usize = 16;
/// Most segments that one request may have: `max_discard_seg` and `max_write_zeroes_seg`.
pub const SEGMENTS: usize = 64;
/// Most sectors in a segment: `max_discard_sectors`. A gigabyte keeps one request from taking long.
pub const DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors in a segment: `max_write_zeroes_sectors`. Less, because some systems have to write them.
pub const WRITE_ZEROES_SECTORS: u32 = 1 << 16;
/// Bytes of a serial number (5.2.6).
pub const ID: usize = 20;

/// The status byte (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoErr = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// What a request asks for. Its data's pieces are in the vector that was filled beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fill the data from this offset of the disk, in bytes.
    In(u64),
    /// Write the data to this offset.
    Out(u64),
    /// Make durable what was written.
    Flush,
    /// Fill the data with the serial number.
    GetId,
    /// Forget ranges.
    Discard(Vec<Range>),
    /// Zero ranges.
    WriteZeroes(Vec<Range>),
}

/// A chain that was looked at.
#[derive(Debug)]
pub enum Parsed {
    /// A request, and where its status goes.
    Run(Kind, Span),
    /// One that is answered at once, with its status, where that goes, and what the driver did wrong.
    Answer(Status, Span, String),
    /// One that cannot be answered: it has no place for a status.
    Unanswerable(String),
}

/// What may be asked of the disk.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Bytes.
    pub size: u64,
    /// It was offered with VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// Features in force.
    pub features: u64,
}

/// Looks at the chain of `batch`, whose memory is mapped, and puts the pieces of its data into `data`.
///
/// # Safety
/// The batch's spans point into memory that is alive.
pub unsafe fn parse(disk: &Disk, batch: &Batch, chain: &Chain, data: &mut Vec<Span>) -> Parsed {
    data.clear();
    let (readable, writable) = (batch.readable(chain), batch.writable(chain));
    let Some(status) = writable.iter().rfind(|span| !span.is_empty()).map(|span| span.skip(span.len() - 1)) else {
        return Parsed::Unanswerable(format!(
            "a request with {} bytes to read and none to write; the last byte to write is for the status (virtio 1.2, 5.2.6)",
            chain.readable_len
        ));
    };
    let refuse = |status_code, problem: String| Parsed::Answer(status_code, status, problem);
    let Some(output) = u64::from(chain.readable_len).checked_sub(HEADER as u64) else {
        let found = chain.readable_len;
        return refuse(Status::IoErr, format!("a header of {found} bytes; it has {HEADER} (virtio 1.2, 5.2.6)"));
    };
    let input = u64::from(chain.writable_len) - 1;
    // SAFETY: the caller keeps the memory.
    let header: [u8; HEADER] = unsafe { read(readable, 0) };
    let (number, sector) = (le32(&header, 0), le64(&header, 8));
    match number {
        T_IN | T_OUT => {
            let write = number == T_OUT;
            let len = if write { output } else { input };
            if write && disk.read_only {
                return refuse(Status::IoErr, read_only("write"));
            }
            if len == 0 || !len.is_multiple_of(SECTOR) {
                let what = if write { "write" } else { "read" };
                return refuse(
                    Status::IoErr,
                    format!("a {what} of {len} bytes; multiples of {SECTOR} are allowed (virtio 1.2, 5.2.6)"),
                );
            }
            let Some(range) = locate(disk, sector, len / SECTOR) else {
                return refuse(Status::IoErr, beyond(disk, sector, len / SECTOR));
            };
            if write {
                data.extend(pieces(readable, HEADER as u64, output));
                Parsed::Run(Kind::Out(range.offset), status)
            } else {
                data.extend(pieces(writable, 0, input));
                Parsed::Run(Kind::In(range.offset), status)
            }
        }
        T_FLUSH => Parsed::Run(Kind::Flush, status),
        T_GET_ID => {
            data.extend(pieces(writable, 0, input));
            Parsed::Run(Kind::GetId, status)
        }
        T_DISCARD if disk.features & F_DISCARD != 0 => {
            // SAFETY: the caller keeps the memory.
            match unsafe { ranges(disk, readable, output, "discard", DISCARD_SECTORS, 0) } {
                Ok(ranges) => Parsed::Run(Kind::Discard(ranges), status),
                Err((code, problem)) => refuse(code, problem),
            }
        }
        T_WRITE_ZEROES if disk.features & F_WRITE_ZEROES != 0 => {
            // SAFETY: the caller keeps the memory.
            match unsafe { ranges(disk, readable, output, "write zeroes", WRITE_ZEROES_SECTORS, UNMAP) } {
                Ok(ranges) => Parsed::Run(Kind::WriteZeroes(ranges), status),
                Err((code, problem)) => refuse(code, problem),
            }
        }
        other => {
            refuse(Status::Unsupported, format!("a request of type {other}, which was not offered (virtio 1.2, 5.2.6)"))
        }
    }
}

/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
const UNMAP: u32 = 1;

/// The ranges of a discard or write zeroes request.
///
/// # Safety
/// The spans' memory is alive.
unsafe fn ranges(
    disk: &Disk,
    spans: &[Span],
    len: u64,
    what: &str,
    sectors_max: u32,
    flags: u32,
) -> Result<Vec<Range>, (Status, String)> {
    if disk.read_only {
        return Err((Status::IoErr, read_only(what)));
    }
    let (count, rest) = (len / SEGMENT as u64, len % SEGMENT as u64);
    if count == 0 || count > SEGMENTS as u64 || rest != 0 {
        let allowed = format!("1 to {SEGMENTS} segments of {SEGMENT} bytes");
        return Err((
            Status::IoErr,
            format!("a {what} request with {len} bytes of segments; {allowed} (virtio 1.2, 5.2.6)"),
        ));
    }
    let mut found = Vec::with_capacity(count as usize);
    for index in 0..count {
        // SAFETY: the caller's promise.
        let segment: [u8; SEGMENT] = unsafe { read(spans, HEADER as u64 + index * SEGMENT as u64) };
        let (sector, sectors, found_flags) = (le64(&segment, 0), le32(&segment, 8), le32(&segment, 12));
        if found_flags & !flags != 0 {
            // "If any unknown flag is set the device MUST set the status to UNSUPP" (5.2.6.2).
            let message =
                format!("a {what} request with flags {found_flags:#x}; {flags:#x} are known (virtio 1.2, 5.2.6.2)");
            return Err((Status::Unsupported, message));
        }
        if sectors > sectors_max {
            let message =
                format!("a {what} request for {sectors} sectors; {sectors_max} are allowed (virtio 1.2, 5.2.6.2)");
            return Err((Status::IoErr, message));
        }
        let Some(mut range) = locate(disk, sector, sectors.into()) else {
            return Err((Status::IoErr, beyond(disk, sector, sectors.into())));
        };
        range.unmap = found_flags & UNMAP != 0;
        if range.len > 0 {
            found.push(range);
        }
    }
    Ok(found)
}

/// The bytes of `sectors` from `sector` on, if the disk has them.
fn locate(disk: &Disk, sector: u64, sectors: u64) -> Option<Range> {
    let (offset, len) = (sector.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?);
    (offset.checked_add(len)? <= disk.size).then_some(Range { offset, len, unmap: false })
}

fn beyond(disk: &Disk, sector: u64, sectors: u64) -> String {
    format!("{sectors} sectors from {sector} on; the disk has {} (virtio 1.2, 5.2.6.1)", disk.size / SECTOR)
}

fn read_only(what: &str) -> String {
    format!("a {what} request to a read-only disk (virtio 1.2, 5.2.6.2)")
}

/// Reads `N` bytes that begin `skip` bytes into the spans; zeroes where there are none.
///
/// # Safety
/// The spans' memory is alive.
unsafe fn read<const N: usize>(spans: &[Span], skip: u64) -> [u8; N] {
    let (mut bytes, mut at) = ([0; N], 0);
    for span in pieces(spans, skip, N as u64) {
        let end = at + span.len() as usize;
        // SAFETY: the piece has this length, and the caller keeps its memory.
        unsafe { span.read(0, &mut bytes[at..end]) };
        at = end;
    }
    bytes
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
