//! Booting a Linux kernel without firmware: what the 64-bit boot protocol wants in memory and in the CPU.
//!
//! Linux: Documentation/arch/x86/boot.rst ("64-bit boot protocol") and zero-page.rst; the MP table follows Intel's
//! MultiProcessor Specification 1.4. The kernel is a vmlinux, plain or compressed with zstd: a software CPU would
//! execute six times the instructions of the whole boot to unpack a bzImage.

use std::io::{Cursor, Read};

use amber_x86::state::{CpuState, SegmentState, TableState};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress};

use super::platform::{IOAPIC_BASE, IOAPIC_PINS, LAPIC_BASE, LOW_RAM_END, MemoryMap, ioapic_id, layout};
use super::ram::view::GuestMemory;

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// A kernel larger than this is none.
const MAX_KERNEL: u64 = 256 << 20;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `struct setup_data` type of a random seed.
const SETUP_RNG_SEED: u32 = 9;
const LARGE_PAGE: u64 = 2 << 20;
const PTE_PRESENT_WRITABLE: u64 = 3;
const PTE_LARGE: u64 = 1 << 7;

/// The kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image cannot be decompressed.
    #[error("The guest kernel is damaged: it cannot be decompressed")]
    Decompress(#[source] std::io::Error),
    /// It decompresses to more than any kernel has.
    #[error("The guest kernel is larger than {} MiB", MAX_KERNEL >> 20)]
    TooLarge,
    /// It is no vmlinux for this machine.
    #[error("The guest kernel is not a 64-bit ELF vmlinux that fits this machine's RAM")]
    Elf(#[source] linux_loader::loader::Error),
    /// The command line does not fit.
    #[error("The kernel command line has {0} bytes; at most {max} are possible", max = layout::CMDLINE_SIZE - 1)]
    CommandLine(usize),
    /// What the loader writes does not lie in RAM.
    #[error("Guest RAM does not take the boot data")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Loads a kernel and everything it wants to find, and returns the CPU's first state.
pub(super) fn load(
    mem: &GuestMemory,
    map: MemoryMap,
    cpus: u8,
    kernel: &[u8],
    command_line: &str,
    seed: &[u8; 32],
) -> Result<CpuState, BootError> {
    let image = decompress(kernel)?;
    let high = Some(GuestAddress(layout::EXTENDED));
    let loaded = Elf::load(mem, None, &mut Cursor::new(&*image), high).map_err(BootError::Elf)?;
    if command_line.len() as u64 >= layout::CMDLINE_SIZE {
        return Err(BootError::CommandLine(command_line.len()));
    }
    mem.write_slice(command_line.as_bytes(), GuestAddress(layout::CMDLINE))?;
    mem.write_obj(0u8, GuestAddress(layout::CMDLINE + command_line.len() as u64))?;
    write_seed(mem, seed)?;
    write_boot_params(mem, map, command_line.len())?;
    mem.write_slice(&mp_table(cpus), GuestAddress(layout::MP_TABLE))?;
    write_page_tables(mem)?;
    for (i, descriptor) in GDT.iter().enumerate() {
        mem.write_slice(&descriptor.to_le_bytes(), GuestAddress(layout::GDT + i as u64 * 8))?;
    }
    Ok(entry_state(loaded.kernel_load.raw_value()))
}

fn decompress(kernel: &[u8]) -> Result<std::borrow::Cow<'_, [u8]>, BootError> {
    if !kernel.starts_with(&ZSTD_MAGIC) {
        return Ok(kernel.into());
    }
    let decoder = zstd::stream::read::Decoder::new(kernel).map_err(BootError::Decompress)?;
    let mut image = Vec::new();
    decoder.take(MAX_KERNEL + 1).read_to_end(&mut image).map_err(BootError::Decompress)?;
    if image.len() as u64 > MAX_KERNEL {
        return Err(BootError::TooLarge);
    }
    Ok(image.into())
}

/// `struct setup_data` with a seed, so that the guest's random number generator is ready from the start.
fn write_seed(mem: &GuestMemory, seed: &[u8; 32]) -> Result<(), BootError> {
    let mut data = Vec::with_capacity(48);
    data.extend(0u64.to_le_bytes());
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend((seed.len() as u32).to_le_bytes());
    data.extend(seed);
    Ok(mem.write_slice(&data, GuestAddress(layout::SETUP_DATA))?)
}

fn write_boot_params(mem: &GuestMemory, map: MemoryMap, command_line: usize) -> Result<(), BootError> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.kernel_alignment = 0x0100_0000;
    // All below 4 GiB.
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = command_line as u32;
    params.hdr.setup_data = layout::SETUP_DATA;
    let mut entries = vec![
        (0, layout::BASE_END, E820_RAM),
        (layout::BASE_END, layout::EXTENDED - layout::BASE_END, E820_RESERVED),
    ];
    for (start, len) in map.ranges() {
        let from = start.max(layout::EXTENDED);
        entries.push((from, start + len - from, E820_RAM));
    }
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(&entries) {
        *slot = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    // At most four.
    params.e820_entries = entries.len() as u8;
    Ok(mem.write_obj(params, GuestAddress(layout::BOOT_PARAMS))?)
}

/// The first 4 GiB, identity-mapped by 2 MiB pages: one PML4, one PDPT, four page directories.
fn write_page_tables(mem: &GuestMemory) -> Result<(), BootError> {
    let table = |n: u64| layout::PAGE_TABLES + n * 4096;
    let entry = |at: u64, value: u64| mem.write_slice(&value.to_le_bytes(), GuestAddress(at));
    entry(table(0), table(1) | PTE_PRESENT_WRITABLE)?;
    for gib in 0..4 {
        entry(table(1) + gib * 8, table(2 + gib) | PTE_PRESENT_WRITABLE)?;
        for i in 0..512 {
            let address = (gib * 512 + i) * LARGE_PAGE;
            entry(table(2 + gib) + i * 8, address | PTE_PRESENT_WRITABLE | PTE_LARGE)?;
        }
    }
    Ok(())
}

/// Null, null, the protocol's code segment (0x10) and data segment (0x18).
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// The CPU at the 64-bit entry: long mode, paging on, interrupts off, RSI at `struct boot_params`.
fn entry_state(entry: u64) -> CpuState {
    let segment = |selector, attributes| SegmentState { selector, base: 0, limit: u32::MAX, attributes };
    let (code, data) = (segment(0x10, 0xa09b), segment(0x18, 0xc093));
    let mut gpr = [0; 16];
    (gpr[4], gpr[5], gpr[6]) = (layout::STACK, layout::STACK, layout::BOOT_PARAMS);
    let mut fxsave = vec![0; 512];
    fxsave[..2].copy_from_slice(&0x037fu16.to_le_bytes());
    fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    CpuState {
        gpr,
        rip: entry,
        rflags: 2,
        segments: [data, code, data, data, data, data],
        ldtr: SegmentState { selector: 0, base: 0, limit: 0, attributes: 0x0082 },
        tr: SegmentState { selector: 0, base: 0, limit: 0, attributes: 0x008b },
        gdtr: TableState { base: layout::GDT, limit: (GDT.len() * 8 - 1) as u16 },
        idtr: TableState::default(),
        cr0: 0x8005_0033, // PE, MP, ET, NE, WP, AM, PG
        cr2: 0,
        cr3: layout::PAGE_TABLES,
        cr4: 0x20, // PAE
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        msrs: vec![
            (0x174, 0),                     // SYSENTER_CS
            (0x175, 0),                     // SYSENTER_ESP
            (0x176, 0),                     // SYSENTER_EIP
            (0x1a0, 1),                     // MISC_ENABLE: fast strings
            (0x277, 0x0007_0406_0007_0406), // PAT
            (0xc000_0080, 0x500),           // EFER: LME, LMA
            (0xc000_0081, 0),               // STAR
            (0xc000_0082, 0),               // LSTAR
            (0xc000_0083, 0),               // CSTAR
            (0xc000_0084, 0),               // SFMASK
            (0xc000_0102, 0),               // KERNEL_GS_BASE
            (0xc000_0103, 0),               // TSC_AUX
        ],
        fxsave,
        halted: false,
        interrupt_shadow: false,
    }
}

/// The MP floating pointer and, behind it, the configuration table: the CPUs, an ISA bus, one I/O APIC whose pins are
/// the ISA interrupts of the same number.
fn mp_table(cpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..cpus {
        // Processor: APIC id, version 0x14, enabled, the first is the boot processor; family 6.
        let mut cpu = vec![0, id, 0x14, if id == 0 { 3 } else { 1 }];
        cpu.extend(0x0600u32.to_le_bytes());
        cpu.extend(0x0201u32.to_le_bytes());
        cpu.extend([0; 8]);
        entries.push(cpu);
    }
    let ioapic = ioapic_id(cpus);
    entries.push([&[1, 0][..], b"ISA   "].concat());
    entries.push([&[2, ioapic, 0x11, 1][..], &(IOAPIC_BASE as u32).to_le_bytes()].concat());
    for pin in 0..IOAPIC_PINS as u8 {
        // Vectored interrupt, polarity and trigger as the bus has them.
        entries.push(vec![3, 0, 0, 0, 0, pin, ioapic, pin]);
    }
    // ExtINT at LINT0, NMI at LINT1 of every local APIC.
    entries.push(vec![4, 3, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![4, 1, 0, 0, 0, 0, 0xff, 1]);

    const HEADER: usize = 44;
    let len = HEADER + entries.iter().map(Vec::len).sum::<usize>();
    let mut config = Vec::with_capacity(len);
    config.extend(b"PCMP");
    config.extend((len as u16).to_le_bytes());
    config.extend([4, 0]); // Specification 1.4, checksum.
    config.extend(b"AMBERBOX");
    config.extend(b"MICROVM     ");
    config.extend([0; 6]); // No OEM table.
    config.extend((entries.len() as u16).to_le_bytes());
    config.extend((LAPIC_BASE as u32).to_le_bytes());
    config.extend([0; 4]);
    config.extend(entries.concat());
    config[7] = checksum(&config);

    const POINTER: usize = 16;
    let mut table = b"_MP_".to_vec();
    table.extend((layout::MP_TABLE as u32 + POINTER as u32).to_le_bytes());
    table.extend([1, 4, 0, 0, 0, 0, 0, 0]); // One paragraph, version 1.4, checksum, features: a table follows.
    table[10] = checksum(&table);
    table.extend(config);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

const _: () = assert!(layout::PAGE_TABLES + 6 * 4096 <= layout::STACK && layout::STACK < layout::CMDLINE);
const _: () = assert!(layout::EXTENDED < LOW_RAM_END);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::machine::platform::MAX_CPUS;
    use crate::machine::ram::Ram;
    use crate::machine::ram::view::view;
    use crate::machine::tests::kernel;

    fn tiny_kernel() -> Vec<u8> {
        kernel(&[0x90; 16])
    }

    fn machine() -> (GuestMemory, MemoryMap) {
        let map = MemoryMap::new(64 << 20).unwrap();
        (view(&Arc::new(Ram::new(map).unwrap())).unwrap(), map)
    }

    fn u64_at(mem: &GuestMemory, at: u64) -> u64 {
        let mut bytes = [0; 8];
        mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn a_kernel_boots_plain_and_compressed() {
        let plain = tiny_kernel();
        let packed = zstd::encode_all(&*plain, 3).unwrap();
        for kernel in [plain, packed] {
            let (mem, map) = machine();
            let state = load(&mem, map, 1, &kernel, "quiet", &[7; 32]).unwrap();
            assert_eq!((state.rip, state.gpr[6]), (0x100_0000, layout::BOOT_PARAMS));
            assert_eq!(u64_at(&mem, 0x100_0008), 0x9090_9090_9090_9090);
            let params: boot_params = mem.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
            assert_eq!(params.e820_entries, 3);
            let last = params.e820_table[2];
            assert_eq!((last.addr, last.addr + last.size), (layout::EXTENDED, 64 << 20));
            let mut line = [0; 6];
            mem.read_slice(&mut line, GuestAddress(layout::CMDLINE)).unwrap();
            assert_eq!(&line, b"quiet\0");
            assert_eq!(u64_at(&mem, layout::SETUP_DATA + 8), 32 << 32 | 9);
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let (mem, map) = machine();
        assert!(matches!(load(&mem, map, 1, b"not a kernel at all", "", &[0; 32]), Err(BootError::Elf(_))));
        let mut broken = zstd::encode_all(&*tiny_kernel(), 3).unwrap();
        broken.truncate(40);
        assert!(matches!(load(&mem, map, 1, &broken, "", &[0; 32]), Err(BootError::Decompress(_))));
        let mut outside = tiny_kernel();
        outside[64 + 24..64 + 32].copy_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(matches!(load(&mem, map, 1, &outside, "", &[0; 32]), Err(BootError::Elf(_))));
        let line = "x".repeat(layout::CMDLINE_SIZE as usize);
        assert!(matches!(
            load(&mem, map, 1, &tiny_kernel(), &line, &[0; 32]),
            Err(BootError::CommandLine(2048))
        ));
    }

    #[test]
    fn the_page_tables_map_the_first_four_gib_to_themselves() {
        let (mem, map) = machine();
        let state = load(&mem, map, 1, &tiny_kernel(), "", &[0; 32]).unwrap();
        for address in [0, 0x100_0123, 0xfee0_0000, 0xffff_ffff_u64] {
            let pdpt = u64_at(&mem, state.cr3) & !0xfff;
            let directory = u64_at(&mem, pdpt + (address >> 30) * 8) & !0xfff;
            let entry = u64_at(&mem, directory + (address >> 21 & 511) * 8);
            assert_eq!(entry, address & !(LARGE_PAGE - 1) | 0x83);
        }
    }

    #[test]
    fn the_mp_table_adds_up() {
        [1, 2, MAX_CPUS].into_iter().for_each(check_mp_table);
    }

    fn check_mp_table(cpus: u8) {
        let table = mp_table(cpus);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum(&table[..16]), sum(&table[16..])), (0, 0));
        let len = usize::from(u16::from_le_bytes([table[20], table[21]]));
        assert_eq!(len, table.len() - 16);
        assert!(table.len() <= 1024);
        // Walking the entries by their sizes ends at the end.
        let (mut at, mut count) = (16 + 44, 0);
        while at < table.len() {
            at += if table[at] == 0 { 20 } else { 8 };
            count += 1;
        }
        assert_eq!((at, count), (table.len(), u16::from(cpus) + 1 + 1 + 24 + 2));
        assert_eq!(u16::from_le_bytes([table[16 + 34], table[16 + 35]]), count);
    }
}
