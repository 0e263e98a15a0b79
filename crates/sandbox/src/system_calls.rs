//! The system calls that a switch makes, and the interpreter around it, with any C library.
//!
//! `clone` and `socket` are allowed with some arguments only, see [`filter`](crate::filter). `execve` is there for
//! successors of this process, which inherit the filter; so are the calls with which they would restrict themselves.

/// Calls by number and name.
macro_rules! calls {
    ($($call:ident)*) => { &[$((libc::$call, stringify!($call))),*] };
}

type Calls = &'static [(i64, &'static str)];

/// Those that are allowed on every machine.
const EVERYWHERE: Calls = calls! {
    SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2
    SYS_openat SYS_openat2 SYS_close SYS_close_range SYS_fstat SYS_newfstatat SYS_statx SYS_statfs SYS_fstatfs
    SYS_faccessat SYS_faccessat2 SYS_lseek SYS_readlinkat SYS_getdents64 SYS_getcwd SYS_chdir SYS_fchdir SYS_mkdirat
    SYS_renameat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_unlinkat SYS_fchmod SYS_fchmodat SYS_fchown SYS_fchownat
    SYS_truncate SYS_ftruncate SYS_fallocate SYS_fsync SYS_fdatasync SYS_fadvise64 SYS_utimensat SYS_flock SYS_fcntl
    SYS_dup SYS_dup3 SYS_pipe2 SYS_ioctl SYS_copy_file_range SYS_sendfile SYS_splice SYS_umask SYS_memfd_create
    SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch SYS_eventfd2 SYS_signalfd4 SYS_timerfd_create
    SYS_timerfd_settime SYS_timerfd_gettime SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2 SYS_ppoll
    SYS_pselect6 SYS_io_setup SYS_io_submit SYS_io_destroy

    SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_mincore SYS_msync SYS_brk SYS_mlock SYS_mlock2
    SYS_munlock SYS_mlockall SYS_munlockall SYS_membarrier

    SYS_clone3 SYS_execve SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_futex SYS_futex_waitv SYS_set_robust_list
    SYS_get_robust_list SYS_set_tid_address SYS_rseq SYS_gettid SYS_getpid SYS_getppid SYS_tgkill SYS_tkill SYS_kill
    SYS_pidfd_open SYS_pidfd_send_signal SYS_prctl SYS_sched_yield SYS_sched_getaffinity SYS_sched_setaffinity
    SYS_sched_getparam SYS_sched_getscheduler SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_getcpu
    SYS_getpriority SYS_setpriority

    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigsuspend SYS_rt_sigtimedwait
    SYS_rt_sigqueueinfo SYS_sigaltstack SYS_restart_syscall SYS_getitimer SYS_setitimer

    SYS_nanosleep SYS_clock_nanosleep SYS_clock_gettime SYS_clock_getres SYS_gettimeofday SYS_times SYS_timer_create
    SYS_timer_settime SYS_timer_gettime SYS_timer_delete

    SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups SYS_setsid SYS_setpgid
    SYS_getpgid SYS_getsid SYS_capget SYS_capset SYS_getrlimit SYS_setrlimit SYS_prlimit64 SYS_getrusage SYS_uname
    SYS_sysinfo SYS_getrandom

    SYS_socketpair SYS_bind SYS_listen SYS_accept SYS_accept4 SYS_connect SYS_getsockname SYS_getpeername
    SYS_getsockopt SYS_setsockopt SYS_sendto SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg
    SYS_shutdown

    SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self SYS_seccomp
};

/// Older forms of some of them, which newer machines do not have.
#[cfg(target_arch = "x86_64")]
const HERE: Calls = calls! {
    SYS_open SYS_creat SYS_stat SYS_lstat SYS_access SYS_readlink SYS_getdents SYS_mkdir SYS_rmdir SYS_rename SYS_link
    SYS_symlink SYS_unlink SYS_chmod SYS_chown SYS_lchown SYS_utime SYS_utimes SYS_dup2 SYS_pipe SYS_eventfd
    SYS_signalfd SYS_epoll_create SYS_epoll_wait SYS_poll SYS_select SYS_inotify_init SYS_fork SYS_vfork SYS_getpgrp
    SYS_pause SYS_alarm SYS_time SYS_arch_prctl
};
#[cfg(not(target_arch = "x86_64"))]
const HERE: Calls = &[];

/// Calls that a switch never makes and an intruder would like to: named so that a refusal can name them.
const REFUSED: Calls = calls! {
    SYS_clone SYS_socket SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_move_mount SYS_fsopen SYS_fsmount
    SYS_open_tree SYS_setns SYS_unshare SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_kcmp SYS_bpf
    SYS_perf_event_open SYS_userfaultfd SYS_io_uring_setup SYS_io_uring_enter SYS_io_uring_register SYS_init_module
    SYS_finit_module SYS_delete_module SYS_kexec_load SYS_reboot SYS_swapon SYS_swapoff SYS_settimeofday
    SYS_clock_settime SYS_clock_adjtime SYS_adjtimex SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_setresuid
    SYS_setresgid SYS_setgroups SYS_keyctl SYS_add_key SYS_request_key SYS_sethostname SYS_setdomainname SYS_syslog
    SYS_acct SYS_quotactl SYS_mknodat SYS_personality SYS_vhangup SYS_name_to_handle_at SYS_open_by_handle_at
    SYS_pidfd_getfd SYS_execveat SYS_sched_setscheduler SYS_sched_setattr SYS_mbind SYS_move_pages SYS_fanotify_init
    SYS_shmget SYS_shmat SYS_msgget SYS_semget SYS_mq_open
};

/// The numbers of the calls that are allowed with any arguments.
pub(crate) fn allowed() -> impl Iterator<Item = i64> {
    EVERYWHERE.iter().chain(HERE).map(|(number, _)| *number)
}

/// The name of a call, if it is one that is known here. Neither locks nor allocates.
pub(crate) fn name(number: i64) -> Option<&'static str> {
    let known = REFUSED.iter().chain(EVERYWHERE).chain(HERE).find(|(call, _)| *call == number)?;
    known.1.strip_prefix("SYS_")
}
