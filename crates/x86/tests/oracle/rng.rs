//! Seeded random values, biased to what breaks CPUs.

/// SplitMix64.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True in `percent` of 100 cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer register's value: random bits, or near a boundary of some size.
    pub(crate) fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4).wrapping_sub(2),
            1 => {
                let bit = self.pick(&[7, 8, 15, 16, 31, 32, 63]);
                (1u64 << bit).wrapping_add(self.below(3)).wrapping_sub(1)
            }
            2 => self.below(300),
            3 => self.next() as i32 as u64,
            4 => {
                // Parts that are boundaries themselves.
                let byte = self.pick(&[0, 1, 0x7f, 0x80, 0xff]);
                let half = self.pick(&[0, 1, 0x7fff, 0x8000, 0xffff]);
                self.next() & !0xffff_ffff | half << 16 | (self.next() & 0xff) << 8 | byte
            }
            _ => self.next(),
        }
    }

    fn f32(&mut self) -> u32 {
        const SPECIAL: [u32; 24] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffc0_0001,
            0x7f80_0001,
            0xffbf_ffff,
            0x4f00_0000,
            0xcf00_0000,
            0x4eff_ffff,
            0x5f00_0000,
            0x3f00_0000,
            0xbf00_0000,
            0x3fc0_0000,
            0x4b00_0001,
            0x3eaa_aaab,
            0x0000_8000,
        ];
        match self.below(4) {
            0 => self.pick(&SPECIAL),
            1 => self.next() as u32,
            // Exponents near each other, so that sums and comparisons mean something.
            _ => (self.next() as u32 & 0x807f_ffff) | (120 + self.below(20) as u32) << 23,
        }
    }

    fn f64(&mut self) -> u64 {
        const SPECIAL: [u64; 22] = [
            0,
            1 << 63,
            0x3ff0 << 48,
            0xbff0 << 48,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010 << 48,
            0x7fef_ffff_ffff_ffff,
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff8 << 48,
            0xfff8_0000_0000_0001,
            0x7ff0_0000_0000_0001,
            0x41df_ffff_ffc0_0000,
            0x41e0 << 48,
            0xc1e0 << 48,
            0x43e0 << 48,
            0xc3e0 << 48,
            0x43df_ffff_ffff_ffff,
            0x3fe0 << 48,
            0x380f_ffff_ffff_ffff,
            0x36a0 << 48,
        ];
        match self.below(4) {
            0 => self.pick(&SPECIAL),
            1 => self.next(),
            _ => (self.next() & 0x800f_ffff_ffff_ffff) | (1015 + self.below(60)) << 52,
        }
    }

    /// 16 bytes: integers, singles, doubles or text.
    pub(crate) fn vector(&mut self) -> [u64; 2] {
        match self.below(5) {
            0 => [self.value(), self.value()],
            1 => {
                let mut f = || u64::from(self.f32());
                [f() | f() << 32, f() | f() << 32]
            }
            2 => [self.f64(), self.f64()],
            3 => {
                // Few letters and an end, for string comparisons.
                let mut text =
                    || (0..8).fold(0, |t, i| t | self.pick(&[0u64, 0x61, 0x62, 0x63, 0x7a]) << (8 * i));
                [text(), text()]
            }
            _ => [self.next(), self.next()],
        }
    }

    /// An 80-bit number.
    pub(crate) fn extended(&mut self) -> [u64; 2] {
        const SPECIAL: [(u64, u64); 16] = [
            (0, 0),
            (0, 0x8000),
            (1 << 63, 0x3fff),
            (1 << 63, 0xbfff),
            (1 << 63, 0x7fff),
            (1 << 63, 0xffff),
            (3 << 62, 0x7fff),
            (3 << 62 | 5, 0xffff),
            (1 << 63 | 1, 0x7fff),
            (1, 0),
            (1 << 63, 0),
            (u64::MAX, 0x7ffe),
            (1 << 62, 0x4000),
            (0, 0x7fff),
            (0xc90f_daa2_2168_c235, 0x4000),
            (1 << 63, 0x403e),
        ];
        match self.below(5) {
            0 => {
                let (significand, exponent) = self.pick(&SPECIAL);
                [significand, exponent]
            }
            1 => [self.next(), self.next() & 0xffff],
            2 => [self.next() | 1 << 63, 0x3fff - 70 + self.below(140) | self.below(2) << 15],
            // Integers.
            3 => {
                let v = self.value().max(1) >> self.below(40).min(63);
                let shift = u64::from(v.max(1).leading_zeros());
                [v.max(1) << shift, 0x3fff + 63 - shift | self.below(2) << 15]
            }
            _ => [self.next() | 1 << 63, 0x3fff - 4 + self.below(8) | self.below(2) << 15],
        }
    }
}
