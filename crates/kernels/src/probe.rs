//! What this machine can do at best: the rate of a plain streaming read and of multiply-adds.

use crate::{Isa, Pool, isa};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bytes of one claim of the reading test.
const CLAIM: usize = 256 << 10;

/// Memory that [`StreamProbe::read`] reads, kept between measurements so that probes can be interleaved with the work
/// they are compared with.
pub struct StreamProbe {
    data: Vec<u64>,
}

impl StreamProbe {
    /// A buffer of about `bytes` bytes (at least one claim). Use a multiple of the last cache level; 1 GiB is usual.
    pub fn new(bytes: usize) -> Self {
        // Pages of zeros would all be the same page of memory until they are written.
        let words = bytes.div_ceil(CLAIM).max(1) * (CLAIM / 8);
        Self { data: (0..words as u64).collect() }
    }

    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        self.data.len() * 8
    }

    /// Reads the whole buffer once with all threads of the pool; returns bytes per second.
    pub fn read(&self, pool: &Pool) -> f64 {
        let sink = AtomicU64::new(0);
        let chunks: Vec<&[u64]> = self.data.chunks_exact(CLAIM / 8).collect();
        let isa = isa::get();
        let start = Instant::now();
        pool.run(chunks.len(), &|_, i| {
            sink.fetch_xor(xor(isa, chunks[i]), Relaxed);
        });
        let seconds = start.elapsed().as_secs_f64();
        black_box(sink.into_inner());
        (chunks.len() * CLAIM) as f64 / seconds
    }
}

/// Streaming read bandwidth in bytes per second: median of `passes` passes (at least one) over `bytes` bytes.
pub fn stream_read(pool: &Pool, bytes: usize, passes: usize) -> f64 {
    let probe = StreamProbe::new(bytes);
    let mut rates: Vec<f64> = (0..passes.max(1)).map(|_| probe.read(pool)).collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn xor(isa: Isa, words: &[u64]) -> u64 {
    match isa {
        // SAFETY: `isa::get` names only instruction sets that the CPU has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { xor_avx512(words) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { xor_avx2(words) },
        _ => xor_body::<8>(words),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn xor_avx512(words: &[u64]) -> u64 {
    xor_body::<32>(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn xor_avx2(words: &[u64]) -> u64 {
    xor_body::<16>(words)
}

/// Reads four stretches of the claim side by side, as kernels read several rows: hardware prefetchers work per page,
/// so one stretch alone does not reach the full rate of a core.
#[inline(always)]
fn xor_body<const N: usize>(words: &[u64]) -> u64 {
    let (stretches, rest) = words.split_at(words.len() / (4 * N) * (4 * N));
    let mut acc = [[0; N]; 4];
    let quarter = stretches.len() / 4;
    for at in (0..quarter).step_by(N) {
        for (k, acc) in acc.iter_mut().enumerate() {
            let words = &stretches[k * quarter + at..][..N];
            #[cfg(target_arch = "x86_64")]
            for byte in (0..N * 8).step_by(64) {
                crate::x86::prefetch(words.as_ptr().cast::<u8>().wrapping_add(2048 + byte));
            }
            for (a, w) in acc.iter_mut().zip(words) {
                *a ^= w;
            }
        }
    }
    acc.iter().flatten().chain(rest).fold(0, |a, b| a ^ b)
}

/// Peak rate of f32 multiply-adds in operations per second (a multiply-add counts as two), measured for `time`.
pub fn peak_fma(pool: &Pool, time: Duration) -> f64 {
    /// Multiply-adds of one claim, per lane and chain.
    const ROUNDS: usize = 20_000;
    let isa = isa::get();
    let chunks = pool.threads() * 8;
    let (mut best, start) = (0.0_f64, Instant::now());
    while best == 0.0 || start.elapsed() < time {
        let operations = AtomicU64::new(0);
        let begin = Instant::now();
        pool.run(chunks, &|_, _| {
            operations.fetch_add(multiply_add(isa, ROUNDS), Relaxed);
        });
        best = best.max(operations.into_inner() as f64 / begin.elapsed().as_secs_f64());
    }
    best
}

/// Independent chains of multiply-adds: enough to cover their latency on every port, few enough for the registers.
const CHAINS: usize = 12;

/// Runs `rounds` rounds of [`CHAINS`] independent multiply-adds; returns the number of operations.
fn multiply_add(isa: Isa, rounds: usize) -> u64 {
    let lanes = match isa {
        // SAFETY: `isa::get` names only instruction sets that the CPU has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { chains_avx512(rounds) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { chains_avx2(rounds) },
        _ => chains_plain(rounds),
    };
    (2 * rounds * CHAINS * lanes) as u64
}

/// One function per width: the chains stay in registers only if the compiler sees one vector per chain.
#[cfg(target_arch = "x86_64")]
macro_rules! chains {
    ($name:ident, $features:literal, $lanes:literal, $set:ident, $fma:ident) => {
        #[target_feature(enable = $features)]
        fn $name(rounds: usize) -> usize {
            use std::arch::x86_64::*;
            let (factor, term) = ($set(black_box(0.999)), $set(black_box(0.001)));
            let mut acc = [$set(1.0); CHAINS];
            for _ in 0..rounds {
                for v in &mut acc {
                    *v = $fma(*v, factor, term);
                }
            }
            black_box(acc);
            $lanes
        }
    };
}

#[cfg(target_arch = "x86_64")]
chains!(chains_avx512, "avx512f", 16, _mm512_set1_ps, _mm512_fmadd_ps);
#[cfg(target_arch = "x86_64")]
chains!(chains_avx2, "avx2,fma", 8, _mm256_set1_ps, _mm256_fmadd_ps);

/// What the compiler makes of plain code on its own.
fn chains_plain(rounds: usize) -> usize {
    const LANES: usize = 4;
    let (factor, term) = (black_box(0.999_f32), black_box(0.001_f32));
    let mut acc = [[1.0_f32; LANES]; CHAINS];
    for _ in 0..rounds {
        for v in acc.as_flattened_mut() {
            *v = *v * factor + term;
        }
    }
    black_box(acc);
    LANES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_plausible() {
        let pool = Pool::new(1);
        let read = stream_read(&pool, 8 << 20, 3);
        assert!((1e8..1e13).contains(&read), "{read} bytes/s");
        let peak = peak_fma(&pool, Duration::from_millis(20));
        assert!((1e8..1e13).contains(&peak), "{peak} operations/s");
    }

    #[test]
    fn every_isa_sums_the_same() {
        let words: Vec<u64> = (0..4096u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        let expected = words.iter().fold(0, |a, b| a ^ b);
        for isa in isa::available() {
            assert_eq!(xor(isa, &words), expected);
        }
    }
}
