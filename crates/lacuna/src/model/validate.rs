//! The last look at a spec, whatever made it: what the forward pass takes for granted.

use super::spec::{BlockSpec, Latent, MlpSpec, Position, Rope, Spec};
use crate::error::{Error, Result};

/// Checks counts, divisibility and ranges.
///
/// # Errors
/// [`Error::Config`] that names the quantity.
pub fn validate(file: &str, spec: &Spec) -> Result<()> {
    let wrong = |what: &str, problem: String| Error::config(file, what, problem);
    for (name, n) in [("vocabulary", spec.vocab), ("width", spec.width), ("context", spec.context)] {
        if n == 0 {
            return Err(wrong(name, "is 0".into()));
        }
    }
    for (i, rope) in spec.ropes.iter().enumerate() {
        rope_fits(rope).map_err(|p| wrong(&format!("rotary table {i}"), p))?;
    }
    if spec.blocks.is_empty() {
        return Err(wrong("blocks", "there are none".into()));
    }
    for (i, block) in spec.blocks.iter().enumerate() {
        block_fits(spec, block).map_err(|p| wrong(&format!("block {i}"), p))?;
    }
    Ok(())
}

fn rope_fits(rope: &Rope) -> Result<(), String> {
    if rope.dims == 0 || rope.dims % 2 == 1 || rope.freqs.len() != rope.dims / 2 {
        return Err(format!("{} frequencies for {} rotated components", rope.freqs.len(), rope.dims));
    }
    if !rope.freqs.iter().all(|f| f.is_finite()) || !rope.factor.is_finite() {
        return Err("a frequency is not finite".into());
    }
    Ok(())
}

fn block_fits(spec: &Spec, b: &BlockSpec) -> Result<(), String> {
    if b.heads == 0 || b.kv_heads == 0 || b.head_dim == 0 || !b.heads.is_multiple_of(b.kv_heads) {
        return Err(format!("{} query heads, {} key/value heads of {}", b.heads, b.kv_heads, b.head_dim));
    }
    if !(b.scale.is_finite() && b.scale > 0.0) {
        return Err(format!("the factor on the scores is {}", b.scale));
    }
    if b.window == Some(0) {
        return Err("a sliding window of 0 positions".into());
    }
    match (&spec.position, b.rope) {
        (Position::Rotary, Some(r)) => match spec.ropes.get(r) {
            Some(rope) if rope.dims <= b.head_dim => {}
            Some(rope) => return Err(format!("{} rotated components in a head of {}", rope.dims, b.head_dim)),
            None => return Err(format!("there is no rotary table {r}")),
        },
        (Position::Learned { .. }, None) => {}
        _ => return Err("rotary and learned positions are mixed".into()),
    }
    if !(b.residual_scale.is_finite() && b.residual_scale > 0.0) {
        return Err(format!("the factor on what it adds is {}", b.residual_scale));
    }
    b.latent.map_or(Ok(()), |l| latent_fits(spec, b, l))?;
    match b.mlp {
        MlpSpec::ReluExperts { experts, inner, .. } if inner > 0 && experts > 0 => Ok(()),
        MlpSpec::Experts { experts, active, inner, .. } if inner > 0 && active > 0 && active <= experts => Ok(()),
        MlpSpec::Gated { inner } | MlpSpec::Plain { inner } if inner > 0 => Ok(()),
        _ => Err(format!("the MLP {:?} has no neurons or no experts", b.mlp)),
    }
}

fn latent_fits(spec: &Spec, b: &BlockSpec, l: Latent) -> Result<(), String> {
    if l.kv_rank == 0 || l.q_rank == Some(0) || l.rope == 0 || l.value == 0 {
        return Err(format!("a latent or a part of a head has size 0 in {l:?}"));
    }
    if l.nope + l.rope != b.head_dim || b.kv_heads != b.heads {
        return Err(format!("{l:?} in {} heads of {} with {} keys", b.heads, b.head_dim, b.kv_heads));
    }
    if l.value > b.head_dim {
        return Err(format!("values of {} numbers are longer than keys of {}", l.value, b.head_dim));
    }
    match b.rope.and_then(|r| spec.ropes.get(r)) {
        Some(rope) if rope.dims == l.rope => Ok(()),
        _ => Err(format!("its rotary table does not rotate {} components", l.rope)),
    }
}
