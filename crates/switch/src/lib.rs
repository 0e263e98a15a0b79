//! The packet switch: ports, pollers, forwarding, counters.
//!
//! [`Switch`] is the control side. Its pollers carry frames between [ports](port) by the [way of a packet](forward);
//! the parts of that way each have their file: [`frame`] and [`net_header`], [`mac_table`], [`vlan`], the kinds of port
//! ([`vhost`], [`tap`], [`pcap`]) and [`offload`].

mod admission;
mod capture;
pub mod clock;
pub mod counters;
mod event;
mod fabric;
mod forward;
mod frame;
mod frame_pool;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod mac_rights;
pub mod mac_table;
pub mod net_header;
mod null;
pub mod offload;
mod pcap;
mod policer;
mod poller;
pub mod poller_counters;
mod port;
mod sink;
mod software_offload;
mod switch;
mod tap;
mod trace;
mod turns;
mod vhost;
mod vlan;
mod waiting;

pub use admission::Rules;
pub use capture::{Capture, CapturedFrame};
pub use event::Event;
pub use frame::Offloads;
pub use mac_rights::{Flap, LearnStats, Taken};
pub use policer::Rate;
pub use poller::Polling;
pub use switch::{
    PollerStats, PortConfig, PortStats, QueuePosition, QueueState, QueueStats, RuleStats, Switch, SwitchError,
};
pub use trace::{Outcome, Trace, TracedPacket};
pub use vhost::VhostQueue;
pub use vlan::VlanMode;
