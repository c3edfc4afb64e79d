//! Quality and bytes of one plan: both engines score the same text in lockstep.

use super::report::{Cost, Measured, Quality, SiteKept};
use crate::{
    engine::{Counters, Engine, LayerCounts, SiteCount},
    error::{Error, Result},
    eval::{
        Divergence, EngineSource, Scoring, Window, divergence,
        divergence::Estimate,
        perplexity::{Perplexity, Progress},
    },
    tokenizer::Pieces,
};
use lacuna_core::{site::Proj, weight::Orientation};
use std::f64::consts::LN_2;

/// What one lockstep pass gives.
pub struct Pass {
    /// The plan against the dense model.
    pub quality: Quality,
    /// What the plan read and kept.
    pub cost: Cost,
    /// The dense model against itself.
    pub dense: Quality,
    /// What the dense model read.
    pub dense_cost: Cost,
}

/// Scores `windows` with both engines in masked passes: what each would decode, at the speed of prefill. `progress(done, all)` counts windows.
///
/// # Errors
/// As [`divergence()`], and windows that hold no text.
pub fn pass(
    dense: &Engine,
    test: &Engine,
    windows: &[Window],
    pieces: &Pieces,
    mut progress: impl FnMut(usize, usize),
) -> Result<Pass> {
    let longest = windows.iter().map(|w| w.tokens.len()).max().unwrap_or(0);
    let (mut base, mut source) =
        (EngineSource::new(dense, longest, Scoring::Masked)?, EngineSource::new(test, longest, Scoring::Masked)?);
    let each = |p: Progress<'_, Divergence>| progress(p.done, p.total);
    let d = divergence(&mut base, &mut source, windows, Some(pieces), each)?;
    let (quality, dense_quality) = qualities(&d)?;
    let mut cost = cost(source.session().counters());
    cost.copies_bytes = copies(dense, test);
    Ok(Pass { quality, cost, dense: dense_quality, dense_cost: self::cost(base.session().counters()) })
}

/// The plan's quality and that of its base.
fn qualities(d: &Divergence) -> Result<(Quality, Quality)> {
    if d.count() < 2 || d.test.bytes == 0 {
        let problem = format!("{} scored tokens are too few; give a longer text", d.count());
        return Err(Error::Argument { name: "text", problem });
    }
    // Nats per token to bits per byte.
    let per_byte = d.count() as f64 / d.test.bytes as f64 / LN_2;
    let change = d.ln_ppl_ratio();
    let test = Quality {
        ppl: ppl(&d.test),
        bits_per_byte: bits(&d.test, per_byte),
        change: Measured { value: change.value * per_byte, error: change.error * per_byte },
        kld: measured(d.kld()),
        kld_p99: d.kld_quantile(0.99),
        same_top: measured(d.same_top()),
    };
    let zero = Measured::default();
    let base = Quality {
        ppl: ppl(&d.base),
        bits_per_byte: bits(&d.base, per_byte),
        change: zero,
        kld: zero,
        kld_p99: 0.0,
        same_top: Measured { value: 1.0, error: 0.0 },
    };
    Ok((test, base))
}

fn ppl(p: &Perplexity) -> Measured {
    let (value, error) = p.ppl();
    Measured { value, error }
}

fn bits(p: &Perplexity, per_byte: f64) -> Measured {
    let (value, error) = p.ppl();
    Measured { value: value.ln() * per_byte, error: error / value * per_byte }
}

fn measured(e: Estimate) -> Measured {
    Measured { value: e.value, error: e.error }
}

fn cost(c: &Counters) -> Cost {
    let steps = c.steps.max(1) as f64;
    let inputs = Proj::ALL.into_iter().map(|p| (format!("{p} inputs"), kept(c, |l| l.inputs[p as usize])));
    let sites = inputs.chain([("mlp neurons".to_owned(), kept(c, |l| l.neurons))]);
    Cost {
        bytes_per_token: c.bytes_per_token(),
        weight_bytes_per_token: c.weight_bytes as f64 / steps,
        copies_bytes: 0,
        kept: sites
            .filter(|(_, layers)| layers.iter().any(Option::is_some))
            .map(|(site, layers)| SiteKept { site, layers })
            .collect(),
    }
}

fn kept(c: &Counters, of: impl Fn(&LayerCounts) -> SiteCount) -> Vec<Option<f64>> {
    c.layers.iter().map(|l| Some(of(l)).filter(|s| s.total > 0).map(|s| s.share())).collect()
}

/// Bytes of the weights that `test` holds in another orientation than `dense`.
fn copies(dense: &Engine, test: &Engine) -> u64 {
    let blocks = dense.model().blocks.iter().zip(&test.model().blocks);
    let pairs =
        blocks.flat_map(|(a, b)| Proj::ALL.into_iter().flat_map(move |p| a.parts(p).into_iter().zip(b.parts(p))));
    let turned = |o: &Orientation| *o != Orientation::OutputMajor;
    pairs
        .filter(|(a, b)| turned(&b.weight.orientation()) && !turned(&a.weight.orientation()))
        .map(|(_, b)| b.weight.bytes().len() as u64)
        .sum()
}
