//! The software CPU, set up as a small machine: user-mode code and data at the native side's addresses, and a kernel
//! whose every exception handler halts.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU8;

use amber_x86::state::{CpuState, SegmentState, TableState};
use amber_x86::{Bus, Cpu, Exit, GuestRam, PageFlags};

use super::layout::{
    CODE, CODE_BYTES, CODE_PAGES, DATA, DATA_BYTES, DATA_PAGES, GS, KERNEL, Outcome, PAGE, State,
};

/// Page indices of the guest's RAM.
mod page {
    pub(crate) const PML4: u64 = 0;
    pub(crate) const PDPT: u64 = 1;
    pub(crate) const PD: u64 = 2;
    pub(crate) const PT: u64 = 3;
    pub(crate) const TABLES: u64 = 4;
    pub(crate) const HANDLERS: u64 = 5;
    pub(crate) const STACK: u64 = 6;
    pub(crate) const CODE_LAST: u64 = 9;
    /// Code and data are in falling order, so that what lies across two virtual pages is in two places.
    pub(crate) const DATA_LAST: u64 = 12;
    pub(crate) const COUNT: u64 = 16;
}

/// Offsets in the tables page.
const IDT: u64 = 0x400;
const TSS: u64 = 0x200;
const KERNEL_CODE: u16 = 8;
const USER_DATA: u16 = 0x23;
const USER_CODE: u16 = 0x2b;

struct Ram {
    host: *mut u8,
    flags: Vec<AtomicU8>,
    written: Mutex<Vec<u64>>,
}

const RAM_LAYOUT: Layout = match Layout::from_size_align((page::COUNT * PAGE) as usize, PAGE as usize) {
    Ok(layout) => layout,
    Err(_) => panic!(),
};

// SAFETY: the memory is freed only with the object; the test uses it from one thread.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: allocated in `Soft::new` with this layout.
        unsafe { dealloc(self.host, RAM_LAYOUT) };
    }
}

// SAFETY: `host` is an allocation of `COUNT` pages that lives as long as the object.
unsafe impl GuestRam for Ram {
    fn host(&self) -> *mut u8 {
        self.host
    }
    fn pages(&self) -> u64 {
        page::COUNT
    }
    fn flags(&self) -> &[AtomicU8] {
        &self.flags
    }
    fn page_of(&self, pa: u64) -> Option<u64> {
        (pa < page::COUNT * PAGE).then_some(pa / PAGE)
    }
    fn address_of(&self, page: u64) -> u64 {
        page * PAGE
    }
    fn fill(&self, _: u64) -> Result<(), String> {
        Err("All pages are present".into())
    }
    fn take_code_writes(&self, out: &mut Vec<u64>) {
        out.append(&mut self.written.lock().unwrap());
    }
}

/// A bus with nothing on it.
struct NoBus;

impl Bus for NoBus {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn io_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn io_write(&mut self, _: u16, _: &[u8]) {}
    fn rdmsr(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn wrmsr(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn cpuid(&mut self, _: u32, _: u32) -> [u32; 4] {
        [0; 4]
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: u8) {}
    fn tsc(&mut self) -> u64 {
        0
    }
    fn poll(&mut self) -> bool {
        false
    }
}

pub(crate) struct Soft {
    cpu: Box<Cpu>,
    ram: Arc<Ram>,
    base: CpuState,
}

fn kernel(page: u64) -> u64 {
    KERNEL + page * PAGE
}

impl Soft {
    pub(crate) fn new() -> Soft {
        // SAFETY: the layout is not empty.
        let host = unsafe { alloc_zeroed(RAM_LAYOUT) };
        assert!(!host.is_null());
        let ram = Arc::new(Ram {
            host,
            flags: (0..page::COUNT).map(|_| AtomicU8::new(PageFlags::PRESENT)).collect(),
            written: Mutex::default(),
        });
        let cpu = Cpu::new(ram.clone());
        let mut soft = Soft { cpu, ram, base: base_state() };
        soft.build();
        soft
    }

    fn put(&mut self, pa: u64, bytes: &[u8]) {
        assert!(pa + bytes.len() as u64 <= page::COUNT * PAGE);
        // SAFETY: checked to be inside the allocation; the CPU is not running.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ram.host.add(pa as usize), bytes.len()) };
    }

    fn put64(&mut self, pa: u64, v: u64) {
        self.put(pa, &v.to_le_bytes());
    }

    fn get64(&self, pa: u64) -> u64 {
        assert!(pa + 8 <= page::COUNT * PAGE);
        // SAFETY: checked to be inside the allocation; the CPU is not running.
        u64::from_le(unsafe { self.ram.host.add(pa as usize).cast::<u64>().read_unaligned() })
    }

    fn build(&mut self) {
        const TABLE: u64 = 7; // present, writable, user
        self.put64(page::PML4 * PAGE, page::PDPT * PAGE | TABLE);
        self.put64(page::PDPT * PAGE, page::PD * PAGE | TABLE);
        self.put64(page::PD * PAGE + (CODE >> 21 & 511) * 8, page::PT * PAGE | TABLE);
        let map = |soft: &mut Soft, va: u64, page: u64, flags: u64| {
            soft.put64(page::PT * PAGE + (va >> 12 & 511) * 8, page * PAGE | flags);
        };
        for i in 0..CODE_PAGES {
            map(self, CODE + i * PAGE, page::CODE_LAST - i, 7);
        }
        for i in 0..DATA_PAGES {
            map(self, DATA + i * PAGE, page::DATA_LAST - i, 7);
        }
        for page in page::TABLES..=page::STACK {
            map(self, kernel(page), page, 3);
        }
        let tables = page::TABLES * PAGE;
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (i, d) in descriptors.into_iter().enumerate() {
            self.put64(tables + 8 * i as u64, d);
        }
        // IST1.
        self.put64(tables + TSS + 36, kernel(page::STACK) + PAGE);
        for v in 0..32u64 {
            let target = kernel(page::HANDLERS) + v * 16;
            let dpl = if v == 3 || v == 4 { 3 } else { 0 };
            let low = target & 0xffff
                | u64::from(KERNEL_CODE) << 16
                | 1 << 32
                | (0x8e | dpl << 5) << 40
                | (target >> 16 & 0xffff) << 48;
            self.put64(tables + IDT + v * 16, low);
            self.put64(tables + IDT + v * 16 + 8, target >> 32);
            self.put(page::HANDLERS * PAGE + v * 16, &[0xf4]);
        }
    }

    /// Puts code at an offset of the code pages.
    pub(crate) fn set_code(&mut self, offset: u64, bytes: &[u8]) {
        for (i, &b) in bytes.iter().enumerate() {
            let at = offset + i as u64;
            assert!(at < CODE_BYTES as u64);
            self.put((page::CODE_LAST - at / PAGE) * PAGE + at % PAGE, &[b]);
        }
        self.ram.written.lock().unwrap().extend((0..CODE_PAGES).map(|i| page::CODE_LAST - i));
        self.cpu.kick().code_written();
    }

    /// Copies out the data pages.
    pub(crate) fn data(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(DATA_BYTES);
        for i in 0..DATA_PAGES {
            // SAFETY: a page inside the allocation; the CPU is not running.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(self.data_page(i), PAGE as usize) });
        }
        data
    }

    fn data_page(&self, i: u64) -> *mut u8 {
        // SAFETY: inside the allocation.
        unsafe { self.ram.host.add(((page::DATA_LAST - i) * PAGE) as usize) }
    }

    /// Writes `bytes` at `offset` of the data pages.
    pub(crate) fn set_data(&mut self, offset: usize, bytes: &[u8]) {
        for (i, &b) in bytes.iter().enumerate() {
            let at = offset + i;
            // SAFETY: `data_page` checks nothing, but `at` is bounded here.
            unsafe {
                assert!(at < DATA_BYTES);
                *self.data_page(at as u64 / PAGE).add(at % PAGE as usize) = b;
            }
        }
    }

    /// How often instructions raised #UD for want of an implementation.
    pub(crate) fn unimplemented(&self) -> u64 {
        self.cpu.diagnostics().unimplemented.values().sum()
    }

    /// Runs from `state` until an exception.
    pub(crate) fn run(&mut self, state: &State) -> Result<Outcome, String> {
        let mut s = self.base.clone();
        s.gpr = state.gpr;
        s.rip = state.rip;
        s.rflags = state.rflags;
        s.fxsave.copy_from_slice(&*state.fx);
        self.cpu.set_state(&s).map_err(|e| e.to_string())?;
        match self.cpu.run(&mut NoBus, 100_000) {
            Exit::Halt => {}
            other => return Err(format!("{other:?}")),
        }
        let end = self.cpu.state();
        let at = end.rip.wrapping_sub(kernel(page::HANDLERS));
        if at % 16 != 1 || at / 16 >= 32 {
            return Err(format!("Halted at {:#x}", end.rip));
        }
        let vector = at / 16;
        let top = (page::STACK + 1) * PAGE;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let mut gpr = end.gpr;
        gpr[4] = self.get64(top - 16);
        let mut fx = Box::new([0; 512]);
        fx.copy_from_slice(&end.fxsave);
        Ok(Outcome {
            state: State { gpr, rflags: self.get64(top - 24), rip: self.get64(top - 40), fx },
            vector,
            error: if has_error { self.get64(top - 48) } else { 0 },
            cr2: end.cr2,
        })
    }
}

fn base_state() -> CpuState {
    let flat =
        |selector: u16, attributes: u16| SegmentState { selector, base: 0, limit: u32::MAX, attributes };
    let data = flat(USER_DATA, 0xc0f3);
    let tables = kernel(page::TABLES);
    CpuState {
        gpr: [0; 16],
        rip: CODE,
        rflags: 2,
        segments: [data, flat(USER_CODE, 0xa0fb), data, data, data, SegmentState { base: GS, ..data }],
        ldtr: SegmentState { selector: 0, base: 0, limit: 0, attributes: 0 },
        tr: SegmentState { selector: 0x40, base: tables + TSS, limit: 0x67, attributes: 0x8b },
        gdtr: TableState { base: tables, limit: 0x2f },
        idtr: TableState { base: tables + IDT, limit: 32 * 16 - 1 },
        cr0: 0x8001_0033, // PG, WP, NE, ET, MP, PE
        cr2: 0,
        cr3: page::PML4 * PAGE,
        cr4: 0x6a0, // PAE, PGE, OSFXSR, OSXMMEXCPT, without OSXSAVE
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        msrs: vec![(0xc000_0080, 0xd01)], // EFER: NXE, LMA, LME, SCE
        fxsave: vec![0; 512],
        halted: false,
        interrupt_shadow: false,
    }
}
