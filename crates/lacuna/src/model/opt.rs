//! OPT: ReLU, layer norm, learned positions whose table starts with two unused rows, biases everywhere. GGUF has no such
//! architecture.

use super::act;
use super::arch::Architecture;
use super::fields::Fields;
use super::names::{self, Names, Qkv};
use super::shape::Shape;
use super::spec::{Act, MlpSpec, NormKind, Position, RopePairs, Spec};
use crate::error::Result;

/// See the module.
pub static OPT: Architecture = Architecture {
    name: "opt",
    classes: &["OPTForCausalLM"],
    model_types: &["opt"],
    spec,
    names: &Names {
        prefixes: &["model.decoder.", "decoder.", ""],
        positions: "embed_positions",
        final_norm: "final_layer_norm",
        attn_norm: "layers.{}.self_attn_layer_norm",
        qkv: Qkv::Split("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"),
        o: "layers.{}.self_attn.out_proj",
        mlp_norm: "layers.{}.final_layer_norm",
        up: "layers.{}.fc1",
        down: "layers.{}.fc2",
        inner: "ffn_dim",
        biased: true,
        ..names::LLAMA
    },
    gguf: None,
};

fn spec(f: &Fields) -> Result<Spec> {
    let (width, heads) = (f.count("hidden_size")?, f.count("num_attention_heads")?);
    if !f.flag_or("do_layer_norm_before", true)? || f.flag_or("_remove_final_layer_norm", false)? {
        return Err(f.unsupported("an OPT with its norms after the blocks (opt-350m)", "; every other size works"));
    }
    if f.count_or("word_embed_proj_dim", width)? != width {
        return Err(f.unsupported("an embedding of another width than the blocks", ""));
    }
    if !f.flag_or("enable_bias", true)? || !f.flag_or("layer_norm_elementwise_affine", true)? {
        return Err(f.unsupported("an OPT without biases or gains (Galactica)", ""));
    }
    let inner = f.count("ffn_dim")?;
    if !width.is_multiple_of(heads) {
        return Err(f.wrong("num_attention_heads", format!("{heads} heads do not divide the width {width}")));
    }
    let shape = Shape {
        vocab: f.count("vocab_size")?,
        width,
        layers: f.layers("num_hidden_layers")?,
        heads,
        kv_heads: heads,
        head_dim: width / heads,
        inner,
        context: f.positions("max_position_embeddings")?,
    };
    let act = act::from_fields(f, "activation_function", Act::Relu)?;
    Ok(learned(&shape, "opt", 1e-5, act, 2))
}

/// A decoder with layer norm, a plain MLP and learned positions from row `offset` of their table; GPT-2 is one too.
pub fn learned(shape: &Shape, arch: &str, norm_eps: f32, act: Act, offset: usize) -> Spec {
    let unused = super::rope::unscaled(1.0, 0, RopePairs::Half);
    let mut spec = shape.decoder(arch, norm_eps, unused, act);
    spec.ropes.clear();
    (spec.norm, spec.position) = (NormKind::Layer, Position::Learned { offset });
    for block in &mut spec.blocks {
        (block.rope, block.mlp) = (None, MlpSpec::Plain { inner: shape.inner });
    }
    spec
}
