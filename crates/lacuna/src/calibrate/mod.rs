//! From methods with parameters to a stored plan: dense passes over a text with an observer, then each method plans.
//!
//! [`calibrate`] does it all. The pass itself is a closure, so that the engine, the reference and tests can be calibrated.

mod checkpoint;
pub mod percent;
mod resume;
pub mod search;
pub mod store;
pub mod weights;

pub use resume::Resume;

use crate::{
    engine::sampler::Rng,
    error::Result,
    model::{
        Model,
        spec::{Act, BlockSpec, MlpSpec, Spec},
    },
};
use lacuna_core::{
    method::{Budgets, LayerShape, MethodError, MlpShape, Needs, PlanContext, Weights},
    observer::Observer,
    plan::{PLAN_VERSION, Plan, compose},
    statistics::{Observation, Statistics},
};
use lacuna_methods::registry::Resolved;
use std::sync::Arc;
use weights::ModelWeights;

/// Longest calibration window, in tokens.
pub const MAX_WINDOW: usize = 2048;

/// The layers of a model as methods see them.
pub fn layer_shapes(spec: &Spec) -> Vec<LayerShape> {
    let layer = |b: &BlockSpec| {
        let shape = |inner: usize, gated: bool| {
            let (activation, exact_zeros) = (activation_name(b.act).into(), matches!(b.act, Act::Relu | Act::Relu2));
            Some(MlpShape { inner, gated, activation, exact_zeros })
        };
        let (mlp, experts) = match b.mlp {
            MlpSpec::Gated { inner } => (shape(inner, true), None),
            MlpSpec::Plain { inner } => (shape(inner, false), None),
            MlpSpec::Experts { inner, .. } => (None, shape(inner, true)),
            MlpSpec::ReluExperts { .. } => (None, None),
        };
        let kv = if b.latent.is_some() { 0 } else { b.kv_heads * b.head_dim };
        LayerShape { width: spec.width, query: b.attended(), kv, mlp, experts }
    };
    spec.blocks.iter().map(layer).collect()
}

fn activation_name(act: Act) -> &'static str {
    match act {
        Act::Silu => "silu",
        Act::Gelu => "gelu",
        Act::GeluTanh => "gelu_tanh",
        Act::QuickGelu => "quick_gelu",
        Act::Relu => "relu",
        Act::Relu2 => "relu2",
    }
}

/// A model as methods see it.
pub struct Subject {
    /// Its layers.
    pub layers: Vec<LayerShape>,
    /// Its weights.
    pub weights: Box<dyn Weights>,
    /// Its hash, which binds the plan.
    pub hash: String,
    /// Shares that a search decided.
    pub budgets: Budgets,
}

impl Subject {
    /// A loaded model, without budgets from a search.
    pub fn new(model: &Arc<Model>) -> Self {
        Self {
            layers: layer_shapes(&model.spec),
            weights: Box::new(ModelWeights::new(model.clone())),
            hash: model.hash.clone(),
            budgets: Budgets::default(),
        }
    }

    /// What `steps` want to see, given what was seen already.
    pub fn needs(&self, steps: &[Resolved], statistics: &Statistics) -> Needs {
        let needs: Vec<_> = steps.iter().map(|s| s.method.needs(&s.params, self.context(statistics))).collect();
        let tokens = needs.iter().map(|n| n.tokens).max().unwrap_or(0);
        Needs { observations: needs.into_iter().flat_map(|n| n.observations).collect(), tokens }
    }

    fn context<'a>(&'a self, statistics: &'a Statistics) -> PlanContext<'a> {
        PlanContext { layers: &self.layers, statistics, weights: &*self.weights, budgets: &self.budgets }
    }
}

/// Tokens of calibration text that `steps` work well from; 0 where none needs any (statistics then only report shares).
pub fn tokens_wanted(steps: &[Resolved], subject: &Subject) -> usize {
    subject.needs(steps, &Statistics::default()).tokens
}

/// Cuts `tokens` (as the tokenizer gave them) into windows of `min(context, 2048)` tokens, of about `wanted` tokens in
/// all. Where the text is longer, `seed` decides which windows are taken; they stay in the order of the text. With
/// `bos`, that token stands first in each window.
pub fn windows(tokens: &[u32], context: usize, wanted: usize, seed: u64, bos: Option<u32>) -> Vec<Vec<u32>> {
    let length = context.clamp(1, MAX_WINDOW);
    let all: Vec<&[u32]> = tokens.chunks(length).filter(|c| c.len() > 1 || tokens.len() == 1).collect();
    let mut order: Vec<usize> = (0..all.len()).collect();
    let count = wanted.div_ceil(length).min(all.len());
    let mut rng = Rng::new(seed);
    for i in 0..count {
        let j = i + (rng.next_u64() % (order.len() - i) as u64) as usize;
        order.swap(i, j);
    }
    order.truncate(count);
    order.sort_unstable();
    let mut left = wanted;
    let cut = |i: usize| {
        let mut window = all[i][..all[i].len().min(left)].to_vec();
        left -= window.len();
        if let (Some(bos), Some(first)) = (bos, window.first_mut()) {
            *first = bos;
        }
        window
    };
    order.into_iter().map(cut).filter(|w| !w.is_empty()).collect()
}

/// Runs one sequence of tokens from an empty context and shows the observer its points.
pub type Pass<'a> = dyn FnMut(&[u32], &mut dyn Observer) -> Result<()> + 'a;

/// Most passes over the text: methods that ask for more have a slip.
const MAX_PASSES: usize = 4;

/// A plan of `steps` for `subject`, and notes for the user: passes over `windows` until the methods have seen what they
/// want, then their entries. `progress(pass, done, all)` counts tokens.
///
/// # Errors
/// What `forward` returns; [`MethodError::NonFinite`] names the first point that held NaN or infinity; what a method
/// says of this model.
pub fn calibrate(
    steps: &[Resolved],
    subject: &Subject,
    forward: &mut Pass<'_>,
    windows: &[Vec<u32>],
    mut progress: impl FnMut(usize, usize, usize),
) -> Result<(Plan, Vec<String>)> {
    let mut statistics = Statistics::default();
    gather(steps, subject, forward, windows, &mut statistics, &mut progress)?;
    Ok(plan(steps, subject, &statistics)?)
}

/// Passes over `windows` until `statistics` hold what `steps` want.
///
/// # Errors
/// As [`calibrate`].
pub fn gather(
    steps: &[Resolved],
    subject: &Subject,
    forward: &mut Pass<'_>,
    windows: &[Vec<u32>],
    statistics: &mut Statistics,
    progress: &mut dyn FnMut(usize, usize, usize),
) -> Result<()> {
    gather_resumable(steps, subject, forward, windows, (statistics, None), progress)
}

/// [`gather`] whose passes go on where killed ones stopped.
///
/// # Errors
/// As [`calibrate`].
pub fn gather_resumable(
    steps: &[Resolved],
    subject: &Subject,
    forward: &mut Pass<'_>,
    windows: &[Vec<u32>],
    (statistics, resume): (&mut Statistics, Option<&Resume>),
    progress: &mut dyn FnMut(usize, usize, usize),
) -> Result<()> {
    for pass in 0..MAX_PASSES {
        let missing = statistics.missing(&subject.needs(steps, statistics).observations);
        if missing.is_empty() || windows.is_empty() {
            break;
        }
        let mut progress = |done, all| progress(pass, done, all);
        statistics.absorb(resume::observe_resumable(forward, windows, missing, resume, &mut progress)?);
    }
    Ok(())
}

/// Runs the dense model once over `windows` and gathers `observations`. `forward(tokens, observer)` runs one sequence
/// from an empty context. `progress(done, all)` counts tokens.
///
/// # Errors
/// What `forward` returns; [`MethodError::NonFinite`] names the first point that held NaN or infinity.
pub fn observe(
    forward: &mut Pass<'_>,
    windows: &[Vec<u32>],
    observations: Vec<Observation>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Statistics> {
    resume::observe_resumable(forward, windows, observations, None, &mut progress)
}

/// The plan of `steps`, and notes for the user on entries that an earlier step had decided already.
///
/// # Errors
/// What a method says of this model or of missing statistics.
pub fn plan(
    steps: &[Resolved],
    subject: &Subject,
    statistics: &Statistics,
) -> Result<(Plan, Vec<String>), MethodError> {
    let ctx = subject.context(statistics);
    let lists = steps.iter().map(|s| s.method.plan(&s.params, ctx)).collect::<Result<Vec<_>, _>>()?;
    let reports = steps.iter().zip(&lists).flat_map(|(s, entries)| s.method.report(&s.params, ctx, entries));
    let mut notes: Vec<String> = reports.collect();
    let (entries, left_out) = compose(lists);
    let mut loops = steps.iter().filter_map(|s| s.method.decoding(&s.params));
    let (decoding, further) = (loops.next(), loops.count());
    let plan = Plan {
        version: PLAN_VERSION,
        model: subject.hash.clone(),
        method: label(steps),
        calibration_tokens: statistics.tokens() as usize,
        entries,
        decoding,
    };
    if !left_out.is_empty() {
        notes.push(format!("{} entries of later methods are left out: an earlier one decides there", left_out.len()));
    }
    if further > 0 {
        notes.push("only the first decoding method is followed".into());
    }
    Ok((plan, notes))
}

/// The methods and their parameters in the short form, `relu,teal=0.4`.
pub fn label(steps: &[Resolved]) -> String {
    steps.iter().map(Resolved::label).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::{
        plan::Rule,
        site::{Point, Proj},
        tensor::Tensor,
    };
    use lacuna_methods::registry;

    struct NoWeights;

    impl Weights for NoWeights {
        fn matrix(&self, _: usize, _: Proj) -> Option<Vec<f32>> {
            None
        }

        fn column_norms(&self, _: usize, _: &[Proj]) -> Option<Tensor> {
            None
        }
    }

    fn layers(act: Act) -> Vec<LayerShape> {
        let block = BlockSpec {
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            latent: None,
            scale: 0.5,
            window: None,
            score_cap: None,
            rope: None,
            parallel: false,
            mlp: MlpSpec::Gated { inner: 12 },
            act,
            up_act: None,
            residual_scale: 1.0,
            per_layer: None,
        };
        let spec = Spec {
            arch: "test".into(),
            vocab: 4,
            width: 6,
            context: 8,
            embed_scale: 1.0,
            position: crate::model::spec::Position::Learned { offset: 0 },
            ropes: vec![],
            norm: crate::model::spec::NormKind::Rms,
            norm_eps: 1e-5,
            logit_scale: 1.0,
            norm_width: None,
            logit_cap: None,
            predictor_threshold: 0.0,
            blocks: vec![block.clone(), block],
        };
        layer_shapes(&spec)
    }

    #[test]
    fn windows_are_seeded_and_end_at_the_wanted_count() {
        let tokens: Vec<u32> = (0..100).collect();
        let w = windows(&tokens, 8, 20, 1, Some(999));
        assert_eq!(w.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 4]);
        assert!(w.iter().all(|w| w[0] == 999) && w[0][1] < w[1][1]);
        assert_eq!(w, windows(&tokens, 8, 20, 1, Some(999)));
        assert_ne!(w, windows(&tokens, 8, 20, 2, Some(999)));
        assert_eq!(windows(&tokens, 4096, 10_000, 0, None), [tokens]);
        assert!(windows(&[], 8, 10, 0, None).is_empty());
    }

    #[test]
    fn relu_and_teal_share_a_layer_and_chess_passes_twice() {
        let layers = layers(Act::Relu);
        let subject =
            Subject { layers, weights: Box::new(NoWeights), hash: "hash".into(), budgets: Budgets::default() };
        let run = |spec: &str| {
            let steps = registry::parse(spec).unwrap();
            let mut forward = |tokens: &[u32], o: &mut dyn Observer| {
                let inputs = Proj::ALL.map(|proj| Point::Input { layer: 0, proj });
                for p in inputs.into_iter().chain([Point::Neurons { layer: 0 }, Point::Up { layer: 0 }]) {
                    for layer in 0..2 {
                        let p = match p {
                            Point::Input { proj, .. } => Point::Input { layer, proj },
                            Point::Neurons { .. } => Point::Neurons { layer },
                            _ => Point::Up { layer },
                        };
                        if o.wants(p) {
                            o.observe(p, 2, &[0.0, 1.0].repeat(tokens.len()));
                        }
                    }
                }
                Ok(())
            };
            let mut seen = vec![];
            let windows = vec![vec![1, 2, 3], vec![4]];
            let result = calibrate(&steps, &subject, &mut forward, &windows, |p, d, a| seen.push((p, d, a))).unwrap();
            (result, seen)
        };
        let ((plan, notes), seen) = run("relu,teal=0.5:prior=0");
        assert_eq!(seen, [(0, 3, 4), (0, 4, 4)]);
        plan.check(2).unwrap();
        let label = plan.method.as_str();
        assert_eq!((label, plan.entries.len()), ("relu,teal=0.5:prior=0", 2 * 6));
        let begin = |note: &str, with: &str| note.starts_with(with);
        assert!(
            notes.len() == 3 && begin(&notes[0], "hot neurons") && begin(&notes[1], "firing together"),
            "two of `relu`, one on what `teal` may not decide: {notes:?}"
        );
        assert_eq!(plan.calibration_tokens, 4);
        assert!(plan.entries.iter().all(|e| e.kept == Some(0.5)));
        assert!(!plan.entries.iter().any(|e| matches!(e.rule, Rule::Inputs { proj: Proj::Up | Proj::Down, .. })));
        let ((plan, _), seen) = run("chess=0.5:norms=0");
        assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), [0, 0, 1, 1]);
        assert_eq!(plan.entries.len(), 2 * 3);
    }

    #[test]
    fn a_nan_stops_the_pass_with_its_point() {
        let point = Point::Input { layer: 1, proj: Proj::O };
        let mut forward = |_: &[u32], o: &mut dyn Observer| {
            o.observe(point, 2, &[1.0, f32::NAN]);
            Ok(())
        };
        let e = observe(&mut forward, &[vec![1], vec![2]], vec![point.into()], |_, _| {}).unwrap_err().to_string();
        assert!(e.contains("layers.1.attn.o.input"), "{e}");
    }
}
