//! Rates of the prefill products beside the peak of the CPU.
//!
//! `cargo bench -p lacuna-kernels --bench gemm [-- [format=Q4_0,BF16] [m=512] [threads=1,2]
//! [shape=2048x8192] [input-major] [groups]]`, with `LACUNA_ISA` to force an instruction set. On a busy machine a small shape
//! (`shape=128x2048`) has the better chance of an undisturbed run. Every figure is the best of several runs, in GFLOP/s (2 m n k / time);
//! "+pack" includes the packing of the activations.
//!
//! `zeros=50,70` compares matrices without their zeros with the dense ones: in turns, by processor time, the median of the
//! ratios of their rates (below 1: the bitmap is slower) over `reps=15` pairs.

use std::hint::black_box;
use std::time::Instant;

use lacuna_kernels::axpy::groups::{Groups, bytes};
use lacuna_kernels::gemm::{Input, Job, Weights, run};
use lacuna_kernels::{
    Format, Matrix, Pool,
    bitmap::{self, Bitmap},
    convert, isa,
};

/// Outputs and inputs of the linear layers of Llama-3.2-1B.
const SHAPES: [[usize; 2]; 3] = [[8192, 2048], [2048, 8192], [2048, 2048]];
/// Seconds per figure.
const BUDGET: f64 = 0.15;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let list = |name: &str| args.iter().find_map(|a| a.strip_prefix(name)?.strip_prefix('='));
    let numbers = |name: &str, default: &[usize]| match list(name) {
        Some(l) => l.split(',').filter_map(|v| v.parse().ok()).collect(),
        None => default.to_vec(),
    };
    let formats = list("format");
    let chosen = |f: &Format| formats.is_none_or(|l| l.split(',').any(|n| n == f.name()));
    let order = ["input-major", "groups"].into_iter().find(|o| args.iter().any(|a| a == o)).unwrap_or("output-major");
    let shape = list("shape").and_then(|s| s.split_once('x'));
    let shape = shape.and_then(|(n, k)| Some(vec![[n.parse().ok()?, k.parse().ok()?]]));
    let shapes = shape.unwrap_or(SHAPES.to_vec());
    if list("zeros").is_some() {
        for format in bitmap::FORMATS.into_iter().filter(chosen) {
            let (m, reps) = (numbers("m", &[512])[0], numbers("reps", &[15])[0].max(1));
            for &[n, k] in &shapes {
                for zeros in numbers("zeros", &[50]) {
                    numbers("threads", &[1]).into_iter().for_each(|t| compare(format, [m, n, k], zeros, t, reps));
                }
            }
        }
        return;
    }
    println!("{} ({}); best of runs, GFLOP/s", isa::get(), order);
    print_peaks();
    for format in Format::ALL {
        if !chosen(&format) {
            continue;
        }
        for &[n, k] in &shapes {
            let mut stored = random_matrix(format, n * k);
            let w = match order {
                "groups" => {
                    let Some(len) = bytes(format, n, k) else { continue };
                    stored.resize(len, 0);
                    Weights::Groups(Groups::new(format, n, k, &stored).expect("this length"))
                }
                "input-major" => Weights::InputMajor(Matrix::new(format, k, n, &stored).expect("whole blocks")),
                _ => Weights::OutputMajor(Matrix::new(format, n, k, &stored).expect("whole blocks")),
            };
            for &threads in &numbers("threads", &[1, 2]) {
                let pool = Pool::new(threads);
                print!("{:5} {n:5} x {k:5}  {threads} threads:", format.name());
                for &m in &numbers("m", &[1, 4, 16, 64, 512]) {
                    let [rate, with_pack] = measure(&pool, w, m, n, k);
                    print!("  m={m} {rate:.0} (+pack {with_pack:.0})");
                }
                println!();
            }
        }
    }
}

fn random_matrix(format: Format, numbers: usize) -> Vec<u8> {
    // One encoded stretch repeated: the K-quant encoder is slow, and values do not matter for speed.
    let part = 1 << 14;
    let values: Vec<f32> = (0..part).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect();
    let mut bytes = vec![0; format.run_bytes(part).expect("a multiple of every block")];
    convert::encode_run(format, &values, &mut bytes);
    bytes.repeat(numbers / part)
}

/// Seconds of processor time since some fixed moment.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the one structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Products with `zeros` per cent of the weights zero, at places that nothing predicts: dense and without them in turns.
fn compare(format: Format, [m, n, k]: [usize; 3], zeros: usize, threads: usize, reps: usize) {
    let mut state = 1_u64;
    let mut number = || {
        // Bit mixing of splitmix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ z >> 27) as usize
    };
    let values: Vec<f32> = (0..n * k)
        .map(|_| if number() % 100 < zeros { 0.0 } else { (number() % 1000 + 1000) as f32 / 1000.0 })
        .collect();
    let mut stored = vec![0; format.run_bytes(n * k).expect("whole blocks")];
    convert::encode_run(format, &values, &mut stored);
    let dense = Matrix::new(format, n, k, &stored).expect("whole blocks");
    let packed = bitmap::pack(&dense).expect("a format with bitmaps");
    let sparse = Weights::Bitmap(Bitmap::new(format, n, k, &packed).expect("just packed"));
    let pool = Pool::new(threads);
    let x: Vec<f32> = (0..m * k).map(|i| ((i * 31) % 97) as f32 / 97.0 - 0.5).collect();
    let (mut y, mut input, mut ratios) = (vec![0.0; m * n], Input::new(), Vec::new());
    input.prepare(&pool, &x, m, k, &[format]);
    for _ in 0..=reps {
        let [a, b] = [Weights::OutputMajor(dense), sparse].map(|w| {
            let start = cpu_seconds();
            run(&pool, &mut [Job { w, x: &input, y: &mut y, accumulate: false }]);
            cpu_seconds() - start
        });
        ratios.push(a / b);
    }
    // The first pair warms up.
    ratios.remove(0);
    ratios.sort_by(f64::total_cmp);
    println!(
        "{:5} {n:5} x {k:5}  m={m}  {threads} threads  {zeros} % zeros: {:.2} ({:.2}-{:.2}) of dense",
        format.name(),
        ratios[reps / 2],
        ratios[0],
        ratios[reps - 1]
    );
}

fn measure(pool: &Pool, w: Weights<'_>, m: usize, n: usize, k: usize) -> [f64; 2] {
    let x: Vec<f32> = (0..m * k).map(|i| ((i * 31) % 97) as f32 / 97.0 - 0.5).collect();
    let mut y = vec![0.0; m * n];
    let mut input = Input::new();
    let (mut best, mut best_pack) = (f64::MAX, f64::MAX);
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < 3 || start.elapsed().as_secs_f64() < BUDGET {
        let a = Instant::now();
        input.prepare(pool, &x, m, k, &[w.format()]);
        let b = Instant::now();
        run(pool, &mut [Job { w, x: &input, y: &mut y, accumulate: false }]);
        best = best.min(b.elapsed().as_secs_f64());
        best_pack = best_pack.min(a.elapsed().as_secs_f64());
        rounds += 1;
    }
    black_box(&y);
    [best, best_pack].map(|t| 2e-9 * (m * n * k) as f64 / t)
}

#[cfg(target_arch = "x86_64")]
fn print_peaks() {
    let best = |f: &dyn Fn() -> f64| (0..20).map(|_| f()).fold(0f64, f64::max);
    // SAFETY (all four): the instruction set contains the instructions of the loop.
    match isa::get() {
        lacuna_kernels::Isa::Avx2 => println!("peak of one core: f32 {:.0}", best(&|| unsafe { peak::avx2() })),
        lacuna_kernels::Isa::Avx512 | lacuna_kernels::Isa::Amx => {
            let f32s = best(&|| unsafe { peak::avx512() });
            let bf16 = best(&|| unsafe { peak::avx512_bf16() });
            let int8 = best(&|| unsafe { peak::avx512_vnni() });
            print!("peak of one core: f32 {f32s:.0}, BF16 dot {bf16:.0}, int8 dot {int8:.0}");
            if isa::get() == lacuna_kernels::Isa::Amx {
                print!(", BF16 tiles {:.0}", best(&|| unsafe { peak::amx() }));
            }
            println!();
        }
        _ => {}
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn print_peaks() {}

/// Loops of independent multiply-adds in registers; each returns GFLOP/s.
#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::asm;
    use std::time::Instant;

    const ROUNDS: u64 = 40_000;

    /// Times `ROUNDS` repetitions of 16 instructions on independent accumulators (AMX: 4).
    macro_rules! timed {
        ($flops:expr, $($line:expr,)*; $($clobber:tt)*) => {{
            let start = Instant::now();
            // SAFETY: registers only, all declared.
            unsafe { asm!("2:", $($line,)* "dec {n}", "jnz 2b", n = inout(reg) ROUNDS => _, $($clobber)*) };
            (ROUNDS * $flops) as f64 / start.elapsed().as_secs_f64() * 1e-9
        }};
    }

    macro_rules! sixteen {
        ($flops:expr, $op:literal, $width:literal) => {
            timed!(
                16 * $flops,
                concat!($op, " ", $width, "0, ", $width, "0, ", $width, "0"),
                concat!($op, " ", $width, "1, ", $width, "1, ", $width, "1"),
                concat!($op, " ", $width, "2, ", $width, "2, ", $width, "2"),
                concat!($op, " ", $width, "3, ", $width, "3, ", $width, "3"),
                concat!($op, " ", $width, "4, ", $width, "4, ", $width, "4"),
                concat!($op, " ", $width, "5, ", $width, "5, ", $width, "5"),
                concat!($op, " ", $width, "6, ", $width, "6, ", $width, "6"),
                concat!($op, " ", $width, "7, ", $width, "7, ", $width, "7"),
                concat!($op, " ", $width, "8, ", $width, "8, ", $width, "8"),
                concat!($op, " ", $width, "9, ", $width, "9, ", $width, "9"),
                concat!($op, " ", $width, "10, ", $width, "10, ", $width, "10"),
                concat!($op, " ", $width, "11, ", $width, "11, ", $width, "11"),
                concat!($op, " ", $width, "12, ", $width, "12, ", $width, "12"),
                concat!($op, " ", $width, "13, ", $width, "13, ", $width, "13"),
                concat!($op, " ", $width, "14, ", $width, "14, ", $width, "14"),
                concat!($op, " ", $width, "15, ", $width, "15, ", $width, "15"),;
                inout("xmm0") 0f32 => _, inout("xmm1") 0f32 => _, inout("xmm2") 0f32 => _, inout("xmm3") 0f32 => _,
                inout("xmm4") 0f32 => _, inout("xmm5") 0f32 => _, inout("xmm6") 0f32 => _, inout("xmm7") 0f32 => _,
                inout("xmm8") 0f32 => _, inout("xmm9") 0f32 => _, inout("xmm10") 0f32 => _, inout("xmm11") 0f32 => _,
                inout("xmm12") 0f32 => _, inout("xmm13") 0f32 => _, inout("xmm14") 0f32 => _, inout("xmm15") 0f32 => _,
            )
        };
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2() -> f64 {
        sixteen!(16, "vfmadd231ps", "ymm")
    }

    #[target_feature(enable = "avx512f")]
    pub fn avx512() -> f64 {
        sixteen!(32, "vfmadd231ps", "zmm")
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn avx512_bf16() -> f64 {
        sixteen!(64, "vdpbf16ps", "zmm")
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn avx512_vnni() -> f64 {
        sixteen!(128, "vpdpbusd", "zmm")
    }

    #[repr(align(64))]
    struct Config([u8; 64]);

    /// # Safety
    /// The CPU has AMX and the process may use it.
    pub unsafe fn amx() -> f64 {
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            (config.0[16 + 2 * tile], config.0[48 + tile]) = (64, 16);
        }
        // SAFETY: a valid configuration; released below.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr()) };
        let rate = timed!(
            4 * 16 * 16 * 64,
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",;
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
        );
        // SAFETY: nothing is live in the tiles.
        unsafe { asm!("tilerelease") };
        rate
    }
}
