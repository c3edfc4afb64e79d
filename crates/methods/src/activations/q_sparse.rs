//! `q-sparse`: the K largest inputs of every projection, by rank.
//!
//! Wang et al., Q-Sparse (arXiv:2407.10969). One top-K mask per input vector, shared by the projections that read it
//! (four selections per layer); exact, per token, ties to the lower channel. This is the inference side. The paper's models
//! were trained so, and divide what is kept by its Euclidean norm, `y = W (x * M) / ||x * M||`: `rescale=1` does that, in
//! prompts too, because such models compute nothing else. It is off by default: no such checkpoint is public, and it makes
//! nonsense of other models. Needs no calibration text.

use crate::common::{SPARSITY, projections, readers, switch, top};
use lacuna_core::{
    method::{Citation, Method, MethodError, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::Site,
    weight::Orientation,
};

/// Top-K inputs.
#[derive(Debug)]
pub struct QSparse;

impl Method for QSparse {
    fn name(&self) -> &'static str {
        "q-sparse"
    }

    fn title(&self) -> &'static str {
        "Q-Sparse, top-K inputs"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Q-Sparse: All Large Language Models can be Fully Sparsely-Activated (2024)",
            arxiv: Some("2407.10969"),
        }
    }

    fn summary(&self) -> &'static str {
        "Keeps the K largest inputs of every projection, exactly K for every token, without a calibration text."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            switch("rescale", "1: divide what is kept by its norm, for models trained so; 0: for all others", false),
        ];
        PARAMS
    }

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::InputMajor]
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            for proj in projections(shape).filter(|p| shape.observed_as(*p) == *p) {
                let inputs = shape.projection(proj).map_or(0, |p| p.1);
                let (selector, kept) = top(inputs, None, ctx.dropped(layer, proj, params.get("sparsity")));
                let selector = if params.get("rescale") >= 0.5 { selector.to_unit() } else { selector };
                let same = |proj| Entry { layer, rule: Rule::inputs(proj, selector.clone()), kept: Some(kept) };
                entries.extend(readers(shape, proj).into_iter().map(same));
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NoWeights, kept_of, layers, planned};

    #[test]
    fn exactly_k_stay_and_readers_of_one_vector_share_the_mask() {
        let entries = planned(&QSparse, &[("sparsity", 0.625)], &layers(1, "silu"), &NoWeights, |_, _| vec![]);
        let x = [0.1, -3.0, 2.0, 0.5, -0.2, 1.0, 0.0, -0.7];
        assert_eq!(entries.len(), 7);
        assert!(entries.iter().all(|e| kept_of(e.rule.selector(), &x) == [1, 2, 5]));
        let larger: Vec<f32> = x.iter().map(|x| 7.5 * x).collect();
        assert_eq!(kept_of(entries[0].rule.selector(), &larger), [1, 2, 5], "the scale of x does not matter");
        assert_eq!(entries[0].rule.selector(), entries[2].rule.selector());
        assert!(entries.iter().all(|e| !e.rule.selector().unit), "models that were not trained so stay as they are");
        let entries =
            planned(&QSparse, &[("sparsity", 0.5), ("rescale", 1.0)], &layers(1, "silu"), &NoWeights, |_, _| vec![]);
        assert!(entries.iter().all(|e| e.rule.selector().unit));
    }
}
