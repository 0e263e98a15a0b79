//! TCP and UDP segmentation.

use super::headers::{Headers, IPV4, IPV6, MAX_HEADERS, TCP, UDP};
use super::{OffloadError, Sum, check};
use crate::net_header::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, NetHeader};

/// Most segments that one frame may become. A real driver makes 64 KiB of segments of at least 48 bytes (RFC 9293,
/// 3.7.1 with all options); a header that asks for a frame per byte asks us to work a thousand times as long for it.
pub const MAX_SEGMENTS: usize = 2048;

/// TCP flags (RFC 9293, 3.1).
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Cuts `frame` as `header` says and calls `emit` with the headers and the payload of each segment in turn. Every
/// segment is complete: it needs no offload any more, and its virtio-net header has neither flags nor `gso_type`. A
/// frame whose `gso_type` is `GSO_NONE` is refused.
///
/// # Errors
/// The first contradiction between frame and header; nothing has been emitted then.
pub fn segment(frame: &[u8], header: &NetHeader, mut emit: impl FnMut(&[u8], &[u8])) -> Result<(), OffloadError> {
    let mut segments = Segments::new(frame, header)?;
    while let Some((headers, payload)) = segments.next_segment() {
        emit(headers, payload);
    }
    Ok(())
}

/// The segments of a frame, one after the other.
#[derive(Debug)]
pub struct Segments<'a> {
    layout: Headers,
    /// The headers of the segment made last: those of the frame, with the fields changed that differ.
    headers: [u8; MAX_HEADERS],
    payload: &'a [u8],
    /// Payload bytes in every segment but the last.
    size: usize,
    /// Payload bytes in the segments made so far.
    done: usize,
    made: usize,
    count: usize,
    /// Of the frame: the first segment's IPv4 identification and TCP sequence number, and the TCP flags.
    identification: u16,
    sequence: u32,
    flags: u8,
}

impl<'a> Segments<'a> {
    /// Checks that `frame` can be cut as `header` says.
    ///
    /// # Errors
    /// As for [`segment`].
    pub fn new(frame: &'a [u8], header: &NetHeader) -> Result<Segments<'a>, OffloadError> {
        if header.gso_type == GSO_NONE {
            return Err(OffloadError::UnknownGso(GSO_NONE));
        }
        check(header, frame.len())?;
        let layout = Headers::parse(frame)?;
        agree(header, &layout)?;
        let payload = &frame[layout.payload..];
        let size = usize::from(header.gso_size).min(payload.len()).max(1);
        let count = payload.len().div_ceil(size).max(1);
        if count > MAX_SEGMENTS {
            return Err(OffloadError::TooManySegments { size: header.gso_size, found: count });
        }
        // What the length field of IPv4 counts begins with the header, that of IPv6 behind it.
        let counted_from = if layout.ethertype == IPV4 { layout.network } else { layout.network + 40 };
        let longest = layout.payload - counted_from + size.min(payload.len());
        if longest > usize::from(u16::MAX) {
            return Err(OffloadError::SegmentTooLong { found: longest });
        }
        let mut headers = [0; MAX_HEADERS];
        headers[..layout.payload].copy_from_slice(&frame[..layout.payload]);
        let (ip, transport) = (&frame[layout.network..], &frame[layout.transport..]);
        let tcp = layout.protocol == TCP;
        Ok(Segments {
            headers,
            payload,
            size,
            done: 0,
            made: 0,
            count,
            identification: u16::from_be_bytes([ip[4], ip[5]]),
            sequence: u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]),
            flags: if tcp { transport[13] } else { 0 },
            layout,
        })
    }

    /// How many segments there are in all, at least one.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of headers that each segment has.
    pub fn headers_len(&self) -> usize {
        self.layout.payload
    }

    /// The next segment's headers and payload.
    pub fn next_segment(&mut self) -> Option<(&[u8], &'a [u8])> {
        if self.made == self.count {
            return None;
        }
        let payload = &self.payload[self.done..self.payload.len().min(self.done + self.size)];
        self.write_network(payload.len());
        self.write_transport(payload);
        self.made += 1;
        self.done += payload.len();
        Some((&self.headers[..self.layout.payload], payload))
    }

    /// Length, identification and header checksum of the IP packet.
    fn write_network(&mut self, payload_len: usize) {
        let Headers { network, transport, payload, .. } = self.layout;
        let to_end = |from: usize| number(payload - from + payload_len);
        if self.layout.ethertype == IPV4 {
            let total = to_end(network);
            let ip = &mut self.headers[network..transport];
            ip[2..4].copy_from_slice(&total.to_be_bytes());
            // Each is a packet of its own; consecutive numbers are what a host would have given them (RFC 6864, 4).
            let identification = self.identification.wrapping_add(number(self.made));
            ip[4..6].copy_from_slice(&identification.to_be_bytes());
            ip[10..12].fill(0);
            let checksum = Sum::default().add_bytes(ip).finish();
            ip[10..12].copy_from_slice(&checksum);
        } else {
            let len = to_end(network + 40);
            self.headers[network + 4..network + 6].copy_from_slice(&len.to_be_bytes());
        }
    }

    /// Sequence number and flags, or length, and the checksum.
    fn write_transport(&mut self, payload: &[u8]) {
        let Headers { transport, payload: end, protocol, .. } = self.layout;
        let len = number(end - transport + payload.len());
        let (first, last) = (self.made == 0, self.made + 1 == self.count);
        let pseudo = self.pseudo_header(len);
        let header = &mut self.headers[transport..end];
        if protocol == TCP {
            // At most MAX_SEGMENTS times 2^16 bytes are done, so the number fits.
            let sequence = self.sequence.wrapping_add(self.done as u32);
            header[4..8].copy_from_slice(&sequence.to_be_bytes());
            // The end of the stream or of a message comes with its last byte. CWR answers one ECE (RFC 3168, 6.1.2).
            let not_here = if last { 0 } else { FIN | PSH } | if first { 0 } else { CWR };
            header[13] = self.flags & !not_here;
            header[16..18].fill(0);
            let checksum = pseudo.add_bytes(header).add_bytes(payload).finish();
            header[16..18].copy_from_slice(&checksum);
        } else {
            header[4..6].copy_from_slice(&len.to_be_bytes());
            header[6..8].fill(0);
            let checksum = pseudo.add_bytes(header).add_bytes(payload).finish_nonzero();
            header[6..8].copy_from_slice(&checksum);
        }
    }

    /// RFC 9293, 3.1; RFC 8200, 8.1. Computed, not taken from the frame, whose driver put it there for another length.
    fn pseudo_header(&self, len: u16) -> Sum {
        let network = self.layout.network;
        let addresses =
            if self.layout.ethertype == IPV4 { network + 12..network + 20 } else { network + 8..network + 40 };
        let sum = Sum::default().add_bytes(&self.headers[addresses]);
        sum.add_number(u16::from(self.layout.protocol)).add_number(len)
    }
}

/// A length or index that `Segments::new` has found to fit.
fn number(value: usize) -> u16 {
    debug_assert!(value <= usize::from(u16::MAX));
    value as u16
}

/// Whether `header` describes the frame that the headers show.
fn agree(header: &NetHeader, layout: &Headers) -> Result<(), OffloadError> {
    let gso_type = header.gso_type;
    let (networks, protocol, checksum): (&[u16], _, _) = match gso_type & !GSO_ECN {
        GSO_TCPV4 => (&[IPV4], TCP, 16),
        GSO_TCPV6 => (&[IPV6], TCP, 16),
        // `check` let no other through.
        _ => (&[IPV4, IPV6], UDP, 6),
    };
    if !networks.contains(&layout.ethertype) {
        return Err(OffloadError::WrongNetwork { gso_type, ethertype: layout.ethertype });
    }
    if layout.protocol != protocol {
        return Err(OffloadError::WrongTransport { gso_type, protocol: layout.protocol });
    }
    let (start, offset) = (header.csum_start, header.csum_offset);
    let named = (usize::from(start), usize::from(offset));
    if named != (layout.transport, checksum) {
        let (real_start, real_offset) = (layout.transport, checksum);
        return Err(OffloadError::ChecksumMismatch { start, offset, real_start, real_offset });
    }
    Ok(())
}
