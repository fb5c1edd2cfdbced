//! A CPU's architectural state in KVM's terms, and back (Linux: Documentation/virt/kvm/api.rst).
//!
//! Pure conversions; [`vcpu`](super::vcpu) makes the calls. What a virtual CPU may hold beyond the neutral state is an event
//! that the host has begun to deliver and not finished. Faults are left out: their instruction is executed again. An
//! interrupt goes back to where it came from, see [`chips`](super::chips).

use amber_x86::state::{CpuState, SegmentState, TableState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_STI,
    kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xsave,
};

/// EFER, which KVM has among the special registers.
const MSR_EFER: u32 = 0xc000_0080;
/// The MSRs of [`CpuState::msrs`], ascending, but for EFER.
pub(super) const MSRS: [u32; 11] = [
    0x174,
    0x175,
    0x176,
    0x1a0,
    0x277,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
];
/// Bytes of the FXSAVE image.
const FXSAVE: usize = 512;
/// Its bytes that have a meaning; the others are software's.
const FXSAVE_USED: usize = 416;
/// XSTATE_BV in the header of the XSAVE image (Intel SDM vol. 1, 13.4.2).
const XSTATE_BV: usize = 512 / 4;
/// x87 and SSE.
const X87_SSE: u32 = 3;
/// The MXCSR mask, which is the host's: all bits that exist.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

/// A state in KVM's terms.
pub(super) struct KvmState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) debug: kvm_debugregs,
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) xsave: kvm_xsave,
    pub(super) events: kvm_vcpu_events,
    pub(super) mp: kvm_mp_state,
}

/// A segment register in KVM's terms.
pub(in crate::machine) fn to_segment(s: &SegmentState) -> kvm_segment {
    let bit = |n: u32| (s.attributes >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 0xf) as u8,
        present: bit(7),
        dpl: (s.attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: 1 - bit(7),
        padding: 0,
    }
}

fn from_segment(s: &kvm_segment) -> SegmentState {
    let bit = |value: u8, n: u32| u16::from(value & 1) << n;
    let attributes = u16::from(s.type_ & 0xf)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(s.present & (1 - (s.unusable & 1)), 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15);
    SegmentState { selector: s.selector, base: s.base, limit: s.limit, attributes }
}

/// Loads the segment registers and descriptor tables of a state.
pub(in crate::machine) fn from_segments(state: &CpuState, sregs: &mut kvm_sregs) {
    let table = |t: TableState| kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] };
    [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs] = state.segments.each_ref().map(to_segment);
    (sregs.tr, sregs.ldt) = (to_segment(&state.tr), to_segment(&state.ldtr));
    (sregs.gdt, sregs.idt) = (table(state.gdtr), table(state.idtr));
}

impl KvmState {
    /// `state` in KVM's terms; what it does not say is as in `sregs`.
    ///
    /// # Errors
    /// It has MSRs that are not a CPU's, or no whole FXSAVE image.
    pub(super) fn new(state: &CpuState, mut sregs: kvm_sregs) -> Result<KvmState, String> {
        from_segments(state, &mut sregs);
        (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        // Nothing is being delivered.
        sregs.interrupt_bitmap = [0; 4];
        let mut msrs = Vec::new();
        for &(index, data) in &state.msrs {
            if index == MSR_EFER {
                sregs.efer = data;
            } else if MSRS.contains(&index) {
                msrs.push(kvm_msr_entry { index, data, reserved: 0 });
            } else {
                return Err(format!("CPU state is not valid: unknown MSR {index:#x}"));
            }
        }
        let image: &[u8; FXSAVE] = state.fxsave.as_slice().try_into().map_err(|_| {
            format!("CPU state is not valid: the FXSAVE image has {} bytes", state.fxsave.len())
        })?;
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(image[..FXSAVE_USED].as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        xsave.region[XSTATE_BV] = X87_SSE;
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
        let (rip, rflags) = (state.rip, state.rflags);
        #[rustfmt::skip]
        let regs = kvm_regs {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
        };
        let mut debug = kvm_debugregs { dr6: state.dr6, dr7: state.dr7, ..kvm_debugregs::default() };
        debug.db = state.dr;
        let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..kvm_vcpu_events::default() };
        events.interrupt.shadow = if state.interrupt_shadow { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
        let mp_state = if state.halted { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE };
        Ok(KvmState { regs, sregs, debug, msrs, xsave, events, mp: kvm_mp_state { mp_state } })
    }

    /// The neutral state.
    pub(super) fn neutral(&self) -> CpuState {
        let (r, s) = (&self.regs, &self.sregs);
        let table = |t: kvm_dtable| TableState { base: t.base, limit: t.limit };
        let mut msrs: Vec<(u32, u64)> = self.msrs.iter().map(|msr| (msr.index, msr.data)).collect();
        msrs.push((MSR_EFER, s.efer));
        msrs.sort_unstable();
        let words = self.xsave.region[..FXSAVE_USED / 4].iter();
        let mut fxsave: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        fxsave.resize(FXSAVE, 0);
        fxsave[MXCSR_MASK].copy_from_slice(&0xffffu32.to_le_bytes());
        CpuState {
            gpr: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
            segments: [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].each_ref().map(from_segment),
            ldtr: from_segment(&s.ldt),
            tr: from_segment(&s.tr),
            gdtr: table(s.gdt),
            idtr: table(s.idt),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            dr: self.debug.db,
            dr6: self.debug.dr6,
            dr7: self.debug.dr7,
            msrs,
            fxsave,
            halted: self.mp.mp_state == KVM_MP_STATE_HALTED,
            interrupt_shadow: self.events.interrupt.shadow != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment() -> impl Strategy<Value = SegmentState> {
        let bits = any::<u16>().prop_map(|bits| bits & 0xf0ff);
        (any::<u16>(), any::<u64>(), any::<u32>(), bits).prop_map(|(selector, base, limit, attributes)| {
            SegmentState { selector, base, limit, attributes }
        })
    }

    fn table() -> impl Strategy<Value = TableState> {
        (any::<u64>(), any::<u16>()).prop_map(|(base, limit)| TableState { base, limit })
    }

    fn state() -> impl Strategy<Value = CpuState> {
        let segments = prop::array::uniform8(segment());
        let msrs = prop::array::uniform12(any::<u64>());
        let control = prop::array::uniform6(any::<u64>());
        let image = prop::collection::vec(any::<u8>(), FXSAVE);
        let words = (prop::array::uniform16(any::<u64>()), any::<[u64; 2]>(), any::<[u64; 4]>());
        (words, segments, [table(), table()], control, msrs, image, any::<[bool; 2]>()).prop_map(
            |((gpr, [rip, rflags], dr), s, [gdtr, idtr], control, values, mut fxsave, [halted, shadow])| {
                let [cr0, cr2, cr3, cr4, dr6, dr7] = control;
                let indices = MSRS.into_iter().chain([MSR_EFER]);
                let mut msrs: Vec<(u32, u64)> = indices.zip(values).collect();
                msrs.sort_unstable();
                fxsave[FXSAVE_USED..].fill(0);
                fxsave[MXCSR_MASK].copy_from_slice(&[0xff, 0xff, 0, 0]);
                let segments = [s[0], s[1], s[2], s[3], s[4], s[5]];
                let (ldtr, tr) = (s[6], s[7]);
                #[rustfmt::skip]
                let state = CpuState {
                    gpr, rip, rflags, segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, dr, dr6, dr7, msrs,
                    fxsave, halted, interrupt_shadow: shadow,
                };
                state
            },
        )
    }

    proptest! {
        #[test]
        fn every_state_comes_back_as_it_was(state in state()) {
            let there = KvmState::new(&state, kvm_sregs::default()).unwrap();
            prop_assert_eq!(there.neutral(), state);
        }
    }

    #[test]
    fn an_event_under_way_and_the_apic_are_not_the_states() {
        let sregs =
            kvm_sregs { apic_base: 0xfee0_0900, cr8: 5, interrupt_bitmap: [1; 4], ..Default::default() };
        let mut cpu = KvmState::new(&sample(), sregs).unwrap();
        assert_eq!((cpu.sregs.apic_base, cpu.sregs.cr8), (0xfee0_0900, 5));
        assert_eq!(cpu.sregs.interrupt_bitmap, [0; 4]);
        cpu.events.exception.injected = 1;
        cpu.events.interrupt.injected = 1;
        assert_eq!(cpu.neutral(), sample());
    }

    #[test]
    fn a_state_that_is_none_is_refused() {
        let msrs = vec![(0x10, 0)];
        assert!(KvmState::new(&CpuState { msrs, ..sample() }, kvm_sregs::default()).is_err());
        let fxsave = vec![0; 511];
        assert!(KvmState::new(&CpuState { fxsave, ..sample() }, kvm_sregs::default()).is_err());
    }

    fn sample() -> CpuState {
        let sregs = kvm_sregs::default();
        let msrs = MSRS.map(|index| kvm_msr_entry { index, ..Default::default() }).to_vec();
        let (regs, debug, events) = Default::default();
        let (xsave, mp) = (kvm_xsave::default(), kvm_mp_state::default());
        KvmState { regs, sregs, debug, msrs, xsave, events, mp }.neutral()
    }

    #[test]
    fn a_segment_that_kvm_cannot_use_is_not_present() {
        let data = kvm_segment { type_: 3, s: 1, present: 1, ..Default::default() };
        assert_eq!(from_segment(&data).attributes, 0x93);
        assert_eq!(from_segment(&kvm_segment { unusable: 1, ..data }).attributes, 0x13);
    }
}
