//! The neutral architectural state: what a snapshot holds of a CPU, and what tests compare.
//!
//! It is KVM's and Intel's vocabulary, so that every backend can load and save it. Restored state is untrusted:
//! [`Cpu::set_state`](crate::Cpu::set_state) validates.

mod convert;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentState {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights: bits 0-3 type, 4 S, 5-6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G (descriptor bits 40-55).
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableState {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Everything that defines a CPU between two instructions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS, bit 1 set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [SegmentState; 6],
    /// Local descriptor table register.
    pub ldtr: SegmentState,
    /// Task register.
    pub tr: SegmentState,
    /// Global descriptor table register.
    pub gdtr: TableState,
    /// Interrupt descriptor table register.
    pub idtr: TableState,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// MSRs held by the CPU itself, as (index, value), sorted by index: EFER, STAR, LSTAR, CSTAR, SFMASK,
    /// KERNEL_GS_BASE, TSC_AUX, SYSENTER_*, PAT, MISC_ENABLE. FS.base and GS.base are in `segments`.
    pub msrs: Vec<(u32, u64)>,
    /// x87, MMX and SSE state as the 512-byte FXSAVE64 image (Intel SDM vol. 1, 10.5.1).
    #[serde(with = "serde_bytes")]
    pub fxsave: Vec<u8>,
    /// Whether the CPU is in HLT.
    pub halted: bool,
    /// Whether interrupts are held off for one instruction (after STI or MOV SS).
    pub interrupt_shadow: bool,
}

/// Why a state cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A register holds what no running CPU could have put there.
    #[error("CPU state is not valid: {0} is {1:#x}")]
    Register(&'static str, u64),
    /// The FXSAVE image has another length than 512 bytes.
    #[error("CPU state is not valid: the FXSAVE image has {0} bytes")]
    FxsaveLength(usize),
    /// The state has a model-specific register that the CPU does not hold itself.
    #[error("CPU state is not valid: unknown MSR {0:#x}")]
    UnknownMsr(u32),
}
