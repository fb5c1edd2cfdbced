//! The arithmetic flags, kept as what they derive from.
//!
//! ZF, SF, PF and AF are computed when they are asked for; CF and OF are kept, for the host computes them for free.
//! `c` packs CF (bit 0), OF (bit 8), and corrections for results that no arithmetic gives: bit 16 flips SF, bit 17
//! flips PF. So an operation stores three words and a condition needs one or two.

/// RFLAGS bits (Intel SDM vol. 1, 3.4.3).
pub(crate) mod bit {
    pub(crate) const CF: u64 = 1;
    pub(crate) const PF: u64 = 1 << 2;
    pub(crate) const AF: u64 = 1 << 4;
    pub(crate) const ZF: u64 = 1 << 6;
    pub(crate) const SF: u64 = 1 << 7;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const OF: u64 = 1 << 11;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const VIF: u64 = 1 << 19;
    pub(crate) const VIP: u64 = 1 << 20;
    pub(crate) const ID: u64 = 1 << 21;
    /// The flags that [`super::Flags`] holds; all others live in `Cpu::rflags`.
    pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

const C_CF: u32 = 1;
const C_OF: u32 = 1 << 8;
const C_SF: u32 = 1 << 16;
const C_PF: u32 = 1 << 17;

/// The six arithmetic flags in lazy form.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Flags {
    /// The result, sign-extended from the operand size.
    pub(crate) res: u64,
    /// Operand a XOR operand b; AF is bit 4 of `ab ^ res`.
    pub(crate) ab: u64,
    /// CF, OF and corrections.
    pub(crate) c: u32,
}

impl Flags {
    #[inline(always)]
    pub(crate) fn set_arith(&mut self, res: u64, ab: u64, cf: bool, of: bool) {
        self.res = res;
        self.ab = ab;
        self.c = u32::from(cf) | u32::from(of) << 8;
    }

    /// AND, OR, XOR, TEST: CF and OF clear, AF (undefined) clear.
    #[inline(always)]
    pub(crate) fn set_logic(&mut self, res: u64) {
        self.res = res;
        self.ab = res;
        self.c = 0;
    }

    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        self.c & C_CF != 0
    }
    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        self.c & C_OF != 0
    }
    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        self.res == 0
    }
    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        ((self.res >> 63) as u32 ^ (self.c >> 16)) & 1 != 0
    }
    #[inline(always)]
    pub(crate) fn pf(&self) -> bool {
        // The corrections sit where a set bit flips parity: fold bit 17 of `c` in.
        ((self.res as u8).count_ones() ^ (self.c >> 17)) & 1 == 0
    }
    #[inline(always)]
    pub(crate) fn af(&self) -> bool {
        (self.ab ^ self.res) & 0x10 != 0
    }
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        self.c = (self.c & !C_CF) | u32::from(cf);
    }
    #[inline(always)]
    pub(crate) fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.c = (self.c & !(C_CF | C_OF)) | u32::from(cf) | u32::from(of) << 8;
    }

    /// Sets ZF alone; the other five keep their values.
    pub(crate) fn set_zf(&mut self, zf: bool) {
        let others = self.bits() & !bit::ZF;
        self.set_bits(others | if zf { bit::ZF } else { 0 });
    }

    /// The six flags at their RFLAGS positions.
    pub(crate) fn bits(&self) -> u64 {
        let mut f = 0;
        let mut put = |on: bool, bit: u64| f |= if on { bit } else { 0 };
        put(self.cf(), bit::CF);
        put(self.pf(), bit::PF);
        put(self.af(), bit::AF);
        put(self.zf(), bit::ZF);
        put(self.sf(), bit::SF);
        put(self.of(), bit::OF);
        f
    }

    /// Takes the six flags from RFLAGS positions; other bits are ignored.
    pub(crate) fn set_bits(&mut self, f: u64) {
        // A result that gives ZF, and by itself SF = 0 and a known PF; the corrections do the rest.
        self.res = if f & bit::ZF != 0 { 0 } else { 1 };
        let natural_pf = f & bit::ZF != 0;
        self.ab = self.res ^ (f & bit::AF);
        self.c = (f & bit::CF) as u32
            | if f & bit::OF != 0 { C_OF } else { 0 }
            | if f & bit::SF != 0 { C_SF } else { 0 }
            | if (f & bit::PF != 0) != natural_pf { C_PF } else { 0 };
    }

    /// Evaluates a condition code (the low four bits of Jcc, SETcc, CMOVcc opcodes).
    #[inline(always)]
    pub(crate) fn condition(&self, cc: u8) -> bool {
        let base = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() | (self.sf() != self.of()),
        };
        base ^ (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_flags_survives() {
        for n in 0..64u64 {
            let bits = [bit::CF, bit::PF, bit::AF, bit::ZF, bit::SF, bit::OF];
            let f = (0..6).filter(|i| n >> i & 1 != 0).fold(0, |f, i| f | bits[i]);
            let mut flags = Flags::default();
            flags.set_bits(f);
            assert_eq!(flags.bits(), f);
            flags.set_zf(f & bit::ZF == 0);
            assert_eq!(flags.bits(), f ^ bit::ZF);
        }
    }
}
