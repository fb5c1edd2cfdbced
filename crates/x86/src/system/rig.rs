//! A little machine for tests: RAM with a hole, page tables, GDT, IDT and TSS, a bus that remembers. Each of the IDT's
//! 256 gates leads to a HLT of its own, so that where the CPU halts tells which event it took.

use std::cell::UnsafeCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use iced_x86::code_asm::CodeAssembler;

use crate::bus::{Bus, GuestRam, PageFlags};
use crate::cpu::{Cpu, Exit, seg};
use crate::state::{CpuState, SegmentState, TableState};
use crate::system::{cr0, cr4, efer, msr};

pub(crate) const P: u64 = 1;
pub(crate) const W: u64 = 2;
pub(crate) const U: u64 = 4;
pub(crate) const A: u64 = 0x20;
pub(crate) const D: u64 = 0x40;
pub(crate) const PS: u64 = 0x80;
pub(crate) const G: u64 = 0x100;
pub(crate) const NX: u64 = 1 << 63;

pub(crate) const KERNEL_CS: u16 = 0x10;
pub(crate) const KERNEL_DS: u16 = 0x18;
pub(crate) const USER_DS: u16 = 0x2b;
pub(crate) const USER_CS: u16 = 0x33;
pub(crate) const TSS: u16 = 0x40;
pub(crate) const LDT: u16 = 0x50;

pub(crate) const PML4: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x2000;
pub(crate) const IDT: u64 = 0x3000;
pub(crate) const TSS_BASE: u64 = 0x4000;
/// Stacks grow down from here.
pub(crate) const IST1: u64 = 0x8000;
pub(crate) const RSP0: u64 = 0xa000;
const TABLES: u64 = 0x1_0000;
/// Kernel code.
pub(crate) const CODE: u64 = 0x10_0000;
/// HLT for each vector, 16 bytes apart.
pub(crate) const STUBS: u64 = 0x18_0000;
pub(crate) const STACK: u64 = 0x20_0000;
pub(crate) const USER_CODE: u64 = 0x30_0000;
pub(crate) const USER_STACK: u64 = 0x38_0000;
/// Kernel data, up to the end of low RAM.
pub(crate) const DATA: u64 = 0x40_0000;
/// Not RAM.
pub(crate) const DEVICE: u64 = 0xd000_0000;
/// Low RAM ends here, the rest is at [`HIGH`].
pub(crate) const LOW_END: u64 = 0x60_0000;
pub(crate) const HIGH: u64 = 1 << 32;
const PAGES: u64 = 0x80_0000 / 4096;

/// Guest RAM in a boxed slice.
pub(crate) struct Ram {
    memory: Box<[UnsafeCell<[u64; 512]>]>,
    flags: Box<[AtomicU8]>,
    pub(crate) fills: AtomicU64,
    /// A page that cannot be filled.
    pub(crate) broken: AtomicU64,
}

// SAFETY: tests touch the memory from one thread.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

// SAFETY: the memory is a boxed slice of PAGES pages, as long as the object lives, and there are as many flags.
unsafe impl GuestRam for Ram {
    fn host(&self) -> *mut u8 {
        self.memory.as_ptr().cast_mut().cast()
    }
    fn pages(&self) -> u64 {
        PAGES
    }
    fn flags(&self) -> &[AtomicU8] {
        &self.flags
    }
    fn page_of(&self, pa: u64) -> Option<u64> {
        let pa = if pa >= HIGH {
            pa - HIGH + LOW_END
        } else if pa < LOW_END {
            pa
        } else {
            return None;
        };
        Some(pa >> 12).filter(|p| *p < PAGES)
    }
    fn address_of(&self, page: u64) -> u64 {
        let offset = page << 12;
        if offset < LOW_END { offset } else { offset - LOW_END + HIGH }
    }
    fn fill(&self, page: u64) -> Result<(), String> {
        if self.broken.load(Ordering::Relaxed) == page {
            return Err(format!("Page {page} is lost"));
        }
        self.fills.fetch_add(1, Ordering::Relaxed);
        self.flags[page as usize].fetch_or(PageFlags::PRESENT, Ordering::Release);
        Ok(())
    }
    fn take_code_writes(&self, _: &mut Vec<u64>) {}
}

/// A bus that remembers what it was asked.
#[derive(Default)]
pub(crate) struct TestBus {
    /// (address, bytes, value written).
    pub(crate) mmio: Vec<(u64, usize, Option<u64>)>,
    pub(crate) ports: Vec<(u16, usize, Option<u64>)>,
    pub(crate) msrs: BTreeMap<u32, u64>,
    pub(crate) interrupts: VecDeque<u8>,
    pub(crate) tsc: u64,
    pub(crate) priority: u8,
}

fn value(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

impl Bus for TestBus {
    fn mmio_read(&mut self, pa: u64, data: &mut [u8]) {
        self.mmio.push((pa, data.len(), None));
        for (i, b) in data.iter_mut().enumerate() {
            *b = (pa as u8).wrapping_add(i as u8);
        }
    }
    fn mmio_write(&mut self, pa: u64, data: &[u8]) {
        self.mmio.push((pa, data.len(), Some(value(data))));
    }
    fn io_read(&mut self, port: u16, data: &mut [u8]) {
        self.ports.push((port, data.len(), None));
        data.fill(0x5a);
    }
    fn io_write(&mut self, port: u16, data: &[u8]) {
        self.ports.push((port, data.len(), Some(value(data))));
    }
    fn rdmsr(&mut self, index: u32) -> Option<u64> {
        self.msrs.get(&index).copied()
    }
    fn wrmsr(&mut self, index: u32, value: u64) -> bool {
        self.msrs.get_mut(&index).map(|v| *v = value).is_some()
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, subleaf, 0x1234, 0x5678]
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.interrupts.pop_front()
    }
    fn task_priority(&mut self) -> u8 {
        self.priority
    }
    fn set_task_priority(&mut self, priority: u8) {
        self.priority = priority;
    }
    fn tsc(&mut self) -> u64 {
        self.tsc
    }
    fn poll(&mut self) -> bool {
        !self.interrupts.is_empty()
    }
}

/// An event as its handler finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) vector: u8,
    pub(crate) error: Option<u64>,
    pub(crate) rip: u64,
    pub(crate) cs: u16,
    pub(crate) flags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u16,
}

/// The machine.
pub(crate) struct Rig {
    pub(crate) ram: Arc<Ram>,
    pub(crate) cpu: Box<Cpu>,
    pub(crate) bus: TestBus,
    next_table: u64,
}

/// Assembles for an address.
pub(crate) fn assemble(
    at: u64,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    a.assemble(at).unwrap()
}

fn descriptor(attributes: u16) -> u64 {
    u64::from(attributes) << 40 | 0xf_0000_0000_ffff
}

impl Rig {
    /// The machine in ring 0 at [`CODE`] with interrupts off; all of low RAM mapped one to one for the supervisor, the
    /// user's areas for the user.
    pub(crate) fn new() -> Rig {
        let ram = Arc::new(Ram {
            memory: (0..PAGES).map(|_| UnsafeCell::new([0; 512])).collect(),
            flags: (0..PAGES).map(|_| AtomicU8::new(0)).collect(),
            fills: AtomicU64::new(0),
            broken: AtomicU64::new(u64::MAX),
        });
        let cpu = Cpu::new(ram.clone());
        let mut rig = Rig { ram, cpu, bus: TestBus::default(), next_table: TABLES };
        for page in 0..LOW_END >> 12 {
            let va = page << 12;
            let user = (USER_CODE..DATA).contains(&va);
            rig.map(va, va, P | W | if user { U } else { 0 });
        }
        rig.write(GDT + 0x10, descriptor(0xa09b));
        rig.write(GDT + 0x18, descriptor(0xc093));
        rig.write(GDT + 0x28, descriptor(0xc0f3));
        rig.write(GDT + 0x30, descriptor(0xa0fb));
        rig.write(GDT + 0x40, 0x0000_8900_0000_0067 | TSS_BASE << 16);
        rig.write(GDT + 0x50, 0x0000_8200_0000_000f | (GDT + 0x800) << 16);
        for v in 0..=255 {
            rig.gate(v, STUBS + u64::from(v) * 16, 0, 0x8e);
            rig.write(STUBS + u64::from(v) * 16, 0xf4u8);
        }
        rig.write(TSS_BASE + 4, RSP0);
        rig.write(TSS_BASE + 0x24, IST1);
        rig.write(TSS_BASE + 0x66, 0x68u16);
        let state = rig.initial();
        rig.cpu.set_state(&state).unwrap();
        rig
    }

    /// The state that [`Rig::new`] starts with.
    pub(crate) fn initial(&self) -> CpuState {
        let segment = |selector, attributes| SegmentState { selector, base: 0, limit: u32::MAX, attributes };
        let mut segments = [SegmentState::default(); 6];
        segments[seg::CS] = segment(KERNEL_CS, 0xa09b);
        segments[seg::SS] = segment(KERNEL_DS, 0xc093);
        let mut gpr = [0; 16];
        gpr[4] = STACK;
        let mut fxsave = vec![0; 512];
        fxsave[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        CpuState {
            gpr,
            rip: CODE,
            rflags: 2,
            segments,
            ldtr: SegmentState::default(),
            tr: SegmentState { selector: TSS, base: TSS_BASE, limit: 0x67, attributes: 0x8b },
            gdtr: TableState { base: GDT, limit: 0x5f },
            idtr: TableState { base: IDT, limit: 0xfff },
            cr0: cr0::PE | cr0::PG | cr0::WP | cr0::ET,
            cr2: 0,
            cr3: PML4,
            cr4: cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::FSGSBASE,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            msrs: vec![
                (msr::PAT, 0x0007_0406_0007_0406),
                (msr::EFER, efer::SCE | efer::LME | efer::LMA | efer::NXE),
            ],
            fxsave,
            halted: false,
            interrupt_shadow: false,
        }
    }

    fn offset(pa: u64) -> usize {
        (if pa >= HIGH { pa - HIGH + LOW_END } else { pa }) as usize
    }

    /// Writes guest-physical memory behind the CPU's back.
    pub(crate) fn write<T: Copy>(&mut self, pa: u64, v: T) {
        // SAFETY: the address is inside RAM, as tests know.
        unsafe { self.ram.host().add(Self::offset(pa)).cast::<T>().write_unaligned(v) }
    }

    /// Reads guest-physical memory.
    pub(crate) fn read<T: Copy>(&self, pa: u64) -> T {
        // SAFETY: as in `write`; integers have no invalid values.
        unsafe { self.ram.host().add(Self::offset(pa)).cast::<T>().read_unaligned() }
    }

    pub(crate) fn flags(&self, pa: u64) -> u8 {
        self.ram.flags()[Self::offset(pa) >> 12].load(Ordering::Relaxed)
    }

    pub(crate) fn set_flags(&self, pa: u64, flags: u8) {
        self.ram.flags()[Self::offset(pa) >> 12].store(flags, Ordering::Relaxed);
    }

    /// The address of a page table entry at a level (0: PTE), making tables on the way.
    pub(crate) fn entry(&mut self, root: u64, va: u64, level: u32) -> u64 {
        let mut table = root;
        for l in (level + 1..4).rev() {
            let at = table + (va >> (12 + 9 * l) & 0x1ff) * 8;
            if self.read::<u64>(at) & P == 0 {
                let new = self.next_table;
                self.next_table += 4096;
                self.write(at, new | P | W | U);
            }
            table = self.read::<u64>(at) & 0x00ff_ffff_f000;
        }
        table + (va >> (12 + 9 * level) & 0x1ff) * 8
    }

    /// Maps a 4 KiB page in the default tables.
    pub(crate) fn map(&mut self, va: u64, pa: u64, bits: u64) {
        let at = self.entry(PML4, va, 0);
        self.write(at, pa | bits);
    }

    /// A page's PTE.
    pub(crate) fn pte(&mut self, va: u64) -> u64 {
        let at = self.entry(PML4, va, 0);
        self.read(at)
    }

    /// A fresh page for tables.
    pub(crate) fn new_table(&mut self) -> u64 {
        let new = self.next_table;
        self.next_table += 4096;
        new
    }

    /// Sets a gate.
    pub(crate) fn gate(&mut self, vector: u8, target: u64, ist: u64, kind: u64) {
        let at = IDT + u64::from(vector) * 16;
        let low = target & 0xffff
            | u64::from(KERNEL_CS) << 16
            | ist << 32
            | kind << 40
            | (target >> 16 & 0xffff) << 48;
        self.write(at, low);
        self.write(at + 8, target >> 32);
    }

    /// Puts code at an address.
    pub(crate) fn code(
        &mut self,
        at: u64,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) {
        for (i, b) in assemble(at, f).into_iter().enumerate() {
            self.write(at + i as u64, b);
        }
    }

    /// Changes the state.
    pub(crate) fn change(&mut self, f: impl FnOnce(&mut CpuState)) {
        let mut state = self.cpu.state();
        f(&mut state);
        self.cpu.set_state(&state).unwrap();
    }

    /// Goes to ring 3, at [`USER_CODE`].
    pub(crate) fn enter_user(&mut self) {
        self.change(|s| {
            s.segments[seg::CS] =
                SegmentState { selector: USER_CS, base: 0, limit: u32::MAX, attributes: 0xa0fb };
            s.segments[seg::SS] =
                SegmentState { selector: USER_DS, base: 0, limit: u32::MAX, attributes: 0xc0f3 };
            s.rip = USER_CODE;
            s.gpr[4] = USER_STACK;
        });
    }

    pub(crate) fn gpr(&self, n: usize) -> u64 {
        self.cpu.r[n]
    }

    /// Runs until something happens; test programs are short.
    pub(crate) fn run(&mut self) -> Exit {
        self.cpu.run(&mut self.bus, 1_000_000)
    }

    /// Runs kernel code, which must come to its HLT.
    pub(crate) fn run_kernel(
        &mut self,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) {
        let at = CODE;
        let code = assemble(at, |a| {
            f(a)?;
            a.hlt()
        });
        for (i, b) in code.iter().enumerate() {
            self.write(at + i as u64, *b);
        }
        self.cpu.invalidate_all_code();
        self.change(|s| s.rip = at);
        assert_eq!(self.run(), Exit::Halt);
        let end = at + code.len() as u64;
        assert_eq!(self.cpu.rip(), end, "came to vector {:?}", self.vector());
        self.change(|s| s.halted = false);
    }

    /// Runs kernel code that must end in an event.
    pub(crate) fn fault(
        &mut self,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Event {
        self.code(CODE, f);
        self.cpu.invalidate_all_code();
        self.change(|s| s.rip = CODE);
        self.event()
    }

    /// Runs user code that must end in an event.
    pub(crate) fn user_fault(
        &mut self,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Event {
        self.code(USER_CODE, f);
        self.cpu.invalidate_all_code();
        self.enter_user();
        self.event()
    }

    /// The vector whose stub the CPU has halted in.
    pub(crate) fn vector(&self) -> Option<u8> {
        let offset = self.cpu.rip().checked_sub(STUBS + 1)?;
        (offset % 16 == 0 && offset < 4096).then_some((offset / 16) as u8)
    }

    /// Runs until a stub halts, and reads the frame.
    pub(crate) fn event(&mut self) -> Event {
        let exit = self.run();
        assert_eq!(exit, Exit::Halt);
        let vector = self.vector().unwrap_or_else(|| panic!("halted at {:#x}", self.cpu.rip()));
        let sp = self.gpr(4);
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let word = |i: u64| self.read::<u64>(sp + (i + u64::from(has_error)) * 8);
        let event = Event {
            vector,
            error: has_error.then(|| self.read(sp)),
            rip: word(0),
            cs: word(1) as u16,
            flags: word(2),
            rsp: word(3),
            ss: word(4) as u16,
        };
        self.change(|s| s.halted = false);
        event
    }

    /// Asserts a page fault: its error code and address.
    pub(crate) fn assert_page_fault(&self, event: &Event, error: u32, address: u64) {
        assert_eq!((event.vector, event.error), (14, Some(u64::from(error))), "{event:x?}");
        assert_eq!(self.cpu.state().cr2, address);
    }
}

/// Page fault error codes.
pub(crate) use crate::mmu::access::{FETCH, PRESENT, RESERVED, USER, WRITE};
