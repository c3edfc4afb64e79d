//! Transposition of 16 x 16 dwords, the one shuffle that packing and storing need.

use crate::isa::Isa;

/// Transposes a square of 16 x 16 dwords in place.
pub(crate) fn transpose16(isa: Isa, square: &mut [u32; 256]) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512 | Isa::Amx) {
        // SAFETY: these instruction sets include AVX-512F.
        return unsafe { avx512(square) };
    }
    let _ = isa;
    scalar(square);
}

fn scalar(square: &mut [u32; 256]) {
    for i in 0..16 {
        for j in 0..i {
            square.swap(i * 16 + j, j * 16 + i);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(square: &mut [u32; 256]) {
    use std::arch::x86_64::*;
    // SAFETY: 16 lines of 16 dwords each are in the square.
    let mut rows: [__m512i; 16] =
        std::array::from_fn(|i| unsafe { _mm512_loadu_si512(square.as_ptr().add(i * 16).cast()) });
    rows = transpose_registers(rows);
    for (i, row) in rows.into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(square.as_mut_ptr().add(i * 16).cast(), row) };
    }
}

/// Four rounds of pairwise interleaving: dwords, qwords, then 128-bit lanes twice.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose_registers(r: [std::arch::x86_64::__m512i; 16]) -> [std::arch::x86_64::__m512i; 16] {
    use std::arch::x86_64::*;
    let zero = _mm512_setzero_si512();
    let mut t = [zero; 16];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // u[4 g + c]: in 128-bit lane l the column 4 l + c of rows 4 g .. 4 g + 4.
    let mut u = [zero; 16];
    for g in 0..4 {
        u[4 * g] = _mm512_unpacklo_epi64(t[4 * g], t[4 * g + 2]);
        u[4 * g + 1] = _mm512_unpackhi_epi64(t[4 * g], t[4 * g + 2]);
        u[4 * g + 2] = _mm512_unpacklo_epi64(t[4 * g + 1], t[4 * g + 3]);
        u[4 * g + 3] = _mm512_unpackhi_epi64(t[4 * g + 1], t[4 * g + 3]);
    }
    let mut out = [zero; 16];
    for c in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]);
        let high = _mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]);
        let low_odd = _mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]);
        let high_odd = _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]);
        out[c] = _mm512_shuffle_i32x4::<0x88>(low, high);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(low_odd, high_odd);
    }
    out
}

/// Two tiles of bf16, each 16 inputs x 32 outputs (the second holds the next 16 inputs), to two tiles of 16 outputs x
/// 32 inputs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn transpose_bf16(first: &[u16; 512], second: &[u16; 512]) -> [u16; 1024] {
    use std::arch::x86_64::*;
    // Word i of one input and word i of the next one, side by side, for outputs 0..16 and 16..32.
    let low: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 32) as u16);
    let high: [u16; 32] = std::array::from_fn(|i| (16 + i / 2 + i % 2 * 32) as u16);
    let mut out = [0u16; 1024];
    // SAFETY: all loads and stores are of 32 words inside the arrays.
    unsafe {
        let input = |k: usize| {
            let tile = if k < 16 { first } else { second };
            _mm512_loadu_si512(tile.as_ptr().add(k % 16 * 32).cast())
        };
        for (half, order) in [low, high].into_iter().enumerate() {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            let pairs = std::array::from_fn(|p| _mm512_permutex2var_epi16(input(2 * p), order, input(2 * p + 1)));
            for (n, line) in transpose_registers(pairs).into_iter().enumerate() {
                _mm512_storeu_si512(out.as_mut_ptr().add((half * 16 + n) * 32).cast(), line);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_transposes() {
        let start: [u32; 256] = std::array::from_fn(|i| i as u32);
        for isa in crate::isa::available() {
            let mut square = start;
            transpose16(isa, &mut square);
            for i in 0..16 {
                for j in 0..16 {
                    assert_eq!(square[i * 16 + j], start[j * 16 + i], "{isa:?}");
                }
            }
        }
    }
}
