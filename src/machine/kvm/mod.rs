//! KVM behind the machine's CPU seam: the host's CPU, and the interrupt controllers, timers and clock of its kernel.
//!
//! The platform is that of the software CPU ([`platform`](super::platform)): the same CPUID, the same MSRs (any other goes
//! to the machine's bus, which refuses it), the same pins, the same clock. State crosses the seam in neutral form, so a
//! snapshot moves between the two.
//!
//! Rooms: `vm`: the machine, its memory and clock; `vcpu`: running a CPU; `kick`: stopping one; `host`: the host's own CPU; `state`, `chips`, `cpuid`:
//! the neutral states in KVM's terms; `fault`, `present`: guest memory as it is touched, or
//! before the first instruction.

mod chips;
mod cpuid;
mod fault;
mod host;
mod kick;
mod present;
mod state;
#[cfg(test)]
pub(super) mod tests;
mod vcpu;
mod vm;

use std::sync::Arc;

use super::ram::Ram;
use super::vcpu::{Backend, BackendError, BackendKind, HostChips, Shape, Vcpu, Vm};

pub(super) use self::cpuid::check as check_host;
pub(super) use self::state::from_segments;

/// Makes machines with KVM.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kvm;

impl Backend for Kvm {
    fn kind(&self) -> BackendKind {
        BackendKind::Kvm
    }

    fn create_vm(&self, ram: &Arc<Ram>, shape: Shape) -> Result<Vm, BackendError> {
        let vm = Arc::new(vm::KvmVm::new(ram, shape)?);
        let vcpu = |index| Box::new(vcpu::KvmVcpu::new(&vm, index)) as Box<dyn Vcpu>;
        let others = (1..usize::from(shape.cpus)).map(vcpu).collect();
        Ok(Vm { first: vcpu(0), others, chips: Some(Arc::clone(&vm) as Arc<dyn HostChips>) })
    }
}

/// What KVM answered, in words, with what to do about it where the user can.
fn failed(what: &str) -> impl Fn(kvm_ioctls::Error) -> String {
    let what = what.to_owned();
    move |error| {
        use rustix::io::Errno;
        let remedy = match Errno::from_raw_os_error(error.errno()) {
            Errno::MFILE => "; this process has too many open files: raise its limit (ulimit -n)",
            Errno::NFILE => "; the host has too many open files",
            Errno::NOMEM => "; the host is out of memory",
            Errno::BUSY => "; another hypervisor uses the CPU's virtualization",
            Errno::ACCESS | Errno::PERM => "; add your user to the group that owns /dev/kvm (often kvm)",
            _ => "",
        };
        format!("KVM cannot {what}: {error}{remedy}")
    }
}
