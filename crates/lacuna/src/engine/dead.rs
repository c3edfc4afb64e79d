//! Dead neurons: rows of gate and up and columns of down that structured pruning left as zeros. They add nothing, so the
//! engine computes with smaller matrices: exact (sums have fewer zeros in them), and cheap to find.

use crate::model::{
    spec::MlpSpec,
    weights::{Block, Linear, Mlp, Model},
};
use lacuna_core::{
    bytes::Bytes,
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::convert::decode_run;
use std::sync::Arc;

use super::compiled::CompiledPlan;

/// Rows of up that are looked at before all are: a model without dead neurons is not read for them.
const SAMPLE: usize = 64;

/// A model without its dead neurons.
pub(super) struct Live {
    /// The model.
    pub model: Arc<Model>,
    /// Neurons that are left out.
    pub dropped: usize,
    /// Neurons of all MLPs before.
    pub all: usize,
}

/// `model` without dead neurons; `None` if it has none. Layers whose MLP the plan reads by rows or columns stay.
pub(super) fn without_dead(model: &Arc<Model>, plan: Option<&CompiledPlan>) -> Option<Live> {
    let mut live: Option<Model> = None;
    let (mut dropped, mut all) = (0, 0);
    for (layer, block) in model.blocks.iter().enumerate() {
        let (MlpSpec::Gated { inner } | MlpSpec::Plain { inner }) = model.spec.blocks[layer].mlp else { continue };
        all += inner;
        if planned(plan, layer) || block.predictor.is_some() {
            continue;
        }
        let Some(kept) = kept(block, inner) else { continue };
        let Some(mlp) = narrowed(&block.mlp, &kept) else { continue };
        dropped += inner - kept.len();
        let model = live.get_or_insert_with(|| Model::clone(model));
        model.blocks[layer].mlp = mlp;
        match &mut model.spec.blocks[layer].mlp {
            MlpSpec::Gated { inner } | MlpSpec::Plain { inner } => *inner = kept.len(),
            MlpSpec::Experts { .. } | MlpSpec::ReluExperts { .. } => {}
        }
    }
    live.map(|model| Live { model: Arc::new(model), dropped, all })
}

fn planned(plan: Option<&CompiledPlan>, layer: usize) -> bool {
    let Some(rules) = plan.and_then(|p| p.layers.get(layer)) else { return false };
    rules.neurons.is_some() || [Proj::Gate, Proj::Up, Proj::Down].iter().any(|p| rules.input(*p).is_some())
}

/// The neurons that do something, in whole blocks of the format of down; `None` if all do, or what there is cannot be cut.
fn kept(block: &Block, inner: usize) -> Option<Vec<usize>> {
    let (up, down) = (&block.linear(Proj::Up)?.weight, &block.linear(Proj::Down)?.weight);
    let gate = block.linear(Proj::Gate).map(|l| &l.weight);
    let cut = |w: &Weight| w.orientation() == Orientation::OutputMajor;
    if !(cut(up) && cut(down) && gate.is_none_or(cut)) || inner == 0 {
        return None;
    }
    let mut row = vec![0.0; up.inputs()];
    let mut zero = |w: &Weight, j: usize| {
        let m = w.matrix();
        decode_run(m.format(), m.row(j), &mut row);
        row.iter().all(|x| *x == 0.0)
    };
    // Those that compress left are the last.
    let sample = (0..SAMPLE).map(|i| i * inner / SAMPLE).chain([inner - 1]);
    if !sample.into_iter().any(|j| zero(up, j)) {
        return None;
    }
    let mut dead: Vec<bool> = (0..inner).map(|j| zero(up, j) && gate.is_none_or(|g| zero(g, j))).collect();
    let mut row = vec![0.0; inner];
    let m = down.matrix();
    for r in 0..m.rows() {
        decode_run(m.format(), m.row(r), &mut row);
        dead.iter_mut().zip(&row).for_each(|(d, w)| *d &= *w == 0.0);
    }
    let unit = down.format().block_len();
    let live = |j: usize| dead[j / unit * unit..(j / unit * unit + unit).min(inner)].iter().any(|d| !d);
    let mut kept: Vec<usize> = (0..inner).filter(|j| live(*j)).collect();
    if kept.is_empty() {
        // A matrix has at least one row.
        kept.extend(0..unit.min(inner));
    }
    (kept.len() < inner).then_some(kept)
}

fn narrowed(mlp: &Mlp, kept: &[usize]) -> Option<Mlp> {
    let mut mlp = mlp.clone();
    match &mut mlp {
        Mlp::Gated(g) => {
            rows(&mut g.gate, kept)?;
            rows(&mut g.up, kept)?;
            columns(&mut g.down, kept)?;
        }
        Mlp::Plain { up, down } => {
            rows(up, kept)?;
            columns(down, kept)?;
        }
        Mlp::Experts { .. } | Mlp::ReluExperts { .. } => return None,
    }
    Some(mlp)
}

/// The rows `kept`; without a copy where they are the first ones.
fn rows(linear: &mut Linear, kept: &[usize]) -> Option<()> {
    let w = &linear.weight;
    let m = w.matrix();
    let bytes = if kept.iter().enumerate().all(|(i, j)| i == *j) {
        w.bytes().slice(0..kept.len() * m.row_bytes())?
    } else {
        Bytes::from(kept.iter().flat_map(|j| m.row(*j)).copied().collect::<Vec<u8>>())
    };
    linear.bias = linear.bias.as_ref().map(|b| kept.iter().map(|j| b[*j]).collect());
    linear.weight = Weight::new(w.format(), Orientation::OutputMajor, kept.len(), w.inputs(), bytes)?;
    Some(())
}

/// The columns `kept`, which are whole blocks of the format.
fn columns(linear: &mut Linear, kept: &[usize]) -> Option<()> {
    let w = &linear.weight;
    let (m, unit, size) = (w.matrix(), w.format().block_len(), w.format().block_bytes());
    let blocks: Vec<usize> = kept.iter().filter(|j| j.is_multiple_of(unit)).map(|j| j / unit).collect();
    let row = |r: usize| {
        let row = m.row(r);
        blocks.iter().flat_map(move |b| &row[b * size..(b + 1) * size]).copied()
    };
    let bytes: Vec<u8> = (0..m.rows()).flat_map(row).collect();
    linear.weight = Weight::new(w.format(), Orientation::OutputMajor, w.outputs(), kept.len(), bytes.into())?;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::{Engine, Options},
        model::{LoadOptions, load},
        reference,
    };
    use lacuna_kernels::{Format, convert::encode_run};
    use std::path::Path;

    /// A fixture whose neurons `dead(layer, j)` are zeros, in another format.
    fn model(name: &str, format: Format, dead: impl Fn(usize, usize) -> bool) -> Arc<Model> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let mut model = load(&path, &LoadOptions::default()).unwrap();
        for (layer, block) in model.blocks.iter_mut().enumerate() {
            for proj in [Proj::Gate, Proj::Up, Proj::Down] {
                let Some(linear) = block.linear_mut(proj) else { continue };
                let w = &linear.weight;
                let (outputs, inputs) = (w.outputs(), w.inputs());
                let mut all = crate::compress::decoded(w);
                let neuron = |i: usize| if proj == Proj::Down { i % inputs } else { i / inputs };
                all.iter_mut().enumerate().filter(|(i, _)| dead(layer, neuron(*i))).for_each(|(_, w)| *w = 0.0);
                let format = if inputs.is_multiple_of(format.block_len()) { format } else { Format::F32 };
                let mut bytes = vec![0; format.run_bytes(all.len()).unwrap()];
                encode_run(format, &all, &mut bytes);
                linear.weight = Weight::new(format, Orientation::OutputMajor, outputs, inputs, bytes.into()).unwrap();
            }
        }
        Arc::new(model)
    }

    #[test]
    fn what_is_left_computes_the_same() {
        for name in ["llama2", "gpt2", "opt", "phi3", "gpt-neox", "gemma2", "qwen3"] {
            // Every third neuron, in the last block the last half.
            let dead = |layer: usize, j: usize| if layer == 0 { j % 3 == 1 } else { j >= 20 };
            let full = model(name, Format::F32, dead);
            let live = without_dead(&full, None).unwrap_or_else(|| panic!("{name}"));
            let inner = crate::calibrate::layer_shapes(&full.spec)[0].mlp.as_ref().unwrap().inner;
            assert_eq!(live.all, inner * full.blocks.len(), "{name}");
            assert_eq!(live.model.blocks[1].linear(Proj::Down).unwrap().weight.inputs(), 20, "{name}");
            let tokens = [1, 5, 9, 2, 7];
            let [a, b] = [&full, &live.model].map(|m| reference::logits(m, &tokens).unwrap());
            let range = a.iter().fold(0.0_f32, |r, x| r.max(x.abs()));
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * range), "{name}");
            let run = |m: &Arc<Model>| {
                let mut session =
                    Engine::new(m.clone(), Options { threads: 1, ..Options::default() }).unwrap().session(0).unwrap();
                session.prefill(&tokens).unwrap().to_vec()
            };
            let (a, b) = (run(&full), run(&live.model));
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-4 * range), "{name}");
        }
    }

    #[test]
    fn models_without_dead_neurons_stay_and_so_does_what_a_zero_row_alone_would_not_decide() {
        assert!(without_dead(&model("llama2", Format::F32, |_, _| false), None).is_none());
        // A row of up alone is no dead neuron: the column of down is still there.
        let mut half = Model::clone(&model("llama2", Format::F32, |_, _| false));
        let up = half.blocks[0].linear_mut(Proj::Up).unwrap();
        let bytes = vec![0; up.weight.bytes().len()];
        up.weight = Weight::new(
            up.weight.format(),
            Orientation::OutputMajor,
            up.weight.outputs(),
            up.weight.inputs(),
            bytes.into(),
        )
        .unwrap();
        assert!(without_dead(&Arc::new(half), None).is_none());
    }
}
