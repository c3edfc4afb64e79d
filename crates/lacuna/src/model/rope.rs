//! Rotary tables from configurations: plain, linear, llama3 and longrope scaling.
//!
//! Formulas follow `transformers` (`modeling_rope_utils.py`); GGUF stores llama3 and longrope scaling as tensors of divisors.

use super::fields::Fields;
use super::spec::{Rope, RopePairs};
use crate::error::Result;

/// `theta^(-2i / dims)` for `i` in `0..dims / 2`, in double precision.
fn plain(theta: f64, dims: usize) -> Vec<f64> {
    (0..dims / 2).map(|i| theta.powf(-((2 * i) as f64) / dims as f64)).collect()
}

fn table(pairs: RopePairs, freqs: Vec<f64>, factor: f64) -> Rope {
    Rope { dims: 2 * freqs.len(), pairs, freqs: freqs.into_iter().map(|f| f as f32).collect(), factor: factor as f32 }
}

/// An unscaled table.
pub fn unscaled(theta: f64, dims: usize, pairs: RopePairs) -> Rope {
    table(pairs, plain(theta, dims), 1.0)
}

/// Rotated components of a head of `head_dim`: `share` of it, which must come out even.
///
/// # Errors
/// A share outside 0..=1, or an odd or zero number of components.
pub fn rotated(f: &Fields, key: &str, head_dim: usize, share: f64) -> Result<usize> {
    let dims = (head_dim as f64 * share) as usize;
    if !(0.0..=1.0).contains(&share) || dims == 0 || dims % 2 == 1 {
        return Err(
            f.wrong(key, format!("{share} of a head of {head_dim} is {dims} rotated components, not an even number"))
        );
    }
    Ok(dims)
}

/// The table of a config.json, whose settings are in `rope_parameters` (newer files) or in `rope_theta`, `rope_scaling`.
///
/// # Errors
/// Missing or impossible settings, or a kind of scaling that is not implemented.
pub fn from_config(f: &Fields, head_dim: usize) -> Result<Rope> {
    let (theta, share) = (f.opt_positive("rope_theta")?, f.opt_number("partial_rotary_factor")?);
    match f.inside("rope_parameters") {
        Some(own) => from_parameters(f, &own, head_dim, theta, share),
        None => from_parameters(f, &f.inside("rope_scaling").unwrap_or_else(|| empty(f)), head_dim, theta, share),
    }
}

fn empty(f: &Fields) -> Fields {
    Fields::new(f.file.clone(), f.context, serde_json::Map::new())
}

/// A table whose settings are all in `own`, with those of the whole file `f` and two defaults behind them.
///
/// # Errors
/// As [`from_config`].
pub fn from_parameters(
    f: &Fields,
    own: &Fields,
    head_dim: usize,
    theta: Option<f64>,
    share: Option<f64>,
) -> Result<Rope> {
    let theta = own.opt_positive("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let share = own.opt_number("partial_rotary_factor")?.or(share).unwrap_or(1.0);
    let dims = rotated(f, "partial_rotary_factor", head_dim, share)?;
    let freqs = plain(theta, dims);
    let kind = own.opt_text("rope_type")?.or(own.opt_text("type")?).unwrap_or("default");
    let (freqs, factor) = match kind {
        "default" => (freqs, 1.0),
        "linear" => {
            let factor = positive(own, "factor")?;
            (freqs.into_iter().map(|w| w / factor).collect(), 1.0)
        }
        "llama3" => (llama3(own, freqs)?, 1.0),
        "longrope" | "su" => return longrope(f, own, freqs),
        other => {
            let what = format!("rope scaling `{other}` (supported: default, linear, llama3, longrope)");
            return Err(
                f.unsupported(what, "; remove the scaling from the configuration to run within the original context")
            );
        }
    };
    Ok(table(RopePairs::Half, freqs, factor))
}

fn positive(f: &Fields, key: &str) -> Result<f64> {
    let value = f.opt_positive(key)?;
    value.ok_or_else(|| f.wrong(key, "is missing in the rope scaling"))
}

/// Llama 3.1: wavelengths above `original / low` are divided by `factor`, those below `original / high` kept, between
/// them a ramp.
fn llama3(own: &Fields, freqs: Vec<f64>) -> Result<Vec<f64>> {
    let (factor, low, high) =
        (positive(own, "factor")?, positive(own, "low_freq_factor")?, positive(own, "high_freq_factor")?);
    let original = positive(own, "original_max_position_embeddings")?;
    if high <= low {
        return Err(own.wrong("high_freq_factor", format!("{high} is not above low_freq_factor {low}")));
    }
    let scaled = |w: f64| {
        let turns = original * w / std::f64::consts::TAU;
        let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 - keep) * w / factor + keep * w
    };
    Ok(freqs.into_iter().map(scaled).collect())
}

/// LongRoPE (Phi-3): one divisor per frequency, a short and a long list. The long one is for runs beyond the original
/// context: it is taken when the user asks for such a context, because keys of one cache must all be rotated alike.
fn longrope(f: &Fields, own: &Fields, freqs: Vec<f64>) -> Result<Rope> {
    let original_key = "original_max_position_embeddings";
    let positions = |g: &Fields| g.opt_positions(original_key);
    let original = match (positions(own)?, positions(f)?) {
        (Some(n), _) | (None, Some(n)) => n,
        (None, None) => return Err(f.wrong(original_key, "is missing, but longrope needs it")),
    };
    let longest = f.positions("max_position_embeddings")?;
    let stretch = own.opt_positive("factor")?.unwrap_or(longest as f64 / original as f64);
    let attention = match own.opt_positive("attention_factor")? {
        Some(a) => a,
        None if stretch <= 1.0 => 1.0,
        None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
    };
    let key = if long_context(f, original) { "long_factor" } else { "short_factor" };
    let factors = own.opt_factors(key, freqs.len())?;
    let factors = factors.ok_or_else(|| own.wrong(key, "is missing, but longrope needs it"))?;
    Ok(table(RopePairs::Half, divide(freqs, &factors), attention))
}

fn divide(freqs: Vec<f64>, by: &[f64]) -> Vec<f64> {
    freqs.into_iter().zip(by).map(|(w, d)| w / d).collect()
}

/// Whether the asked context needs the long factors of a model trained for `original` positions.
fn long_context(f: &Fields, original: usize) -> bool {
    f.context.is_some_and(|c| c > original)
}

/// The context a longrope model gets: the original one, unless more is asked for.
///
/// # Errors
/// Settings of the wrong type.
pub fn longrope_context(f: &Fields, original: Option<usize>, longest: usize) -> usize {
    match original {
        Some(original) if !long_context(f, original) => original.min(longest),
        _ => longest,
    }
}

/// The context of a config.json whose longest is `longest`: [`longrope_context`] where its scaling is of that kind.
///
/// # Errors
/// Settings of the wrong type.
pub fn config_context(f: &Fields, longest: usize) -> Result<usize> {
    let Some(scaling) = f.inside("rope_parameters").or(f.inside("rope_scaling")) else { return Ok(longest) };
    let key = "original_max_position_embeddings";
    let original = scaling.opt_positions(key)?.or(f.opt_positions(key)?);
    let long = scaling.get("long_factor").is_some();
    Ok(if long { longrope_context(f, original, longest) } else { longest })
}

/// The table of a GGUF header: `rope.freq_base`, `rope.scaling.*` and the divisor tensors (given as lists under their
/// tensor names).
///
/// # Errors
/// Missing or impossible settings, or a kind of scaling that is not implemented.
pub fn from_gguf(f: &Fields, head_dim: usize, pairs: RopePairs) -> Result<Rope> {
    let dims = f.count_or("rope.dimension_count", head_dim)?;
    if dims > head_dim || dims % 2 == 1 {
        return Err(f.wrong("rope.dimension_count", format!("{dims} does not fit a head of {head_dim}")));
    }
    let mut freqs = plain(f.opt_positive("rope.freq_base")?.unwrap_or(10_000.0), dims);
    match f.opt_text("rope.scaling.type")?.unwrap_or("none") {
        "none" | "longrope" => {}
        "linear" => {
            let factor = f.opt_positive("rope.scaling.factor")?.unwrap_or(1.0);
            freqs.iter_mut().for_each(|w| *w /= factor);
        }
        other => {
            let what =
                format!("rope scaling `{other}` (supported: none, linear, longrope, and llama3 as rope_freqs.weight)");
            return Err(f.unsupported(what, ""));
        }
    }
    let original = f.opt_positions("rope.scaling.original_context_length")?;
    let long = original.is_some_and(|o| long_context(f, o));
    let scaled = if long { "rope_factors_long.weight" } else { "rope_factors_short.weight" };
    for tensor in ["rope_freqs.weight", scaled] {
        if let Some(factors) = f.opt_factors(tensor, dims / 2)? {
            freqs = divide(freqs, &factors);
        }
    }
    Ok(table(pairs, freqs, f.opt_positive("rope.scaling.attn_factor")?.unwrap_or(1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn fields(v: Value, context: Option<usize>) -> Fields {
        let Value::Object(map) = v else { panic!("an object") };
        Fields::new("config.json".into(), context, map)
    }

    #[test]
    fn llama3_keeps_fast_and_divides_slow_components() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let f = fields(json!({"rope_theta": 500000.0, "rope_scaling": scaling}), None);
        let (scaled, plain) = (from_config(&f, 128).unwrap(), unscaled(500_000.0, 128, RopePairs::Half));
        assert_eq!(scaled.freqs[0], plain.freqs[0]);
        assert!((scaled.freqs[63] * 8.0 / plain.freqs[63] - 1.0).abs() < 1e-6);
        assert!(scaled.freqs.windows(2).all(|w| w[0] > w[1]));
    }

    #[test]
    fn longrope_takes_the_long_list_when_the_context_asks_for_it() {
        let v = json!({"max_position_embeddings": 64, "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [1.0, 4.0]}});
        let (short, long) = (from_config(&fields(v.clone(), None), 4), from_config(&fields(v, Some(17)), 4));
        let (short, long) = (short.unwrap(), long.unwrap());
        assert_eq!(short.freqs[1], long.freqs[1] * 4.0);
        assert!((f64::from(short.factor) - (1.0_f64 + 4.0_f64.ln() / 16.0_f64.ln()).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn unknown_scaling_and_odd_shares_are_errors() {
        let yarn = fields(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), None);
        let e = from_config(&yarn, 8).unwrap_err().to_string();
        assert!(e.contains("`yarn`") && e.contains("llama3"), "{e}");
        for share in [0.0, 1.5, -1.0, 0.375] {
            assert!(from_config(&fields(json!({"partial_rotary_factor": share}), None), 8).is_err(), "{share}");
        }
    }
}
