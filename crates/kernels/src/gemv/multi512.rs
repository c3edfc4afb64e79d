//! Several vectors with AVX-512: a group of numbers is unpacked once for up to four vectors.
//!
//! The operations on each accumulator are those of [`super::avx512`], in the same order, so the bits are the same.

use super::Rows;
use super::avx512::{at256, at512, codes, floats, half, high_nibbles, lanes, pair, q6k_half, scales, words};
use super::operand::{Int8, Operand};
use super::scalar::q4k_scales;
use crate::Format;
use crate::format::last_group;
use crate::x86::Ahead;
use std::arch::x86_64::*;

/// Vectors that share an unpacked group.
const WIDE: usize = 4;

/// Bytes of weights that are used for all vectors before the next ones are read.
const BLOCK_BYTES: usize = 128 << 10;

/// Whether [`compute`] knows the format.
pub(super) fn serves(format: Format) -> bool {
    !matches!(format, Format::F32 | Format::F16)
}

/// Products of the rows of a claim with all of `xs`; `ys` has one slice of results per vector. The CPU must have
/// [`crate::Isa::Avx512`], and [`serves`] must hold.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
pub(super) fn compute(rows: &Rows, xs: &[&Operand], ys: &mut [&mut [f32]]) {
    // Pairs of rows whose weights stay in the second cache while chunk after chunk of the vectors, each in the first, is
    // multiplied with them.
    let (stretch, block) = (rows.len / 2, (BLOCK_BYTES / (2 * rows.w.row_bytes().max(1))).max(1));
    macro_rules! drive {
        ($dot:ident) => {{
            for first in (0..stretch).step_by(block) {
                for (c, chunk) in xs.chunks(WIDE).enumerate() {
                    let ys = &mut ys[c * WIDE..];
                    for i in first..stretch.min(first + block) {
                        // Far apart, as in the product with one vector.
                        let rows = rows.far(i, stretch);
                        drive!($dot, 2, Group { rows, fetch: c == 0 }, [i, i + stretch], chunk, ys);
                    }
                }
            }
            for i in 2 * stretch..rows.len {
                for (c, chunk) in xs.chunks(WIDE).enumerate() {
                    drive!($dot, 1, Group { rows: rows.far(i, 0), fetch: c == 0 }, [i], chunk, &mut ys[c * WIDE..]);
                }
            }
        }};
        ($dot:ident, $r:literal, $group:expr, $at:expr, $xs:expr, $ys:expr) => {{
            match *$xs {
                [a, b, c, d] => put($dot::<$r, 4>($group, [a, b, c, d]), $at, $ys),
                [a, b, c] => put($dot::<$r, 3>($group, [a, b, c]), $at, $ys),
                [a, b] => put($dot::<$r, 2>($group, [a, b]), $at, $ys),
                [a] => put($dot::<$r, 1>($group, [a]), $at, $ys),
                _ => unreachable!("chunks have one to four entries"),
            }
        }};
    }
    match rows.w.format() {
        Format::Bf16 => drive!(dot_bf16),
        Format::Q8_0 => drive!(dot_q8_0),
        Format::Q4_0 => drive!(dot_q4_0),
        Format::Q4K => drive!(dot_q4k),
        Format::Q6K => drive!(dot_q6k),
        Format::F32 | Format::F16 => unreachable!("not served"),
    }
}

/// Rows to compute; the first chunk of vectors fetches what comes next.
#[derive(Clone, Copy)]
struct Group<'a, const R: usize> {
    rows: Ahead<'a, R>,
    fetch: bool,
}

#[inline(always)]
fn put<const R: usize, const V: usize>(sums: [[f32; V]; R], at: [usize; R], ys: &mut [&mut [f32]]) {
    for (sums, at) in sums.into_iter().zip(at) {
        for (sum, y) in sums.into_iter().zip(ys.iter_mut()) {
            y[at] = sum;
        }
    }
}

/// Runs `$body` for group `$g` of every row: whole groups of `$bytes` bytes in place, the partial last one as a
/// zero-padded copy.
macro_rules! for_groups {
    ($group:ident, $bytes:literal, |$g:ident, $blocks:ident| $body:block) => {{
        let rows = $group.rows.rows();
        let whole = $group.rows.groups::<$bytes>();
        let groups = whole[0].len();
        for $g in 0..groups {
            let $blocks = whole.map(|w| &w[$g]);
            if $group.fetch {
                $group.rows.fetch($g * $bytes, $bytes);
            }
            $body
        }
        if groups * $bytes < rows[0].len() {
            let last = rows.map(|row| last_group::<$bytes>(row));
            let ($g, $blocks) = (groups, last.each_ref());
            $body
        }
    }};
}

// Loops and not `map`, whose closures would not be inlined and force all accumulators through memory.
#[inline]
#[target_feature(enable = "avx512f")]
fn sums<const R: usize, const V: usize>(acc: [[__m512; V]; R]) -> [[f32; V]; R] {
    let mut out = [[0.0; V]; R];
    for r in 0..R {
        for v in 0..V {
            out[r][v] = _mm512_reduce_add_ps(acc[r][v]);
        }
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pair_sums<const R: usize, const V: usize>(acc: [[[__m512; 2]; V]; R]) -> [[f32; V]; R] {
    let mut out = [[0.0; V]; R];
    for r in 0..R {
        for v in 0..V {
            out[r][v] = _mm512_reduce_add_ps(_mm512_add_ps(acc[r][v][0], acc[r][v][1]));
        }
    }
    out
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_bf16<const R: usize, const V: usize>(rows: Group<R>, xs: [&Operand; V]) -> [[f32; V]; R] {
    let xs = xs.map(|x| x.split().as_chunks::<32>().0);
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let mut acc = [[[_mm512_setzero_ps(); 2]; V]; R];
    for_groups!(rows, 64, |g, blocks| {
        let mut w = [[_mm512_setzero_ps(); 2]; R];
        for r in 0..R {
            let both = at512::<0, 64>(blocks[r]);
            w[r][0] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both));
            w[r][1] = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
        }
        for v in 0..V {
            let (even, odd) = (floats::<0, 32>(&xs[v][g]), floats::<16, 32>(&xs[v][g]));
            for r in 0..R {
                acc[r][v][0] = _mm512_fmadd_ps(w[r][0], even, acc[r][v][0]);
                acc[r][v][1] = _mm512_fmadd_ps(w[r][1], odd, acc[r][v][1]);
            }
        }
    });
    pair_sums(acc)
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q8_0<const R: usize, const V: usize>(rows: Group<R>, xs: [&Operand; V]) -> [[f32; V]; R] {
    let xs = xs.map(|x| {
        let Int8 { q, d8, bias, .. } = x.int8();
        (q.as_chunks::<128>().0, d8.as_chunks::<32>().0, bias.as_chunks::<32>().0)
    });
    let offset = _mm512_set1_epi8(-128);
    let pick = words([0, 17], 8);
    let mut acc = [[[_mm512_setzero_ps(); 2]; V]; R];
    for_groups!(rows, 136, |g, blocks| {
        let mut w = [[_mm512_setzero_si512(); 2]; R];
        let mut s = [[_mm512_setzero_ps(); 2]; R];
        for r in 0..R {
            let b = blocks[r];
            w[r][0] = _mm512_xor_si512(pair::<2, 36, 136>(b), offset);
            w[r][1] = _mm512_xor_si512(pair::<70, 104, 136>(b), offset);
            s[r][0] = scales(at512::<0, 136>(b), pick);
            s[r][1] = scales(at512::<68, 136>(b), pick);
        }
        for v in 0..V {
            let (q, d8, bias) = xs[v];
            let (q0, q1) = (codes::<0, 128>(&q[g]), codes::<64, 128>(&q[g]));
            let (b0, b1) = (lanes::<0, 32>(&bias[g]), lanes::<16, 32>(&bias[g]));
            let (d0, d1) = (floats::<0, 32>(&d8[g]), floats::<16, 32>(&d8[g]));
            for r in 0..R {
                let t0 = _mm512_dpbusd_epi32(b0, w[r][0], q0);
                let t1 = _mm512_dpbusd_epi32(b1, w[r][1], q1);
                let (s0, s1) = (_mm512_mul_ps(s[r][0], d0), _mm512_mul_ps(s[r][1], d1));
                acc[r][v][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t0), s0, acc[r][v][0]);
                acc[r][v][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t1), s1, acc[r][v][1]);
            }
        }
    });
    pair_sums(acc)
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q4_0<const R: usize, const V: usize>(rows: Group<R>, xs: [&Operand; V]) -> [[f32; V]; R] {
    let xs = xs.map(|x| {
        let x = x.q4_0();
        (x.q.as_chunks::<128>().0, x.d4.as_chunks::<16>().0, x.bias.as_chunks::<16>().0)
    });
    let low = _mm512_set1_epi8(15);
    let pick = words([0, 9, 18, 27], 4);
    let mut gather = [0_i8; 64];
    for (i, at) in gather.iter_mut().enumerate() {
        *at = (i / 16 * 18 + 2 + i % 16) as i8 & 63;
    }
    let gather = codes::<0, 64>(&gather);
    let mut acc = [[_mm512_setzero_ps(); V]; R];
    for_groups!(rows, 72, |g, blocks| {
        let mut w = [[_mm512_setzero_si512(); 2]; R];
        let mut s = [_mm512_setzero_ps(); R];
        for r in 0..R {
            let first = at512::<0, 72>(blocks[r]);
            // Blocks 0 to 2 come from the first load; block 3 already sits at its place in the second.
            let all = _mm512_mask_permutexvar_epi8(at512::<8, 72>(blocks[r]), 0xffff_ffff_ffff, gather, first);
            w[r] = [_mm512_and_si512(all, low), high_nibbles(all)];
            s[r] = scales(first, pick);
        }
        for v in 0..V {
            let (q, d4, bias) = xs[v];
            let (q0, q1) = (codes::<0, 128>(&q[g]), codes::<64, 128>(&q[g]));
            let (start, d) = (lanes::<0, 16>(&bias[g]), floats::<0, 16>(&d4[g]));
            for r in 0..R {
                let t = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, w[r][0], q0), w[r][1], q1);
                acc[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), _mm512_mul_ps(s[r], d), acc[r][v]);
            }
        }
    });
    sums(acc)
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q4k<const R: usize, const V: usize>(rows: Group<R>, xs: [&Operand; V]) -> [[f32; V]; R] {
    let xs = xs.map(|x| {
        let Int8 { q, d, sum, .. } = x.int8();
        (q.as_chunks::<256>().0, d.as_chunks::<8>().0, sum.as_chunks::<8>().0)
    });
    let low = _mm512_set1_epi8(15);
    let spread: [__m512i; 4] = [[0, 2], [1, 3], [4, 6], [5, 7]].map(|[a, b]| {
        let (a, b) = (_mm256_set1_epi32(a), _mm256_set1_epi32(b));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
    });
    let mut acc = [[[_mm512_setzero_ps(); 2]; V]; R];
    let mut minima = [[_mm256_setzero_ps(); V]; R];
    for_groups!(rows, 144, |g, blocks| {
        for r in 0..R {
            let b = blocks[r];
            let (sc, mn) = q4k_scales(&b[4..16]);
            let both = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            let wd = _mm256_broadcastss_ps(both);
            let wmin = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
            let sc = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(sc as i64)));
            let mn = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(mn as i64)));
            let (sc, mn) = (_mm256_mul_ps(sc, wd), _mm256_mul_ps(mn, wmin));
            let (w0, w1) = (at512::<16, 144>(b), at512::<80, 144>(b));
            let w = [_mm512_and_si512(w0, low), high_nibbles(w0), _mm512_and_si512(w1, low), high_nibbles(w1)];
            for v in 0..V {
                let (q, d, sum) = xs[v];
                let q = super::avx512::as_bytes(&q[g]);
                let qs =
                    [pair::<0, 64, 256>(q), pair::<32, 96, 256>(q), pair::<128, 192, 256>(q), pair::<160, 224, 256>(q)];
                // SAFETY: both arrays have eight numbers.
                let (d, sum) = unsafe { (_mm256_loadu_ps(d[g].as_ptr()), _mm256_loadu_ps(sum[g].as_ptr())) };
                let scale = _mm512_castps256_ps512(_mm256_mul_ps(sc, d));
                minima[r][v] = _mm256_fmadd_ps(mn, sum, minima[r][v]);
                for k in 0..4 {
                    let t = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w[k], qs[k]));
                    let s = _mm512_permutexvar_ps(spread[k], scale);
                    acc[r][v][k % 2] = _mm512_fmadd_ps(t, s, acc[r][v][k % 2]);
                }
            }
        }
    });
    let mut out = pair_sums(acc);
    for (out, minima) in out.iter_mut().flatten().zip(minima.iter().flatten()) {
        *out -= _mm512_reduce_add_ps(_mm512_zextps256_ps512(*minima));
    }
    out
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q6k<const R: usize, const V: usize>(rows: Group<R>, xs: [&Operand; V]) -> [[f32; V]; R] {
    let xs = xs.map(|x| {
        let Int8 { q, d, bias, .. } = x.int8();
        (q.as_chunks::<256>().0, d.as_chunks::<8>().0, bias.as_chunks::<64>().0)
    });
    let twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    let quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    let spread: [__m512i; 4] = [0, 4, 8, 12].map(|k| _mm512_add_epi32(quarter, _mm512_set1_epi32(k)));
    let mut acc = [[[_mm512_setzero_ps(); 2]; V]; R];
    for_groups!(rows, 210, |g, blocks| {
        for r in 0..R {
            let b = blocks[r];
            // SAFETY: bytes 192 to 207 lie inside the 210.
            let scale = unsafe { _mm_loadu_si128(b.as_ptr().add(192).cast()) };
            let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale));
            let scale = _mm512_mul_ps(scale, half([b[208], b[209]]));
            let (first, second) = (
                q6k_half(at512::<0, 210>(b), at256::<128, 210>(b)),
                q6k_half(at512::<64, 210>(b), at256::<160, 210>(b)),
            );
            let w = [first[0], first[1], second[0], second[1]];
            for v in 0..V {
                let (q, b) = (&xs[v].0[g], &xs[v].2[g]);
                let qs = [codes::<0, 256>(q), codes::<64, 256>(q), codes::<128, 256>(q), codes::<192, 256>(q)];
                // The stored bias is for an offset of 128; here it is 32.
                let start = [
                    _mm512_srai_epi32::<2>(lanes::<0, 64>(b)),
                    _mm512_srai_epi32::<2>(lanes::<16, 64>(b)),
                    _mm512_srai_epi32::<2>(lanes::<32, 64>(b)),
                    _mm512_srai_epi32::<2>(lanes::<48, 64>(b)),
                ];
                // SAFETY: the array has eight numbers.
                let d = _mm512_castps256_ps512(unsafe { _mm256_loadu_ps(xs[v].1[g].as_ptr()) });
                let scale = _mm512_mul_ps(scale, _mm512_permutexvar_ps(twice, d));
                for k in 0..4 {
                    let t = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start[k], w[k], qs[k]));
                    let s = _mm512_permutexvar_ps(spread[k], scale);
                    acc[r][v][k % 2] = _mm512_fmadd_ps(t, s, acc[r][v][k % 2]);
                }
            }
        }
    });
    pair_sums(acc)
}
