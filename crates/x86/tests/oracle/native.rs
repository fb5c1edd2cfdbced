//! The host CPU: runs code natively from a given register state until it raises an exception.
//!
//! The end of every run is a signal (INT3's at best), whose context holds all registers; the handler copies them
//! and makes the thread go on in `oracle_exit`. Handlers are installed in the test process alone.

use std::arch::global_asm;
use std::mem::zeroed;
use std::ptr::{self, copy_nonoverlapping};

use super::layout::{CODE, CODE_BYTES, CONTEXT, DATA, DATA_BYTES, GS, Outcome, PAGE, State};

/// Lives at address [`CONTEXT`], where the assembly finds it without a register.
#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    host_rsp: u64,
    active: u64,
    vector: u64,
    error: u64,
    cr2: u64,
    pad: u64,
    fx: [u8; 512],
}

global_asm!(
    ".globl amber_oracle_enter",
    "amber_oracle_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov qword ptr [{c} + 144], rsp",
    "fxrstor64 [{c} + 192]",
    "push qword ptr [{c} + 136]",
    "popfq",
    "mov rax, qword ptr [{c}]",
    "mov rcx, qword ptr [{c} + 8]",
    "mov rdx, qword ptr [{c} + 16]",
    "mov rbx, qword ptr [{c} + 24]",
    "mov rsp, qword ptr [{c} + 32]",
    "mov rbp, qword ptr [{c} + 40]",
    "mov rsi, qword ptr [{c} + 48]",
    "mov rdi, qword ptr [{c} + 56]",
    "mov r8, qword ptr [{c} + 64]",
    "mov r9, qword ptr [{c} + 72]",
    "mov r10, qword ptr [{c} + 80]",
    "mov r11, qword ptr [{c} + 88]",
    "mov r12, qword ptr [{c} + 96]",
    "mov r13, qword ptr [{c} + 104]",
    "mov r14, qword ptr [{c} + 112]",
    "mov r15, qword ptr [{c} + 120]",
    "jmp qword ptr [{c} + 128]",
    ".globl amber_oracle_exit",
    "amber_oracle_exit:",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    c = const CONTEXT,
);

unsafe extern "C" {
    fn amber_oracle_enter();
    fn amber_oracle_exit();
}

/// Signal context indices of the general registers in encoding order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

const SIGNALS: [i32; 5] = [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext_t; `Context` is mapped as long as handlers are installed, and `active` tells
    // that the interrupted code is the code under test, so nobody else uses either.
    unsafe {
        let c = CONTEXT as *mut Context;
        if (*c).active == 0 {
            // A bug of the test's own: die of it.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        (*c).active = 0;
        let uc = context.cast::<libc::ucontext_t>();
        let g = &mut (*uc).uc_mcontext.gregs;
        for (i, &reg) in GREGS.iter().enumerate() {
            (*c).gpr[i] = g[reg as usize] as u64;
        }
        (*c).rip = g[libc::REG_RIP as usize] as u64;
        (*c).rflags = g[libc::REG_EFL as usize] as u64;
        (*c).vector = g[libc::REG_TRAPNO as usize] as u64;
        (*c).error = g[libc::REG_ERR as usize] as u64;
        (*c).cr2 = g[libc::REG_CR2 as usize] as u64;
        let fp = (*uc).uc_mcontext.fpregs.cast::<u8>();
        copy_nonoverlapping(fp, (&raw mut (*c).fx).cast(), 512);
        // Back to a clean environment: FCW, FSW, FTW and MXCSR.
        fp.cast::<u16>().write_unaligned(0x37f);
        fp.add(2).cast::<u32>().write_unaligned(0);
        fp.add(24).cast::<u32>().write_unaligned(0x1f80);
        g[libc::REG_EFL as usize] = 0x202;
        g[libc::REG_RSP as usize] = (*c).host_rsp as i64;
        g[libc::REG_RIP as usize] = amber_oracle_exit as *const () as i64;
    }
}

/// The native side. One at a time in a process; `!Send` by its pointer, as signal stacks belong to threads.
pub(crate) struct Native {
    old: Vec<(i32, libc::sigaction)>,
    old_stack: libc::stack_t,
    stack: Vec<u8>,
    not_send: *mut u8,
}

fn map(address: u64, bytes: u64, protection: i32) {
    // SAFETY: MAP_FIXED_NOREPLACE takes only addresses that nobody has.
    let p = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            bytes as usize,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(p as u64, address, "The oracle's fixed addresses are taken");
}

impl Native {
    pub(crate) fn new() -> Native {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        map(CODE, CODE_BYTES as u64, rw | libc::PROT_EXEC);
        map(DATA, DATA_BYTES as u64, rw);
        map(CONTEXT, PAGE, rw);
        let mut stack = vec![0u8; 256 << 10];
        // SAFETY: the stack lives until `drop` restores the old one; sigaction gets valid structures; GS is free for
        // programs on Linux.
        unsafe {
            let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
            let mut old_stack = zeroed();
            assert_eq!(libc::sigaltstack(&raw const new, &raw mut old_stack), 0);
            let mut old = Vec::new();
            for signal in SIGNALS {
                let mut action: libc::sigaction = zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                let mut before = zeroed();
                assert_eq!(libc::sigaction(signal, &raw const action, &raw mut before), 0);
                old.push((signal, before));
            }
            const ARCH_SET_GS: i32 = 0x1001;
            assert_eq!(libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS), 0);
            Native { old, old_stack, stack, not_send: ptr::null_mut() }
        }
    }

    /// Puts code at an offset of the code pages.
    pub(crate) fn set_code(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= CODE_BYTES);
        // SAFETY: inside the code pages, which are writable.
        unsafe { copy_nonoverlapping(bytes.as_ptr(), (CODE + offset) as *mut u8, bytes.len()) };
    }

    /// The data pages.
    pub(crate) fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped by `new`; the only other user is the code under test, which runs under `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_BYTES) }
    }

    /// Runs from `state` until an exception.
    pub(crate) fn run(&mut self, state: &State) -> Outcome {
        let c = CONTEXT as *mut Context;
        debug_assert!(self.not_send.is_null() && !self.stack.is_empty());
        // SAFETY: the context page is ours; `enter` comes back through the handler with all callee-saved registers,
        // and the code under test can name no address of this process but by an improbable accident.
        unsafe {
            (*c).gpr = state.gpr;
            (*c).rip = state.rip;
            (*c).rflags = state.rflags;
            (*c).fx = *state.fx;
            (*c).active = 1;
            amber_oracle_enter();
            Outcome {
                state: State { gpr: (*c).gpr, rflags: (*c).rflags, rip: (*c).rip, fx: Box::new((*c).fx) },
                vector: (*c).vector,
                error: (*c).error,
                cr2: (*c).cr2,
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: restores what `new` replaced, and unmaps what it mapped.
        unsafe {
            for (signal, action) in &self.old {
                libc::sigaction(*signal, action, ptr::null_mut());
            }
            libc::sigaltstack(&raw const self.old_stack, ptr::null_mut());
            libc::munmap(CODE as *mut libc::c_void, CODE_BYTES);
            libc::munmap(DATA as *mut libc::c_void, DATA_BYTES);
            libc::munmap(CONTEXT as *mut libc::c_void, PAGE as usize);
        }
    }
}
