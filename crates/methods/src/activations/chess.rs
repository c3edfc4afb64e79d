//! `chess`: CATS with a threshold per neuron, and thresholds on the inputs of q and o.
//!
//! He et al., CHESS (arXiv:2409.01366). Dropping neuron `i` costs about `(a_i u_i)^2`; `u_i` is not known before up is
//! computed, but its mean square `m_i` is stable. So keep where `a_i^2 m_i > T`, `T` the quantile over all tokens and
//! neurons of a layer: `|a_i| > sqrt(T / m_i)`, which is one threshold `sqrt(T)` on the score `|a_i| * sqrt(m_i)`. A
//! neuron with `m_i = 0` is always dropped. k and v stay dense because they go into the cache; q and o lose the inputs
//! of small magnitude (`attention=1`). The published importance leaves out how strongly down answers; a model whose up and
//! down rows balance each other is then ranked backwards (lacuna-stories, neurons only, at 25 %: KL 0.115 against 0.0061 of
//! CATS). So by default a neuron also counts with the norm of its column of down (KL 0.0011; 0.0034 with q and o, at fewer
//! bytes); `norms=0` is the paper's rule. Two passes over the text: the mean squares, then the scores.

use crate::common::{SPARSITY, input_point, mlp_layers, not_applicable, switch, threshold};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::{Point, Proj, Site},
    statistics::Observation,
    tensor::Tensor,
};

/// CHESS.
#[derive(Debug)]
pub struct Chess;

/// `sqrt(m_i)`, times the column norms of down where asked; `None` before the mean squares are known. In a plain MLP
/// there is no up to weigh with and every `m_i` is 1.
fn scale(params: &Params, ctx: &PlanContext<'_>, layer: usize) -> Option<Tensor> {
    let mlp = ctx.layers[layer].mlp.as_ref()?;
    let mut roots = match mlp.gated {
        true => ctx.statistics.moments(Point::Up { layer })?.mean_squares().iter().map(|m| m.sqrt() as f32).collect(),
        false => vec![1.0; mlp.inner],
    };
    if params.get("norms") >= 0.5 {
        let norms = ctx.weights.column_norms(layer, &[Proj::Down])?;
        roots.iter_mut().zip(norms.values()).for_each(|(r, c)| *r *= c);
    }
    Some(Tensor::vector(roots))
}

impl Method for Chess {
    fn name(&self) -> &'static str {
        "chess"
    }

    fn title(&self) -> &'static str {
        "CHESS, channel-wise thresholds"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification (2024)",
            arxiv: Some("2409.01366"),
        }
    }

    fn summary(&self) -> &'static str {
        "Drops neurons by activated gate times the usual size of their up output, and small inputs of q and o; k and v stay dense."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            switch("attention", "1: also drop small inputs of q and o", true),
            switch("norms", "1: also weigh neurons with the norms of down's columns, 0: as published", true),
        ];
        PARAMS
    }

    fn needs(&self, params: &Params, ctx: PlanContext<'_>) -> Needs {
        let mut observations = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            if shape.mlp.as_ref().is_some_and(|m| m.gated) {
                observations.push(Observation::moments(Point::Up { layer }));
            }
            let scale = shape.mlp.as_ref().and_then(|_| scale(params, &ctx, layer));
            observations.extend(scale.map(|s| Observation::scores(Point::Neurons { layer }, s)));
            if params.get("attention") >= 0.5 {
                let there = [Proj::Q, Proj::O].into_iter().filter(|p| shape.projection(*p).is_some());
                observations.extend(there.map(|p| Observation::magnitudes(input_point(layer, shape, p))));
            }
        }
        Needs { observations, tokens: 20_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        if mlp_layers(&ctx).next().is_none() {
            return not_applicable(self, "it has no MLP outside experts");
        }
        let sparsity = params.get("sparsity");
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            if params.get("attention") >= 0.5 {
                for proj in [Proj::Q, Proj::O].into_iter().filter(|p| shape.projection(*p).is_some()) {
                    let dropped = ctx.dropped(layer, proj, sparsity);
                    let (selector, kept) = threshold(self, &ctx, input_point(layer, shape, proj), None, dropped)?;
                    entries.push(Entry { layer, rule: Rule::inputs(proj, selector), kept: Some(kept) });
                }
            }
            if shape.mlp.is_none() {
                continue;
            }
            let point = Point::Up { layer };
            let missing = || MethodError::NoStatistics { method: self.name().into(), point };
            let scale = scale(params, &ctx, layer).ok_or_else(missing)?;
            let dropped = ctx.dropped(layer, Proj::Up, sparsity);
            let (selector, kept) = threshold(self, &ctx, Point::Neurons { layer }, Some(scale), dropped)?;
            entries.push(Entry { layer, rule: Rule::neurons(selector), kept: Some(kept) });
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        activations::cats::Cats,
        testing::{NoWeights, kept_of, layers, planned},
    };

    /// Rows of neurons and of up outputs: normal numbers, up scaled per channel by `size`.
    fn rows(size: impl Fn(usize) -> f32) -> impl FnMut(Point, usize) -> Vec<f32> {
        move |point, width| {
            let seed = if matches!(point, Point::Up { .. }) { 3 } else { 4 };
            let mut values = crate::testing::normal(seed, width * 400);
            if matches!(point, Point::Up { .. }) {
                values.iter_mut().enumerate().for_each(|(i, v)| *v = size(i % width) * v.signum());
            }
            values
        }
    }

    #[test]
    fn equal_mean_squares_give_the_mask_of_cats() {
        let chess =
            planned(&Chess, &[("sparsity", 0.4), ("norms", 0.0)], &layers(1, "silu"), &NoWeights, rows(|_| 2.0));
        let cats = planned(&Cats, &[("sparsity", 0.4)], &layers(1, "silu"), &NoWeights, rows(|_| 2.0));
        let neurons = chess.iter().find(|e| e.rule.place() == "mlp neurons").unwrap();
        assert!(
            (neurons.kept.unwrap() - 0.6).abs() < 0.01 && (neurons.kept.unwrap() - cats[0].kept.unwrap()).abs() < 0.01
        );
        let x = crate::testing::normal(9, 8);
        assert_eq!(kept_of(neurons.rule.selector(), &x), kept_of(cats[0].rule.selector(), &x));
        assert_eq!(chess.len(), 3, "q, o and the neurons; k and v stay dense");
    }

    #[test]
    fn a_channel_that_never_answers_is_always_dropped_and_loud_ones_stay() {
        let size = |i: usize| if i == 3 { 0.0 } else { (i + 1) as f32 };
        let chess = planned(&Chess, &[("sparsity", 0.5), ("norms", 0.0)], &layers(1, "silu"), &NoWeights, rows(size));
        let selector = chess.iter().find(|e| e.rule.place() == "mlp neurons").unwrap().rule.selector();
        assert!(!kept_of(selector, &[1e9; 8]).contains(&3));
        let kept = kept_of(selector, &[0.6; 8]);
        assert!(kept.contains(&7) && !kept.contains(&0), "{kept:?}");
    }

    /// The dropped sum of `a^2 m` is at most that of CATS at the same number of kept entries.
    #[test]
    fn the_expected_loss_is_at_most_that_of_cats() {
        let size = |i: usize| (i + 1) as f32;
        let (chess, cats) = (
            planned(&Chess, &[("sparsity", 0.5), ("norms", 0.0)], &layers(1, "silu"), &NoWeights, rows(size)),
            planned(&Cats, &[("sparsity", 0.5)], &layers(1, "silu"), &NoWeights, rows(size)),
        );
        let a = rows(size)(Point::Neurons { layer: 0 }, 8);
        let loss = |e: &Entry| {
            let (mut lost, mut kept) = (0.0, 0);
            for row in a.chunks_exact(8) {
                let stay = kept_of(e.rule.selector(), row);
                kept += stay.len();
                let gone = (0..8).filter(|i| !stay.contains(&(*i as u32)));
                lost += gone.map(|i| (row[i] * size(i)).powi(2)).sum::<f32>();
            }
            (lost, kept)
        };
        let (mine, theirs) = (loss(chess.last().unwrap()), loss(&cats[0]));
        assert!((mine.1 as f32 - theirs.1 as f32).abs() < 0.02 * a.len() as f32, "{} and {} kept", mine.1, theirs.1);
        assert!(mine.0 < theirs.0, "{} against {}", mine.0, theirs.0);
    }
}
