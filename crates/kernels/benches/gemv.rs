//! Decode products against the plain read rate, on weights far larger than the caches.
//!
//! `cargo bench -p lacuna-kernels --bench gemv -- [key=value ...]` with `threads=1,2`, `isa=avx512,...` (default: the
//! one in use), `format=Q4_0,...` (default: all), `mb=512` (bytes of weights), `cols=4096`, `reps=7`,
//! `what=gemv,axpy,groups,rows,multi8` (`groups`: block formats as columns with their own scales, in matrices of 8192 inputs;
//! `multiN`: N vectors at once), `clock=cpu` (bytes per second of processor time instead of wall time: what one core does on a
//! machine that others use too). Products and probe are interleaved; each line gives the median rate in GB/s, the best, and the
//! median of the ratio to the probe pass that ran just before.

use lacuna_kernels::{
    Format, Isa, Matrix, Pool,
    axpy::{self, Columns, groups},
    gemv, isa, probe,
};
use std::collections::HashMap;
use std::time::Instant;

/// Seconds since some fixed moment, by the clock in use.
type Clock = fn() -> f64;

fn wall_clock() -> f64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

fn cpu_clock() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the one structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn main() {
    let args: HashMap<String, String> =
        std::env::args().filter_map(|a| a.split_once('=').map(|(k, v)| (k.to_string(), v.to_string()))).collect();
    let get = |key: &str, default: &str| args.get(key).cloned().unwrap_or_else(|| default.to_string());
    let number = |key: &str, default: &str| get(key, default).parse::<usize>().expect("a number");
    let isas: Vec<Isa> = match args.get("isa") {
        Some(list) => list.split(',').map(|w| named(Isa::ALL, Isa::name, w)).collect(),
        None => vec![isa::get()],
    };
    let formats: Vec<Format> = match args.get("format") {
        Some(list) => list.split(',').map(|w| named(Format::ALL, Format::name, w)).collect(),
        None => Format::ALL.to_vec(),
    };
    let (bytes, cols, reps) = (number("mb", "512") << 20, number("cols", "4096"), number("reps", "7"));
    let probe = probe::StreamProbe::new(bytes);
    let clock: Clock = if get("clock", "wall") == "cpu" { cpu_clock } else { wall_clock };
    let what = get("what", "gemv,axpy");
    println!("what  format isa     threads  kept   GB/s  best  of-probe  probe-GB/s");
    for format in formats {
        let bench = Bench::new(format, bytes, cols);
        for &isa in &isas {
            for threads in get("threads", "1,2").split(',') {
                let pool = Pool::new(threads.parse().expect("a number of threads"));
                for what in what.split(',') {
                    let dense = what == "gemv" || what.starts_with("multi");
                    let shares: &[f64] = if dense { &[1.0] } else { &[1.0, 0.5, 0.1] };
                    for &kept in shares {
                        bench.report(what, kept, isa, &pool, &probe, reps, clock);
                    }
                }
            }
        }
    }
}

fn named<T: Copy>(all: impl IntoIterator<Item = T>, name: fn(T) -> &'static str, word: &str) -> T {
    all.into_iter().find(|&t| name(t).eq_ignore_ascii_case(word)).unwrap_or_else(|| panic!("unknown: {word}"))
}

struct Bench {
    format: Format,
    rows: usize,
    cols: usize,
    data: Vec<u8>,
    x: gemv::Operand,
    /// More of them, each with its own memory.
    others: Vec<gemv::Operand>,
}

/// Channels of a matrix of `groups`.
const INPUTS: usize = 8192;
/// Most vectors of `multiN`.
const VECTORS: usize = 16;

impl Bench {
    fn new(format: Format, bytes: usize, cols: usize) -> Self {
        let row = format.run_bytes(cols).expect("whole blocks");
        let rows = bytes / row;
        // Any bytes do for speed, but no subnormal or infinite scales: 0x2c2c is 0.065 as f16, 0x2c2c2c2c 2e-12 as f32.
        let data = vec![0x2c; rows * row];
        let values: Vec<f32> = (0..cols).map(|i| (i % 17) as f32 - 8.0).collect();
        let operand = || {
            let mut x = gemv::Operand::new();
            x.prepare(&values, &[format]);
            x
        };
        Self { format, rows, cols, data, x: operand(), others: (0..VECTORS).map(|_| operand()).collect() }
    }

    fn report(
        &self,
        what: &str,
        kept: f64,
        isa: Isa,
        pool: &Pool,
        probe: &probe::StreamProbe,
        reps: usize,
        clock: Clock,
    ) {
        let w = Matrix::new(self.format, self.rows, self.cols, &self.data).expect("sizes fit");
        let index: Vec<u32> = (0..self.rows as u32).filter(|&i| keep(i, kept)).collect();
        let value = vec![0.5; index.len()];
        let inputs = INPUTS.min(self.rows / 32 * 32);
        let part: Vec<u32> = index.iter().copied().take_while(|i| (*i as usize) < inputs).collect();
        let columns: Vec<groups::Groups> = match groups::bytes(self.format, self.cols, inputs) {
            // On whole lines, as mapped layouts are.
            Some(len) => self.data[self.data.as_ptr().align_offset(64)..]
                .chunks_exact(len)
                .filter_map(|d| groups::Groups::new(self.format, self.cols, inputs, d))
                .collect(),
            None => Vec::new(),
        };
        let vectors = what.strip_prefix("multi").map_or(1, |n| n.parse().expect("a number of vectors"));
        let xs: Vec<&gemv::Operand> = self.others.iter().take(vectors).collect();
        let mut y = vec![0.0; (self.rows * vectors).max(self.cols * columns.len().max(1))];
        let bytes = match what {
            "groups" => columns.iter().map(|w| w.bytes_of(&part)).sum::<usize>() as f64,
            _ => (index.len() * w.row_bytes()) as f64,
        };
        let (mut rates, mut ratios, mut reads) = (Vec::new(), Vec::new(), Vec::new());
        for rep in 0..=reps {
            let start = clock();
            probe.read(pool);
            let read = probe.bytes() as f64 / (clock() - start);
            let start = clock();
            match what {
                "gemv" => gemv::run_on(isa, pool, &mut [gemv::Job { w, x: &self.x, y: &mut y[..self.rows] }]),
                "rows" => {
                    let y = &mut y[..index.len()];
                    gemv::run_rows_on(isa, pool, &mut [gemv::RowsJob { w, rows: &index, x: &self.x, y }]);
                }
                "axpy" => {
                    let y = &mut y[..self.cols];
                    axpy::run_on(isa, pool, &mut [axpy::Job { w: w.into(), index: &index, value: &value, y }]);
                }
                "groups" => {
                    let jobs = columns.iter().zip(y.chunks_exact_mut(self.cols));
                    let mut jobs: Vec<_> = jobs
                        .map(|(w, y)| axpy::Job {
                            w: Columns::Groups(*w),
                            index: &part,
                            value: &value[..part.len()],
                            y,
                        })
                        .collect();
                    axpy::run_on(isa, pool, &mut jobs);
                }
                what if what.starts_with("multi") => {
                    let y = &mut y[..self.rows * xs.len()];
                    gemv::multi::run_on(isa, pool, &mut [gemv::multi::Job { w, x: &xs, y }]);
                }
                other => panic!("unknown: what={other}"),
            }
            let rate = bytes / (clock() - start);
            if rep > 0 {
                rates.push(rate / 1e9);
                ratios.push(rate / read);
                reads.push(read / 1e9);
            }
        }
        let (best, threads, name) = (rates.iter().copied().fold(0.0, f64::max), pool.threads(), self.format.name());
        let (rate, ratio, read) = (median(rates), median(ratios), median(reads));
        println!("{what:5} {name:6} {isa:7} {threads:7}  {kept:4.2}  {rate:5.1} {best:5.1}  {ratio:8.2}  {read:10.1}");
    }
}

/// A scattered choice of about the given share of rows.
fn keep(i: u32, share: f64) -> bool {
    f64::from(i.wrapping_mul(0x9e37_79b1) >> 8) < share * f64::from(1 << 24)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
