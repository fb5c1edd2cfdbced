//! A software x86-64 CPU.
//!
//! This crate is a CPU specification made executable: 64-bit long mode with paging, rings 0 and 3, interrupts and
//! exceptions, and the x86-64-v2 instruction set. It knows nothing of devices, of KVM or of Node: physical memory is
//! a [`GuestRam`], everything else that a CPU can reach is behind the [`Bus`] trait.
//!
//! Rooms:
//! - [`bus`]: what the CPU needs of its surroundings.
//! - [`state`]: the neutral architectural state, for snapshots and for tests.
//! - `cpu`: the CPU's working state and its run loop.
//! - `op`, `decode`, `code`: guest instructions decoded (by iced-x86) into compact operations, cached per physical page;
//!   `shared`: what the copies of one image share of it.
//! - `ops`: what the operations do (integer); `simd`, `x87`: floating point and vectors.
//! - `mem`, `mmu`: the software TLB's fast path; page walks, faults, MMIO and invalidation behind it.
//! - `interrupt`, `system`: event delivery; control registers, MSRs, segments, privileged instructions.
#![allow(unsafe_op_in_unsafe_fn)] // Operation handlers are unsafe as a whole: one contract, stated at `op::Handler`.

pub mod bus;
mod code;
mod cpu;
mod decode;
mod flags;
mod interrupt;
mod mem;
mod mmu;
mod op;
mod ops;
mod shared;
mod simd;
pub mod state;
mod system;
mod x87;

pub use bus::{Bus, GuestRam, PageFlags};
pub use cpu::{Cpu, Diagnostics, Exit, Kick};
pub use shared::SharedCode;
