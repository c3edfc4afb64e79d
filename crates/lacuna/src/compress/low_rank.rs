//! Matrices of low rank: how a step that rounds changes their factors, and what of them is stored.
//!
//! The dense matrix of the output is the product, in the type of the model, so that other programs load it; the factors lie in the
//! container beside it, in the type of the model or as the blocks or codes that a step made of them. Lacuna computes `A (B x)`,
//! which differs from the dense product by the rounding of the latter.

use super::{
    block::rounded,
    store::Finished,
    tensors::{block_format, coded_blocks, numbers, packed_books, packed_name},
};
use lacuna_core::{
    compress::{Changed, Compressor, Inputs, Layer, LowRank},
    format::safetensors::Dtype,
    method::MethodError,
    pair::{self, Factor},
    site::Proj,
};
use lacuna_kernels::{Format, Matrix, Pool, gemm};
use lacuna_methods::registry::Resolved;

/// What blocks of codes are multiples of.
const BLOCK: usize = 32;

/// Rounds the two factors by `step`: the one that reads the inputs first, then the other on what that gives. `None` where
/// blocks of codes do not fit the factors (the step then rounds the product).
///
/// # Errors
/// What the method says.
pub fn round(
    step: &Resolved,
    compressor: &dyn Compressor,
    layer: &Layer<'_>,
    pair: &LowRank,
) -> Result<Option<Changed>, MethodError> {
    let rank = pair.rank;
    let (mut of_down, mut of_up) = (step.clone(), step.clone());
    if step.has("group") {
        let group = step.params.get("group") as usize;
        let (Some(first), Some(second)) = (divisor(group, layer.inputs), divisor(group, rank)) else { return Ok(None) };
        of_down = step.with("group", first as f64)?;
        of_up = step.with("group", second as f64)?;
    }
    let place = format!("{} (the factor that reads its inputs)", layer.place);
    let weight = &pair.down.weight[..];
    let own = Layer { place: &place, outputs: rank, weight, kept: None, sparsity: None, ..*layer };
    let down = compressor.compress(&of_down.params, &own)?;
    let seen = layer.seen.map(|seen| through(layer.pool, seen, &down.weight, rank));
    let place = format!("{} (the factor that makes its outputs)", layer.place);
    let weight = &pair.up.weight[..];
    let own = Layer { place: &place, inputs: rank, weight, seen: seen.as_ref(), kept: None, sparsity: None, ..*layer };
    let up = compressor.compress(&of_up.params, &own)?;
    let notes = down.notes.iter().chain(&up.notes).cloned().collect();
    Ok(Some(of_factors(layer.pool, LowRank { rank, down, up }, layer.inputs, notes)))
}

/// The largest number of columns up to `group` that share a scale in blocks of codes of `cols` columns; 0: all.
fn divisor(group: usize, cols: usize) -> Option<usize> {
    if group == 0 {
        return cols.is_multiple_of(BLOCK).then_some(0);
    }
    (1..=group / BLOCK).rev().map(|n| n * BLOCK).find(|g| cols.is_multiple_of(*g))
}

/// The products of the rows of `x` (of `k` numbers) with a matrix of `n` columns: `[k, n]`, or turned `[n, k]`.
fn product(pool: &Pool, x: &[f32], k: usize, w: &[f32], n: usize, turned: bool) -> Vec<f32> {
    let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
    let (rows, cols) = if turned { (n, k) } else { (k, n) };
    let matrix = Matrix::new(Format::F32, rows, cols, &bytes).expect("four bytes for every number");
    let w = if turned { gemm::Weights::OutputMajor(matrix) } else { gemm::Weights::InputMajor(matrix) };
    let mut input = gemm::Input::new();
    input.prepare(pool, x, x.len() / k, k, &[Format::F32]);
    let mut y = vec![0.0; x.len() / k * n];
    gemm::run(pool, &mut [gemm::Job { w, x: &input, y: &mut y, accumulate: false }]);
    y
}

/// What is seen of `B x`.
fn through(pool: &Pool, seen: &Inputs, down: &[f32], rank: usize) -> Inputs {
    let n = seen.squares.len();
    let Some(gram) = &seen.gram else {
        let square = |row: &[f32]| row.iter().zip(&seen.squares).map(|(b, s)| f64::from(*b).powi(2) * s).sum();
        return Inputs { squares: down.chunks_exact(n.max(1)).map(square).collect(), ..seen.clone() };
    };
    let most = seen.squares.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let gram: Vec<f32> = gram.iter().map(|g| (g / most) as f32).collect();
    let half = product(pool, down, n, &gram, n, true);
    let all = product(pool, &half, n, down, rank, true);
    // Both halves alike, to the last bit.
    let at = |i: usize| most * f64::midpoint(f64::from(all[i]), f64::from(all[i % rank * rank + i / rank]));
    let gram: Vec<f64> = (0..rank * rank).map(at).collect();
    let squares = (0..rank).map(|i| gram[i * rank + i].max(0.0)).collect();
    Inputs { tokens: seen.tokens, squares, gram: Some(gram) }
}

/// A matrix that is the product of `pair`.
fn of_factors(pool: &Pool, pair: LowRank, cols: usize, notes: Vec<String>) -> Changed {
    let weight = product(pool, &pair.up.weight, pair.rank, &pair.down.weight, cols, false);
    Changed { weight, kept: None, codes: None, books: None, low_rank: Some(Box::new(pair)), notes }
}

/// `changed` with factors that are stored in `format` where no step rounded them, and with their product.
pub fn stored(pool: &Pool, changed: Changed, cols: usize, format: Format) -> Changed {
    let Some(mut pair) = changed.low_rank else { return changed };
    for factor in [&mut pair.down, &mut pair.up] {
        if factor.codes.is_none() && factor.books.is_none() {
            factor.weight = rounded(&factor.weight, format);
        }
    }
    of_factors(pool, *pair, cols, changed.notes)
}

/// The piece of a container for a projection that has factors, whose other numbers are stored in `format`.
pub fn packed(layer: usize, proj: Proj, changed: &Changed, format: Format) -> Option<Finished> {
    let pair = changed.low_rank.as_ref()?;
    let factor = |c: &Changed| match (&c.codes, &c.books) {
        (Some(codes), _) => {
            let format = block_format(codes.bits);
            Some(Factor { format: Some(format), bytes: coded_blocks(codes, format) })
        }
        (None, Some(books)) => Some(Factor { format: None, bytes: packed_books(books, &c.weight)? }),
        (None, None) => Some(Factor { format: Some(format), bytes: numbers(format, &c.weight) }),
    };
    let [rows, cols] = [&pair.up, &pair.down].map(|c| c.weight.len() / pair.rank.max(1));
    let data = pair::pack(rows, cols, pair.rank, &factor(&pair.down)?, &factor(&pair.up)?)?;
    Some(Finished { name: packed_name(layer, proj), dtype: Dtype::U8, shape: vec![data.len() as u64], data })
}

/// Bits of the codes of the factors.
pub fn bits(pair: &LowRank) -> Option<u32> {
    let up = &pair.up;
    up.codes.as_ref().map(|c| c.bits).or(up.books.as_ref().map(|b| b.bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::{bytes::Bytes, weight::Weight};
    use lacuna_kernels::Pool;
    use lacuna_methods::registry;

    fn numbers_of(seed: u64, n: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    fn plain(weight: Vec<f32>) -> Changed {
        Changed { weight, kept: None, codes: None, books: None, low_rank: None, notes: vec![] }
    }

    #[test]
    fn factors_are_rounded_and_packed() {
        let (rows, cols, rank) = (96, 128, 32);
        let pair = LowRank { rank, down: plain(numbers_of(1, rank * cols)), up: plain(numbers_of(2, rows * rank)) };
        let pool = Pool::new(2);
        let whole = of_factors(&pool, pair.clone(), cols, vec![]);
        let mut gram = vec![0.0; cols * cols];
        let x: Vec<f64> = numbers_of(3, 300 * cols).iter().map(|v| f64::from(*v)).collect();
        for row in x.chunks_exact(cols) {
            (0..cols * cols).for_each(|i| gram[i] += row[i / cols] * row[i % cols]);
        }
        let squares = (0..cols).map(|j| gram[j * cols + j]).collect();
        let seen = Inputs { tokens: 300, squares, gram: Some(gram) };
        let layer = Layer {
            place: "layers.0.attn.q",
            outputs: rows,
            inputs: cols,
            weight: &whole.weight,
            kept: None,
            seen: Some(&seen),
            sparsity: None,
            seed: 0,
            pool: &pool,
        };
        let mut errors = Vec::new();
        for (spec, format) in [
            ("rtn=8:group=64", Some(Format::Q8_0)),
            ("gptq=8:group=0", Some(Format::Q8_0)),
            ("gptq=4:group=64", Some(Format::Q4_0)),
            ("gptvq=4:rounds=5", None),
        ] {
            let step = &registry::parse(spec).unwrap()[0];
            let compressor = step.method.compressor().unwrap();
            let new = round(step, compressor, &layer, &pair).unwrap().unwrap();
            let lost: f32 = new.weight.iter().zip(&whole.weight).map(|(a, b)| (a - b) * (a - b)).sum();
            errors.push(lost / whole.weight.iter().map(|w| w * w).sum::<f32>());
            let piece = packed(0, Proj::Q, &new, Format::Bf16).unwrap();
            let [down, up] = pair::parse(rows, cols, &Bytes::from(piece.data)).unwrap();
            assert!(format.is_none_or(|f| f == down.format() && f == up.format()), "{spec}");
            if format.is_some() {
                let own = new.low_rank.as_ref().unwrap();
                assert_eq!(super::super::block::decoded(&down), own.down.weight, "{spec}");
                assert_eq!(super::super::block::decoded(&up), own.up.weight, "{spec}");
            }
        }
        assert!(errors[0] < 1e-4 && errors[1] < 1e-4 && errors[2] < 0.03 && errors[3] < 0.03, "{errors:?}");
        // Without blocks that fit, the step takes the product.
        let odd = LowRank { rank: 5, down: plain(numbers_of(1, 5 * cols)), up: plain(numbers_of(2, rows * 5)) };
        let step = &registry::parse("rtn=4:group=64").unwrap()[0];
        assert!(round(step, step.method.compressor().unwrap(), &layer, &odd).unwrap().is_none());
        let odd = Changed { low_rank: Some(Box::new(odd)), ..plain(vec![]) };
        let kept = stored(&pool, odd, cols, Format::Bf16);
        let piece = packed(3, Proj::K, &kept, Format::Bf16).unwrap();
        let weight = Weight::new(
            Format::Bf16,
            lacuna_core::weight::Orientation::LowRank,
            rows,
            cols,
            Bytes::from(piece.data.clone()),
        );
        assert!(weight.is_some() && piece.name.ends_with("layers.3.attn.k"));
        assert!(piece.data.len() < 2 * 5 * (rows + cols) + 256);
    }

    #[test]
    fn inputs_of_the_second_factor() {
        // Two inputs, rank one: B x = 2 x_0 - x_1.
        let seen = Inputs { tokens: 3, squares: vec![5.0, 2.0], gram: Some(vec![5.0, 1.0, 1.0, 2.0]) };
        let pool = Pool::new(1);
        let on = through(&pool, &seen, &[2.0, -1.0], 1);
        let near = |x: f64| (x - 18.0).abs() < 1e-5;
        assert!(near(on.squares[0]) && on.gram.is_some_and(|g| g.len() == 1 && near(g[0])));
        let on = through(&pool, &Inputs { gram: None, ..seen }, &[2.0, -1.0], 1);
        assert_eq!((on.squares, on.gram), (vec![22.0], None));
        assert_eq!([divisor(128, 96), divisor(64, 128), divisor(0, 96)], [Some(96), Some(64), Some(0)]);
        assert_eq!([divisor(16, 96), divisor(128, 40), divisor(0, 40)], [None, None, None]);
    }
}
