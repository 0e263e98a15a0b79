//! Who may have which address: quotas, pinned addresses, and addresses that two ports fight for.
//!
//! All of this is asked only when the forwarding table is about to change: for an address that is new, or heard on another
//! port than before. What stays where it is costs nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::clock;
use crate::mac_table::MAX_PORTS;
use crate::vlan::VlanMode;

/// An address went back to a port that it had just left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flap {
    /// The station's address, its 48 bits as loaded from a frame.
    pub mac: u64,
    /// Its VLAN.
    pub vlan: u16,
    /// Between these ports; the second has it now.
    pub ports: (u16, u16),
    /// So often since it was last reported.
    pub times: u64,
}

impl Flap {
    /// The address, byte by byte.
    pub fn mac(&self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.mac.to_le_bytes();
        [a, b, c, d, e, f]
    }
}

/// What one port has learned and was refused.
#[derive(Debug, Default)]
pub(crate) struct PortRights {
    /// Entries of the table that point here.
    learned: AtomicU32,
    /// The most there may be; 0: any number.
    limit: AtomicU32,
    /// Frames whose source was not learned because of the limit.
    unlearned: AtomicU64,
    /// Addresses that came here from another port.
    moved: AtomicU64,
}

/// The same, copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LearnStats {
    /// Addresses known behind the port.
    pub learned: u32,
    /// Frames whose source was not learned because of the port's quota.
    pub unlearned: u64,
    /// Addresses that came here from another port.
    pub moved: u64,
}

/// An address that belongs to a port, in the VLANs that the port carries.
#[derive(Clone, Debug)]
struct Pin {
    port: u16,
    vlans: VlanMode,
}

/// The rights of all ports.
#[derive(Debug)]
pub(crate) struct MacRights {
    ports: Box<[PortRights]>,
    pins: RwLock<HashMap<u64, Vec<Pin>>>,
    moves: Mutex<Moves>,
}

impl MacRights {
    pub fn new() -> MacRights {
        MacRights {
            ports: (0..MAX_PORTS).map(|_| PortRights::default()).collect(),
            pins: RwLock::default(),
            moves: Mutex::default(),
        }
    }

    fn of(&self, port: u16) -> &PortRights {
        &self.ports[usize::from(port) & (MAX_PORTS - 1)]
    }

    pub fn set_limit(&self, port: u16, limit: u32) {
        self.of(port).limit.store(limit, Relaxed);
    }

    /// Whether the port may have another entry. If not, that is counted.
    pub fn has_room(&self, port: u16) -> bool {
        let rights = self.of(port);
        let limit = rights.limit.load(Relaxed);
        let room = limit == 0 || rights.learned.load(Relaxed) < limit;
        if !room {
            rights.unlearned.fetch_add(1, Relaxed);
        }
        room
    }

    /// An entry was made that points to the port.
    pub fn gained(&self, port: u16) {
        self.of(port).learned.fetch_add(1, Relaxed);
    }

    /// An entry that pointed to the port is gone.
    pub fn lost(&self, port: u16) {
        self.of(port).learned.fetch_sub(1, Relaxed);
    }

    pub fn stats(&self, port: u16) -> LearnStats {
        let rights = self.of(port);
        LearnStats {
            learned: rights.learned.load(Relaxed),
            unlearned: rights.unlearned.load(Relaxed),
            moved: rights.moved.load(Relaxed),
        }
    }

    /// The number goes to another port, without rights and counts of this one.
    pub fn reset(&self, port: u16) {
        self.pin(port, &[], &VlanMode::All);
        let rights = self.of(port);
        rights.limit.store(0, Relaxed);
        rights.unlearned.store(0, Relaxed);
        rights.moved.store(0, Relaxed);
        self.moves.lock().taken.retain(|from, taken| *from != port && taken.by != port);
    }

    /// The last address that the port lost.
    pub fn taken(&self, port: u16) -> Option<Taken> {
        self.moves.lock().taken.get(&port).copied()
    }

    /// Gives the addresses to the port, and takes all others from it.
    pub fn pin(&self, port: u16, macs: &[u64], vlans: &VlanMode) {
        let mut pins = self.pins.write();
        pins.retain(|_, owners| {
            owners.retain(|pin| pin.port != port);
            !owners.is_empty()
        });
        for mac in macs {
            pins.entry(*mac).or_default().push(Pin { port, vlans: vlans.clone() });
        }
    }

    /// The port carries other VLANs now, and its addresses with it.
    pub fn move_pins(&self, port: u16, vlans: &VlanMode) {
        for pin in self.pins.write().values_mut().flatten().filter(|pin| pin.port == port) {
            pin.vlans = vlans.clone();
        }
    }

    /// Whether the address belongs to another port.
    pub fn is_denied(&self, mac: u64, vlan: u16, port: u16) -> bool {
        let pins = self.pins.read();
        let Some(owners) = pins.get(&mac) else { return false };
        owners.iter().all(|pin| pin.port != port) && owners.iter().any(|pin| pin.vlans.carries(vlan))
    }

    /// The addresses whose place is known before they are heard, with VLAN and port. Those of a trunk are not: they may be
    /// in many VLANs.
    pub fn standing(&self) -> Vec<(u64, u16, u16)> {
        let vlan = |pin: &Pin| match pin.vlans {
            VlanMode::All => Some(0),
            VlanMode::Access(vlan) => Some(vlan),
            VlanMode::Trunk(_) => None,
        };
        let pins = self.pins.read();
        let entries = pins.iter().flat_map(|(mac, owners)| owners.iter().map(move |pin| (mac, pin)));
        entries.filter_map(|(mac, pin)| Some((*mac, vlan(pin)?, pin.port))).collect()
    }

    /// The address moved.
    pub fn note_move(&self, mac: u64, vlan: u16, from: u16, to: u16) {
        self.of(to).moved.fetch_add(1, Relaxed);
        self.moves.lock().note(mac, vlan, from, to, clock::ticks());
    }

    /// Flaps are signalled on this eventfd.
    pub fn signal(&self, signal: OwnedFd) {
        self.moves.lock().signal = Some(signal.into());
    }

    /// Takes what there is to report.
    pub fn take_flaps(&self) -> Vec<Flap> {
        std::mem::take(&mut self.moves.lock().waiting)
    }
}

/// How many addresses are watched at once.
const WATCHED: usize = 16;
/// A return within this time is a flap.
const BACK: Duration = Duration::from_secs(10);
/// Reports are at least this far apart.
const APART: Duration = Duration::from_secs(1);
/// Reports that wait for someone to take them.
const WAITING: usize = 64;

#[derive(Debug)]
struct Watched {
    flap: Flap,
    /// Last move, in ticks.
    at: u64,
}

/// Tells flaps from moves, and reports them so rarely that the reports do no harm themselves.
#[derive(Debug, Default)]
struct Moves {
    watched: Vec<Watched>,
    waiting: Vec<Flap>,
    reported: Option<u64>,
    signal: Option<File>,
    /// The last address that each port lost.
    taken: HashMap<u16, Taken>,
}

/// An address that a port lost to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The address, first byte lowest.
    pub mac: u64,
    /// VLAN, 0 where untagged.
    pub vlan: u16,
    /// The port behind which it is now.
    pub by: u16,
}

impl Moves {
    fn note(&mut self, mac: u64, vlan: u16, from: u16, to: u16, now: u64) {
        self.taken.insert(from, Taken { mac, vlan, by: to });
        let recent = |watched: &&mut Watched| now.saturating_sub(watched.at) <= clock::in_ticks(BACK);
        let same = |watched: &&mut Watched| (watched.flap.mac, watched.flap.vlan) == (mac, vlan);
        match self.watched.iter_mut().find(same).filter(recent) {
            Some(watched) => {
                watched.flap.times += u64::from(watched.flap.ports == (to, from));
                watched.flap.ports = (from, to);
                watched.at = now;
            }
            None => {
                self.watched.retain(|watched| (watched.flap.mac, watched.flap.vlan) != (mac, vlan));
                if self.watched.len() >= WATCHED {
                    self.watched.remove(0);
                }
                self.watched.push(Watched { flap: Flap { mac, vlan, ports: (from, to), times: 0 }, at: now });
            }
        }
        self.report(now);
    }

    fn report(&mut self, now: u64) {
        if self.reported.is_some_and(|last| now.saturating_sub(last) < clock::in_ticks(APART)) {
            return;
        }
        for Watched { flap, .. } in self.watched.iter_mut().filter(|watched| watched.flap.times > 0) {
            if self.waiting.len() < WAITING {
                self.waiting.push(flap.clone());
            }
            flap.times = 0;
            self.reported = Some(now);
        }
        if self.reported == Some(now)
            && let Some(signal) = &mut self.signal
        {
            let _ = signal.write(&1u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: u64 = 0x0100_0000_0002;

    #[test]
    fn a_quota_counts_what_is_gained_and_lost() {
        let rights = MacRights::new();
        rights.set_limit(3, 1);
        assert!(rights.has_room(3));
        rights.gained(3);
        assert!(!rights.has_room(3));
        assert!(rights.has_room(4), "others have none");
        rights.lost(3);
        assert!(rights.has_room(3));
        assert_eq!(rights.stats(3), LearnStats { learned: 0, unlearned: 1, moved: 0 });
    }

    #[test]
    fn a_pinned_address_is_its_owners_where_the_owner_is() {
        let rights = MacRights::new();
        rights.pin(1, &[MAC], &VlanMode::Access(10));
        assert!(rights.is_denied(MAC, 10, 2));
        assert!(!rights.is_denied(MAC, 10, 1));
        assert!(!rights.is_denied(MAC, 11, 2), "another network");
        assert_eq!(rights.standing(), [(MAC, 10, 1)]);
        rights.pin(1, &[], &VlanMode::All);
        assert!(!rights.is_denied(MAC, 10, 2));
        assert!(rights.standing().is_empty());
    }

    #[test]
    fn a_move_is_no_flap_but_a_return_is() {
        let mut moves = Moves::default();
        let second = clock::ticks_per_second();
        moves.note(MAC, 0, 1, 2, second);
        assert!(moves.waiting.is_empty());
        moves.note(MAC, 0, 2, 1, 2 * second);
        assert_eq!(moves.waiting, [Flap { mac: MAC, vlan: 0, ports: (2, 1), times: 1 }]);
        moves.note(MAC, 0, 1, 2, 30 * second);
        assert_eq!(moves.waiting.len(), 1, "half a minute later it may have been carried there");
    }

    #[test]
    fn reports_are_rare_and_tell_how_often() {
        let mut moves = Moves::default();
        let second = clock::ticks_per_second();
        for n in 0..1000 {
            let (from, to) = if n % 2 == 0 { (1, 2) } else { (2, 1) };
            moves.note(MAC, 0, from, to, second + n);
        }
        assert_eq!(moves.waiting.len(), 1);
        moves.note(MAC, 0, 1, 2, 3 * second);
        let times: Vec<_> = moves.waiting.iter().map(|flap| flap.times).collect();
        assert_eq!(times, [1, 999], "every one of them, in two reports");
    }
}
