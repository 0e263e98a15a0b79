//! Where a packed ring stands, read from the ring itself.
//!
//! A front-end that lost its back-end cannot ask it for the position any more. In a split ring the used index is in memory;
//! for a packed ring QEMU then says what it said when the queue was started, and a device that believed it would wait for
//! descriptors that passed long ago. But the ring knows better:
//!
//! - AVAIL of each descriptor is the wrap counter of the lap in which the driver last wrote there, whether or not it has been
//!   used since (2.8.1). So the bits change at one place, and that is where the driver stands.
//! - The lap behind the driver is what has been used, then what has not. AVAIL and USED are equal in a used descriptor. This
//!   device marks all descriptors of a list so, not only the first: the others are skipped by the driver (2.8.6) and are the
//!   device's until the first is published, so nobody is told anything by that, except the next device.
//! - A device that was killed between writing used descriptors and publishing them leaves one list that is not used in front of
//!   some that are ([`Standing::gap`]). When that list is used, the driver goes on through those behind it.
//! - A front-end may use descriptors itself while the device is away: QEMU drops what a guest sends while the link is down,
//!   and because it does not know the position either, it does so where it believes the ring to stand. Then there are several
//!   lists in front of such descriptors, and all of them are the gap.
//!
//! That is exact for a device that completes in order, as those of a switch do; for others there is the record of chains in
//! flight. If the ring does not look like this, the base is believed.
//!
//! The driver may be in the middle of its work, and may stay there for as long as nobody lets it run. It writes the first
//! descriptor of what it makes available last, so that one still has the marks of the lap before: a hole, behind which stands
//! what is not published. The driver then stands at the hole. Two pictures need a second look, because they pass when the
//! driver goes on: one that has more holes, as of somebody who looks while descriptors are written; and a ring in which only
//! the last descriptor is used. That is a driver that makes the whole ring available at once; or, if it stays so and the ring
//! is not new, a front-end that has dropped this one buffer.

use crate::descriptor::{AVAIL, Descriptor, NEXT, Position, USED};

/// A buffer that is not used: where, its id and its number of descriptors.
pub(super) type Unused = (Position, u16, u16);

/// What a ring shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// The first descriptor that the driver has not been told is used.
    pub used: Position,
    /// The buffers from there on that are not used, while others behind them are.
    pub gap: Vec<Unused>,
    /// The first descriptor that is not used and has none behind it that is.
    pub next: Position,
    /// Where the driver makes the next one available.
    pub driver: Position,
    /// Whether this may be a driver that is just writing a whole ring.
    pub doubtful: bool,
}

/// Looks at a ring of `size` descriptors, which `load` reads.
pub(super) fn standing(size: u16, load: impl Fn(u16) -> Descriptor) -> Option<Standing> {
    let ring: Vec<Descriptor> = (0..size).map(load).collect();
    let n = ring.len();
    // Places count through two laps, of wrap counter 1 and 0, and on from there.
    let flags = |place: usize| ring[place % n].packed_flags();
    let position = |place: usize| Position { index: (place % n) as u16, wrap: (place / n).is_multiple_of(2) };
    let is_used = |place: &usize| (flags(*place) & AVAIL != 0) == (flags(*place) & USED != 0);

    let (driver, staged) = driver(&ring)?;
    let oldest = driver - n + if staged == 0 { 0 } else { staged + 1 };
    let used = (oldest..driver).find(|place| !is_used(place)).unwrap_or(driver);
    let behind = (used..driver).rev().find(is_used);
    let (driver_at, used_at) = (position(driver), position(used));
    let mut standing = Standing { used: used_at, gap: Vec::new(), next: used_at, driver: driver_at, doubtful: false };
    if let Some(behind) = behind {
        standing.doubtful = used + n == driver && behind + 1 == driver && !(used..behind).any(|place| is_used(&place));
        if standing.doubtful && ring[behind % n].is_blank() {
            return None; // nobody has ever used that one
        }
        let mut place = used;
        while place <= behind {
            if is_used(&place) {
                place += 1;
                continue;
            }
            // The list goes on while NEXT does.
            let last = (place..driver).find(|&place| flags(place) & NEXT == 0)?;
            standing.gap.push((position(place), ring[last % n].id(), (last + 1 - place) as u16));
            place = last + 1;
        }
        standing.next = position(place);
    }
    Some(standing)
}

/// The place where the driver makes the next descriptor available, and how many behind that one it has written already. `None`
/// for a ring that shows no such place.
fn driver(ring: &[Descriptor]) -> Option<(usize, usize)> {
    let n = ring.len();
    let wrap = |index: usize| ring[index].packed_flags() & AVAIL != 0;
    let is_used = |index: usize| wrap(index) == (ring[index].packed_flags() & USED != 0);
    // Descriptors that are of another lap than the one before them. The first has another wrap counter in the same lap.
    let turns = |index: &usize| (wrap(*index) != wrap((index + n - 1) % n)) == (*index != 0);
    let turns: Vec<usize> = (0..n).filter(turns).take(4).collect();
    let (index, staged) = match *turns {
        [index] => (index, 0),
        [a, b, c] => {
            // Where the hole is, where what is staged begins, and where that ends.
            let is_hole = |&(hole, first, end): &(usize, usize, usize)| {
                let mut staged = (0..(end + n - first) % n).map(|ahead| (first + ahead) % n);
                (hole + 1) % n == first && is_used(hole) && !staged.any(is_used)
            };
            let (hole, first, end) = [(a, b, c), (b, c, a), (c, a, b)].into_iter().find(is_hole)?;
            (hole, (end + n - first) % n)
        }
        _ => return None,
    };
    // What stands there is of the lap before.
    Some((index + if wrap(index) { 3 * n } else { 2 * n }, staged))
}

/// Whether a base can be right for a driver that stands at `driver`.
pub(super) fn plausible(size: u16, used: Position, next: Position, driver: Position, at_used: Descriptor) -> bool {
    let place = |position: Position| i32::from(position.index) + if position.wrap { 0 } else { i32::from(size) };
    let behind = |position: Position| (place(driver) - place(position)).rem_euclid(2 * i32::from(size));
    behind(used) <= i32::from(size)
        && behind(next) <= behind(used)
        && at_used.packed_flags() & (AVAIL | USED) != used.used()
}
