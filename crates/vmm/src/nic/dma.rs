//! A card's reads and writes of guest memory, at addresses that the guest has chosen.

use viaduct_memory::{GuestMemory, RegionCache, Span};

/// The address is not in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside(pub u64);

/// A memory as a device reaches it, and the region it reached last.
pub struct Dma {
    memory: GuestMemory,
    cache: RegionCache,
}

impl Dma {
    pub fn new(memory: GuestMemory) -> Dma {
        Dma { memory, cache: RegionCache::default() }
    }

    /// Goes on in a new table of regions.
    pub fn set_memory(&mut self, memory: GuestMemory) {
        self.memory = memory;
    }

    /// Reads what may lie in several regions.
    pub fn read(&mut self, addr: u64, bytes: &mut [u8]) -> Result<(), Outside> {
        let mut done = 0;
        while done < bytes.len() {
            let span = self.span(addr, done, bytes.len() - done)?;
            let end = done + span.len() as usize;
            // SAFETY: translated by the memory that we hold, and as long as the piece.
            unsafe { span.read(0, &mut bytes[done..end]) };
            done = end;
        }
        Ok(())
    }

    /// Writes what may lie in several regions, in the order of its bytes.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) -> Result<(), Outside> {
        let mut done = 0;
        while done < bytes.len() {
            let span = self.span(addr, done, bytes.len() - done)?;
            let end = done + span.len() as usize;
            // SAFETY: translated by the memory that we hold, and as long as the piece.
            unsafe { span.write(0, &bytes[done..end]) };
            self.memory.mark_written(span, span.len());
            done = end;
        }
        Ok(())
    }

    /// Writes a word after everything that was written before: for the word by which a driver sees that the rest is there.
    /// The address is a multiple of 8.
    pub fn publish(&mut self, addr: u64, word: u64) -> Result<(), Outside> {
        let span = self.memory.translate(&mut self.cache, addr, 8).ok_or(Outside(addr))?;
        if !span.as_ptr().addr().is_multiple_of(8) {
            return Err(Outside(addr));
        }
        // SAFETY: aligned, and translated by the memory that we hold.
        unsafe { viaduct_memory::access::store_u64(span.as_ptr().cast(), word, std::sync::atomic::Ordering::Release) };
        self.memory.mark_written(span, 8);
        Ok(())
    }

    fn span(&mut self, addr: u64, done: usize, rest: usize) -> Result<Span, Outside> {
        let at = addr.checked_add(done as u64).ok_or(Outside(addr))?;
        let rest = u32::try_from(rest).unwrap_or(u32::MAX);
        self.memory.translate_some(&mut self.cache, at, rest).filter(|span| !span.is_empty()).ok_or(Outside(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_outside_is_refused() {
        let mut dma = Dma::new(GuestMemory::allocate(0x2000).unwrap());
        dma.write(0x1FF0, &[7; 16]).unwrap();
        let mut bytes = [0; 16];
        dma.read(0x1FF0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 16]);
        assert_eq!(dma.read(0x1FF8, &mut bytes), Err(Outside(0x2000)));
        assert_eq!(dma.write(u64::MAX - 3, &bytes), Err(Outside(u64::MAX - 3)));
        assert_eq!(dma.publish(0x2000, 1), Err(Outside(0x2000)));
        assert_eq!(dma.publish(0x1FFC, 1), Err(Outside(0x1FFC)));
        dma.publish(0x1FF8, 0x0102_0304).unwrap();
        dma.read(0x1FF8, &mut bytes[..4]).unwrap();
        assert_eq!(bytes[..4], [4, 3, 2, 1]);
        dma.read(0x9999_9999, &mut []).unwrap();
    }
}
