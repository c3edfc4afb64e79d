//! AVX-512 decoders from stored blocks to tile lines.

use std::arch::x86_64::*;

use super::codes::{CodeRow, scale_min};
use super::panel::TILE;
use super::{TILE_K, TILE_N};
use crate::Format;

/// Whether [`bf16_row`] knows a format.
pub(crate) fn has(format: Format) -> bool {
    !matches!(format, Format::F32 | Format::F16)
}

/// Decodes a run of `k` numbers to bf16 lines of 32, one tile apart; padding becomes zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,f16c")]
pub(crate) fn bf16_row(format: Format, bytes: &[u8], k: usize, lines: &mut [u16]) {
    assert!(lines.len() >= (k.div_ceil(TILE_K) - 1) * TILE + TILE_K && Some(bytes.len()) == format.run_bytes(k));
    let out = lines.as_mut_ptr();
    if format == Format::Bf16 {
        for (t, line) in bytes.chunks(TILE_K * 2).enumerate() {
            let mask = (u64::MAX >> (64 - line.len())) as __mmask64;
            // SAFETY: only the bytes of `line` are read; the line is inside `lines` by the assertion.
            unsafe {
                let v = _mm512_maskz_loadu_epi8(mask, line.as_ptr().cast());
                _mm512_storeu_si512(out.add(t * TILE).cast(), v);
            }
        }
        return;
    }
    let per_block = format.block_len() / TILE_K;
    for (i, block) in bytes.chunks_exact(format.block_bytes()).enumerate() {
        // SAFETY: the block has all its bytes, and its lines are inside `lines` by the assertion.
        unsafe {
            let out = out.add(i * per_block * TILE);
            match format {
                Format::Q8_0 => q8_0(block.as_ptr(), out),
                Format::Q4_0 => q4_0(block.as_ptr(), out),
                Format::Q4K => q4_k(block.as_ptr(), out),
                _ => q6_k(block.as_ptr(), out),
            }
        }
    }
}

/// Decodes a run of f16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn f16_run(bytes: &[u8], run: &mut [f32]) {
    assert_eq!(bytes.len(), run.len() * 2);
    for (bytes, out) in bytes.chunks(32).zip(run.chunks_mut(16)) {
        let mask = u16::MAX >> (16 - out.len());
        // SAFETY: the masks leave out what is not of the chunks.
        unsafe {
            let h = _mm256_maskz_loadu_epi16(mask, bytes.as_ptr().cast());
            _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, _mm512_cvtph_ps(h));
        }
    }
}

/// Splits a run of blocks into codes, scales and offsets; the twin of `codes::decode_row_scalar`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(crate) fn code_row(format: Format, bytes: &[u8], row: &mut CodeRow<'_>) {
    let per_block = format.block_len() / TILE_K;
    for (i, block) in bytes.chunks_exact(format.block_bytes()).enumerate() {
        let t = i * per_block;
        let codes = &mut row.codes[t * TILE..][..(per_block - 1) * TILE + TILE_K];
        let (p, out) = (block.as_ptr(), codes.as_mut_ptr());
        // SAFETY: the block has all its bytes, and the slice `codes` has all lines of the block.
        unsafe {
            match format {
                Format::Q8_0 => {
                    row.scales[t * TILE_N] = half(p);
                    let q = _mm256_loadu_si256(p.add(2).cast());
                    _mm256_storeu_si256(out.cast(), _mm256_xor_si256(q, _mm256_set1_epi8(-128)));
                }
                Format::Q4_0 => {
                    row.scales[t * TILE_N] = half(p);
                    _mm256_storeu_si256(out.cast(), q4_0_codes(p));
                }
                Format::Q4K => {
                    let (d, dmin) = (half(p), half(p.add(2)));
                    for j in 0..8 {
                        let (s, m) = scale_min(j, &block[4..16]);
                        row.scales[(t + j) * TILE_N] = d * f32::from(s);
                        row.offsets[(t + j) * TILE_N] = -(dmin * f32::from(m));
                    }
                    for c in 0..4 {
                        let [low, high] = q4_k_codes(p, c);
                        _mm256_storeu_si256(out.add(2 * c * TILE).cast(), low);
                        _mm256_storeu_si256(out.add((2 * c + 1) * TILE).cast(), high);
                    }
                }
                _ => {
                    let d = half(p.add(208));
                    for g in 0..16 {
                        row.scales[(t * 2 + g) * TILE_N] = d * f32::from(block[192 + g] as i8);
                    }
                    for h in 0..2 {
                        for (j, q) in q6_k_codes(p, h).into_iter().enumerate() {
                            _mm256_storeu_si256(out.add((h * 4 + j) * TILE).cast(), q);
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// Two bytes are readable at `p`.
#[inline]
#[target_feature(enable = "f16c")]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: by contract.
    let bits = unsafe { p.cast::<u16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// 32 signed bytes times one scale per 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn scaled(q: __m256i, first: __m512, second: __m512) -> __m512i {
    let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
    let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256::<1>(q)));
    bits(_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, second), _mm512_mul_ps(low, first)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bits(v: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of plain numbers.
    unsafe { std::mem::transmute(v) }
}

/// 0, 1 .. 15.
#[inline]
#[target_feature(enable = "avx512f")]
fn iota() -> __m512 {
    _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.)
}

/// The 16 values of 4-bit codes as bf16, in both halves of a register: the table of [`look_up`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn table(values: __m512) -> __m512i {
    bits(_mm512_cvtne2ps_pbh(values, values))
}

/// 32 codes (bytes below 16) to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn look_up(codes: __m256i, table: __m512i) -> __m512i {
    _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table)
}

/// # Safety
/// A block is readable at `p`, a line writable at `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,f16c")]
unsafe fn q8_0(p: *const u8, out: *mut u16) {
    // SAFETY: by contract.
    unsafe {
        let d = _mm512_set1_ps(half(p));
        let q = _mm256_loadu_si256(p.add(2).cast());
        _mm512_storeu_si512(out.cast(), scaled(q, d, d));
    }
}

/// # Safety
/// As [`q8_0`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,f16c")]
unsafe fn q4_0(p: *const u8, out: *mut u16) {
    // SAFETY: by contract.
    unsafe {
        let values = _mm512_mul_ps(_mm512_set1_ps(half(p)), _mm512_sub_ps(iota(), _mm512_set1_ps(8.0)));
        _mm512_storeu_si512(out.cast(), look_up(q4_0_codes(p), table(values)));
    }
}

/// # Safety
/// A block is readable at `p`, 8 lines a tile apart are writable at `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,f16c")]
unsafe fn q4_k(p: *const u8, out: *mut u16) {
    // SAFETY: by contract.
    unsafe {
        let (d, dmin) = (half(p), half(p.add(2)));
        let scales = std::slice::from_raw_parts(p.add(4), 12);
        for c in 0..4 {
            for (h, codes) in q4_k_codes(p, c).into_iter().enumerate() {
                let (s, m) = scale_min(2 * c + h, scales);
                let (s, m) = (_mm512_set1_ps(d * f32::from(s)), _mm512_set1_ps(dmin * f32::from(m)));
                let values = _mm512_fmsub_ps(iota(), s, m);
                _mm512_storeu_si512(out.add((2 * c + h) * TILE).cast(), look_up(codes, table(values)));
            }
        }
    }
}

/// # Safety
/// As [`q4_k`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,f16c")]
unsafe fn q6_k(p: *const u8, out: *mut u16) {
    // SAFETY: by contract.
    unsafe {
        let d = half(p.add(208));
        for h in 0..2 {
            for (j, q) in q6_k_codes(p, h).into_iter().enumerate() {
                let scale = |g: usize| _mm512_set1_ps(d * f32::from(*p.add(192 + (h * 4 + j) * 2 + g) as i8));
                let q = _mm256_sub_epi8(q, _mm256_set1_epi8(32));
                _mm512_storeu_si512(out.add((h * 4 + j) * TILE).cast(), scaled(q, scale(0), scale(1)));
            }
        }
    }
}

/// # Safety
/// A Q4_0 block is readable at `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn q4_0_codes(p: *const u8) -> __m256i {
    // SAFETY: by contract.
    let q = unsafe { _mm_loadu_si128(p.add(2).cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(q), q);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// The codes of sub-blocks `2 c` and `2 c + 1`.
///
/// # Safety
/// A Q4_K block is readable at `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn q4_k_codes(p: *const u8, c: usize) -> [__m256i; 2] {
    // SAFETY: by contract.
    let q = unsafe { _mm256_loadu_si256(p.add(16 + c * 32).cast()) };
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(q, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(q), mask)]
}

/// The codes (0..64) of the four lines of half `h`.
///
/// # Safety
/// A Q6_K block is readable at `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn q6_k_codes(p: *const u8, h: usize) -> [__m256i; 4] {
    // SAFETY: by contract.
    let (l0, l1, hi) = unsafe {
        (
            _mm256_loadu_si256(p.add(h * 64).cast()),
            _mm256_loadu_si256(p.add(h * 64 + 32).cast()),
            _mm256_loadu_si256(p.add(128 + h * 32).cast()),
        )
    };
    let (low, two) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    let high = |v: __m256i| _mm256_and_si256(v, two);
    let part = |l: __m256i, h: __m256i| _mm256_or_si256(_mm256_and_si256(l, low), h);
    [
        part(l0, high(_mm256_slli_epi16::<4>(hi))),
        part(l1, high(_mm256_slli_epi16::<2>(hi))),
        part(_mm256_srli_epi16::<4>(l0), high(hi)),
        part(_mm256_srli_epi16::<4>(l1), high(_mm256_srli_epi16::<2>(hi))),
    ]
}
