//! Matrices without their zeros: the same logits as with them, fewer bytes, and dense where that would not pay.

mod common;
#[allow(dead_code, reason = "each test file uses a part")]
#[path = "common/random.rs"]
mod random;

use lacuna::{
    compress::{Calibration, Request, compress},
    engine::{
        Engine, Options, Session,
        bitmaps::{BitmapOptions, Zeros},
        break_even::BreakEven,
        layouts::LayoutCache,
    },
    model::{LoadOptions, Model, load},
};
use lacuna_core::{
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, bitmap, convert, isa};
use lacuna_methods::{registry, weights::ratios::Ratios};
use random::{Kind, MlpKind, PLAIN_LLAMA, model as random_model};
use std::{fs, path::Path, sync::Arc};

/// Largest difference of logits relative to their range. Sums of Q8_0 have another order in one kernel, and scalar kernels
/// in all formats; everything else is equal to the bit.
const BOUND: f32 = 1e-4;

/// Where bitmaps have the bits of dense products in decode.
fn same_bits(format: Format) -> bool {
    let isa = isa::get();
    isa.name() == "avx2" || (isa.has_avx512() && format != Format::Q8_0)
}

/// `w` with every number zero that `drop` names by output and input.
fn without(w: &Weight, drop: impl Fn(usize, usize) -> bool) -> Weight {
    let (m, format) = (w.matrix(), w.format());
    let mut bytes = Vec::new();
    let mut row = vec![0.0; m.cols()];
    for o in 0..m.rows() {
        convert::decode_run(format, m.row(o), &mut row);
        row.iter_mut().enumerate().filter(|(i, _)| drop(o, *i)).for_each(|(_, v)| *v = 0.0);
        let mut run = vec![0; m.row_bytes()];
        convert::encode_run(format, &row, &mut run);
        bytes.extend(run);
    }
    Weight::new(format, w.orientation(), w.outputs(), w.inputs(), bytes.into()).unwrap()
}

/// A random model that lost about seven tenths of its weights.
fn pruned(kind: Kind, seed: u64) -> Arc<Model> {
    let mut model = random_model(kind, seed);
    for block in &mut model.blocks {
        for proj in Proj::ALL {
            for part in 0..block.parts(proj).len() {
                let Some(linear) = block.part_mut(proj, part) else { continue };
                linear.weight = without(&linear.weight, |o, i| (o * 31 + i * 17 + o * i) % 10 < 7);
            }
        }
    }
    Arc::new(model)
}

/// Every bitmap that saves bytes.
fn always(cache: Option<&Path>, hash: &str) -> BitmapOptions {
    let mut break_even = BreakEven::default();
    bitmap::FORMATS.into_iter().for_each(|f| break_even.set_zeros(f, 0.0));
    BitmapOptions { cache: LayoutCache::new(cache, hash), break_even }
}

fn engine(model: &Arc<Model>) -> Engine {
    Engine::new(model.clone(), Options { threads: 2, ..Options::default() }).unwrap()
}

/// Logits behind a prompt, and behind each of some tokens that follow.
fn logits(session: &mut Session, vocab: usize) -> Vec<Vec<f32>> {
    let token = |i: usize| (i * 29 % vocab) as u32;
    let prompt: Vec<u32> = (1..40).map(token).collect();
    let mut all = vec![session.prefill(&prompt).unwrap().to_vec()];
    all.extend((40..46).map(|i| session.decode(token(i)).unwrap().to_vec()));
    all
}

/// Largest difference over the range of the first.
fn worst(a: &[f32], b: &[f32]) -> f32 {
    let (low, high) = a.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low)
}

fn check(dense: &Engine, packed: &Engine, same: bool, case: &str) {
    let vocab = dense.model().spec.vocab;
    let (mut a, mut b) = (dense.session(0).unwrap(), packed.session(0).unwrap());
    let (want, got) = (logits(&mut a, vocab), logits(&mut b, vocab));
    for (step, (want, got)) in want.iter().zip(&got).enumerate() {
        // Matrix products unpack to the dense blocks.
        if same || step == 0 {
            assert_eq!(want, got, "{case}: step {step}");
        }
        let difference = worst(want, got);
        assert!(difference < BOUND, "{case}: step {step}: {difference} of the range");
    }
    let bytes = [a, b].map(|s| s.counters().weight_bytes);
    assert!(bytes[1] < bytes[0], "{case}: {bytes:?}");
}

#[test]
fn logits_are_those_of_the_dense_model() {
    for format in bitmap::FORMATS {
        for mlp in [MlpKind::Gated, MlpKind::Plain, MlpKind::Experts] {
            let model = pruned(Kind { format, mlp, ..PLAIN_LLAMA }, 5);
            let dense = engine(&model);
            let (packed, what) = dense.with_bitmaps(&always(None, ""), &|_, _| {}).unwrap().expect("many zeros");
            assert!(what.matrices > 0 && what.bytes < what.dense_bytes, "{what:?}");
            assert!(packed.has_bitmaps() && Arc::ptr_eq(packed.model(), &model));
            assert_eq!(packed.bytes_per_token(3), dense.bytes_per_token(3), "the dense figure, to compare with");
            check(&dense, &packed, same_bits(format), &format!("{format:?} {mlp:?}"));
            // Without the originals, which are free then.
            let (read, original) = (dense.bytes_per_token(3), Arc::downgrade(&model));
            drop((dense, model));
            assert!(original.upgrade().is_some(), "the engine keeps them");
            let packed = packed.without_originals();
            assert!(original.upgrade().is_none() && packed.has_bitmaps(), "{format:?} {mlp:?}");
            assert_eq!(packed.bytes_per_token(3), read, "still the dense figure");
            assert!(packed.session(8).unwrap().prefill(&[3, 4, 5]).is_ok());
        }
    }
}

#[test]
fn batches_have_the_bits_of_single_steps() {
    for format in bitmap::FORMATS {
        let dense = engine(&pruned(Kind { format, ..PLAIN_LLAMA }, 6));
        let (packed, _) = dense.with_bitmaps(&always(None, ""), &|_, _| {}).unwrap().expect("many zeros");
        let prompts: [&[u32]; 3] = [&[3, 4, 5], &[70], &[9, 8, 7, 6]];
        let begin = |p: &&[u32]| {
            let mut s = packed.session(0).unwrap();
            s.prefill(p).unwrap();
            s
        };
        let alone: Vec<Vec<f32>> = prompts.iter().map(|p| begin(p).decode(11).unwrap().to_vec()).collect();
        let mut sessions: Vec<Session> = prompts.iter().map(begin).collect();
        packed.decode_batch(&mut sessions.iter_mut().map(|s| (s, 11)).collect::<Vec<_>>()).unwrap();
        for (session, want) in sessions.iter().zip(&alone) {
            assert_eq!(session.logits(), want, "{format:?}");
        }
    }
}

#[test]
fn models_without_enough_zeros_stay_dense_and_say_why() {
    let full = Arc::new(random_model(Kind { format: Format::Bf16, ..PLAIN_LLAMA }, 7));
    assert!(engine(&full).with_bitmaps(&always(None, ""), &|_, _| {}).unwrap().is_none(), "a bitmap takes more bytes");
    let model = pruned(Kind { format: Format::Bf16, ..PLAIN_LLAMA }, 7);
    let mut options = always(None, "");
    options.break_even.set_zeros(Format::Bf16, 0.9);
    assert!(engine(&model).with_bitmaps(&options, &|_, _| {}).unwrap().is_none(), "measured to be slower");
    // The caches hold such a model: half of zeros are not enough there, and seven tenths are.
    let small = always(None, "").for_size(&model);
    let limit = small.break_even.zeros(Format::Bf16);
    assert!(limit > 0.5 && limit < 0.7, "{limit}");
    assert!(engine(&model).with_bitmaps(&small, &|_, _| {}).unwrap().is_some());
    let zeros = Zeros::sample(&model.blocks[0].q.weight).unwrap();
    assert!((zeros.share - 0.7).abs() < 0.05 && zeros.pay(0.5) && !zeros.pay(0.9), "{zeros:?}");
    assert_eq!(Zeros::sample(&random_model(PLAIN_LLAMA, 7).blocks[0].q.weight), None, "F32 has no bitmaps");
}

#[test]
fn bitmaps_are_stored_and_mapped_and_made_again_when_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let dense = engine(&pruned(Kind { format: Format::Bf16, ..PLAIN_LLAMA }, 8));
    let options = always(Some(dir.path()), "abc");
    let make = || dense.with_bitmaps(&options, &|_, _| {}).unwrap().expect("many zeros");
    let folder = dir.path().join("layouts/abc");
    let path = folder.join("0.attn.q.BF16.bitmap");
    let weight = |packed: &lacuna::engine::bitmaps::Packed| packed.model.blocks[0].q.weight.bytes().to_vec();
    // The map of the file must be gone before the file is written to.
    let (want, matrices) = {
        let first = make().1;
        (weight(&first), first.matrices)
    };
    assert_eq!(fs::read_dir(&folder).unwrap().count(), matrices);
    let stored = fs::read(&path).unwrap();
    assert!(stored.ends_with(&want));
    let mut damaged = stored.clone();
    damaged[4096 + 100] ^= 4;
    for bytes in [damaged, stored[..5000].to_vec()] {
        fs::write(&path, bytes).unwrap();
        let again = make();
        assert!(weight(&again.1) == want, "made again as it was");
        check(&dense, &again.0, same_bits(Format::Bf16), "made again");
    }
}

/// The way of a user: prune a trained model, and run what came out.
#[test]
fn a_compressed_model_runs_by_bitmaps() {
    let Some(stories) = common::shared("models/lacuna-stories") else { return };
    let dir = tempfile::tempdir().unwrap();
    let vocab = load(&stories, &LoadOptions::default()).unwrap().spec.vocab;
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab as u32;
    for spec in ["sparsegpt=0.5", "magnitude=0.6,rtn=8:group=32"] {
        let windows = (0..16).map(|w| (0..64).map(|t| token(w * 64 + t + 1)).collect()).collect();
        let output = dir.path().join(spec.replace([',', '=', ':'], "-"));
        let request = Request {
            model: stories.clone(),
            gguf: false,
            output: output.clone(),
            steps: registry::parse(spec).unwrap(),
            ratios: Ratios::Uniform,
            goal: None,
            lock: None,
            calibration: Some(Calibration { windows, sha256: "of a text".into(), available: 1024 }),
            seed: 0,
            threads: 0,
            streams_in_memory: 1 << 30,
        };
        compress(&request, &mut |_| {}).unwrap();
        let model = Arc::new(load(&output, &LoadOptions::default()).unwrap());
        let dense = engine(&model);
        // What a machine does that never measured anything.
        let options = BitmapOptions { cache: LayoutCache::new(None, ""), break_even: BreakEven::default() };
        let (packed, what) = dense.with_bitmaps(&options, &|_, _| {}).unwrap().expect("half of the weights are zero");
        let matrices = model.blocks.len() * Proj::ALL.len();
        assert_eq!(what.matrices, matrices, "{:?}", what.notes);
        assert_eq!(what.model.blocks[0].q.weight.orientation(), Orientation::Bitmap);
        println!("{spec}: {}", what.describe());
        check(&dense, &packed, same_bits(model.blocks[0].q.weight.format()), spec);
    }
}
