//! MiniCPM and what was made of it: the llama family with factors on embedding, residual branches and logits, attention that
//! may be latent (MLA), and an MLP that may be BlockFFN's, many small experts behind a router with a ReLU.
//!
//! After the modelling code of the public checkpoints: openbmb/MiniCPM-2B and MiniCPM4 (`model_type` minicpm), MiniCPM3
//! (minicpm3, also in `transformers`), SparseLLM/BlockFFN-* (thunlp/BlockFFN, `pretrain/bmt_to_hf/modeling_minicpm.py`).

use super::act;
use super::arch::Architecture;
use super::fields::Fields;
use super::names::{self, LatentNames, Names, ReluExpertNames};
use super::rope;
use super::shape::Shape;
use super::spec::{Act, Latent, MlpSpec, RouterScale, Spec};
use crate::error::Result;

/// MiniCPM, MiniCPM4 and BlockFFN.
pub static MINICPM: Architecture = Architecture {
    name: "minicpm",
    classes: &["MiniCPMForCausalLM"],
    model_types: &["minicpm"],
    spec,
    names: &NAMES,
    gguf: None,
};

/// MiniCPM3.
pub static MINICPM3: Architecture = Architecture {
    name: "minicpm3",
    classes: &["MiniCPM3ForCausalLM"],
    model_types: &["minicpm3"],
    spec: spec3,
    names: &NAMES,
    gguf: None,
};

const NAMES: Names = Names {
    router: "layers.{}.mlp.router_proj",
    latent: LatentNames {
        q: "layers.{}.self_attn.q_proj",
        q_down: "layers.{}.self_attn.q_a_proj",
        q_norm: "layers.{}.self_attn.q_a_layernorm",
        q_up: "layers.{}.self_attn.q_b_proj",
        kv_down: "layers.{}.self_attn.kv_a_proj_with_mqa",
        kv_norm: "layers.{}.self_attn.kv_a_layernorm",
        kv_up: "layers.{}.self_attn.kv_b_proj",
    },
    relu_experts: ReluExpertNames {
        norm: "layers.{}.mlp.router_norm",
        pairs: &[
            ["layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj"],
            ["layers.{}.mlp.experts.up_proj.weight", "layers.{}.mlp.experts.down_proj.weight"],
        ],
        alike: &[["layers.{}.mlp.mlp.up_proj", "layers.{}.mlp.mlp.down_proj"]],
    },
    ..names::LLAMA
};

/// Epsilon of the norms of latents, whatever that of the others is.
const LATENT_EPS: f32 = 1e-6;

fn spec(f: &Fields) -> Result<Spec> {
    let kind = f.opt_text("ffn_type")?.unwrap_or("vanilla");
    let latent = match f.opt_text("attention_type")?.unwrap_or("vanilla") {
        "vanilla" => false,
        "mla" => true,
        other => return Err(f.unsupported(format!("attention of the type `{other}` (supported: vanilla, mla)"), "")),
    };
    refuse(f, kind)?;
    let shape = shape(f, latent, matches!(kind, "block" | "block_linear"))?;
    let mut spec = decoder(f, "minicpm", &shape, latent, [1.0, 1.0, 1.0])?;
    let mlp = match kind {
        "vanilla" if f.flag_or("ffn_gated", true)? => return Ok(spec),
        "vanilla" => MlpSpec::Plain { inner: shape.inner },
        "block" | "block_linear" => {
            spec.arch = "blockffn".into();
            relu_experts(f, spec.norm_eps)?
        }
        other => {
            let what = format!("an MLP of the type `{other}` (supported: vanilla, block, block_linear)");
            return Err(f.unsupported(what, ""));
        }
    };
    spec.blocks.iter_mut().for_each(|b| b.mlp = mlp.clone());
    Ok(spec)
}

fn spec3(f: &Fields) -> Result<Spec> {
    let shape = shape(f, true, false)?;
    decoder(f, "minicpm3", &shape, true, [12.0, 1.4, 256.0])
}

/// What would be computed wrongly.
fn refuse(f: &Fields, kind: &str) -> Result<()> {
    if f.get("sparse_config").is_some() {
        let remedy = "; remove `sparse_config` from the configuration to run with full attention";
        return Err(f.unsupported("trained sparse attention (`sparse_config`, InfLLM)", remedy));
    }
    if kind == "vanilla" && f.get("num_experts").is_some() {
        return Err(f.unsupported("MiniCPM-MoE (`num_experts` without `ffn_type`)", ""));
    }
    if f.opt_number("mup_denominator")?.is_some_and(|n| f.layers("num_hidden_layers").is_ok_and(|l| l as f64 != n)) {
        return Err(f.unsupported("a `mup_denominator` that is not the number of blocks", ""));
    }
    Ok(())
}

/// Sizes; in latent attention the size of a head is that of a key. BlockFFN need not say `intermediate_size`.
fn shape(f: &Fields, latent: bool, blocks: bool) -> Result<Shape> {
    let heads = f.count("num_attention_heads")?;
    let inner = if blocks { f.count("expert_size")? } else { f.count("intermediate_size")? };
    let head_dim = match latent {
        true => f.count("qk_nope_head_dim")? + f.count("qk_rope_head_dim")?,
        false => f.count_or("head_dim", quotient(f, heads)?)?,
    };
    let kv_heads = if latent { heads } else { f.count_or("num_key_value_heads", heads)? };
    if !heads.is_multiple_of(kv_heads) {
        let problem = format!("{heads} query heads are not a multiple of {kv_heads} key/value heads");
        return Err(f.wrong("num_key_value_heads", problem));
    }
    Ok(Shape {
        vocab: f.count("vocab_size")?,
        width: f.count("hidden_size")?,
        layers: f.layers("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        inner,
        context: f.positions("max_position_embeddings")?,
    })
}

fn quotient(f: &Fields, heads: usize) -> Result<usize> {
    let width = f.count("hidden_size")?;
    if !width.is_multiple_of(heads) {
        let problem = format!("{heads} heads do not divide the width {width}");
        return Err(f.wrong("num_attention_heads", problem));
    }
    Ok(width / heads)
}

/// The decoder with a gated MLP. `defaults`: of `scale_emb`, `scale_depth`, `dim_model_base`.
fn decoder(f: &Fields, arch: &str, shape: &Shape, latent: bool, defaults: [f64; 3]) -> Result<Spec> {
    let rotated = if latent { f.count("qk_rope_head_dim")? } else { shape.head_dim };
    let rope = rope::from_config(f, rotated)?;
    let act = act::from_fields(f, "hidden_act", Act::Silu)?;
    let mut spec = shape.decoder(arch, f.epsilon("rms_norm_eps", Some(1e-6))?, rope, act);
    let factor = |key: &str, default: f64| -> Result<f64> { Ok(f.opt_positive(key)?.unwrap_or(default)) };
    spec.context = rope::config_context(f, spec.context)?;
    spec.embed_scale = factor("scale_emb", defaults[0])? as f32;
    spec.logit_scale = (factor("dim_model_base", defaults[2])? / shape.width as f64) as f32;
    let residual_scale = (factor("scale_depth", defaults[1])? / (shape.layers as f64).sqrt()) as f32;
    let latent = if latent { Some(latent_attention(f, shape)?) } else { None };
    for block in &mut spec.blocks {
        (block.residual_scale, block.latent) = (residual_scale, latent);
    }
    Ok(spec)
}

fn latent_attention(f: &Fields, shape: &Shape) -> Result<Latent> {
    let (nope, rope) = (f.count("qk_nope_head_dim")?, f.count("qk_rope_head_dim")?);
    let value = match f.opt_count("v_head_dim")? {
        Some(value) => value,
        None => quotient(f, shape.heads)?,
    };
    if value > nope + rope {
        let what = format!("values of {value} numbers beside keys of {}", nope + rope);
        return Err(f.unsupported(what, ""));
    }
    Ok(Latent {
        q_rank: f.opt_count("q_lora_rank")?,
        kv_rank: f.count("kv_lora_rank")?,
        nope,
        rope,
        value,
        eps: LATENT_EPS,
    })
}

fn relu_experts(f: &Fields, eps: f32) -> Result<MlpSpec> {
    match f.opt_text("router_act")?.unwrap_or("relu") {
        "relu" => {}
        other => {
            return Err(f.unsupported(format!("a router with the activation `{other}` (supported: relu)"), ""));
        }
    }
    let scale = match f.opt_text("norm_after_router")?.unwrap_or("sum") {
        "none" => RouterScale::Plain,
        "sum" => RouterScale::Sum { factor: f.opt_positive("norm_scale")?.unwrap_or(1.0) as f32 },
        "rms" => RouterScale::Rms { eps },
        other => {
            let what = format!("a router with the norm `{other}` (supported: none, sum, rms)");
            return Err(f.unsupported(what, ""));
        }
    };
    Ok(MlpSpec::ReluExperts { experts: f.count("num_experts")?, inner: f.count("expert_size")?, scale })
}
