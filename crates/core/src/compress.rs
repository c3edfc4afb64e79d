//! The seam for methods of [`Site::Weights`](crate::site::Site::Weights): they change the stored weights, one linear layer
//! at a time, and know nothing of the model around it.
//!
//! A driver shows a [`Compressor`] a [`Layer`] (its weights, what was seen of its inputs, what an earlier step decided) and
//! gets back what it [`Changed`]. Which share a layer loses may be decided outside, by a ratio mechanism.

use crate::{
    method::{MethodError, Params},
    site::Proj,
};
use lacuna_kernels::Pool;

/// What a compressor must see of the vectors that enter a layer. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sight {
    /// The weights are enough.
    Nothing,
    /// The squared norm of every input channel.
    Norms,
    /// The Gram matrix `X^T X`.
    Gram,
}

/// What was seen of the inputs of a layer, over all calibration tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// Tokens.
    pub tokens: u64,
    /// `sum over tokens of x_j^2`, one per input.
    pub squares: Vec<f64>,
    /// `X^T X`, `[inputs, inputs]`, symmetric, if it was asked for.
    pub gram: Option<Vec<f64>>,
}

/// One linear layer `y = W x` that is to be compressed.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// What messages call it, such as `layers.3.mlp.down`.
    pub place: &'a str,
    /// Rows of `W`.
    pub outputs: usize,
    /// Columns of `W`.
    pub inputs: usize,
    /// `W[outputs, inputs]`.
    pub weight: &'a [f32],
    /// Which entries an earlier step kept; the others are zero and stay zero. None: all.
    pub kept: Option<&'a [bool]>,
    /// What was seen of its inputs: at least what [`Compressor::sight`] asks for.
    pub seen: Option<&'a Inputs>,
    /// The share to drop, where it was decided outside of the method; otherwise its parameter `sparsity`.
    pub sparsity: Option<f64>,
    /// Seed for what is drawn, other for each layer.
    pub seed: u64,
    /// Threads.
    pub pool: &'a Pool,
}

/// A quantised matrix: `w[r, c] = codes[r, c] * scales[r, c / group]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// Bits of a code: `-2^(bits-1) <= code < 2^(bits-1)`.
    pub bits: u32,
    /// Columns that share a scale; divides the number of columns.
    pub group: usize,
    /// `[outputs, inputs]`.
    pub codes: Vec<i8>,
    /// `[outputs, inputs / group]`; each is exact in F16 and in BF16.
    pub scales: Vec<f32>,
}

/// A matrix as codes of pairs of weights in small books.
///
/// A pair is two columns of one row, 16 apart inside a block of 32 columns: pair `16 b + j` is columns `32 b + j` and
/// `32 b + 16 + j`; in a last, shorter block columns that are not there stand for nothing. A book serves the rows that
/// name it, in one span of columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Books {
    /// Bits of a weight, 2 to 4: a book has `4^bits` entries, a code twice as many bits.
    pub bits: u32,
    /// Columns that one book serves, a multiple of 32.
    pub span: usize,
    /// Which of the books of each span a row uses.
    pub of_row: Vec<u16>,
    /// `[books of a span, spans, entries, 2]`.
    pub entries: Vec<i8>,
    /// An entry stands for itself times `2^exponent`; `[books of a span, spans]`. BF16, F16 and F32 hold every such number.
    pub exponents: Vec<i8>,
    /// The entry of every pair, `[outputs, 16 * blocks of columns]`.
    pub codes: Vec<u8>,
}

/// What became of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// The new `W[outputs, inputs]`; with codes or books, exactly what they stand for; of low rank, the product.
    pub weight: Vec<f32>,
    /// Which entries are kept, if any were dropped by this step or an earlier one.
    pub kept: Option<Vec<bool>>,
    /// The weight in codes, if it was quantised.
    pub codes: Option<Codes>,
    /// The weight in pairs and books, if it was quantised that way.
    pub books: Option<Books>,
    /// The two matrices whose product the weight is, if it has a low rank; a step that rounds then rounds those.
    pub low_rank: Option<Box<LowRank>>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// `W = A B` with fewer numbers than `W`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Rows of `B`.
    pub rank: usize,
    /// `B[rank, inputs]`.
    pub down: Changed,
    /// `A[outputs, rank]`.
    pub up: Changed,
}

/// The MLP of a block whose neurons are to be dropped whole: rows of gate and up, columns of down.
#[derive(Clone, Copy)]
pub struct Neurons<'a> {
    /// What messages call it, such as `layers.3.mlp`.
    pub place: &'a str,
    /// Columns of gate and up, rows of down.
    pub width: usize,
    /// Neurons.
    pub inner: usize,
    /// `[inner, width]`, in a gated MLP.
    pub gate: Option<&'a [f32]>,
    /// `[inner, width]`.
    pub up: &'a [f32],
    /// `[width, inner]`.
    pub down: &'a [f32],
    /// What was seen of the inputs of down: at least what [`Compressor::sight`] asks for.
    pub seen: Option<&'a Inputs>,
    /// Neurons that stay.
    pub keep: usize,
    /// Threads.
    pub pool: &'a Pool,
}

/// What became of an MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Pruned {
    /// Which neurons stay.
    pub kept: Vec<bool>,
    /// The new down projection `[width, inner]`; columns of dropped neurons are zero.
    pub down: Vec<f32>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// A method that drops whole neurons.
pub trait NeuronPruner: Sync {
    /// How many of `inner` neurons stay at a share to drop; all of them at 0.
    fn keep(&self, params: &Params, inner: usize, share: f64) -> usize;

    /// Chooses the neurons of one MLP. Equal input gives equal bits, at any number of threads.
    ///
    /// # Errors
    /// As [`Compressor::compress`].
    fn prune(&self, params: &Params, mlp: &Neurons<'_>) -> Result<Pruned, MethodError>;
}

/// The residual stream before a norm, for which a basis is sought.
#[derive(Clone, Copy)]
pub struct Stream<'a> {
    /// What messages call it, such as `layers.3.mlp` (what reads it) or `head`.
    pub place: &'a str,
    /// Its width.
    pub width: usize,
    /// `X^T X` of the stream on the calibration text, `[width, width]`, if [`Compressor::sight`] asks for it.
    pub gram: Option<&'a [f64]>,
    /// `W[outputs, width]` of a projection that reads the normalised stream, with the gains of the norm in it; `None` where
    /// no such projection reads it.
    pub reader: &'a dyn Fn(Proj) -> Option<Vec<f32>>,
    /// Seed for what is drawn, other for each place.
    pub seed: u64,
}

/// An orthonormal basis.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// `[width, width]`: a row for each direction; the first ones stay where the stream is cut.
    pub rows: Vec<f64>,
    /// Share of the stream's squares along the directions behind the first `kept` of them, `lost[kept]`, `width + 1` numbers;
    /// empty where the stream was not seen.
    pub lost: Vec<f64>,
}

/// A method that gives the residual stream another basis before every norm, and may cut it there. Norms without gains do
/// not see a rotation, so that a model whose matrices are rotated with it computes the same (SliceGPT, 2024).
pub trait Rotator: Sync {
    /// How many of `width` coordinates stay.
    fn kept(&self, params: &Params, width: usize) -> usize;

    /// The basis of a stream. Equal input gives equal bits.
    ///
    /// # Errors
    /// As [`Compressor::compress`].
    fn basis(&self, params: &Params, stream: &Stream<'_>) -> Result<Basis, MethodError>;
}

/// Where zeros may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere.
    Free,
    /// Of every `of` consecutive columns of a row `keep` stay.
    Runs {
        /// Entries that stay.
        keep: usize,
        /// Entries of a run.
        of: usize,
    },
}

impl Pattern {
    /// `unstructured`, or `N:M` (`2:4`: two of four stay).
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("pattern `{text}` is neither `unstructured` nor N:M with 1 <= N < M <= 64, such as 2:4");
        if text == "unstructured" {
            return Ok(Self::Free);
        }
        let (keep, of) = text.split_once(':').ok_or_else(bad)?;
        let (keep, of) = (keep.parse().map_err(|_| bad())?, of.parse().map_err(|_| bad())?);
        if keep == 0 || keep >= of || of > 64 { Err(bad()) } else { Ok(Self::Runs { keep, of }) }
    }

    /// The pattern of the parameters `keep` and `of` of a method; `of` 0 means anywhere.
    pub fn of(params: &Params) -> Self {
        match (params.get("keep") as usize, params.get("of") as usize) {
            (_, 0) => Self::Free,
            (keep, of) => Self::Runs { keep, of },
        }
    }
}

/// A method that changes weights.
pub trait Compressor: Sync {
    /// What it must see.
    fn sight(&self, params: &Params) -> Sight;

    /// Factors, one per input, by which the columns of `layers` (all those that read one vector) are multiplied before they
    /// are compressed, while what makes the vector is divided by them; by default none. Powers of two: whoever folds them
    /// changes no bit of what the model computes. Not asked for where they cannot be folded.
    ///
    /// # Errors
    /// As [`Compressor::compress`].
    fn factors(&self, params: &Params, layers: &[Layer<'_>]) -> Result<Option<Vec<f32>>, MethodError> {
        let _ = (params, layers);
        Ok(None)
    }

    /// Whether it changes this projection; by default all.
    fn applies(&self, proj: Proj) -> bool {
        let _ = proj;
        true
    }

    /// Whether errors of a block count by how much the block changes the residual stream, where bits are chosen by errors;
    /// by default all blocks count alike.
    fn weighs_blocks(&self) -> bool {
        false
    }

    /// The numbers of the neurons of an MLP in the order in which its block is to be compressed and stored: rows of gate and up,
    /// columns of down. By default as they are. Not asked for where they cannot be moved.
    fn order(&self, params: &Params, mlp: &Neurons<'_>) -> Option<Vec<usize>> {
        let _ = (params, mlp);
        None
    }

    /// How whole neurons are dropped, for methods that do this instead of [`Compressor::compress`].
    fn neurons(&self) -> Option<&dyn NeuronPruner> {
        None
    }

    /// How the residual stream gets other bases, for methods that do this instead of [`Compressor::compress`].
    fn rotator(&self) -> Option<&dyn Rotator> {
        None
    }

    /// Compresses one layer. Equal input gives equal bits, at any number of threads. Methods that change whole blocks refuse.
    ///
    /// # Errors
    /// Targets that cannot be met (with the nearest that can), weights that are not finite, a Gram matrix that cannot be
    /// factored; all name the layer.
    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        let _ = params;
        let reason = "this method changes the matrices of a block together and has no form for one alone; use uniform or angular ratios";
        Err(MethodError::Layer { place: layer.place.into(), reason: reason.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert_eq!(Pattern::parse("2:4"), Ok(Pattern::Runs { keep: 2, of: 4 }));
        assert_eq!(Pattern::parse("unstructured"), Ok(Pattern::Free));
        for bad in ["4:4", "0:4", "2", "a:b", "", "2:400", ":"] {
            assert!(Pattern::parse(bad).unwrap_err().contains("2:4"), "{bad}");
        }
    }
}
