//! Drivers that want to do harm.

use std::time::Duration;

use super::*;

/// Each segment is a byte long: of one packet come more frames than a batch sends, and of a ring of them far more.
#[test]
fn a_batch_ends_however_small_the_segments_are() {
    let computer = Computer::driven(Computer::with(E1000::without_worker));
    let payload: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
    let packet = tcp(&payload);
    computer.store(TX_BUFFERS, &packet);
    let context = [14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40, 1000 | 0x27 << 24 | 54 << 40 | 1 << 48];
    let data = [TX_BUFFERS, packet.len() as u64 | 1 << 20 | 0x2F << 24 | 3 << 40];
    computer.post(&[context, data, data]);
    let mut batches = Vec::new();
    while computer.read(reg::TDH) != 3 {
        let more = computer.card.shared.step();
        assert!(more || computer.read(reg::TDH) == 3, "what is left is done at once");
        batches.push(std::mem::take(&mut computer.wire.lock().sent));
        assert!(batches.len() < 100, "it never ends");
    }
    assert!(batches.iter().all(|batch| batch.len() <= 256), "{:?}", batches.iter().map(Vec::len).collect::<Vec<_>>());
    let frames: Vec<_> = batches.concat();
    assert_eq!(frames.len(), 2000);
    let sent: Vec<_> = frames.iter().map(|frame| frame[54]).collect();
    assert_eq!(sent, payload.repeat(2));
}

#[test]
fn complaints_are_told_once_and_a_few_times() {
    let computer = Computer::driven(Computer::with(E1000::without_worker));
    let mut told = 0;
    for _ in 0..100 {
        computer.write(reg::TDBAL + 4, 0xFF);
        computer.write(reg::TDT, 1);
        computer.card.shared.step();
        told += usize::from(computer.card.take_complaint().is_some());
        assert_eq!(computer.card.take_complaint(), None);
    }
    assert_eq!(told, 16);
    assert!(computer.card.complaint_event().read().is_err(), "nothing waits");
}

#[test]
fn rings_that_point_anywhere_harm_nobody() {
    let computer = Computer::running();
    let mut complaints = Vec::new();
    for (base, len, head, tail) in [
        (!0xF, 256, 0, 5),
        (MEMORY - 32, 256, 0, 15),
        (0, 0xF_FF80, 0, 0xFFF0),
        (0, 0, 0, 5),
        (0, 256, 500, 5),
        (0, 256, 5, 500),
    ] {
        for ring in [reg::TDBAL, reg::RDBAL] {
            computer.write(ring, base as u32);
            computer.write(ring + 4, (base >> 32) as u32);
            computer.write(ring + 8, len);
            computer.write(ring + 0x10, head);
            computer.write(ring + 0x18, tail);
        }
        computer.come([frame(MAC, 60), frame(MAC, 1400)]);
        until("a complaint", || {
            complaints.extend(computer.card.take_complaint());
            !complaints.is_empty()
        });
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(complaints.iter().all(|complaint| complaint.contains("outside the guest's memory")), "{complaints:?}");
    computer.wire.lock().coming.clear();
    computer.start();
    computer.wire.lock().sent.clear();
    computer.store(TX_BUFFERS, &frame(MAC, 61));
    computer.post(&[legacy(TX_BUFFERS, 61, EOP_FCS_RS)]);
    assert_eq!(computer.sent(1), [frame(MAC, 61)]);
}
