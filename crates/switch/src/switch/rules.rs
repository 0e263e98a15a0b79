//! The rules of a port, changed while it runs.

use super::{Switch, SwitchError};
use crate::admission::{Admission, Rules, address};
use crate::mac_rights::{Flap, LearnStats};

/// What the rules of a port have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleStats {
    /// Addresses.
    pub learn: LearnStats,
    /// Times that the port's frames had to wait because it sends faster than it may.
    pub waits: u64,
}

impl Switch {
    /// Gives a port other rules. Frames on their way are not touched, and buckets of rates begin full.
    pub fn set_rules(&self, number: u16, rules: &Rules) -> Result<(), SwitchError> {
        let admission = Admission::new(rules);
        let vlans = self.with_port(number, |port| {
            let waits = port.admission.shaper.as_ref().map_or(0, |shaper| shaper.waits.get());
            port.admission = admission;
            if let Some(shaper) = &port.admission.shaper {
                shaper.waits.add(waits);
            }
            port.vlan.clone()
        })?;
        self.macs.rights.set_limit(number, rules.learn_limit);
        let macs: Vec<u64> = rules.macs.iter().map(|mac| address(*mac)).collect();
        self.macs.pin(number, &macs, &vlans);
        Ok(())
    }

    /// What the rules of a port have done.
    pub fn rule_stats(&self, number: u16) -> Result<RuleStats, SwitchError> {
        let fabric = self.fabric.read();
        let port = fabric.port(number).ok_or(SwitchError::NoPort(number))?;
        let waits = port.admission.shaper.as_ref().map_or(0, |shaper| shaper.waits.get());
        Ok(RuleStats { learn: self.macs.rights.stats(number), waits })
    }

    /// Takes the addresses that were seen to go back and forth between ports. The switch's eventfd is written when there
    /// are some.
    pub fn take_flaps(&self) -> Vec<Flap> {
        self.macs.rights.take_flaps()
    }
}
