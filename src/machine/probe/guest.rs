//! The probe's guest: what Linux does all the time, in twenty bytes of code.
//!
//! User code in ring 3, under paging, raises a software interrupt for ever; the handler in ring 0 reloads CR3, as a context
//! switch does, and returns by IRETQ. Every [`BATCH`] rounds it writes to [`PORT`], which gives the host a chance
//! to look at its watch.

use amber_x86::state::{CpuState, SegmentState, TableState};

/// Bytes of guest memory, mapped to themselves.
pub(super) const SIZE: usize = 64 << 10;
/// Rounds between two exits.
pub(super) const BATCH: u32 = 200;
/// The port that is written to.
pub(super) const PORT: u16 = 0x10;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const TABLE: u64 = 0xb000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const USER: u64 = 0x7000;
const HANDLER: u64 = 0x7100;
const KERNEL_STACK: u64 = 0x9000;
const USER_STACK: u64 = 0xa000;
const VECTOR: u64 = 0x40;
const PRESENT_WRITABLE_USER: u64 = 7;

/// `loop: int 0x40; jmp loop`
const USER_CODE: [u8; 4] = [0xcd, VECTOR as u8, 0xeb, 0xfc];

/// ```text
/// mov rax, cr3; mov cr3, rax
/// dec ecx; jnz done
/// mov ecx, BATCH; out PORT, al
/// done: iretq
/// ```
fn handler_code() -> Vec<u8> {
    let mut code = vec![0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0xff, 0xc9, 0x75, 0x07, 0xb9];
    code.extend(BATCH.to_le_bytes());
    code.extend([0xe6, PORT as u8, 0x48, 0xcf]);
    code
}

const KERNEL_CODE: u16 = 0x08;
const USER_CODE_SELECTOR: u16 = 0x18 | 3;
const USER_DATA_SELECTOR: u16 = 0x20 | 3;
const TSS_SELECTOR: u16 = 0x28;

/// Fills guest memory.
pub(super) fn write(memory: &mut [u8]) {
    let mut put = |at: u64, bytes: &[u8]| {
        memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    for (at, next) in [(PML4, PDPT), (PDPT, DIRECTORY), (DIRECTORY, TABLE)] {
        put(at, &(next | PRESENT_WRITABLE_USER).to_le_bytes());
    }
    for page in 0..SIZE as u64 / 4096 {
        put(TABLE + page * 8, &((page * 4096) | PRESENT_WRITABLE_USER).to_le_bytes());
    }
    let descriptors: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        // A busy 64-bit TSS of 104 bytes at TSS, which is below 64 KiB.
        TSS << 16 | 0x8b << 40 | 103,
        0,
    ];
    for (i, descriptor) in (0..).zip(descriptors) {
        put(GDT + i * 8, &u64::to_le_bytes(descriptor));
    }
    // An interrupt gate that ring 3 may use.
    let gate = HANDLER | u64::from(KERNEL_CODE) << 16 | 0xee << 40;
    put(IDT + VECTOR * 16, &gate.to_le_bytes());
    put(TSS + 4, &KERNEL_STACK.to_le_bytes());
    put(USER, &USER_CODE);
    put(HANDLER, &handler_code());
}

/// The CPU's first state: in user code.
pub(super) fn state() -> CpuState {
    let segment = |selector, attributes| SegmentState { selector, base: 0, limit: u32::MAX, attributes };
    let (code, data) = (segment(USER_CODE_SELECTOR, 0xa0fb), segment(USER_DATA_SELECTOR, 0xc0f3));
    let mut gpr = [0; 16];
    (gpr[1], gpr[4]) = (u64::from(BATCH), USER_STACK);
    let mut fxsave = vec![0; 512];
    fxsave[..2].copy_from_slice(&0x037fu16.to_le_bytes());
    fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    CpuState {
        gpr,
        rip: USER,
        rflags: 2,
        segments: [data, code, data, data, data, data],
        ldtr: SegmentState { selector: 0, base: 0, limit: 0, attributes: 0x0082 },
        tr: SegmentState { selector: TSS_SELECTOR, base: TSS, limit: 103, attributes: 0x008b },
        gdtr: TableState { base: GDT, limit: 7 * 8 - 1 },
        idtr: TableState { base: IDT, limit: 0xfff },
        cr0: 0x8001_0033,
        cr2: 0,
        cr3: PML4,
        cr4: 0x20,
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        msrs: vec![(0xc000_0080, 0x500)],
        fxsave,
        halted: false,
        interrupt_shadow: false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use amber_x86::{Bus, Cpu, Exit, Kick};

    use super::*;
    use crate::machine::platform::MemoryMap;
    use crate::machine::ram::Ram;

    /// Counts writes to the port and stops at the tenth.
    struct Counter(u32, Kick);

    impl Bus for Counter {
        fn mmio_read(&mut self, pa: u64, _: &mut [u8]) {
            panic!("read of {pa:#x}");
        }
        fn mmio_write(&mut self, pa: u64, _: &[u8]) {
            panic!("write of {pa:#x}");
        }
        fn io_read(&mut self, port: u16, _: &mut [u8]) {
            panic!("IN {port:#x}");
        }
        fn io_write(&mut self, port: u16, _: &[u8]) {
            assert_eq!(port, PORT);
            self.0 += 1;
            if self.0 == 10 {
                self.1.kick();
            }
        }
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

    /// The probe must not call a good KVM useless because its own guest is wrong; another CPU runs it here.
    #[test]
    fn the_guest_does_its_rounds() {
        let mut memory = vec![0; SIZE];
        write(&mut memory);
        let ram = Arc::new(Ram::new(MemoryMap::with_pages(SIZE as u64 / 4096)).unwrap());
        ram.write(0, &memory).unwrap();
        let mut cpu = Cpu::new(ram);
        cpu.set_state(&state()).unwrap();
        let mut bus = Counter(0, cpu.kick());
        assert_eq!(cpu.run(&mut bus, 1_000_000), Exit::Kicked);
        assert_eq!(bus.0, 10);
        // INT, two moves of CR3, DEC, JNZ, IRETQ and JMP a round.
        let rounds = u64::from(10 * BATCH);
        assert!((rounds * 7..rounds * 7 + 64).contains(&cpu.diagnostics().instructions));
    }
}
