//! Neurons that follow the prompt: how strongly prefill used each, and the list that decode keeps.

use super::compiled::NeuronRule;
use lacuna_core::plan::Cut;
use lacuna_kernels::{isa, select};

/// How one layer's neurons were used by the prompt.
#[derive(Debug, Default)]
pub(super) struct PromptNeurons {
    /// Sum over tokens of the squared score, relative to the token's own norm (GRIFFIN's statistic).
    sums: Vec<f32>,
    /// The strongest, ascending; empty until asked for.
    list: Vec<u32>,
}

/// Adds the products `act(gate) * up` of some tokens of a prompt; `first` begins a new prompt.
pub(super) fn remember(
    prompts: &mut Vec<PromptNeurons>,
    layer: usize,
    rule: &NeuronRule,
    first: bool,
    products: &[f32],
    inner: usize,
) {
    if !matches!(rule.selector.cut, Cut::Prompt { .. }) {
        return;
    }
    if prompts.len() <= layer {
        prompts.resize_with(layer + 1, PromptNeurons::default);
    }
    let prompt = &mut prompts[layer];
    prompt.list.clear();
    if first {
        prompt.sums.clear();
    }
    prompt.sums.resize(inner, 0.0);
    let scale = rule.selector.scale.as_ref().map(|s| s.values());
    let mut scores = vec![0.0; inner];
    for row in products.chunks_exact(inner) {
        match scale {
            Some(scale) => scores.iter_mut().zip(row).zip(scale).for_each(|((o, h), c)| *o = (h * c) * (h * c)),
            None => scores.iter_mut().zip(row).for_each(|(o, h)| *o = h * h),
        }
        let norm: f32 = scores.iter().sum();
        if norm > 0.0 {
            prompt.sums.iter_mut().zip(&scores).for_each(|(s, v)| *s += v / norm);
        }
    }
}

/// The list of a rule that follows the prompt: the strongest neurons, or all where there was no prompt. Empty for other
/// rules.
pub(super) fn list<'a>(
    prompts: &'a mut Vec<PromptNeurons>,
    layer: usize,
    rule: &NeuronRule,
    inner: usize,
) -> &'a [u32] {
    let Cut::Prompt { count } = rule.selector.cut else { return &[] };
    if prompts.len() <= layer {
        prompts.resize_with(layer + 1, PromptNeurons::default);
    }
    let PromptNeurons { sums, list } = &mut prompts[layer];
    if list.is_empty() {
        if sums.len() == inner {
            let mut scratch = select::TopScratch::default();
            select::top_k(isa::get(), sums, None, count, &mut scratch, (list, &mut Vec::new()));
        } else {
            list.extend(0..inner as u32);
        }
    }
    list
}
