use super::*;
use lacuna_core::{
    format::gguf::{Gguf, decode_run},
    map::LoadMode,
};

fn synth(kind: Kind, act: Act) -> (tempfile::TempDir, Gguf) {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("m.gguf");
    let args = Args {
        shape: "tiny".into(),
        kind,
        output: output.clone(),
        act,
        open: 0.1,
        layers: Some(4),
        zeros: 0.0,
        seed: 7,
    };
    run(&args).unwrap();
    let gguf = Gguf::open(&output, LoadMode::Read).unwrap();
    (dir, gguf)
}

fn values(g: &Gguf, name: &str) -> Vec<f32> {
    let t = g.require(name).unwrap();
    let (rows, cols) = t.rows_cols();
    let mut out = vec![0.0; rows * cols];
    decode_run(t.kind, &g.bytes(&t).unwrap(), &mut out).unwrap();
    out
}

#[test]
fn every_type_can_be_read_back_with_its_shape() {
    for kind in [Kind::F32, Kind::F16, Kind::Bf16, Kind::Q8_0, Kind::Q4_0, Kind::Q4KM] {
        let (_dir, g) = synth(kind, Act::Silu);
        assert_eq!(g.tensors().len(), 1 + 4 * 9 + 2);
        assert_eq!(g.metadata().strings("tokenizer.ggml.tokens").unwrap().len(), 512);
        assert_eq!(g.require("blk.3.ffn_down.weight").unwrap().dims, [768, 256]);
        let down = values(&g, "blk.0.ffn_down.weight");
        let size = (down.iter().map(|v| v * v).sum::<f32>() / down.len() as f32).sqrt();
        assert!((size * 768.0_f32.sqrt() - 1.0).abs() < 0.02, "{}: {size}", kind.name());
        assert!(values(&g, "blk.2.attn_norm.weight").iter().all(|v| *v == 1.0));
    }
}

#[test]
fn mixtures_follow_llama_quantize() {
    let (_dir, g) = synth(Kind::Q4KM, Act::Silu);
    let kinds = |name: &str| {
        (0..4).map(|l| g.require(&format!("blk.{l}.{name}.weight")).unwrap().kind.name()).collect::<Vec<_>>()
    };
    assert_eq!(kinds("ffn_down"), ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]);
    assert_eq!(kinds("attn_v"), kinds("ffn_down"));
    assert_eq!(kinds("ffn_up"), ["Q4_K"; 4]);
    assert_eq!(g.require("output.weight").unwrap().kind.name(), "Q6_K");
    assert_eq!(g.require("token_embd.weight").unwrap().kind.name(), "Q4_K");
    let smol = Shape::named("smollm2-135m").unwrap();
    assert_eq!(
        (Kind::Q4_0.of_embedding(&smol), Kind::Q4_0.of_layer(&smol, &ROLES[0], 0)),
        (Format::Q8_0, Format::Q4_0)
    );
}

#[test]
fn a_relu_model_opens_the_share_asked_for() {
    for kind in [Kind::F16, Kind::Q4_0] {
        let (_dir, g) = synth(kind, Act::Relu);
        assert_eq!(g.metadata().str("lacuna.hidden_act").unwrap(), "relu");
        let (embedding, gate) = (values(&g, "token_embd.weight"), values(&g, "blk.0.ffn_gate.weight"));
        let (mut open, mut all) = (0, 0);
        for x in embedding.chunks(256).take(100) {
            let dots = gate.chunks(256).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>());
            // The norm divides by a positive number, which does not change a sign.
            open += dots.filter(|d| *d > 0.0).count();
            all += 768;
        }
        let share = open as f64 / f64::from(all);
        assert!((0.08..0.12).contains(&share), "{}: {share}", kind.name());
    }
}

#[test]
fn wrong_options_are_errors() {
    let args = |shape: &str, open, layers| Args {
        shape: shape.into(),
        kind: Kind::F16,
        output: "/nonexistent/m.gguf".into(),
        act: Act::Relu,
        open,
        layers,
        zeros: 0.0,
        seed: 1,
    };
    for bad in [
        args("huge", 0.1, None),
        args("tiny", 0.9, None),
        args("tiny", 0.0, None),
        args("tiny", 0.1, Some(0)),
        args("tiny", 0.1, None),
    ] {
        assert!(run(&bad).is_err());
    }
}
