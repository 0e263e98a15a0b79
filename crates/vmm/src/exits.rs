//! Where a guest's time goes: how often each vCPU left the guest, why, for which port or address, and how long the answer
//! took.
//!
//! # Theory of operation
//!
//! Each vCPU has a table of its own, which only its thread writes and anybody may read meanwhile: no lock and no atomic
//! read-modify-write is on the way of an exit. An entry is published once, by storing its key last, and never removed;
//! counts are plain stores of growing numbers. The table does not grow: a guest that touches thousands of addresses has
//! those for which there is no place counted together, by reason.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Why a vCPU left the guest, as a person reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Reason {
    /// A read from a port.
    PortRead,
    /// A write to a port.
    PortWrite,
    /// A read from an address without memory.
    MmioRead,
    /// A write to an address without memory.
    MmioWrite,
    /// A write to a port or address that the engine had kept: no exit of its own, it came with the next one.
    PostedWrite,
    /// It was told to, or a signal came.
    Interrupted,
    /// HLT, in a machine without interrupts.
    Halt,
    /// An end of interrupt that the IOAPIC of this process waits for.
    EndOfInterrupt,
    /// The debugger.
    Debug,
    /// Something that ends the run: a triple fault, a system event, a failure.
    End,
}

impl Reason {
    const ALL: [Reason; 10] = [
        Reason::PortRead,
        Reason::PortWrite,
        Reason::MmioRead,
        Reason::MmioWrite,
        Reason::PostedWrite,
        Reason::Interrupted,
        Reason::Halt,
        Reason::EndOfInterrupt,
        Reason::Debug,
        Reason::End,
    ];

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::PortRead => "port read",
            Reason::PortWrite => "port write",
            Reason::MmioRead => "mmio read",
            Reason::MmioWrite => "mmio write",
            Reason::PostedWrite => "posted write",
            Reason::Interrupted => "interrupted",
            Reason::Halt => "halt",
            Reason::EndOfInterrupt => "end of interrupt",
            Reason::Debug => "debug",
            Reason::End => "end",
        }
    }
}

/// Entries of a table; a power of two.
const ENTRIES: usize = 1024;
/// Entries looked at before an address is counted with the rest of its reason.
const PROBES: usize = 16;

/// What has been counted of one kind of exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitCount {
    /// Why.
    pub reason: Reason,
    /// The port or address; `None`: there is none, or many are counted together.
    pub address: Option<u64>,
    /// The device that answered; empty: nobody did.
    pub device: String,
    /// How often.
    pub count: u64,
    /// Time from the exit until the answer was there, all in all.
    pub nanoseconds: u64,
}

#[derive(Default)]
struct Count {
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Count {
    /// Only the vCPU's thread calls, so nothing can come between the load and the store.
    fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.count.store(self.count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        let sum = self.nanoseconds.load(Ordering::Relaxed).wrapping_add(nanoseconds);
        self.nanoseconds.store(sum, Ordering::Relaxed);
    }
}

struct Key {
    reason: Reason,
    address: u64,
    device: Box<str>,
}

#[derive(Default)]
struct Entry {
    key: OnceLock<Key>,
    count: Count,
}

/// The exits of one vCPU.
pub struct ExitTable {
    entries: Box<[Entry]>,
    rest: [Count; Reason::ALL.len()],
    guest: AtomicU64,
}

impl Default for ExitTable {
    fn default() -> ExitTable {
        ExitTable {
            entries: (0..ENTRIES).map(|_| Entry::default()).collect(),
            rest: Default::default(),
            guest: AtomicU64::new(0),
        }
    }
}

impl ExitTable {
    /// Counts an access to `address`, answered by `device` in `time`. Only the vCPU's thread may call.
    pub(crate) fn count_access(&self, reason: Reason, address: u64, device: &str, time: Duration) {
        let hash = (address ^ (reason as u64) << 56).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
        for probe in 0..PROBES {
            let entry = &self.entries[(hash as usize + probe) % ENTRIES];
            let key = entry.key.get_or_init(|| Key { reason, address, device: device.into() });
            if key.reason == reason && key.address == address && *key.device == *device {
                return entry.count.add(time);
            }
        }
        self.count(reason, time);
    }

    /// Counts an exit that has no address. Only the vCPU's thread may call.
    pub(crate) fn count(&self, reason: Reason, time: Duration) {
        self.rest[reason as usize].add(time);
    }

    /// Adds time that the vCPU has spent in the engine: in the guest, or waiting there for an interrupt.
    pub(crate) fn add_guest_time(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.guest.store(self.guest.load(Ordering::Relaxed).wrapping_add(nanoseconds), Ordering::Relaxed);
    }

    /// Nanoseconds that the vCPU has spent in the engine.
    pub fn guest_time(&self) -> u64 {
        self.guest.load(Ordering::Relaxed)
    }

    /// What has been counted until now, in no order.
    pub fn counts(&self) -> Vec<ExitCount> {
        let read = |count: &Count| (count.count.load(Ordering::Relaxed), count.nanoseconds.load(Ordering::Relaxed));
        let accesses = self.entries.iter().filter_map(|entry| {
            let key = entry.key.get()?;
            let (count, nanoseconds) = read(&entry.count);
            Some(ExitCount {
                reason: key.reason,
                address: Some(key.address),
                device: key.device.to_string(),
                count,
                nanoseconds,
            })
        });
        let rest = Reason::ALL.iter().zip(&self.rest).map(|(reason, count)| {
            let (count, nanoseconds) = read(count);
            ExitCount { reason: *reason, address: None, device: String::new(), count, nanoseconds }
        });
        accesses.chain(rest).filter(|count| count.count != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_nanos(7);

    #[test]
    fn exits_are_counted_by_reason_address_and_device() {
        let table = ExitTable::default();
        for _ in 0..3 {
            table.count_access(Reason::PortWrite, 0x3F8, "serial", TIME);
        }
        table.count_access(Reason::PortRead, 0x3F8, "serial", TIME);
        table.count_access(Reason::PortWrite, 0x3F8, "another", TIME);
        table.count(Reason::Halt, TIME);
        let mut counts = table.counts();
        counts.sort_by_key(|count| (count.reason, count.count));
        let found: Vec<_> = counts
            .iter()
            .map(|count| (count.reason, count.address, count.device.as_str(), count.count, count.nanoseconds))
            .collect();
        assert_eq!(
            found,
            [
                (Reason::PortRead, Some(0x3F8), "serial", 1, 7),
                (Reason::PortWrite, Some(0x3F8), "another", 1, 7),
                (Reason::PortWrite, Some(0x3F8), "serial", 3, 21),
                (Reason::Halt, None, "", 1, 7),
            ]
        );
    }

    #[test]
    fn a_guest_cannot_make_the_table_grow() {
        let table = ExitTable::default();
        for address in 0..10_000 {
            table.count_access(Reason::MmioRead, address * 8, "", TIME);
        }
        let counts = table.counts();
        assert!(counts.len() <= ENTRIES + 1);
        assert_eq!(counts.iter().map(|count| count.count).sum::<u64>(), 10_000, "none is lost");
        assert!(counts.iter().any(|count| count.address.is_none() && count.count > 0));
    }
}
