//! Feature bits that the driver understands (virtio 1.2, 5.1.3 and chapter 6).

/// The device completes checksums of frames we send.
pub const NET_CSUM: u64 = 1 << 0;
/// We accept frames whose checksum is not complete.
pub const NET_GUEST_CSUM: u64 = 1 << 1;
/// The device says its MTU.
pub const NET_MTU: u64 = 1 << 3;
/// The device says its MAC address.
pub const NET_MAC: u64 = 1 << 5;
/// We accept TCP over IPv4 packets longer than the MTU.
pub const NET_GUEST_TSO4: u64 = 1 << 7;
/// We accept TCP over IPv6 packets longer than the MTU.
pub const NET_GUEST_TSO6: u64 = 1 << 8;
/// We accept UDP over IPv4 packets longer than the MTU.
pub const NET_GUEST_UFO: u64 = 1 << 10;
/// The device takes TCP over IPv4 packets longer than the MTU.
pub const NET_HOST_TSO4: u64 = 1 << 11;
/// The device takes TCP over IPv6 packets longer than the MTU.
pub const NET_HOST_TSO6: u64 = 1 << 12;
/// A received frame may span several buffers.
pub const NET_MRG_RXBUF: u64 = 1 << 15;
/// The device has several queue pairs.
pub const NET_MQ: u64 = 1 << 22;
/// We accept UDP segments over IPv4.
pub const NET_GUEST_USO4: u64 = 1 << 54;
/// We accept UDP segments over IPv6.
pub const NET_GUEST_USO6: u64 = 1 << 55;
/// Descriptors may point to tables of descriptors.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications are asked for by index.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// The device follows the standard, not the legacy interface.
pub const VERSION_1: u64 = 1 << 32;
/// Packed virtqueues.
pub const RING_PACKED: u64 = 1 << 34;
/// Buffers are used in the order in which they were made available.
pub const IN_ORDER: u64 = 1 << 35;

/// Every kind of packet longer than the MTU that a driver can accept.
pub const GUEST_SEGMENTS: u64 = NET_GUEST_TSO4 | NET_GUEST_TSO6 | NET_GUEST_UFO | NET_GUEST_USO4 | NET_GUEST_USO6;

/// What this driver can make use of. A front-end offers the back-end no more than this.
pub const SUPPORTED: u64 = NET_CSUM
    | NET_GUEST_CSUM
    | NET_MTU
    | NET_MAC
    | NET_GUEST_TSO4
    | NET_GUEST_TSO6
    | NET_HOST_TSO4
    | NET_MRG_RXBUF
    | NET_MQ
    | RING_INDIRECT_DESC
    | RING_EVENT_IDX
    | VERSION_1
    | RING_PACKED
    | IN_ORDER;
