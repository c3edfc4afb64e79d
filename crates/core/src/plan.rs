//! What a recipe becomes for one model: for each place, what the engine skips and how it decides.
//!
//! How plans are stored is in [`stored`].

pub mod stored;

use crate::{site::Proj, tensor::Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the stored form; a reader refuses others.
pub const PLAN_VERSION: u32 = 2;

/// Longest plan file that is read, in bytes (a plan takes about 200 bytes per entry).
pub const PLAN_MAX_BYTES: u64 = 16 << 20;

/// Longest file of a plan's vectors and matrices that is read, in bytes.
pub const PLAN_SIDE_MAX_BYTES: u64 = 8 << 30;

/// Decides which entries of a vector stay: a score for each, and a cut.
///
/// The score is `|x_j| * scale_j`; at [`Stage::Gate`] it is `x_j` itself, signed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Selector {
    /// One factor per entry (WINA's column norms, the roots of CHESS's importances); none: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Tensor>,
    /// What is kept is divided by its Euclidean norm: part of what models trained with Q-Sparse compute, so that with such an
    /// entry prompts follow the plan too. For inputs of projections only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unit: bool,
    /// Which scores stay.
    #[serde(flatten)]
    pub cut: Cut,
}

/// Which scores stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "keep", rename_all = "kebab-case")]
pub enum Cut {
    /// What is not exactly zero; no score is computed.
    NonZero,
    /// Scores above the threshold (strictly).
    Above {
        /// Finite, and not negative except at [`Stage::Gate`].
        threshold: f32,
    },
    /// The `count` largest scores of each vector; of equal ones those that come first.
    Top {
        /// How many.
        count: usize,
    },
    /// Scores above `mean + multiple * std` of the vector's own scores (Spark Transformer's statistical top-k, as a mask).
    Gaussian {
        /// Standard deviations above the mean.
        multiple: f32,
    },
    /// The same positions for every token.
    Listed {
        /// Ascending positions.
        list: Tensor,
    },
    /// Neurons that were strongest over the prompt: `count` positions, found again with every prompt (GRIFFIN,
    /// CoreMatching).
    Prompt {
        /// How many.
        count: usize,
    },
}

impl Selector {
    /// Keeps what is not exactly zero.
    pub fn non_zero() -> Self {
        Self { scale: None, unit: false, cut: Cut::NonZero }
    }

    /// Keeps `|x_j| > threshold`.
    pub fn above(threshold: f32) -> Self {
        Self { scale: None, unit: false, cut: Cut::Above { threshold } }
    }

    /// Keeps the `count` largest `|x_j|`.
    pub fn top(count: usize) -> Self {
        Self { scale: None, unit: false, cut: Cut::Top { count } }
    }

    /// The same cut on `|x_j| * scale_j`.
    pub fn scaled(self, scale: Tensor) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// The same selection, divided by its Euclidean norm.
    pub fn to_unit(self) -> Self {
        Self { unit: true, ..self }
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let list = if let Cut::Listed { list } = &self.cut { Some(list) } else { None };
        self.scale.iter().chain(list)
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let list = if let Cut::Listed { list } = &mut self.cut { Some(list) } else { None };
        self.scale.iter_mut().chain(list)
    }

    /// Checks what is known without the model, for a selector that is `signed` (at the gate) or not.
    fn check(&self, signed: bool) -> Result<(), String> {
        match self.cut {
            Cut::Above { threshold } if !(threshold.is_finite() && (signed || threshold >= 0.0)) => {
                Err(format!("has threshold {threshold}, not a finite number >= 0"))
            }
            Cut::Gaussian { multiple } if !multiple.is_finite() => Err(format!("has multiple {multiple}, not finite")),
            _ => Ok(()),
        }
    }

    /// Checks the selector against the length of the vectors it is used on.
    ///
    /// # Errors
    /// A scale of another length, or a list that is not ascending or leaves the vector.
    pub fn check_width(&self, width: usize) -> Result<(), String> {
        if let Some(scale) = &self.scale
            && scale.values().len() != width
        {
            return Err(format!("has a scale of {} numbers for {width} entries", scale.values().len()));
        }
        let Cut::Listed { list } = &self.cut else { return Ok(()) };
        let positions = list.positions();
        let ascending = positions.array_windows().all(|[a, b]| a < b);
        if !ascending || positions.last().is_some_and(|p| *p as usize >= width) {
            return Err(format!("has a list that is not ascending below {width}"));
        }
        Ok(())
    }
}

/// What a rule on neurons looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The gate before its activation, signed.
    Gate,
    /// The activated gate, by magnitude.
    #[default]
    Activated,
}

/// What the dropped inputs pass through instead: `y += U (V (x * dropped))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LowRank {
    /// `V`, `[rank, inputs]`.
    pub down: Tensor,
    /// `U`, `[outputs, rank]`.
    pub up: Tensor,
}

/// A low-rank predictor of active neurons: `score = B act(A h)` with `h` the normalised input of the MLP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Predictor {
    /// `A`, `[rank, width]`.
    pub down: Tensor,
    /// `B`, `[neurons, rank]`.
    pub up: Tensor,
    /// Whether there is a ReLU between them (PowerInfer) or nothing (Deja Vu).
    pub relu: bool,
}

/// What is skipped at one place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "kebab-case")]
pub enum Rule {
    /// Input channels of one projection: the vector that enters it is selected, the kept columns are read (axpy form).
    Inputs {
        /// Which projection.
        #[serde(with = "proj_name")]
        proj: Proj,
        /// Which channels stay.
        selector: Selector,
        /// What the others pass through; none: they are dropped.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        low_rank: Option<LowRank>,
    },
    /// Neurons of the MLP: selected on the gate; rows of up (dot form) and columns of down (axpy form) follow.
    Neurons {
        /// What is looked at.
        #[serde(default)]
        on: Stage,
        /// Which neurons stay.
        selector: Selector,
        /// Which of those stay for down, selected on `act(gate) * up`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        then: Option<Selector>,
    },
    /// Neurons of the MLP that a predictor expects to matter: rows of gate and up and columns of down follow.
    Predicted {
        /// The predictor.
        predictor: Predictor,
        /// Which neurons stay, by signed score.
        selector: Selector,
        /// Which of those stay for down, selected on `act(gate) * up`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        then: Option<Selector>,
    },
}

impl Rule {
    /// A rule on the inputs of `proj` without a low-rank part.
    pub fn inputs(proj: Proj, selector: Selector) -> Self {
        Rule::Inputs { proj, selector, low_rank: None }
    }

    /// A rule on the activated gate.
    pub fn neurons(selector: Selector) -> Self {
        Rule::Neurons { on: Stage::Activated, selector, then: None }
    }

    /// The projections whose weights this rule decides about.
    pub fn covers(&self) -> &'static [Proj] {
        match self {
            Rule::Neurons { .. } => &[Proj::Up, Proj::Down],
            Rule::Predicted { .. } => &[Proj::Gate, Proj::Up, Proj::Down],
            Rule::Inputs { proj, .. } => {
                let i = Proj::ALL.iter().position(|p| p == proj).expect("ALL lists every projection");
                &Proj::ALL[i..=i]
            }
        }
    }

    /// How entries are selected.
    pub fn selector(&self) -> &Selector {
        match self {
            Rule::Inputs { selector, .. } | Rule::Neurons { selector, .. } | Rule::Predicted { selector, .. } => {
                selector
            }
        }
    }

    /// Name of the place, for people: `attn.q`, `mlp neurons`.
    pub fn place(&self) -> &'static str {
        match self {
            Rule::Inputs { proj, .. } => proj.name(),
            Rule::Neurons { .. } | Rule::Predicted { .. } => "mlp neurons",
        }
    }

    /// Everything of it that lies in the side file.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let (selector, then, pair) = match self {
            Rule::Inputs { selector, low_rank, .. } => (selector, None, low_rank.as_ref().map(|l| [&l.down, &l.up])),
            Rule::Neurons { selector, then, .. } => (selector, then.as_ref(), None),
            Rule::Predicted { predictor, selector, then } => {
                (selector, then.as_ref(), Some([&predictor.down, &predictor.up]))
            }
        };
        selector.tensors().chain(then.into_iter().flat_map(|s| s.tensors())).chain(pair.into_iter().flatten()).collect()
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let (selector, then, pair) = match self {
            Rule::Inputs { selector, low_rank, .. } => {
                (selector, None, low_rank.as_mut().map(|l| [&mut l.down, &mut l.up]))
            }
            Rule::Neurons { selector, then, .. } => (selector, then.as_mut(), None),
            Rule::Predicted { predictor, selector, then } => {
                (selector, then.as_mut(), Some([&mut predictor.down, &mut predictor.up]))
            }
        };
        let then = then.into_iter().flat_map(|s| s.tensors_mut());
        selector.tensors_mut().chain(then).chain(pair.into_iter().flatten()).collect()
    }

    fn check(&self) -> Result<(), String> {
        let (signed, then) = match self {
            Rule::Inputs { .. } => (false, &None),
            Rule::Neurons { on, then, .. } => (*on == Stage::Gate, then),
            Rule::Predicted { then, .. } => (true, then),
        };
        if matches!((self, &self.selector().cut), (Rule::Inputs { .. }, Cut::Prompt { .. })) {
            return Err("selects inputs by the prompt; only neurons can be selected so".into());
        }
        let units = self.selector().unit || then.as_ref().is_some_and(|t| t.unit);
        if units && !matches!(self, Rule::Inputs { low_rank: None, .. }) {
            return Err("divides by a norm, which only rules on inputs without a low-rank part do".into());
        }
        self.selector().check(signed)?;
        match then {
            Some(t) if !matches!(t.cut, Cut::NonZero | Cut::Above { .. } | Cut::Top { .. }) => {
                Err("selects products by their spread, a list or the prompt; a threshold or a count is needed there"
                    .into())
            }
            Some(t) => t.check(false),
            None => Ok(()),
        }
    }
}

/// One entry of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Layer, from 0.
    pub layer: usize,
    /// What is skipped.
    #[serde(flatten)]
    pub rule: Rule,
    /// Share of entries that calibration saw kept, 0 to 1; what the dense fall-back compares with the break-even share.
    /// `None` where nothing was measured.
    #[serde(default)]
    pub kept: Option<f32>,
}

/// A plan, bound to one model by hash. The engine follows it and never asks which method wrote it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// Hash of the model it was made for (hex).
    pub model: String,
    /// The method and its parameters, for people and reports.
    pub method: String,
    /// Tokens of calibration text behind it (0: none needed).
    pub calibration_tokens: usize,
    /// What is skipped where.
    pub entries: Vec<Entry>,
    /// How tokens are guessed and checked; `None`: one pass per token.
    pub decoding: Option<Decoding>,
}

/// How the decoding loop guesses tokens and checks them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decoding {
    /// Where guesses come from.
    pub draft: DraftSource,
    /// Which guesses are accepted.
    pub accept: Accept,
    /// Most tokens checked in one pass, 1 to [`MAX_CHECKED`].
    pub most: usize,
}

/// Most tokens that one pass checks.
pub const MAX_CHECKED: usize = 64;

/// Where guesses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DraftSource {
    /// The candidates that earlier passes gave for the same tokens (Token Recycling); the plan's entries check.
    TokenRecycling,
    /// Steps by the plan's entries; the dense model checks.
    Plan,
}

/// Which guesses are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum Accept {
    /// Those that decoding without guesses would choose: the text stays the same.
    Exact,
    /// Those whose checked probability is at least this (Sirius).
    Threshold {
        /// 0 to 1.
        probability: f32,
    },
}

impl Decoding {
    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_CHECKED).contains(&self.most) {
            return Err(format!("checks {} tokens in a pass, outside 1 to {MAX_CHECKED}", self.most));
        }
        match self.accept {
            Accept::Threshold { probability } if !(0.0..=1.0).contains(&probability) => {
                Err(format!("accepts from probability {probability} on, outside [0, 1]"))
            }
            Accept::Threshold { .. } if self.draft == DraftSource::TokenRecycling => {
                Err("accepts recycled tokens by a threshold; only exact acceptance is known for them".into())
            }
            _ => Ok(()),
        }
    }
}

/// Joins the entries of several methods, first come first served: an entry whose projections are already decided is
/// left out and returned in the second list, so that a caller can say so.
pub fn compose(lists: impl IntoIterator<Item = Vec<Entry>>) -> (Vec<Entry>, Vec<Entry>) {
    let mut kept: Vec<Entry> = Vec::new();
    let mut left_out = Vec::new();
    for entry in lists.into_iter().flatten() {
        if kept.iter().any(|k| k.layer == entry.layer && overlap(k, &entry)) {
            left_out.push(entry);
        } else {
            kept.push(entry);
        }
    }
    (kept, left_out)
}

fn overlap(a: &Entry, b: &Entry) -> bool {
    a.rule.covers().iter().any(|p| b.rule.covers().contains(p))
}

impl Plan {
    /// Checks what can be checked without the model's weights: layers in range, numbers finite and in range, no
    /// projection decided twice.
    pub fn check(&self, layers: usize) -> Result<(), String> {
        if let Some(decoding) = &self.decoding {
            decoding.check().map_err(|problem| format!("decoding {problem}"))?;
        }
        let mut seen = std::collections::HashSet::new();
        for (i, e) in self.entries.iter().enumerate() {
            if e.layer >= layers {
                return Err(format!("entry {i} names layer {}, but the model has {layers} layers", e.layer));
            }
            e.rule.check().map_err(|problem| format!("entry {i} (layer {}) {problem}", e.layer))?;
            if let Some(kept) = e.kept
                && !(0.0..=1.0).contains(&kept)
            {
                return Err(format!("entry {i} (layer {}) has kept share {kept}, outside [0, 1]", e.layer));
            }
            for p in e.rule.covers() {
                if !seen.insert((e.layer, *p)) {
                    return Err(format!("entry {i} decides about layers.{}.{p} a second time", e.layer));
                }
            }
        }
        Ok(())
    }

    /// The plan's tensors by name, each once.
    pub fn tensors(&self) -> BTreeMap<&str, &Tensor> {
        self.entries.iter().flat_map(|e| e.rule.tensors()).map(|t| (t.name(), t)).collect()
    }
}

mod proj_name {
    use crate::site::Proj;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(p: &Proj, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(p.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Proj, D::Error> {
        let name = String::deserialize(d)?;
        Proj::parse(&name).ok_or_else(|| D::Error::custom(format!("unknown projection `{name}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composing_keeps_the_first_word() {
        let input = |proj| Entry { layer: 0, rule: Rule::inputs(proj, Selector::non_zero()), kept: None };
        let neurons = Entry { layer: 0, rule: Rule::neurons(Selector::non_zero()), kept: None };
        let (kept, out) = compose([vec![neurons], Proj::ALL.map(input).to_vec()]);
        assert_eq!(kept.len(), 6, "neurons, q, k, v, o, gate");
        assert_eq!(out, [input(Proj::Up), input(Proj::Down)]);
    }

    #[test]
    fn numbers_must_fit_their_place() {
        let plan = |rule: Rule| Plan {
            version: PLAN_VERSION,
            model: "abc".into(),
            method: "by hand".into(),
            calibration_tokens: 0,
            entries: vec![Entry { layer: 0, rule, kept: None }],
            decoding: None,
        };
        let error = |rule: Rule| plan(rule).check(1).unwrap_err();
        assert!(error(Rule::inputs(Proj::Q, Selector::above(f32::NAN))).contains("NaN"));
        assert!(error(Rule::inputs(Proj::Q, Selector::above(-1.0))).contains("-1"));
        assert!(
            error(Rule::inputs(Proj::Q, Selector { scale: None, unit: false, cut: Cut::Prompt { count: 3 } }))
                .contains("prompt")
        );
        let checked = |draft, accept, most| {
            let decoding = Some(Decoding { draft, accept, most });
            Plan { entries: Vec::new(), decoding, ..plan(Rule::neurons(Selector::non_zero())) }.check(1)
        };
        let accept = |probability| Accept::Threshold { probability };
        assert!(checked(DraftSource::Plan, accept(0.5), 8).is_ok());
        assert!(checked(DraftSource::Plan, accept(f32::NAN), 8).unwrap_err().contains("NaN"));
        assert!(checked(DraftSource::Plan, Accept::Exact, 65).unwrap_err().contains("65"));
        assert!(checked(DraftSource::TokenRecycling, accept(0.5), 8).is_err());
        let at_gate = Rule::Neurons { on: Stage::Gate, selector: Selector::above(-1.0), then: None };
        plan(at_gate).check(1).unwrap();
        let mut twice = plan(Rule::neurons(Selector::non_zero()));
        twice.entries.push(Entry { layer: 0, rule: Rule::inputs(Proj::Down, Selector::non_zero()), kept: None });
        assert!(twice.check(1).unwrap_err().contains("second time"));
        let scaled = Selector::above(1.0).scaled(Tensor::vector(vec![1.0; 3]));
        assert!(scaled.check_width(3).is_ok() && scaled.check_width(4).unwrap_err().contains("3 numbers"));
        let list =
            |l: &[u32]| Selector { scale: None, unit: false, cut: Cut::Listed { list: Tensor::list(l.to_vec()) } };
        assert!(list(&[0, 2]).check_width(3).is_ok());
        assert!(list(&[0, 3]).check_width(3).is_err() && list(&[1, 1]).check_width(3).is_err());
    }
}
