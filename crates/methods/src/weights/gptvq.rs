//! `gptvq`: codes of pairs of weights, with compensation.
//!
//! van Baalen et al., GPTVQ: The Blessing of Dimensionality for LLM Quantization (arXiv:2402.15319); formulas as the handbook
//! has them. GPTQ's sweep takes two columns at a time and gives them the entry of a small book that loses least, weighted by
//! `1 / U_jj^2`. Books are found by weighted k-means when the sweep reaches their 256 columns, on weights that already carry
//! the errors before them, and rounded to eight bits before the sweep uses them. At the end the entries of all books are
//! moved together, codes fixed, to where `tr((W - Q) H (W - Q)^T)` is least (conjugate gradients, as it is quadratic; the paper
//! takes steps of Adam), and kept if that is better after rounding. With a mask, entries have zeros of their own, and no
//! zero is filled. With `vector=1` books are of single weights. Takes 0.125 bit per weight for the books.

use super::tools::{
    check_finite,
    factor::{factor, seen},
    pairs::{Sweep, Turned},
    vq,
};
use lacuna_core::{
    compress::{Changed, Compressor, Inputs, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};
use std::ops::Bound;

/// GPTVQ.
#[derive(Debug)]
pub struct Gptvq;

/// Bits of a weight.
pub const BITS: ParamSpec = ParamSpec {
    name: "bits",
    doc: "bits of a weight: 2, 3 or 4; books have 16, 64 or 256 pairs",
    default: 2.0,
    range: (Bound::Included(2.0), Bound::Included(4.0)),
};

/// Weights of a vector.
pub const VECTOR: ParamSpec = ParamSpec {
    name: "vector",
    doc: "weights that share a code: 2, or 1",
    default: 2.0,
    range: (Bound::Included(1.0), Bound::Included(2.0)),
};

/// Rounds of clustering.
pub const ROUNDS: ParamSpec = ParamSpec {
    name: "rounds",
    doc: "most rounds of k-means for a book",
    default: 25.0,
    range: (Bound::Included(1.0), Bound::Included(1000.0)),
};

impl Method for Gptvq {
    fn name(&self) -> &'static str {
        "gptvq"
    }

    fn title(&self) -> &'static str {
        "GPTVQ"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "GPTVQ: The Blessing of Dimensionality for LLM Quantization (2024)",
            arxiv: Some("2402.15319"),
        }
    }

    fn summary(&self) -> &'static str {
        "Gives pairs of weights the best entry of a small learned book, and lets the columns behind make up for the error; 2 to 4 bits."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[BITS, VECTOR, ROUNDS];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Gptvq {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let (bits, size) = (params.get("bits") as usize, params.get("vector") as usize);
        let (inputs, gram) = seen(layer)?;
        let turned = Turned::new(layer, gram, size);
        let seen = Inputs { tokens: inputs.tokens, squares: inputs.squares.clone(), gram: Some(turned.gram.clone()) };
        let own = Layer { weight: &turned.weight, kept: turned.kept.as_deref(), seen: Some(&seen), ..*layer };
        let factor = factor(&own)?;
        let mut sweep = Sweep::new(&own, &factor, &turned, bits, params.get("rounds") as usize);
        sweep.run();
        sweep.tune(&turned.gram);
        let books = sweep.books();
        Ok(Changed {
            weight: vq::decode(&books, layer.inputs),
            kept: layer.kept.map(<[bool]>::to_vec),
            codes: None,
            books: Some(books),
            low_rank: None,
            notes: factor.notes,
        })
    }
}
