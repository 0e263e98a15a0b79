//! A queue behind an IOMMU while its guest is migrated: any driver, and a front-end that maps, takes away and refuses what
//! it likes (vhost-user, "IOMMU support" and "Migration").
//!
//! Translations are of whole pages, so what the device may reach is a table of pages. Whatever it does, it touches no page
//! that it may not, and marks each that it changes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_memory::iotlb::{Iotlb, PAGE, Translation};
use viaduct_memory::{DirtyLog, GuestMemory, Mapping, Span};
use viaduct_ring::{Batch, DeviceQueue, Layout, QueueConfig};

use crate::guest_memory::{GUARD, Guest, SIZE, USER, file};
use crate::ring::{config, poke};

/// Where the I/O virtual addresses begin: they end with the address space.
const IOVA: u64 = (PAGES * PAGE).wrapping_neg();
/// Pages of them, a few times as many as the guest has.
const PAGES: u64 = 64;
const GUEST_PAGES: u64 = SIZE.div_ceil(PAGE);
/// Bytes of the log, in the middle of a file whose other bytes must not change.
const LOG: usize = GUEST_PAGES.div_ceil(8) as usize;
/// Steps of one input.
const STEPS: u32 = 120;
const READ: u8 = 1;
const WRITE: u8 = 2;

thread_local!(static STAGE: Stage = Stage::default());

/// What is used again for every input.
struct Stage {
    guest: Guest,
    log: DirtyLog,
    marks: Mapping,
    /// Written to when there is something to ask the front-end for.
    signal: OwnedFd,
}

impl Default for Stage {
    fn default() -> Stage {
        let bytes = (LOG + 2 * GUARD) as u64;
        let fd = file(bytes);
        let log = DirtyLog::new(fd.as_fd(), GUARD as u64, LOG as u64).expect("a legal log");
        let marks = Mapping::new(fd.as_fd(), 0, bytes).expect("a legal mapping");
        let signal = std::fs::File::options().write(true).open("/dev/null").expect("it is there").into();
        Stage { guest: Guest::default(), log, marks, signal }
    }
}

impl Stage {
    /// Takes the marks, as a front-end does; panics if there is one where no page is.
    fn take_marks(&self) -> u64 {
        let mut found = 0;
        for at in 0..LOG + 2 * GUARD {
            // SAFETY: inside our own mapping, which nobody else uses now.
            let byte = unsafe {
                let byte = self.marks.as_ptr().add(at);
                let was = byte.read_volatile();
                byte.write_volatile(0);
                was
            };
            match at.checked_sub(GUARD).filter(|at| *at < LOG) {
                Some(at) => found |= u64::from(byte) << (8 * at),
                None => assert_eq!(byte, 0, "byte {at} of the log's file is none of the log's"),
            }
        }
        found
    }
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    STAGE.with(|stage| {
        stage.guest.reset();
        stage.take_marks();
        let result = play(&mut Unstructured::new(data), stage);
        stage.guest.check();
        result
    })
}

/// What the front-end has said.
struct Platform<'a> {
    stage: &'a Stage,
    iotlb: Arc<Iotlb>,
    /// Of I/O virtual pages: the guest's page and the permissions.
    known: BTreeMap<u64, (u64, u8)>,
    logging: bool,
}

impl Platform<'_> {
    fn memory(&self) -> GuestMemory {
        let memory = self.stage.guest.memory.behind(self.iotlb.clone());
        memory.with_log(self.logging.then(|| self.stage.log.clone())).expect("the log covers the memory")
    }

    /// Whether the device may reach a page of the guest.
    fn allows(&self, page: u64, access: u8) -> bool {
        self.known.values().any(|&(known, permissions)| known == page && permissions & access != 0)
    }

    /// Panics if the device may not reach all of a span.
    fn check_span(&self, span: Span, access: u8) {
        self.stage.guest.check_span(span);
        let first = self.stage.guest.place(span);
        for page in first / PAGE..=(first + u64::from(span.len()) - 1) / PAGE {
            assert!(self.allows(page, access), "page {page} of the guest, access {access}: {:?}", self.known);
        }
    }

    /// Does something with the device; panics if it changes a page that it may not, or does not mark one.
    fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        let guest = &self.stage.guest;
        let before = guest.read(0, SIZE as usize);
        let done = work();
        let after = guest.read(0, SIZE as usize);
        let marks = self.stage.take_marks();
        for page in 0..GUEST_PAGES {
            let bytes = (page * PAGE) as usize..SIZE.min((page + 1) * PAGE) as usize;
            let (changed, marked) = (before[bytes.clone()] != after[bytes], marks >> page & 1 == 1);
            assert!(!changed || self.allows(page, WRITE), "page {page} was written: {:?}", self.known);
            assert!(!changed || marked || !self.logging, "page {page} was written and not marked");
            assert!(!marked || self.logging, "page {page} was marked, and nobody migrates");
            assert!(!marked || self.allows(page, WRITE), "page {page} was marked and cannot have been written");
        }
        assert_eq!(marks >> GUEST_PAGES, 0, "a page was marked that the guest does not have");
        done
    }

    /// A front-end's message. Returns what of the device's knowledge it ends.
    fn say(&mut self, u: &mut Unstructured) -> Result<Option<(u64, u64)>> {
        let (page, count) = (u.int_in_range(0..=PAGES - 1)?, u.int_in_range(1..=4)?);
        let (first, last) = (IOVA + page * PAGE, IOVA.wrapping_add((page + count) * PAGE).wrapping_sub(1));
        match u.int_in_range(0..=7u8)? {
            0..=4 => {
                let (to, permissions) = (u.int_in_range(0..=GUEST_PAGES)?, u.int_in_range(0..=3)?);
                let Ok(new) = Translation::new(first, count * PAGE, USER + to * PAGE, permissions) else {
                    assert!(permissions == 0 || page + count > PAGES, "a legal translation");
                    return Ok(None);
                };
                self.known.extend((0..count).map(|more| (page + more, (to + more, permissions))));
                Ok(self.iotlb.update(new))
            }
            5 | 6 if page + count <= PAGES => {
                self.known.retain(|known, _| !(page..page + count).contains(known));
                self.iotlb.invalidate(first, last);
                Ok(Some((first, last)))
            }
            _ => {
                self.known.clear();
                self.iotlb.invalidate(0, u64::MAX);
                Ok(Some((0, u64::MAX)))
            }
        }
    }
}

fn play(u: &mut Unstructured, stage: &Stage) -> Result<()> {
    let layout = if u.arbitrary()? { Layout::Packed } else { Layout::Split };
    let plain = config(u, layout, 0)?;
    // The ring lies at the guest's beginning, as far as the driver is concerned.
    let shift = |addr: u64| addr - USER + IOVA;
    let behind = QueueConfig {
        descriptor_addr: shift(plain.descriptor_addr),
        driver_addr: shift(plain.driver_addr),
        device_addr: shift(plain.device_addr),
        ..plain
    };
    let iotlb = Arc::new(Iotlb::new(stage.signal.try_clone().expect("a descriptor")));
    let mut platform = Platform { stage, iotlb, known: BTreeMap::new(), logging: u.arbitrary()? };
    let ring = Translation::new(IOVA, 2 * PAGE, USER, READ | WRITE).expect("a legal translation");
    platform.iotlb.update(ring);
    platform.known.extend((0..2).map(|page| (page, (page, READ | WRITE))));
    let Ok(mut device) = DeviceQueue::new(platform.memory(), &behind) else { return Ok(()) };
    platform.watch(|| device.set_log_addr(Some(behind.device_addr)));
    let mut batch = Batch::default();
    // All of the memory is compared at each step.
    for _ in 0..STEPS {
        match u.int_in_range(0..=31u8)? {
            0..=13 => poke(u, &stage.guest, &plain)?,
            14..=21 => serve(u, &platform, &mut device, &mut batch)?,
            22..=25 => {
                if let Some((first, last)) = platform.say(u)? {
                    platform.watch(|| device.translations_removed(first, last));
                }
                platform.watch(|| device.translations_changed());
                platform.iotlb.forget_refusals();
            }
            26 | 27 => {
                for miss in platform.iotlb.take_misses() {
                    assert!(miss.iova.is_multiple_of(PAGE));
                    // It may have been answered, and taken away, meanwhile.
                    let _ = platform.iotlb.refuse(miss);
                }
                platform.watch(|| device.translations_changed());
                platform.iotlb.forget_refusals();
            }
            28 => drop(platform.watch(|| device.enable_notifications())),
            29 => platform.watch(|| device.disable_notifications()),
            30 => {
                platform.logging = u.arbitrary()?;
                let memory = platform.memory();
                // A ring that may not be reached any more breaks the queue.
                let moved = platform.watch(|| device.set_memory(memory));
                assert!(moved.is_ok() || device.broken().is_some());
            }
            _ => {
                let _ = device.give_up_chain();
                batch.clear();
                let found = platform.watch(|| device.look(&mut batch, 16));
                assert_eq!(found, batch.chains.len());
            }
        }
    }
    Ok(())
}

/// Looks at chains, writes into them and gives them back.
fn serve(u: &mut Unstructured, platform: &Platform, device: &mut DeviceQueue, batch: &mut Batch) -> Result<()> {
    batch.clear();
    let found = platform.watch(|| device.peek(batch, 16)).unwrap_or_default();
    for chain in &batch.chains {
        batch.readable(chain).iter().for_each(|span| platform.check_span(*span, READ));
        batch.writable(chain).iter().for_each(|span| platform.check_span(*span, WRITE));
        assert!(!chain.is_refused() || chain.readable_len + chain.writable_len == 0);
    }
    let (take, value) = (u.int_in_range(0..=found)?, u.arbitrary::<u8>()?);
    platform.watch(|| {
        for chain in &batch.chains[..take] {
            for span in batch.writable(chain) {
                // SAFETY: the queue keeps the memory.
                unsafe { span.write(span.len() - 1, &[value]) };
                device.memory().mark_written(*span, span.len());
            }
        }
        device.consume(&batch.chains[..take]);
        device.complete_all(&batch.chains[..take]);
        device.publish()
    });
    Ok(())
}
