//! GPTVQ on random layers.

use super::*;
use crate::weights::{
    gptq::Gptq,
    gptvq::Gptvq,
    rtn::Rtn,
    tools::{
        factor::{factor, seen},
        testing::{Case, run},
    },
    wanda::Wanda,
};
use lacuna_core::{
    compress::{Changed, Inputs},
    method::Method,
};

fn books(out: &Changed) -> &Books {
    out.books.as_ref().expect("books")
}

#[test]
fn weights_are_what_the_books_stand_for() {
    for (outputs, inputs) in [(5, 44), (40, 256), (17, 300), (9, 704)] {
        let case = Case::random(30, outputs, inputs, inputs + 50);
        for bits in [2.0, 3.0, 4.0] {
            for vector in [1.0, 2.0] {
                let out = run(&Gptvq, &[("bits", bits), ("vector", vector)], &case.layer()).unwrap();
                let b = books(&out);
                assert_eq!(out.weight, vq::decode(b, inputs), "{outputs}x{inputs} {bits} {vector}");
                assert_eq!((b.codes.len(), b.of_row.len()), (outputs * inputs.div_ceil(32) * 16, outputs));
                assert!(b.codes.iter().all(|c| usize::from(*c) < 1 << (2 * b.bits)));
            }
        }
    }
}

#[test]
fn outputs_change_less_than_by_codes_of_the_same_bits() {
    let (mut to_gptq, mut to_rtn) = (0, 0);
    for seed in 0..20 {
        let case = Case::random(200 + seed, 64, 256, 600);
        for bits in [2.0, 3.0] {
            let error = |m: &dyn Method, given: &[(&str, f64)]| {
                case.output_error(&run(m, given, &case.layer()).unwrap().weight)
            };
            let own = error(&Gptvq, &[("bits", bits)]);
            to_gptq += usize::from(own < error(&Gptq, &[("bits", bits), ("group", 128.0)]));
            to_rtn += usize::from(own < error(&Rtn, &[("bits", bits), ("group", 128.0)]));
        }
    }
    assert!(to_gptq >= 38 && to_rtn == 40, "better than gptq in {to_gptq} of 40, than rtn in {to_rtn}");
}

#[test]
fn zeros_of_a_mask_stay() {
    let case = Case::random(31, 24, 160, 300);
    let pruned = run(&Wanda, &[("sparsity", 0.5)], &case.layer()).unwrap();
    let layer = Layer { weight: &pruned.weight, kept: pruned.kept.as_deref(), ..case.layer() };
    for (bits, vector) in [(2.0, 2.0), (3.0, 2.0), (3.0, 1.0)] {
        let out = run(&Gptvq, &[("bits", bits), ("vector", vector)], &layer).unwrap();
        assert_eq!(out.kept, pruned.kept);
        let zeros = out.weight.iter().zip(pruned.kept.as_ref().unwrap()).filter(|(_, k)| !**k);
        assert!(zeros.clone().count() == 24 * 80 && zeros.clone().all(|(w, _)| *w == 0.0), "{bits} {vector}");
        assert!(out.weight.iter().filter(|w| **w != 0.0).count() > 24 * 60);
    }
}

/// Without a Gram matrix that ties columns together, the sweep is the nearest entry of plain k-means.
#[test]
fn inputs_that_do_not_hang_together_leave_plain_clustering() {
    let mut case = Case::random(32, 8, 64, 0);
    case.seen.gram = Some((0..64 * 64).map(|i| if i % 65 == 0 { 5.0 } else { 0.0 }).collect());
    let out = run(&Gptvq, &[("bits", 2.0)], &case.layer()).unwrap();
    let b = books(&out);
    let entries: Vec<[f32; 2]> = b.entries[..32]
        .as_chunks::<2>()
        .0
        .iter()
        .map(|e| e.map(|e| f32::from(e) * f32::from(b.exponents[0]).exp2()))
        .collect();
    let free = vec![3; 16];
    let book = Book { entries, free };
    let mut worse = 0;
    for row in 0..8 {
        for pair in 0..32 {
            let at = row * 64 + pair / 16 * 32 + pair % 16;
            let v = Vector { x: [case.weight[at], case.weight[at + 16]], h: [1.0; 2], free: 3 };
            let chosen = book.entries[usize::from(b.codes[row * 32 + pair])];
            let d = (v.x[0] - chosen[0]).powi(2) + (v.x[1] - chosen[1]).powi(2);
            // Tuning moves entries after codes are chosen.
            worse += usize::from(d > 1.3 * book.finder().nearest(&v).1 + 1e-3);
        }
    }
    assert!(worse < 12, "{worse} of 256 pairs");
}

/// With single weights and entries on GPTQ's own grid, the sweep is GPTQ's.
#[test]
fn a_uniform_book_gives_gptq() {
    let case = Case::random(33, 6, 64, 200);
    let theirs = run(&Gptq, &[("bits", 3.0), ("group", 0.0)], &case.layer()).unwrap();
    let scales = theirs.codes.as_ref().unwrap().scales.clone();
    let layer = case.layer();
    let (_, gram) = seen(&layer).unwrap();
    // Columns in their own order, as GPTQ takes them.
    let turned = Turned {
        size: 1,
        weight: case.weight.clone(),
        kept: None,
        gram: gram.to_vec(),
        vectors: (0..64).map(|j| (j, 1)).collect(),
    };
    let factor = factor(&layer).unwrap();
    let mut sweep = Sweep::new(&layer, &factor, &turned, 3, 1);
    sweep.per_book = 1;
    sweep.found = scales
        .iter()
        .map(|s| vec![Book { entries: (-4..4).map(|c| [c as f32 * s, 0.0]).collect(), free: vec![1; 8] }])
        .collect();
    let mut w = case.weight.clone();
    sweep.assign(&mut w, 0..64, &(0..64));
    let wrong = w.iter().zip(&theirs.weight).filter(|(a, b)| (*a - *b).abs() > 1e-5).count();
    assert!(wrong == 0, "{wrong} of {} weights differ", w.len());
}

#[test]
fn tuning_never_loses() {
    for seed in 0..6 {
        let case = Case::random(300 + seed, 32, 96, 200);
        let layer = case.layer();
        let (_, gram) = seen(&layer).unwrap();
        let turned = Turned::new(&layer, gram, 2);
        let seen = Inputs { gram: Some(turned.gram.clone()), ..case.seen.clone() };
        let own = Layer { weight: &turned.weight, seen: Some(&seen), ..layer };
        let factor = factor(&own).unwrap();
        let mut sweep = Sweep::new(&own, &factor, &turned, 2, 10);
        sweep.run();
        let error = |s: &Sweep<'_>| case.output_error(&vq::decode(&s.books(), 96));
        let before = error(&sweep);
        sweep.tune(&turned.gram);
        let after = error(&sweep);
        assert!(after < before, "{seed}: {before} to {after}");
    }
}

#[test]
fn bits_per_weight_are_those_of_the_formula() {
    let case = Case::random(34, 64, 512, 600);
    for (bits, per_book) in [(2.0, 8), (3.0, 32)] {
        let out = run(&Gptvq, &[("bits", bits)], &case.layer()).unwrap();
        let b = books(&out);
        assert_eq!(b.exponents.len(), 64 / per_book * 2);
        // 2^(2 bits) entries of two bytes for as many weights: 0.125 bit each.
        assert_eq!(b.entries.len() * 8, 64 * 512 / 8);
    }
}
