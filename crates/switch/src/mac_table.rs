//! The forwarding table: which station is behind which port.
//!
//! # Theory of operation
//!
//! A bucket is one cache line of eight entries, an entry one 64-bit word, so a look-up is one line and eight compares,
//! and no reader can see half an entry: pollers look up and refresh without locks. The word holds
//!
//! ```text
//!   63 ............ 17 | 16       | 15 ....... 4 | 3 .. 0
//!   remainder (47 bits)| moved    | port (12)    | age (4)      0 = free
//! ```
//!
//! The key, VLAN and address, has 60 bits. It is mixed by a bijection with a random seed (so that no guest can aim many
//! addresses at one bucket); 13 bits of the result choose the bucket and the other 47 are stored, so the two together
//! are the whole key and a match is exact (quotienting). An address whose bucket is full goes to a second bucket, chosen
//! by its remainder, with the `moved` bit set; a look-up tries that one only where the first bucket is full.
//!
//! Ages are epochs modulo 16. [`MacTable::tick`] begins an epoch and frees what was last refreshed [`AGE_EPOCHS`] epochs ago.
//! Refreshing happens only when the epoch or the port has changed, so the lines of a busy table stay shared among pollers.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::mac_rights::{MacRights, Taken};
use crate::vlan::VlanMode;

/// Ports are numbered below this.
pub const MAX_PORTS: usize = 4096;
/// Buckets in the table.
const BUCKETS: usize = 1 << BUCKET_BITS;
const BUCKET_BITS: u32 = 13;
const WAYS: usize = 8;
/// Entries live this many epochs without being refreshed.
pub const AGE_EPOCHS: u64 = 14;

const KEY_BITS: u32 = 60;
const KEY_MASK: u64 = (1 << KEY_BITS) - 1;
const TAG_SHIFT: u32 = 16;
const PORT_SHIFT: u32 = 4;
const AGE_MASK: u64 = 15;

/// An address to look up, mixed: compute it early, prefetch, use it later.
#[derive(Clone, Copy, Debug, Default)]
pub struct MacKey {
    bucket: u32,
    /// The remainder in place, with `moved` clear.
    tag: u64,
}

/// An entry as shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacEntry {
    /// The station's address.
    pub mac: [u8; 6],
    /// VLAN, 0 where untagged.
    pub vlan: u16,
    /// Port number.
    pub port: u16,
    /// Epochs since it was last seen.
    pub age: u8,
}

#[repr(align(64))]
#[derive(Debug, Default)]
struct Bucket([AtomicU64; WAYS]);

/// The table. Shared by all pollers.
#[derive(Debug)]
pub struct MacTable {
    buckets: Box<[Bucket; BUCKETS]>,
    /// The current epoch modulo 16.
    epoch: AtomicU64,
    /// Bijection on keys: xor, odd multiplier and its inverse.
    seed: u64,
    multiplier: u64,
    inverse: u64,
    /// Held to insert, so that an address gets one entry; look-ups and refreshes take no lock.
    inserting: Mutex<()>,
    pub(crate) rights: MacRights,
}

impl Default for MacTable {
    fn default() -> MacTable {
        MacTable::new()
    }
}

impl MacTable {
    /// An empty table with a random seed.
    pub fn new() -> MacTable {
        let random = RandomState::new();
        MacTable::with_seed(random.hash_one(1), random.hash_one(2))
    }

    fn with_seed(seed: u64, multiplier: u64) -> MacTable {
        let multiplier = (multiplier | 1) & KEY_MASK;
        // Newton's iteration for the inverse modulo a power of two: each step doubles the number of right bits.
        let mut inverse = multiplier;
        for _ in 0..6 {
            inverse = inverse.wrapping_mul(2u64.wrapping_sub(multiplier.wrapping_mul(inverse)));
        }
        let buckets: Box<[Bucket]> = (0..BUCKETS).map(|_| Bucket::default()).collect();
        MacTable {
            buckets: buckets.try_into().unwrap_or_else(|_| unreachable!("as many as there are")),
            epoch: AtomicU64::new(0),
            seed: seed & KEY_MASK,
            multiplier,
            inverse: inverse & KEY_MASK,
            inserting: Mutex::new(()),
            rights: MacRights::new(),
        }
    }

    /// Mixes an address, of which the 48 low bits count (first byte lowest, as loaded from the frame), and a VLAN.
    #[inline(always)]
    pub fn key(&self, mac: u64, vlan: u16) -> MacKey {
        let key = (mac & 0xffff_ffff_ffff) | u64::from(vlan & 0xfff) << 48;
        // High bits down, then all bits up, then the product's high bits, which depend on everything, down to where the
        // bucket is taken from. Each step can be undone.
        let mut mixed = key ^ self.seed;
        mixed ^= mixed >> 30;
        mixed = mixed.wrapping_mul(self.multiplier) & KEY_MASK;
        mixed ^= mixed >> (KEY_BITS - BUCKET_BITS);
        MacKey { bucket: (mixed as u32) & (BUCKETS as u32 - 1), tag: (mixed >> BUCKET_BITS) << (TAG_SHIFT + 1) }
    }

    fn unmix(&self, bucket: u32, word: u64) -> (u64, u16) {
        let home = if word >> TAG_SHIFT & 1 == 1 { second_bucket(bucket, word) } else { bucket };
        let mut mixed = (word >> (TAG_SHIFT + 1)) << BUCKET_BITS | u64::from(home);
        mixed ^= mixed >> (KEY_BITS - BUCKET_BITS);
        mixed = mixed.wrapping_mul(self.inverse) & KEY_MASK;
        mixed ^= mixed >> 30;
        let key = mixed ^ self.seed;
        (key & 0xffff_ffff_ffff, (key >> 48) as u16)
    }

    /// Fetches the key's bucket into the cache.
    #[inline(always)]
    pub fn prefetch(&self, key: MacKey) {
        viaduct_memory::access::prefetch_read((&raw const self.buckets[key.bucket as usize & (BUCKETS - 1)]).cast());
    }

    /// The entry of `key`, with its place.
    #[inline(always)]
    fn find(&self, key: MacKey) -> Option<(&AtomicU64, u64)> {
        let bucket = &self.buckets[key.bucket as usize & (BUCKETS - 1)];
        let mut full = true;
        for slot in &bucket.0 {
            let word = slot.load(Relaxed);
            if word >> TAG_SHIFT == key.tag >> TAG_SHIFT && word != 0 {
                return Some((slot, word));
            }
            full &= word != 0;
        }
        if full { self.find_moved(key) } else { None }
    }

    #[cold]
    fn find_moved(&self, key: MacKey) -> Option<(&AtomicU64, u64)> {
        let tag = key.tag | 1 << TAG_SHIFT;
        let bucket = &self.buckets[second_bucket(key.bucket, key.tag) as usize];
        bucket.0.iter().find_map(|slot| {
            let word = slot.load(Relaxed);
            (word >> TAG_SHIFT == tag >> TAG_SHIFT).then_some((slot, word))
        })
    }

    /// The port behind which the station is, if it is known.
    #[inline(always)]
    pub fn lookup(&self, key: MacKey) -> Option<u16> {
        self.find(key).map(|(_, word)| port_of(word))
    }

    /// Those of the keys in the set `which` whose stations are to be [learned](MacTable::learn): the others are noted as heard on
    /// `port` a moment ago, as nearly all are, and lie where they are looked for first.
    #[inline(always)]
    pub fn unheard<const N: usize>(&self, keys: &[MacKey; N], which: u64, port: u16) -> u64 {
        let fresh = u64::from(port) << PORT_SHIFT | self.epoch.load(Relaxed);
        let (mut unheard, mut left) = (0, which);
        while left != 0 {
            let key = keys[left.trailing_zeros() as usize % N];
            let bucket = &self.buckets[key.bucket as usize & (BUCKETS - 1)];
            if bucket.0.iter().all(|slot| slot.load(Relaxed) != key.tag | fresh) {
                unheard |= left & left.wrapping_neg();
            }
            left &= left - 1;
        }
        unheard
    }

    /// Notes that the station was heard on `port`. False: its address belongs to another port, which it may not have.
    #[inline(always)]
    pub fn learn(&self, key: MacKey, port: u16) -> bool {
        let fresh = u64::from(port) << PORT_SHIFT | self.epoch.load(Relaxed);
        match self.find(key) {
            Some((_, word)) if word & ((1 << TAG_SHIFT) - 1) == fresh => true,
            Some((slot, word)) => self.refresh(slot, word, key, fresh),
            None => self.insert(key, fresh),
        }
    }

    /// Notes a station as another table has shown it in [`entries`](MacTable::entries).
    pub fn restore(&self, entry: &MacEntry) {
        let [a, b, c, d, e, f] = entry.mac;
        let key = self.key(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), entry.vlan);
        let seen = self.epoch.load(Relaxed).wrapping_sub(entry.age.into()) & AGE_MASK;
        self.insert(key, u64::from(entry.port) << PORT_SHIFT | seen);
    }

    /// The last address that the port lost to another.
    pub fn taken(&self, port: u16) -> Option<Taken> {
        self.rights.taken(port)
    }

    /// Gives an entry another port or age.
    #[cold]
    fn refresh(&self, slot: &AtomicU64, word: u64, key: MacKey, fresh: u64) -> bool {
        let (from, to) = (port_of(word), port_of(fresh));
        let (mac, vlan) = self.unmix(key.bucket, key.tag);
        if from != to {
            if self.rights.is_denied(mac, vlan, to) {
                return false;
            }
            if !self.rights.has_room(to) {
                return true;
            }
        }
        // Lost to a concurrent change of the same entry: that one is as fresh, or the next frame tries again.
        let changed = slot.compare_exchange(word, (word >> TAG_SHIFT) << TAG_SHIFT | fresh, Relaxed, Relaxed).is_ok();
        if changed && from != to {
            self.rights.lost(from);
            self.rights.gained(to);
            self.rights.note_move(mac, vlan, from, to);
        }
        true
    }

    #[cold]
    fn insert(&self, key: MacKey, fresh: u64) -> bool {
        let port = port_of(fresh);
        let (mac, vlan) = self.unmix(key.bucket, key.tag);
        if self.rights.is_denied(mac, vlan, port) {
            return false;
        }
        if self.rights.has_room(port) {
            self.place(key, fresh);
        }
        true
    }

    fn place(&self, key: MacKey, fresh: u64) {
        let _one_at_a_time = self.inserting.lock();
        if self.find(key).is_some() {
            return;
        }
        let port = port_of(fresh);
        let second = second_bucket(key.bucket, key.tag);
        for (bucket, tag) in [(key.bucket, key.tag), (second, key.tag | 1 << TAG_SHIFT)] {
            for slot in &self.buckets[bucket as usize].0 {
                if slot.compare_exchange(0, tag | fresh, Relaxed, Relaxed).is_ok() {
                    self.rights.gained(port);
                    return;
                }
            }
        }
        // Both are full: the oldest of the second one gives way. The first stays full, so the look-up still goes there.
        let epoch = self.epoch.load(Relaxed);
        let age = |slot: &&AtomicU64| epoch.wrapping_sub(slot.load(Relaxed)) & AGE_MASK;
        if let Some(oldest) = self.buckets[second as usize].0.iter().max_by_key(age) {
            let gone = oldest.swap(key.tag | 1 << TAG_SHIFT | fresh, Relaxed);
            self.rights.lost(port_of(gone));
            self.rights.gained(port);
        }
    }

    /// Gives addresses to a port in the VLANs that it carries; they are known from now on, and no other port can have
    /// them. Those that it had before are free.
    pub(crate) fn pin(&self, port: u16, macs: &[u64], vlans: &VlanMode) {
        self.rights.pin(port, macs, vlans);
        self.remove_if(|index, word| {
            let (mac, vlan) = self.unmix(index, word);
            self.rights.is_denied(mac, vlan, port_of(word))
        });
        self.restore_pinned();
    }

    /// Pinned addresses do not age and are not forgotten.
    fn restore_pinned(&self) {
        for (mac, vlan, port) in self.rights.standing() {
            self.learn(self.key(mac, vlan), port);
        }
    }

    /// Begins an epoch: entries not refreshed for [`AGE_EPOCHS`] are freed. Returns how many.
    pub fn tick(&self) -> usize {
        let epoch = (self.epoch.load(Relaxed) + 1) & AGE_MASK;
        self.epoch.store(epoch, Relaxed);
        self.restore_pinned();
        self.remove_if(|_, word| epoch.wrapping_sub(word) & AGE_MASK >= AGE_EPOCHS)
    }

    /// Forgets the stations behind `port`. Returns how many there were.
    pub fn forget_port(&self, port: u16) -> usize {
        let removed = self.remove_if(|_, word| port_of(word) == port);
        self.restore_pinned();
        removed
    }

    /// `condemned` gets an entry and its bucket.
    fn remove_if(&self, condemned: impl Fn(u32, u64) -> bool) -> usize {
        let _no_insertion = self.inserting.lock();
        let mut opened = vec![false; BUCKETS];
        let mut removed = 0;
        for (index, opened) in opened.iter_mut().enumerate() {
            let (here, was_full) = self.remove_from(index, |word| condemned(index as u32, word));
            *opened = was_full && here > 0;
            removed += here;
        }
        self.forget_moved(&mut opened);
        removed
    }

    /// A bucket that is no longer full is no longer followed to the second ones: what moved out of it would be found by
    /// nobody and could be learned twice. It is learned again with its next frame. Its place may have been in a full
    /// bucket too, so this goes on until there are no more of them. Insertions wait, hence all buckets in one go.
    fn forget_moved(&self, opened: &mut [bool]) {
        let mut again = opened.contains(&true);
        while again {
            again = false;
            for index in 0..BUCKETS {
                let moved =
                    |word: u64| word >> TAG_SHIFT & 1 == 1 && opened[second_bucket(index as u32, word) as usize];
                let (here, was_full) = self.remove_from(index, moved);
                if was_full && here > 0 && !opened[index] {
                    opened[index] = true;
                    again = true;
                }
            }
        }
    }

    /// Frees the condemned entries of a bucket. Returns how many, and whether the bucket was full.
    fn remove_from(&self, index: usize, condemned: impl Fn(u64) -> bool) -> (usize, bool) {
        let (mut here, mut was_full) = (0, true);
        for slot in &self.buckets[index].0 {
            let word = slot.load(Relaxed);
            was_full &= word != 0;
            if word != 0 && condemned(word) && slot.compare_exchange(word, 0, Relaxed, Relaxed).is_ok() {
                self.rights.lost(port_of(word));
                here += 1;
            }
        }
        (here, was_full)
    }

    /// All entries, in no order.
    pub fn entries(&self) -> Vec<MacEntry> {
        let epoch = self.epoch.load(Relaxed);
        let mut entries = Vec::new();
        for (index, bucket) in self.buckets.iter().enumerate() {
            for slot in &bucket.0 {
                let word = slot.load(Relaxed);
                if word == 0 {
                    continue;
                }
                let (mac, vlan) = self.unmix(index as u32, word);
                let mut bytes = [0; 6];
                bytes.copy_from_slice(&mac.to_le_bytes()[..6]);
                let age = (epoch.wrapping_sub(word) & AGE_MASK) as u8;
                entries.push(MacEntry { mac: bytes, vlan, port: port_of(word), age });
            }
        }
        entries
    }
}

#[inline(always)]
fn port_of(word: u64) -> u16 {
    (word >> PORT_SHIFT) as u16 & (MAX_PORTS as u16 - 1)
}

/// The other bucket of an entry, from either of them: the distance depends on the remainder alone and is never zero.
fn second_bucket(bucket: u32, word: u64) -> u32 {
    let distance = (word >> (TAG_SHIFT + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BUCKET_BITS);
    bucket ^ (distance as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn mac(n: u64) -> u64 {
        // Locally administered, individual; the varying bytes last on the wire.
        0x02 | n.swap_bytes() >> 16 & !0xff
    }

    fn bytes(mac: u64) -> [u8; 6] {
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&mac.to_le_bytes()[..6]);
        bytes
    }

    #[test]
    fn an_entry_tells_its_address_vlan_and_port() {
        let table = MacTable::new();
        table.learn(table.key(mac(77), 5), 4095);
        assert_eq!(table.entries(), vec![MacEntry { mac: bytes(mac(77)), vlan: 5, port: 4095, age: 0 }]);
        assert_eq!(table.lookup(table.key(mac(77), 5)), Some(4095));
        assert_eq!(table.lookup(table.key(mac(77), 6)), None);
        assert_eq!(table.lookup(table.key(mac(78), 5)), None);
    }

    #[test]
    fn a_restored_station_ages_on() {
        let table = MacTable::new();
        let entry = MacEntry { mac: bytes(mac(7)), vlan: 12, port: 3, age: 5 };
        table.restore(&entry);
        assert_eq!(table.entries(), vec![entry]);
        for _ in 5..AGE_EPOCHS - 1 {
            assert_eq!(table.tick(), 0);
        }
        assert_eq!(table.tick(), 1);
    }

    #[test]
    fn a_station_that_moves_is_found_at_its_new_port() {
        let table = MacTable::new();
        table.learn(table.key(mac(1), 0), 1);
        table.learn(table.key(mac(1), 0), 2);
        assert_eq!(table.lookup(table.key(mac(1), 0)), Some(2));
        assert_eq!(table.entries().len(), 1);
    }

    #[test]
    fn what_is_not_heard_for_its_time_is_forgotten() {
        let table = MacTable::new();
        table.learn(table.key(mac(1), 0), 1);
        table.learn(table.key(mac(2), 0), 1);
        for _ in 1..AGE_EPOCHS {
            assert_eq!(table.tick(), 0);
            table.learn(table.key(mac(2), 0), 1);
        }
        assert_eq!(table.tick(), 1);
        assert_eq!(table.lookup(table.key(mac(1), 0)), None);
        assert_eq!(table.lookup(table.key(mac(2), 0)), Some(1));
    }

    #[test]
    fn twenty_thousand_stations_fit() {
        // Three seeds in a hundred lose one.
        let table = MacTable::with_seed(1, 0x0765_4321_89ab_cdef);
        for n in 0..20_000 {
            table.learn(table.key(mac(n), 0), (n % 64) as u16);
        }
        for n in 0..20_000 {
            assert_eq!(table.lookup(table.key(mac(n), 0)), Some((n % 64) as u16), "station {n}");
        }
    }

    #[test]
    fn an_overfull_table_keeps_working() {
        let table = MacTable::with_seed(1, 0x0765_4321_89ab_cdef);
        for n in 0..200_000 {
            table.learn(table.key(mac(n), 0), 3);
        }
        assert!(table.entries().len() <= BUCKETS * WAYS);
        assert_eq!(table.lookup(table.key(mac(199_999), 0)), Some(3), "the latest is known");
        table.forget_port(3);
        assert!(table.entries().is_empty());
    }

    #[test]
    fn no_entry_stays_where_nobody_looks() {
        let table = MacTable::with_seed(1, 0x0765_4321_89ab_cdef);
        for n in 0..60_000 {
            table.learn(table.key(mac(n), 0), u16::from(n % 50 == 0));
        }
        table.forget_port(1);
        for entry in table.entries() {
            let [a, b, c, d, e, f] = entry.mac;
            let key = table.key(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), 0);
            assert_eq!(table.lookup(key), Some(entry.port), "{entry:?}");
        }
    }

    proptest! {
        /// Against a map: while there is room, the table knows exactly what was learned and not forgotten.
        #[test]
        fn it_is_a_map(seed: u64, multiplier: u64, steps in prop::collection::vec((0u64..400, 0u16..3, 0u16..5, 0u8..20), 1..600)) {
            let table = MacTable::with_seed(seed, multiplier);
            let mut model = HashMap::new();
            for (station, vlan, port, what) in steps {
                if what == 0 {
                    table.forget_port(port);
                    model.retain(|_, p| *p != port);
                } else {
                    table.learn(table.key(mac(station), vlan), port);
                    model.insert((bytes(mac(station)), vlan), port);
                }
            }
            let entries: HashMap<_, _> = table.entries().iter().map(|e| ((e.mac, e.vlan), e.port)).collect();
            // Multipliers may be unlucky: some entries move on; none may be wrong.
            for (key, port) in &entries {
                prop_assert_eq!(model.get(key), Some(port));
            }
            for ((bytes, vlan), port) in &model {
                let mut word = [0; 8];
                word[..6].copy_from_slice(bytes);
                let found = table.lookup(table.key(u64::from_le_bytes(word), *vlan));
                prop_assert_eq!(found, entries.get(&(*bytes, *vlan)).map(|_| *port));
            }
        }
    }
}
