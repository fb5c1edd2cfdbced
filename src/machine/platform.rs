//! The platform that a guest sees, as one table: memory map, devices, interrupt pins, CPUID, MSRs, clock.
//!
//! This is an ABI. A snapshot holds a kernel that has looked at all of it, so every backend offers exactly this and a
//! change of anything here is a new [`VERSION`]. There is no firmware, no PCI and no ACPI: the kernel is entered at
//! its 64-bit entry point (Linux: Documentation/arch/x86/boot.rst), learns its interrupt routing from an MP table
//! (Intel MultiProcessor Specification 1.4) and its devices from the command line.

/// Version of this table; a snapshot of a newer one is refused.
pub const VERSION: u16 = 1;

/// Bytes per guest page.
pub const PAGE_SIZE: u64 = 4096;
/// RAM unless the user says otherwise.
pub const DEFAULT_RAM: u64 = 512 << 20;
/// The least RAM that the guest kernel boots in.
pub const MIN_RAM: u64 = 64 << 20;
/// The most RAM, bounded by the 40 physical address bits of the CPUID baseline and by good sense.
pub const MAX_RAM: u64 = 64 << 30;
/// RAM below 4 GiB ends here at the latest; what is beyond goes on at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM goes on above the 32-bit hole.
pub const HIGH_RAM: u64 = 4 << 30;

/// Local APIC registers (xAPIC).
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// I/O APIC registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Inputs of the I/O APIC.
pub const IOAPIC_PINS: usize = 24;
/// The most CPUs: ids of local APICs and of the I/O APIC, which comes behind them, have four bits.
pub const MAX_CPUS: u8 = 15;

/// The I/O APIC's id: behind that of the last CPU.
pub const fn ioapic_id(cpus: u8) -> u8 {
    cpus
}
/// First virtio-mmio window; slot i is at `VIRTIO_BASE + i * VIRTIO_STRIDE`.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Distance of two windows.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Size of one window.
pub const VIRTIO_SIZE: u64 = 0x200;
/// Interrupt pin of slot 0; slot i has `VIRTIO_PIN + i`.
pub const VIRTIO_PIN: u8 = 5;
/// Number of slots, the reserved ones included.
pub const VIRTIO_SLOTS: usize = 5;

/// What is in a virtio slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The root disk.
    Block,
    /// The way to the guest agent.
    Vsock,
    /// Random numbers.
    Entropy,
    /// Kept free for the balloon.
    Balloon,
    /// Kept free for a network interface.
    Net,
}

impl Slot {
    /// Every slot in order.
    pub const ALL: [Slot; VIRTIO_SLOTS] = [Slot::Block, Slot::Vsock, Slot::Entropy, Slot::Balloon, Slot::Net];
    /// The slots that hold a device in this version.
    pub const PRESENT: [Slot; 3] = [Slot::Block, Slot::Vsock, Slot::Entropy];

    /// Address of the register window.
    pub const fn address(self) -> u64 {
        VIRTIO_BASE + self as u64 * VIRTIO_STRIDE
    }

    /// Interrupt pin.
    pub const fn pin(self) -> u8 {
        VIRTIO_PIN + self as u8
    }
}

/// First of the serial port's eight I/O ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt pin of the serial port.
pub const SERIAL_PIN: u8 = 4;
/// Interrupt pin of the interval timer.
pub const PIT_PIN: u8 = 0;
/// The guest's context id on vsock.
pub const GUEST_CID: u64 = 3;

/// Addresses that the loader uses; all below the first megabyte.
pub mod layout {
    /// Global descriptor table.
    pub const GDT: u64 = 0x500;
    /// `struct boot_params`.
    pub const BOOT_PARAMS: u64 = 0x7000;
    /// Setup data: the random seed.
    pub const SETUP_DATA: u64 = 0x8000;
    /// Page tables: one PML4, one PDPT, four page directories.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Stack for the kernel's first instructions.
    pub const STACK: u64 = 0x1f000;
    /// Command line.
    pub const CMDLINE: u64 = 0x20000;
    /// Longest command line, with its final zero (the kernel's COMMAND_LINE_SIZE).
    pub const CMDLINE_SIZE: u64 = 2048;
    /// MP table: floating pointer, then configuration table, in the last KiB of base memory.
    pub const MP_TABLE: u64 = 0x9fc00;
    /// End of base memory.
    pub const BASE_END: u64 = 0x9fc00;
    /// Start of extended memory.
    pub const EXTENDED: u64 = 0x10_0000;
}

/// Ticks of the TSC per second under the software CPU: it counts nanoseconds.
pub const TSC_HZ: u64 = 1_000_000_000;
/// Ticks of the local APIC timer per second before its divider, which is KVM's rate.
pub const LAPIC_TIMER_HZ: u64 = 1_000_000_000;
/// kvm-clock: wall clock of the guest's boot.
pub const MSR_KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// kvm-clock: system time.
pub const MSR_KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// Time-stamp counter.
pub const MSR_TSC: u32 = 0x10;
/// Local APIC base and enable.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// The value of [`MSR_APIC_BASE`]: enabled, boot processor. Not writable otherwise.
pub const APIC_BASE: u64 = LAPIC_BASE | 1 << 11 | 1 << 8;
/// Microcode revision; reads as this value, writes are ignored.
pub const MSR_UCODE_REV: u32 = 0x8b;
const UCODE_REV: u64 = 1 << 32;

/// Model-specific registers that are constants of the platform. Everything else that neither the CPU nor the clock
/// holds raises #GP.
pub const CONSTANT_MSRS: [(u32, u64); 6] = [
    (0x17, 0),                  // PLATFORM_ID
    (0x3a, 1),                  // FEATURE_CONTROL: locked, nothing enabled
    (MSR_UCODE_REV, UCODE_REV), // written with 0 before it is read
    (0xce, 0),                  // PLATFORM_INFO
    (0x140, 0),                 // MISC_FEATURES_ENABLES
    (0x1d9, 0),                 // DEBUGCTL
];

/// Value of a constant MSR.
pub fn constant_msr(index: u32) -> Option<u64> {
    CONSTANT_MSRS.iter().find(|(msr, _)| *msr == index).map(|&(_, value)| value)
}

/// Highest standard CPUID leaf.
const MAX_LEAF: u32 = 0xd;
/// Highest extended CPUID leaf.
const MAX_EXTENDED: u32 = 0x8000_0008;

/// The CPUID baseline: x86-64-v2 (System V psABI), KVM's paravirtual clock, nothing that belongs to one host.
///
/// Leaves above the highest read as zero. The CPU itself adds what mirrors its state.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    match leaf {
        0 => {
            let [b, d, c] = words(b"GenuineIntel");
            [MAX_LEAF, b, c, d]
        }
        1 => [
            // Family 6, model 85, stepping 4: a server part that has all that follows.
            0x0005_0654,
            // CLFLUSH line of 64 bytes, one logical processor, APIC id 0.
            8 << 8 | 1 << 16,
            bits(&[
                0,  // SSE3
                9,  // SSSE3
                13, // CMPXCHG16B
                19, // SSE4.1
                20, // SSE4.2
                23, // POPCNT
                30, // RDRAND
                31, // hypervisor
            ]),
            bits(&[
                0,  // FPU
                2,  // DE
                3,  // PSE
                4,  // TSC
                5,  // MSR
                6,  // PAE
                8,  // CMPXCHG8B
                9,  // APIC
                11, // SYSENTER
                13, // PGE
                15, // CMOV
                16, // PAT
                19, // CLFLUSH
                23, // MMX
                24, // FXSR
                25, // SSE
                26, // SSE2
            ]),
        ],
        // Caches: "see leaf 4".
        2 => [0x00ff_ff01, 0, 0, 0],
        // No cache topology: one CPU.
        4 => [0; 4],
        // ARAT: the local APIC timer never stops.
        6 => [bits(&[2]), 0, 0, 0],
        7 if subleaf == 0 => [
            0,
            bits(&[
                0, // FSGSBASE
                9, // ERMS
            ]),
            0,
            bits(&[
                4, // FSRM
            ]),
        ],
        0x4000_0000 => {
            let [b, c, d] = words(b"KVMKVMKVM\0\0\0");
            [0x4000_0001, b, c, d]
        }
        0x4000_0001 => [
            bits(&[
                3,  // CLOCKSOURCE2
                24, // CLOCKSOURCE_STABLE
            ]),
            0,
            0,
            0,
        ],
        0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
        0x8000_0001 => [
            0,
            0,
            bits(&[
                0, // LAHF in 64-bit mode
            ]),
            bits(&[
                11, // SYSCALL
                20, // NX
                27, // RDTSCP
                29, // long mode
            ]),
        ],
        0x8000_0002..=0x8000_0004 => {
            const BRAND: &[u8; 48] = b"Amberbox x86-64-v2 virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
            let at = (leaf - 0x8000_0002) as usize * 16;
            let word = |i: usize| {
                let p = at + i * 4;
                u32::from_le_bytes([BRAND[p], BRAND[p + 1], BRAND[p + 2], BRAND[p + 3]])
            };
            [word(0), word(1), word(2), word(3)]
        }
        // L2: 64-byte lines, 4-way, 1 MiB.
        0x8000_0006 => [0, 0, 1024 << 16 | 4 << 12 | 64, 0],
        // Physical and linear address bits.
        0x8000_0008 => [48 << 8 | 40, 0, 0, 0],
        _ => [0; 4],
    }
}

/// Bits set.
const fn bits(list: &[u32]) -> u32 {
    let mut value = 0;
    let mut i = 0;
    while i < list.len() {
        value |= 1 << list[i];
        i += 1;
    }
    value
}

/// Twelve characters as three registers.
fn words(text: &[u8; 12]) -> [u32; 3] {
    [0, 4, 8].map(|p| u32::from_le_bytes([text[p], text[p + 1], text[p + 2], text[p + 3]]))
}

/// Where RAM is: page indices, as the CPU, the images and the flags count them, to guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryMap {
    pages: u64,
}

impl MemoryMap {
    /// A map for `bytes` of RAM, or `None` when that is no size a machine can have.
    pub fn new(bytes: u64) -> Option<MemoryMap> {
        let whole = bytes.is_multiple_of(PAGE_SIZE);
        (whole && (MIN_RAM..=MAX_RAM).contains(&bytes)).then_some(MemoryMap { pages: bytes / PAGE_SIZE })
    }

    /// A map of any size, for tests of what does not boot.
    #[cfg(test)]
    pub(crate) fn with_pages(pages: u64) -> MemoryMap {
        MemoryMap { pages }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Bytes below the 32-bit hole.
    pub fn low(&self) -> u64 {
        self.bytes().min(LOW_RAM_END)
    }

    /// Bytes above it.
    pub fn high(&self) -> u64 {
        self.bytes() - self.low()
    }

    /// Page index of a guest-physical address.
    #[inline]
    pub fn page_of(&self, pa: u64) -> Option<u64> {
        if pa < self.low() {
            Some(pa / PAGE_SIZE)
        } else if pa >= HIGH_RAM && pa - HIGH_RAM < self.high() {
            Some((LOW_RAM_END + (pa - HIGH_RAM)) / PAGE_SIZE)
        } else {
            None
        }
    }

    /// Guest-physical address of a page.
    pub fn address_of(&self, page: u64) -> u64 {
        let offset = page * PAGE_SIZE;
        if offset < LOW_RAM_END { offset } else { offset - LOW_RAM_END + HIGH_RAM }
    }

    /// RAM as (guest-physical start, length) ranges.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let high = (HIGH_RAM, self.high());
        std::iter::once((0, self.low())).chain((high.1 > 0).then_some(high)).collect()
    }
}

/// The kernel command line of a machine that boots (a restored one has its own).
pub fn command_line(init: &str, extra: &str) -> String {
    let mut line = String::from(
        "console=ttyS0 reboot=t panic=-1 noreplace-smp swiotlb=noforce tsc=reliable \
         root=/dev/vda rw rootfstype=ext4",
    );
    for slot in Slot::PRESENT {
        line += &format!(" virtio_mmio.device={VIRTIO_SIZE}@{:#x}:{}", slot.address(), slot.pin());
    }
    if !extra.is_empty() {
        line += " ";
        line += extra;
    }
    // Last, because `init` may carry arguments behind "--".
    line + " init=" + init
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_addresses_are_inverse_around_the_hole() {
        for bytes in [MIN_RAM, DEFAULT_RAM, LOW_RAM_END, LOW_RAM_END + PAGE_SIZE, 8 << 30] {
            let map = MemoryMap::new(bytes).unwrap();
            for page in [0, 1, map.pages() / 2, map.low() / PAGE_SIZE - 1, map.pages() - 1] {
                assert_eq!(map.page_of(map.address_of(page) + 0xfff), Some(page));
            }
            assert_eq!(map.page_of(map.low()), None);
            assert_eq!(map.page_of(LAPIC_BASE), None);
            assert_eq!(map.page_of(HIGH_RAM + map.high()), None);
            assert_eq!(map.page_of(u64::MAX), None);
            assert_eq!(map.ranges().iter().map(|r| r.1).sum::<u64>(), bytes);
        }
    }

    #[test]
    fn only_whole_pages_within_limits_are_ram() {
        for bytes in [0, MIN_RAM - PAGE_SIZE, DEFAULT_RAM + 1, MAX_RAM + PAGE_SIZE, u64::MAX] {
            assert_eq!(MemoryMap::new(bytes), None);
        }
    }

    #[test]
    fn no_window_overlaps_another_or_ram() {
        let mut windows: Vec<(u64, u64)> = Slot::ALL.iter().map(|s| (s.address(), VIRTIO_SIZE)).collect();
        windows.extend([(LAPIC_BASE, PAGE_SIZE), (IOAPIC_BASE, PAGE_SIZE)]);
        windows.extend(MemoryMap::new(MAX_RAM).unwrap().ranges());
        windows.sort_unstable();
        assert!(windows.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
    }

    #[test]
    fn cpuid_has_no_host_in_it() {
        // XSAVE, OSXSAVE, AVX, TSC-deadline, x2APIC, MONITOR, PCID must be absent.
        let [_, _, ecx, edx] = cpuid(1, 0);
        assert_eq!(ecx & (1 << 26 | 1 << 27 | 1 << 28 | 1 << 24 | 1 << 21 | 1 << 3 | 1 << 17), 0);
        // MCE, MCA and MTRR have no registers behind them.
        assert_eq!(edx & (1 << 7 | 1 << 14 | 1 << 12), 0);
        // No invariant TSC: the clocksource stays kvm-clock.
        assert_eq!(cpuid(0x8000_0007, 0), [0; 4]);
        assert_eq!(cpuid(0, 0)[0], MAX_LEAF);
        let [_, b, c, d] = cpuid(0, 0);
        let vendor: Vec<u8> = [b, d, c].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(vendor, b"GenuineIntel");
    }

    #[test]
    fn the_command_line_announces_each_device() {
        let line = command_line("/sbin/agent", "quiet");
        assert!(line.contains(" virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0001000:6 "));
        assert!(line.ends_with(" quiet init=/sbin/agent"));
        assert!((line.len() as u64) < layout::CMDLINE_SIZE);
    }
}
