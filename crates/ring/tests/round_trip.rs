//! Our driver against our device: what is sent arrives, whatever the layout, size and options.

mod rig;

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;
use rig::{DATA, DATA_LEN, Rig, config};
use viaduct_ring::{Batch, Chain, Layout, PACKED_START, QueueConfig, Segment};

/// Bytes of a buffer element's place; elements have at most so many.
const PLACE: u64 = 64;

/// What one side does next.
#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a buffer with elements of these lengths: device-readable, device-writable.
    Add(Vec<u32>, Vec<u32>),
    DriverPublish,
    /// The driver takes up to so many.
    Take(usize),
    /// The device looks at up to so many chains and takes a part of them, in 256ths.
    Peek(usize, u8),
    /// The device completes up to so many chains; the seed picks which, where that is allowed.
    Complete(usize, u32),
    DevicePublish,
    DriverNotifications(bool),
    DeviceNotifications(bool),
    /// The device is stopped and started anew from its base.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lengths = || prop::collection::vec(prop_oneof![Just(0u32), 1..=PLACE as u32], 0..4);
    let step = prop_oneof![
        6 => (lengths(), lengths()).prop_map(|(out, input)| Step::Add(out, input)),
        4 => prop_oneof![Just((vec![60], vec![])), Just((vec![], vec![64]))].prop_map(|(o, i)| Step::Add(o, i)),
        4 => Just(Step::DriverPublish),
        4 => (0usize..40).prop_map(Step::Take),
        5 => (0usize..40, any::<u8>()).prop_map(|(max, part)| Step::Peek(max, part)),
        5 => (0usize..40, any::<u32>()).prop_map(|(max, seed)| Step::Complete(max, seed)),
        4 => Just(Step::DevicePublish),
        1 => any::<bool>().prop_map(Step::DriverNotifications),
        1 => any::<bool>().prop_map(Step::DeviceNotifications),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..400)
}

fn configs() -> impl Strategy<Value = QueueConfig> {
    let split = (prop_oneof![4 => 0u32..6, 1 => Just(8u32), 1 => Just(15u32)], any::<u16>())
        .prop_map(|(log, base)| QueueConfig { base: base.into(), ..config(Layout::Split, 1 << log) });
    let near_the_end =
        (0u32..6, 65500u32..65536).prop_map(|(log, base)| QueueConfig { base, ..config(Layout::Split, 1 << log) });
    let packed = (
        prop_oneof![6 => 1u32..20, 1 => Just(255u32), 1 => Just(32767u32), 1 => Just(32768u32)],
        any::<bool>(),
        0u32..32768,
    )
        .prop_map(|(size, wrap, index)| {
            let half = (index % size) | (u32::from(wrap) << 15);
            QueueConfig { base: half | half << 16, ..config(Layout::Packed, size) }
        });
    let new = (1u32..40).prop_map(|size| QueueConfig { base: PACKED_START, ..config(Layout::Packed, size) });
    (prop_oneof![split, near_the_end, packed, new], any::<bool>(), any::<bool>(), any::<bool>())
        .prop_map(|(config, event_idx, indirect, in_order)| QueueConfig { event_idx, indirect, in_order, ..config })
}

/// A buffer as the test remembers it.
struct Sent {
    out: Vec<Segment>,
    input: Vec<Segment>,
    content: Vec<u8>,
    /// What the device wrote, once it did.
    answer: Option<Vec<u8>>,
}

struct History {
    rig: Rig,
    config: QueueConfig,
    next_token: u64,
    /// Added and not published, published and not consumed, consumed: tokens in order.
    staged: VecDeque<u64>,
    available: VecDeque<u64>,
    consumed: Vec<(u64, Chain)>,
    /// Completed and not published, published and not taken.
    completed: VecDeque<u64>,
    used: VecDeque<u64>,
    sent: HashMap<u64, Sent>,
    /// Free places for elements.
    places: Vec<u64>,
}

impl History {
    fn new(config: &QueueConfig) -> History {
        History {
            rig: Rig::new(config),
            config: *config,
            next_token: 1 << 40,
            staged: VecDeque::new(),
            available: VecDeque::new(),
            consumed: Vec::new(),
            completed: VecDeque::new(),
            used: VecDeque::new(),
            sent: HashMap::new(),
            places: (0..DATA_LEN / PLACE).map(|i| DATA + i * PLACE).collect(),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add(out, input) => self.add(out, input),
            Step::DriverPublish => {
                self.rig.driver.publish();
                self.available.append(&mut self.staged);
            }
            Step::Take(max) => self.take(*max),
            Step::Peek(max, part) => self.peek(*max, *part),
            Step::Complete(max, seed) => self.complete(*max, *seed),
            Step::DevicePublish => {
                self.rig.device.publish();
                self.used.append(&mut self.completed);
            }
            Step::DriverNotifications(true) => {
                assert_eq!(self.rig.driver.enable_notifications(), !self.used.is_empty());
            }
            Step::DeviceNotifications(true) => {
                assert_eq!(self.rig.device.enable_notifications(), !self.available.is_empty());
            }
            Step::DriverNotifications(false) => self.rig.driver.disable_notifications(),
            Step::DeviceNotifications(false) => self.rig.device.disable_notifications(),
            Step::Restart => {
                // A packed ring is checked against the base; a driver in the middle of a batch can be misread.
                self.step(&Step::DriverPublish);
                self.rig.device.publish();
                self.used.append(&mut self.completed);
                let config = QueueConfig { base: self.rig.device.base(), ..self.config };
                self.rig.device = viaduct_ring::DeviceQueue::new(self.rig.memory.clone(), &config).unwrap();
            }
        }
    }

    fn add(&mut self, out: &[u32], input: &[u32]) {
        let count = out.len() + input.len();
        let mut places = self.places.split_off(self.places.len() - count).into_iter();
        let mut locate =
            |lengths: &[u32]| -> Vec<Segment> { lengths.iter().map(|&len| (places.next().unwrap(), len)).collect() };
        let (out, input) = (locate(out), locate(input));
        let token = self.next_token;
        let mut content = Vec::new();
        for &(addr, len) in &out {
            let bytes: Vec<u8> = (0..len).map(|i| (token as u32 * 31 + i + addr as u32 / 64) as u8).collect();
            self.rig.write(addr, &bytes);
            content.extend(bytes);
        }
        let free = self.rig.driver.free();
        let added = self.rig.driver.add(&out, &input, token);
        // One table for each descriptor of the queue, in an area of 4 MiB.
        let table = if self.config.indirect { (4 << 20) / 16 / self.config.size as usize } else { 0 };
        let slots = if count > 1 && count <= table { 1 } else { count };
        if count == 0 || slots > self.config.size as usize {
            added.unwrap_err();
        } else if added.unwrap() {
            assert_eq!(self.rig.driver.free(), free - slots);
            self.staged.push_back(token);
            self.sent.insert(token, Sent { out, input, content, answer: None });
            self.next_token += 1;
            return;
        } else {
            assert!(free < slots, "refused {slots} descriptors although {free} are free");
        }
        self.places.extend(out.iter().chain(&input).map(|segment| segment.0));
    }

    fn peek(&mut self, max: usize, part: u8) {
        let mut batch = Batch::default();
        let found = self.rig.device.peek(&mut batch, max).unwrap();
        assert_eq!(found, batch.chains.len());
        assert_eq!(found, self.available.len().min(max));
        for (chain, token) in batch.chains.iter().zip(&self.available) {
            let sent = &self.sent[token];
            let mut content = Vec::new();
            for span in batch.readable(chain) {
                let mut bytes = vec![0; span.len() as usize];
                // SAFETY: the rig keeps the memory.
                unsafe { span.read(0, &mut bytes) };
                content.extend(bytes);
            }
            assert_eq!(content, sent.content);
            assert_eq!(chain.readable_len as usize, sent.content.len());
            let lengths: Vec<u32> = batch.writable(chain).iter().map(|span| span.len()).collect();
            let expected: Vec<u32> = sent.input.iter().map(|segment| segment.1).filter(|&len| len > 0).collect();
            assert_eq!(lengths, expected);
            assert_eq!(chain.writable_len, expected.iter().sum::<u32>());
        }
        let take = found * usize::from(part) / 255;
        self.rig.device.consume(&batch.chains[..take]);
        for (chain, token) in batch.chains[..take].iter().zip(self.available.drain(..take).collect::<Vec<_>>()) {
            let answer: Vec<u8> =
                (0..chain.writable_len * (token as u32 % 5) / 4).map(|i| (i * 7 + token as u32) as u8).collect();
            let answer = answer[..answer.len().min(chain.writable_len as usize)].to_vec();
            let mut rest = answer.as_slice();
            for span in batch.writable(chain) {
                let (now, later) = rest.split_at(rest.len().min(span.len() as usize));
                // SAFETY: the rig keeps the memory.
                unsafe { span.write(0, now) };
                rest = later;
            }
            self.sent.get_mut(&token).unwrap().answer = Some(answer);
            self.consumed.push((token, *chain));
        }
    }

    fn complete(&mut self, max: usize, seed: u32) {
        for i in 0..max.min(self.consumed.len()) {
            let at = if self.config.in_order { 0 } else { (seed as usize).wrapping_mul(i + 1) % self.consumed.len() };
            let (token, chain) = self.consumed.remove(at);
            let written = self.sent[&token].answer.as_ref().unwrap().len() as u32;
            self.rig.device.complete(&chain, written);
            self.completed.push_back(token);
        }
    }

    fn take(&mut self, max: usize) {
        let mut used = Vec::new();
        let found = self.rig.driver.take_many(&mut used, max).unwrap();
        assert_eq!(found, used.len());
        assert_eq!(found, self.used.len().min(max));
        for (token, written) in used {
            assert_eq!(Some(token), self.used.pop_front());
            let sent = self.sent.remove(&token).unwrap();
            let mut answer: Vec<u8> = sent.input.iter().flat_map(|&(addr, len)| self.rig.read(addr, len)).collect();
            answer.truncate(written as usize);
            assert_eq!(Some(answer), sent.answer);
            self.places.extend(sent.out.iter().chain(&sent.input).map(|segment| segment.0));
        }
    }

    /// Everything under way comes back.
    fn finish(mut self) {
        self.step(&Step::DriverPublish);
        while !self.sent.is_empty() {
            self.peek(1000, 255);
            self.complete(1000, 17);
            self.step(&Step::DevicePublish);
            self.take(1000);
        }
        assert_eq!(self.rig.driver.free(), self.config.size as usize);
        assert_eq!(self.rig.device.base(), self.rig.driver.base());
        assert!(!self.rig.device.publish() && !self.rig.driver.publish(), "nothing to publish, nobody to notify");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_legal_history_delivers_every_buffer_once(config in configs(), steps in steps()) {
        let mut history = History::new(&config);
        for step in &steps {
            history.step(step);
        }
        history.finish();
    }
}

#[test]
fn a_ring_goes_round_many_times() {
    for config in [config(Layout::Split, 4), config(Layout::Packed, 3), config(Layout::Packed, 1)] {
        let mut history = History::new(&config);
        for round in 0..70_000 / config.size {
            for _ in 0..config.size {
                history.add(&[1 + round % 60], &[]);
            }
            history.step(&Step::DriverPublish);
            history.peek(64, 255);
            history.complete(64, 0);
            history.step(&Step::DevicePublish);
            history.take(64);
        }
        assert!(history.next_token - (1 << 40) > 65536);
        history.finish();
    }
}

#[test]
fn the_largest_rings_can_be_filled() {
    for config in [config(Layout::Split, 32768), config(Layout::Packed, 32768), config(Layout::Packed, 32767)] {
        let mut history = History::new(&config);
        for _ in 0..3 {
            for _ in 0..config.size {
                history.add(&[], &[8]);
            }
            assert_eq!(history.rig.driver.free(), 0);
            history.add(&[], &[8]);
            history.step(&Step::DriverPublish);
            history.peek(40_000, 255);
            history.complete(40_000, 0);
            history.step(&Step::DevicePublish);
            history.take(40_000);
        }
        history.finish();
    }
}
