#!/usr/bin/env python3
"""Tiny seeded random models of every supported architecture, with the logits that `transformers` computes for them.

    python tools/make_fixtures.py [NAME ...]      # writes crates/lacuna/tests/fixtures/NAME/

Each folder holds config.json, model.safetensors, expected.safetensors (token ids and float32 logits of one full forward
pass) and, for architectures that have one, model.gguf with the same weights. Sizes are odd on purpose: head sizes that
are not width / heads, GQA ratios 1 to 3, inner sizes that are no multiple of 32, windows shorter than the text. Weights are rounded to f16
so that the GGUF files (f16 matrices) hold exactly the same numbers at half the size.

Needs torch, transformers 5.23, safetensors, gguf.
"""

import json
import pathlib
import shutil
import sys
import zlib

import gguf
import numpy as np
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "crates/lacuna/tests/fixtures"
TOKENS = 40

# Sizes shared by the llama family; every entry below overrides what it needs.
BASE = dict(vocab_size=131, hidden_size=48, intermediate_size=74, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, rms_norm_eps=1e-5,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def llama(**kw):
    return tf.LlamaConfig(**(BASE | kw))


def small_act(act):
    return llama(vocab_size=67, hidden_size=36, intermediate_size=50, num_hidden_layers=1, num_attention_heads=3,
                 num_key_value_heads=1, head_dim=8, hidden_act=act)


def rope(kind, theta=10000.0, **kw):
    return dict(rope_type=kind, rope_theta=theta, **kw)


def minicpm3(**kw):
    return tf.MiniCPM3Config(**(BASE | dict(hidden_size=42, num_key_value_heads=6, head_dim=None, qk_nope_head_dim=5,
                                            qk_rope_head_dim=6, q_lora_rank=19, kv_lora_rank=13, scale_emb=3, scale_depth=1.4,
                                            dim_model_base=16) | kw))


# BlockFFN's MLP in a MiniCPM3: what its config.json says in place of the sizes of a dense one.
def blockffn(**kw):
    return dict(attention_type="mla", ffn_type="block", hidden_act="silu", router_act="relu", expert_size=10, num_experts=7,
                norm_after_router="rms", block_implementation="torch") | kw


BLOCKFFN = {"blockffn": blockffn(),
            "blockffn-linear": blockffn(ffn_type="block_linear", expert_size=6, num_experts=9, norm_after_router="sum", norm_scale=0.5)}

GPT2 = dict(vocab_size=131, n_embd=48, n_head=3, n_layer=2, n_positions=64, n_inner=70, bos_token_id=1, eos_token_id=2)
NEOX = dict(vocab_size=131, hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=70,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
GEMMA = BASE | dict(num_attention_heads=4, rms_norm_eps=1e-6, tie_word_embeddings=True, sliding_window=9)
LLAMA3 = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
LONGROPE = rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.5, 2.0, 4.0, 9.0])

# name -> (configuration, legacy: write rope_theta / rope_scaling as older checkpoints do)
MODELS = {
    "llama2": (llama(), True),
    "llama2-linear": (llama(rope_parameters=rope("linear", factor=3.0)), True),
    "llama2-bf16": (llama(num_key_value_heads=6, attention_bias=True, mlp_bias=True), False),
    "llama3": (llama(num_key_value_heads=3, head_dim=12, tie_word_embeddings=True, rope_parameters=LLAMA3), False),
    "llama-relu": (small_act("relu"), False),
    "llama-relu2": (small_act("relu2"), False),
    "llama-gelu": (small_act("gelu"), False),
    "llama-gelu-tanh": (small_act("gelu_pytorch_tanh"), False),
    "llama-quick-gelu": (small_act("quick_gelu"), False),
    "mistral": (tf.MistralConfig(**(BASE | dict(sliding_window=11))), True),
    "qwen2": (tf.Qwen2Config(**(BASE | dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=56))), True),
    "qwen2-window": (tf.Qwen2Config(**(BASE | dict(hidden_size=40, num_attention_heads=4, head_dim=10, use_sliding_window=True,
                                                   sliding_window=7, max_window_layers=1))), False),
    "qwen3": (tf.Qwen3Config(**(BASE | dict(hidden_size=54, tie_word_embeddings=True))), False),
    "qwen3-bf16": (tf.Qwen3Config(**(BASE | dict(num_attention_heads=4, num_key_value_heads=4))), True),
    "gemma2": (tf.Gemma2Config(**(GEMMA | dict(num_hidden_layers=3, query_pre_attn_scalar=7, attn_logit_softcapping=4.0,
                                               final_logit_softcapping=6.0))), True),
    "gemma3": (tf.Gemma3TextConfig(**(GEMMA | dict(num_hidden_layers=7, hidden_size=32, intermediate_size=50,
                                                   query_pre_attn_scalar=10, sliding_window_pattern=6, rope_parameters={
        "full_attention": rope("linear", 1000000.0, factor=8.0), "sliding_attention": rope("default", 10000.0)}))), False),
    "phi3": (tf.Phi3Config(**(BASE | dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, sliding_window=13))), True),
    "phi3-longrope": (tf.Phi3Config(**(BASE | dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                                                   max_position_embeddings=128, original_max_position_embeddings=64,
                                                   rope_parameters=LONGROPE))), True),
    "opt": (tf.OPTConfig(vocab_size=131, hidden_size=48, word_embed_proj_dim=48, ffn_dim=70, num_hidden_layers=2,
                         num_attention_heads=3, max_position_embeddings=64, do_layer_norm_before=True, bos_token_id=1,
                         eos_token_id=2, pad_token_id=None), False),
    "gpt2": (tf.GPT2Config(**GPT2), False),
    "gpt-neox": (tf.GPTNeoXConfig(**NEOX, rotary_pct=0.25, use_parallel_residual=True), True),
    "gpt-neox-serial": (tf.GPTNeoXConfig(**NEOX, rotary_pct=0.5, use_parallel_residual=False, hidden_act="gelu_new"), False),
    "bamboo": (tf.MistralConfig(**(BASE | dict(hidden_act="relu", sliding_window=None))), True),
    "minicpm": (tf.GraniteConfig(**(BASE | dict(head_dim=8, embedding_multiplier=3.0, residual_multiplier=1.4 / 2**0.5,
                                                attention_multiplier=8**-0.5, logits_scaling=48 / 16))), True),
    "minicpm3": (minicpm3(v_head_dim=9), True),
    "blockffn": (minicpm3(num_hidden_layers=3), True),
    "blockffn-linear": (minicpm3(), True),
    "mixtral": (tf.MixtralConfig(**(BASE | dict(hidden_size=40, intermediate_size=38, num_local_experts=5,
                                                num_experts_per_tok=2, sliding_window=None))), True),
    "qwen3-moe": (tf.Qwen3MoeConfig(**(BASE | dict(hidden_size=40, moe_intermediate_size=38, num_experts=5,
                                                   num_experts_per_tok=2, norm_topk_prob=True))), True),
    "qwen3-moe-mixed": (tf.Qwen3MoeConfig(**(BASE | dict(hidden_size=40, moe_intermediate_size=22, num_experts=4,
                                                         num_experts_per_tok=3, norm_topk_prob=False,
                                                         mlp_only_layers=[0]))), False),
}


# Fixtures that also get a model.gguf. (OPT has no GGUF architecture.)
GGUF_ARCH = {"bamboo": "bamboo", "llama2-linear": "llama", "llama3": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
             "qwen3-moe": "qwen3moe", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "phi3-longrope": "phi3",
             "gpt2": "gpt2", "gpt-neox": "gptneox"}

# Stored as f32; the rest as f16, which loses nothing (see `randomise`), except those named bf16.
AS_F32 = ("llama2", "llama3", "gpt2", "gpt-neox", "opt")


def randomise(model, name):
    """Weights large enough that logits spread and attention is not uniform; norms near one (Gemma: near zero)."""
    torch.manual_seed(zlib.crc32(name.encode()))
    for key, p in model.named_parameters():
        noise = torch.randn(p.shape)
        if p.ndim >= 2:
            value = noise * (0.6 if "embed" in key or "wte" in key else 0.2)
        elif key.endswith("bias"):
            value = noise * 0.3
        else:
            value = noise * 0.3 + (0.0 if "gemma" in name else 1.0)
        p.data.copy_(value.half().float())
        if name.endswith("bf16"):
            p.data.copy_(p.data.bfloat16().float())


def to_gguf(name, config, weights, path):
    """Writes `weights` (Hugging Face names) the way llama.cpp's converter does, matrices in f16, vectors in f32."""
    arch = GGUF_ARCH[name]
    w = gguf.GGUFWriter(path, arch)
    known = "llama" if arch == "bamboo" else arch
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[known], config.num_hidden_layers)
    gguf_metadata(w, arch, config)
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    experts = {}
    for key, t in weights.items():
        t = t.numpy()
        if known == "llama" and key.split(".")[-2] in ("q_proj", "k_proj"):
            t = adjacent_pairs(t, heads if "q_proj" in key else kv)
        if arch == "gptneox" and "query_key_value" in key:
            t = t.reshape(heads, 3, -1, *t.shape[1:]).swapaxes(0, 1).reshape(t.shape)
        if arch == "gpt2" and t.ndim == 2 and ".h." in key:
            t = t.T
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            t = t + 1
        if ".experts." in key:
            layer, _, _, expert, part = key.split(".")[2:7]
            part = {"w1": "gate", "w2": "down", "w3": "up"}.get(part, part.removesuffix("_proj"))
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", {})[int(expert)] = t
        else:
            target = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert target, key
            if arch == "bamboo" and "ffn_down" in target:
                target, t = target.replace("ffn_down", "ffn_down_t"), t.T
            gguf_tensor(w, target, t)
    for key, parts in experts.items():
        gguf_tensor(w, key, np.stack([parts[i] for i in range(len(parts))]))
    if arch == "bamboo":
        predictors(w, config, weights)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    if arch == "bamboo":
        with open(path, "r+b") as f:
            f.write(b"PWRI")


def predictors(w, config, weights):
    """PowerInfer's predictors, exact ones: `fc2 relu(fc1 x)` is the gate before its activation, up to the norm's divisor."""
    eye = np.eye(config.hidden_size)
    for i in range(config.num_hidden_layers):
        gain = weights[f"model.layers.{i}.post_attention_layernorm.weight"].numpy()
        gate = weights[f"model.layers.{i}.mlp.gate_proj.weight"].numpy() * gain
        gguf_tensor(w, f"blk.{i}.fc1.weight", np.concatenate([eye, -eye]))
        gguf_tensor(w, f"blk.{i}.fc2.weight", np.concatenate([gate, -gate], 1))


def relu_on_both_branches(model):
    """The MLP of Bamboo in a Mistral."""
    for layer in model.model.layers:
        m = layer.mlp
        m.forward = lambda x, m=m: m.down_proj(m.act_fn(m.gate_proj(x)) * m.act_fn(m.up_proj(x)))


class BlockMLP(torch.nn.Module):
    """`sum over e of p_e down_e(silu(up_e x))`, `p` from the ReLU of the router's scores (thunlp/BlockFFN, own words)."""

    def __init__(self, width, settings, eps):
        super().__init__()
        self.settings, self.eps = settings, eps
        n, inner = settings["num_experts"], settings["expert_size"]
        linear = settings["ffn_type"] == "block_linear"
        self.up_proj = torch.nn.Parameter(torch.empty((n * inner, width) if linear else (n, inner, width)))
        self.down_proj = torch.nn.Parameter(torch.empty((width, n * inner) if linear else (n, width, inner)))
        self.router_proj = torch.nn.Linear(width, n, bias=False)
        if settings["norm_after_router"] == "rms":
            self.router_norm = torch.nn.Module()
            self.router_norm.weight = torch.nn.Parameter(torch.empty(n))

    def forward(self, x):
        n, inner = self.settings["num_experts"], self.settings["expert_size"]
        g = self.router_proj(x).relu()
        if self.settings["norm_after_router"] == "rms":
            p = g / (g.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.router_norm.weight
        else:
            p = g / (g.sum(-1, keepdim=True) * self.settings["norm_scale"] + 1e-5)
        up = self.up_proj.reshape(n, inner, -1)
        down = self.down_proj
        down = down.reshape(-1, n, inner).transpose(0, 1) if down.ndim == 2 else down
        h = torch.nn.functional.silu(torch.einsum("bsd,eid->bsei", x, up)) * p[..., None]
        return torch.einsum("bsei,edi->bsd", h, down)


def adjacent_pairs(t, heads):
    """Rows re-ordered from (i, i + n/2) rotary pairs to (2i, 2i + 1), as GGUF's llama architecture expects."""
    return t.reshape(heads, 2, -1, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def gguf_tensor(w, name, t):
    keep = t.ndim == 1 or "ffn_gate_inp" in name or "position_embd" in name
    w.add_tensor(name, np.ascontiguousarray(t, dtype=np.float32 if keep else np.float16))


def gguf_metadata(w, arch, c):
    rp = getattr(c, "rope_parameters", None) or {}
    main, local = rp.get("full_attention", rp), rp.get("sliding_attention")
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(getattr(c, "n_inner", None) or c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    if arch in ("gpt2", "gptneox"):
        w.add_layer_norm_eps(getattr(c, "layer_norm_eps", None) or c.layer_norm_epsilon)
    else:
        w.add_head_count_kv(c.num_key_value_heads)
        w.add_layer_norm_rms_eps(c.rms_norm_eps)
        w.add_key_length(head)
        w.add_value_length(head)
    if arch == "gptneox":
        w.add_parallel_residual(c.use_parallel_residual)
    if main:
        w.add_rope_freq_base(main["rope_theta"])
        w.add_rope_dimension_count(int(head * main.get("partial_rotary_factor", 1.0)))
    if main.get("rope_type") == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(main["factor"])
    if main.get("rope_type") == "llama3":
        gguf_tensor(w, "rope_freqs.weight", llama3_factors(main, head))
    if main.get("rope_type") == "longrope":
        original = c.original_max_position_embeddings
        w.add_rope_scaling_orig_ctx_len(original)
        factor = c.max_position_embeddings / original
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        gguf_tensor(w, "rope_factors_short.weight", np.array(main["short_factor"]))
        gguf_tensor(w, "rope_factors_long.weight", np.array(main["long_factor"]))
    if local:
        w.add_rope_freq_base_swa(local["rope_theta"])
    if getattr(c, "sliding_window", None):
        w.add_sliding_window(c.sliding_window)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
        w.add_attention_scale(c.query_pre_attn_scalar**-0.5)
    if getattr(c, "num_experts_per_tok", None):
        w.add_expert_count(getattr(c, "num_local_experts", None) or c.num_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        if arch == "qwen3moe":
            w.add_expert_feed_forward_length(c.moe_intermediate_size)


def llama3_factors(rp, head):
    """Divisors of the frequencies: 1 for short wavelengths, `factor` for long ones, a ramp between."""
    freqs = 1.0 / rp["rope_theta"] ** (np.arange(0, head, 2) / head)
    turns = rp["original_max_position_embeddings"] * freqs / (2 * np.pi)
    ramp = (turns - rp["low_freq_factor"]) / (rp["high_freq_factor"] - rp["low_freq_factor"])
    ramp = np.clip(ramp, 0, 1)
    return 1 / ((1 - ramp) / rp["factor"] + ramp)


def legacy_rope(cfg):
    """Writes the rotary settings the way checkpoints did before `rope_parameters` existed."""
    rp = cfg.pop("rope_parameters", None)
    if rp is None:
        return
    theta = rp.pop("rope_theta")
    cfg["rotary_emb_base" if cfg["model_type"] == "gpt_neox" else "rope_theta"] = theta
    kind = rp.pop("rope_type", "default")
    if "partial_rotary_factor" in rp:
        share = rp.pop("partial_rotary_factor")
        cfg["rotary_pct" if cfg["model_type"] == "gpt_neox" else "partial_rotary_factor"] = share
    if "original_max_position_embeddings" in rp and kind == "longrope":
        cfg["original_max_position_embeddings"] = rp.pop("original_max_position_embeddings")
    cfg["rope_scaling"] = None if kind == "default" else {"type": kind, **rp}


def make(name):
    config, legacy = MODELS[name]
    config._attn_implementation = config._experts_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    for layer in model.model.layers if name in BLOCKFFN else []:
        layer.mlp = BlockMLP(config.hidden_size, BLOCKFFN[name], config.rms_norm_eps)
    randomise(model, name)
    if name == "bamboo":
        relu_on_both_branches(model)
    vocab = config.vocab_size
    ids = torch.randint(3, vocab, (1, TOKENS), generator=torch.Generator().manual_seed(7))
    ids[0, 0] = 1
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].float()
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32 if name in AS_F32 else torch.float16
    model.to(dtype).save_pretrained(folder, max_shard_size="64KB" if name == "mixtral" else "50GB")
    for extra in folder.iterdir():
        if extra.name != "config.json" and ".safetensors" not in extra.name:
            extra.unlink()
    if name in GGUF_ARCH:
        weights = {}
        for part in sorted(folder.glob("*.safetensors")):
            weights |= {k: v.float() for k, v in load_file(part).items()}
        to_gguf(name, config, weights, folder / "model.gguf")
    cfg = json.loads((folder / "config.json").read_text())
    cfg["dtype"] = str(dtype).removeprefix("torch.")
    if name == "bamboo":
        cfg |= {"architectures": ["BambooForCausalLM"], "model_type": "bamboo"}
    if name == "minicpm":
        cfg |= {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "scale_emb": 3, "scale_depth": 1.4,
                "dim_model_base": 16}
        for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
            cfg.pop(key)
    if name in BLOCKFFN:
        cfg |= {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"} | BLOCKFFN[name]
    if legacy:
        legacy_rope(cfg)
        cfg["torch_dtype"] = cfg.pop("dtype")
    (folder / "config.json").write_text(json.dumps(cfg, indent=1, sort_keys=True) + "\n")
    save_file({"ids": ids[0].to(torch.int32), "logits": logits.contiguous()}, folder / "expected.safetensors")
    print(f"{name:18} range {logits.min():.2f} .. {logits.max():.2f}, "
          f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODELS:
        make(wanted)
