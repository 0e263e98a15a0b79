//! What the other side did wrong.

/// A virtqueue that breaks the rules. The queue is broken from then on: the owner stops it and tells the front-end.
///
/// Each variant carries what was found and what is allowed, and its text names the section of virtio 1.2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The size is not one the layout allows.
    #[error(
        "queue size {0} is not allowed: a split ring takes a power of two up to 32768, a packed one 1 to 32768 (virtio 1.2, 2.7 and 2.8)"
    )]
    Size(u32),
    /// The saved position lies outside a packed ring.
    #[error("base {found:#x} is not a position in a packed ring of {size} descriptors (virtio 1.2, 2.8.1)")]
    Base {
        /// The base that was asked for.
        found: u32,
        /// Number of descriptors.
        size: u32,
    },
    /// A part of the queue is not aligned as it must be.
    #[error("the {part} at {addr:#x} must be aligned to {align} bytes (virtio 1.2, 2.7 and 2.8.10.1)")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Its front-end-virtual address.
        addr: u64,
        /// The alignment it needs, in bytes.
        align: u64,
    },
    /// A part of the queue does not lie inside one region of the memory that the front-end shared.
    #[error(
        "the {part} at {addr:#x}, {len} bytes, is not inside one shared memory region (vhost-user, SET_VRING_ADDR)"
    )]
    Unmapped {
        /// Which part.
        part: &'static str,
        /// Its front-end-virtual address.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The IOMMU's translation of an address is not known yet. No fault of the driver: the queue waits for it.
    #[error("I/O virtual address {addr:#x} has no translation yet (vhost-user, \"IOMMU support\")")]
    Untranslated {
        /// I/O virtual address, of the ring or of a buffer.
        addr: u64,
    },
    /// The IOMMU does not let the device reach a part of the queue.
    #[error(
        "the {part} at I/O virtual address {addr:#x}, {len} bytes, is not mapped for the device, or not for reading or writing as \
         it must be (vhost-user, \"IOMMU support\")"
    )]
    Forbidden {
        /// Which part.
        part: &'static str,
        /// Its I/O virtual address.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The driver made more available than the queue can hold.
    #[error("the driver made {found} entries available where at most {allowed} fit (virtio 1.2, 2.7.6 and 2.8)")]
    AvailableJump {
        /// Entries (split) or descriptors (packed) that appeared since the last one consumed.
        found: u32,
        /// How many can be outstanding.
        allowed: u32,
    },
    /// An index in the ring points outside the table.
    #[error("descriptor index {found} must be below {allowed} (virtio 1.2, 2.7.5 and 2.7.6)")]
    Index {
        /// The index.
        found: u16,
        /// Entries in the table.
        allowed: u32,
    },
    /// A buffer does not lie in guest memory.
    #[error("buffer at guest address {addr:#x}, {len} bytes, is not in guest memory (virtio 1.2, 2.7.5 and 2.8.13)")]
    Address {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("device-readable descriptor after a device-writable one (virtio 1.2, 2.7.4.2 and 2.8.17)")]
    Order,
    /// The chain has more descriptors than it may have; a loop ends here too.
    #[error("descriptor chain is longer than {allowed} descriptors, or loops (virtio 1.2, 2.7.5.2 and 2.8.17)")]
    ChainLength {
        /// The most it may have.
        allowed: u32,
    },
    /// A packed descriptor list goes on in a descriptor that is not available.
    #[error("descriptor {index} continues a list but is not marked available (virtio 1.2, 2.8.6)")]
    NotAvailable {
        /// Its place in the descriptor ring.
        index: u16,
    },
    /// An indirect descriptor without the feature.
    #[error(
        "indirect descriptor although VIRTIO_F_INDIRECT_DESC was not negotiated (virtio 1.2, 2.7.5.3.1 and 2.8.19)"
    )]
    IndirectNotNegotiated,
    /// NEXT and INDIRECT together, or an indirect descriptor inside a packed list.
    #[error("descriptor with both INDIRECT and NEXT (virtio 1.2, 2.7.5.3.1 and 2.8.19)")]
    IndirectInChain,
    /// An indirect descriptor inside an indirect table.
    #[error("indirect descriptor inside an indirect table (virtio 1.2, 2.7.5.3.1 and 2.8.19)")]
    IndirectNested,
    /// The length of an indirect table is not a positive multiple of 16.
    #[error("indirect table of {found} bytes: it must be a positive multiple of 16 (virtio 1.2, 2.7.5.3 and 2.8.7)")]
    IndirectLength {
        /// The length in bytes.
        found: u32,
    },
    /// An indirect table does not lie in guest memory.
    #[error(
        "indirect table at guest address {addr:#x}, {len} bytes, is not in guest memory (virtio 1.2, 2.7.5.3 and 2.8.7)"
    )]
    IndirectAddress {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The bytes of a chain do not fit into 32 bits.
    #[error(
        "descriptor chain of {found} bytes: at most 2^32 in total, and below that in one direction (virtio 1.2, 2.7.5.2)"
    )]
    TotalLength {
        /// Bytes up to the descriptor that was too much.
        found: u64,
    },
    /// A chain falls into more contiguous pieces than can be counted.
    #[error("buffer falls into more than {allowed} pieces across memory regions: use fewer or larger regions")]
    Pieces {
        /// The most there may be.
        allowed: u32,
    },
    /// The driver gave one buffer id to two buffers at a time.
    #[error("buffer id {id} names two outstanding buffers (virtio 1.2, 2.8)")]
    DuplicateId {
        /// The id.
        id: u16,
    },
    /// The record of chains in flight does not hold a queue's part.
    #[error(
        "a queue's record of {len} bytes at offset {offset:#x} must be aligned to 8 and inside the {found} bytes shared (vhost-user, \"Inflight I/O tracking\")"
    )]
    InflightRange {
        /// Where the part begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// What was shared.
        found: u64,
    },
    /// The record of chains in flight was made by something else.
    #[error(
        "record of chains in flight has version {version} for {descriptors} descriptors, not 1 for {size} (vhost-user, \"Inflight I/O tracking\")"
    )]
    InflightVersion {
        /// The version found.
        version: u16,
        /// The number of descriptors found.
        descriptors: u16,
        /// The size of the queue.
        size: u32,
    },
    /// The record of chains in flight contradicts itself or the ring.
    #[error(
        "{what} {found} in the record of chains in flight, at most {allowed} (vhost-user, \"Inflight I/O tracking\")"
    )]
    InflightRecord {
        /// Which field.
        what: &'static str,
        /// What is there.
        found: u32,
        /// What could be.
        allowed: u32,
    },
    /// The device used more buffers than are outstanding.
    #[error("the device used {found} buffers where {allowed} are outstanding (virtio 1.2, 2.7.8)")]
    UsedJump {
        /// Used elements that appeared.
        found: u32,
        /// Buffers the device holds.
        allowed: u32,
    },
    /// The device used a buffer that it does not hold.
    #[error("the device used buffer {found}, which is not outstanding (virtio 1.2, 2.7.8 and 2.8.2)")]
    NotOutstanding {
        /// The id in the used element.
        found: u32,
    },
    /// The device says that it wrote more than the buffer holds.
    #[error(
        "the device wrote {found} bytes into buffer {id}, which has room for {allowed} (virtio 1.2, 2.7.8.2 and 2.8.4)"
    )]
    UsedLength {
        /// The buffer.
        id: u16,
        /// Bytes the device claims.
        found: u32,
        /// Device-writable bytes.
        allowed: u32,
    },
    /// A buffer that can never be added.
    #[error(
        "a buffer of {found} descriptors cannot be added: 1 to {allowed} are allowed (virtio 1.2, 2.7.5.2 and 2.8.17)"
    )]
    Segments {
        /// Segments given.
        found: usize,
        /// The most there may be.
        allowed: u32,
    },
}
