//! What several methods here share: which projections a layer has, and thresholds read from histograms.

use lacuna_core::{
    method::{LayerShape, Method, MethodError, MlpShape, ParamSpec, PlanContext},
    plan::{Cut, Entry, Rule, Selector},
    site::{Point, Proj},
    statistics::Observation,
    tensor::Tensor,
};
use std::ops::Bound;

/// The share that most methods take as their first parameter.
pub const SPARSITY: ParamSpec = ParamSpec {
    name: "sparsity",
    doc: "share of the entries that is dropped",
    default: 0.5,
    range: (Bound::Included(0.0), Bound::Excluded(1.0)),
};

/// A parameter that is 0 (no) or 1 (yes).
pub const fn switch(name: &'static str, doc: &'static str, default: bool) -> ParamSpec {
    let default = if default { 1.0 } else { 0.0 };
    ParamSpec { name, doc, default, range: (Bound::Included(0.0), Bound::Included(1.0)) }
}

/// The projections of a layer, in the order of the forward pass.
pub fn projections(shape: &LayerShape) -> impl Iterator<Item = Proj> + '_ {
    Proj::ALL.into_iter().filter(|p| shape.projection(*p).is_some())
}

/// The projections of a layer that read the same vector as `proj`.
pub fn readers(shape: &LayerShape, proj: Proj) -> Vec<Proj> {
    projections(shape).filter(|p| shape.observed_as(*p) == shape.observed_as(proj)).collect()
}

/// Where the vector that enters `proj` is observed.
pub fn input_point(layer: usize, shape: &LayerShape, proj: Proj) -> Point {
    Point::Input { layer, proj: shape.observed_as(proj) }
}

/// Layers with one MLP (not a mixture of experts) and its neurons.
pub fn mlp_layers<'a>(ctx: &PlanContext<'a>) -> impl Iterator<Item = (usize, usize)> + 'a {
    ctx.layers.iter().enumerate().filter_map(|(layer, shape)| Some((layer, shape.mlp.as_ref()?.inner)))
}

/// Layers with neurons, and the shape of their MLP or of each of their experts.
fn neuron_layers<'a>(ctx: &PlanContext<'a>) -> impl Iterator<Item = (usize, &'a MlpShape)> {
    let shape = |s: &'a LayerShape| s.mlp.as_ref().or(s.experts.as_ref());
    ctx.layers.iter().enumerate().filter_map(move |(layer, s)| Some((layer, shape(s)?)))
}

/// Histograms of the activated gates, in experts too.
pub fn neuron_magnitudes(ctx: &PlanContext<'_>) -> Vec<Observation> {
    neuron_layers(ctx).map(|(layer, _)| Observation::magnitudes(Point::Neurons { layer })).collect()
}

/// A rule on the neurons of every layer, those of experts included: `rule(layer, shape)` says which, and the share it
/// keeps where that is known. Rules made here must not hold vectors, which experts do not share.
///
/// # Errors
/// Statistics that are not finite, what `rule` says, or no layers with neurons.
pub fn neurons(
    method: &dyn Method,
    ctx: &PlanContext<'_>,
    mut rule: impl FnMut(usize, &MlpShape) -> Result<(Rule, Option<f32>), MethodError>,
) -> Result<Vec<Entry>, MethodError> {
    ctx.statistics.check()?;
    let entry = |(layer, shape)| rule(layer, shape).map(|(rule, kept)| Entry { layer, rule, kept });
    let entries: Vec<Entry> = neuron_layers(ctx).map(entry).collect::<Result<_, _>>()?;
    if entries.is_empty() { not_applicable(method, "it has no MLP") } else { Ok(entries) }
}

/// [`neurons`] for methods that are right only where the activation returns exact zeros.
///
/// # Errors
/// As [`neurons`], and an activation that does not; the message sends to `instead`.
pub fn closed_neurons(
    method: &dyn Method,
    ctx: &PlanContext<'_>,
    instead: &str,
    rule: impl Fn(usize) -> (Rule, Option<f32>),
) -> Result<Vec<Entry>, MethodError> {
    neurons(method, ctx, |layer, shape| {
        if shape.exact_zeros {
            return Ok(rule(layer));
        }
        let (act, name) = (&shape.activation, method.name());
        let reason = format!(
            "its activation is `{act}`, which never returns exact zeros; `{name}` needs relu or relu2 (use `{instead}` here)"
        );
        not_applicable(method, reason)
    })
}

/// The selector that drops a share `dropped` of the scores seen at `point`, and the share it keeps of them.
///
/// # Errors
/// Nothing was seen there.
pub fn threshold(
    method: &dyn Method,
    ctx: &PlanContext<'_>,
    point: Point,
    scale: Option<Tensor>,
    dropped: f64,
) -> Result<(Selector, f32), MethodError> {
    let seen = ctx.statistics.scores(point, scale.as_ref());
    let seen = seen.ok_or_else(|| MethodError::NoStatistics { method: method.name().into(), point })?;
    if dropped <= 0.0 {
        // Without a score: one that underflows must not drop anything at the full budget.
        return Ok((Selector::non_zero(), seen.nonzero_share() as f32));
    }
    let threshold = seen.threshold(dropped);
    let kept = seen.kept_share(threshold) as f32;
    Ok((Selector { scale, unit: false, cut: Cut::Above { threshold } }, kept))
}

/// The selector that keeps `1 - dropped` of `width` entries by rank (at least one), and the share it keeps.
pub fn top(width: usize, scale: Option<Tensor>, dropped: f64) -> (Selector, f32) {
    let count = ((width as f64 * (1.0 - dropped)).round() as usize).clamp(1, width);
    (Selector { scale, unit: false, cut: Cut::Top { count } }, count as f32 / width as f32)
}

/// That the model has nothing for `method`.
pub fn not_applicable<T>(method: &dyn Method, reason: impl Into<String>) -> Result<T, MethodError> {
    Err(MethodError::NotApplicable { method: method.name().into(), reason: reason.into() })
}
