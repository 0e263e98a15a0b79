//! A frame's checksum, completed.

use super::{OffloadError, Sum};
use crate::net_header::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NEEDS_CSUM, NetHeader};

/// Length of an Ethernet header without tags: no checksum can start before its end.
const ETHERNET: u16 = 14;

/// Whether what `header` says can be true of a frame of `len` bytes, without a look at the frame. To be asked before
/// the frame is passed on untouched, because the receiver may trust what its device tells it.
///
/// # Errors
/// The first contradiction.
#[inline]
pub fn check(header: &NetHeader, len: usize) -> Result<(), OffloadError> {
    if header.flags & NEEDS_CSUM != 0 {
        checksum_place(header, len)?;
    }
    if header.gso_type == GSO_NONE { Ok(()) } else { check_gso(header) }
}

fn check_gso(header: &NetHeader) -> Result<(), OffloadError> {
    let gso_type = header.gso_type;
    match gso_type {
        GSO_UDP_L4 => {}
        GSO_UDP => return Err(OffloadError::Fragmentation),
        _ if matches!(gso_type & !GSO_ECN, GSO_TCPV4 | GSO_TCPV6) => {}
        _ => return Err(OffloadError::UnknownGso(gso_type)),
    }
    // Both are demanded of a driver that asks for segmentation (virtio 1.2, 5.1.6.2.1).
    if header.flags & NEEDS_CSUM == 0 {
        return Err(OffloadError::NotPartial(gso_type));
    }
    if header.gso_size == 0 {
        return Err(OffloadError::ZeroSize(gso_type));
    }
    Ok(())
}

/// Where the checksum is to be stored.
#[inline]
fn checksum_place(header: &NetHeader, len: usize) -> Result<usize, OffloadError> {
    let (start, offset) = (header.csum_start, header.csum_offset);
    let place = usize::from(start) + usize::from(offset);
    if start < ETHERNET || place + 2 > len {
        return Err(OffloadError::ChecksumPlace { start, offset, len });
    }
    Ok(place)
}

/// Completes the checksum of `frame` if `header` says that it is partial, and takes that out of `header`: the frame may
/// then go to a driver without VIRTIO_NET_F_GUEST_CSUM (virtio 1.2, 5.1.6.4.1). The sum of the pseudo-header is in the
/// place of the checksum already (5.1.6.2.1). For frames with a `gso_type` there is [`segment`](super::segment).
///
/// # Errors
/// [`OffloadError::ChecksumPlace`]; the frame is as it was.
pub fn complete_checksum(frame: &mut [u8], header: &mut NetHeader) -> Result<(), OffloadError> {
    if header.flags & NEEDS_CSUM == 0 {
        return Ok(());
    }
    let place = checksum_place(header, frame.len())?;
    let sum = Sum::default().add_bytes(&frame[usize::from(header.csum_start)..]);
    // Never zero, whatever the protocol: to UDP zero would mean that there is none, and to the others it is the same.
    frame[place..place + 2].copy_from_slice(&sum.finish_nonzero());
    header.flags &= !NEEDS_CSUM;
    (header.csum_start, header.csum_offset) = (0, 0);
    Ok(())
}
