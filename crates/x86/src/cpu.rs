//! The CPU's working state and its run loop.

use std::collections::BTreeMap;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::{Bus, GuestRam};
use crate::code::CodeCache;
use crate::flags::{Flags, bit};
use crate::mem::{TLB_SIZE, TlbEntry};
use crate::mmu::Mmu;
use crate::op::{Op, reg};
use crate::system::System;
use crate::x87::X87;

/// Why [`Cpu::run`] returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// HLT with interrupts enabled or not; resume by calling `run` again once an interrupt is pending.
    Halt,
    /// [`Kick::kick`] was called, or the instruction budget was used up.
    Kicked,
    /// Triple fault: the machine resets. The text says which exceptions led there.
    Shutdown(String),
    /// A page of guest RAM could not be brought in.
    RamFault(String),
}

/// Makes a running CPU return from [`Cpu::run`] soon, from any thread; or makes it look for an interrupt.
#[derive(Debug, Clone, Default)]
pub struct Kick(Arc<AtomicU32>);

impl Kick {
    const EXIT: u32 = 1;
    const INTERRUPT: u32 = 2;
    const CODE: u32 = 4;

    /// Makes `run` return [`Exit::Kicked`] at the next sequence boundary.
    pub fn kick(&self) {
        self.0.fetch_or(Self::EXIT, Ordering::Release);
    }
    /// Makes the CPU ask [`Bus::acknowledge_interrupt`] at the next sequence boundary.
    pub fn interrupt(&self) {
        self.0.fetch_or(Self::INTERRUPT, Ordering::Release);
    }
    /// Makes the CPU drop the decoded code of pages that devices wrote (see [`GuestRam::take_code_writes`]).
    pub fn code_written(&self) {
        self.0.fetch_or(Self::CODE, Ordering::Release);
    }
    fn take(&self, bits: u32) -> bool {
        self.0.fetch_and(!bits, Ordering::AcqRel) & bits != 0
    }
}

/// Counters and oddities worth showing to a user whose guest misbehaves.
#[derive(Debug, Clone, Default)]
pub struct Diagnostics {
    /// Guest instructions executed (REP counts once).
    pub instructions: u64,
    /// Instructions that raised #UD because this CPU does not implement them, by mnemonic, with counts.
    pub unimplemented: BTreeMap<String, u64>,
    /// Instruction sequences decoded.
    pub sequences_decoded: u64,
    /// Bytes held by decoded operations.
    pub code_cache_bytes: u64,
    /// Exceptions delivered, by vector.
    pub exceptions: [u64; 32],
    /// External interrupts delivered.
    pub interrupts: u64,
}

/// An access failed: the exception's details are in [`Cpu::trap`]. Zero-sized, so that fast paths stay small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trap;

/// Details of the event that ends a sequence by exception.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TrapInfo {
    pub(crate) vector: u8,
    pub(crate) error: Option<u32>,
    /// The faulting linear address, for #PF.
    pub(crate) address: u64,
}

/// Exception vectors (Intel SDM vol. 3, 6.15).
pub(crate) mod vector {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const XM: u8 = 19;
}

/// Why a handler returned null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The sequence ended; `rip` holds the next instruction.
    Next,
    /// An exception (details in `trap`); `rip` holds the address to report (the instruction itself for faults).
    Exception,
    /// HLT; `rip` is behind it.
    Halt,
    /// The instruction writes to decoded code of the page it runs from: execute it alone. `rip` holds it.
    SelfModifying,
    /// RAM could not be filled; the text is in `ram_error`.
    RamFault,
    /// Triple fault.
    Shutdown,
}

/// A segment register with its hidden part. In 64-bit mode base and limit matter for FS and GS alone (their bases
/// live in `Cpu::r`), but all is kept, for snapshots.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Segment {
    pub(crate) selector: u16,
    pub(crate) base: u64,
    pub(crate) limit: u32,
    /// Access rights as in a descriptor's bits 40-55 (type, S, DPL, P, AVL, L, D/B, G), KVM's and VMX's order.
    pub(crate) attributes: u16,
}

/// Index of a segment register in `Cpu::segs`, in x86 encoding order.
pub(crate) mod seg {
    pub(crate) const ES: usize = 0;
    pub(crate) const CS: usize = 1;
    pub(crate) const SS: usize = 2;
    pub(crate) const DS: usize = 3;
    pub(crate) const FS: usize = 4;
    pub(crate) const GS: usize = 5;
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Table {
    pub(crate) base: u64,
    pub(crate) limit: u16,
}

/// Control and model-specific registers that the CPU itself holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Control {
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) sfmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) tsc_aux: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    pub(crate) pat: u64,
    pub(crate) misc_enable: u64,
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
}

/// One vector register.
#[derive(Clone, Copy, Default)]
#[repr(C, align(16))]
pub(crate) struct Xmm(pub(crate) [u64; 2]);

pub(crate) const JUMP_CACHE: usize = 1024;

/// Where a virtual address's decoded sequence is: key is the address XOR the mode's key.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct JumpEntry {
    pub(crate) key: u64,
    pub(crate) op: *const Op,
}

impl JumpEntry {
    /// Matches no address: not canonical in either mode.
    pub(crate) const EMPTY: JumpEntry = JumpEntry { key: 0x5555 << 48, op: ptr::null() };
}

/// A software x86-64 CPU in long mode.
#[repr(C)]
pub struct Cpu {
    /// General registers in encoding order, then the pseudo registers of [`reg`].
    pub(crate) r: [u64; reg::COUNT],
    pub(crate) fl: Flags,
    /// The current mode's data TLB: `tlb[cpl == 3]`.
    pub(crate) dtlb: *mut TlbEntry,
    /// Guest instructions executed so far.
    pub(crate) icount: u64,
    /// `icount` at which to leave the sequence and poll.
    pub(crate) icount_limit: u64,
    /// The kick word, shared with [`Kick`] handles.
    pub(crate) kick: *const AtomicU32,
    pub(crate) jump_cache: Box<[JumpEntry; JUMP_CACHE]>,
    /// 0 in supervisor mode; in user mode 1 << 62 and above bit 48 the generation of user translations (see `mmu`): keeps
    /// one mode, and one address space, from jumping into the sequences of another.
    pub(crate) mode_key: u64,
    pub(crate) xmm: [Xmm; 16],
    pub(crate) mxcsr: u32,
    /// Next instruction; valid only outside sequences.
    pub(crate) rip: u64,
    pub(crate) stop: Stop,
    pub(crate) trap: TrapInfo,
    /// All flags but the arithmetic ones; bit 1 always set.
    pub(crate) rflags: u64,
    pub(crate) cpl: u8,
    /// No interrupt before the next sequence has run (STI, MOV SS).
    pub(crate) inhibit: bool,
    /// The instruction being executed runs alone, outside the code cache: it may write to its own page.
    pub(crate) alone: bool,
    /// In HLT.
    pub(crate) halted: bool,
    /// An interrupt may be deliverable.
    pub(crate) irq_hint: bool,
    /// The branch that led to the run loop and can be linked to the sequence found next.
    pub(crate) link_from: *mut Op,
    /// The operations of an instruction that runs alone.
    pub(crate) alone_ops: Vec<Op>,
    pub(crate) x87: X87,
    pub(crate) segs: [Segment; 6],
    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: Table,
    pub(crate) idtr: Table,
    pub(crate) ctl: Control,
    /// Supervisor and user data TLBs.
    pub(crate) tlb: [Box<[TlbEntry; TLB_SIZE]>; 2],
    /// Addresses [0] in the lower, [1] in the upper half may be mapped by large pages: (base, mask) of a region that
    /// covers them all; INVLPG inside it looks at every entry.
    pub(crate) large: [Option<(u64, u64)>; 2],
    /// What `mmu` keeps beside the TLBs: `Mmu::new(&*ram)`.
    pub(crate) mmu: Mmu,
    /// What `system` keeps: `System::default()`.
    pub(crate) system: System,
    pub(crate) code: CodeCache,
    pub(crate) ram: Arc<dyn GuestRam>,
    pub(crate) ram_host: *mut u8,
    pub(crate) bus: Option<NonNull<dyn Bus>>,
    pub(crate) kick_handle: Kick,
    pub(crate) ram_error: String,
    pub(crate) diagnostics: Diagnostics,
}

// SAFETY: the raw pointers point into `self`'s own boxes, into `ram` (which is Send and kept alive by `self`) or, for
// `bus`, are set only for the length of `run`.
unsafe impl Send for Cpu {}

/// A CPU inside [`Cpu::run`]; leaving it, by unwinding too, gives the host its floating-point environment back.
struct Guest<'a>(&'a mut Cpu);

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.0.leave_guest_fp();
        self.0.bus = None;
    }
}

/// Instructions between two calls of [`Bus::poll`].
const POLL_INTERVAL: u64 = 10_000;

impl Cpu {
    /// A CPU in its reset-like state: long mode registers all zero; load a real one with [`Cpu::set_state`].
    pub fn new(ram: Arc<dyn GuestRam>) -> Box<Cpu> {
        let kick_handle = Kick::default();
        let mut cpu = Box::new(Cpu {
            r: [0; reg::COUNT],
            fl: Flags { res: 1, ab: 1, c: 0 },
            dtlb: ptr::null_mut(),
            icount: 0,
            icount_limit: 0,
            kick: Arc::as_ptr(&kick_handle.0),
            jump_cache: Box::new([JumpEntry::EMPTY; JUMP_CACHE]),
            mode_key: 0,
            xmm: [Xmm::default(); 16],
            mxcsr: 0x1f80,
            rip: 0,
            stop: Stop::Next,
            trap: TrapInfo::default(),
            rflags: 2,
            cpl: 0,
            inhibit: false,
            alone: false,
            halted: false,
            irq_hint: false,
            link_from: ptr::null_mut(),
            alone_ops: Vec::new(),
            x87: X87::default(),
            segs: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: Table::default(),
            idtr: Table::default(),
            ctl: Control::default(),
            tlb: [Box::new([TlbEntry::EMPTY; TLB_SIZE]), Box::new([TlbEntry::EMPTY; TLB_SIZE])],
            large: [None; 2],
            code: CodeCache::default(),
            mmu: Mmu::new(&*ram),
            system: System::default(),
            ram_host: ram.host(),
            ram,
            bus: None,
            kick_handle,
            ram_error: String::new(),
            diagnostics: Diagnostics::default(),
        });
        cpu.set_cpl(0);
        cpu
    }

    /// A handle that interrupts [`Cpu::run`] from any thread.
    pub fn kick(&self) -> Kick {
        self.kick_handle.clone()
    }

    /// Counters since the CPU was made.
    pub fn diagnostics(&self) -> Diagnostics {
        let mut d = self.diagnostics.clone();
        d.instructions = self.icount;
        d.code_cache_bytes = self.code.bytes() as u64;
        d
    }

    /// The address of the next instruction.
    pub fn rip(&self) -> u64 {
        self.rip
    }

    /// The current privilege level, 0 or 3.
    pub fn privilege(&self) -> u8 {
        self.cpl
    }

    #[cold]
    pub(crate) fn count_unimplemented(&mut self, mnemonic: u16) {
        let name = iced_x86::Mnemonic::try_from(usize::from(mnemonic))
            .map_or_else(|_| "unknown".to_owned(), |m| format!("{m:?}").to_lowercase());
        *self.diagnostics.unimplemented.entry(name).or_default() += 1;
    }

    /// Runs the guest until something needs the caller, but for no more than about `budget` instructions.
    ///
    /// The calling thread holds the guest's rounding modes meanwhile, also in calls to the bus and to [`GuestRam`]: these
    /// must not depend on floating-point arithmetic, nor start threads, which would inherit them.
    pub fn run(&mut self, bus: &mut dyn Bus, budget: u64) -> Exit {
        let bus: *mut dyn Bus = bus;
        // SAFETY: only the lifetime changes; the pointer is removed before `run` returns or unwinds.
        self.bus =
            NonNull::new(unsafe { std::mem::transmute::<*mut dyn Bus, *mut (dyn Bus + 'static)>(bus) });
        self.enter_guest_fp();
        let guest = Guest(self);
        // SAFETY: `bus` is set for the length of the call.
        unsafe { guest.0.run_loop(budget) }
    }

    unsafe fn bus_mut(&mut self) -> Option<&mut dyn Bus> {
        self.bus.map(|mut b| b.as_mut())
    }

    unsafe fn run_loop(&mut self, budget: u64) -> Exit {
        let end = self.icount.saturating_add(budget);
        // Whatever was pending before this run began is found by asking.
        self.irq_hint = true;
        self.icount_limit = end.min(self.icount + POLL_INTERVAL);
        loop {
            if let Some(exit) = self.boundary(end) {
                return exit;
            }
            let op = match if self.alone || self.rflags & bit::TF != 0 {
                self.alone = true;
                // No branch may go on into the code cache.
                self.icount_limit = self.icount;
                self.lookup_alone()
            } else {
                self.lookup_linked()
            } {
                Ok(op) => op,
                Err(Trap) => {
                    self.alone = false;
                    match self.after_stop() {
                        Some(exit) => return exit,
                        None => continue,
                    }
                }
            };
            self.set_slot(reg::PAGE, self.rip & !0xfff);
            let step = self.rflags & bit::TF != 0;
            self.execute(op);
            self.alone = false;
            let due = if self.stop == Stop::Next { step && self.single_step_trap() } else { true };
            if due && let Some(exit) = self.after_stop() {
                return exit;
            }
        }
    }

    /// Executes operations until one leaves.
    #[inline(never)]
    unsafe fn execute(&mut self, mut op: *const Op) {
        while !op.is_null() {
            op = ((*op).h)(self, op);
        }
    }

    /// Finds the sequence at `rip`, remembers it in the jump cache, and links the branch that led here.
    #[inline]
    unsafe fn lookup_linked(&mut self) -> Result<*const Op, Trap> {
        let index = Self::jump_index(self.rip);
        let key = self.rip ^ self.mode_key;
        let link = std::mem::replace(&mut self.link_from, ptr::null_mut());
        let op = if self.jump_cache[index].key == key {
            self.jump_cache[index].op
        } else {
            let op = self.lookup()?;
            self.jump_cache[index] = JumpEntry { key: self.rip ^ self.mode_key, op };
            op
        };
        if !link.is_null() {
            (*link).imm = op as u64;
        }
        Ok(op)
    }

    /// What happens between sequences: kicks, timers, interrupts.
    #[inline]
    unsafe fn boundary(&mut self, end: u64) -> Option<Exit> {
        if self.code.has_dropped() {
            // A link may point from what is freed now.
            self.link_from = ptr::null_mut();
            self.bury();
        }
        if (*self.kick).load(Ordering::Relaxed) != 0 {
            if self.kick_handle.take(Kick::CODE) {
                let mut pages = Vec::new();
                self.ram.take_code_writes(&mut pages);
                for page in pages {
                    self.invalidate_page(page);
                }
            }
            if self.kick_handle.take(Kick::INTERRUPT) {
                self.irq_hint = true;
            }
            if self.kick_handle.take(Kick::EXIT) {
                return Some(Exit::Kicked);
            }
        }
        if self.icount >= self.icount_limit {
            if self.icount >= end {
                return Some(Exit::Kicked);
            }
            self.icount_limit = end.min(self.icount + POLL_INTERVAL);
            if self.bus_mut().is_some_and(|b| b.poll()) {
                self.irq_hint = true;
            }
        }
        if self.irq_hint && self.rflags & bit::IF != 0 && !self.inhibit {
            let vector = self.bus_mut().and_then(|b| b.acknowledge_interrupt());
            match vector {
                Some(vector) => {
                    self.halted = false;
                    self.link_from = ptr::null_mut();
                    if let Err(story) = self.deliver_interrupt(vector) {
                        return Some(self.fatal(story));
                    }
                }
                None => self.irq_hint = false,
            }
        }
        self.inhibit = false;
        if self.halted { Some(Exit::Halt) } else { None }
    }

    fn fatal(&self, story: String) -> Exit {
        if self.stop == Stop::RamFault { Exit::RamFault(story) } else { Exit::Shutdown(story) }
    }

    /// Deals with a stop that is not just the end of a sequence.
    #[cold]
    unsafe fn after_stop(&mut self) -> Option<Exit> {
        self.link_from = ptr::null_mut();
        match self.stop {
            Stop::Next => None,
            Stop::Exception => self.deliver_exception().err().map(|story| self.fatal(story)),
            Stop::Halt => {
                self.halted = true;
                self.irq_hint = true;
                None
            }
            Stop::SelfModifying => {
                self.alone = true;
                None
            }
            Stop::RamFault => Some(Exit::RamFault(self.ram_error.clone())),
            Stop::Shutdown => Some(Exit::Shutdown(self.ram_error.clone())),
        }
    }
}
