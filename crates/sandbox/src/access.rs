//! Files and TCP ports (Landlock, landlock(7)).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};

use crate::SandboxError;

/// What stays possible. Paths that do not exist are left out; each stands for everything below it.
#[derive(Clone, Debug, Default)]
pub struct Allowed<P> {
    /// To be read.
    pub readable: Vec<P>,
    /// To be read and executed.
    pub executable: Vec<P>,
    /// To be read, written, created and removed, but not executed. Devices can be used, not made.
    pub writable: Vec<P>,
    /// TCP ports to listen on. Connecting is never possible.
    pub listen: Vec<u16>,
}

/// How much of it the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// Everything.
    Fully,
    /// What this kernel's version of Landlock can express; before Linux 6.7 that is files without TCP.
    Partly,
    /// It has no Landlock, or did not enable it at boot.
    NotAtAll,
}

/// Leaves the calling thread, and all that it starts, only what is allowed.
///
/// # Errors
/// [`SandboxError::Landlock`]: the kernel has Landlock and refused.
pub fn restrict<P: AsRef<Path>>(allowed: &Allowed<P>) -> Result<Enforced, SandboxError> {
    // Known up to here; what later versions can restrict besides (connecting to sockets, signals) is needed.
    let abi = ABI::V6;
    let files: BitFlags<AccessFs> = AccessFs::from_all(abi);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = (AccessFs::from_write(abi) | read) & !(AccessFs::MakeChar | AccessFs::MakeBlock);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(files)?
        .handle_access(AccessNet::from_all(abi))?
        .create()?
        .add_rules(path_beneath_rules(&allowed.readable, read))?
        .add_rules(path_beneath_rules(&allowed.executable, read | AccessFs::Execute))?
        .add_rules(path_beneath_rules(&allowed.writable, write))?;
    for port in &allowed.listen {
        ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partly,
        RulesetStatus::NotEnforced => Enforced::NotAtAll,
    })
}
