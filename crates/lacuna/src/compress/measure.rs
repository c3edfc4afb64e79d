//! Errors of every projection at several settings, on the inputs that the dense model has there: what budgets are spread by.
//! And the bytes that it takes in the container there, if it goes into one.

use super::{
    Plan, Progress,
    block::{Runner, groups},
    choices::{Choice, place},
    tensors::packed,
};
use crate::{
    calibrate::layer_shapes,
    error::Result,
    model::{Model, source::Source},
};
use lacuna_core::{compress::Sight, site::Proj};
use std::{collections::BTreeMap, path::Path};

/// What became of a projection at one setting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tried {
    /// The error.
    pub error: f64,
    /// Bytes in the container.
    pub packed: Option<u64>,
}

/// The error of every projection (by its place) at each of the choices `tried` for it: of its outputs, relative to their
/// energy, where a text is given; of its weights otherwise. The spilled streams lie in `spill`.
///
/// # Errors
/// As compressing.
pub fn measure(
    plan: &Plan<'_>,
    (model, source): (&Model, &Source),
    spill: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
    tried: &dyn Fn(usize, Proj) -> Vec<Choice>,
) -> Result<BTreeMap<String, Vec<Tried>>> {
    let mut hidden = plan.embed(model, spill)?;
    let gram = plan.sight() == Sight::Gram;
    let (shapes, all) = (layer_shapes(&model.spec), model.blocks.len());
    let mut errors = BTreeMap::new();
    for (layer, shape) in shapes.iter().enumerate() {
        progress(Progress::Measured(layer, all));
        let task = plan.task(model, source, layer);
        let runner = Runner::new(model, layer, model.blocks[layer].clone(), plan.request.threads)?;
        let (block, _) = task.ordered(runner.pool());
        let runner = Runner::new(model, layer, block.clone(), plan.request.threads)?;
        for group in groups(shape).into_iter().filter(|g| block.linear(g[0]).is_some()) {
            let width = shape.projection(group[0]).map_or(0, |p| p.1);
            let seen = match &mut hidden {
                Some(hidden) => runner.observe(layer, hidden, &[(group[0], width)], gram)?.remove(&group[0]),
                None => None,
            };
            for proj in group {
                let Some(linear) = block.linear(proj) else { continue };
                let mut of = Vec::new();
                for choice in tried(layer, proj) {
                    let (changed, report) = task.layer(proj, linear, seen.as_ref(), runner.pool(), choice)?;
                    let piece = packed(layer, proj, &changed, linear.weight.format());
                    let error = report.output_error.unwrap_or(report.weight_error);
                    of.push(Tried { error, packed: piece.map(|p| p.data.len() as u64) });
                }
                errors.insert(place(layer, proj), of);
            }
        }
        if let (Some(hidden), true) = (&mut hidden, layer + 1 < all) {
            for i in 0..hidden.len() {
                let x = runner.run(&hidden.get(i)?, hidden.tokens(i))?;
                hidden.set(i, &x)?;
            }
        }
        super::release(model, layer);
    }
    progress(Progress::Measured(all, all));
    Ok(errors)
}
