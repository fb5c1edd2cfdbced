//! The CPU seam: what a machine asks of something that executes guest instructions, and nothing else.
//!
//! The state that crosses it is [`CpuState`], which is neutral. A backend emulates or virtualises the CPUs; devices are
//! the machine's ([`Bus`]). Interrupt controllers, timers and the clock are the machine's too, unless the backend has its
//! own ([`HostChips`]): it then loads and saves the same neutral states.

use std::sync::Arc;

use amber_x86::Bus;
use amber_x86::state::CpuState;
use serde::{Deserialize, Serialize};

use super::irq::IrqchipState;
use super::irq::lapic::LapicState;
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

/// How a backend lets a snapshot read memory behind the running guest (see [`capture`](super::ram::capture)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LiveCapture {
    /// After [`Vcpu::forget_dirty`] no page with the flag CAPTURE is written before
    /// [`GuestRam::preserve`](amber_x86::GuestRam::preserve) returned.
    OnWrite,
    /// Writes cannot be intercepted, only noticed afterwards: pages are copied in rounds, the last one while the
    /// machine stands.
    PreCopy,
}

/// One virtual CPU. It is run by one thread at a time.
pub trait Vcpu: Send {
    /// Executes until something needs the machine's attention.
    fn run(&mut self, bus: &mut dyn Bus) -> VcpuExit;
    /// The state between two instructions.
    ///
    /// # Errors
    /// The host cannot tell.
    fn state(&self) -> Result<CpuState, String>;
    /// Replaces the state.
    ///
    /// # Errors
    /// No CPU can have this state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), String>;
    /// What a machine of several CPUs saves of each but the first, whose controllers are [`HostChips`]'.
    ///
    /// # Errors
    /// The host cannot tell, or the backend has one CPU only.
    fn other_state(&self) -> Result<OtherCpu, String> {
        Err("This backend has one CPU only".into())
    }
    /// Loads it.
    ///
    /// # Errors
    /// The host refuses it.
    fn set_other_state(&mut self, _state: &OtherCpu) -> Result<(), String> {
        Err("This backend has one CPU only".into())
    }
    /// What a CPU of the host's model has beyond that; `None` for one of the baseline.
    ///
    /// # Errors
    /// The host cannot tell.
    fn host_state(&self) -> Result<Option<HostCpu>, String> {
        Ok(None)
    }
    /// Loads it, after the state.
    ///
    /// # Errors
    /// This host's CPU is another, or refuses it.
    fn set_host_state(&mut self, _state: &HostCpu) -> Result<(), BackendError> {
        Err(BackendError::HostCpu)
    }
    /// A handle to reach it while it runs.
    fn kicker(&self) -> Arc<dyn Kicker>;
    /// Marks the pages dirty that any CPU of the machine has written since this was last called, where that is not done
    /// as they are written. None of them runs.
    ///
    /// # Errors
    /// The host cannot tell.
    fn collect_dirty(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// Forgets which pages it may write without a look at their flags: from the next instruction on, the first
    /// write to a page marks it dirty again. Called after [`collect_dirty`](Self::collect_dirty).
    fn forget_dirty(&mut self);
    /// How memory can be captured while it runs.
    fn live_capture(&self) -> LiveCapture {
        LiveCapture::PreCopy
    }
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

impl Counters {
    /// What two CPUs have done together.
    #[must_use]
    pub fn plus(mut self, other: &Counters) -> Counters {
        fn merge<K: PartialEq + Clone>(sum: &mut Vec<(K, u64)>, more: &[(K, u64)]) {
            for (name, count) in more {
                match sum.iter_mut().find(|(known, _)| known == name) {
                    Some((_, total)) => *total += count,
                    None => sum.push((name.clone(), *count)),
                }
            }
        }
        self.instructions += other.instructions;
        self.interrupts += other.interrupts;
        merge(&mut self.exceptions, &other.exceptions);
        merge(&mut self.unimplemented, &other.unimplemented);
        merge(&mut self.other, &other.other);
        self
    }
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

    /// The backend itself.
    #[must_use]
    pub fn backend(self) -> &'static dyn Backend {
        match self {
            BackendKind::Soft => &super::soft::Soft,
            #[cfg(target_arch = "x86_64")]
            BackendKind::Kvm => &super::kvm::Kvm,
            // The probe finds no KVM on such a host; who asks for it by name is told when a machine is made.
            #[cfg(not(target_arch = "x86_64"))]
            BackendKind::Kvm => &super::soft::Soft,
        }
    }
}

/// Interrupt controllers, timers and the clock of a backend that has its own, in the host's kernel. Where a method does
/// not say otherwise, no CPU runs when it is called.
pub trait HostChips: Send + Sync {
    /// A device drives an input of the I/O APIC. Called at any time, from any thread, when the level changes.
    fn set_line(&self, pin: u8, high: bool);
    /// The controllers' state. Lines that are high are not in it: the machine knows them.
    ///
    /// # Errors
    /// The host cannot tell.
    fn irqchip(&self) -> Result<IrqchipState, String>;
    /// Loads the controllers' state, which has been validated; after the CPUs' own.
    ///
    /// # Errors
    /// The host refuses it.
    fn set_irqchip(&self, state: &IrqchipState) -> Result<(), String>;
    /// Guest time in nanoseconds, which runs whether or not a CPU does. Called at any time.
    ///
    /// # Errors
    /// The host cannot tell.
    fn guest_time(&self) -> Result<u64, String>;
    /// Lets guest time go on from here.
    ///
    /// # Errors
    /// The host refuses it.
    fn set_guest_time(&self, ns: u64) -> Result<(), String>;
    /// The boot processor's counter.
    ///
    /// # Errors
    /// The host cannot tell.
    fn counter(&self) -> Result<Counter, String>;
    /// Loads it; the rate is the host's. The counters of all CPUs are the same.
    ///
    /// # Errors
    /// The host refuses it.
    fn set_counter(&self, tsc: u64, system_time: u64) -> Result<(), String>;
}

/// A CPU's time-stamp counter, and how the guest has it turned into time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// The counter.
    pub tsc: u64,
    /// Its ticks per second.
    pub tsc_hz: u64,
    /// kvm-clock's system-time MSR.
    pub system_time: u64,
}

/// How far a CPU has come that the guest starts itself (Intel SDM vol. 3, 9.4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// It runs, or halts.
    Started,
    /// As after reset: it waits for INIT.
    Reset,
    /// It waits for SIPI.
    Init,
    /// It is about to start at this page.
    Sipi(u8),
}

/// A CPU beyond the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherCpu {
    /// Its architectural state.
    pub cpu: CpuState,
    /// Its local APIC.
    pub lapic: LapicState,
    /// Its kvm-clock system-time MSR.
    pub system_time: u64,
    /// How far it has come.
    pub start: Start,
}

/// The CPUs of a machine, and what else its backend brings.
pub struct Vm {
    /// The boot processor, as after reset.
    pub first: Box<dyn Vcpu>,
    /// The other CPUs, as after reset.
    pub others: Vec<Box<dyn Vcpu>>,
    /// Interrupt controllers and clock, if they are the backend's.
    pub chips: Option<Arc<dyn HostChips>>,
}

/// What a machine's CPUs can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// What the platform's table says, on every host.
    #[default]
    Baseline,
    /// What the host's CPU can do: its snapshots need KVM and a CPU that can do the same.
    Host,
}

/// What a CPU of [`CpuModel::Host`] has beyond the neutral state. It means something to such a host only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// The CPUID that the guest sees but for what differs between CPUs: leaf, subleaf, EAX, EBX, ECX, EDX.
    pub cpuid: Vec<[u32; 6]>,
    /// XCR0.
    pub xcr0: u64,
    /// The XSAVE image in standard form (Intel SDM vol. 1, 13.4).
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// Model-specific registers, as (index, value).
    pub msrs: Vec<(u32, u64)>,
}

/// What a machine's CPUs are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many, at least one.
    pub cpus: u8,
    /// What they can do.
    pub model: CpuModel,
}

/// A backend has no machine for us.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// It has fewer CPUs.
    #[error("The software CPU runs one CPU per sandbox, not {0}: more need a host with KVM")]
    Cpus(u8),
    /// It is not the host's CPU.
    #[error("It was made with cpu: 'host', for KVM on one kind of CPU; the software CPU is another")]
    HostCpu,
    /// The host's CPU is another.
    #[error("It was made with cpu: 'host' on a CPU that differs from this host's in CPUID leaf {leaf:#x}")]
    OtherHost {
        /// Where the difference is.
        leaf: u32,
    },
    /// The host refuses.
    #[error("{0}")]
    Host(String),
}

impl From<String> for BackendError {
    fn from(reason: String) -> BackendError {
        BackendError::Host(reason)
    }
}

/// Makes virtual machines.
pub trait Backend: Send + Sync {
    /// Which kind.
    fn kind(&self) -> BackendKind;
    /// A machine over `ram`.
    ///
    /// # Errors
    /// Why there is none.
    fn create_vm(&self, ram: &Arc<Ram>, shape: Shape) -> Result<Vm, BackendError>;
}
