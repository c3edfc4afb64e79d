//! Gemma 3, text: Gemma 2 without the caps, with norms on query and key heads, five sliding blocks to one full one, and a
//! rotary table of its own for each of the two kinds.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::Names;
use super::shape::{Shape, set_windows, sliding_blocks};
use super::spec::{Act, Rope, RopePairs, Spec};
use super::{act, gemma2, rope};
use crate::error::Result;

/// Base of the sliding blocks' table where the file names none.
const LOCAL_BASE: f64 = 10_000.0;
/// Base of the full blocks' table where the file names none.
const GLOBAL_BASE: f64 = 1_000_000.0;
/// Every so-many-th block is a full one.
const PATTERN: usize = 6;
/// Blocks of the 27B model.
const BLOCKS_OF_27B: usize = 62;

/// See the module.
pub static GEMMA3: Architecture = Architecture {
    name: "gemma3",
    classes: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
    model_types: &["gemma3_text", "gemma3"],
    spec,
    names: &Names { qk_normed: true, ..gemma2::NAMES },
    gguf: Some(GgufSide { arch: "gemma3", spec: gguf_spec, names: &Names { qk_normed: true, ..gemma2::GGUF } }),
};

fn spec(whole: &Fields) -> Result<Spec> {
    let f = &whole.inside("text_config").unwrap_or_else(|| whole.clone());
    if f.get("use_bidirectional_attention").is_some_and(|v| v != false) {
        return Err(f.unsupported("attention to later positions (an encoder)", ""));
    }
    let shape = Shape::from_config(f)?;
    let (global, local) = tables(f, shape.head_dim)?;
    let act = act::from_fields(f, "hidden_activation", Act::GeluTanh)?;
    let mut spec = gemma2::scaled(shape.decoder("gemma3", f.epsilon("rms_norm_eps", Some(1e-6))?, global, act));
    let scale = f.opt_positive("query_pre_attn_scalar")?.unwrap_or(256.0).sqrt().recip() as f32;
    let cap = f.opt_positive("attn_logit_softcapping")?.map(|c| c as f32);
    spec.blocks.iter_mut().for_each(|b| (b.scale, b.score_cap) = (scale, cap));
    spec.logit_cap = f.opt_positive("final_logit_softcapping")?.map(|c| c as f32);
    let pattern = f.count_or("sliding_window_pattern", PATTERN)?;
    let slides = sliding_blocks(f, spec.blocks.len(), |i| (i + 1) % pattern != 0)?;
    slide(&mut spec, local, f.opt_positions("sliding_window")?.or(Some(4096)), &slides);
    Ok(spec)
}

/// Newer files keep both tables in `rope_parameters`; in older ones the scaling is that of the full blocks alone.
fn tables(f: &Fields, head_dim: usize) -> Result<(Rope, Rope)> {
    let both = f.inside("rope_parameters");
    let full = both.as_ref().and_then(|b| b.inside("full_attention")).or(both.clone()).or(f.inside("rope_scaling"));
    let full = full.unwrap_or_else(|| Fields::new(f.file.clone(), f.context, Default::default()));
    let base = f.opt_positive("rope_theta")?.unwrap_or(GLOBAL_BASE);
    let global = rope::from_parameters(f, &full, head_dim, Some(base), None)?;
    let base = f.opt_positive("rope_local_base_freq")?.unwrap_or(LOCAL_BASE);
    let local = match both.and_then(|b| b.inside("sliding_attention")) {
        Some(own) => rope::from_parameters(f, &own, head_dim, Some(base), None)?,
        None => {
            rope::rotated(f, "head_dim", head_dim, 1.0)?;
            rope::unscaled(base, head_dim, RopePairs::Half)
        }
    };
    Ok((global, local))
}

fn slide(spec: &mut Spec, local: Rope, window: Option<usize>, slides: &[bool]) {
    spec.ropes.push(local);
    set_windows(spec, window, |i| slides[i]);
    for (block, slides) in spec.blocks.iter_mut().zip(slides) {
        block.rope = Some(usize::from(*slides));
    }
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    let shape = Shape::from_gguf(f)?;
    let global = rope::from_gguf(f, shape.head_dim, RopePairs::Half)?;
    let local =
        rope::unscaled(f.opt_positive("rope.freq_base_swa")?.unwrap_or(LOCAL_BASE), global.dims, RopePairs::Half);
    let eps = f.epsilon("attention.layer_norm_rms_epsilon", None)?;
    let mut spec = gemma2::scaled(shape.decoder("gemma3", eps, global, act::from_gguf(f, Act::GeluTanh)?));
    gemma2::set_gguf_scale(f, &shape, BLOCKS_OF_27B, &mut spec)?;
    spec.logit_cap = f.opt_positive("final_logit_softcapping")?.map(|c| c as f32);
    let slides: Vec<bool> = (0..shape.layers).map(|i| (i + 1) % PATTERN != 0).collect();
    let window = f.opt_positions("attention.sliding_window")?;
    let window = window.ok_or_else(|| f.wrong("attention.sliding_window", "is missing, but gemma3 needs it"))?;
    slide(&mut spec, local, Some(window), &slides);
    Ok(spec)
}
