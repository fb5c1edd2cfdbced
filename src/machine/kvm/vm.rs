//! A machine in KVM: its memory slots, interrupt controllers, clock and the record of what its CPUs wrote.
//!
//! The kernel has the local APICs, the I/O APIC and the interval timer. The two 8259s that come with them have no inputs
//! here: each line leads to the I/O APIC's pin of the same number and nowhere else, as the MP table says.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use amber_x86::{GuestRam, PageFlags};
use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_TSC_CONTROL, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_PIT_SPEAKER_DUMMY,
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KvmIrqRouting, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_device_attr, kvm_enable_cap, kvm_irq_routing_entry, kvm_irqchip, kvm_msr_entry, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use super::fault::Filler;
use super::{chips, cpuid, failed, host, present};
use crate::machine::irq::IrqchipState;
use crate::machine::platform::{
    IOAPIC_PINS, MSR_APIC_BASE, MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK, MSR_TSC, PAGE_SIZE, TSC_HZ,
};
use crate::machine::ram::Ram;
use crate::machine::vcpu::{Counter, CpuModel, HostChips, Shape};

/// Three pages that KVM needs on old Intel CPUs, in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// And one more.
const IDENTITY_MAP: u64 = 0xfffb_c000;
/// MSRs that KVM itself serves, as (first, number, writable too). All others go to the bus, where the platform's constants are
/// and the rest is refused.
const SERVED: [(u32, u32, bool); 8] = [
    (MSR_TSC, 1, true),
    (MSR_APIC_BASE, 1, false),
    (0x174, 3, true),       // SYSENTER_*
    (0x1a0, 1, true),       // MISC_ENABLE
    (0x277, 1, true),       // PAT
    (0xc000_0080, 5, true), // EFER, STAR, LSTAR, CSTAR, SFMASK
    (0xc000_0100, 4, true), // FS.base, GS.base, KERNEL_GS_BASE, TSC_AUX
    (MSR_KVM_WALL_CLOCK, 2, true),
];

/// A machine. Its CPUs are used by the threads that run them, and by others only while they do not run.
pub(super) struct KvmVm {
    cpus: Vec<Mutex<VcpuFd>>,
    vm: VmFd,
    /// What the guest sees of the host's CPU, if it does.
    host: Option<CpuId>,
    /// Brings in what is touched; `None` if all is there.
    filler: Option<Filler>,
    /// Under the machine, and so dropped after it.
    ram: Arc<Ram>,
}

/// The one memory slot of each contiguous piece of RAM.
fn slots(ram: &Ram) -> impl Iterator<Item = (u32, u64, u64)> {
    (0..).zip(ram.map().ranges()).map(|(slot, (start, len))| (slot, start, len))
}

impl KvmVm {
    /// A machine over `ram` with CPUs as after reset.
    pub(super) fn new(ram: &Arc<Ram>, shape: Shape) -> Result<KvmVm, String> {
        let kvm = kvm_ioctls::Kvm::new().map_err(failed("be opened"))?;
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("tell what the host's CPU supports"))?;
        cpuid::check(supported.as_slice())?;
        let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(failed("set up real mode"))?;
        vm.set_identity_map_address(IDENTITY_MAP).map_err(failed("set up real mode"))?;
        for (slot, guest_phys_addr, memory_size) in slots(ram) {
            let first = ram.page_of(guest_phys_addr).unwrap_or(0);
            let region = kvm_userspace_memory_region {
                slot,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr,
                memory_size,
                userspace_addr: ram.host() as u64 + first * PAGE_SIZE,
            };
            // SAFETY: the range lies within the mapping of `ram`, which this object keeps beyond the machine's end.
            unsafe { vm.set_user_memory_region(region) }.map_err(failed("use guest memory"))?;
        }
        controllers(&vm)?;
        // The host's CPU has registers that the platform does not know.
        if shape.model == CpuModel::Baseline {
            serve_msrs(&vm)?;
        }
        let table = |index: u8| match shape.model {
            CpuModel::Baseline => cpuid::table(index),
            CpuModel::Host => host::table(supported.as_slice(), index),
        };
        let create = |index: u8| create_cpu(&vm, index, &table(index)?, shape.model);
        let cpus = (0..shape.cpus).map(create).collect::<Result<_, _>>()?;
        // Last, so that a machine that cannot be made costs no decoding.
        let filler = match Filler::new(ram) {
            Ok(filler) => Some(filler),
            Err(_) => {
                present::bring_in(ram)?;
                None
            }
        };
        let host = (shape.model == CpuModel::Host).then(|| table(0)).transpose()?;
        Ok(KvmVm { cpus, vm, filler, host, ram: Arc::clone(ram) })
    }

    /// A CPU. Waits while it runs.
    pub(super) fn cpu(&self, index: usize) -> MutexGuard<'_, VcpuFd> {
        // The index is that of a CPU of this machine; what a panic leaves behind is KVM's state, which is always valid.
        self.cpus[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks pages that any CPU, or the kernel itself, has written since the last call.
    pub(super) fn collect_dirty(&self) -> Result<(), String> {
        let flags = self.ram.flags();
        for (slot, start, len) in slots(&self.ram) {
            let log =
                self.vm.get_dirty_log(slot, len as usize).map_err(failed("tell which pages changed"))?;
            let first = self.ram.page_of(start).unwrap_or(0);
            for (word, bits) in (0u64..).zip(log) {
                let mut rest = bits;
                while rest != 0 {
                    let page = first + word * 64 + u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    if let Some(flag) = flags.get(page as usize) {
                        flag.fetch_or(PageFlags::DIRTY, Ordering::AcqRel);
                    }
                }
            }
        }
        Ok(())
    }

    /// What the guest sees of the host's CPU, if it does.
    pub(super) fn host(&self) -> Option<&[kvm_cpuid_entry2]> {
        self.host.as_ref().map(|table| table.as_slice())
    }

    /// Why guest memory cannot be reached.
    pub(super) fn memory_failure(&self) -> String {
        let failure = self.filler.as_ref().and_then(Filler::failure);
        failure.unwrap_or_else(|| "KVM cannot reach guest memory; the host is probably out of memory".into())
    }

    fn chip(&self, chip_id: u32) -> Result<kvm_irqchip, String> {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        self.vm.get_irqchip(&mut chip).map_err(failed("tell the interrupt controller's state"))?;
        Ok(chip)
    }
}

/// The interrupt controllers and the interval timer.
fn controllers(vm: &VmFd) -> Result<(), String> {
    vm.create_irq_chip().map_err(failed("create interrupt controllers"))?;
    let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(timer).map_err(failed("create an interval timer"))?;
    let entry = |pin| {
        let type_ = KVM_IRQ_ROUTING_IRQCHIP;
        let mut entry = kvm_irq_routing_entry { gsi: pin, type_, ..kvm_irq_routing_entry::default() };
        entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry.u.irqchip.pin = pin;
        entry
    };
    let entries: Vec<kvm_irq_routing_entry> = (0..IOAPIC_PINS as u32).map(entry).collect();
    let routing = KvmIrqRouting::from_entries(&entries).map_err(|e| format!("Interrupt routing: {e:?}"))?;
    vm.set_gsi_routing(&routing).map_err(failed("route interrupts"))
}

/// Has KVM hand MSRs that are not its business to the bus. Kernels before 5.10 cannot: there, KVM answers for itself.
fn serve_msrs(vm: &VmFd) -> Result<(), String> {
    if vm.check_extension_raw(KVM_CAP_X86_USER_SPACE_MSR.into()) <= 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..kvm_enable_cap::default() };
    cap.args[0] = (KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN).into();
    vm.enable_cap(&cap).map_err(failed("hand over model-specific registers"))?;
    let range = |&(base, msr_count, writable): &(u32, u32, bool)| {
        let flags = MsrFilterRangeFlags::READ;
        let flags = if writable { flags | MsrFilterRangeFlags::WRITE } else { flags };
        MsrFilterRange { flags, base, msr_count, bitmap: &[0xff] }
    };
    let ranges: Vec<MsrFilterRange<'_>> = SERVED.iter().map(range).collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(failed("filter model-specific registers"))
}

fn create_cpu(vm: &VmFd, index: u8, table: &CpuId, model: CpuModel) -> Result<Mutex<VcpuFd>, String> {
    let cpu = vm.create_vcpu(index.into()).map_err(failed("create a CPU"))?;
    cpu.set_cpuid2(table).map_err(failed("set CPUID"))?;
    if vm.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) > 0 {
        // Without it, a guest could use what another host or the software CPU does not have.
        let mut cap = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..kvm_enable_cap::default() };
        cap.args[0] = 1;
        cpu.enable_cap(&cap).map_err(failed("restrict paravirtual features"))?;
    }
    if model == CpuModel::Baseline && vm.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0 {
        // Where the host scales the counter, it is that of the software CPU. Elsewhere the guest learns another rate
        // from kvm-clock.
        let _ = cpu.set_tsc_khz((TSC_HZ / 1000) as u32);
    }
    super::kick::arm(&cpu).map_err(|e| format!("KVM cannot be told of signals: {e}"))?;
    Ok(Mutex::new(cpu))
}

impl HostChips for KvmVm {
    fn set_line(&self, pin: u8, high: bool) {
        // It fails only where there is no such line.
        let _ = self.vm.set_irq_line(pin.into(), high);
    }

    fn irqchip(&self) -> Result<IrqchipState, String> {
        let ioapic = self.chip(KVM_IRQCHIP_IOAPIC)?;
        let pics = [self.chip(KVM_IRQCHIP_PIC_MASTER)?, self.chip(KVM_IRQCHIP_PIC_SLAVE)?];
        let pit = self.vm.get_pit2().map_err(failed("tell the interval timer's state"))?;
        Ok(IrqchipState {
            lapic: super::vcpu::lapic(&self.cpu(0))?,
            ioapic: chips::from_ioapic(&ioapic),
            pit: chips::from_pit(&pit, [&pics[0], &pics[1]], self.guest_time()?),
        })
    }

    fn set_irqchip(&self, state: &IrqchipState) -> Result<(), String> {
        let refused = failed("take the interrupt controllers' state");
        self.cpu(0).set_lapic(&chips::to_lapic(&state.lapic)).map_err(&refused)?;
        for chip in chips::to_pics(&state.pit) {
            self.vm.set_irqchip(&chip).map_err(&refused)?;
        }
        self.vm.set_irqchip(&chips::to_ioapic(&state.ioapic)).map_err(&refused)?;
        self.vm.set_pit2(&chips::to_pit(&state.pit)).map_err(&refused)
    }

    fn guest_time(&self) -> Result<u64, String> {
        Ok(self.vm.get_clock().map_err(failed("tell the time"))?.clock)
    }

    fn set_guest_time(&self, ns: u64) -> Result<(), String> {
        let clock = kvm_clock_data { clock: ns, ..kvm_clock_data::default() };
        self.vm.set_clock(&clock).map_err(failed("set the time"))
    }

    fn counter(&self) -> Result<Counter, String> {
        let cpu = self.cpu(0);
        let [tsc, system_time] = get_msrs(&cpu, [MSR_TSC, MSR_KVM_SYSTEM_TIME])?;
        let khz = cpu.get_tsc_khz().map_err(failed("tell the counter's rate"))?;
        Ok(Counter { tsc, tsc_hz: u64::from(khz) * 1000, system_time })
    }

    fn set_counter(&self, tsc: u64, system_time: u64) -> Result<(), String> {
        let first = self.cpu(0);
        set_msrs(&first, &[(MSR_TSC, tsc), (MSR_KVM_SYSTEM_TIME, system_time)])?;
        let mut offset = 0;
        let known = tsc_offset(&first, KVM_GET_DEVICE_ATTR, &mut offset).is_ok();
        for index in 1..self.cpus.len() {
            let cpu = self.cpu(index);
            // The same offset is the same counter. A kernel that cannot set it (before 5.16) makes one of writes that
            // follow each other closely.
            if !known || tsc_offset(&cpu, KVM_SET_DEVICE_ATTR, &mut offset).is_err() {
                set_msrs(&cpu, &[(MSR_TSC, tsc)])?;
            }
        }
        Ok(())
    }
}

/// `KVM_SET_DEVICE_ATTR` and `KVM_GET_DEVICE_ATTR`: `_IOW(0xae, 0xe1 and 0xe2, struct kvm_device_attr)`.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 1 << 30 | 24 << 16 | 0xae << 8 | 0xe1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = KVM_SET_DEVICE_ATTR + 1;

/// Reads or writes the guest's counter minus the host's.
fn tsc_offset(cpu: &VcpuFd, request: libc::c_ulong, offset: &mut u64) -> std::io::Result<()> {
    let (group, attr) = (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into());
    let attribute = kvm_device_attr { group, attr, addr: std::ptr::from_mut(offset) as u64, flags: 0 };
    // SAFETY: the descriptor is a CPU's; the structure is the one that these calls read and points to the 64 bits that
    // they read or write.
    let done = unsafe { libc::ioctl(cpu.as_raw_fd(), request, &raw const attribute) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Reads MSRs.
pub(super) fn get_msrs<const N: usize>(cpu: &VcpuFd, indices: [u32; N]) -> Result<[u64; N], String> {
    let entries = indices.map(|index| kvm_msr_entry { index, ..kvm_msr_entry::default() });
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| format!("MSRs: {e:?}"))?;
    let read = cpu.get_msrs(&mut msrs).map_err(failed("read model-specific registers"))?;
    let mut values = [0; N];
    for (value, entry) in values.iter_mut().zip(msrs.as_slice()) {
        *value = entry.data;
    }
    match indices.get(read) {
        Some(index) => Err(format!("KVM does not tell model-specific register {index:#x}")),
        None => Ok(values),
    }
}

/// Writes MSRs.
pub(super) fn set_msrs(cpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), String> {
    let entry = |&(index, data)| kvm_msr_entry { index, data, reserved: 0 };
    let entries: Vec<kvm_msr_entry> = values.iter().map(entry).collect();
    let msrs = Msrs::from_entries(&entries).map_err(|e| format!("MSRs: {e:?}"))?;
    let written = cpu.set_msrs(&msrs).map_err(failed("write model-specific registers"))?;
    match values.get(written) {
        Some((index, value)) => {
            Err(format!("KVM does not accept {value:#x} for model-specific register {index:#x}"))
        }
        None => Ok(()),
    }
}

impl std::fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmVm").field("fd", &self.vm.as_raw_fd()).field("cpus", &self.cpus.len()).finish()
    }
}
