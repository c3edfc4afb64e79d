//! The contract every method of the registry keeps: method x budget x layout x instruction set.
//!
//! A plan is deterministic; the kept share it states is the share it keeps on its calibration data, and that of the
//! budget where there is one; a larger budget never keeps less; at full budget the sparse product has the bits of the
//! dense one; a NaN in the statistics is an error that names its layer.

use lacuna_core::{
    method::{LayerShape, Method, MethodError, MlpShape, Params, PlanContext},
    observer::Observer,
    plan::{Entry, Rule, Selector},
    site::Point,
    statistics::Statistics,
    weight::Orientation,
};
use lacuna_kernels::{Format, Matrix, Pool, axpy, convert::encode_run, gemv, isa, select};
use lacuna_methods::registry::METHODS;
use std::collections::BTreeMap;

const WIDTH: usize = 64;
const INNER: usize = 96;
const TOKENS: usize = 500;
const BUDGETS: [f64; 6] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.95];

fn layers() -> Vec<LayerShape> {
    let mlp = MlpShape { inner: INNER, gated: true, activation: "relu".into(), exact_zeros: true };
    vec![LayerShape { width: WIDTH, query: WIDTH, kv: 32, mlp: Some(mlp) }; 3]
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

/// What each point sees, one row per token.
type Data = BTreeMap<Point, (usize, Vec<f32>)>;

fn data(method: &dyn Method, params: &Params) -> Data {
    let points = method.needs(params, &layers()).points;
    let row = |(seed, point): (usize, Point)| {
        let (layer, width, relu) = match point {
            Point::Input { layer, proj } => (layer, layers()[layer].projection(proj).unwrap().1, false),
            Point::Neurons { layer } => (layer, INNER, true),
            Point::Output { layer } => (layer, WIDTH, false),
            Point::Head => (0, WIDTH, false),
        };
        (point, (width, values((seed + 17 * layer) as u64 + 1, width * TOKENS, relu)))
    };
    points.into_iter().enumerate().map(row).collect()
}

fn observed(data: &Data) -> Statistics {
    let mut statistics = Statistics::new(data.keys().copied());
    for (point, (width, values)) in data {
        statistics.observe(*point, *width, values);
    }
    statistics
}

fn plan(method: &dyn Method, params: &Params, statistics: &Statistics) -> Result<Vec<Entry>, MethodError> {
    method.plan(params, PlanContext { layers: &layers(), statistics })
}

/// Every budget of a method: its first parameter if that is a sparsity, else the method as it is.
fn budgets(method: &dyn Method) -> Vec<(Option<f64>, Params)> {
    match method.params().first().filter(|p| p.name == "sparsity") {
        Some(p) => BUDGETS.iter().map(|b| (Some(*b), Params::new(method, [(p.name, *b)]).unwrap())).collect(),
        None => vec![(None, Params::new(method, []).unwrap())],
    }
}

/// The vector an entry selects on.
fn selected_point(entry: &Entry) -> Point {
    let layer = entry.layer;
    match entry.rule {
        Rule::Inputs { proj, .. } => Point::Input { layer, proj: layers()[layer].observed_as(proj) },
        Rule::Neurons { .. } => Point::Neurons { layer },
    }
}

fn keeps(selector: Selector, x: f32) -> bool {
    match selector {
        Selector::NonZero => x != 0.0,
        Selector::Magnitude { threshold } => x.abs() > threshold,
    }
}

#[test]
fn plans_are_deterministic_and_keep_the_budget() {
    for method in METHODS {
        for (budget, params) in budgets(*method) {
            let data = data(*method, &params);
            let entries = plan(*method, &params, &observed(&data)).unwrap();
            assert_eq!(entries, plan(*method, &params, &observed(&data)).unwrap(), "{}", method.name());
            assert!(!entries.is_empty());
            for entry in &entries {
                let values = &data[&selected_point(entry)].1;
                let kept =
                    values.iter().filter(|x| keeps(entry.rule.selector(), **x)).count() as f64 / values.len() as f64;
                let what = format!("{} {budget:?} {entry:?}: keeps {kept}", method.name());
                assert!((kept - f64::from(entry.kept.unwrap())).abs() < 0.005, "{what}");
                assert!(budget.is_none_or(|b| (kept - (1.0 - b)).abs() < 0.005), "{what}");
            }
        }
    }
}

#[test]
fn a_larger_budget_never_keeps_less() {
    for method in METHODS {
        let plans: Vec<Vec<Entry>> = budgets(*method)
            .iter()
            .map(|(_, params)| plan(*method, params, &observed(&data(*method, params))).unwrap())
            .collect();
        for pair in plans.windows(2) {
            for (more, less) in pair[0].iter().zip(&pair[1]) {
                let values = values(99, 1000, false);
                let nested = values.iter().all(|x| !keeps(less.rule.selector(), *x) || keeps(more.rule.selector(), *x));
                assert!(nested && more.kept >= less.kept, "{}: {more:?} {less:?}", method.name());
            }
        }
    }
}

#[test]
fn a_nan_in_the_statistics_names_its_layer() {
    for method in METHODS {
        let (_, params) = &budgets(*method)[0];
        for point in data(*method, params).into_keys() {
            let mut data = data(*method, params);
            data.get_mut(&point).unwrap().1[7] = f32::NAN;
            let error = plan(*method, params, &observed(&data)).unwrap_err().to_string();
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
    for method in METHODS {
        let (_, params) = &budgets(*method)[0];
        let data = data(*method, params);
        for entry in plan(*method, params, &observed(&data)).unwrap() {
            let (width, values) = &data[&selected_point(&entry)];
            for layout in method.layouts() {
                for format in [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0] {
                    for isa in isa::available() {
                        let x = &values[..*width];
                        let equal = match layout {
                            Orientation::InputMajor => axpy_equal(&pool, isa, format, entry.rule.selector(), x),
                            Orientation::OutputMajor => rows_equal(&pool, isa, format, entry.rule.selector(), x),
                        };
                        assert!(equal, "{} {layout:?} {format:?} {isa:?} {entry:?}", method.name());
                    }
                }
            }
        }
    }
}

fn select(isa: lacuna_kernels::Isa, selector: Selector, x: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let (mut index, mut value) = (vec![], vec![]);
    match selector {
        Selector::NonZero => select::nonzero(isa, x, &mut index, &mut value),
        Selector::Magnitude { threshold } => select::magnitude(isa, x, threshold, &mut index, &mut value),
    }
    (index, value)
}

/// Columns of kept channels against all columns.
fn axpy_equal(pool: &Pool, isa: lacuna_kernels::Isa, format: Format, selector: Selector, x: &[f32]) -> bool {
    let bytes = matrix(format, x.len(), WIDTH);
    let wt = Matrix::new(format, x.len(), WIDTH, &bytes).unwrap();
    let all: Vec<u32> = (0..x.len() as u32).collect();
    let (index, value) = select(isa, selector, x);
    let (mut sparse, mut dense) = (vec![0.0; WIDTH], vec![1.0; WIDTH]);
    axpy::run_on(isa, pool, &mut [axpy::Job { wt, index: &index, value: &value, y: &mut sparse }]);
    axpy::run_on(isa, pool, &mut [axpy::Job { wt, index: &all, value: x, y: &mut dense }]);
    sparse.iter().zip(&dense).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Rows of kept neurons against the same rows among all.
fn rows_equal(pool: &Pool, isa: lacuna_kernels::Isa, format: Format, selector: Selector, gate: &[f32]) -> bool {
    let bytes = matrix(format, gate.len(), WIDTH);
    let w = Matrix::new(format, gate.len(), WIDTH, &bytes).unwrap();
    let mut x = gemv::Operand::new();
    x.prepare(&values(5, WIDTH, false), &[format]);
    let (rows, _) = select(isa, selector, gate);
    let (mut some, mut all) = (vec![0.0; rows.len()], vec![0.0; gate.len()]);
    gemv::run_rows_on(isa, pool, &mut [gemv::RowsJob { w, rows: &rows, x: &x, y: &mut some }]);
    gemv::run_on(isa, pool, &mut [gemv::Job { w, x: &x, y: &mut all }]);
    rows.iter().zip(&some).all(|(&r, y)| y.to_bits() == all[r as usize].to_bits())
}
