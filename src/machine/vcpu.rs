//! The CPU seam: what a machine asks of something that executes guest instructions, and nothing else.
//!
//! The state that crosses it is [`CpuState`], which is neutral. A backend emulates or virtualises the CPU; interrupt
//! controllers, timers and devices are the machine's ([`Bus`]). (A backend with controllers of its own, as KVM's, loads
//! and saves the same [`IrqchipState`](super::irq::IrqchipState).)

use std::sync::Arc;

use amber_x86::Bus;
use amber_x86::state::CpuState;

use super::ram::Ram;

/// Why a CPU came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuExit {
    /// HLT; go on when an interrupt is pending.
    Halt,
    /// HLT with interrupts off: nothing can ever wake this CPU.
    Dead,
    /// It was kicked, or felt like it.
    Kicked,
    /// Triple fault. The text tells what led there.
    Shutdown(String),
    /// The backend cannot go on; no fault of the guest.
    Failed(String),
}

/// Reaches into a running CPU from any thread. Takes no locks.
pub trait Kicker: Send + Sync {
    /// Makes [`Vcpu::run`] return soon.
    fn kick(&self);
    /// Makes a running CPU look for an interrupt soon.
    fn interrupt(&self);
    /// Makes a running CPU drop what it decoded of pages that devices wrote
    /// ([`take_code_writes`](amber_x86::GuestRam::take_code_writes)). Nothing to do where the hardware decodes.
    fn code_written(&self) {}
}

/// One virtual CPU. It is run by one thread at a time.
pub trait Vcpu: Send {
    /// Executes until something needs the machine's attention.
    fn run(&mut self, bus: &mut dyn Bus) -> VcpuExit;
    /// The state between two instructions.
    fn state(&self) -> CpuState;
    /// Replaces the state.
    ///
    /// # Errors
    /// No CPU can have this state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), String>;
    /// A handle to reach it while it runs.
    fn kicker(&self) -> Arc<dyn Kicker>;
    /// Forgets which pages it may write without a look at their flags: from the next instruction on, the first
    /// write to a page marks it dirty again.
    fn forget_dirty(&mut self);
    /// Counters worth showing.
    fn counters(&self) -> Counters;
}

/// What a CPU has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Guest instructions executed; 0 where nobody counts.
    pub instructions: u64,
    /// External interrupts taken.
    pub interrupts: u64,
    /// Exceptions taken, by vector, where there were any.
    pub exceptions: Vec<(u8, u64)>,
    /// Instructions that the CPU does not implement, by mnemonic.
    pub unimplemented: Vec<(String, u64)>,
    /// Anything else, named.
    pub other: Vec<(&'static str, u64)>,
}

/// Which kind of CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// The software CPU.
    Soft,
    /// KVM.
    Kvm,
}

impl BackendKind {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Soft => "soft",
            BackendKind::Kvm => "kvm",
        }
    }
}

/// Makes CPUs.
pub trait Backend: Send + Sync {
    /// Which kind.
    fn kind(&self) -> BackendKind;
    /// A CPU as after reset, over `ram`.
    ///
    /// # Errors
    /// Why there is none.
    fn create_vcpu(&self, ram: &Arc<Ram>) -> Result<Box<dyn Vcpu>, String>;
}
