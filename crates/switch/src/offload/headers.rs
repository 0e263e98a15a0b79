//! The headers of a frame that is to be segmented.

use super::OffloadError;

/// Most bytes of headers that a segment may have: two VLAN tags, IPv6 with a hundred bytes of extension headers, and
/// TCP with all its options take 222.
pub const MAX_HEADERS: usize = 256;

/// IANA protocol numbers.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// EtherTypes (IEEE 802).
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
/// Tags that are understood: one of the customer and one of the provider (IEEE 802.1ad).
const MAX_TAGS: usize = 2;

/// Where a frame's headers are, counted from its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) ethertype: u16,
    /// The IP header.
    pub(super) network: usize,
    /// [`TCP`], [`UDP`] or anything else.
    pub(super) protocol: u8,
    /// The transport header.
    pub(super) transport: usize,
    /// Behind the transport header; its begin, where the protocol is neither TCP nor UDP.
    pub(super) payload: usize,
}

/// `N` bytes at `at`, which belong to `what`.
fn bytes<const N: usize>(frame: &[u8], at: usize, what: &'static str) -> Result<[u8; N], OffloadError> {
    let bytes = frame.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or(OffloadError::Truncated { what, needed: at + N, found: frame.len() })
}

fn number(frame: &[u8], at: usize, what: &'static str) -> Result<u16, OffloadError> {
    bytes(frame, at, what).map(u16::from_be_bytes)
}

impl Headers {
    /// Finds the headers of `frame`.
    pub(super) fn parse(frame: &[u8]) -> Result<Headers, OffloadError> {
        let mut network = 14;
        let mut ethertype = number(frame, 12, "Ethernet header")?;
        for _ in 0..MAX_TAGS {
            if ethertype == VLAN || ethertype == SERVICE_VLAN {
                ethertype = number(frame, network + 2, "VLAN tag")?;
                network += 4;
            }
        }
        let (protocol, transport) = match ethertype {
            IPV4 => ipv4(frame, network)?,
            IPV6 => ipv6(frame, network)?,
            _ => return Ok(Headers { ethertype, network, protocol: 0, transport: network, payload: network }),
        };
        let payload = match protocol {
            TCP => {
                // RFC 9293, 3.1: the data offset counts 32-bit words.
                let words = bytes::<20>(frame, transport, "TCP header")?[12] >> 4;
                header_end(frame, transport, 4 * usize::from(words), 20, ["TCP data offset", "TCP header"])?
            }
            UDP => {
                bytes::<8>(frame, transport, "UDP header")?;
                transport + 8
            }
            _ => transport,
        };
        if payload > MAX_HEADERS {
            return Err(OffloadError::HeadersTooLong(payload));
        }
        Ok(Headers { ethertype, network, protocol, transport, payload })
    }
}

/// The end of a header that gives its own length; `names` are those of the length and of the header.
fn header_end(
    frame: &[u8],
    at: usize,
    len: usize,
    least: usize,
    names: [&'static str; 2],
) -> Result<usize, OffloadError> {
    if len < least {
        return Err(OffloadError::BadHeader { what: names[0], found: len, least });
    }
    if at + len > frame.len() {
        return Err(OffloadError::Truncated { what: names[1], needed: at + len, found: frame.len() });
    }
    Ok(at + len)
}

fn version(byte: u8, expected: u8) -> Result<(), OffloadError> {
    let found = byte >> 4;
    if found == expected { Ok(()) } else { Err(OffloadError::WrongVersion { found, expected }) }
}

/// Protocol and place of the transport header (RFC 791, 3.1).
fn ipv4(frame: &[u8], at: usize) -> Result<(u8, usize), OffloadError> {
    let header = bytes::<20>(frame, at, "IPv4 header")?;
    version(header[0], 4)?;
    let len = 4 * usize::from(header[0] & 15);
    let end = header_end(frame, at, len, 20, ["IPv4 header length", "IPv4 header"])?;
    // MORE FRAGMENTS or an offset.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(OffloadError::Fragment);
    }
    Ok((header[9], end))
}

/// As [`ipv4`], behind the extension headers (RFC 8200, 4).
fn ipv6(frame: &[u8], at: usize) -> Result<(u8, usize), OffloadError> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let header = bytes::<40>(frame, at, "IPv6 header")?;
    version(header[0], 6)?;
    let (mut next, mut at) = (header[6], at + 40);
    while let HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT = next {
        // Each has at least 8 bytes, so this ends after MAX_HEADERS / 8 rounds.
        let extension = bytes::<8>(frame, at, "IPv6 extension header")?;
        match next {
            FRAGMENT => return Err(OffloadError::Fragment),
            // The pseudo-header would have the final destination, and the routing header's type decides where that is.
            ROUTING if extension[3] != 0 => return Err(OffloadError::RoutingHeader(extension[3])),
            _ => {}
        }
        next = extension[0];
        at += 8 * (usize::from(extension[1]) + 1);
        if at > MAX_HEADERS {
            return Err(OffloadError::HeadersTooLong(at));
        }
    }
    Ok((next, at))
}
