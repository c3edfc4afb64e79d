//! The settings of a GGUF file, by what the spec says of the model; and the check that reading them gives that spec again.

use super::{
    super::{
        act,
        arch::GgufSide,
        fields::Fields,
        gguf, rope,
        spec::{MlpSpec, NormKind, RopePairs, Spec},
    },
    tensors::Part,
};
use crate::error::Result;
use lacuna_core::format::gguf::{TensorType, Value};
use serde_json::{Map, Value as Json};
use std::path::Path;

/// Keys and values.
pub type Pairs = Vec<(String, Value)>;

/// Relative difference that is rounding: frequencies pass through quotients in single precision.
const ROUNDING: f64 = 1e-5;

/// The settings of a file.
pub struct Settings {
    /// All pairs but those of the vocabulary.
    pub pairs: Pairs,
    /// Frequencies that no pair expresses.
    pub parts: Vec<Part>,
    /// Which rotated components the rows of query and key bring together.
    pub rows: RopePairs,
}

/// The settings of the model whose config.json is `f`.
///
/// # Errors
/// A model of which a GGUF file cannot say everything, with what it cannot say.
pub fn all(dir: &Path, f: &Fields, side: &GgufSide, spec: &Spec, notes: &mut Vec<String>) -> Result<Settings> {
    let mut parts = Vec::new();
    let text = |s: &str| Value::String(s.to_owned());
    let mut pairs: Pairs =
        vec![("general.architecture".into(), text(side.arch)), ("general.type".into(), text("model"))];
    if let Some(name) = dir.file_name() {
        pairs.push(("general.name".into(), text(&name.to_string_lossy())));
    }
    pairs.push(("general.quantization_version".into(), Value::U32(2)));
    let mut own = shape(f, spec)?;
    own.extend(rotation(f, spec, &mut parts)?);
    own.extend(peculiar(side, spec));
    pairs.extend(own.into_iter().map(|(key, value)| (format!("{}.{key}", side.arch), value)));
    if let (Some(said), Some(block)) = (read_back((f, spec), side, &pairs, &parts)?.blocks.first(), spec.blocks.first())
        && said.act != block.act
    {
        let name = act::name(block.act);
        pairs.push(("lacuna.hidden_act".into(), text(name)));
        notes.push(format!(
            "GGUF has no key for the activation: `{name}` is in `lacuna.hidden_act`, which other programs do not read; they compute \
             {} in a `{}`",
            act::name(said.act),
            side.arch
        ));
    }
    let said = read_back((f, spec), side, &pairs, &parts)?;
    let rows = said.ropes.first().map_or(RopePairs::Half, |r| r.pairs);
    if rows == RopePairs::Adjacent && spec.blocks.iter().any(|b| said.ropes[0].dims != b.head_dim) {
        return Err(f.unsupported(format!("rotating a part of each head in a GGUF file of `{}`", side.arch), ""));
    }
    match difference(spec, &said) {
        None => Ok(Settings { pairs, parts, rows }),
        Some(what) => Err(f.unsupported(format!("{what} in a GGUF file of the architecture `{}`", side.arch), "")),
    }
}

/// llama.cpp, `enum llama_ftype`: the type most numbers have.
pub fn file_type(main: TensorType) -> Value {
    Value::U32(match main {
        TensorType::F16 => 1,
        TensorType::Q4_0 => 2,
        TensorType::Q8_0 => 7,
        TensorType::BF16 => 32,
        _ => 0,
    })
}

fn count(n: usize) -> Value {
    Value::U32(u32::try_from(n).unwrap_or(u32::MAX))
}

fn shape(f: &Fields, spec: &Spec) -> Result<Vec<(&'static str, Value)>> {
    let mut pairs = Vec::new();
    let own = ["max_position_embeddings", "n_positions", "n_ctx"];
    let mut context = spec.context;
    for key in own.into_iter().rev() {
        context = f.opt_positions(key)?.unwrap_or(context);
    }
    pairs.push(("context_length", count(context)));
    pairs.push(("embedding_length", count(spec.width)));
    pairs.push(("block_count", count(spec.blocks.len())));
    pairs.push(("vocab_size", count(spec.vocab)));
    let norm =
        if spec.norm == NormKind::Rms { "attention.layer_norm_rms_epsilon" } else { "attention.layer_norm_epsilon" };
    pairs.push((norm, Value::F32(spec.norm_eps)));
    let Some(block) = spec.blocks.first() else { return Ok(pairs) };
    pairs.push(("attention.head_count", count(block.heads)));
    pairs.push(("attention.head_count_kv", count(block.kv_heads)));
    pairs.push(("attention.key_length", count(block.head_dim)));
    pairs.push(("attention.value_length", count(block.head_dim)));
    let inner = spec.blocks.iter().find_map(|b| match b.mlp {
        MlpSpec::Gated { inner } | MlpSpec::Plain { inner } => Some(inner),
        MlpSpec::Experts { .. } | MlpSpec::ReluExperts { .. } => None,
    });
    let mixture = spec.blocks.iter().find_map(|b| match b.mlp {
        MlpSpec::Experts { experts, active, inner, .. } => Some((experts, active, inner)),
        _ => None,
    });
    if let Some((experts, active, inner)) = mixture {
        pairs.push(("expert_count", count(experts)));
        pairs.push(("expert_used_count", count(active)));
        pairs.push(("expert_feed_forward_length", count(inner)));
    }
    let inner = match inner.or(mixture.map(|m| m.2)) {
        Some(inner) if mixture.is_some() => f.count_or("intermediate_size", inner)?,
        inner => inner.unwrap_or(0),
    };
    pairs.push(("feed_forward_length", count(inner)));
    Ok(pairs)
}

/// What some architectures have besides.
fn peculiar(side: &GgufSide, spec: &Spec) -> Vec<(&'static str, Value)> {
    let mut pairs = Vec::new();
    let Some(block) = spec.blocks.first() else { return pairs };
    if side.arch == "gptneox" {
        pairs.push(("use_parallel_residual", Value::Bool(block.parallel)));
    }
    if let Some(window) = spec.blocks.iter().find_map(|b| b.window) {
        pairs.push(("attention.sliding_window", count(window)));
    }
    if let Some(cap) = block.score_cap {
        pairs.push(("attn_logit_softcapping", Value::F32(cap)));
    }
    if let Some(cap) = spec.logit_cap {
        pairs.push(("final_logit_softcapping", Value::F32(cap)));
    }
    if block.scale != 1.0 / (block.head_dim as f32).sqrt() {
        pairs.push(("attention.scale", Value::F32(block.scale)));
    }
    pairs
}

/// The base of the first table of frequencies; keys and their order as in `model/rope.rs` and `model/gemma3.rs`.
fn base(f: &Fields, spec: &Spec) -> Result<f64> {
    let own = f.inside("rope_parameters");
    let own = own.as_ref().and_then(|o| o.inside("full_attention")).or(own);
    let inner = match own {
        Some(own) => own.opt_positive("rope_theta")?,
        None => None,
    };
    let found = inner.or(f.opt_positive("rope_theta")?).or(f.opt_positive("rotary_emb_base")?);
    Ok(found.unwrap_or(if spec.arch == "gemma3" { 1_000_000.0 } else { 10_000.0 }))
}

fn rotation(f: &Fields, spec: &Spec, parts: &mut Vec<Part>) -> Result<Vec<(&'static str, Value)>> {
    let Some(table) = spec.ropes.first() else { return Ok(Vec::new()) };
    let base = base(f, spec)?;
    let mut pairs = vec![("rope.dimension_count", count(table.dims)), ("rope.freq_base", Value::F32(base as f32))];
    if let Some(local) = spec.ropes.get(1).filter(|t| t.dims > 2) {
        // The second frequency is base^(-2 / dims).
        let swa = f64::from(local.freqs[1]).powf(-(local.dims as f64) / 2.0).round();
        pairs.push(("rope.freq_base_swa", Value::F32(swa as f32)));
    }
    let own = f.inside("rope_parameters").or(f.inside("rope_scaling"));
    let scaling = own.as_ref().and_then(|o| o.inside("full_attention")).or(own);
    if let Some(scaling) = scaling.as_ref().filter(|s| s.get("long_factor").is_some()) {
        for (key, name) in [("long_factor", "rope_factors_long.weight"), ("short_factor", "rope_factors_short.weight")]
        {
            let factors = scaling.opt_factors(key, table.freqs.len())?.unwrap_or_default();
            parts.push(Part::values(name, factors.iter().map(|v| *v as f32).collect()));
        }
        let key = "original_max_position_embeddings";
        let original = scaling.opt_positions(key)?.or(f.opt_positions(key)?).unwrap_or(spec.context);
        pairs.push(("rope.scaling.original_context_length", count(original)));
        pairs.push(("rope.scaling.attn_factor", Value::F32(table.factor)));
        return Ok(pairs);
    }
    let plain = rope::unscaled(base, table.dims, table.pairs);
    let divisors: Vec<f64> = plain.freqs.iter().zip(&table.freqs).map(|(p, t)| f64::from(*p) / f64::from(*t)).collect();
    let first = divisors.first().copied().unwrap_or(1.0);
    if divisors.iter().all(|d| near(*d, 1.0)) {
        return Ok(pairs);
    }
    if divisors.iter().all(|d| near(*d, first)) {
        let factor = scaling.and_then(|s| s.get("factor").and_then(Json::as_f64)).unwrap_or(first);
        pairs.push(("rope.scaling.type", Value::String("linear".into())));
        pairs.push(("rope.scaling.factor", Value::F32(factor as f32)));
    } else {
        parts.push(Part::values("rope_freqs.weight", divisors.iter().map(|d| *d as f32).collect()));
    }
    Ok(pairs)
}

/// What a reader of the file will understand.
fn read_back((f, spec): (&Fields, &Spec), side: &GgufSide, pairs: &Pairs, parts: &[Part]) -> Result<Spec> {
    let mut map: Map<String, Json> = gguf::named(pairs.iter().map(|(k, v)| (k.as_str(), v)), side.arch);
    // As readers take it from the embedding.
    map.insert("vocab_size".into(), spec.vocab.into());
    for part in parts {
        if let Some(values) = part.given() {
            map.insert(part.name.clone(), values.to_vec().into());
        }
    }
    (side.spec)(&Fields::new(f.file.clone(), None, map))
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= ROUNDING * a.abs().max(b.abs())
}

/// The first thing in which two decoders differ, beyond rounding, their names, and the pairing of rotated components (which
/// the order of the rows follows).
fn difference(a: &Spec, b: &Spec) -> Option<String> {
    let same = |a: f32, b: f32| near(a.into(), b.into());
    let other = |what: &str| Some(what.to_owned());
    if (a.vocab, a.width, a.context, a.blocks.len()) != (b.vocab, b.width, b.context, b.blocks.len()) {
        return other("the sizes of this model");
    }
    if (&a.position, a.norm, a.norm_eps) != (&b.position, b.norm, b.norm_eps)
        || !same(a.embed_scale, b.embed_scale)
        || !same(a.logit_scale, b.logit_scale)
    {
        return other("the positions, norms or embedding scale of this model");
    }
    let cap = |c: Option<f32>| c.unwrap_or(0.0);
    if !same(cap(a.logit_cap), cap(b.logit_cap)) {
        return other("the cap on its logits");
    }
    let tables = a.ropes.len() == b.ropes.len()
        && a.ropes.iter().zip(&b.ropes).all(|(a, b)| {
            a.dims == b.dims && same(a.factor, b.factor) && a.freqs.iter().zip(&b.freqs).all(|(a, b)| same(*a, *b))
        });
    if !tables {
        return other("its rotary frequencies");
    }
    a.blocks.iter().zip(&b.blocks).enumerate().find_map(|(i, (x, y))| {
        let at = |what: &str| Some(format!("{what} of block {i}"));
        if (x.heads, x.kv_heads, x.head_dim, x.rope, x.parallel, x.latent, x.residual_scale)
            != (y.heads, y.kv_heads, y.head_dim, y.rope, y.parallel, y.latent, y.residual_scale)
        {
            return at("the attention");
        }
        if !same(x.scale, y.scale) || !same(cap(x.score_cap), cap(y.score_cap)) {
            return at("the scale or cap of the scores");
        }
        if x.window != y.window {
            return at("the sliding window");
        }
        if x.mlp != y.mlp {
            return at("the MLP or its experts");
        }
        if (x.act, x.up_act) != (y.act, y.up_act) { at("the activation") } else { None }
    })
}
