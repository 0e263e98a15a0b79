//! Capture files of both formats, as a `pcap:` port replays them.

use std::fs::File;
use std::io::{Seek, Write};

use libfuzzer_sys::arbitrary::Result;
use viaduct_switch::fuzzing::read_capture;

use crate::guest_memory::file;

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let mut capture = File::from(file(0));
    capture.write_all(data).and_then(|()| capture.rewind()).expect("memory");
    if let Ok((frames, longest)) = read_capture(capture) {
        assert!(longest <= data.len(), "a frame of {longest} bytes from a file of {}", data.len());
        // Every frame has a record header of its own.
        assert!(frames <= data.len() / 16, "{frames} frames from {} bytes", data.len());
    }
    Ok(())
}
