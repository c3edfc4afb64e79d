//! Tables that put packed values on their places: a byte of a mask finds the shuffle of eight values.

/// For every byte of a mask the place of each of its eight values, 0x80 where there is none: table look-ups of
/// AVX2 and NEON give zero for it.
pub(super) static BYTES: [[u8; 8]; 256] = shuffles::<8>();
/// The same for values of two bytes.
pub(super) static WORDS: [[u8; 16]; 256] = shuffles::<16>();

const fn shuffles<const N: usize>() -> [[u8; N]; 256] {
    let each = N / 8;
    let mut all = [[0x80; N]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut i, mut from) = (0, 0);
        while i < 8 {
            if mask >> i & 1 == 1 {
                let mut b = 0;
                while b < each {
                    all[mask][i * each + b] = (from * each + b) as u8;
                    b += 1;
                }
                from += 1;
            }
            i += 1;
        }
        mask += 1;
    }
    all
}
