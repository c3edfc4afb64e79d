//! The contract every method that changes weights keeps: method x shape x pattern x share x codes.
//!
//! Counts are exact; runs of a pattern hold; what an earlier step dropped stays zero; codes are inside their range and stand
//! exactly for the weights; equal input gives equal bits at any number of threads; what cannot be done is refused with the
//! layer's name.

use lacuna_core::{
    compress::{Changed, Codes, Inputs, Layer, Sight},
    method::{Method, MethodError, Params},
    site::Site,
};
use lacuna_kernels::Pool;
use lacuna_methods::registry::METHODS;

/// Those that change one matrix at a time.
fn methods() -> impl Iterator<Item = &'static &'static dyn Method> {
    let whole = |m: &dyn Method| m.compressor().is_some_and(|c| c.neurons().is_some() || c.rotator().is_some());
    METHODS.iter().filter(move |m| m.site() == Site::Weights && !whole(**m))
}

fn has(m: &dyn Method, name: &str) -> bool {
    m.params().iter().any(|p| p.name == name)
}

fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut unit = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| (0..6).map(|_| unit()).sum::<f32>() - 3.0).collect()
}

struct Case {
    outputs: usize,
    inputs: usize,
    weight: Vec<f32>,
    seen: Inputs,
}

impl Case {
    fn new(seed: u64, outputs: usize, inputs: usize) -> Self {
        let tokens = 2 * inputs + 8;
        let x = normal(seed + 77, tokens * inputs);
        let at = |t: usize, j: usize| f64::from(x[t * inputs + j] + 0.5 * x[t * inputs + (j + 1) % inputs]);
        let entry = |i: usize| (0..tokens).map(|t| at(t, i / inputs) * at(t, i % inputs)).sum::<f64>();
        let gram: Vec<f64> = (0..inputs * inputs).map(entry).collect();
        let squares = (0..inputs).map(|j| gram[j * inputs + j]).collect();
        let seen = Inputs { tokens: tokens as u64, squares, gram: Some(gram) };
        Self { outputs, inputs, weight: normal(seed, outputs * inputs), seen }
    }

    fn layer<'a>(&'a self, pool: &'a Pool) -> Layer<'a> {
        Layer {
            place: "layers.7.mlp.down",
            outputs: self.outputs,
            inputs: self.inputs,
            weight: &self.weight,
            kept: None,
            seen: Some(&self.seen),
            sparsity: None,
            seed: 5,
            pool,
        }
    }
}

fn run(m: &dyn Method, given: &[(&str, f64)], layer: &Layer<'_>) -> Result<Changed, MethodError> {
    let rows = has(m, "group") && given.iter().all(|g| g.0 != "group");
    let given = given.iter().copied().filter(|g| has(m, g.0)).chain(rows.then_some(("group", 0.0)));
    let params = Params::new(m, given)?;
    m.compressor().expect("methods of this site change weights").compress(&params, layer)
}

fn check_codes(c: &Codes, changed: &Changed, what: &str) {
    let half = 1_i32 << (c.bits - 1);
    assert!(c.codes.iter().all(|q| (-half..half).contains(&i32::from(*q))), "{what}");
    let groups = c.codes.chunks_exact(c.group).zip(&c.scales);
    let values: Vec<f32> = groups.flat_map(|(q, s)| q.iter().map(move |q| f32::from(*q) * s)).collect();
    assert_eq!(values, changed.weight, "{what}");
}

#[test]
fn counts_are_exact_and_what_is_dropped_is_zero() {
    let pool = Pool::new(2);
    for m in methods().filter(|m| has(**m, "sparsity")) {
        for (outputs, inputs) in [(1, 8), (5, 24), (13, 140), (64, 33)] {
            let case = Case::new(inputs as u64, outputs, inputs);
            for share in [0.0, 0.1, 0.5, 0.7, 0.9] {
                let out = run(*m, &[("sparsity", share)], &case.layer(&pool)).unwrap();
                let what = format!("{} {outputs}x{inputs} at {share}", m.name());
                let kept = out.kept.unwrap_or_else(|| vec![true; case.weight.len()]);
                let dropped = kept.iter().filter(|k| !**k).count();
                let floor = |n: usize| (share * n as f64 + 1e-6).floor() as usize;
                let (layer, rows) = (floor(outputs * inputs), outputs * floor(inputs));
                assert!(dropped == layer || dropped == rows, "{what}: {dropped}, not {layer} nor {rows}");
                assert!(out.weight.iter().zip(&kept).all(|(w, k)| *k || *w == 0.0), "{what}");
                if share == 0.0 {
                    assert_eq!(out.weight, case.weight, "{what}");
                }
            }
        }
    }
}

#[test]
fn runs_hold_their_number() {
    let pool = Pool::new(2);
    for m in methods().filter(|m| has(**m, "of")) {
        let case = Case::new(3, 9, 144);
        for (keep, of) in [(2, 4), (4, 8), (1, 4), (1, 2)] {
            let given = [("keep", f64::from(keep)), ("of", f64::from(of))];
            let kept = run(*m, &given, &case.layer(&pool)).unwrap().kept.unwrap();
            let whole = kept.chunks(of as usize).all(|r| r.iter().filter(|k| **k).count() == keep as usize);
            assert!(whole, "{} {keep}:{of}", m.name());
        }
        let error = run(*m, &[("keep", 2.0), ("of", 5.0)], &case.layer(&pool)).unwrap_err().to_string();
        assert!(error.contains("layers.7.mlp.down") && error.contains("144 columns"), "{error}");
        assert!(run(*m, &[("keep", 4.0), ("of", 4.0)], &case.layer(&pool)).is_err());
    }
}

#[test]
fn what_an_earlier_step_dropped_stays_zero() {
    let pool = Pool::new(2);
    for first in methods().filter(|m| has(**m, "sparsity")) {
        for then in methods() {
            let case = Case::new(4, 12, 160);
            let early = run(*first, &[("sparsity", 0.3)], &case.layer(&pool)).unwrap();
            let layer = Layer { weight: &early.weight, kept: early.kept.as_deref(), ..case.layer(&pool) };
            let late = run(*then, &[("sparsity", 0.5), ("bits", 4.0)], &layer).unwrap();
            let what = format!("{} then {}", first.name(), then.name());
            let (before, after) = (early.kept.unwrap(), late.kept.expect("a mask goes on"));
            assert!(before.iter().zip(&after).all(|(b, a)| *b || !*a), "{what}");
            assert!(late.weight.iter().zip(&after).all(|(w, k)| *k || *w == 0.0), "{what}");
            let share = after.iter().filter(|k| !**k).count() as f64 / after.len() as f64;
            let expected = if has(*then, "sparsity") { 0.5 } else { 0.3 };
            // A method that drops by a share of its own adds to what was dropped.
            let more = has(*then, "zeros") && share > expected;
            assert!(more || (share - expected).abs() < 0.02, "{what}: {share}");
        }
    }
}

#[test]
fn codes_stand_for_the_weights() {
    let pool = Pool::new(2);
    for m in methods().filter(|m| has(**m, "bits") && has(**m, "group")) {
        let case = Case::new(6, 7, 192);
        for bits in [2.0, 3.0, 4.0, 8.0] {
            for group in [0.0, 32.0, 64.0, 96.0, 192.0] {
                let out = run(*m, &[("bits", bits), ("group", group)], &case.layer(&pool)).unwrap();
                let what = format!("{} {bits} bits, groups of {group}", m.name());
                let codes = out.codes.as_ref().expect("codes");
                assert_eq!((codes.bits, codes.codes.len()), (bits as u32, 7 * 192), "{what}");
                assert_eq!(codes.scales.len() * codes.group, 7 * 192, "{what}");
                check_codes(codes, &out, &what);
            }
        }
        let error = run(*m, &[("bits", 4.0), ("group", 128.0)], &case.layer(&pool)).unwrap_err().to_string();
        assert!(error.contains("layers.7.mlp.down") && error.contains("the largest that does is 96"), "{error}");
    }
}

#[test]
fn threads_do_not_change_bits() {
    let pools = [1, 2, 5].map(Pool::new);
    for m in methods() {
        let case = Case::new(8, 37, 260);
        let all = [&pools[0], &pools[1], &pools[2]]
            .map(|pool| run(*m, &[("sparsity", 0.5), ("bits", 4.0)], &case.layer(pool)).unwrap());
        assert!(all[0] == all[1] && all[1] == all[2], "{}", m.name());
    }
}

#[test]
fn what_cannot_be_done_names_the_layer() {
    let pool = Pool::new(1);
    for m in methods() {
        let mut case = Case::new(9, 3, 16);
        let sight = m.compressor().unwrap().sight(&Params::new(*m, []).unwrap());
        let blind = run(*m, &[], &Layer { seen: None, ..case.layer(&pool) });
        match (sight, blind) {
            (Sight::Nothing, result) => assert!(result.is_ok(), "{}", m.name()),
            (_, result) => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("layers.7.mlp.down") && error.contains("-f FILE"), "{error}");
            }
        }
        case.weight[20] = f32::NAN;
        let error = run(*m, &[], &case.layer(&pool)).unwrap_err().to_string();
        assert!(error.contains("layers.7.mlp.down: the weight at row 1, column 4 is NaN"), "{error}");
        let plan = run(*m, &[("keep", 3.0), ("of", 2.0)], &case.layer(&pool));
        assert!(plan.is_err(), "{}", m.name());
    }
}

#[test]
fn a_matrix_that_cannot_be_factored_is_told_and_never_replaced() {
    let pool = Pool::new(1);
    for m in methods() {
        let sight = m.compressor().unwrap().sight(&Params::new(*m, []).unwrap());
        // These take products with the matrix and factor nothing (`jlcm` solves for its entries by conjugate gradients, and takes
        // the result only where it loses less).
        if sight != Sight::Gram || ["gpfq", "awq", "jlcm"].contains(&m.name()) {
            continue;
        }
        let mut case = Case::new(10, 3, 16);
        // Not a Gram matrix at all: no damping that is tried makes it positive definite.
        if let Some(gram) = &mut case.seen.gram {
            gram.iter_mut().enumerate().for_each(|(i, g)| *g = if i % 17 == 0 { 1.0 } else { -1.0 });
        }
        let error = run(*m, &[], &case.layer(&pool)).unwrap_err().to_string();
        for part in ["layers.7.mlp.down", "singular", "--tokens"] {
            assert!(error.contains(part), "{}: {error}", m.name());
        }
    }
}

/// The generator of `tools/weights_reference.py`.
fn stream(seed: u64, n: usize) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f64 / f64::from(1 << 24) - 0.5
    };
    (0..n).map(|_| (next() + next() + next()) as f32).collect()
}

/// Masks and weights of the published formulas, by an independent program (`tools/weights_reference.py`).
#[test]
fn wanda_and_sparsegpt_agree_with_the_published_formulas() {
    const REFERENCE: &str = include_str!("weights_reference.txt");
    let (rows, columns, tokens) = (6, 160, 400);
    let noise: Vec<f64> = stream(2, tokens * columns).into_iter().map(f64::from).collect();
    let x: Vec<f64> = (0..tokens * columns)
        .map(|i| {
            let (t, j) = (i / columns, i % columns);
            (noise[i] + 0.7 * noise[t * columns + (j + 1) % columns]) * (0.3 + (j * 7 % 11) as f64 / 5.0)
        })
        .collect();
    let entry = |i: usize| x.chunks_exact(columns).map(|r| r[i / columns] * r[i % columns]).sum::<f64>();
    let gram: Vec<f64> = (0..columns * columns).map(entry).collect();
    let squares = (0..columns).map(|j| gram[j * columns + j]).collect();
    let seen = Inputs { tokens: tokens as u64, squares, gram: Some(gram) };
    let case = Case { outputs: rows, inputs: columns, weight: stream(1, rows * columns), seen };
    let pool = Pool::new(2);
    let line = |name: &str, kind: &str| -> Vec<&str> {
        let found = REFERENCE.lines().find_map(|l| l.strip_prefix(&format!("{name} {kind} ")));
        found.expect("a line of the reference").split(' ').collect()
    };
    let numbers =
        |name: &str, kind: &str| -> Vec<f64> { line(name, kind).iter().map(|v| v.parse().unwrap()).collect() };
    for (name, given) in [("half", &[("sparsity", 0.5)][..]), ("two-of-four", &[("keep", 2.0), ("of", 4.0)])] {
        for method in ["wanda", "sparsegpt"] {
            let m = METHODS.iter().find(|m| m.name() == method).unwrap();
            let out = run(*m, given, &case.layer(&pool)).unwrap();
            let masks: Vec<String> = out
                .kept
                .unwrap()
                .chunks_exact(columns)
                .map(|r| r.iter().map(|k| if *k { '1' } else { '0' }).collect())
                .collect();
            assert_eq!(masks, line(name, method), "{method} {name}");
            if method == "sparsegpt" {
                let sums = out.weight.chunks_exact(columns).map(|r| r.iter().map(|w| f64::from(*w)).sum::<f64>());
                assert!(sums.zip(numbers(name, "sums")).all(|(a, b)| (a - b).abs() < 1e-4), "{name}");
                let last = out.weight[columns - 24..columns].iter().zip(numbers(name, "last"));
                assert!(last.into_iter().all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5), "{name}");
            }
        }
    }
}
