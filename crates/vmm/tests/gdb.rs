//! A stock gdb attaches to a small guest.

mod guest;

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use guest::{CODE, Guest, Recorder, until};
use viaduct_vmm::engine::kvm::Options;
use viaduct_vmm::engine::{Interrupts, Table};
use viaduct_vmm::gdb::GdbServer;
use viaduct_vmm::machine::Event;

/// In real mode: inc dword [0x800]; inc ax; out 0x18, al; jmp to the beginning
const LOOP: &[u8] = &[0x66, 0xFF, 0x06, 0x00, 0x08, 0x40, 0xE6, 0x18, 0xEB, 0xF6];
const AFTER_INC: u64 = CODE + 5;
const AFTER_INC_AX: u64 = CODE + 6;

struct Debugged {
    guest: Guest,
    device: Arc<Recorder>,
    server: GdbServer,
}

fn debugged(vcpus: usize) -> Debugged {
    let guest = Guest::with(LOOP, Options { vcpus, interrupts: Interrupts::None, dirty_ring: None });
    let device = Arc::new(Recorder::new("counted"));
    guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
    guest.machine.start().unwrap();
    let server = GdbServer::new(guest.machine.clone(), 0).unwrap();
    Debugged { guest, device, server }
}

impl Debugged {
    fn gdb(&self, commands: &[&str]) -> String {
        gdb(self.server.address(), commands)
    }

    fn runs(&self) {
        let before = self.device.writes().len();
        until(|| self.device.writes().len() > before);
    }
}

/// What a gdb says that executes these commands.
fn gdb(address: SocketAddr, commands: &[&str]) -> String {
    let mut gdb = Command::new("timeout");
    gdb.args(["--kill-after=5", "100", "gdb", "--nx", "--batch"]);
    gdb.args(["-ex", "set pagination off", "-ex", "set architecture i386:x86-64"]);
    gdb.args(["-ex", &format!("target remote {address}")]);
    gdb.args(commands.iter().flat_map(|command| ["-ex", command]));
    let output = gdb.output().expect("these tests need gdb");
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

fn assert_says(output: &str, words: &[&str]) {
    let mut rest = output;
    for word in words {
        let at = rest.find(word).unwrap_or_else(|| panic!("no {word:?} in the rest of\n{output}"));
        rest = &rest[at + word.len()..];
    }
}

#[test]
fn gdb_reads_and_writes_registers_and_memory() {
    let debugged = debugged(1);
    let output = debugged.gdb(&[
        "set $rbx = 0x123456789abcdef0",
        "p/x $rbx",
        "set $xmm3.uint128 = 77",
        "p $xmm3.uint128",
        "x/10xb 0x1000",
        "set {int}0x900 = 0x12345678",
        "x/1xw 0x900",
        "x/1xb 0xB8000",
    ]);
    assert_says(&output, &["= 0x123456789abcdef0", "= 77", "0x66\t0xff\t0x06", "0x12345678", "Cannot access memory"]);
    assert_eq!(debugged.guest.byte(0x900), 0x78);
    debugged.runs();
}

#[test]
fn gdb_stops_at_breakpoints_and_steps() {
    let debugged = debugged(1);
    let output = debugged.gdb(&[
        &format!("break *{AFTER_INC:#x}"),
        "continue",
        "p/x $rip",
        "x/1xb 0x1005",
        "stepi",
        "p/x $rip",
        "continue",
        "p/x $rip",
        "delete",
        &format!("tbreak *{AFTER_INC_AX:#x}"),
        "continue",
        "p/x $rip",
    ]);
    assert_says(&output, &["Breakpoint 1,", "= 0x1005", "0x40", "= 0x1006", "Breakpoint 1,", "= 0x1005", "= 0x1006"]);
    debugged.runs();
    assert_eq!(debugged.guest.byte(AFTER_INC), 0x40, "no breakpoint is left behind");
}

#[test]
fn vcpus_are_threads() {
    let debugged = debugged(3);
    let output = debugged.gdb(&[
        "info threads",
        "thread 2",
        "set $rcx = 22",
        "thread 3",
        "p $rcx",
        "thread 2",
        "p $rcx",
        &format!("break *{AFTER_INC:#x}"),
        "continue",
        "p/x $rip",
    ]);
    assert_says(
        &output,
        &["Thread 1.1", "Thread 1.2", "Thread 1.3", "= 0", "= 22", " 1, 0x0000000000001005", "= 0x1005"],
    );
    debugged.runs();
}

#[test]
fn gdb_interrupts_a_guest_that_runs() {
    let debugged = debugged(2);
    let output = debugged.gdb(&[
        "python import threading, os, signal",
        "python threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()",
        "continue",
        "p/x $cs",
        "detach",
    ]);
    assert_says(&output, &["SIGINT", "= 0x0"]);
    debugged.runs();
}

#[test]
fn a_server_ends_under_an_attached_gdb() {
    let debugged = debugged(1);
    let address = debugged.server.address();
    let connection = std::net::TcpStream::connect(address).unwrap();
    until(|| debugged.guest.machine.is_paused());
    drop(debugged.server);
    drop(connection);
    let guest = debugged.guest;
    until(|| !guest.machine.is_paused());
}

/// The guest loads a segment that does not exist, and has no handler for that.
fn faulty() -> Debugged {
    let guest = Guest::new(&[0x66, 0xB8, 0x50, 0x00, 0x8E, 0xD8]); // mov ax, 0x50; mov ds, ax
    guest.protected();
    guest
        .machine
        .with_vcpu(0, |vcpu| {
            let mut registers = vcpu.registers()?;
            registers.idt = Table { base: 0, limit: 0 };
            vcpu.set_registers(&registers)
        })
        .unwrap();
    guest.machine.start_paused().unwrap();
    let server = GdbServer::awaited(guest.machine.clone(), 0).unwrap();
    Debugged { guest, device: Arc::new(Recorder::new("none")), server }
}

#[test]
fn a_triple_fault_is_shown_to_gdb_and_then_to_the_owner() {
    for last in ["detach", "continue"] {
        let debugged = faulty();
        let address = debugged.server.address();
        let session = std::thread::spawn(move || gdb(address, &["p/x $eax", "continue", "p/x $eax", last]));
        debugged.guest.wait(|event| matches!(event, Event::TripleFault { .. }));
        assert!(debugged.guest.machine.is_paused());
        // A gdb that has continued waits for the machine's end.
        debugged.guest.machine.stop();
        assert_says(&session.join().unwrap(), &["= 0x0", "SIGSEGV", "= 0x50"]);
    }
}

#[test]
fn what_the_owner_has_paused_stays_paused() {
    let debugged = debugged(1);
    let machine = &debugged.guest.machine;
    machine.request_pause();
    until(|| machine.is_paused());
    debugged.gdb(&["detach"]);
    until(|| !machine.is_debugged() && !machine.is_paused_for_debugger());
    assert!(machine.is_paused());
    machine.resume().unwrap();
    debugged.runs();
}
