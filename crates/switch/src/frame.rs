//! A frame on its way: parsed once from the sender's buffers, checked, and from then on believed.

use viaduct_memory::{Span, access};
use viaduct_ring::Chain;

use crate::counters::DropReason;
use crate::net_header::{self, NetHeader};

/// Bytes of the frame that are read once into [`Frame::head`] and written from there: what is forwarded by them is what
/// the receiver gets, even if the sender rewrites its buffer meanwhile.
pub(crate) const HEAD: u32 = 16;

const ETHERNET_HEADER: u32 = 14;
const TAG: u32 = 4;
/// The longest frame: a full IP datagram, and Ethernet header and tag.
pub(crate) const MAX_FRAME: u32 = 65535 + ETHERNET_HEADER + TAG;
/// Ethertype 0x8100 as loaded little-endian.
const TPID: u16 = 0x0081;

/// The bits of an address.
pub(crate) const LOW48: u64 = 0xffff_ffff_ffff;

/// A frame that was received.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Frame {
    /// The first 16 bytes as two little-endian words.
    pub head: [u64; 2],
    /// The first eight bytes of the virtio-net header; flags and offsets are checked.
    pub net: u64,
    /// The rest of it.
    pub csum_offset: u16,
    /// VLAN of the frame inside the bridge.
    pub vlan: u16,
    /// Whether it came with an 802.1Q tag.
    pub tagged: bool,
    /// Number of spans.
    pub spans: u16,
    /// Index of the first span of the frame, virtio-net header excluded, among the batch's spans.
    pub first: u32,
    /// Length in bytes.
    pub len: u32,
}

impl Frame {
    /// Takes a plain frame out of a transmitted chain: it lies in one span together with its header, has no tag, and
    /// nothing is left to be done to it; it belongs to `vlan`. False: this is another frame, and nothing has been changed
    /// but `self`.
    #[inline(always)]
    pub fn parse_plain(&mut self, spans: &mut [Span], chain: &Chain, header_len: u32, vlan: u16) -> bool {
        let Some(span) = spans.get_mut(chain.first as usize) else { return false };
        let len = span.len().wrapping_sub(header_len);
        // A span that is shorter than its header wraps.
        if chain.readable != 1 || len.wrapping_sub(HEAD) > MAX_FRAME - HEAD {
            return false;
        }
        let base = span.as_ptr();
        // SAFETY: the batch's memory is alive while it is forwarded, and the span has header_len + 16 bytes.
        let asked = unsafe {
            let start = base.add(header_len as usize);
            self.head = [access::load_u64_unaligned(start), access::load_u64_unaligned(start.add(8))];
            access::load_u16_unaligned(base)
        };
        if asked != 0 || self.ethertype() == TPID {
            return false;
        }
        *span = span.skip(header_len);
        (self.net, self.csum_offset, self.vlan, self.tagged) = (0, 0, vlan, false);
        (self.first, self.spans, self.len) = (chain.first, 1, len);
        true
    }

    /// Takes the frame out of a transmitted chain; its spans are trimmed to the frame. Only flags in `keep_flags` count.
    #[inline(always)]
    pub fn parse(
        &mut self,
        spans: &mut [Span],
        chain: &Chain,
        header_len: u32,
        keep_flags: u8,
    ) -> Result<(), DropReason> {
        let Some(len) = chain.readable_len.checked_sub(header_len) else {
            return Err(if chain.is_refused() { DropReason::Iommu } else { DropReason::Runt });
        };
        if len < ETHERNET_HEADER {
            return Err(DropReason::Runt);
        }
        if len > MAX_FRAME {
            return Err(DropReason::Oversize);
        }
        let Some(span) = spans.get_mut(chain.first as usize) else { return Err(DropReason::Runt) };
        if span.len() < header_len + HEAD {
            return self.parse_scattered(spans, chain, header_len, len, keep_flags);
        }
        let base = span.as_ptr();
        // SAFETY: the batch's memory is alive while it is forwarded, and the span has header_len + 16 bytes; the header
        // has 10 or 12, and the load at 8 takes two more bytes of the frame where it has 10.
        let (low, high) = unsafe {
            let start = base.add(header_len as usize);
            self.head = [access::load_u64_unaligned(start), access::load_u64_unaligned(start.add(8))];
            (access::load_u64_unaligned(base), access::load_u32_unaligned(base.add(8)))
        };
        *span = span.skip(header_len);
        (self.first, self.spans, self.len) = (chain.first, chain.readable, len);
        self.check(low, high as u16, keep_flags)
    }

    /// The same for headers that are spread over several spans.
    #[cold]
    fn parse_scattered(
        &mut self,
        spans: &mut [Span],
        chain: &Chain,
        header_len: u32,
        len: u32,
        keep_flags: u8,
    ) -> Result<(), DropReason> {
        let mut start = [0u8; NetHeader::LEN + HEAD as usize];
        let wanted = (header_len + len.min(HEAD)) as usize;
        let (mut first, mut count, mut trim) = (chain.first as usize, chain.readable, header_len);
        gather(&spans[first..first + usize::from(count)], &mut start[..wanted]);
        let (header, frame_start) = start.split_at(header_len as usize);
        let mut net = [0; NetHeader::LEN];
        net[..header.len()].copy_from_slice(header);
        let (low, high) = NetHeader::parse(&net).to_words();
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&frame_start[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        // With a header of 10 bytes the buffer holds 18 of the frame; 16 of them count, and past `len` they are zero.
        self.head = [word(0), word(8)];
        while spans[first].len() <= trim {
            trim -= spans[first].len();
            first += 1;
            count -= 1;
        }
        spans[first] = spans[first].skip(trim);
        (self.first, self.spans, self.len) = (first as u32, count, len);
        self.check(low, high as u16, keep_flags)
    }

    #[inline(always)]
    fn check(&mut self, low: u64, csum_offset: u16, keep_flags: u8) -> Result<(), DropReason> {
        (self.net, self.csum_offset, self.vlan, self.tagged) = (0, 0, 0, false);
        if self.ethertype() == TPID {
            if self.len < ETHERNET_HEADER + TAG {
                return Err(DropReason::Runt);
            }
            self.tagged = true;
            self.vlan = ((self.head[1] >> 48) as u16).swap_bytes() & 0xfff;
        }
        if low & 0xffff != 0 { self.check_offloads(low, csum_offset, keep_flags) } else { Ok(()) }
    }

    /// Checks a header that asks for something (virtio 1.2, 5.1.6.2.1): afterwards its offsets lie inside the frame.
    #[inline(never)]
    fn check_offloads(&mut self, low: u64, csum_offset: u16, keep_flags: u8) -> Result<(), DropReason> {
        let mut header = NetHeader::from_words(low, u32::from(csum_offset));
        header.flags &= keep_flags;
        let needs_csum = header.flags & net_header::NEEDS_CSUM != 0;
        if needs_csum {
            let end = u32::from(header.csum_start) + u32::from(header.csum_offset) + 2;
            // Behind the tag too: it may be removed, and then the start would lie inside the Ethernet header.
            let least = if self.tagged { ETHERNET_HEADER + TAG } else { ETHERNET_HEADER };
            if u32::from(header.csum_start) < least || end > self.len {
                return Err(DropReason::BadHeader);
            }
        } else {
            (header.csum_start, header.csum_offset) = (0, 0);
        }
        match header.gso_type & !net_header::GSO_ECN {
            net_header::GSO_NONE => (header.gso_type, header.gso_size) = (net_header::GSO_NONE, 0),
            net_header::GSO_TCPV4 | net_header::GSO_TCPV6 | net_header::GSO_UDP_L4 => {
                // A segment's headers alone have more than 14 bytes; hdr_len is a hint, but not one past the frame.
                if header.gso_size == 0 || !needs_csum || u32::from(header.hdr_len) > self.len {
                    return Err(DropReason::BadHeader);
                }
            }
            // GSO_UDP among them: HOST_UFO is not offered, because fragments are not what anyone wants.
            _ => return Err(DropReason::BadHeader),
        }
        (self.net, _) = header.to_words();
        self.csum_offset = header.csum_offset;
        Ok(())
    }

    /// Puts the frame into a VLAN; a tag that it has keeps its priority.
    #[inline(always)]
    pub fn set_vlan(&mut self, vlan: u16) {
        self.vlan = vlan;
        if self.tagged {
            let tci = ((self.head[1] >> 48) as u16).swap_bytes() & 0xf000 | vlan;
            self.head[1] = self.head[1] & LOW48 | u64::from(tci.swap_bytes()) << 48;
        }
    }

    /// Destination address in the 48 low bits, first byte lowest.
    #[inline(always)]
    pub fn destination(&self) -> u64 {
        self.head[0] & LOW48
    }

    /// Source address, likewise.
    #[inline(always)]
    pub fn source(&self) -> u64 {
        (self.head[0] >> 48 | self.head[1] << 16) & LOW48
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        (self.head[1] >> 32) as u16
    }

    /// What a receiver has to accept to get the frame as it is, see [`Offloads`].
    #[inline(always)]
    pub fn offloads(&self) -> Offloads {
        if self.net & 0xffff == 0 { Offloads::NONE } else { Offloads::asked_by(self.net as u8, (self.net >> 8) as u8) }
    }

    /// Both addresses, as two words that can be compared.
    #[inline(always)]
    pub fn addresses(&self) -> [u64; 2] {
        [self.head[0], self.head[1] & 0xffff_ffff]
    }

    /// Whether it lies in one piece and leaves as it came, so that [`Sink::put_simple`](crate::sink::Sink) may take it.
    #[inline(always)]
    pub fn is_simple(&self, tag_out: bool) -> bool {
        self.spans == 1 && self.len >= HEAD && self.tagged == tag_out
    }

    /// Whether the frame is to be cut into segments by the last one who handles it.
    #[inline(always)]
    pub fn is_gso(&self) -> bool {
        self.net & 0xff00 != 0
    }

    /// Whether something is left to be done to it.
    #[inline(always)]
    pub fn is_unfinished(&self) -> bool {
        self.is_gso() || self.net as u8 & net_header::NEEDS_CSUM != 0
    }

    /// Length without a tag.
    #[inline(always)]
    pub fn untagged_len(&self) -> u32 {
        if self.tagged { self.len - TAG } else { self.len }
    }

    /// A hash of the flow: addresses of Ethernet and IP, and ports. Spreads flows over a receiver's queues.
    pub fn flow_hash(&self, spans: &[Span]) -> u32 {
        let mut hash = self.head[0] ^ (self.head[1] & 0xffff_ffff).rotate_left(32);
        let start = if self.tagged { ETHERNET_HEADER + TAG } else { ETHERNET_HEADER };
        let span = spans[self.first as usize];
        // Behind a tag the ethertype is not in the head. IPv4 without options has its ports behind the addresses, IPv6
        // without extensions too; other protocols spread by their Ethernet addresses.
        let byte = |at: u32| {
            // SAFETY: called within the span only, whose memory is alive while the batch is forwarded.
            unsafe { span.as_ptr().add(at as usize).read_volatile() }
        };
        let protocol = if start < span.len() { [byte(start - 2), byte(start - 1), byte(start)] } else { [0; 3] };
        let (from, words) = match protocol {
            [0x08, 0x00, 0x45] => (start + 12, 3),
            [0x86, 0xdd, _] => (start + 8, 9),
            _ => (0, 0),
        };
        if from + 4 * words <= span.len() {
            for word in 0..words {
                // SAFETY: within the span, whose memory is alive while the batch is forwarded. A guest that changes
                // these bytes meanwhile only chooses another queue for its own frame.
                let value = unsafe { access::load_u32_unaligned(span.as_ptr().add((from + 4 * word) as usize)) };
                hash = (hash.rotate_left(23) ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            }
        }
        (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
    }

    /// The frame as it leaves through a port, with a tag or without.
    #[inline]
    pub fn outgoing<'a>(&self, spans: &'a [Span], tag_out: bool) -> Outgoing<'a> {
        let first = self.first as usize;
        let mut outgoing = self.as_it_is(&spans[first..first + self.spans as usize]);
        if tag_out != self.tagged {
            outgoing.change_tag(tag_out, self.vlan);
        }
        outgoing
    }

    /// The frame, which lies in `body`, as it came.
    #[inline]
    pub fn as_it_is<'a>(&self, body: &'a [Span]) -> Outgoing<'a> {
        let head = self.len.min(HEAD);
        Outgoing {
            net: self.net,
            csum_offset: self.csum_offset,
            prefix: [self.head[0], self.head[1], 0],
            prefix_len: head,
            skip: head,
            len: self.len,
            body,
        }
    }
}

/// What goes into a receiver's buffers: header, a prefix of our own, and the rest straight from the sender's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outgoing<'a> {
    /// First eight bytes of the virtio-net header.
    pub net: u64,
    /// The next two.
    pub csum_offset: u16,
    /// The frame's first `prefix_len` bytes.
    pub prefix: [u64; 3],
    pub prefix_len: u32,
    /// The sender's spans, of which the first `skip` bytes are replaced by the prefix.
    pub body: &'a [Span],
    pub skip: u32,
    /// Length of the frame as it leaves.
    pub len: u32,
}

impl Outgoing<'_> {
    /// Inserts or removes the 802.1Q tag behind the addresses (IEEE 802.1Q, 9.3); offsets move along.
    #[cold]
    fn change_tag(&mut self, insert: bool, vlan: u16) {
        let addresses = self.prefix[1] & 0xffff_ffff;
        let mut header = NetHeader::from_words(self.net, u32::from(self.csum_offset));
        let tag = TAG as u16;
        if insert {
            let tci = u64::from(vlan.swap_bytes());
            self.prefix[2] = self.prefix[1] >> 32;
            self.prefix[1] = addresses | u64::from(TPID) << 32 | tci << 48;
            self.prefix_len += TAG;
            self.len += TAG;
            if header.flags & net_header::NEEDS_CSUM != 0 {
                header.csum_start = header.csum_start.saturating_add(tag);
            }
            if header.hdr_len != 0 {
                header.hdr_len = header.hdr_len.saturating_add(tag);
            }
        } else {
            self.prefix[1] = addresses;
            self.prefix_len -= TAG;
            self.len -= TAG;
            header.csum_start = header.csum_start.saturating_sub(tag);
            header.hdr_len = header.hdr_len.saturating_sub(tag);
        }
        (self.net, _) = header.to_words();
    }

    /// The prefix as bytes; the first `prefix_len` count.
    #[inline(always)]
    pub fn prefix_bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.prefix) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The spans that follow the prefix.
    pub fn rest(&self) -> impl Iterator<Item = Span> {
        let mut skip = self.skip;
        self.body.iter().filter_map(move |&span| {
            let skipped = skip.min(span.len());
            skip -= skipped;
            (skipped < span.len()).then(|| span.skip(skipped))
        })
    }

    /// Copies the whole frame to the end of `buffer`.
    pub fn append_to(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&self.prefix_bytes()[..self.prefix_len as usize]);
        for span in self.rest() {
            let at = buffer.len();
            buffer.resize(at + span.len() as usize, 0);
            // SAFETY: the batch's memory is alive while it is forwarded.
            unsafe { span.read(0, &mut buffer[at..]) };
        }
    }
}

/// Fills `buffer` from the start of `spans`, which have at least as many bytes.
fn gather(spans: &[Span], buffer: &mut [u8]) {
    let mut filled = 0;
    for span in spans {
        let take = (buffer.len() - filled).min(span.len() as usize);
        // SAFETY: the batch's memory is alive while it is forwarded; `take` is within the span.
        unsafe { span.read(0, &mut buffer[filled..filled + take]) };
        filled += take;
    }
}

/// Offloads that a frame asks for, or that a receiver accepts, as a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u8);

impl Offloads {
    /// Nothing.
    pub const NONE: Offloads = Offloads(0);
    /// Partial checksums.
    pub const CSUM: Offloads = Offloads(1);
    /// TCP over IPv4.
    pub const TSO4: Offloads = Offloads(2);
    /// TCP over IPv6.
    pub const TSO6: Offloads = Offloads(4);
    /// TCP with CWR.
    pub const ECN: Offloads = Offloads(8);
    /// UDP, segmented.
    pub const USO: Offloads = Offloads(16);

    /// What a checked header asks for.
    fn asked_by(flags: u8, gso_type: u8) -> Offloads {
        let mut asked = Offloads::NONE;
        // Without GUEST_CSUM a driver may be told neither (virtio 1.2, 5.1.6.4.1).
        if flags & (net_header::NEEDS_CSUM | net_header::DATA_VALID) != 0 {
            asked = asked | Offloads::CSUM;
        }
        if gso_type & net_header::GSO_ECN != 0 {
            asked = asked | Offloads::ECN;
        }
        asked
            | match gso_type & !net_header::GSO_ECN {
                net_header::GSO_TCPV4 => Offloads::TSO4,
                net_header::GSO_TCPV6 => Offloads::TSO6,
                net_header::GSO_UDP_L4 => Offloads::USO,
                _ => Offloads::NONE,
            }
    }

    /// Whether all of `asked` are in here.
    #[inline(always)]
    pub fn include(self, asked: Offloads) -> bool {
        asked.0 & !self.0 == 0
    }
}

impl std::ops::BitOr for Offloads {
    type Output = Offloads;
    fn bitor(self, other: Offloads) -> Offloads {
        Offloads(self.0 | other.0)
    }
}
