//! The guest's virtio-net driver against any device: used rings, headers and buffers of all kinds.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_guest::driver::{DriverConfig, DriverLink, NetDriver, QueueSetup};
use viaduct_guest::features as f;
use viaduct_guest::link::Link;
use viaduct_ring::{Batch, DeviceQueue, Layout, QueueConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest_memory::{Guest, SECOND, SIZE};
use crate::ring::{placed, poke};

const SIZE_OF_QUEUE: u32 = 4;

thread_local! {
    static GUEST: Guest = Guest::default();
    static EVENT: EventFd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
}

fn event() -> OwnedFd {
    // SAFETY: borrowed for the call alone.
    EVENT.with(|event| unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }.try_clone_to_owned().expect("a descriptor"))
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    GUEST.with(|guest| {
        guest.reset();
        let result = play(&mut Unstructured::new(data), guest);
        guest.check();
        result
    })
}

fn play(u: &mut Unstructured, guest: &Guest) -> Result<()> {
    let choice: u8 = u.arbitrary()?;
    let mut features = f::VERSION_1;
    let choices = [
        f::RING_PACKED,
        f::NET_MRG_RXBUF,
        f::NET_CSUM,
        f::NET_GUEST_CSUM,
        f::NET_GUEST_TSO4,
        f::RING_EVENT_IDX,
        f::RING_INDIRECT_DESC,
        f::IN_ORDER,
    ];
    for (bit, feature) in choices.into_iter().enumerate() {
        features |= if choice >> bit & 1 == 1 { feature } else { 0 };
    }
    let layout = if features & f::RING_PACKED != 0 { Layout::Packed } else { Layout::Split };
    let configs = [0, 0x400].map(|start| QueueConfig {
        event_idx: features & f::RING_EVENT_IDX != 0,
        indirect: features & f::RING_INDIRECT_DESC != 0,
        in_order: features & f::IN_ORDER != 0,
        ..placed(layout, SIZE_OF_QUEUE, start)
    });
    let queues = configs.iter().map(|config| QueueSetup { config: *config, kick: event(), call: event() }).collect();
    // Buffers in the second region, because each queue's lie in one.
    let config =
        DriverConfig { memory: guest.memory.clone(), data_addr: SECOND, data_end: SIZE, features, mtu: 576, queues };
    let driver = match NetDriver::new(config, Arc::default()) {
        Ok(driver) => driver,
        // Buffers for segments are larger than this memory.
        Err(_) => return Ok(()),
    };
    let mut link = DriverLink::new(driver);
    // A device that keeps the rules, as far as what the input wrote lets it: so that frames come through.
    let mut honest = configs.map(|config| DeviceQueue::new(guest.memory.clone(), &config).expect("a legal queue"));
    let mut bytes = Vec::new();
    while !u.is_empty() {
        match u.int_in_range(0..=15u8)? {
            0..=3 => {
                let queue = usize::from(u.arbitrary::<bool>()?);
                poke(u, guest, &configs[queue])?;
            }
            4 => {
                let addr = SECOND + u64::from(u.arbitrary::<u16>()? & 0x7fff);
                let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
                guest.write(addr, u.bytes(len)?);
            }
            5..=8 => {
                let mut batch = Batch::default();
                let queue = &mut honest[usize::from(u.int_in_range(0..=3u8)? == 0)];
                if let Ok(found) = queue.peek(&mut batch, u.int_in_range(1..=4)?) {
                    let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
                    let frame = u.bytes(len)?;
                    let written = if u.int_in_range(0..=7u8)? == 0 { u.arbitrary()? } else { len as u32 };
                    queue.consume(&batch.chains[..found]);
                    for chain in &batch.chains {
                        if let Some(span) = batch.writable(chain).first() {
                            let len = frame.len().min(span.len() as usize);
                            // SAFETY: the queue keeps the memory.
                            unsafe { span.write(0, &frame[..len]) };
                        }
                        queue.complete(chain, written);
                    }
                    queue.publish();
                }
            }
            9..=12 => {
                for _ in 0..8 {
                    if !link.receive(&mut bytes) {
                        break;
                    }
                    assert!((14..=SIZE as usize).contains(&bytes.len()), "a frame of {} bytes", bytes.len());
                }
            }
            13 => {
                let len = usize::from(u.int_in_range(14..=255u8)?).min(u.len());
                let mut frame = u.bytes(len)?.to_vec();
                frame.resize(frame.len().max(14), 0);
                link.transmit(&mut frame, None);
                link.can_transmit();
            }
            14 => link.flush(),
            _ => {
                link.prepare_to_sleep(true);
                link.awake();
            }
        }
    }
    Ok(())
}
