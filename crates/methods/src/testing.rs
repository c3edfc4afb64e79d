//! Small models, weights and data for the tests of methods.

use lacuna_core::{
    method::{Budgets, LayerShape, Method, MlpShape, Params, PlanContext, Weights},
    observer::Observer,
    plan::{Cut, Entry, Selector},
    site::{Point, Proj},
    statistics::Statistics,
    tensor::Tensor,
};

/// `n` layers of width 8 with a gated MLP of 8 neurons.
pub fn layers(n: usize, activation: &str) -> Vec<LayerShape> {
    let exact_zeros = activation.starts_with("relu");
    let mlp = MlpShape { inner: 8, gated: true, activation: activation.into(), exact_zeros };
    vec![LayerShape { width: 8, query: 8, kv: 8, mlp: Some(mlp), experts: None }; n]
}

/// Weights that nobody asks for.
pub struct NoWeights;

impl Weights for NoWeights {
    fn matrix(&self, _: usize, _: Proj) -> Option<Vec<f32>> {
        None
    }

    fn column_norms(&self, _: usize, _: &[Proj]) -> Option<Tensor> {
        None
    }
}

/// Weights whose columns have these norms everywhere.
pub struct Columns(pub Vec<f32>);

impl Weights for Columns {
    fn matrix(&self, _: usize, _: Proj) -> Option<Vec<f32>> {
        let n = self.0.len();
        Some((0..n * n).map(|i| if i / n == i % n { self.0[i / n] } else { 0.0 }).collect())
    }

    fn column_norms(&self, _: usize, _: &[Proj]) -> Option<Tensor> {
        Some(Tensor::vector(self.0.clone()))
    }
}

/// About normal numbers.
pub fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut unit = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| (0..12).map(|_| unit()).sum::<f32>() - 6.0).collect()
}

/// What a selector keeps of one vector.
pub fn kept_of(selector: &Selector, x: &[f32]) -> Vec<u32> {
    let scale = |i: usize| selector.scale.as_ref().map_or(1.0, |s| s.values()[i]);
    let score = |i: &u32| x[*i as usize].abs() * scale(*i as usize);
    let mut order: Vec<u32> = (0..x.len() as u32).collect();
    match &selector.cut {
        Cut::NonZero => order.retain(|i| x[*i as usize] != 0.0),
        Cut::Above { threshold } => order.retain(|i| score(i) > *threshold),
        Cut::Top { count } => {
            order.sort_by(|a, b| score(b).total_cmp(&score(a)));
            order.truncate(*count);
            order.sort_unstable();
        }
        other => panic!("not in these tests: {other:?}"),
    }
    order
}

/// The entries of a method after as many passes over `rows(point, width)` as it asks for.
pub fn planned(
    method: &dyn Method,
    given: &[(&str, f64)],
    layers: &[LayerShape],
    weights: &dyn Weights,
    mut rows: impl FnMut(Point, usize) -> Vec<f32>,
) -> Vec<Entry> {
    let params = Params::new(method, given.iter().copied()).unwrap();
    let (mut statistics, budgets) = (Statistics::default(), Budgets::default());
    loop {
        let ctx = PlanContext { layers, statistics: &statistics, weights, budgets: &budgets };
        let missing = statistics.missing(&method.needs(&params, ctx).observations);
        if missing.is_empty() {
            return method.plan(&params, ctx).unwrap();
        }
        let mut points: Vec<Point> = missing.iter().map(|o| o.point).collect();
        points.dedup();
        let mut pass = Statistics::new(missing);
        points.iter().for_each(|p| pass.observe(*p, 8, &rows(*p, 8)));
        statistics.absorb(pass);
    }
}
