//! Segments and completed checksums as Wireshark sees them.
//!
//! `cargo test -p viaduct-switch --test offload -- --ignored`

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::frames::Recipe;
use viaduct_switch::net_header::{GSO_NONE, NetHeader};
use viaduct_switch::offload::{complete_checksum, segment};

/// A capture file that goes away with its owner.
struct Capture(PathBuf);

impl Capture {
    /// Classic pcap, version 2.4, Ethernet.
    fn write(name: &str, frames: &[Vec<u8>]) -> Capture {
        let path = std::env::temp_dir().join(format!("viaduct-{}-{name}.pcap", std::process::id()));
        let mut bytes = Vec::new();
        for word in [0xa1b2_c3d4u32, 2 | 4 << 16, 0, 0, 262_144, 1] {
            bytes.extend(word.to_le_bytes());
        }
        for (index, frame) in (0u32..).zip(frames) {
            let len = u32::try_from(frame.len()).unwrap();
            for word in [0, index, len, len] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(frame);
        }
        std::fs::write(&path, bytes).unwrap();
        Capture(path)
    }

    fn tshark(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tshark");
        for protocol in ["ip", "tcp", "udp"] {
            command.args(["-o", &format!("{protocol}.check_checksum:TRUE")]);
        }
        let path: &Path = &self.0;
        let output = command.args(arguments).arg("-r").arg(path).output().expect("tshark is needed (package tshark)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

fn recipes() -> Vec<(&'static str, Recipe)> {
    let plain = Recipe { payload: (0..60_000u32).map(|i| (i % 251) as u8).collect(), ..Recipe::default() };
    vec![
        ("tcp4", plain.clone()),
        ("tcp4-options-tag", Recipe { extra: 8, tags: vec![42], flags: 0x99, ..plain.clone() }),
        ("tcp6", Recipe { v6: true, ..plain.clone() }),
        ("tcp6-extension", Recipe { v6: true, extra: 16, tags: vec![1, 2], gso_size: 536, ..plain.clone() }),
        ("udp4", Recipe { tcp: false, gso_size: 1472, ..plain.clone() }),
        ("udp6", Recipe { tcp: false, v6: true, gso_size: 999, ..plain }),
    ]
}

/// Each line must say what is expected: 1 is "good".
fn assert_all_good(capture: &Capture, recipe: &Recipe, frames: usize) {
    let transport = if recipe.tcp { "tcp.checksum.status" } else { "udp.checksum.status" };
    let table = capture.tshark(&["-T", "fields", "-e", "ip.checksum.status", "-e", transport, "-e", "_ws.malformed"]);
    let expected = if recipe.v6 { "\t1\t" } else { "1\t1\t" };
    assert_eq!(table.lines().count(), frames);
    for line in table.lines() {
        assert_eq!(line, expected);
    }
}

#[test]
#[ignore = "needs tshark"]
fn segments_are_good() {
    for (name, recipe) in recipes() {
        let (frame, header) = recipe.frame();
        let mut frames = Vec::new();
        segment(&frame, &header, |headers, payload| frames.push([headers, payload].concat())).unwrap();
        let capture = Capture::write(name, &frames);
        assert_all_good(&capture, &recipe, frames.len());
        let follow = if recipe.tcp { "follow,tcp,raw,0" } else { "follow,udp,raw,0" };
        let stream: String =
            capture.tshark(&["-q", "-z", follow]).lines().filter(|line| is_hex(line)).collect::<Vec<_>>().concat();
        let payload: String = recipe.payload.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(stream == payload, "{name}: the stream differs");
    }
}

fn is_hex(line: &str) -> bool {
    !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[test]
#[ignore = "needs tshark"]
fn completed_checksums_are_good() {
    for (name, recipe) in recipes() {
        let recipe = Recipe { payload: recipe.payload[..1333].to_vec(), ..recipe };
        let (mut frame, header) = recipe.frame();
        let partial = Capture::write(&format!("{name}-partial"), std::slice::from_ref(&frame));
        // The peer does look: before completion it says "bad".
        let field = if recipe.tcp { "tcp.checksum.status" } else { "udp.checksum.status" };
        assert_eq!(partial.tshark(&["-T", "fields", "-e", field]).trim(), "0", "{name}");
        complete_checksum(&mut frame, &mut NetHeader { gso_type: GSO_NONE, ..header }).unwrap();
        let capture = Capture::write(&format!("{name}-complete"), &[frame]);
        assert_all_good(&capture, &recipe, 1);
    }
}
