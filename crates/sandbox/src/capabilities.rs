//! The powers of root, one by one (capabilities(7)).

use crate::{SandboxError, system};

/// By number (linux/capability.h).
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

const SETPCAP: usize = 8;

/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 bits for each set.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Word {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps those of `keep` that the thread has, gives up all others for good, and returns the names of those kept.
/// Programs that it executes get no more either: `no_new_privs` is set (prctl(2)).
///
/// # Errors
/// [`SandboxError::UnknownCapability`]; [`SandboxError::System`] if the kernel refuses.
pub fn keep_only<S: AsRef<str>>(keep: &[S]) -> Result<Vec<&'static str>, SandboxError> {
    let mut wanted = 0u64;
    for name in keep {
        let number = NAMES.iter().position(|known| *known == name.as_ref());
        wanted |= 1 << number.ok_or_else(|| SandboxError::UnknownCapability(name.as_ref().to_owned()))?;
    }
    let words = get()?;
    let had = u64::from(words[0].permitted) | u64::from(words[1].permitted) << 32;
    // What executed programs may have: giving that up needs a capability itself, so it comes first.
    if had >> SETPCAP & 1 == 1 {
        for number in (0..64).filter(|number| wanted >> number & 1 == 0) {
            // SAFETY: no pointers. It fails for numbers that the kernel does not know.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
        }
    }
    let kept = had & wanted;
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(system("no_new_privs cannot be set"));
    }
    let half = |shift: u32, inheritable: u32| {
        let set = (kept >> shift) as u32;
        Word { effective: set, permitted: set, inheritable: inheritable & set }
    };
    // Ambient capabilities that are no longer inheritable go with this.
    set(&[half(0, words[0].inheritable), half(32, words[1].inheritable)])?;
    Ok(NAMES.iter().enumerate().filter(|(number, _)| kept >> number & 1 == 1).map(|(_, name)| *name).collect())
}

fn get() -> Result<[Word; 2], SandboxError> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut words = [Word::default(); 2];
    // SAFETY: valid locals of the kernel's layout; version 3 writes two words.
    match unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) } {
        0 => Ok(words),
        _ => Err(system("capabilities cannot be read")),
    }
}

fn set(words: &[Word; 2]) -> Result<(), SandboxError> {
    let mut header = Header { version: VERSION, pid: 0 };
    // SAFETY: valid locals of the kernel's layout; version 3 reads two words.
    match unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) } {
        0 => Ok(()),
        _ => Err(system("capabilities cannot be given up")),
    }
}
