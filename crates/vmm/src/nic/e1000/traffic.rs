//! What a batch of frames adds to the statistics registers (13.7).

use super::register::statistics as stat;
use super::registers::Registers;

/// Counts of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    frames: u32,
    bytes: u32,
    multicast: u32,
    broadcast: u32,
    sizes: [u32; 6],
    /// Packets cut into segments.
    pub segmented: u32,
    /// Received frames that were too long.
    pub too_long: u32,
}

/// Upper ends of the first five classes of sizes, check sequence included.
const SIZES: [usize; 5] = [64, 127, 255, 511, 1023];
/// The frame check sequence, which frames here do not have and the registers count.
const FCS: usize = 4;

impl Traffic {
    /// Counts a frame.
    pub fn count(&mut self, frame: &[u8]) {
        let len = frame.len() + FCS;
        self.frames += 1;
        // A batch is at most a few thousand frames of 16 KiB.
        self.bytes = self.bytes.saturating_add(u32::try_from(len).unwrap_or(u32::MAX));
        if frame.starts_with(&[0xFF; 6]) {
            self.broadcast += 1;
        } else if frame.first().is_some_and(|byte| byte & 1 != 0) {
            self.multicast += 1;
        }
        self.sizes[SIZES.iter().position(|&end| len <= end).unwrap_or(SIZES.len())] += 1;
    }

    /// Adds all to what was transmitted.
    pub fn transmitted(&self, registers: &mut Registers) {
        self.add(registers, stat::PTC64, [stat::GPTC, stat::TPT, stat::MPTC, stat::BPTC], [stat::GOTCL, stat::TOTL]);
        registers.count(stat::TSCTC, self.segmented);
    }

    /// Adds all to what was received.
    pub fn received(&self, registers: &mut Registers) {
        self.add(registers, stat::PRC64, [stat::GPRC, stat::TPR, stat::MPRC, stat::BPRC], [stat::GORCL, stat::TORL]);
        registers.count(stat::ROC, self.too_long);
    }

    fn add(&self, registers: &mut Registers, sizes: u32, counts: [u32; 4], bytes: [u32; 2]) {
        for (offset, count) in counts.into_iter().zip([self.frames, self.frames, self.multicast, self.broadcast]) {
            registers.count(offset, count);
        }
        for (class, count) in (0..).zip(self.sizes) {
            registers.count(sizes + 4 * class, count);
        }
        for pair in bytes {
            registers.count_bytes(pair, self.bytes);
        }
    }
}
