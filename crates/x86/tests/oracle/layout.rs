//! Where things are: the same virtual addresses in this process and in the software CPU's guest.
//!
//! All lie below 2 GiB, so that 32-bit addressing and absolute displacements reach them.

pub(crate) const PAGE: u64 = 4096;

/// The pages that hold the code under test.
pub(crate) const CODE: u64 = 0x2000_0000;
pub(crate) const CODE_PAGES: u64 = 2;
pub(crate) const CODE_BYTES: usize = (CODE_PAGES * PAGE) as usize;
/// The pages that memory operands lie in; the pages around them are not mapped.
pub(crate) const DATA: u64 = CODE + 0x1_0000;
pub(crate) const DATA_PAGES: u64 = 3;
pub(crate) const DATA_BYTES: usize = (DATA_PAGES * PAGE) as usize;
/// GS.base.
pub(crate) const GS: u64 = 0x1_2340;
/// What the native side keeps for itself.
pub(crate) const CONTEXT: u64 = 0x3000_0000;
/// The guest's own kernel: supervisor pages.
pub(crate) const KERNEL: u64 = CODE + 0x10_0000;

/// The registers that a test starts from.
#[derive(Clone)]
pub(crate) struct State {
    /// In encoding order.
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    /// FXSAVE64 image.
    pub(crate) fx: Box<[u8; 512]>,
}

/// What a test ended with: an exception, always; INT3 if all went well.
#[derive(Clone)]
pub(crate) struct Outcome {
    pub(crate) state: State,
    pub(crate) vector: u64,
    pub(crate) error: u64,
    pub(crate) cr2: u64,
}
