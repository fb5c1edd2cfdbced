//! One CPU in KVM: running it, and its state.
//!
//! It comes back to the machine only when it is kicked or can go no further. HLT is the kernel's: the thread sleeps in
//! `KVM_RUN` until an interrupt comes. Accesses that leave the kernel are finished before the CPU stops, because
//! `KVM_RUN` looks for the kick only after it has taken over what the last access read.

use std::sync::Arc;

use amber_x86::Bus;
use amber_x86::state::CpuState;
use kvm_bindings::{
    KVM_EXIT_IO_OUT, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, kvm_mp_state, kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit as Exit, VcpuFd};
use rustix::io::Errno;

use super::kick::Kick;
use super::state::{KvmState, MSRS};
use super::vm::{KvmVm, get_msrs, set_msrs};
use super::{chips, failed, host};
use crate::machine::irq::lapic::LapicState;
use crate::machine::platform::MSR_KVM_SYSTEM_TIME;
use crate::machine::vcpu::{BackendError, Counters, HostCpu, Kicker, OtherCpu, Start, Vcpu, VcpuExit};

/// `KVM_INTERNAL_ERROR_EMULATION`.
const CANNOT_EMULATE: u32 = 1;

/// How often a CPU left the kernel, and why.
#[derive(Debug, Clone, Copy, Default)]
struct Exits {
    mmio: u64,
    port: u64,
    msr: u64,
    kick: u64,
}

/// One CPU.
pub(super) struct KvmVcpu {
    vm: Arc<KvmVm>,
    index: usize,
    kick: Arc<Kick>,
    exits: Exits,
}

impl KvmVcpu {
    /// CPU `index` of `vm`.
    pub(super) fn new(vm: &Arc<KvmVm>, index: usize) -> KvmVcpu {
        KvmVcpu { vm: Arc::clone(vm), index, kick: Arc::default(), exits: Exits::default() }
    }
}

/// What is to be done after an exit whose data is not borrowed any more.
enum Then {
    Resume,
    Port,
    InternalError,
    MemoryFault,
    Stop(VcpuExit),
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &mut dyn Bus) -> VcpuExit {
        let Some(_running) = self.kick.enter() else { return VcpuExit::Kicked };
        let mut cpu = self.vm.cpu(self.index);
        loop {
            match step(&mut cpu, bus, &mut self.exits) {
                Then::Resume => {}
                Then::Port => port(&mut cpu, bus),
                Then::InternalError => return VcpuExit::Failed(internal_error(&mut cpu)),
                Then::MemoryFault => return VcpuExit::Failed(self.vm.memory_failure()),
                Then::Stop(exit) => return exit,
            }
        }
    }

    fn state(&self) -> Result<CpuState, String> {
        let cpu = self.vm.cpu(self.index);
        let unknown = failed("tell a CPU's state");
        let values = get_msrs(&cpu, MSRS)?;
        let msr = |(index, data)| kvm_msr_entry { index, data, reserved: 0 };
        let state = KvmState {
            regs: cpu.get_regs().map_err(&unknown)?,
            sregs: cpu.get_sregs().map_err(&unknown)?,
            debug: cpu.get_debug_regs().map_err(&unknown)?,
            msrs: MSRS.into_iter().zip(values).map(msr).collect(),
            xsave: cpu.get_xsave().map_err(&unknown)?,
            events: cpu.get_vcpu_events().map_err(&unknown)?,
            mp: cpu.get_mp_state().map_err(&unknown)?,
        };
        Ok(state.neutral())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), String> {
        let cpu = self.vm.cpu(self.index);
        let refused = failed("take a CPU's state");
        let state = KvmState::new(state, cpu.get_sregs().map_err(&refused)?)?;
        cpu.set_sregs(&state.sregs).map_err(&refused)?;
        cpu.set_regs(&state.regs).map_err(&refused)?;
        // SAFETY: no CPU here has features whose state is larger than the structure: nothing enables them.
        unsafe { cpu.set_xsave(&state.xsave) }.map_err(&refused)?;
        cpu.set_debug_regs(&state.debug).map_err(&refused)?;
        let msrs: Vec<(u32, u64)> = state.msrs.iter().map(|msr| (msr.index, msr.data)).collect();
        set_msrs(&cpu, &msrs)?;
        cpu.set_vcpu_events(&state.events).map_err(&refused)?;
        cpu.set_mp_state(state.mp).map_err(&refused)
    }

    fn other_state(&self) -> Result<OtherCpu, String> {
        let cpu = self.state()?;
        let fd = self.vm.cpu(self.index);
        let unknown = failed("tell a CPU's state");
        // Also takes the messages that have just arrived into account.
        let start = match fd.get_mp_state().map_err(&unknown)?.mp_state {
            KVM_MP_STATE_UNINITIALIZED => Start::Reset,
            KVM_MP_STATE_INIT_RECEIVED => Start::Init,
            KVM_MP_STATE_SIPI_RECEIVED => {
                Start::Sipi(fd.get_vcpu_events().map_err(&unknown)?.sipi_vector as u8)
            }
            _ => Start::Started,
        };
        let [system_time] = get_msrs(&fd, [MSR_KVM_SYSTEM_TIME])?;
        Ok(OtherCpu { cpu, lapic: lapic(&fd)?, system_time, start })
    }

    fn set_other_state(&mut self, state: &OtherCpu) -> Result<(), String> {
        self.set_state(&state.cpu)?;
        let cpu = self.vm.cpu(self.index);
        let refused = failed("take a CPU's state");
        cpu.set_lapic(&chips::to_lapic(&state.lapic)).map_err(&refused)?;
        set_msrs(&cpu, &[(MSR_KVM_SYSTEM_TIME, state.system_time)])?;
        let mp_state = match state.start {
            Start::Started => return Ok(()),
            Start::Reset => KVM_MP_STATE_UNINITIALIZED,
            Start::Init => KVM_MP_STATE_INIT_RECEIVED,
            Start::Sipi(vector) => {
                let mut events = cpu.get_vcpu_events().map_err(&refused)?;
                events.flags = KVM_VCPUEVENT_VALID_SIPI_VECTOR;
                events.sipi_vector = vector.into();
                cpu.set_vcpu_events(&events).map_err(&refused)?;
                KVM_MP_STATE_SIPI_RECEIVED
            }
        };
        cpu.set_mp_state(kvm_mp_state { mp_state }).map_err(&refused)
    }

    fn host_state(&self) -> Result<Option<HostCpu>, String> {
        self.vm.host().map(|table| host::save(&self.vm.cpu(self.index), table)).transpose()
    }

    fn set_host_state(&mut self, state: &HostCpu) -> Result<(), BackendError> {
        let table = self.vm.host().ok_or(BackendError::HostCpu)?;
        host::load(&self.vm.cpu(self.index), table, state)
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kick) as Arc<dyn Kicker>
    }

    fn collect_dirty(&mut self) -> Result<(), String> {
        self.vm.collect_dirty()
    }

    /// Asking for the record has protected the pages again.
    fn forget_dirty(&mut self) {}

    fn counters(&self) -> Counters {
        let Exits { mmio, port, msr, kick } = self.exits;
        let other =
            vec![("MMIO exits", mmio), ("port exits", port), ("MSR exits", msr), ("kicks seen", kick)];
        Counters { other, ..Counters::default() }
    }
}

/// Runs until the next exit, and does what needs the exit's own data.
fn step(cpu: &mut VcpuFd, bus: &mut dyn Bus, exits: &mut Exits) -> Then {
    match cpu.run() {
        Ok(Exit::MmioRead(address, data)) => {
            exits.mmio += 1;
            bus.mmio_read(address, data);
        }
        Ok(Exit::MmioWrite(address, data)) => {
            exits.mmio += 1;
            bus.mmio_write(address, data);
        }
        Ok(Exit::IoIn(..) | Exit::IoOut(..)) => {
            exits.port += 1;
            return Then::Port;
        }
        Ok(Exit::X86Rdmsr(msr)) => {
            exits.msr += 1;
            let value = bus.rdmsr(msr.index);
            *msr.data = value.unwrap_or(0);
            *msr.error = value.is_none().into();
        }
        Ok(Exit::X86Wrmsr(msr)) => {
            exits.msr += 1;
            *msr.error = (!bus.wrmsr(msr.index, msr.data)).into();
        }
        Ok(Exit::Intr) => {
            exits.kick += 1;
            return Then::Stop(VcpuExit::Kicked);
        }
        Ok(Exit::Shutdown) => {
            let at = cpu.get_regs().map_or(0, |regs| regs.rip);
            return Then::Stop(VcpuExit::Shutdown(format!("Triple fault at {at:#x}")));
        }
        Ok(Exit::InternalError) => return Then::InternalError,
        Ok(Exit::MemoryFault { .. }) => return Then::MemoryFault,
        Ok(Exit::FailEntry(reason, _)) => {
            return Then::Stop(VcpuExit::Failed(format!(
                "KVM: the host's CPU refuses to enter the guest ({reason:#x})"
            )));
        }
        Ok(other) => return Then::Stop(VcpuExit::Failed(format!("KVM stopped unexpectedly: {other:?}"))),
        Err(error) => match Errno::from_raw_os_error(error.errno()) {
            Errno::INTR => {
                exits.kick += 1;
                return Then::Stop(VcpuExit::Kicked);
            }
            // A CPU that was waiting to be started has been.
            Errno::AGAIN => {}
            Errno::FAULT => return Then::MemoryFault,
            _ => return Then::Stop(VcpuExit::Failed(failed("run the guest")(error))),
        },
    }
    Then::Resume
}

/// An access to ports: one or, for a string instruction, several of the same size.
fn port(cpu: &mut VcpuFd, bus: &mut dyn Bus) {
    let run = cpu.get_kvm_run();
    // SAFETY: the last exit was that of a port access, so this member of the union is the one that KVM filled.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, count) = (usize::from(io.size.max(1)), io.count as usize);
    // SAFETY: KVM has put the data at this offset of the same shared mapping, which is as long as KVM said and lives as
    // long as the CPU; nobody else uses it between two runs.
    let data = unsafe {
        let start = std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(start, size * count)
    };
    for item in data.chunks_exact_mut(size) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            bus.io_write(io.port, item);
        } else {
            bus.io_read(io.port, item);
        }
    }
}

fn internal_error(cpu: &mut VcpuFd) -> String {
    // SAFETY: the last exit was an internal error, so this member of the union is the one that KVM filled.
    let error = unsafe { cpu.get_kvm_run().__bindgen_anon_1.internal };
    let at = cpu.get_regs().map_or(0, |regs| regs.rip);
    match error.suberror {
        CANNOT_EMULATE => format!("KVM cannot emulate the instruction at {at:#x}"),
        other => format!("KVM has an internal error ({other}) at {at:#x}"),
    }
}

/// The neutral local APIC of a CPU that does not run.
pub(super) fn lapic(cpu: &VcpuFd) -> Result<LapicState, String> {
    let unknown = failed("tell a local APIC's state");
    let events = cpu.get_vcpu_events().map_err(&unknown)?;
    // An INT instruction is executed again.
    let accepted = events.interrupt.injected != 0 && events.interrupt.soft == 0;
    let page = cpu.get_lapic().map_err(&unknown)?;
    Ok(chips::from_lapic(&page, accepted.then_some(events.interrupt.nr)))
}
