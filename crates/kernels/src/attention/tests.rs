//! All kernels against the scalar twin, over a grid of odd shapes.

use super::*;
use crate::isa;

/// A cache with pseudo-random content; slots beyond `len` hold NaN, as memory that was used before may.
struct Fixture {
    spec: Spec,
    ty: KvType,
    page_len: usize,
    pages: Vec<PageBuf>,
    q: Vec<f32>,
    len: usize,
}

/// Numbers in [-1, 1), the same on every machine.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

impl Fixture {
    fn new(spec: Spec, ty: KvType, page_len: usize, len: usize) -> Self {
        let mut next = noise(len as u64 + 7 * spec.head_dim as u64);
        let shape = KvShape { kv_heads: spec.kv_heads, head_dim: spec.head_dim, page_len };
        let bytes = page_bytes(ty, shape).unwrap();
        let mut pages = vec![PageBuf::zeroed(bytes); len.div_ceil(page_len)];
        pages.iter_mut().for_each(|page| page.fill(0xff));
        let width = spec.kv_heads * spec.head_dim;
        for j in 0..len {
            let k: Vec<f32> = (0..width).map(|_| 2.0 * next()).collect();
            let v: Vec<f32> = (0..width).map(|_| next()).collect();
            write(ty, shape, &mut pages[j / page_len], j % page_len, &k, &v);
        }
        let q = (0..len * spec.heads * spec.head_dim).map(|_| 2.0 * next()).collect();
        Self { spec, ty, page_len, pages, q, len }
    }

    /// Queries at `start..end`.
    fn prefill(&self, isa: Isa, threads: usize, start: usize, end: usize) -> Vec<f32> {
        let pages: Vec<&[u8]> = self.pages.iter().map(|page| &page[..]).collect();
        let cache = Cache { ty: self.ty, page_len: self.page_len, pages: &pages };
        let width = self.spec.heads * self.spec.head_dim;
        let q = &self.q[start * width..end * width];
        let mut out = vec![f32::NAN; q.len()];
        let pool = Pool::new(threads);
        let job = Job { pool: &pool, spec: &self.spec, cache: &cache, start, q };
        prefill_with(isa, &job, &mut out, &mut Scratch::default());
        out
    }

    /// The query at `len - 1`.
    fn decode(&self, isa: Isa, threads: usize, len: usize) -> Vec<f32> {
        // Pages that the query does not see are taken away.
        let gone = self.spec.first_visible(len - 1) / self.page_len;
        let page = |(i, page): (usize, &'_ PageBuf)| if i < gone { PageBuf::default() } else { page.clone() };
        let pages: Vec<PageBuf> = self.pages.iter().enumerate().map(page).collect();
        let pages: Vec<&[u8]> = pages.iter().map(|page| &page[..]).collect();
        let cache = Cache { ty: self.ty, page_len: self.page_len, pages: &pages };
        let width = self.spec.heads * self.spec.head_dim;
        let q = &self.q[(len - 1) * width..len * width];
        let mut out = vec![f32::NAN; width];
        let pool = Pool::new(threads);
        let job = Job { pool: &pool, spec: &self.spec, cache: &cache, start: len - 1, q };
        decode_with(isa, &job, &mut out, &mut Scratch::default());
        out
    }
}

fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> Spec {
    Spec { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window: None, cap: None }
}

/// (specification, page length, positions): group sizes 1, 2, 3, 4, 7, 8; partial last pages; windows; caps.
fn grid() -> Vec<(Spec, usize, usize)> {
    vec![
        (spec(1, 1, 8), 16, 1),
        (spec(4, 2, 40), 64, 67),
        (spec(6, 2, 80), 48, 150),
        (spec(8, 2, 64), 64, 300),
        (spec(7, 1, 32), 64, 261),
        (spec(8, 1, 128), 64, 150),
        (spec(3, 3, 96), 32, 130),
        (spec(2, 1, 256), 64, 97),
        (spec(5, 1, 7), 16, 70),
        (spec(2, 2, 112), 128, 200),
        (Spec { window: Some(1), ..spec(4, 2, 64) }, 64, 140),
        (Spec { window: Some(33), ..spec(4, 4, 64) }, 32, 330),
        (Spec { window: Some(300), ..spec(6, 2, 32) }, 64, 560),
        (Spec { window: Some(5), cap: Some(2.0), ..spec(4, 2, 64) }, 64, 99),
        (Spec { cap: Some(5.0), scale: 0.3, ..spec(4, 2, 128) }, 64, 270),
    ]
}

/// Largest difference allowed to the twin, for values in [-1, 1].
///
/// f32: scores up to some 20 carry 1e-6, and so do their exponentials. bf16: queries, weights and (from f16) keys and
/// values are rounded to 8 bits (relative 2^-9 each); the score error of some `2^-8 |q||k| / sqrt(3 d)` scales the
/// weights by at most some per cent, and the errors of many values average out.
fn bound(isa: Isa, ty: KvType, decode: bool) -> f32 {
    if decode || !isa.has_avx512() || ty == KvType::F32 { 2e-5 } else { 2.5e-2 }
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN counts as infinitely far.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, x| {
        if x <= m {
            m
        } else if x.is_nan() {
            f32::MAX
        } else {
            x
        }
    })
}

fn fast() -> Vec<Isa> {
    isa::available().into_iter().filter(|&isa| isa != Isa::Scalar).collect()
}

#[test]
fn decode_matches_the_twin_on_any_number_of_threads() {
    for (spec, page_len, len) in grid() {
        for ty in KvType::ALL {
            let f = Fixture::new(spec, ty, page_len, len);
            for len in [1, len / 2 + 1, len] {
                let plain = f.decode(Isa::Scalar, 1, len);
                for isa in fast() {
                    let one = f.decode(isa, 1, len);
                    let error = distance(&one, &plain);
                    assert!(error <= bound(isa, ty, true), "{isa} {ty:?} {spec:?} {len}: {error}");
                    assert_eq!(one, f.decode(isa, 3, len), "{isa} {ty:?} {spec:?} {len}");
                }
            }
        }
    }
}

#[test]
fn prefill_matches_the_twin_on_any_number_of_threads() {
    for (spec, page_len, len) in grid() {
        for ty in KvType::ALL {
            let f = Fixture::new(spec, ty, page_len, len);
            let plain = f.prefill(Isa::Scalar, 1, 0, len);
            for isa in fast() {
                let one = f.prefill(isa, 1, 0, len);
                let error = distance(&one, &plain);
                assert!(error <= bound(isa, ty, false), "{isa} {ty:?} {spec:?}: {error}");
                // The error of a whole result is much smaller than the worst number's.
                let squares: f32 = one.iter().zip(&plain).map(|(a, b)| (a - b) * (a - b)).sum();
                assert!((squares / one.len() as f32).sqrt() <= bound(isa, ty, false) / 8.0, "{isa} {ty:?} {spec:?}");
                assert_eq!(one, f.prefill(isa, 2, 0, len), "{isa} {ty:?} {spec:?}");
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_computed_with_it() {
    for (spec, page_len, len) in grid() {
        for ty in KvType::ALL {
            let f = Fixture::new(spec, ty, page_len, len);
            let width = spec.heads * spec.head_dim;
            for isa in fast() {
                let whole = f.prefill(isa, 1, 0, len);
                for (start, end) in [(len / 3, len), (len / 2, len / 2 + 1), (len - 1, len)] {
                    let part = f.prefill(isa, 1, start, end);
                    assert_eq!(part, whole[start * width..end * width], "{isa} {ty:?} {spec:?} {start}..{end}");
                }
            }
        }
    }
}

#[test]
fn decode_agrees_with_the_last_row_of_prefill() {
    for (spec, page_len, len) in grid() {
        for ty in KvType::ALL {
            let f = Fixture::new(spec, ty, page_len, len);
            for isa in fast() {
                let error = distance(&f.decode(isa, 1, len), &f.prefill(isa, 1, len - 1, len));
                assert!(error <= 2.0 * bound(isa, ty, false), "{isa} {ty:?} {spec:?}: {error}");
            }
        }
    }
}

#[test]
fn a_window_over_everything_is_no_window() {
    for isa in isa::available() {
        for ty in KvType::ALL {
            let open = Fixture::new(spec(4, 2, 64), ty, 64, 150);
            let wide = Fixture::new(Spec { window: Some(150), ..open.spec }, ty, 64, 150);
            assert_eq!(open.prefill(isa, 1, 0, 150), wide.prefill(isa, 1, 0, 150));
            assert_eq!(open.decode(isa, 1, open.len), wide.decode(isa, 1, wide.len));
        }
    }
}

#[test]
fn nan_in_a_key_reaches_the_rows_that_see_it_and_no_other() {
    for isa in isa::available() {
        for ty in KvType::ALL {
            let mut f = Fixture::new(spec(2, 1, 64), ty, 64, 100);
            let shape = KvShape { kv_heads: 1, head_dim: 64, page_len: 64 };
            write(ty, shape, &mut f.pages[0], 50, &[f32::NAN; 64], &[0.5; 64]);
            let out = f.prefill(isa, 1, 0, 100);
            assert!(out[..50 * 128].iter().all(|x| x.is_finite()), "{isa} {ty:?}");
            assert!(out[50 * 128..].iter().all(|x| x.is_nan()), "{isa} {ty:?}");
            assert!(f.decode(isa, 1, 100).iter().all(|x| x.is_nan()), "{isa} {ty:?}");
            assert!(f.decode(isa, 1, 50).iter().all(|x| x.is_finite()), "{isa} {ty:?}");
        }
    }
}
