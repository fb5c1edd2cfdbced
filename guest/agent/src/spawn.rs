//! Starts a process: clone with shared memory (the parent waits, as with vfork), then exec.
//!
//! `fork` would copy the agent's page tables for a child that throws them away at once; `posix_spawn` cannot set users, groups and a
//! controlling terminal. The child runs on a stack of its own in the agent's memory, so between clone and exec it makes system calls
//! only: no allocation, no locks, no libc function that knows about threads (hence `setuid` by number, not by glibc).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use crate::init::{PROCESS_FILES_HARD, PROCESS_FILES_SOFT};

/// Bytes of the child's stack; it needs a few hundred.
const STACK: usize = 32 << 10;

/// `CLONE_INTO_CGROUP` of `linux/sched.h`; libc's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The stack of the child, reused for every process: the parent stands still while it is in use.
pub(crate) struct Stack(Vec<u128>);

impl Stack {
    pub(crate) fn new() -> Self {
        Self(vec![0; STACK / size_of::<u128>()])
    }
}

/// What a child becomes.
pub(crate) struct Command<'a> {
    pub(crate) program: CString,
    pub(crate) args: Vec<CString>,
    pub(crate) envs: Vec<CString>,
    pub(crate) cwd: CString,
    /// Becomes 0, 1 and 2; all above 2.
    pub(crate) descriptors: [BorrowedFd<'a>; 3],
    /// Descriptor 0 is a terminal, which becomes the controlling one.
    pub(crate) terminal: bool,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// Whether user and groups differ from the agent's, so that they have to be set.
    pub(crate) switch_user: bool,
    /// Control group to be born in.
    pub(crate) group: Option<BorrowedFd<'a>>,
}

/// What a child could not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Make the process itself.
    Clone,
    /// Descriptors, session, terminal, limits.
    Prepare,
    /// Become the user.
    User,
    /// Enter the working directory.
    Directory,
    /// Execute the program.
    Exec,
}

/// A child that could not be started.
#[derive(Debug)]
pub(crate) struct SpawnError {
    pub(crate) step: Step,
    pub(crate) error: io::Error,
}

/// Everything that the child needs, as the pointers that system calls take.
struct Plan {
    program: *const libc::c_char,
    args: *const *const libc::c_char,
    envs: *const *const libc::c_char,
    cwd: *const libc::c_char,
    descriptors: [libc::c_int; 3],
    terminal: bool,
    uid: u32,
    gid: u32,
    groups: *const u32,
    group_count: usize,
    switch_user: bool,
    /// Where the child got to.
    step: Step,
    /// Error number of that step.
    errno: libc::c_int,
}

/// Starts a process and returns its id.
pub(crate) fn spawn(stack: &mut Stack, command: &Command<'_>) -> Result<u32, SpawnError> {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, envs) = (pointers(&command.args), pointers(&command.envs));
    let mut plan = Plan {
        program: command.program.as_ptr(),
        args: args.as_ptr(),
        envs: envs.as_ptr(),
        cwd: command.cwd.as_ptr(),
        descriptors: command.descriptors.map(|fd| fd.as_raw_fd()),
        terminal: command.terminal,
        uid: command.uid,
        gid: command.gid,
        groups: command.groups.as_ptr(),
        group_count: command.groups.len(),
        switch_user: command.switch_user,
        step: Step::Clone,
        errno: 0,
    };
    // SAFETY: the stack belongs to us alone for the duration of the call (the borrow is exclusive), and CLONE_VFORK keeps the parent
    // from going on before the child has left this memory by exec or exit, so `plan` and all that it points to outlive the
    // child's use of them.
    let pid = unsafe { clone(&mut stack.0, command.group, &raw mut plan) }
        .map_err(|error| SpawnError { step: Step::Clone, error })?;
    // SAFETY: `plan` is ours. The child wrote it behind the compiler's back, so it is read as volatile.
    let (step, errno) =
        unsafe { (ptr::read_volatile(&raw const plan.step), ptr::read_volatile(&raw const plan.errno)) };
    if errno != 0 {
        // The child has exited without ever having been a process of the host's; nobody else waits for it, because the reaper
        // runs on this thread.
        // SAFETY: waitpid accepts a null pointer for the status.
        unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
        return Err(SpawnError { step, error: io::Error::from_raw_os_error(errno) });
    }
    Ok(pid.unsigned_abs())
}

/// Makes a child that runs [`child`] on the given stack, in the given control group. Returns when the child has executed or exited.
///
/// # Safety
/// `plan` must be valid with all that it points to.
#[cfg(target_arch = "x86_64")]
unsafe fn clone(
    stack: &mut [u128],
    group: Option<BorrowedFd<'_>>,
    plan: *mut Plan,
) -> io::Result<libc::pid_t> {
    // SAFETY: clone_args is plain data, for which zero is a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_VM | libc::CLONE_VFORK) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = size_of_val(stack) as u64;
    if let Some(group) = group {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = group.as_raw_fd().unsigned_abs().into();
    }
    let result: i64;
    // SAFETY: the child begins behind the system call with the top of the new stack, which is aligned to 16 bytes as a call needs it,
    // and with the registers of the parent; it calls `child`, which never returns. The parent skips this. A system call changes
    // rax, rcx and r11 only.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const args,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") child as extern "C" fn(*mut libc::c_void) -> libc::c_int,
            in("r13") plan,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO))),
    }
}

/// As above, for hosts on which the agent is only tested: there are no control groups.
///
/// # Safety
/// `plan` must be valid with all that it points to.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn clone(stack: &mut [u128], _: Option<BorrowedFd<'_>>, plan: *mut Plan) -> io::Result<libc::pid_t> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the top of the stack is aligned to 16 bytes, and the caller vouches for the plan.
    let pid = unsafe { libc::clone(child, stack.as_mut_ptr_range().end.cast(), flags, plan.cast()) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
}

/// The child's life before exec.
extern "C" fn child(plan: *mut libc::c_void) -> libc::c_int {
    let plan = plan.cast::<Plan>();
    // SAFETY: the parent passed a pointer to its plan and stands still; only system calls follow.
    unsafe {
        let errno = become_program(&mut *plan);
        (*plan).errno = errno;
        libc::_exit(127)
    }
}

/// Carries the plan out; returns the error number of the step that failed, never on success.
///
/// # Safety
/// To be called in the child only, with a plan whose pointers are valid.
unsafe fn become_program(plan: &mut Plan) -> libc::c_int {
    /// Leaves the function with the error number when a system call has failed.
    macro_rules! check {
        ($call:expr) => {
            if i64::from($call) < 0 {
                return *libc::__errno_location();
            }
        };
    }
    // SAFETY: as promised by the caller; errno is the parent thread's, which stands still.
    unsafe {
        plan.step = Step::Prepare;
        check!(libc::setsid());
        for (number, fd) in (0..).zip(plan.descriptors) {
            check!(libc::dup2(fd, number));
        }
        if plan.terminal {
            check!(libc::ioctl(0, libc::TIOCSCTTY, 0));
        }
        // Rust ignores SIGPIPE, and the agent blocks SIGCHLD; programs expect neither.
        let default: libc::sigaction = std::mem::zeroed();
        check!(libc::sigaction(libc::SIGPIPE, &raw const default, ptr::null_mut()));
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check!(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()));
        // Before the user changes: afterwards the hard limit cannot be lowered and raised at will. Best effort without privileges.
        let files = libc::rlimit { rlim_cur: PROCESS_FILES_SOFT, rlim_max: PROCESS_FILES_HARD };
        if libc::syscall(
            libc::SYS_prlimit64,
            0,
            libc::RLIMIT_NOFILE,
            &raw const files,
            ptr::null_mut::<libc::rlimit>(),
        ) < 0
        {
            let mut files = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::syscall(
                libc::SYS_prlimit64,
                0,
                libc::RLIMIT_NOFILE,
                ptr::null::<libc::rlimit>(),
                &raw mut files,
            );
            files.rlim_cur = files.rlim_max.min(PROCESS_FILES_SOFT);
            libc::syscall(
                libc::SYS_prlimit64,
                0,
                libc::RLIMIT_NOFILE,
                &raw const files,
                ptr::null_mut::<libc::rlimit>(),
            );
        }
        plan.step = Step::User;
        if plan.switch_user {
            check!(libc::syscall(libc::SYS_setgroups, plan.group_count, plan.groups));
            check!(libc::syscall(libc::SYS_setgid, plan.gid));
            check!(libc::syscall(libc::SYS_setuid, plan.uid));
        }
        plan.step = Step::Directory;
        check!(libc::chdir(plan.cwd));
        plan.step = Step::Exec;
        libc::execve(plan.program, plan.args, plan.envs);
        *libc::__errno_location()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn command(null: &std::fs::File, program: &str, args: &[&str], cwd: &str) -> Result<u32, SpawnError> {
        let string = |text: &str| CString::new(text).unwrap();
        let fd = null.as_fd();
        let command = Command {
            program: string(program),
            args: std::iter::once(program).chain(args.iter().copied()).map(string).collect(),
            envs: vec![string("A=1")],
            cwd: string(cwd),
            descriptors: [fd, fd, fd],
            terminal: false,
            uid: 0,
            gid: 0,
            groups: vec![],
            switch_user: false,
            group: None,
        };
        spawn(&mut Stack::new(), &command)
    }

    #[test]
    fn starts_and_tells_what_failed() {
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        let pid = command(&null, "/bin/sh", &["-c", "test $A = 1 && exit 7"], "/").unwrap();
        let mut status = 0;
        // SAFETY: `status` is valid for writes.
        unsafe { libc::waitpid(pid.cast_signed(), &raw mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 7);

        let error = command(&null, "/bin/sh", &[], "/does/not/exist").unwrap_err();
        assert_eq!((error.step, error.error.raw_os_error()), (Step::Directory, Some(libc::ENOENT)));
        let error = command(&null, "/does/not/exist", &[], "/").unwrap_err();
        assert_eq!((error.step, error.error.raw_os_error()), (Step::Exec, Some(libc::ENOENT)));
    }
}
