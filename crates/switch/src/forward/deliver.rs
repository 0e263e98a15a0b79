//! Step 5, and the end of step 6: each receiver gets its frames, and sees them when the sender has its buffers back.
//!
//! In this order nothing is delivered twice if this process is killed in between: what the sender has back is not read
//! again, and what the receiver has not seen never was there. A frame that overtook another is the exception, because it
//! goes back with that one.

use super::route::{FLOOD, NOWHERE};
use super::{BATCH, Forwarder, bits};
use crate::clock;
use crate::counters::{DropReason, QueueCounters};
use crate::fabric::Fabric;
use crate::frame::{Frame, Outgoing};
use crate::port::{Output, Port};
use crate::sink::{Put, Sink};
use crate::software_offload::SoftwareOffload;
use crate::turns;
use crate::waiting::Company;

impl Forwarder {
    /// Delivers the pending frames, receiver by receiver. Returns those that are dealt with.
    #[inline(always)]
    pub(super) fn deliver(
        &mut self,
        fabric: &Fabric,
        port: &Port,
        counters: &QueueCounters,
        mut pending: u64,
        company: &mut Company,
    ) -> u64 {
        let mut done = 0;
        while pending != 0 {
            let route = self.routes[pending.trailing_zeros() as usize];
            let group = self.group(route, pending);
            pending &= !group;
            done |= match route {
                FLOOD => self.flood(fabric, port, counters, group),
                NOWHERE.. => {
                    let reason = DropReason::ALL[(route - NOWHERE) as usize % DropReason::ALL.len()];
                    counters.drop_frames(reason, u64::from(group.count_ones()));
                    group
                }
                _ => match fabric.port((route >> 16) as u16) {
                    Some(receiver) if receiver.admission.policer.is_none() => {
                        self.deliver_to(receiver, route as u16, group, Some(company))
                    }
                    Some(receiver) => self.deliver_aside(receiver, route as u16, group, Some(company)),
                    None => group,
                },
            };
        }
        done
    }

    /// The pending frames with this route.
    #[inline(always)]
    fn group(&self, route: u32, pending: u64) -> u64 {
        if self.one_route {
            return pending;
        }
        bits(pending).fold(0, |group, index| group | u64::from(self.routes[index] == route) << index)
    }

    /// Sends frames to every other port of their VLAN.
    #[cold]
    fn flood(&mut self, fabric: &Fabric, from: &Port, counters: &QueueCounters, group: u64) -> u64 {
        let mut reached = 0;
        let admitted = self.admit_flood(from, counters, group);
        let hears = |receiver: &&Port| {
            receiver.number != from.number && !(from.admission.private && receiver.admission.private)
        };
        for receiver in fabric.all().filter(hears) {
            let carried = bits(admitted)
                .filter(|&index| receiver.vlan.carries(self.frames[index].vlan))
                .fold(0, |carried, index| carried | 1 << index);
            // A port that is down does not miss floods.
            if carried != 0 && !receiver.live.is_empty() {
                self.deliver_aside(receiver, receiver.live[0], carried, None);
            }
            reached |= carried;
        }
        let unheard = (admitted & !reached).count_ones();
        if unheard != 0 {
            counters.drop_frames(DropReason::NoDestination, u64::from(unheard));
        }
        group
    }

    /// The frames that the port may send to everybody now; the others are counted as dropped.
    fn admit_flood(&self, from: &Port, counters: &QueueCounters, group: u64) -> u64 {
        let Some(floods) = &from.admission.floods else { return group };
        let mut floods = floods.lock();
        floods.fill();
        bits(group).fold(0, |admitted, index| match floods.admit(self.frames[index].destination()) {
            Ok(()) => admitted | 1 << index,
            Err(reason) => {
                counters.drop_frames(reason, 1);
                admitted
            }
        })
    }

    /// The same as [`deliver_to`](Forwarder::deliver_to), off the usual way: no faster than the receiver's rate.
    #[inline(never)]
    fn deliver_aside(&mut self, receiver: &Port, queue: u16, group: u64, company: Option<&mut Company>) -> u64 {
        let Some(policer) = &receiver.admission.policer else {
            return self.deliver_to(receiver, queue, group, company);
        };
        let mut limit = policer.lock();
        limit.fill(clock::ticks());
        let mut admitted = 0;
        for index in bits(group) {
            if limit.is_open() {
                limit.take(self.frames[index].len);
                admitted |= 1 << index;
            }
        }
        let refused = group & !admitted;
        if refused != 0
            && let Some(slot) = receiver.outputs.get(usize::from(queue))
        {
            slot.counters.drop_frames(DropReason::RateLimited, u64::from(refused.count_ones()));
        }
        let done = self.deliver_to(receiver, queue, admitted, company);
        bits(admitted & !done).for_each(|index| limit.give_back(self.frames[index].len));
        refused | done
    }

    /// Delivers the frames of `group` to one queue of one port. Returns those that are dealt with; the others may try
    /// again, if the sender, whose `company` it is, can wait for them.
    #[inline(always)]
    fn deliver_to(&mut self, receiver: &Port, queue: u16, group: u64, company: Option<&mut Company>) -> u64 {
        let Some(slot) = receiver.outputs.get(usize::from(queue)) else { return group };
        let state = &mut *slot.state.lock();
        let counters = &slot.counters;
        self.unseen.push((receiver.number, queue));
        let left = match &mut state.output {
            Output::Vhost(sink) => {
                let left = if sink.is_enabled() { self.put_all(&mut **sink, receiver, counters, group) } else { group };
                // Also what was found before, when the buffers were fetched.
                if let Some(error) = sink.take_error() {
                    self.broken.push((receiver.number, queue, error));
                }
                if !sink.is_enabled() {
                    counters.drop_frames(DropReason::LinkDown, u64::from(left.count_ones()));
                    return group;
                }
                left
            }
            Output::Tap(sink) => self.put_all(sink, receiver, counters, group),
            Output::Record(sink) => self.put_all(&mut **sink, receiver, counters, group),
            Output::Null(sink) => self.put_all(sink, receiver, counters, group),
            Output::Down => {
                counters.drop_frames(DropReason::LinkDown, u64::from(group.count_ones()));
                0
            }
        };
        if left == 0 && state.patience.is_whole() {
            return group;
        }
        let (now, taken) = (clock::ticks(), (group & !left).count_ones());
        if left == 0 {
            state.patience.settle(taken, now, &self.bounds);
            return group;
        }
        let worth_it = state.patience.wait(taken, now, &self.bounds);
        if worth_it && company.is_some_and(|company| company.may_wait(now, &self.bounds)) {
            return group & !left;
        }
        state.patience.give_up();
        counters.drop_frames(DropReason::NoBuffers, u64::from(left.count_ones()));
        group
    }

    /// Shows the receivers what they got.
    #[inline(always)]
    pub(super) fn show(&mut self, fabric: &Fabric) {
        while let Some((port, queue)) = self.unseen.pop() {
            let Some(receiver) = fabric.port(port) else { continue };
            let Some(slot) = receiver.outputs.get(usize::from(queue)) else { continue };
            let notified = match &mut slot.state.lock().output {
                Output::Vhost(sink) => {
                    if !receiver.traces.is_empty() {
                        sink.trace(receiver, queue);
                    }
                    sink.flush()
                }
                Output::Tap(sink) => sink.flush(),
                Output::Record(sink) => sink.flush(),
                Output::Null(sink) => sink.flush(),
                Output::Down => false,
            };
            if notified {
                slot.counters.notifications.add(1);
            }
        }
    }

    /// Puts frames into a sink until there is no more room; returns those that are left.
    #[inline(always)]
    fn put_all<S: Sink>(&mut self, sink: &mut S, receiver: &Port, counters: &QueueCounters, group: u64) -> u64 {
        let all_plain = group & !self.plain == 0 && self.longest <= receiver.max_frame && receiver.captures.is_empty();
        let Forwarder { batch, frames, offload, .. } = self;
        sink.reserve(group.count_ones() as usize);
        let mut left = group;
        let (mut sent, mut bytes, mut completed) = (0, 0, 0);
        // They are all of one VLAN, so the first speaks for all.
        if all_plain && !receiver.vlan.tags(&frames[group.trailing_zeros() as usize % BATCH]) {
            (left, bytes) = sink.put_plain(frames, &batch.spans, group);
            sent = u64::from((group & !left).count_ones());
        }
        for index in bits(left) {
            let frame = &frames[index];
            let tag_out = receiver.vlan.tags(frame);
            let accepted = receiver.accepts.include(frame.offloads());
            let put = if !accepted || frame.len > receiver.max_frame {
                completed += u64::from(frame.len);
                put_unusual(sink, receiver, counters, offload, frame, &frame.outgoing(&batch.spans, tag_out))
            } else if frame.is_simple(tag_out) {
                sink.put_simple(frame, batch.spans[frame.first as usize])
            } else {
                sink.put(&frame.outgoing(&batch.spans, tag_out))
            };
            match put {
                Put::Done => {
                    sent += 1;
                    bytes += u64::from(frame.len);
                    for capture in &receiver.captures {
                        capture.record(&frame.outgoing(&batch.spans, tag_out), false);
                    }
                }
                Put::Full => break,
                Put::TooBig => counters.drop_frames(DropReason::TooBig, 1),
                Put::Failed(reason) => counters.drop_frames(reason, 1),
            }
            left &= !(1 << index);
        }
        counters.frames.add(sent);
        counters.bytes.add(bytes);
        // Completing an offload goes over all bytes some times more.
        self.cost += bytes + turns::COPY * sent + 4 * completed;
        left
    }
}

/// Puts a frame into a sink that does not take it as it is: offloads are completed, and too long frames refused.
#[inline(never)]
fn put_unusual<S: Sink>(
    sink: &mut S,
    receiver: &Port,
    counters: &QueueCounters,
    offload: &mut SoftwareOffload,
    frame: &Frame,
    outgoing: &Outgoing,
) -> Put {
    if !receiver.accepts.include(frame.offloads()) {
        let put = offload.complete_into(sink, outgoing, receiver.max_frame);
        // A checksum that was verified needs no work, only to be kept to ourselves.
        if put == Put::Done && frame.is_unfinished() {
            counters.completed_offloads.add(1);
        }
        return put;
    }
    if frame.is_gso() || frame.untagged_len() <= receiver.max_frame { sink.put(outgoing) } else { Put::TooBig }
}
