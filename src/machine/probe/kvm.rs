//! Trying /dev/kvm by running the probe's guest on it.

use std::ffi::CStr;
use std::time::{Duration, Instant};

use super::{Trace, Useless, Verdict};

/// Rounds of the guest that are measured.
const ROUNDS: u32 = 20_000;
/// How long they may take. Hardware needs some ten milliseconds; a hypervisor that emulates, seconds.
const LIMIT: Duration = Duration::from_millis(200);

fn useless(why: Useless, detail: impl ToString) -> Verdict {
    Verdict::Useless { why, detail: detail.to_string() }
}

/// Runs the guest. Returns soon after [`LIMIT`] even if KVM is slow; if KVM hangs, it may never return.
#[cfg(target_arch = "x86_64")]
pub(super) fn probe(device: &CStr, trace: &Trace) -> Verdict {
    try_probe(device, trace).unwrap_or_else(|verdict| verdict)
}

/// There is no x86-64 guest on another host's KVM.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn probe(_: &CStr, _: &Trace) -> Verdict {
    useless(Useless::Host, "this host is not x86-64")
}

#[cfg(target_arch = "x86_64")]
fn try_probe(device: &CStr, trace: &Trace) -> Result<Verdict, Verdict> {
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Kvm, VcpuExit};
    use rustix::io::Errno;
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::guest;

    /// The guest's memory; the VM is dropped before it.
    struct Memory(*mut std::ffi::c_void);
    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: our own mapping, which nobody uses any more.
            let _ = unsafe { munmap(self.0, guest::SIZE) };
        }
    }

    let name = device.to_string_lossy();
    let kvm = Kvm::new_with_path(device).map_err(|e| match Errno::from_raw_os_error(e.errno()) {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            useless(Useless::Missing, format!("{name} does not exist: no KVM module is loaded"))
        }
        Errno::ACCESS | Errno::PERM => {
            let remedy = "add your user to the group that owns it (often kvm), and log in again";
            useless(Useless::Forbidden, format!("no permission to open {name}; {remedy}"))
        }
        _ => useless(Useless::NotKvm, format!("{name} cannot be opened: {e}")),
    })?;
    if kvm.get_api_version() != 12 {
        return Err(useless(Useless::NotKvm, format!("{name} is not KVM, or of another version")));
    }
    trace.done("open the device");
    let refused = |what: &'static str| {
        move |e: kvm_ioctls::Error| useless(Useless::Refused, format!("KVM cannot {what}: {e}"))
    };
    // SAFETY: a new anonymous mapping touches nothing that exists.
    let memory = unsafe {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        mmap_anonymous(std::ptr::null_mut(), guest::SIZE, prot, MapFlags::PRIVATE)
    };
    let memory = Memory(memory.map_err(|e| useless(Useless::Refused, e))?);
    // SAFETY: the mapping has this size, is zeroed, and nobody else knows of it yet.
    guest::write(unsafe { std::slice::from_raw_parts_mut(memory.0.cast(), guest::SIZE) });
    let vm = kvm.create_vm().map_err(refused("create a virtual machine"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::SIZE as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the mapping outlives the VM: it was made before it, so it is dropped after it.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("use memory"))?;
    trace.done("create a machine");
    let mut vcpu = vm.create_vcpu(0).map_err(refused("create a CPU"))?;
    let cpuid =
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(refused("tell CPUID"))?;
    crate::machine::kvm::check_host(cpuid.as_slice()).map_err(|e| useless(Useless::Refused, e))?;
    vcpu.set_cpuid2(&cpuid).map_err(refused("set CPUID"))?;
    let (sregs, regs) = registers(vcpu.get_sregs().map_err(refused("read registers"))?);
    vcpu.set_sregs(&sregs).map_err(refused("enter long mode"))?;
    vcpu.set_regs(&regs).map_err(refused("set registers"))?;
    trace.done("create a CPU");

    let started = Instant::now();
    let mut rounds = 0;
    while rounds < ROUNDS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(guest::PORT, _)) => rounds += guest::BATCH,
            Ok(VcpuExit::Intr) => {}
            Ok(other) => {
                // Seen with hypervisors that emulate nested guests instruction by instruction: INT in long mode is #UD.
                let detail = format!(
                    "KVM does not run a plain 64-bit guest (it stops with {other:?}); \
                     probably a virtual machine without nested virtualization in hardware"
                );
                return Err(useless(Useless::Wrong, detail));
            }
            Err(e) if matches!(Errno::from_raw_os_error(e.errno()), Errno::INTR | Errno::AGAIN) => {}
            Err(e) => return Err(useless(Useless::Wrong, format!("KVM cannot run a plain guest: {e}"))),
        }
        let elapsed = started.elapsed();
        if elapsed > LIMIT {
            let each = elapsed.as_nanos() as f64 / f64::from(rounds.max(1)) / 1000.0;
            let ms = elapsed.as_millis();
            let detail = format!(
                "KVM is too slow: {rounds} of {ROUNDS} interrupt returns in {ms} ms ({each:.1} us each); \
                 probably a virtual machine without nested virtualization in hardware"
            );
            return Err(useless(Useless::Slow, detail));
        }
    }
    trace.done("run a guest");
    Ok(Verdict::Usable { round_ns: (started.elapsed().as_nanos() / u128::from(ROUNDS)) as u64 })
}

/// The guest's first state in KVM's structures.
#[cfg(target_arch = "x86_64")]
fn registers(mut sregs: kvm_bindings::kvm_sregs) -> (kvm_bindings::kvm_sregs, kvm_bindings::kvm_regs) {
    use kvm_bindings::kvm_regs;

    let state = super::guest::state();
    crate::machine::kvm::from_segments(&state, &mut sregs);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (state.cr0, state.cr3, state.cr4, 0x500);
    let regs = kvm_regs {
        rcx: state.gpr[1],
        rsp: state.gpr[4],
        rip: state.rip,
        rflags: state.rflags,
        ..kvm_regs::default()
    };
    (sregs, regs)
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use std::ffi::CString;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    fn why(path: &Path) -> (Useless, String) {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        match probe(&path, &Trace::default()) {
            Verdict::Useless { why, detail } => (why, detail),
            Verdict::Usable { .. } => panic!("{path:?} is no KVM"),
        }
    }

    #[test]
    fn what_is_not_there_or_not_kvm_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, detail) = why(&dir.path().join("kvm"));
        assert_eq!(missing, Useless::Missing);
        assert!(detail.contains("does not exist"), "{detail}");
        for other in [Path::new("/dev/null"), dir.path()] {
            assert_eq!(why(other).0, Useless::NotKvm, "{other:?}");
        }
        std::fs::write(dir.path().join("file"), b"text").unwrap();
        assert_eq!(why(&dir.path().join("file")).0, Useless::NotKvm);
    }

    #[test]
    fn a_device_that_may_not_be_opened_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let path = dir.path().join("kvm");
        std::fs::write(&path, b"").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
        // Root may open everything: a thread can give that up for itself, with another user id for files.
        let told = std::thread::spawn(move || {
            // SAFETY: changes the credentials of this thread alone, which ends here.
            unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
            why(&path)
        });
        let (why, detail) = told.join().unwrap();
        assert_eq!(why, Useless::Forbidden);
        assert!(detail.contains("group"), "{detail}");
    }
}
