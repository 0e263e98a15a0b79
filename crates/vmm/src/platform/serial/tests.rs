use std::sync::Arc;

use super::super::mock::Pins;
use super::*;

const IRQ: u32 = 4;

fn port(limit: usize) -> (Arc<Pins>, Serial) {
    let pins = Pins::new();
    let line = Line::new(pins.clone(), IRQ).unwrap();
    (pins, Serial::new(line, Output::new(limit).unwrap()))
}

fn read(port: &Serial, offset: u64) -> u8 {
    let mut data = [0];
    port.read(offset, &mut data);
    data[0]
}

fn readable(port: &Serial) -> bool {
    let mut poll = libc::pollfd { fd: port.output().event_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

#[test]
fn what_is_written_is_output() {
    let (_, port) = port(100);
    assert!(!readable(&port));
    for byte in b"hello\n" {
        assert_eq!(read(&port, 5) & 0x60, 0x60, "there is always room");
        port.write(0, &[*byte]);
    }
    assert!(readable(&port));
    assert_eq!(port.output().take(), (b"hello\n".to_vec(), 0));
    assert!(!readable(&port));
}

#[test]
fn of_what_nobody_reads_the_end_is_kept() {
    let (_, port) = port(4);
    for byte in b"lost and found" {
        port.write(0, &[*byte]);
    }
    assert_eq!(port.output().take(), (b"ound".to_vec(), 10));
    port.write(0, b"!");
    assert!(readable(&port));
    assert_eq!(port.output().take(), (b"!".to_vec(), 0));
}

#[test]
fn input_interrupts_until_it_is_read() {
    let (pins, port) = port(1);
    port.write(1, &[1]);
    assert!(!pins.level(IRQ));
    assert_eq!(port.input(b"ab"), 2);
    assert!(pins.level(IRQ));
    assert_eq!(read(&port, 2), 0x04);
    assert_eq!(read(&port, 5) & 1, 1);
    assert_eq!((read(&port, 0), read(&port, 0)), (b'a', b'b'));
    assert!(!pins.level(IRQ));
    assert_eq!(read(&port, 2), 0x01);
    assert_eq!(read(&port, 5) & 1, 0);
    assert_eq!(read(&port, 0), 0, "nothing is there");
}

#[test]
fn a_fifo_says_whether_its_trigger_was_reached() {
    let (_, port) = port(1);
    port.write(2, &[0x81]);
    port.write(1, &[1]);
    port.input(&[1; 7]);
    assert_eq!(read(&port, 2), 0xCC, "timeout: 7 of 8");
    port.input(&[1; 1]);
    assert_eq!(read(&port, 2), 0xC4);
    port.write(2, &[0x83]);
    assert_eq!(read(&port, 2), 0xC1, "cleared");
}

#[test]
fn input_beyond_the_fifo_waits_and_nothing_is_lost() {
    let (pins, port) = port(1);
    port.write(2, &[1]);
    port.write(1, &[1]);
    let sent: Vec<u8> = (0..200).collect();
    assert_eq!(port.input(&sent), 200);
    let mut received = Vec::new();
    while read(&port, 5) & 1 != 0 {
        assert!(pins.level(IRQ));
        received.push(read(&port, 0));
        assert_eq!(port.unread() + received.len(), 200);
    }
    assert_eq!(received, sent);
    assert_eq!(port.input(&vec![0; INPUT_MAX + 17]), INPUT_MAX, "and no more is taken than there is room for");
}

#[test]
fn an_empty_transmitter_interrupts_again_after_each_byte() {
    let (pins, port) = port(100);
    port.write(1, &[2]);
    assert!(pins.level(IRQ), "at once");
    assert_eq!(read(&port, 2), 0x02);
    assert!(!pins.level(IRQ), "reading it ends it");
    assert_eq!(read(&port, 2), 0x01);
    // A driver that turns it off and on again finds it pending again: Linux looks for chips where that is not so.
    port.write(1, &[0]);
    port.write(1, &[2]);
    assert_eq!(read(&port, 2), 0x02);
    let before = pins.rises(IRQ);
    port.write(0, b"x");
    assert_eq!(pins.rises(IRQ), before + 1);
    // Without having read why, the next byte gives an edge as well.
    port.write(0, b"y");
    assert_eq!(pins.rises(IRQ), before + 2);
    port.write(1, &[2]);
    assert_eq!(pins.rises(IRQ), before + 2, "it was on already");
}

#[test]
fn the_most_urgent_cause_is_shown() {
    let (_, port) = port(1);
    port.write(1, &[0x0F]);
    port.input(b"a");
    assert_eq!(read(&port, 2), 0x04);
    read(&port, 0);
    assert_eq!(read(&port, 2), 0x02);
    assert_eq!(read(&port, 2), 0x01);
}

#[test]
fn loopback_as_linux_tries_it() {
    let (_, port) = port(100);
    // autoconfig(): the modem's lines come back.
    port.write(4, &[0x10 | 0x0A]);
    assert_eq!(read(&port, 6) & 0xF0, 0x90);
    port.write(4, &[0x10 | 0x05]);
    assert_eq!(read(&port, 6) & 0xF0, 0x60);
    port.write(2, &[1]);
    for byte in 0..20 {
        port.write(0, &[byte]);
    }
    assert_eq!(port.output().take().0, b"", "nothing leaves");
    assert_eq!(port.input(b"outside"), 7);
    assert_eq!(read(&port, 5) & 3, 3, "there is more than fits");
    assert_eq!(read(&port, 5) & 3, 1);
    let back: Vec<u8> = (0..16).map(|_| read(&port, 0)).collect();
    assert_eq!(back, (0..16).collect::<Vec<u8>>());
    assert_eq!(read(&port, 5) & 1, 0);
    port.write(4, &[0]);
    assert_eq!(read(&port, 0), b'o', "what came meanwhile was kept");
}

#[test]
fn modem_lines_that_change_interrupt_once() {
    let (pins, port) = port(1);
    assert_eq!(read(&port, 6), 0xB0, "somebody is there, and nothing has changed");
    port.write(1, &[8]);
    port.write(4, &[0x10 | 0x04]);
    assert!(pins.level(IRQ));
    assert_eq!(read(&port, 2), 0x00);
    assert_eq!(read(&port, 6), 0x4B, "all but the ring, which has only begun");
    assert!(!pins.level(IRQ));
    port.write(4, &[0x10]);
    assert_eq!(read(&port, 6), 0x04, "and ends");
}

#[test]
fn linux_finds_a_16550a() {
    let (_, port) = port(1);
    // autoconfig(): registers that are there.
    port.write(1, &[0]);
    assert_eq!(read(&port, 1), 0);
    port.write(1, &[0x0F]);
    assert_eq!(read(&port, 1) & 0x0F, 0x0F);
    port.write(7, &[0x5A]);
    assert_eq!(read(&port, 7), 0x5A);
    port.write(2, &[1]);
    assert_eq!(read(&port, 2) >> 6, 3);
    // The divisor hides two registers, and changes neither.
    port.write(3, &[0x83]);
    port.write(0, &[1]);
    port.write(1, &[2]);
    assert_eq!((read(&port, 0), read(&port, 1)), (1, 2));
    port.write(3, &[0x03]);
    assert_eq!(read(&port, 1), 0x0F);
    assert_eq!(port.output().take().0, b"");
    // autoconfig_16550a(): no bit of a 16750, a 16650 or an XR16C850.
    port.write(1, &[0xFF]);
    assert_eq!(read(&port, 1), 0x0F);
}

#[test]
fn a_restored_port_goes_on() {
    let (_, before) = port(1);
    before.write(2, &[1]);
    before.write(1, &[3]);
    before.input(&[7; 40]);
    let (pins, after) = port(1);
    after.restore(before.save()).unwrap();
    assert!(pins.level(IRQ));
    assert_eq!(after.unread(), 40);
    assert_eq!(after.save(), before.save());
    let text = serde_json::to_string(&before.save()).unwrap();
    assert_eq!(serde_json::from_str::<SerialState>(&text).unwrap(), before.save());
    after.reset();
    assert_eq!(read(&after, 1), 0);
    assert!(!pins.level(IRQ));
    assert_eq!(after.unread(), 24, "what was in the FIFO is gone");
    let damaged = SerialState { fifo: vec![0; 17].into(), ..SerialState::default() };
    assert!(after.restore(damaged).unwrap_err().to_string().contains("17 bytes in a FIFO of 16"));
}

#[test]
fn wide_and_outlying_accesses_are_answered() {
    let (_, port) = port(100);
    let mut data = [0; 8];
    port.read(4, &mut data);
    assert_eq!(data[4..], [0xFF; 4]);
    port.write(7, &[1, 2, 3, 4]);
    port.write(u64::MAX - 8, &[0; 8]);
    assert_eq!(port.output().take().0, b"");
}

#[test]
fn who_awaits_room_is_told_once() {
    let (_, port) = port(4);
    port.await_room();
    assert!(readable(&port), "there is room already");
    port.output().take();
    assert_eq!(port.input(&[b'x'; INPUT_MAX + FIFO]), INPUT_MAX);
    port.await_room();
    for unread in (INPUT_MAX / 2 + 2..=INPUT_MAX).rev() {
        assert!(!readable(&port), "{unread} bytes unread");
        read(&port, 0);
    }
    while port.unread() > INPUT_MAX / 2 {
        read(&port, 0);
    }
    assert!(readable(&port));
    port.output().take();
    while port.unread() > 0 {
        assert_eq!(read(&port, 0), b'x');
    }
    assert!(!readable(&port));
}
