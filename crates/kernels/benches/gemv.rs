//! Decode products against the plain read rate, on weights far larger than the caches.
//!
//! `cargo bench -p lacuna-kernels --bench gemv -- [key=value ...]` with `threads=1,2`, `isa=avx512,...` (default: the
//! one in use), `format=Q4_0,...` (default: all), `mb=512` (bytes of weights), `cols=4096`, `reps=7`,
//! `what=gemv,axpy,groups,rows,multi8` (`groups`: block formats as columns with their own scales, in matrices of 8192 inputs;
//! `multiN`: N vectors at once), `clock=cpu` (bytes per second of processor time instead of wall time: what one core does on a
//! machine that others use too). Products and probe are interleaved; each line gives the median rate in GB/s, the best, and the
//! median of the ratio to the probe pass that ran just before.
//!
//! `what=codebook` compares matrices in codes of pairs of 2, 3 and 4 bits with the dense formats: products in turns, the
//! ratio of times (above 1: the codebook is faster), and both in weights per nanosecond.
//!
//! `what=bitmap zeros=50,60,70,80` compares matrices without their zeros with the dense ones of the same format: dense and
//! packed products in turns, the ratio of their times (median), the ratio of their bytes, and the first over the second.

use lacuna_kernels::{
    Format, Isa, Matrix, Pool,
    axpy::{self, Columns, groups},
    bitmap::{self, Bitmap},
    codebook::{self, Codebook},
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
    if what == "bitmap" {
        let zeros = get("zeros", "50,60,70,80");
        println!("format isa     threads  zeros  dense-GB/s  packed-GB/s  speed-up (min-max)  ideal  of-ideal");
        for format in formats.into_iter().filter(|f| bitmap::FORMATS.contains(f)) {
            for &isa in &isas {
                for threads in get("threads", "1,2").split(',') {
                    let pool = Pool::new(threads.parse().expect("a number of threads"));
                    for zeros in zeros.split(',') {
                        let zeros = zeros.parse::<f64>().expect("percent of zeros") / 100.0;
                        Pruned::new(format, bytes, cols, zeros).report(isa, &pool, reps, clock);
                    }
                }
            }
        }
        return;
    }
    if what == "codebook" {
        println!("bits isa     threads  dense   bits/w  dense-w/ns  book-w/ns  speed-up (min-max)  ideal");
        for bits in 2..=4 {
            for &isa in &isas {
                for threads in get("threads", "1,2").split(',') {
                    let pool = Pool::new(threads.parse().expect("a number of threads"));
                    let books = Books::new(bits, bytes, cols);
                    formats.iter().for_each(|f| books.report(*f, isa, &pool, reps, clock));
                }
            }
        }
        return;
    }
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

/// A dense matrix with zeros, and the same without them.
struct Pruned {
    format: Format,
    rows: usize,
    cols: usize,
    zeros: f64,
    dense: Vec<u8>,
    packed: Vec<u8>,
    x: gemv::Operand,
}

impl Pruned {
    fn new(format: Format, bytes: usize, cols: usize, zeros: f64) -> Self {
        let row = format.run_bytes(cols).expect("whole blocks");
        let rows = bytes / row;
        let mut dense = vec![0x2c; rows * row];
        // Bit mixing of splitmix64: zeros at places that nothing predicts.
        let mut state = 1_u64;
        let mut drop = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
        };
        for block in dense.chunks_exact_mut(format.block_bytes()) {
            match format {
                Format::Bf16 if drop() < zeros => block.fill(0),
                Format::Q8_0 => block[2..].iter_mut().filter(|_| drop() < zeros).for_each(|q| *q = 0),
                Format::Q4_0 => block[2..].iter_mut().for_each(|q| {
                    *q = if drop() < zeros { *q & 0xf0 | 8 } else { *q };
                    *q = if drop() < zeros { *q & 0x0f | 0x80 } else { *q };
                }),
                _ => {}
            }
        }
        let packed =
            bitmap::pack(&Matrix::new(format, rows, cols, &dense).expect("sizes fit")).expect("a packed format");
        let values: Vec<f32> = (0..cols).map(|i| (i % 17) as f32 - 8.0).collect();
        let mut x = gemv::Operand::new();
        x.prepare(&values, &[format, bitmap::operand(format)]);
        Self { format, rows, cols, zeros, dense, packed, x }
    }

    fn report(&self, isa: Isa, pool: &Pool, reps: usize, clock: Clock) {
        let w = Matrix::new(self.format, self.rows, self.cols, &self.dense).expect("sizes fit");
        let b = Bitmap::new(self.format, self.rows, self.cols, &self.packed).expect("sizes fit");
        let mut y = vec![0.0; self.rows];
        let (mut dense, mut packed, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for rep in 0..=reps {
            let start = clock();
            gemv::run_on(isa, pool, &mut [gemv::Job { w, x: &self.x, y: &mut y }]);
            let whole = clock() - start;
            let start = clock();
            bitmap::run_on(isa, pool, &mut [bitmap::Job { w: b, x: &[&self.x], y: &mut y }]);
            let part = clock() - start;
            if rep > 0 {
                dense.push(self.dense.len() as f64 / whole / 1e9);
                packed.push(self.packed.len() as f64 / part / 1e9);
                ratios.push(whole / part);
            }
        }
        let ideal = self.dense.len() as f64 / self.packed.len() as f64;
        let (low, high) = ratios.iter().fold((f64::MAX, 0.0_f64), |(l, h), &r| (l.min(r), h.max(r)));
        let (speed, dense, packed) = (median(ratios), median(dense), median(packed));
        let (name, threads, zeros) = (self.format.name(), pool.threads(), self.zeros * 100.0);
        println!(
            "{name:6} {isa:7} {threads:7}  {zeros:4.0}%  {dense:10.1}  {packed:11.1}  {speed:8.2} ({low:.2}-{high:.2})  {ideal:5.2}  {:8.2}",
            speed / ideal
        );
    }
}

/// A matrix in codes of pairs that takes some number of bytes.
struct Books {
    bits: usize,
    rows: usize,
    cols: usize,
    packed: Vec<u8>,
}

impl Books {
    fn new(bits: usize, bytes: usize, cols: usize) -> Self {
        let rows = bytes / codebook::row_bytes(bits, cols);
        // As many weights to a book as the published settings have.
        let per_book = [8, 32, 128][bits - 2];
        let (count, spans, size) = (rows.div_ceil(per_book), cols.div_ceil(256), codebook::entries(bits));
        let pairs = cols.div_ceil(32) * 16;
        let parts = codebook::Parts {
            bits,
            cols,
            span: 256,
            of_row: &(0..rows).map(|r| (r / per_book) as u16).collect::<Vec<_>>(),
            entries: &(0..count * spans * size * 2).map(|i| (i * 37 % 255) as u8 as i8).collect::<Vec<_>>(),
            exponents: &vec![-10; count * spans],
            codes: &(0..rows * pairs)
                .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 13) as u8 & (size - 1) as u8)
                .collect::<Vec<_>>(),
        };
        Self { bits, rows, cols, packed: codebook::pack(&parts).expect("parts that fit") }
    }

    fn report(&self, format: Format, isa: Isa, pool: &Pool, reps: usize, clock: Clock) {
        let row = format.run_bytes(self.cols).expect("whole blocks");
        // As many bytes as the codebook has, so that both come from memory.
        let dense_rows = self.packed.len() / row;
        let dense = vec![0x2c; dense_rows * row];
        let w = Matrix::new(format, dense_rows, self.cols, &dense).expect("sizes fit");
        let b = Codebook::new(self.rows, self.cols, &self.packed).expect("sizes fit");
        let values: Vec<f32> = (0..self.cols).map(|i| (i % 17) as f32 - 8.0).collect();
        let mut x = gemv::Operand::new();
        x.prepare(&values, &[format, codebook::OPERAND]);
        let mut y = vec![0.0; self.rows.max(dense_rows)];
        let (mut plain, mut books, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for rep in 0..=reps {
            let start = clock();
            gemv::run_on(isa, pool, &mut [gemv::Job { w, x: &x, y: &mut y[..dense_rows] }]);
            let dense = (dense_rows * self.cols) as f64 / (clock() - start);
            let start = clock();
            codebook::run_on(isa, pool, &mut [codebook::Job { w: b, x: &[&x], y: &mut y[..self.rows] }]);
            let book = (self.rows * self.cols) as f64 / (clock() - start);
            if rep > 0 {
                plain.push(dense / 1e9);
                books.push(book / 1e9);
                ratios.push(book / dense);
            }
        }
        let own = 8.0 * self.packed.len() as f64 / (self.rows * self.cols) as f64;
        let ideal = 8.0 * row as f64 / self.cols as f64 / own;
        let (low, high) = ratios.iter().fold((f64::MAX, 0.0_f64), |(l, h), &r| (l.min(r), h.max(r)));
        println!(
            "{:4} {isa:7} {:7}  {:6}  {own:6.3}  {:10.1}  {:9.1}  {:8.2} ({low:.2}-{high:.2})  {ideal:5.2}",
            self.bits,
            pool.threads(),
            format.name(),
            median(plain),
            median(books),
            median(ratios)
        );
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
