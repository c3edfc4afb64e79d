//! Whole runs on the embedded model and small fixtures: what is written, resumed, refused.

use super::{block::decoded, *};
use crate::{embedded, model::load, reference};
use lacuna_methods::registry;
use std::{fs, io};

/// The embedded model as a directory.
pub(super) fn embedded_model(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    fs::create_dir_all(&model).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let bytes = embedded::file(name).expect("a part of the embedded model");
        fs::write(model.join(name), &*bytes).unwrap();
    }
    model
}

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Windows of tokens below `vocab`, as if from a text.
pub(super) fn text(vocab: u32, windows: usize, length: usize) -> Calibration {
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab;
    let windows = (0..windows).map(|w| (0..length).map(|t| token(w * length + t + 1)).collect()).collect();
    Calibration { windows, sha256: "of a text".into(), available: 1 << 20 }
}

pub(super) fn request(model: &Path, output: &Path, spec: &str, calibration: Option<Calibration>) -> Request {
    Request {
        model: model.to_owned(),
        output: output.to_owned(),
        gguf: false,
        steps: registry::parse(spec).unwrap(),
        ratios: Ratios::Uniform,
        goal: None,
        lock: None,
        calibration,
        seed: 7,
        threads: 2,
        streams_in_memory: 1 << 30,
    }
}

pub(super) fn run(request: &Request) -> Result<Report> {
    compress(request, &mut |_| {})
}

pub(super) fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(p).unwrap())).collect()
}

pub(super) fn zeros(model: &Model) -> Vec<f64> {
    let of = |w: &lacuna_core::weight::Weight| {
        let all = decoded(w);
        all.iter().filter(|w| **w == 0.0).count() as f64 / all.len() as f64
    };
    let linears = model.blocks.iter().flat_map(|b| Proj::ALL.into_iter().filter_map(|p| b.linear(p)));
    linears.map(|l| of(&l.weight)).collect()
}

#[test]
fn what_cannot_be_written_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |model: &Path, out: &str, spec: &str| {
        let mut layers = 0;
        let request = request(model, &dir.path().join(out), spec, None);
        let e = compress(&request, &mut |p| layers += usize::from(matches!(p, Progress::Layer(_)))).unwrap_err();
        assert_eq!((layers, fs::read_dir(dir.path()).unwrap().count()), (0, 0), "{e}");
        e.to_string()
    };
    let e = refused(&fixture("llama2"), "out", "rtn=4:group=32");
    assert!(e.contains("groups of 32 do not divide rows of") && e.contains("the largest that divides all is 2"), "{e}");
    let e = refused(&fixture("bamboo").join("model.gguf"), "out.gguf", "magnitude=0.5");
    assert!(e.contains("PowerInfer") && e.contains("Hugging Face"), "{e}");
}

#[test]
fn a_pruned_model_loads_with_the_zeros_it_should_have() {
    let dir = tempfile::tempdir().unwrap();
    for (name, spec) in [
        ("llama2", "magnitude=0.5"),
        ("phi3", "magnitude=0.5:rows=1"),
        ("gpt2", "wanda=0.5"),
        ("gpt-neox", "sparsegpt=0.5"),
        ("opt", "wanda=0.5"),
        ("qwen3", "random=0.5"),
    ] {
        let (model, out) = (fixture(name), dir.path().join(name));
        let report = run(&request(&model, &out, spec, Some(text(32, 8, 24)))).unwrap();
        let (dense, sparse) =
            (load(&model, &LoadOptions::default()).unwrap(), load(&out, &LoadOptions::default()).unwrap());
        let shares = zeros(&sparse);
        assert!(shares.iter().all(|s| (s - 0.5).abs() < 0.03), "{name}: {shares:?}");
        assert!((report.sparsity() - 0.5).abs() < 0.03 && report.layers.len() == shares.len(), "{name}");
        assert_eq!(report.bytes.0, report.bytes.1, "{name}");
        assert_ne!(dense.hash, sparse.hash);
        let survivors = |m: &Model| decoded(&m.blocks[0].k.weight);
        if !spec.starts_with("sparsegpt") {
            let pairs = survivors(&dense).into_iter().zip(survivors(&sparse));
            assert!(pairs.clone().all(|(d, s)| s == 0.0 || d == s), "{name}: a survivor changed");
        }
        assert!(reference::logits(&sparse, &[1, 2, 3]).unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn codes_are_read_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    for (spec, format) in [
        ("rtn=4:group=64", Format::Q4_0),
        ("rtn=8:group=32", Format::Q8_0),
        ("rtn=2:group=32", Format::Q4_0),
        ("wanda=0.5,rtn=4:group=32", Format::Q4_0),
    ] {
        let out = dir.path().join("out");
        let mut r = request(&model, &out, spec, Some(text(vocab, 4, 64)));
        r.threads = 1;
        let report = run(&r).unwrap();
        let loaded = load(&out, &LoadOptions::default()).unwrap();
        let last = loaded.blocks.len() - 1;
        assert_eq!(loaded.blocks[last].k.weight.format(), format, "{spec}");
        // The lock's error is that of the weights that were loaded.
        let dense = decoded(&load(&model, &LoadOptions::default()).unwrap().blocks[last].k.weight);
        let coded = decoded(&loaded.blocks[last].k.weight);
        let square = |it: &mut dyn Iterator<Item = f32>| it.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let error = square(&mut dense.iter().zip(&coded).map(|(a, b)| a - b)) / square(&mut dense.iter().copied());
        let told = report.layers.iter().find(|l| l.layer == last && l.proj == "attn.k").unwrap().weight_error;
        assert!((error - told).abs() < 1e-6 * told, "{spec}: {error} {told}");
        assert!(report.bytes.1 < report.bytes.0, "{spec}");
    }
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("llama3");
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let mut request = request(&model, &whole, "sparsegpt=0.5:bits=4:group=0", Some(text(32, 8, 24)));
    let undisturbed = run(&request).unwrap();
    assert_eq!(undisturbed.resumed, 0);
    request.output = broken.clone();
    // Into the second block; further runs go on behind the first.
    for stop in 1..=undisturbed.layers.len() / 2 + 1 {
        // A panic in the middle of a block stands for the kill.
        let mut left = stop;
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            compress(&request, &mut |p| {
                if let Progress::Layer(_) = p {
                    left -= 1;
                    assert!(left > 0, "killed");
                }
            })
        }));
        assert!(killed.is_err() && !broken.exists(), "layer {stop}");
    }
    request.streams_in_memory = 0;
    let resumed = run(&request).unwrap();
    assert_eq!(tree(&whole), tree(&broken));
    assert!(resumed.resumed == 1 && resumed.layers == undisturbed.layers);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_failing_disk_leaves_the_old_output_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (fixture("llama2"), dir.path().join("out"));
    let request = request(&model, &out, "magnitude=0.5", None);
    let checkpoint = Checkpoint::open(&model, &LoadOptions::default()).unwrap();
    let plan = Plan::new(&request, &checkpoint).unwrap();
    let write = |fail_at: usize, mark: &str| {
        let mut count = 0;
        let lock = serde_json::json!({ "mark": mark });
        output::write_through(&plan, &[], &lock, &mut |path, size, body| {
            count += 1;
            let full = || io::Error::other("the disk is full");
            if count == fail_at {
                return Err(Error::io(path)(full()));
            }
            Ok(lacuna_core::atomic::write_atomically(path, Some(size), |o| body(o))?)
        })
        .map(|_| count)
    };
    let failed = (1..).take_while(|n| write(*n, "first").is_err() && !out.exists()).count();
    assert!(failed >= 3, "{failed}");
    let old = tree(&out);
    for n in 1..=failed {
        assert!(write(n, "second").unwrap_err().to_string().contains("disk is full"));
        assert_eq!(tree(&out), old);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }
    assert!(write(usize::MAX, "second").is_ok());
    assert_ne!(tree(&out), old);
}

#[test]
fn what_cannot_be_done_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (fixture("llama2"), dir.path().join("out"));
    let error = |spec: &str, calibration: Option<Calibration>| {
        let error = run(&request(&model, &out, spec, calibration)).unwrap_err().to_string();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
        error
    };
    assert!(error("wanda=0.5", None).contains("-f FILE"));
    assert!(error("wanda=0.5", Some(text(32, 1, 30))).contains("30 tokens (of 1048576 in the text) are too few"));
    assert!(error("gptq=4", Some(text(32, 1, 30))).contains("too few"));
    assert!(error("relu", None).contains("lacuna calibrate"));
    assert!(error("rtn=4:group=0,magnitude=0.5", None).contains("put steps that drop first"));
    let sparse_ratios = Request { ratios: Ratios::Lamp, ..request(&model, &out, "magnitude=0.5:keep=2:of=4", None) };
    assert!(run(&sparse_ratios).unwrap_err().to_string().contains("pattern fixes the share"));
    let onto_itself = Request { output: model.clone(), ..request(&model, &out, "magnitude=0.5", None) };
    assert!(run(&onto_itself).unwrap_err().to_string().contains("no output of this command"));
    let gpt2 = fixture("gpt2");
    let codes = run(&request(&gpt2, &out, "rtn=4:group=0", None)).unwrap_err().to_string();
    assert!(codes.contains("transposed") && codes.contains("GGUF"), "{codes}");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious.txt"), "data").unwrap();
    assert!(run(&request(&model, &out, "magnitude=0.5", None)).is_err());
    assert_eq!(fs::read(out.join("precious.txt")).unwrap(), b"data");
}

#[test]
fn gguf_files_become_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("phi3").join("model.gguf");
    let out = dir.path().join("out.gguf");
    run(&request(&model, &out, "wanda=0.5", Some(text(32, 8, 24)))).unwrap();
    let sparse = load(&out, &LoadOptions::default()).unwrap();
    assert!(zeros(&sparse).iter().all(|s| (s - 0.5).abs() < 0.03));
    assert!(dir.path().join("out.gguf.lacuna.lock.json").exists());
    let again = request(&out, &dir.path().join("wrong-name"), "wanda=0.5", Some(text(32, 8, 24)));
    assert!(run(&again).unwrap_err().to_string().contains(".gguf"));
}

#[test]
fn ratios_move_zeros_between_layers() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let out = dir.path().join("out");
    let lamp = Request { ratios: Ratios::Lamp, ..request(&model, &out, "magnitude=0.5", None) };
    let report = run(&lamp).unwrap();
    assert!((report.sparsity() - 0.5).abs() < 1e-3, "{}", report.sparsity());
    let shares = zeros(&load(&out, &LoadOptions::default()).unwrap());
    let (low, high) = shares.iter().fold((1.0_f64, 0.0_f64), |(l, h), s| (l.min(*s), h.max(*s)));
    assert!(high - low > 0.05 && high <= 0.66, "{low} to {high}");
}

#[test]
fn bits_are_chosen_within_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    let out = dir.path().join("out");
    let with = |bytes: u64| Request {
        goal: Some(Goal::Bytes(bytes)),
        ..request(&model, &out, "gptq=4:group=32", Some(text(vocab, 15, 64)))
    };
    let told = run(&with(1000)).unwrap_err().to_string();
    assert!(told.contains("1000 bytes cannot be reached"), "{told}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left");
    let least: u64 = told.split(' ').filter_map(|w| w.parse().ok()).next_back().unwrap();
    let sum = |r: &Report| r.layers.iter().filter_map(|l| l.output_error).sum::<f64>();
    let smallest = run(&with(least)).unwrap();
    assert_eq!(smallest.bytes.1, least);
    assert!(smallest.layers.iter().all(|l| l.bits == Some(2)));
    let middle = run(&with(least + (smallest.bytes.0 - least) / 3)).unwrap();
    let bits: std::collections::BTreeSet<_> = middle.layers.iter().map(|l| l.bits).collect();
    assert!(middle.bytes.1 <= least + (middle.bytes.0 - least) / 3 && bits.len() > 1, "{bits:?}");
    assert!(sum(&middle) < 0.5 * sum(&smallest));
    // What is told of a layer is what is loaded.
    let loaded = load(&out, &LoadOptions::default()).unwrap();
    for l in &middle.layers {
        let proj = Proj::ALL.into_iter().find(|p| p.name() == l.proj).unwrap();
        let format = loaded.blocks[l.layer].linear(proj).unwrap().weight.format();
        let dense = matches!(format, Format::Bf16 | Format::F32 | Format::F16);
        assert_eq!((l.bits.is_none(), l.bits == Some(8)), (dense, format == Format::Q8_0), "{l:?}");
    }
    let zeros_alone = Request { goal: Some(Goal::Bytes(5000)), ..request(&model, &out, "magnitude=0.5", None) };
    assert!(run(&zeros_alone).unwrap_err().to_string().contains("zeros alone save none"));
}

#[test]
fn a_divergence_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    let out = dir.path().join("out");
    let mut all = text(vocab, 5, 64);
    let held_out = all.windows.split_off(4);
    let with = |spec: &str, most: f64, ratios: Ratios| {
        let goal = Some(Goal::Divergence { most, held_out: held_out.clone() });
        run(&Request { goal, ratios, ..self::request(&model, &out, spec, Some(all.clone())) })
    };
    let dropped = with("wanda", 0.05, Ratios::Loss).unwrap();
    assert!(dropped.divergence.unwrap() <= 0.05 && dropped.sparsity() > 0.02, "{dropped:?}");
    let coded = with("rtn=4:group=32", 0.02, Ratios::Uniform).unwrap();
    assert!(coded.divergence.unwrap() <= 0.02 && coded.bytes.1 < coded.bytes.0, "{:?}", coded.bytes);
    let lock = fs::read_to_string(out.join("lacuna.lock.json")).unwrap();
    assert!(lock.contains("\"max_kl\": 0.02"), "{lock}");
    let own = fs::copy(out.join("lacuna.lock.json"), dir.path().join("lock")).map(|_| dir.path().join("lock")).unwrap();
    let goal = Some(Goal::Divergence { most: 0.02, held_out: held_out.clone() });
    let request = self::request(&model, &out, "rtn=4:group=32", Some(all.clone()));
    assert!(run(&Request { goal, lock: Some(own.clone()), ..request }).is_ok(), "a lock can be followed");
    fs::remove_file(own).unwrap();
    let none = with("magnitude=0.5,rtn=4:group=32", 1e-6, Ratios::Uniform).unwrap_err().to_string();
    assert!(none.contains("smallest divergence"), "{none}");
    assert!(with("magnitude=0.5:keep=2:of=4", 0.1, Ratios::Uniform).unwrap_err().to_string().contains("pattern"));
    assert!(with("wanda", f64::NAN, Ratios::Uniform).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "only the model and the output");
}

#[test]
fn loss_based_shares_lose_less() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    let out = dir.path().join("out");
    let with = |ratios| Request { ratios, ..request(&model, &out, "wanda=0.5", Some(text(vocab, 8, 64))) };
    let (uniform, loss) = (run(&with(Ratios::Uniform)).unwrap(), run(&with(Ratios::Loss)).unwrap());
    assert!((loss.sparsity() - uniform.sparsity()).abs() < 0.01, "{}", loss.sparsity());
    let sum = |r: &Report| r.layers.iter().filter_map(|l| l.output_error).sum::<f64>();
    assert!(sum(&loss) < 0.97 * sum(&uniform), "{} {}", sum(&loss), sum(&uniform));
}

/// Weights that the published codes of Wanda and SparseGPT (locuslab/wanda, IST-DASLab/sparsegpt, with PyTorch 2.15) made of
/// the fixture, calibrated on the same windows: `tests/references/pruned-llama3.safetensors`.
#[test]
fn the_published_codes_give_the_same_masks_and_weights() {
    let dir = tempfile::tempdir().unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/references/pruned-llama3.safetensors");
    let theirs = Tensors::parse(fs::read(file).unwrap().into()).unwrap();
    for method in ["wanda", "sparsegpt"] {
        let out = dir.path().join(method);
        let request = request(&fixture("llama3"), &out, &format!("{method}=0.5"), Some(text(32, 8, 24)));
        let model = load(&fixture("llama3"), &LoadOptions::default()).unwrap();
        let mut choices = Choices::default();
        for ((layer, proj), size) in Plan::places(&model) {
            // SparseGPT's code drops one weight more in every block of columns; these layers have one block.
            let all = (size.outputs * size.inputs) as f64;
            let more = if method == "sparsegpt" { 1.0 } else { 0.0 };
            choices.entry(layer, proj).share = Some(0.5 + more / all);
        }
        let found = Found { choices: &choices, divergence: None, asked: &request };
        super::run(&request, Some(found), &mut |_| {}).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let ours = Tensors::parse(bytes.into()).unwrap();
        let numbers = |t: &Tensors, name: &str| -> Vec<f32> {
            let bytes = t.bytes(t.get(name).unwrap()).unwrap();
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        let mut compared = 0;
        for entry in theirs.entries() {
            let Some(name) = entry.name.strip_prefix(&format!("{method}.")) else { continue };
            let (a, b) = (numbers(&ours, name), numbers(&theirs, &entry.name));
            let masks = a.iter().zip(&b).filter(|(a, b)| (**a == 0.0) != (**b == 0.0)).count();
            let (lost, all) = a.iter().zip(&b).fold((0.0, 0.0), |s, (a, b)| (s.0 + (a - b).powi(2), s.1 + b.powi(2)));
            println!("{}: {masks} of {} entries differ, weights by {:.1e}", entry.name, a.len(), (lost / all).sqrt());
            assert!(a.len() == b.len() && masks == 0 && lost <= 1e-8 * all, "{}: {masks} {lost} {all}", entry.name);
            compared += 1;
        }
        assert_eq!(compared, 5, "{method}");
    }
}

#[test]
fn a_lock_holds_a_run_to_its_model_text_and_methods() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out, lock) = (dir.path().join("model"), dir.path().join("out"), dir.path().join("lock.json"));
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("llama2").join(name), model.join(name)).unwrap();
    }
    let request = |spec: &str, tokens| request(&model, &out, spec, Some(text(32, 8, tokens)));
    run(&request("wanda=0.5", 24)).unwrap();
    fs::rename(out.join("lacuna.lock.json"), &lock).unwrap();
    fs::remove_dir_all(&out).unwrap();
    let held = |spec: &str, tokens, seed| run(&Request { lock: Some(lock.clone()), seed, ..request(spec, tokens) });
    let refused = |r: Result<Report>| {
        assert!(!out.exists());
        r.unwrap_err().to_string()
    };
    assert!(refused(held("wanda=0.4", 24, 7)).contains("`steps` is"));
    assert!(refused(held("wanda=0.5", 23, 7)).contains("`calibration` is"));
    assert!(refused(held("wanda=0.5", 24, 8)).contains("`seed` is 8 in this run, the lock says 7"));
    let mut bytes = fs::read(model.join("model.safetensors")).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(model.join("model.safetensors"), &bytes).unwrap();
    let changed = refused(held("wanda=0.5", 24, 7));
    assert!(
        changed.contains("`model.safetensors` of the model has SHA-256") && changed.contains("another revision"),
        "{changed}"
    );
    bytes[last] ^= 1;
    fs::write(model.join("model.safetensors"), &bytes).unwrap();
    held("wanda=0.5", 24, 7).unwrap();
    assert_eq!(fs::read(out.join("lacuna.lock.json")).unwrap(), fs::read(&lock).unwrap());
    fs::write(&lock, "{").unwrap();
    assert!(held("wanda=0.5", 24, 7).unwrap_err().to_string().contains("not a lock"));
}

#[test]
fn ids_of_another_tokenizer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let foreign = text(50_000, 8, 24);
    let error =
        run(&request(&fixture("llama2"), &dir.path().join("out"), "wanda=0.5", Some(foreign))).unwrap_err().to_string();
    assert!(error.contains("vocabulary") && error.contains("131"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was begun");
}

#[test]
fn factors_folded_into_norms_leave_every_logit() {
    let ids: Vec<u32> = (1..20).collect();
    // RMS norms, layer norms with biases, F32 and BF16.
    for name in ["llama2", "gpt-neox", "opt", "llama2-bf16"] {
        let dense = load(&fixture(name), &LoadOptions::default()).unwrap();
        let factors: Vec<f32> = (0..dense.spec.width).map(|j| ((j % 5) as f32 - 2.0).exp2()).collect();
        let mut folded = dense.clone();
        for block in &mut folded.blocks {
            let mlp: &[Proj] = if block.linear(Proj::Gate).is_some() { &[Proj::Gate, Proj::Up] } else { &[Proj::Up] };
            for group in [&[Proj::Q, Proj::K, Proj::V][..], mlp] {
                assert!(fold::fits(block, group, &factors, block.q.weight.format()), "{name}");
                fold::into(block, group, &factors);
            }
        }
        assert_ne!(dense.blocks[0].mlp_norm.gain, folded.blocks[0].mlp_norm.gain, "{name}");
        assert_eq!(reference::logits(&dense, &ids).unwrap(), reference::logits(&folded, &ids).unwrap(), "{name}");
    }
}

/// The embedded model with strong channels: some gains of norms are 32 times larger, and what reads them 32 times smaller, so
/// it computes the same.
fn with_outliers(dir: &Path) -> PathBuf {
    let model = embedded_model(dir);
    let file = model.join("model.safetensors");
    let tensors = Tensors::parse(fs::read(&file).unwrap().into()).unwrap();
    let mut new = Vec::new();
    for e in tensors.entries() {
        let format = e.format().unwrap();
        let mut numbers = vec![0.0; e.shape.iter().product::<u64>() as usize];
        lacuna_kernels::convert::decode_run(format, &tensors.bytes(e).unwrap(), &mut numbers);
        let cols = *e.shape.last().unwrap() as usize;
        let reads = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"].iter().any(|n| e.name.contains(n));
        let norm = ["input_layernorm", "post_attention_layernorm"].iter().any(|n| e.name.contains(n));
        let factor = if norm { 32.0 } else { 1.0 / 32.0 };
        if norm || reads {
            // A third of the channels, spread by a fixed pattern.
            numbers.iter_mut().enumerate().filter(|(i, _)| i % cols * 7 % 11 < 4).for_each(|(_, x)| *x *= factor);
        }
        new.push((e.name.clone(), e.dtype, e.shape.clone(), tensors::numbers(format, &numbers)));
    }
    let new: Vec<_> = new
        .iter()
        .map(|(name, dtype, shape, data)| safetensors::NewTensor { name, dtype: *dtype, shape, data })
        .collect();
    let mut bytes = Vec::new();
    safetensors::write(&new, &[], &mut bytes).unwrap();
    fs::write(file, bytes).unwrap();
    model
}

#[test]
fn what_awq_folds_is_written_and_leaves_every_logit() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (with_outliers(dir.path()), dir.path().join("out"));
    let dense = load(&model, &LoadOptions::default()).unwrap();
    let mut choices = Choices::default();
    Plan::places(&dense).iter().for_each(|((l, p), _)| choices.entry(*l, *p).bits = Some(UNROUNDED));
    let request = request(&model, &out, "awq=3:group=32", Some(text(dense.spec.vocab as u32, 15, 64)));
    super::run(&request, Some(Found { choices: &choices, divergence: None, asked: &request }), &mut |_| {}).unwrap();
    let folded = load(&out, &LoadOptions::default()).unwrap();
    let changed = |a: &crate::model::weights::Block, b: &crate::model::weights::Block| {
        usize::from(a.attn_norm.gain != b.attn_norm.gain) + usize::from(a.mlp_norm.gain != b.mlp_norm.gain)
    };
    let norms: usize = dense.blocks.iter().zip(&folded.blocks).map(|(a, b)| changed(a, b)).sum();
    assert!(norms >= dense.blocks.len(), "only {norms} norms took factors");
    let ids: Vec<u32> = (1..20).collect();
    assert_eq!(reference::logits(&dense, &ids).unwrap(), reference::logits(&folded, &ids).unwrap());
}

#[test]
fn factors_of_awq_help_a_model_with_strong_channels() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (with_outliers(dir.path()), dir.path().join("out"));
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    let error = |spec: &str| {
        let report = run(&request(&model, &out, spec, Some(text(vocab, 15, 64)))).unwrap();
        let read = |l: &&LayerReport| ["attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"].contains(&l.proj.as_str());
        report.layers.iter().filter(read).filter_map(|l| l.output_error).sum::<f64>()
    };
    // Both see the inputs, so that both report the same error; the second neither scales nor clips.
    let (awq, plain) = (error("awq=3:group=32:clip=0"), error("awq=3:group=32:clip=0:scale=0"));
    println!("output errors: {awq:.4} with factors, {plain:.4} without");
    assert!(awq < 0.5 * plain, "{awq} {plain}");
}

#[test]
fn pairs_and_books_are_packed_beside_dense_weights() {
    use crate::engine::{Engine, Options, bitmaps::BitmapOptions};
    use lacuna_kernels::{codebook, isa};
    use std::sync::Arc;
    if !(2..=4).all(|bits| codebook::pays(isa::get(), bits)) {
        println!("skipped: codes of pairs are not read with {}", isa::get());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (embedded_model(dir.path()), dir.path().join("out"));
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    let logits = |engine: &Engine, ids: &[u32]| {
        let mut all = Vec::new();
        engine.session(64).unwrap().score(ids, &mut |_, row| all.extend_from_slice(row)).unwrap();
        all
    };
    let ids: Vec<u32> = (1..20).collect();
    for spec in ["gptvq=2", "gptvq=3", "gptvq=4:rounds=5", "kmeans=3:vector=1", "wanda=0.5,gptvq=3"] {
        let report = run(&request(&model, &out, spec, Some(text(vocab, 15, 64)))).unwrap();
        let loaded = Arc::new(load(&out, &LoadOptions::default()).unwrap());
        let file = loaded.packed.as_ref().expect("a container");
        assert_eq!(file.names().count(), report.layers.len(), "{spec}");
        assert_eq!(report.layers.iter().map(|l| l.bytes.1).sum::<u64>(), file.bytes(), "{spec}");
        assert!(report.bytes.1 < report.bytes.0, "{spec}");
        let options = Options { threads: 2, kv: crate::engine::KvType::F32, ..Options::default() };
        let dense = Engine::new(loaded.clone(), options).unwrap();
        let cache = BitmapOptions::for_model(None, &loaded.hash, 2);
        let (packed, what) = dense.with_bitmaps(&cache, &|_, _| {}).unwrap().expect("books are used");
        assert_eq!((what.books, what.matrices), (report.layers.len(), 0), "{spec}");
        assert!(what.bytes == file.bytes() && what.dense_bytes > 3 * what.bytes, "{spec}: {what:?}");
        // Every number is that of the dense matrix, so prefill has its bits where both are computed in BF16.
        for (layer, block) in loaded.blocks.iter().enumerate() {
            for proj in Proj::ALL {
                let (Some(a), Some(b)) = (block.linear(proj), what.model.blocks[layer].linear(proj)) else { continue };
                let books = b.weight.codebook();
                let mut bytes = vec![0; 2 * a.weight.outputs() * a.weight.inputs()];
                lacuna_kernels::codebook::dense(&books, &mut bytes);
                let mut y = vec![0.0; bytes.len() / 2];
                lacuna_kernels::convert::decode_run(Format::Bf16, &bytes, &mut y);
                assert_eq!(decoded(&a.weight), y, "{spec}: layers.{layer}.{proj}");
            }
        }
        let (a, b) = (logits(&dense, &ids), logits(&packed, &ids));
        let (low, high) = a.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low);
        assert!(worst < 2e-2, "{spec}: {worst}");
    }
    // A flipped byte is told by its tensor; a container of other weights is not used.
    let path = out.join("model.lacuna");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let last = bad.len() - 100;
    bad[last] ^= 4;
    fs::write(&path, &bad).unwrap();
    let loaded = Arc::new(load(&out, &LoadOptions::default()).unwrap());
    let engine = Engine::new(loaded.clone(), Options::default()).unwrap();
    let cache = BitmapOptions::for_model(None, &loaded.hash, 1);
    let e = engine.with_bitmaps(&cache, &|_, _| {}).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(e.contains("model.lacuna") && e.contains("layers.") && e.contains("checksum"), "{e}");
    fs::write(&path, &good).unwrap();
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    fs::write(out.join("config.json"), config + " ").unwrap();
    assert!(load(&out, &LoadOptions::default()).unwrap().packed.is_none());
    // Refused before any work.
    let e = run(&request(&model, &dir.path().join("no"), "gptvq=2,gptq=4:group=32", Some(text(vocab, 15, 64))));
    assert!(e.unwrap_err().to_string().contains("put steps that drop first"));
    let gguf =
        Request { gguf: true, ..request(&model, &dir.path().join("no.gguf"), "gptvq=2", Some(text(vocab, 15, 64))) };
    assert!(run(&gguf).unwrap_err().to_string().contains("GGUF"));
}

#[test]
fn gguf_files_of_hugging_face_models() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let vocab = load(&model, &LoadOptions::default()).unwrap().spec.vocab as u32;
    let ids: Vec<u32> = (1..20).collect();
    let logits = |path: &Path| reference::logits(&load(path, &LoadOptions::default()).unwrap(), &ids).unwrap();
    for (spec, format) in [
        ("wanda=0.5", None),
        ("gptq=4:group=64", Some(Format::Q4_0)),
        ("rtn=8:group=32", Some(Format::Q8_0)),
        ("wanda=0.5,gptq=4:group=32", Some(Format::Q4_0)),
    ] {
        let (hf, gguf) = (dir.path().join("hf"), dir.path().join("out.gguf"));
        run(&request(&model, &hf, spec, Some(text(vocab, 15, 64)))).unwrap();
        let report = run(&Request { gguf: true, ..request(&model, &gguf, spec, Some(text(vocab, 15, 64))) }).unwrap();
        let (a, b) = (logits(&hf), logits(&gguf));
        let (low, high) = a.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low);
        assert!(worst < 1e-5, "{spec}: {worst}");
        let loaded = load(&gguf, &LoadOptions::default()).unwrap();
        assert!(format.is_none_or(|f| loaded.blocks[0].linear(Proj::Down).unwrap().weight.format() == f), "{spec}");
        assert!(
            report.notes.iter().any(|n| n.contains("Q4_K")) == spec.contains("wanda"),
            "{spec}: {:?}",
            report.notes
        );
        assert!(dir.path().join("out.gguf.lacuna.lock.json").exists());
        let file = lacuna_core::format::gguf::Gguf::open(&gguf, lacuna_core::map::LoadMode::Map).unwrap();
        let bytes: usize = file.tensors().map(|t| file.bytes(&t).unwrap().len()).sum();
        assert_eq!(bytes as u64, report.bytes.1, "{spec}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "the model, a directory, a file and its lock");
    // What a file cannot hold is refused before any work.
    let refused = |model: &Path, out: &str, spec: &str| {
        let asked = request(model, &dir.path().join(out), spec, Some(text(32, 8, 24)));
        let e =
            compress(&Request { gguf: true, ..asked }, &mut |p| assert!(!matches!(p, Progress::Layer(_)))).unwrap_err();
        e.to_string()
    };
    assert!(refused(&fixture("opt"), "a.gguf", "magnitude=0.5").contains("`opt`"));
    assert!(refused(&fixture("llama3"), "a.gguf", "rtn=4:group=0").contains("GGUF"));
    assert!(refused(&fixture("llama3"), "a", "magnitude=0.5").contains(".gguf"));
    // A budget is one of the file that is written.
    let gguf = dir.path().join("out.gguf");
    let asked = request(&model, &gguf, "gptq=4:group=32", Some(text(vocab, 15, 64)));
    let told = run(&Request { gguf: true, goal: Some(Goal::Bytes(1000)), ..asked.clone() }).unwrap_err().to_string();
    let least: u64 = told.split(' ').filter_map(|w| w.parse().ok()).next_back().unwrap();
    let small = run(&Request { gguf: true, goal: Some(Goal::Bytes(least)), ..asked }).unwrap();
    assert_eq!(small.bytes.1, least);
}
