//! `cpu: 'host'`: a guest that sees what the host's CPU can do, at the price of portability.
//!
//! The guest has all that KVM supports but what would tell of the host's topology, what has state that KVM does not
//! save here (nested virtualization, performance counters, machine checks), and a timer whose rate belongs to the host. What
//! such a CPU has beyond the neutral state is kept as KVM tells it, and taken back only where the guest would see the same
//! CPUID.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_xcrs, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd};

use super::failed;
use super::vm::{get_msrs, set_msrs};
use crate::machine::platform::{self, MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK, MSR_TSC};
use crate::machine::vcpu::{BackendError, HostCpu};

/// Bits that the guest does not see, as (leaf, register, bit).
const HIDDEN: [(u32, usize, u32); 11] = [
    (1, 2, 5),            // VMX
    (1, 2, 15),           // performance capabilities
    (1, 2, 21),           // x2APIC
    (1, 2, 24),           // TSC-deadline timer
    (1, 3, 7),            // machine check exception
    (1, 3, 12),           // MTRR: memory is write-back here
    (1, 3, 14),           // machine check architecture
    (1, 3, 28),           // several logical processors in a package
    (0x8000_0001, 2, 2),  // SVM
    (0x8000_0001, 2, 22), // topology extensions
    (0x8000_0001, 2, 23), // performance counters
];
/// Leaves that are topology, performance counters or another hypervisor's.
const DROPPED: [u32; 6] = [0xa, 0xb, 0x1f, 0x8000_001d, 0x8000_001e, 0x8000_0022];
/// XCR0's index.
const XCR0: u32 = 0;

/// The table of the CPU with this APIC id.
///
/// # Errors
/// It is longer than KVM takes.
pub(super) fn table(supported: &[kvm_cpuid_entry2], apic_id: u8) -> Result<CpuId, String> {
    let hypervisor = 0x4000_0000..=0x4fff_ffff;
    let kept = |e: &&kvm_cpuid_entry2| !hypervisor.contains(&e.function) && !DROPPED.contains(&e.function);
    let mut entries: Vec<kvm_cpuid_entry2> = supported.iter().filter(kept).copied().collect();
    for entry in &mut entries {
        let words = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
        for (register, word) in words.into_iter().enumerate() {
            let hidden = HIDDEN.iter().filter(|hidden| (hidden.0, hidden.1) == (entry.function, register));
            *word = hidden.fold(*word, |word, hidden| word & !(1 << hidden.2));
        }
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xff00 | 1 << 16 | u32::from(apic_id) << 24;
                entry.ecx |= 1 << 31;
            }
            // Caches that nobody shares.
            4 => entry.eax &= 0x3fff,
            // How much is enabled now: KVM keeps it.
            0xd => entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            // The name, which KVM does not tell.
            0x8000_0002..=0x8000_0004 => {
                let name = std::arch::x86_64::__cpuid(entry.function);
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (name.eax, name.ebx, name.ecx, name.edx);
            }
            0x8000_0008 => entry.ecx = 0,
            _ => {}
        }
    }
    for function in [0x4000_0000, 0x4000_0001] {
        let [eax, ebx, ecx, edx] = platform::cpuid(function, 0);
        entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() });
    }
    CpuId::from_entries(&entries).map_err(|e| format!("CPUID table: {e:?}"))
}

/// The table without what is a CPU's own.
fn identity(table: &[kvm_cpuid_entry2]) -> Vec<[u32; 6]> {
    let plain = |e: &kvm_cpuid_entry2| match (e.function, e.index) {
        (1, _) => [1, 0, e.eax, e.ebx & 0x00ff_ffff, e.ecx & !(1 << 27), e.edx],
        // EBX is the size of what is enabled.
        (0xd, 0 | 1) => [0xd, e.index, e.eax, 0, e.ecx, e.edx],
        (function, index) => [function, index, e.eax, e.ebx, e.ecx, e.edx],
    };
    let mut identity: Vec<[u32; 6]> = table.iter().map(plain).collect();
    identity.sort_unstable();
    identity
}

/// Where two tables differ first.
fn difference(a: &[[u32; 6]], b: &[[u32; 6]]) -> Option<u32> {
    let longer = || a.get(b.len()).or_else(|| b.get(a.len()));
    let pair = a.iter().zip(b).find(|(a, b)| a != b).map(|(a, b)| a.min(b));
    pair.or_else(longer).map(|entry| entry[0])
}

/// What a CPU of this kind has beyond the neutral state.
pub(super) fn save(cpu: &VcpuFd, table: &[kvm_cpuid_entry2]) -> Result<HostCpu, String> {
    let unknown = failed("tell a CPU's state");
    let xcrs = cpu.get_xcrs().map_err(&unknown)?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == XCR0);
    let xsave = cpu.get_xsave().map_err(&unknown)?;
    let list = Kvm::new().and_then(|kvm| kvm.get_msr_index_list()).map_err(&unknown)?;
    let own = [MSR_TSC, MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK];
    let indices = list.as_slice().iter().filter(|index| !own.contains(index));
    // The list names what KVM knows, whether or not this CPU has it.
    let msrs = indices.filter_map(|index| get_msrs(cpu, [*index]).ok().map(|[value]| (*index, value)));
    Ok(HostCpu {
        cpuid: identity(table),
        xcr0: xcr0.map_or(1, |xcr| xcr.value),
        xsave: xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect(),
        msrs: msrs.collect(),
    })
}

/// Loads it.
pub(super) fn load(cpu: &VcpuFd, table: &[kvm_cpuid_entry2], state: &HostCpu) -> Result<(), BackendError> {
    if let Some(leaf) = difference(&identity(table), &state.cpuid) {
        return Err(BackendError::OtherHost { leaf });
    }
    let refused = failed("take a CPU's state");
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (XCR0, state.xcr0);
    cpu.set_xcrs(&xcrs).map_err(&refused)?;
    let mut xsave = kvm_xsave::default();
    if state.xsave.len() != size_of_val(&xsave.region) {
        return Err(BackendError::Host("The XSAVE image has another size".into()));
    }
    for (word, bytes) in xsave.region.iter_mut().zip(state.xsave.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    // SAFETY: KVM reads no more than the structure: larger state would have to be asked for (AMX), and is not.
    unsafe { cpu.set_xsave(&xsave) }.map_err(&refused)?;
    for &(index, value) in &state.msrs {
        // Some can be read and not written; those are as after reset.
        if let Err(reason) = set_msrs(cpu, &[(index, value)])
            && get_msrs(cpu, [index]).ok() != Some([value])
        {
            return Err(BackendError::Host(reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0x1f, 1, 2, 3]),
            entry(1, 0, [0x0005_0654, 7 << 24 | 16 << 16 | 8 << 8, !0, !0]),
            entry(4, 1, [!0, 1, 1, 1]),
            entry(7, 0, [2, !0, !0, !0]),
            entry(0xa, 0, [!0; 4]),
            entry(0xb, 0, [1, 2, 3, 4]),
            entry(0xd, 0, [7, 0x340, 0x340, 0]),
            entry(0x4000_0000, 0, [0x4000_0001, 9, 9, 9]),
            entry(0x4000_0001, 0, [!0; 4]),
            entry(0x8000_0001, 0, [0, 0, !0, !0]),
        ]
    }

    fn of(table: &CpuId, function: u32) -> Option<[u32; 4]> {
        let entry = table.as_slice().iter().find(|entry| entry.function == function)?;
        Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    #[test]
    fn the_guest_sees_the_hosts_features_without_its_topology() {
        let table = table(&supported(), 2).unwrap();
        let [_, ebx, ecx, edx] = of(&table, 1).unwrap();
        assert_eq!(ebx, 2 << 24 | 1 << 16 | 8 << 8);
        assert_eq!((ecx >> 26 & 1, ecx >> 28 & 1, ecx >> 31), (1, 1, 1), "XSAVE, AVX, hypervisor");
        assert_eq!((ecx >> 5 & 1, ecx >> 24 & 1, edx >> 28 & 1), (0, 0, 0), "VMX, TSC-deadline, topology");
        assert_eq!((of(&table, 0xa), of(&table, 0xb)), (None, None));
        assert_eq!(of(&table, 7), Some([2, !0, !0, !0]));
        assert_eq!(of(&table, 0x4000_0001), Some(platform::cpuid(0x4000_0001, 0)));
    }

    #[test]
    fn cpus_of_one_host_are_alike_and_another_host_is_found_out() {
        let ids = |list: &[kvm_cpuid_entry2], id| identity(table(list, id).unwrap().as_slice());
        let here = ids(&supported(), 0);
        assert_eq!(difference(&here, &ids(&supported(), 3)), None);
        let mut other = supported();
        other[3].ebx ^= 1 << 5;
        assert_eq!(difference(&here, &ids(&other, 0)), Some(7));
        other.remove(3);
        assert_eq!(difference(&here, &ids(&other, 0)), Some(7));
        assert_eq!(difference(&here[..here.len() - 1], &here), Some(0x8000_0001));
    }
}
