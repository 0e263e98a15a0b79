//! Guest memory.
//!
//! # Theory of operation
//!
//! A front-end (QEMU, a DPDK application, our own guest) shares its memory with us as file descriptors. Each is mapped
//! once ([`Mapping`]) and appears as a *region* of an address space ([`GuestMemory`]) under two names: the address the
//! guest's driver puts into descriptors (guest-physical) and the address the front-end uses in its own process
//! (front-end-virtual), in which the vhost-user protocol gives the rings' places.
//!
//! A [`GuestMemory`] never changes: adding or removing a region gives a new one that shares the mappings that stay. A
//! poller keeps the one it started a batch with, so nothing is unmapped under it; the last one to let go unmaps.
//!
//! Behind an IOMMU descriptors hold I/O virtual addresses instead, which an [`iotlb`] translates to front-end-virtual ones.
//!
//! Every byte in there is hostile. It may change at any moment, in the middle of a read, so no Rust reference to it
//! ever exists: it is read and written by volatile, atomic or opaque copies through raw pointers, and a value is read
//! once into a local, checked, and then used. The file behind it may be truncated under us; the fault guard ([`fault`])
//! turns the resulting SIGBUS into a flag on the mapping.

pub mod access;
mod call;
mod dirty_log;
mod discard;
pub mod fault;
mod guest_memory;
pub mod iotlb;
mod mapping;
mod ring_part;
mod span;

pub use call::Call;
pub use dirty_log::DirtyLog;
pub use discard::discard;
pub use guest_memory::{AddressSpace, GuestMemory, MAX_REGIONS, MemoryError, RegionCache, RegionSpec, Window};
pub use mapping::{Mapping, MappingError, memfd};
pub use ring_part::RingPart;
pub use span::Span;
