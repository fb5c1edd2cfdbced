//! The software CPU behind the machine's CPU seam.

use std::sync::Arc;

use amber_x86::state::CpuState;
use amber_x86::{Bus, Cpu, Exit, Kick};

use super::ram::Ram;
use super::vcpu::{
    Backend, BackendError, BackendKind, Counters, CpuModel, Kicker, LiveCapture, Shape, Vcpu, VcpuExit, Vm,
};

/// RFLAGS: interrupts enabled.
const IF: u64 = 1 << 9;

/// Makes software CPUs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Soft;

impl Backend for Soft {
    fn kind(&self) -> BackendKind {
        BackendKind::Soft
    }

    fn create_vm(&self, ram: &Arc<Ram>, shape: Shape) -> Result<Vm, BackendError> {
        if shape.cpus != 1 {
            return Err(BackendError::Cpus(shape.cpus));
        }
        if shape.model != CpuModel::Baseline {
            return Err(BackendError::HostCpu);
        }
        // Vector operations run the host's own instructions (see amber_x86): without them they would be SIGILL, in Node's process.
        let host = [
            ("SSSE3", std::arch::is_x86_feature_detected!("ssse3")),
            ("SSE4.2", std::arch::is_x86_feature_detected!("sse4.2")),
            ("POPCNT", std::arch::is_x86_feature_detected!("popcnt")),
        ];
        if let Some((missing, _)) = host.iter().find(|(_, there)| !there) {
            return Err(BackendError::Host(format!(
                "The host CPU has no {missing}; the software CPU needs an x86-64-v2 host, made since about 2009"
            )));
        }
        let ram: Arc<Ram> = Arc::clone(ram);
        Ok(Vm { first: Box::new(SoftVcpu { cpu: Cpu::new(ram) }), others: Vec::new(), chips: None })
    }
}

struct SoftVcpu {
    cpu: Box<Cpu>,
}

struct SoftKicker(Kick);

impl Kicker for SoftKicker {
    fn kick(&self) {
        self.0.kick();
    }
    fn interrupt(&self) {
        self.0.interrupt();
    }
    fn code_written(&self) {
        self.0.code_written();
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &mut dyn Bus) -> VcpuExit {
        match self.cpu.run(bus, u64::MAX) {
            Exit::Halt if self.cpu.state().rflags & IF == 0 => VcpuExit::Dead,
            Exit::Halt => VcpuExit::Halt,
            Exit::Kicked => VcpuExit::Kicked,
            Exit::Shutdown(story) => VcpuExit::Shutdown(story),
            Exit::RamFault(reason) => VcpuExit::Failed(reason),
        }
    }

    fn state(&self) -> Result<CpuState, String> {
        Ok(self.cpu.state())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), String> {
        self.cpu.set_state(state).map_err(|e| e.to_string())
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(SoftKicker(self.cpu.kick()))
    }

    fn forget_dirty(&mut self) {
        self.cpu.forget_all_writable();
    }

    fn live_capture(&self) -> LiveCapture {
        LiveCapture::OnWrite
    }

    fn counters(&self) -> Counters {
        let d = self.cpu.diagnostics();
        Counters {
            instructions: d.instructions,
            interrupts: d.interrupts,
            exceptions: (0..).zip(d.exceptions).filter(|(_, count)| *count > 0).collect(),
            unimplemented: d.unimplemented.into_iter().collect(),
            other: vec![("sequences decoded", d.sequences_decoded), ("code cache bytes", d.code_cache_bytes)],
        }
    }
}
