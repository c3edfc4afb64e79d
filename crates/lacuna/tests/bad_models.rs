//! Models that are damaged, hostile or not ours: each is an error that names file, tensor or key, and none a panic.

use lacuna::engine::KvType;
use lacuna::model::{Checkpoint, Demand, LoadOptions, Model, load};
use lacuna_core::map::LoadMode;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of the fixture `name` with settings changed (null removes one).
fn changed(name: &str, changes: Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let file = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(&file, config.to_string()).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

fn message(path: &Path) -> String {
    load(path, &LoadOptions::default()).unwrap_err().to_string()
}

#[test]
fn settings_that_cannot_be_name_the_file_and_the_key() {
    let cases: [(&str, Value, &[&str]); 27] = [
        (
            "llama2",
            json!({"architectures": ["FrogForCausalLM"]}),
            &["`FrogForCausalLM`", "LlamaForCausalLM", "GPT2LMHeadModel"],
        ),
        ("llama2", json!({"hidden_size": 0}), &["config.json", "`hidden_size`", "found 0"]),
        ("llama2", json!({"hidden_size": 18446744073709551615_u64}), &["`hidden_size`", "18446744073709551615"]),
        ("llama2", json!({"num_key_value_heads": 4}), &["`num_key_value_heads`", "6 query heads"]),
        (
            "llama2",
            json!({"head_dim": null, "num_attention_heads": 7, "num_key_value_heads": 7}),
            &["do not divide the width 48"],
        ),
        ("llama2", json!({"hidden_act": "frog"}), &["unknown activation `frog`", "silu", "relu2"]),
        ("llama2", json!({"num_hidden_layers": 1000000}), &["`num_hidden_layers`", "1000000"]),
        ("llama2", json!({"num_hidden_layers": 3}), &["`model.layers.2.self_attn.q_proj.weight` is missing"]),
        (
            "llama2",
            json!({"intermediate_size": 75}),
            &["`model.layers.0.mlp.gate_proj.weight`", "[74, 48]", "[75, 48]"],
        ),
        ("llama2", json!({"rms_norm_eps": -1.0}), &["`rms_norm_eps`"]),
        ("llama2", json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), ["rope scaling `yarn`"].as_slice()),
        ("mixtral", json!({"num_experts_per_tok": 6}), &["`num_experts_per_tok`", "6 active experts of 5"]),
        ("opt", json!({"do_layer_norm_before": false}), &["opt-350m"]),
        ("gpt-neox", json!({"num_key_value_heads": 1}), &["fewer key/value heads"]),
        ("minicpm", json!({"attention_type": "linear"}), &["attention of the type `linear`", "mla"]),
        ("minicpm", json!({"ffn_type": "moe"}), &["an MLP of the type `moe`", "block_linear"]),
        ("minicpm", json!({"num_experts": 8}), &["MiniCPM-MoE"]),
        ("minicpm", json!({"sparse_config": {"topk": 64}}), &["`sparse_config`", "full attention"]),
        ("minicpm", json!({"scale_depth": 0}), &["`scale_depth`", "above 0"]),
        ("minicpm3", json!({"v_head_dim": 12}), &["values of 12 numbers beside keys of 11"]),
        ("minicpm3", json!({"qk_rope_head_dim": 5}), &["5 rotated components, not an even number"]),
        (
            "minicpm3",
            json!({"kv_lora_rank": 14}),
            &["`model.layers.0.self_attn.kv_a_proj_with_mqa.weight`", "[20, 42]"],
        ),
        ("blockffn", json!({"router_act": "softmax"}), &["a router with the activation `softmax`"]),
        ("blockffn", json!({"norm_after_router": "l2"}), &["a router with the norm `l2`", "rms"]),
        ("blockffn", json!({"expert_size": 11}), &["`model.layers.0.mlp.up_proj`", "[7, 11, 42]", "[7, 10, 42]"]),
        ("blockffn-linear", json!({"num_experts": 8}), &["`model.layers.0.mlp.router_proj.weight`", "[8, 42]"]),
        ("blockffn-linear", json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), &["rope scaling `dynamic`"]),
    ];
    for (name, changes, wanted) in cases {
        let shown = changes.to_string();
        let (_keep, path) = changed(name, changes);
        let found = message(&path);
        assert!(wanted.iter().all(|w| found.contains(w)), "{name} with {shown}: {found}");
    }
}

/// Every setting of every fixture replaced by values of the wrong type and the wrong size: an error or a model, no panic.
#[test]
fn no_single_setting_makes_a_panic() {
    let hostile = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(1e300),
        json!("x"),
        json!([]),
        json!({}),
        json!(true),
        json!(4294967296_u64),
        json!(18446744073709551615_u64),
        json!([1e300, "a"]),
        json!({"rope_type": "llama3"}),
    ];
    for name in [
        "llama3",
        "gemma3",
        "phi3-longrope",
        "gpt2",
        "gpt-neox",
        "opt",
        "qwen3-moe-mixed",
        "qwen2-window",
        "minicpm",
        "minicpm3",
        "blockffn",
        "blockffn-linear",
    ] {
        let (_keep, path) = changed(name, json!({}));
        let file = path.join("config.json");
        let config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        for key in config.as_object().unwrap().keys() {
            for value in &hostile {
                let mut bad = config.clone();
                bad[key] = value.clone();
                fs::write(&file, bad.to_string()).unwrap();
                if let Ok(model) = load(&path, &LoadOptions { mode: LoadMode::Read, ..LoadOptions::default() }) {
                    runs(&model);
                }
            }
        }
    }
}

fn runs(model: &Model) {
    let logits = lacuna::reference::logits(model, &[1, 2]).unwrap_or_default();
    assert!(logits.len() == 2 * model.spec.vocab || model.spec.context < 2);
}

#[test]
fn truncated_files_are_errors() {
    for (name, file) in [("llama-relu", "model.safetensors"), ("qwen3", "model.gguf")] {
        let bytes = fs::read(fixture(name).join(file)).unwrap();
        let (_keep, dir) = changed(name, json!({}));
        // The last 31 bytes may be padding, which a GGUF file can do without.
        let step = (bytes.len() / 97).max(1);
        for cut in (0..bytes.len() - 33).step_by(step).chain([bytes.len() - 33]) {
            fs::write(dir.join(file), &bytes[..cut]).unwrap();
            let path = if file.ends_with("gguf") { dir.join(file) } else { dir.clone() };
            assert!(message(&path).contains(file), "cut at {cut}: {}", message(&path));
        }
    }
}

#[test]
fn weights_that_are_not_numbers_are_found_on_request() {
    let (_keep, dir) = changed("llama2", json!({}));
    let file = dir.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    // The data of safetensors ends with the tensor of the last name here: `model.norm.weight`, 48 numbers of 4 bytes.
    let at = bytes.len() - 4 * 5;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    assert!(load(&dir, &LoadOptions::default()).is_ok());
    let found = load(&dir, &LoadOptions { check_tensors: true, ..LoadOptions::default() }).unwrap_err().to_string();
    assert!(found.contains("`model.norm.weight` holds NaN at index 43"), "{found}");
}

#[test]
fn missing_shards_and_strange_paths_are_named() {
    let (_keep, dir) = changed("mixtral", json!({}));
    fs::remove_file(dir.join("model-00002-of-00003.safetensors")).unwrap();
    assert!(message(&dir).contains("model-00002-of-00003.safetensors"));
    assert!(message(Path::new("/nowhere/at/all")).contains("no such file or directory"));
    assert!(message(&dir.join("config.json")).contains("ends in .gguf"));
    fs::remove_file(dir.join("config.json")).unwrap();
    assert!(message(&dir).contains("config.json"));
    let (_keep, dir) = changed("blockffn", json!({}));
    fs::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap();
    assert!(message(&dir).contains("pytorch_model.bin, a pickle") && message(&dir).contains("bin_to_safetensors.py"));
}

#[test]
fn memory_is_known_before_loading() {
    let checkpoint = Checkpoint::open(&fixture("llama3").join("model.gguf"), &LoadOptions::default()).unwrap();
    let demand = Demand { context: 64, kv: KvType::F16, batch: 512, threads: 1 };
    let memory = checkpoint.memory(&demand);
    // 2 blocks, 64 positions, 3 heads of 12 for keys and of 16 for values (padded), 2 bytes.
    assert_eq!(memory.kv, 2 * 64 * 3 * (12 + 16) * 2);
    assert!(memory.weights > 70_000 && memory.weights < 110_000, "{memory:?}");
    assert!(memory.within(memory.total()).is_ok());
    let refusal = memory.within(memory.total() - 1).unwrap_err().to_string();
    assert!(refusal.contains("keys and values 21504"), "{refusal}");
}

/// Mapped matrices are parts of the file: binding copies nothing but norms and biases.
#[test]
fn matrices_are_views_of_the_file() {
    let checkpoint = Checkpoint::open(&fixture("mixtral").join("model.gguf"), &LoadOptions::default()).unwrap();
    let whole = checkpoint.source.tensors["blk.1.ffn_up_exps.weight"].bytes.clone();
    let model = checkpoint.bind().unwrap();
    let lacuna::model::weights::Mlp::Experts { experts, .. } = &model.blocks[1].mlp else { panic!("experts") };
    for (i, expert) in experts.iter().enumerate() {
        let part = expert.up.weight.bytes();
        assert_eq!(part.as_ptr() as usize - whole.as_ptr() as usize, i * part.len());
    }
}
