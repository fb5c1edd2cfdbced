//! The platform's CPUID table as KVM takes it, and whether the host's CPU can do what it promises.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::machine::platform;

/// Ranges of leaves that the table has.
const LEAVES: [std::ops::RangeInclusive<u32>; 3] =
    [0..=0xd, 0x4000_0000..=0x4000_0001, 0x8000_0000..=0x8000_0008];
/// Leaves with features, and the bits of each register that a guest can do without: KVM and this platform have them
/// whatever the host has (the local APIC, the hypervisor bit), or they only say that something is fast.
const FEATURES: [(u32, [u32; 4]); 4] = [
    (1, [!0, !0, 1 << 31, 1 << 9]),
    (7, [!0, 1 << 9, !0, 1 << 4]),
    (0x4000_0001, [1 << 24, !0, !0, !0]),
    (0x8000_0001, [!0, !0, 0, 0]),
];
/// Names of those bits that a host may lack.
const NAMES: [(u32, usize, u32, &str); 12] = [
    (1, 2, 0, "SSE3"),
    (1, 2, 9, "SSSE3"),
    (1, 2, 13, "CMPXCHG16B"),
    (1, 2, 19, "SSE4.1"),
    (1, 2, 20, "SSE4.2"),
    (1, 2, 23, "POPCNT"),
    (1, 2, 30, "RDRAND"),
    (7, 1, 0, "FSGSBASE"),
    (0x4000_0001, 0, 3, "kvm-clock"),
    (0x8000_0001, 3, 20, "NX"),
    (0x8000_0001, 3, 27, "RDTSCP"),
    (0x8000_0001, 3, 29, "long mode"),
];

/// The table for the CPU with this APIC id.
///
/// # Errors
/// Never: the table is far smaller than the longest that KVM takes.
pub(super) fn table(apic_id: u8) -> Result<CpuId, String> {
    let entry = |function: u32| {
        let [eax, mut ebx, ecx, edx] = platform::cpuid(function, 0);
        if function == 1 {
            ebx |= u32::from(apic_id) << 24;
        }
        // Leaves with subleaves, of which the platform has the first.
        let flags = if matches!(function, 4 | 7 | 0xb | 0xd) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        kvm_cpuid_entry2 { function, flags, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    };
    let entries: Vec<kvm_cpuid_entry2> = LEAVES.into_iter().flatten().map(entry).collect();
    CpuId::from_entries(&entries).map_err(|e| format!("CPUID table: {e:?}"))
}

/// Whether a host that supports `supported` can be the platform's CPU.
///
/// # Errors
/// What it lacks.
pub(in crate::machine) fn check(supported: &[kvm_cpuid_entry2]) -> Result<(), String> {
    for (leaf, free) in FEATURES {
        let has = supported.iter().find(|e| e.function == leaf && e.index == 0);
        let has = has.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        for (register, want) in platform::cpuid(leaf, 0).into_iter().enumerate() {
            let lacks = want & !has[register] & !free[register];
            if lacks != 0 {
                let bit = lacks.trailing_zeros();
                let name = NAMES.iter().find(|n| (n.0, n.1, n.2) == (leaf, register, bit));
                let name = name.map_or_else(
                    || format!("bit {bit} of register {register} of CPUID leaf {leaf:#x}"),
                    |n| n.3.into(),
                );
                return Err(format!(
                    "The host's KVM has no {name}, which every sandbox has; use the software CPU"
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has just what the platform asks for.
    fn host() -> Vec<kvm_cpuid_entry2> {
        table(0).unwrap().as_slice().to_vec()
    }

    #[test]
    fn the_table_is_the_platforms_and_differs_by_the_apic_id_alone() {
        let (first, third) = (host(), table(2).unwrap());
        for (a, b) in first.iter().zip(third.as_slice()) {
            let [eax, ebx, ecx, edx] = platform::cpuid(a.function, 0);
            assert_eq!([a.eax, a.ebx, a.ecx, a.edx], [eax, ebx, ecx, edx], "{:#x}", a.function);
            let apic_id = if a.function == 1 { 2 << 24 } else { 0 };
            assert_eq!([b.eax, b.ebx, b.ecx, b.edx], [eax, ebx | apic_id, ecx, edx], "{:#x}", a.function);
        }
        for leaf in [0, 0xd, 0x4000_0001, 0x8000_0008] {
            assert!(first.iter().any(|entry| entry.function == leaf), "{leaf:#x}");
        }
    }

    #[test]
    fn a_host_that_lacks_a_feature_is_refused_by_its_name() {
        assert_eq!(check(&host()), Ok(()));
        for (leaf, register, bit, name) in NAMES {
            let mut host = host();
            let entry = host.iter_mut().find(|entry| entry.function == leaf).unwrap();
            let words = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
            *words[register] &= !(1 << bit);
            let refusal = check(&host).unwrap_err();
            assert!(refusal.contains(&format!("has no {name},")), "{refusal}");
        }
        assert!(check(&[]).is_err());
    }

    #[test]
    fn what_is_only_fast_may_be_missing() {
        let mut host = host();
        for entry in host.iter_mut().filter(|entry| entry.function == 7) {
            (entry.ebx, entry.edx) = (entry.ebx & !(1 << 9), 0);
        }
        assert_eq!(check(&host), Ok(()));
    }
}
