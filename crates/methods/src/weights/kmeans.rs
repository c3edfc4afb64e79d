//! `kmeans`: codes of pairs of weights, without compensation.
//!
//! The baseline of all codebooks: weighted k-means (Lloyd) on the pairs of a layer, importances `sum x_j^2` of their inputs,
//! then the nearest entry. Rows of like distribution share a book, as in JLCM (Yvinec et al., arXiv:2309.17361, which groups
//! neurons by clustering their distributions): here rows are ordered by the size of their weights and cut into as many groups
//! as books may be had for 0.125 bit per weight. Every row names its book, so no row moves and no permutation has to be undone
//! in the next layer. With a mask, entries have zeros of their own. Use `gptvq` where there is a text.

use super::{
    gptvq::{BITS, ROUNDS, VECTOR},
    tools::{
        check_finite,
        pairs::{SERVED, pair_codes, scaled},
        refuse, rows,
        vq::{self, Vector},
    },
};
use lacuna_core::{
    compress::{Books, Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// k-means.
#[derive(Debug)]
pub struct Kmeans;

impl Method for Kmeans {
    fn name(&self) -> &'static str {
        "kmeans"
    }

    fn title(&self) -> &'static str {
        "k-means codebooks"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (2023), for groups of rows",
            arxiv: Some("2309.17361"),
        }
    }

    fn summary(&self) -> &'static str {
        "Clusters pairs of weights into small books that rows of like distribution share; the baseline for `gptvq`."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[BITS, VECTOR, ROUNDS];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Kmeans {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Norms
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let Some(seen) = layer.seen else {
            return refuse(layer, "nothing was seen of its inputs; give a calibration text (-f FILE)");
        };
        if let Some(j) = seen.squares.iter().position(|s| !s.is_finite()) {
            return refuse(layer, format!("the squares of its input {j} do not add up to a finite number"));
        }
        let (bits, size) = (params.get("bits") as usize, params.get("vector") as usize);
        let importance: Vec<f32> = seen.squares.iter().map(|s| (s / seen.tokens.max(1) as f64) as f32).collect();
        let books = cluster(layer, &importance, bits, size, params.get("rounds") as usize);
        Ok(Changed {
            weight: vq::decode(&books, layer.inputs),
            kept: layer.kept.map(<[bool]>::to_vec),
            codes: None,
            books: Some(books),
            low_rank: None,
            notes: Vec::new(),
        })
    }
}

/// The vectors of a row.
fn vectors(layer: &Layer<'_>, row: usize, importance: &[f32], size: usize) -> Vec<Vector> {
    let n = layer.inputs;
    let (columns, lengths) = vq::order(n, size);
    let mut columns = columns.into_iter();
    let one = |length: usize| {
        let mut v = Vector { x: [0.0; 2], h: [0.0; 2], free: 0 };
        for (i, j) in columns.by_ref().take(length).enumerate() {
            // Inputs that are always zero count for a little, so that their weights keep something.
            v.h[i] = importance[j].max(1e-12);
            if layer.kept.is_none_or(|k| k[row * n + j]) {
                (v.x[i], v.free) = (layer.weight[row * n + j], v.free | 1 << i);
            }
        }
        v.free |= if length == 1 && size == 2 && v.free != 0 { 2 } else { 0 };
        v
    };
    lengths.into_iter().map(one).collect()
}

/// Which group each of the rows is in: `groups` of about as many rows, by the size of their weights.
fn groups(layer: &Layer<'_>, groups: usize) -> Vec<u16> {
    let rows = layer.weight.chunks_exact(layer.inputs.max(1));
    let size: Vec<f64> = rows.map(|r| r.iter().map(|w| f64::from(*w).powi(2)).sum()).collect();
    let mut order: Vec<usize> = (0..size.len()).collect();
    order.sort_by(|a, b| size[*a].total_cmp(&size[*b]).then(a.cmp(b)));
    let mut of = vec![0; size.len()];
    order.iter().enumerate().for_each(|(i, row)| of[*row] = (i * groups / size.len()) as u16);
    of
}

fn cluster(layer: &Layer<'_>, importance: &[f32], bits: usize, size: usize, rounds: usize) -> Books {
    let (n, rows) = (layer.inputs, layer.outputs);
    let count = (n * rows / SERVED[bits - 2]).clamp(1, rows.clamp(1, usize::from(u16::MAX)));
    let of_row = groups(layer, count);
    let mut found: Vec<_> = (0..count).map(|_| None).collect();
    rows::units(layer.pool, &mut found, 1, |group, out| {
        let own = (0..rows).filter(|r| usize::from(of_row[*r]) == group);
        let all = scaled(own.flat_map(|r| vectors(layer, r, importance, size)).collect());
        let mut book = vq::kmeans(&all, 1 << (size * bits), rounds, layer.seed ^ group as u64).0;
        let (entries, exponent) = book.round();
        *out = Some((book.finder(), entries, exponent));
    });
    let mut coded: Vec<Vec<u8>> = vec![Vec::new(); rows];
    rows::units(layer.pool, &mut coded, 8, |row, out| {
        let Some((finder, ..)) = &found[usize::from(of_row[row])] else { return };
        let codes: Vec<u8> = vectors(layer, row, importance, size).iter().map(|v| finder.nearest(v).0 as u8).collect();
        *out = pair_codes(&codes, n, size, bits);
    });
    let mut books = Books {
        bits: bits as u32,
        span: n.next_multiple_of(128),
        of_row,
        entries: Vec::new(),
        exponents: Vec::new(),
        codes: coded.concat(),
    };
    for (_, entries, exponent) in found.into_iter().flatten() {
        books.exponents.push(exponent);
        match size {
            1 => books.entries.extend(vq::product(&entries.iter().map(|e| e[0]).collect::<Vec<_>>())),
            _ => books.entries.extend(entries.as_flattened()),
        }
    }
    books
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        gptvq::Gptvq,
        rtn::Rtn,
        tools::testing::{Case, run},
    };

    fn weight_error(case: &Case, weight: &[f32]) -> f64 {
        case.weight.iter().zip(weight).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn weights_are_what_the_books_stand_for_and_better_than_a_grid() {
        for (outputs, inputs) in [(5, 44), (64, 300)] {
            let mut case = Case::random(40, outputs, inputs, 400);
            case.seen.squares.fill(1.0);
            for (bits, vector) in [(2.0, 2.0), (2.0, 1.0), (3.0, 2.0), (3.0, 1.0), (4.0, 1.0)] {
                let out = run(&Kmeans, &[("bits", bits), ("vector", vector)], &case.layer()).unwrap();
                assert_eq!(out.weight, vq::decode(out.books.as_ref().unwrap(), inputs));
                let grid = run(&Rtn, &[("bits", bits), ("group", 0.0)], &case.layer()).unwrap();
                let (own, theirs) = (weight_error(&case, &out.weight), weight_error(&case, &grid.weight));
                assert!(own < theirs, "{outputs}x{inputs} {bits} {vector}: {own} {theirs}");
            }
        }
    }

    #[test]
    fn rows_of_one_size_share_a_book() {
        let mut case = Case::random(41, 64, 128, 200);
        // Every other row a hundred times smaller.
        for (r, row) in case.weight.chunks_exact_mut(128).enumerate() {
            row.iter_mut().for_each(|w| *w *= if r % 2 == 0 { 1.0 } else { 0.01 });
        }
        let out = run(&Kmeans, &[("bits", 2.0)], &case.layer()).unwrap();
        let of_row = &out.books.as_ref().unwrap().of_row;
        assert_eq!(out.books.as_ref().unwrap().exponents.len(), 4);
        assert!((0..64).all(|r| (of_row[r] < 2) == (r % 2 == 1)), "{of_row:?}");
        let small: f64 =
            (0..64 * 128).filter(|i| i / 128 % 2 == 1).map(|i| f64::from(case.weight[i] - out.weight[i]).powi(2)).sum();
        let all: f64 = (0..64 * 128).filter(|i| i / 128 % 2 == 1).map(|i| f64::from(case.weight[i]).powi(2)).sum();
        assert!(small < 0.2 * all, "{}", small / all);
    }

    #[test]
    fn compensation_helps() {
        let case = Case::random(42, 64, 256, 600);
        let error = |m: &dyn Method| case.output_error(&run(m, &[("bits", 2.0)], &case.layer()).unwrap().weight);
        assert!(error(&Gptvq) < 0.9 * error(&Kmeans), "{} {}", error(&Gptvq), error(&Kmeans));
    }
}
