//! The contract every method of the registry keeps: method x budget x layout x instruction set.
//!
//! A plan is deterministic; the kept share it states is the share it keeps on its calibration data, and that of the
//! budget where there is one; a larger budget never keeps less; at full budget the sparse product has the bits of the
//! dense one; a NaN in the statistics is an error that names its layer.

use lacuna_core::{
    method::{Budgets, LayerShape, Method, MethodError, MlpShape, Params, PlanContext, Weights, column_norms},
    observer::Observer,
    plan::{Accept, Cut, DraftSource, Entry, Predictor, Rule, Selector, Stage},
    site::{Point, Proj, Site},
    statistics::Statistics,
    tensor::Tensor,
    weight::Orientation,
};
use lacuna_kernels::{
    Format, Matrix, Pool,
    axpy::{self, Columns, groups},
    convert::encode_run,
    gemv, isa, select,
};
use lacuna_methods::registry::{METHODS, parse};
use std::collections::BTreeMap;

const WIDTH: usize = 64;
const INNER: usize = 96;
const TOKENS: usize = 500;
/// The predictor is trained in these tests no longer than it must be.
const QUICK: (&str, f64) = ("epochs", 1.0);
const BUDGETS: [f64; 6] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.95];

/// The methods that plan entries: all but those of the decoding loop and those that change weights.
fn skipping() -> impl Iterator<Item = &'static &'static dyn Method> {
    METHODS.iter().filter(|m| !matches!(m.site(), Site::Decoding | Site::Weights))
}

fn layers() -> Vec<LayerShape> {
    let mlp = MlpShape { inner: INNER, gated: true, activation: "relu".into(), exact_zeros: true };
    vec![LayerShape { width: WIDTH, query: WIDTH, kv: 32, mlp: Some(mlp), experts: None }; 3]
}

/// About normal values, other ones for each seed; `relu` closes the negative half.
fn values(seed: u64, n: usize, relu: bool) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut unit = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 24) as f32
    };
    let normal = (0..n).map(|_| (0..6).map(|_| unit()).sum::<f32>() - 3.0);
    normal.map(|x| if relu { x.max(0.0) } else { x }).collect()
}

/// Random weights of the right shapes.
struct RandomWeights;

impl Weights for RandomWeights {
    fn matrix(&self, layer: usize, proj: Proj) -> Option<Vec<f32>> {
        let (outputs, inputs) = layers()[layer].projection(proj)?;
        Some(values(1000 + (layer * 7 + proj as usize) as u64, outputs * inputs, false))
    }

    fn predictor(&self, layer: usize) -> Option<(Predictor, f32)> {
        let (rank, seed) = (16, 2000 + 2 * layer as u64);
        let down = Tensor::matrix(rank, &values(seed, rank * WIDTH, false));
        let up = Tensor::matrix(INNER, &values(seed + 1, INNER * rank, false));
        Some((Predictor { down, up, relu: true }, 0.0))
    }

    fn column_norms(&self, layer: usize, projs: &[Proj]) -> Option<Tensor> {
        let inputs = layers()[layer].projection(*projs.first()?)?.1;
        let matrices: Vec<_> = projs.iter().filter_map(|p| self.matrix(layer, *p)).collect();
        Some(Tensor::vector(column_norms(matrices.iter().map(Vec::as_slice), inputs)))
    }
}

/// What a point sees, one row per token.
fn data(point: Point) -> (usize, Vec<f32>) {
    let (layer, kind, width, relu) = match point {
        Point::Input { layer, proj } => (layer, proj as u64, layers()[layer].projection(proj).unwrap().1, false),
        Point::Neurons { layer } => (layer, 7, INNER, true),
        Point::Up { layer } => (layer, 8, INNER, false),
        Point::Experts { layer } => (layer, 11, INNER, true),
        Point::Output { layer } => (layer, 9, WIDTH, false),
        Point::Head => (0, 10, WIDTH, false),
    };
    (width, values(kind + 17 * layer as u64 + 1, width * TOKENS, relu))
}

/// Statistics after as many passes as the method asks for; `spoil` may change the data of a point.
fn observed(method: &dyn Method, params: &Params, spoil: impl Fn(Point, &mut Vec<f32>)) -> Statistics {
    let (mut statistics, budgets, layers) = (Statistics::default(), Budgets::default(), layers());
    for _ in 0..4 {
        let ctx = PlanContext { layers: &layers, statistics: &statistics, weights: &RandomWeights, budgets: &budgets };
        let missing = statistics.missing(&method.needs(params, ctx).observations);
        if missing.is_empty() || statistics.check().is_err() {
            return statistics;
        }
        let points: BTreeMap<Point, ()> = missing.iter().map(|o| (o.point, ())).collect();
        let mut pass = Statistics::new(missing);
        for point in points.into_keys() {
            let (width, mut values) = data(point);
            spoil(point, &mut values);
            pass.observe(point, width, &values);
        }
        statistics.absorb(pass);
    }
    panic!("{} never has enough", method.name());
}

fn plan(method: &dyn Method, params: &Params, statistics: &Statistics) -> Result<Vec<Entry>, MethodError> {
    let (layers, budgets) = (layers(), Budgets::default());
    method.plan(params, PlanContext { layers: &layers, statistics, weights: &RandomWeights, budgets: &budgets })
}

fn planned(method: &dyn Method, params: &Params) -> Vec<Entry> {
    plan(method, params, &observed(method, params, |_, _| {})).unwrap()
}

/// Every budget of a method: its first parameter if that is a sparsity, else the method as it is.
fn budgets(method: &dyn Method) -> Vec<(Option<f64>, Params)> {
    match method.params().first().filter(|p| p.name == "sparsity") {
        Some(p) => {
            let quick = method.params().iter().any(|p| p.name == QUICK.0).then_some(QUICK);
            let params = |b: &f64| Params::new(method, [(p.name, *b)].into_iter().chain(quick)).unwrap();
            BUDGETS.iter().map(|b| (Some(*b), params(b))).collect()
        }
        None => vec![(None, Params::new(method, []).unwrap())],
    }
}

/// The largest budget of a method: nothing dropped but zeros.
fn full(method: &dyn Method) -> Params {
    let first = method.params().first().filter(|p| ["sparsity", "threshold", "error"].contains(&p.name));
    Params::new(method, first.map(|p| (p.name, 0.0))).unwrap()
}

/// The vector an entry selects on.
fn selected_point(entry: &Entry) -> Point {
    let layer = entry.layer;
    match entry.rule {
        Rule::Inputs { proj, .. } => Point::Input { layer, proj: layers()[layer].observed_as(proj) },
        // Before the activation: about normal, as up.
        Rule::Neurons { on: Stage::Gate, .. } => Point::Up { layer },
        Rule::Neurons { .. } | Rule::Predicted { .. } => Point::Neurons { layer },
    }
}

/// Entries kept of all tokens of the calibration data.
fn kept_share(entry: &Entry) -> f64 {
    if let (Rule::Predicted { .. }, Cut::Top { count }) = (&entry.rule, &entry.rule.selector().cut) {
        return *count as f64 / INNER as f64;
    }
    if let (Rule::Predicted { predictor, .. }, Cut::Above { threshold }) = (&entry.rule, &entry.rule.selector().cut) {
        return predicted_share(entry.layer, predictor, *threshold);
    }
    let (width, values) = data(selected_point(entry));
    let signed = matches!(entry.rule, Rule::Neurons { on: Stage::Gate, .. });
    let rows = values.chunks_exact(width);
    let kept: usize = rows.map(|x| select(isa::get(), entry.rule.selector(), x, signed).0.len()).sum();
    kept as f64 / values.len() as f64
}

/// Share of the neurons that a predictor scores above `threshold`, over the tokens that `stored-predictor` samples.
fn predicted_share(layer: usize, predictor: &Predictor, threshold: f32) -> f64 {
    let (width, values) = data(Point::Input { layer, proj: layers()[layer].observed_as(Proj::Up) });
    let (fc1, fc2) = (predictor.down.to_f32(), predictor.up.to_f32());
    let product = |w: &[f32], x: &[f32]| -> Vec<f32> {
        w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let kept = |x: &[f32]| {
        let hidden: Vec<f32> = product(&fc1, x).iter().map(|v| v.max(0.0)).collect();
        product(&fc2, &hidden).iter().filter(|s| **s > threshold).count()
    };
    let shares: Vec<f64> = values.chunks_exact(width).step_by(7).map(|x| kept(x) as f64 / INNER as f64).collect();
    shares.iter().sum::<f64>() / shares.len() as f64
}

/// Share of the weights that a layer's entries decide about and drop.
fn dropped_weights(entries: &[Entry], kept: &[f64], layer: usize) -> f64 {
    let (mut dropped, mut all) = (0.0, 0.0);
    for (entry, kept) in entries.iter().zip(kept).filter(|(e, _)| e.layer == layer) {
        let shapes = entry.rule.covers().iter().filter_map(|p| layers()[layer].projection(*p));
        let weight: usize = shapes.map(|(o, i)| o * i).sum();
        let rank = match &entry.rule {
            Rule::Inputs { low_rank: Some(l), .. } => l.down.to_f32().len() + l.up.to_f32().len(),
            _ => 0,
        };
        dropped += (1.0 - kept) * weight as f64 - rank as f64;
        all += weight as f64;
    }
    dropped / all
}

#[test]
fn plans_are_deterministic_and_keep_the_budget() {
    for method in skipping() {
        for (budget, params) in budgets(*method) {
            let entries = planned(*method, &params);
            assert_eq!(entries, planned(*method, &params), "{}", method.name());
            assert!(!entries.is_empty());
            let shares: Vec<f64> = entries.iter().map(kept_share).collect();
            for (entry, kept) in entries.iter().zip(&shares) {
                let what = format!("{} {budget:?} {entry:?}: keeps {kept}", method.name());
                // A cut by mean and spread keeps its share of normal numbers only; these are sums of six.
                let loose = matches!(entry.rule.selector().cut, Cut::Gaussian { .. });
                let bound = if loose { 0.03 } else { 0.01 };
                assert!((kept - f64::from(entry.kept.unwrap())).abs() < bound, "{what}");
            }
            for (layer, budget) in (0..3).filter_map(|l| Some((l, budget?))) {
                // ReLU data has half its entries at zero, which are dropped at every budget.
                let dropped = dropped_weights(&entries, &shares, layer);
                let zeros = entries.iter().any(|e| matches!(e.rule, Rule::Neurons { .. })) && budget < 0.5;
                let bound = if method.name() == "spark" { 0.03 } else { 0.01 };
                assert!(zeros || (dropped - budget).abs() < bound, "{} {budget}: {dropped}", method.name());
            }
        }
    }
}

#[test]
fn a_larger_budget_never_keeps_less() {
    for method in skipping() {
        let plans: Vec<Vec<Entry>> = budgets(*method).iter().map(|(_, params)| planned(*method, params)).collect();
        for pair in plans.windows(2) {
            for (more, less) in pair[0].iter().zip(&pair[1]) {
                let (width, _) = data(selected_point(less));
                let x = values(99, width, false);
                let signed = matches!(less.rule, Rule::Neurons { on: Stage::Gate, .. });
                let [many, few] = [more, less].map(|e| select(isa::get(), e.rule.selector(), &x, signed).0);
                let nested = few.iter().all(|i| many.contains(i));
                assert!(nested && more.kept >= less.kept, "{}: {more:?} {less:?}", method.name());
            }
        }
    }
}

#[test]
fn a_nan_in_the_statistics_names_its_layer() {
    for method in skipping() {
        let (_, params) = &budgets(*method)[1 % budgets(*method).len()];
        let nothing = Statistics::default();
        let (layers, none) = (layers(), Budgets::default());
        let ctx = PlanContext { layers: &layers, statistics: &nothing, weights: &RandomWeights, budgets: &none };
        for point in method.needs(params, ctx).observations.iter().map(|o| o.point) {
            let statistics = observed(*method, params, |p, values| {
                if p == point {
                    values[7] = f32::NAN;
                }
            });
            let error = plan(*method, params, &statistics).unwrap_err().to_string();
            assert!(error.contains(&point.to_string()), "{}: {error}", method.name());
        }
    }
}

fn matrix(format: Format, rows: usize, cols: usize) -> Vec<u8> {
    let run = format.run_bytes(cols).unwrap();
    let mut bytes = vec![0; run * rows];
    for (row, out) in bytes.chunks_exact_mut(run).enumerate() {
        encode_run(format, &values(row as u64 + 1, cols, false), out);
    }
    bytes
}

/// At the largest budget (lowest sparsity), the product over what the entry keeps of `x` equals the product over all.
#[test]
fn full_budget_has_the_bits_of_dense() {
    let pool = Pool::new(2);
    for method in skipping() {
        for entry in planned(*method, &full(*method)) {
            let (width, values) = data(selected_point(&entry));
            for layout in method.layouts() {
                for format in [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0] {
                    for isa in isa::available() {
                        let x = &values[..width];
                        let equal = match layout {
                            Orientation::InputMajor => axpy_equal(&pool, isa, format, entry.rule.selector(), x),
                            _ => rows_equal(&pool, isa, format, entry.rule.selector(), x),
                        };
                        assert!(equal, "{} {layout:?} {format:?} {isa:?} {entry:?}", method.name());
                    }
                }
            }
        }
    }
}

fn select(isa: lacuna_kernels::Isa, selector: &Selector, x: &[f32], signed: bool) -> (Vec<u32>, Vec<f32>) {
    let (mut index, mut value) = (vec![], vec![]);
    let scale = selector.scale.as_ref().map(|s| s.values());
    let mut above = |threshold: f32| match scale {
        _ if signed => select::above(isa, x, threshold, &mut index, &mut value),
        Some(s) => select::scaled(isa, x, s, threshold, &mut index, &mut value),
        None => select::magnitude(isa, x, threshold, &mut index, &mut value),
    };
    match selector.cut {
        Cut::NonZero => select::nonzero(isa, x, &mut index, &mut value),
        Cut::Above { threshold } => above(threshold),
        Cut::Top { count } => {
            select::top_k(isa, x, scale, count, &mut select::TopScratch::default(), (&mut index, &mut value));
        }
        Cut::Gaussian { multiple } => {
            let (mean, std) = select::moments(x, scale, signed);
            above((mean + f64::from(multiple) * std) as f32);
        }
        Cut::Prompt { count } => select::listed(x, &(0..count as u32).collect::<Vec<_>>(), &mut index, &mut value),
        Cut::Listed { .. } => panic!("no method of the registry plans lists"),
    }
    (index, value)
}

/// Columns of kept channels against all columns.
fn axpy_equal(pool: &Pool, isa: lacuna_kernels::Isa, format: Format, selector: &Selector, x: &[f32]) -> bool {
    let bytes = matrix(format, x.len(), WIDTH);
    let runs = Columns::Runs(Matrix::new(format, x.len(), WIDTH, &bytes).unwrap());
    let by_output = matrix(format, WIDTH, x.len());
    let packed = groups::pack(&Matrix::new(format, WIDTH, x.len(), &by_output).unwrap());
    let groups = packed.as_deref().and_then(|p| groups::Groups::new(format, WIDTH, x.len(), p)).map(Columns::Groups);
    let all: Vec<u32> = (0..x.len() as u32).collect();
    let (index, value) = select(isa, selector, x, false);
    [Some(runs), groups].into_iter().flatten().all(|w| {
        let (mut sparse, mut dense) = (vec![0.0; WIDTH], vec![1.0; WIDTH]);
        axpy::run_on(isa, pool, &mut [axpy::Job { w, index: &index, value: &value, y: &mut sparse }]);
        axpy::run_on(isa, pool, &mut [axpy::Job { w, index: &all, value: x, y: &mut dense }]);
        sparse.iter().zip(&dense).all(|(a, b)| a.to_bits() == b.to_bits())
    })
}

/// Rows of kept neurons against the same rows among all.
fn rows_equal(pool: &Pool, isa: lacuna_kernels::Isa, format: Format, selector: &Selector, gate: &[f32]) -> bool {
    let bytes = matrix(format, gate.len(), WIDTH);
    let w = Matrix::new(format, gate.len(), WIDTH, &bytes).unwrap();
    let mut x = gemv::Operand::new();
    x.prepare(&values(5, WIDTH, false), &[format]);
    let (rows, _) = select(isa, selector, gate, false);
    let (mut some, mut all) = (vec![0.0; rows.len()], vec![0.0; gate.len()]);
    gemv::run_rows_on(isa, pool, &mut [gemv::RowsJob { w, rows: &rows, x: &x, y: &mut some }]);
    gemv::run_on(isa, pool, &mut [gemv::Job { w, x: &x, y: &mut all }]);
    rows.iter().zip(&some).all(|(&r, y)| y.to_bits() == all[r as usize].to_bits())
}

#[test]
fn decoding_methods_plan_the_loop_and_nothing_else() {
    for method in METHODS {
        let params = Params::new(*method, []).unwrap();
        assert_eq!(method.decoding(&params).is_some(), method.site() == Site::Decoding, "{}", method.name());
        if method.site() == Site::Decoding {
            let statistics = Statistics::default();
            assert!(plan(*method, &params, &statistics).unwrap().is_empty());
            assert_eq!(observed(*method, &params, |_, _| {}).tokens(), 0, "no calibration");
        }
    }
    let decoding = |spec: &str| parse(spec).map(|s| s[0].method.decoding(&s[0].params));
    let sirius = decoding("sirius=0.1:block=4").unwrap().unwrap();
    assert_eq!((sirius.most, sirius.accept), (4, Accept::Threshold { probability: 0.1 }));
    assert!(decoding("token-recycling=65").unwrap_err().to_string().contains("[1, 64]"));
    assert_eq!(decoding("token-recycling=9").unwrap().unwrap().draft, DraftSource::TokenRecycling);
}
