//! Stored weights: a matrix with a format, an orientation, and the bytes that hold it.

use crate::{bytes::Bytes, pair};
use lacuna_kernels::{
    Format, Matrix,
    axpy::{Columns, groups::Groups},
    bitmap::Bitmap,
    codebook::{self, Codebook},
    gemm::Weights,
};
use std::sync::Arc;

/// Which axis of `W[out, in]` is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orientation {
    /// One run per output: dot form.
    OutputMajor,
    /// One run per input channel: axpy form.
    InputMajor,
    /// The codes of each input channel, with the scales of output-major blocks: axpy form of the same numbers
    /// ([`lacuna_kernels::axpy::groups`]).
    InputGroups,
    /// One run per output without its zeros: dot form ([`lacuna_kernels::bitmap`]).
    Bitmap,
    /// One run of codes of pairs per output: dot form ([`lacuna_kernels::codebook`]). The format is that of the numbers
    /// they stand for, [`lacuna_kernels::codebook::DENSE`].
    Codebook,
    /// The product of two smaller matrices ([`crate::pair`]), computed one after the other. The format is that of the one
    /// that reads the inputs.
    LowRank,
}

impl Orientation {
    /// The name in pages and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::OutputMajor => "output-major",
            Self::InputMajor => "input-major",
            Self::InputGroups => "input-groups",
            Self::Bitmap => "bitmap",
            Self::Codebook => "codebook",
            Self::LowRank => "low-rank",
        }
    }
}

/// A weight matrix of a linear layer `y = W x`, as it lies in memory or in a mapped file.
#[derive(Clone, Debug)]
pub struct Weight {
    format: Format,
    orientation: Orientation,
    outputs: usize,
    inputs: usize,
    bytes: Bytes,
    /// `B`, then `A` of a product.
    factors: Option<Arc<[Weight; 2]>>,
}

impl Weight {
    /// A weight over `bytes`; `None` if their length does not fit the shape.
    pub fn new(format: Format, orientation: Orientation, outputs: usize, inputs: usize, bytes: Bytes) -> Option<Self> {
        let mut factors = None;
        match orientation {
            Orientation::OutputMajor => drop(Matrix::new(format, outputs, inputs, &bytes)?),
            Orientation::InputMajor => drop(Matrix::new(format, inputs, outputs, &bytes)?),
            Orientation::InputGroups => drop(Groups::new(format, outputs, inputs, &bytes)?),
            Orientation::Bitmap => drop(Bitmap::new(format, outputs, inputs, &bytes)?),
            Orientation::Codebook if format != codebook::DENSE => return None,
            Orientation::Codebook => drop(Codebook::new(outputs, inputs, &bytes)?),
            Orientation::LowRank => {
                let both = pair::parse(outputs, inputs, &bytes).filter(|f| f[0].format == format)?;
                factors = Some(Arc::new(both));
            }
        }
        Some(Self { format, orientation, outputs, inputs, bytes, factors })
    }

    /// The runs, which is how model files hold weights.
    ///
    /// # Panics
    /// For [`Orientation::InputGroups`], [`Orientation::Bitmap`], [`Orientation::Codebook`] and [`Orientation::LowRank`],
    /// which only copies have.
    pub fn matrix(&self) -> Matrix<'_> {
        let (rows, cols) = match self.orientation {
            Orientation::OutputMajor => (self.outputs, self.inputs),
            Orientation::InputMajor => (self.inputs, self.outputs),
            Orientation::InputGroups | Orientation::Bitmap | Orientation::Codebook | Orientation::LowRank => {
                panic!("a converted weight has no runs")
            }
        };
        Matrix::new(self.format, rows, cols, &self.bytes).expect("checked when the weight was made")
    }

    /// The two matrices of a product `W = A B`: `B`, which reads the inputs, then `A`. `None` for any other weight.
    pub fn factors(&self) -> Option<&[Weight; 2]> {
        self.factors.as_deref()
    }

    /// The form that matrix products take.
    ///
    /// # Panics
    /// For [`Orientation::LowRank`], which is two products.
    pub fn product(&self) -> Weights<'_> {
        match self.orientation {
            Orientation::OutputMajor => Weights::OutputMajor(self.matrix()),
            Orientation::InputMajor => Weights::InputMajor(self.matrix()),
            Orientation::InputGroups => Weights::Groups(self.groups()),
            Orientation::Bitmap => Weights::Bitmap(self.bitmap()),
            Orientation::Codebook => Weights::Codebook(self.codebook()),
            Orientation::LowRank => panic!("a weight of low rank is two products"),
        }
    }

    /// The columns, for sums over chosen channels.
    ///
    /// # Panics
    /// For orientations by outputs.
    pub fn columns(&self) -> Columns<'_> {
        match self.orientation {
            Orientation::InputGroups => Columns::Groups(self.groups()),
            Orientation::InputMajor => Columns::Runs(self.matrix()),
            Orientation::OutputMajor | Orientation::Bitmap | Orientation::Codebook | Orientation::LowRank => {
                panic!("a weight by outputs has no columns")
            }
        }
    }

    /// The rows without their zeros.
    ///
    /// # Panics
    /// For any other orientation than [`Orientation::Bitmap`].
    pub fn bitmap(&self) -> Bitmap<'_> {
        assert_eq!(self.orientation, Orientation::Bitmap, "only bitmaps have packed rows");
        Bitmap::new(self.format, self.outputs, self.inputs, &self.bytes).expect("checked when the weight was made")
    }

    /// The rows in codes of pairs.
    ///
    /// # Panics
    /// For any other orientation than [`Orientation::Codebook`].
    pub fn codebook(&self) -> Codebook<'_> {
        assert_eq!(self.orientation, Orientation::Codebook, "only codebooks have codes of pairs");
        Codebook::new(self.outputs, self.inputs, &self.bytes).expect("checked when the weight was made")
    }

    fn groups(&self) -> Groups<'_> {
        Groups::new(self.format, self.outputs, self.inputs, &self.bytes).expect("checked when the weight was made")
    }

    /// Storage format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Contiguous axis.
    pub fn orientation(&self) -> Orientation {
        self.orientation
    }

    /// Length of `y`.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Length of `x`.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}
