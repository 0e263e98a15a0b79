//! The filter of system calls (seccomp(2)), made by seccompiler.
//!
//! Two filters are stacked, and the kernel takes the stricter answer. The first allows what is listed in [`system_calls`]
//! and traps everything else (see [`violation`](crate::violation)). The second answers `clone3` with ENOSYS: its
//! arguments are in memory, where no filter can look, and the C library then takes `clone`, whose flags can be checked:
//! no new namespaces, in which a process would be root again.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::{SandboxError, system, system_calls};

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME (linux/sched.h).
const NAMESPACES: u64 = 0x7e02_0080;

/// Families of sockets that are needed: control and ports, metrics, and interfaces.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

/// Filters the system calls of all threads from now on. [`violation::watch`](crate::violation::watch) comes first.
///
/// # Errors
/// [`SandboxError::System`] if the kernel has no seccomp, [`SandboxError::Filter`].
pub fn install() -> Result<(), SandboxError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        system_calls::allowed().map(|number| (number, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![rule(0, SeccompCmpOp::MaskedEq(NAMESPACES), 0)?]);
    let families: Result<_, _> =
        FAMILIES.iter().map(|family| rule(0, SeccompCmpOp::Eq, u64::from(family.unsigned_abs()))).collect();
    rules.insert(libc::SYS_socket, families?);
    let listed = compile(rules, SeccompAction::Trap, SeccompAction::Allow)?;
    let absent = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let without_clone3 = compile(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), SeccompAction::Allow, absent)?;
    apply(&without_clone3)?;
    apply(&listed)
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(wrong)?;
    SeccompRule::new(vec![condition]).map_err(wrong)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, SandboxError> {
    let filter = SeccompFilter::new(rules, otherwise, listed, ARCH).map_err(wrong)?;
    filter.try_into().map_err(wrong)
}

fn wrong(error: seccompiler::BackendError) -> SandboxError {
    SandboxError::Filter(error.to_string())
}

/// Installs a program in all threads. Not by seccompiler, which does not set SPEC_ALLOW: before Linux 5.16 a filter
/// otherwise switches speculative store bypass off, at the cost of the threads that carry packets.
fn apply(program: &BpfProgram) -> Result<(), SandboxError> {
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let len = u16::try_from(program.len()).map_err(|_| SandboxError::Filter("it is too long".to_owned()))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(system("no_new_privs cannot be set"));
    }
    // SAFETY: a valid program of that length, which the kernel only reads; both structs are the kernel's sock_filter.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) } {
        0 => Ok(()),
        thread if thread > 0 => Err(SandboxError::Filter(format!("thread {thread} has other filters"))),
        _ => Err(system("the seccomp filter cannot be installed")),
    }
}
