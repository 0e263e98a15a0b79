//! The guest's TCP/IP stack against any frames: right in form, so that they get far, and wrong in everything else.

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_guest::checksum;
use viaduct_guest::link::{Link, LinkCapabilities};
use viaduct_guest::stack::{Stack, StackConfig};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A link whose other end is the input.
struct Input {
    frames: std::vec::IntoIter<Vec<u8>>,
}

impl Link for Input {
    fn capabilities(&self) -> LinkCapabilities {
        LinkCapabilities { mtu: 1500, checksum: true, segmentation: true }
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        self.frames.next().is_some_and(|next| {
            *frame = next;
            true
        })
    }

    fn can_transmit(&mut self) -> bool {
        true
    }

    fn transmit(&mut self, frame: &mut [u8], segment: Option<u16>) -> bool {
        assert!(frame.len() >= 14 && (segment.is_some() || frame.len() <= 1514), "{} bytes", frame.len());
        if let Some((start, offset)) = checksum::prepare_partial(frame) {
            assert!(checksum::complete(frame, start, offset));
        }
        true
    }

    fn flush(&mut self) {}

    fn prepare_to_sleep(&mut self, _until_room: bool) -> bool {
        true
    }

    fn wake_fds(&self) -> &[std::os::fd::RawFd] {
        &[]
    }

    fn awake(&mut self) {}

    fn broken(&self) -> Option<String> {
        None
    }
}

/// A frame: ARP, IPv4 or IPv6 with a payload from the input, or nothing but input.
fn frame(u: &mut Unstructured) -> Result<Vec<u8>> {
    let mut frame = [if u.int_in_range(0..=3u8)? == 0 { [0xff; 6] } else { MAC }, PEER].concat();
    let kind = u.int_in_range(0..=7u8)?;
    let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
    let payload = u.bytes(len)?;
    match kind {
        0 => frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]),
        1..=4 => {
            let protocol = [1, 6, 6, 17][usize::from(kind) - 1];
            let total = 20 + payload.len() as u16;
            let mut header = [0x45, 0, 0, 0, 0, 9, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
            header[2..4].copy_from_slice(&total.to_be_bytes());
            if u.int_in_range(0..=7u8)? == 0 {
                // A fragment.
                header[6..8].copy_from_slice(&(u.arbitrary::<u16>()? & 0x3fff).to_be_bytes());
            }
            let sum = !checksum::fold(checksum::sum(&header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([8, 0]);
            frame.extend(header);
        }
        5 | 6 => {
            let next = if kind == 5 { u.arbitrary()? } else { [6, 17, 58, 0][u.choose_index(4)?] };
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((payload.len() as u16).to_be_bytes());
            frame.extend([next, 255]);
            for host in [2, 1] {
                frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]);
            }
        }
        _ => {}
    }
    frame.extend(payload);
    // Most implementations stop at a bad checksum, so it is made good.
    if u.int_in_range(0..=7u8)? != 0
        && let Some((start, offset)) = checksum::prepare_partial(&mut frame)
    {
        checksum::complete(&mut frame, start, offset);
    }
    Ok(frame)
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let config = StackConfig {
        mac: MAC,
        addresses: vec![([10, 0, 0, 1].into(), 24), ([0xfd00, 0, 0, 0, 0, 0, 0, 1].into(), 64)],
        gateways: vec![],
        mtu: 1500,
        seed: 1,
    };
    let mut stack = Stack::new(config).expect("a legal configuration");
    let client = stack.tcp();
    let mut frames = Vec::new();
    let result = (|| {
        while !u.is_empty() && frames.len() < 100 {
            frames.push(frame(u)?);
        }
        Ok(())
    })();
    stack.attach(Box::new(Input { frames: frames.into_iter() }));
    // Who asks and who is asked: the input can answer both.
    stack.connect(client, [10, 0, 0, 2].into(), 80).expect("an address to connect to");
    let server = stack.tcp();
    let socket: &mut smoltcp::socket::tcp::Socket = stack.socket(server);
    socket.listen(7).expect("a port");
    for _ in 0..8 {
        stack.poll();
    }
    result
}
