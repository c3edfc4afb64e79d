//! Speed of attention: decode in GB/s of keys and values, prefill in GFLOP/s (the causal half counted).
//!
//! `cargo bench -p lacuna-kernels --bench attention -- [decode|prefill|long] [threads ...]`; `LACUNA_ISA` picks the
//! instruction set, `LACUNA_KV=f32|f16|bf16` one type of pages. The best of several repetitions is printed, beside a
//! plain read of the same bytes (sum of 64-bit words) for decode.

use std::hint::black_box;
use std::time::Instant;

use lacuna_kernels::attention::{
    Cache, KvShape, KvType, PAGE_LEN, PageBuf, Scratch, Spec, decode, page_bytes, prefill, write,
};
use lacuna_kernels::{Pool, isa};

/// Pages of `len` positions with pseudo-random content, in one allocation.
struct Pages {
    ty: KvType,
    bytes: PageBuf,
    page: usize,
}

impl Pages {
    fn new(spec: &Spec, ty: KvType, len: usize) -> Self {
        let shape = KvShape { kv_heads: spec.kv_heads, head_dim: spec.head_dim, page_len: PAGE_LEN };
        let page = page_bytes(ty, shape).expect("a sound shape");
        let mut bytes = PageBuf::zeroed(page * len.div_ceil(PAGE_LEN));
        let width = spec.kv_heads * spec.head_dim;
        let noise: Vec<f32> = (0..4 * width + 977).map(|i| (i as f32 * 12.9898).sin()).collect();
        for (i, page) in bytes.chunks_exact_mut(page).enumerate() {
            for slot in 0..PAGE_LEN {
                let at = (i * PAGE_LEN + slot) * 31 % 977;
                write(ty, shape, page, slot, &noise[at..at + width], &noise[2 * width + at..3 * width + at]);
            }
        }
        Self { ty, bytes, page }
    }

    fn list(&self) -> Vec<&[u8]> {
        self.bytes.chunks_exact(self.page).collect()
    }
}

/// Processor time of this process, in seconds.
fn cpu_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// The shortest of several runs of `f`, in seconds: at least three, for about a second. With one thread this is
/// processor time, which other processes on the machine disturb less than the clock on the wall.
fn best(pool: &Pool, mut f: impl FnMut()) -> f64 {
    let origin = Instant::now();
    let now = || if pool.threads() == 1 { cpu_time() } else { origin.elapsed().as_secs_f64() };
    let (mut best, mut runs) = (f64::MAX, 0);
    while runs < 3 || (origin.elapsed().as_secs_f64() < 1.0 && runs < 200) {
        let start = now();
        f();
        best = best.min(now() - start);
        runs += 1;
    }
    best
}

/// Reads all bytes on the pool.
fn read_all(pool: &Pool, bytes: &[u8]) {
    let chunks: Vec<&[u8]> = bytes.chunks(1 << 18).collect();
    pool.run(chunks.len(), &|_, chunk| {
        let words = chunks[chunk].chunks_exact(64).map(|line| {
            let word = |i: usize| u64::from_le_bytes(line[8 * i..8 * i + 8].try_into().expect("8 bytes"));
            (0..8).fold(0, |sum, i| sum ^ word(i))
        });
        black_box(words.fold(0, |a, b| a ^ b));
    });
}

fn bench_decode(name: &str, spec: &Spec, ty: KvType, len: usize, pool: &Pool) {
    // Several layers, so that small caches do not make the memory look fast.
    let each = Pages::new(spec, ty, len);
    let layers = ((1usize << 28) / each.bytes.len()).clamp(1, 16);
    let layers: Vec<Pages> =
        (0..layers).map(|_| Pages { ty: each.ty, bytes: each.bytes.clone(), page: each.page }).collect();
    let lists: Vec<_> = layers.iter().map(Pages::list).collect();
    let width = spec.heads * spec.head_dim;
    let q: Vec<f32> = (0..width).map(|i| (i as f32).cos()).collect();
    let (mut out, mut scratch) = (vec![0.0; width], Scratch::default());
    let seconds = best(pool, || {
        for list in &lists {
            let cache = Cache { ty, page_len: PAGE_LEN, pages: list };
            decode(pool, spec, &cache, len, &q, &mut out, &mut scratch);
        }
        black_box(&out);
    });
    let plain = best(pool, || layers.iter().for_each(|layer| read_all(pool, &layer.bytes)));
    let bytes = (layers.len() * each.bytes.len()) as f64;
    println!(
        "decode  {} {name:10} {ty:?} depth {len:6} threads {}: {:6.1} GB/s, plain read {:6.1} GB/s, {:7.3} ms a layer",
        isa::get(),
        pool.threads(),
        bytes / seconds / 1e9,
        bytes / plain / 1e9,
        seconds / layers.len() as f64 * 1e3,
    );
}

fn bench_prefill(name: &str, spec: &Spec, ty: KvType, n: usize, pool: &Pool) {
    let pages = Pages::new(spec, ty, n);
    let list = pages.list();
    let width = spec.heads * spec.head_dim;
    let q: Vec<f32> = (0..n * width).map(|i| (i as f32 * 0.618).sin()).collect();
    let (mut out, mut scratch) = (vec![0.0; n * width], Scratch::default());
    let cache = Cache { ty, page_len: PAGE_LEN, pages: &list };
    let seconds = best(pool, || prefill(pool, spec, &cache, 0, &q, &mut out, &mut scratch));
    black_box(&out);
    let flops = 2.0 * (n * n) as f64 * (spec.heads * spec.head_dim) as f64;
    println!(
        "prefill {} {name:10} {ty:?} n {n:6} threads {}: {:7.0} GFLOP/s, {:8.2} ms",
        isa::get(),
        pool.threads(),
        flops / seconds / 1e9,
        seconds * 1e3,
    );
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let numbers: Vec<usize> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let threads = if numbers.is_empty() { vec![1, 2] } else { numbers };
    let named = |word: &str| args.iter().any(|arg| arg == word);
    let any = args.iter().any(|arg| arg.parse::<usize>().is_err());
    let only = std::env::var("LACUNA_KV").ok();
    let shape = |heads, kv_heads, head_dim: usize| Spec {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        cap: None,
    };
    let shapes = [("llama-1b", shape(32, 8, 64)), ("8 x 128", shape(8, 8, 128))];
    for threads in threads {
        let pool = Pool::new(threads);
        for (name, spec) in &shapes {
            let types = KvType::ALL.into_iter().rev();
            for ty in types.filter(|ty| only.as_ref().is_none_or(|o| format!("{ty:?}").eq_ignore_ascii_case(o))) {
                if !any || named("decode") {
                    [4096, 32768].into_iter().for_each(|len| bench_decode(name, spec, ty, len, &pool));
                }
                if !any || named("prefill") {
                    [512, 4096].into_iter().for_each(|n| bench_prefill(name, spec, ty, n, &pool));
                }
                if !any || named("long") {
                    bench_prefill(name, spec, ty, 16384, &pool);
                }
            }
        }
    }
}
