//! From which kept share on a dense product is faster than one with chosen channels, and from which share of zeros on a
//! bitmap is faster than a dense one: measured once per machine, stored in the cache.

use super::{bitmaps::bitmap_of, transpose::by_channels};
use lacuna_core::{
    atomic::write_atomically,
    bytes::Bytes,
    error::{Error, Result},
    map::read_small,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, Isa, Pool, axpy, bitmap, convert::encode_run, gemv, isa, select};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

/// Kept share above which a layer runs dense, where nothing was measured (papers see 0.6 to 0.8 on CPUs).
pub const DEFAULT_BREAK_EVEN: f32 = 0.7;

/// Share of zeros from which on a bitmap pays, where nothing was measured (AVX-512 with one thread; see
/// `docs/benchmarks.md`).
fn default_zeros(format: Format) -> f32 {
    match format {
        // Never timed, and three times as many instructions as dense products: where fewer than half of the bytes are left.
        _ if isa::get() == Isa::Neon => 0.7,
        Format::Bf16 => 0.25,
        Format::Q8_0 => 0.35,
        _ => 0.65,
    }
}

/// Raised when kernels change their speed, or the way it is measured: what was measured before is measured again.
const KERNELS: u32 = 4;

/// How much of the dense time a product with chosen channels may take: shares differ from token to token, and measurements
/// from hour to hour, while a layer that stays dense loses nothing.
const FOLLOWED: f64 = 0.97;

/// How much of the dense time a bitmap may take: prefill pays for unpacking it.
const WORTH: f64 = 0.9;

/// Break-even shares by format, for one instruction set and number of threads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BreakEven {
    shares: BTreeMap<String, f32>,
}

impl BreakEven {
    /// Never falls back to dense: the plan is followed everywhere, for measures of quality.
    pub fn never_dense() -> Self {
        let mut all = Self::default();
        Format::ALL.into_iter().for_each(|f| all.set(f, 1.0));
        all
    }

    /// What was stored for this machine's instruction set and `threads`; nothing, if there is no such file or it is
    /// damaged (the log says so): it can be measured again.
    pub fn load(root: Option<&Path>, threads: usize) -> Self {
        let Some(path) = root.map(|r| file(r, threads)).filter(|p| p.exists()) else { return Self::default() };
        let parse =
            |text: Bytes| serde_json::from_slice::<Self>(&text).map_err(|e| Error::malformed(e.to_string(), "shares"));
        match read_small(&path, 1 << 16).and_then(parse) {
            Ok(found) if found.shares.values().all(|s| (0.0..=1.0).contains(s)) => found,
            Ok(_) => Self::default(),
            Err(e) => {
                tracing::warn!("measured break-even shares are not used: {e}");
                Self::default()
            }
        }
    }

    /// Stores the shares for this machine's instruction set and `threads`.
    ///
    /// # Errors
    /// The folder cannot be made or the file not written.
    pub fn save(&self, root: &Path, threads: usize) -> Result<()> {
        fs::create_dir_all(root).map_err(Error::io(root, "create"))?;
        write_atomically(file(root, threads), None, |out| Ok(serde_json::to_writer_pretty(out, self)?))
    }

    /// The share for `format`: measured, or [`DEFAULT_BREAK_EVEN`].
    pub fn share(&self, format: Format) -> f32 {
        self.shares.get(format.name()).copied().unwrap_or(DEFAULT_BREAK_EVEN)
    }

    /// The share of zeros from which on bitmaps of `format` are faster: measured, or a default.
    pub fn zeros(&self, format: Format) -> f32 {
        self.shares.get(&zeros_of(format)).copied().unwrap_or(default_zeros(format))
    }

    /// Sets that share, clamped to 0 to 1. At 0 every bitmap is taken that saves bytes.
    pub fn set_zeros(&mut self, format: Format, share: f32) {
        self.shares.insert(zeros_of(format), share.clamp(0.0, 1.0));
    }

    /// Whether there is a measured share of zeros for `format`.
    pub fn knows_zeros(&self, format: Format) -> bool {
        self.shares.contains_key(&zeros_of(format))
    }

    /// Sets the share for `format`, clamped to 0 to 1. 1 never falls back.
    pub fn set(&mut self, format: Format, share: f32) {
        self.shares.insert(format.name().into(), share.clamp(0.0, 1.0));
    }
}

fn zeros_of(format: Format) -> String {
    format!("{} zeros", format.name())
}

fn file(root: &Path, threads: usize) -> PathBuf {
    root.join(format!("break-even-{KERNELS}-{}-{threads}.json", isa::get().name()))
}

/// Measures the kept share at which selecting and summing kept columns takes `FOLLOWED` (97 %) of the time of the dense dot form,
/// for a matrix of `outputs` by `inputs`. Time is taken as `a + b * share`.
///
/// # Panics
/// If `inputs` or `outputs` is not a multiple of the format's block.
pub fn measure(pool: &Pool, format: Format, outputs: usize, inputs: usize) -> f32 {
    const BYTES: usize = 160 << 20;
    let dot = sample(format, outputs, inputs);
    let axpy = by_channels(&dot);
    let copies = (BYTES / 2).div_ceil(dot.bytes().len().max(1)).clamp(1, 256);
    let (dots, axpys) = (many(&dot, copies), many(&axpy, copies));
    let x: Vec<f32> = (0..inputs).map(|i| ((i * 7919) % inputs) as f32 + 1.0).collect();
    let mut y = vec![0.0; outputs];
    // The values of x are 1..=inputs in mixed order.
    let threshold = |share: f32| inputs as f32 * (1.0 - share);
    let work = |form, i: usize| match form {
        0 => run_dense(pool, &dots[i], &x, &mut y),
        1 => run_sparse(pool, &axpys[i], &x, threshold(0.25), &mut y),
        _ => run_sparse(pool, &axpys[i], &x, threshold(0.75), &mut y),
    };
    typical(copies, work, |[dense, low, high]| {
        let (dense, per_share) = (dense * FOLLOWED, (high - low) / 0.5);
        match per_share > 0.0 {
            true => 0.25 + (dense - low) / per_share,
            false if high < dense => 1.0,
            false => 0.0,
        }
    })
}

/// Measures the share of zeros at which a product with a bitmap takes nine tenths of the time of the dense one, for a matrix
/// of `outputs` by `inputs`: as [`measure`], with bitmaps of 25 % and 75 % zeros. 1 if not even the latter is that fast.
///
/// # Panics
/// If the format has no bitmaps, or `inputs` is not a multiple of its block.
pub fn measure_zeros(pool: &Pool, format: Format, outputs: usize, inputs: usize) -> f32 {
    const BYTES: usize = 120 << 20;
    let pruned = [0.25, 0.75].map(|zeros| scattered(format, outputs, inputs, zeros));
    let copies = BYTES.div_ceil(pruned[0].bytes().len().max(1)).clamp(1, 64);
    let (dense, packed) = (many(&pruned[0], copies), pruned.map(|w| many(&bitmap_of(&w), copies)));
    let x: Vec<f32> = (0..inputs).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut y = vec![0.0; outputs];
    let mut operand = gemv::Operand::new();
    operand.prepare(&x, &[format, bitmap::operand(format)]);
    let work = |form, i: usize| match form {
        0 => gemv::run(pool, &mut [gemv::Job { w: dense[i].matrix(), x: &operand, y: &mut y }]),
        n => bitmap::run(pool, &mut [bitmap::Job { w: packed[n - 1][i].bitmap(), x: &[&operand], y: &mut y }]),
    };
    typical(copies, work, |[dense, low, high]| {
        let (dense, per_share) = (dense * WORTH, (low - high) / 0.5);
        match high < dense && per_share > 0.0 {
            true => 0.25 + (low - dense) / per_share,
            false if low < dense => 0.25,
            false => 1.0,
        }
    })
}

/// The median, over several rounds, of the share that `share` makes of the seconds of `work` in its three forms. A round runs each
/// form over all matrices, which together exceed the caches; one round's times are compared with each other alone, so that
/// a machine that slows down slows all forms.
fn typical(matrices: usize, mut work: impl FnMut(usize, usize), share: impl Fn([f64; 3]) -> f64) -> f32 {
    const ROUNDS: usize = 9;
    let mut round = || {
        share([0, 1, 2].map(|form| {
            let start = Instant::now();
            (0..matrices).for_each(|matrix| work(form, matrix));
            start.elapsed().as_secs_f64()
        }))
    };
    let mut shares: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
    shares.sort_unstable_by(f64::total_cmp);
    shares[ROUNDS / 2].clamp(0.0, 1.0) as f32
}

/// Copies of a matrix that share no memory.
fn many(w: &Weight, copies: usize) -> Vec<Weight> {
    let copy = |_| {
        Weight::new(w.format(), w.orientation(), w.outputs(), w.inputs(), Bytes::from(w.bytes().to_vec()))
            .expect("a copy of a weight")
    };
    (0..copies).map(copy).collect()
}

/// A weight with about a share of `zeros` at scattered places.
fn scattered(format: Format, outputs: usize, inputs: usize, zeros: f32) -> Weight {
    let run = format.run_bytes(inputs).expect("inputs are a multiple of the block, as documented");
    let mut bytes = vec![0; run * outputs];
    let mut values = vec![0.0; inputs];
    for (o, row) in bytes.chunks_exact_mut(run).enumerate() {
        for (i, v) in values.iter_mut().enumerate() {
            let mixed = ((o * inputs + i) as u32).wrapping_mul(0x9e37_79b1);
            let mixed = (mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b);
            *v = if ((mixed ^ mixed >> 13) >> 8) as f32 / ((1 << 24) as f32) < zeros { 0.0 } else { 1.0 };
        }
        encode_run(format, &values, row);
    }
    Weight::new(format, Orientation::OutputMajor, outputs, inputs, bytes.into()).expect("runs of this shape")
}

fn sample(format: Format, outputs: usize, inputs: usize) -> Weight {
    let values: Vec<f32> = (0..inputs).map(|i| ((i * 31 + 7) % 101) as f32 / 50.0 - 1.0).collect();
    let mut run = vec![0; format.run_bytes(inputs).expect("inputs are a multiple of the block, as documented")];
    encode_run(format, &values, &mut run);
    Weight::new(format, Orientation::OutputMajor, outputs, inputs, run.repeat(outputs).into())
        .expect("runs of this shape")
}

fn run_dense(pool: &Pool, w: &Weight, x: &[f32], y: &mut [f32]) {
    let mut operand = gemv::Operand::new();
    operand.prepare(x, &[w.format()]);
    gemv::run(pool, &mut [gemv::Job { w: w.matrix(), x: &operand, y }]);
}

fn run_sparse(pool: &Pool, w: &Weight, x: &[f32], threshold: f32, y: &mut [f32]) {
    let (mut index, mut value) = (Vec::new(), Vec::new());
    select::magnitude(isa::get(), x, threshold, &mut index, &mut value);
    axpy::run(pool, &mut [axpy::Job { w: w.columns(), index: &index, value: &value, y }]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_is_a_share() {
        let share = measure(&Pool::new(1), Format::F32, 256, 2048);
        assert!((0.0..=1.0).contains(&share) && share > 0.0, "{share}: sparse products cannot lose at every share");
        assert_eq!(BreakEven::never_dense().share(Format::Q4K), 1.0);
    }

    #[test]
    fn stored_and_read_back_and_damage_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let root = Some(dir.path());
        assert_eq!(BreakEven::load(root, 2).share(Format::Bf16), DEFAULT_BREAK_EVEN);
        let mut b = BreakEven::default();
        b.set(Format::Bf16, 0.8);
        b.save(dir.path(), 2).unwrap();
        assert_eq!(BreakEven::load(root, 2), b);
        assert_eq!(BreakEven::load(root, 1), BreakEven::default());
        for damage in ["{", "{\"shares\":{\"BF16\":7}}"] {
            fs::write(file(dir.path(), 2), damage).unwrap();
            assert_eq!(BreakEven::load(root, 2), BreakEven::default());
        }
    }
}
