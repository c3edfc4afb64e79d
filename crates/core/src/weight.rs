//! Stored weights: a matrix with a format, an orientation, and the bytes that hold it.

use crate::bytes::Bytes;
use lacuna_kernels::{Format, Matrix};

/// Which axis of `W[out, in]` is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orientation {
    /// One run per output: dot form.
    OutputMajor,
    /// One run per input channel: axpy form.
    InputMajor,
}

/// A weight matrix of a linear layer `y = W x`, as it lies in memory or in a mapped file.
#[derive(Clone, Debug)]
pub struct Weight {
    format: Format,
    orientation: Orientation,
    outputs: usize,
    inputs: usize,
    bytes: Bytes,
}

impl Weight {
    /// A weight over `bytes`; `None` if their length does not fit the shape.
    pub fn new(format: Format, orientation: Orientation, outputs: usize, inputs: usize, bytes: Bytes) -> Option<Self> {
        let w = Self { format, orientation, outputs, inputs, bytes };
        Matrix::new(format, w.runs().0, w.runs().1, &w.bytes)?;
        Some(w)
    }

    fn runs(&self) -> (usize, usize) {
        match self.orientation {
            Orientation::OutputMajor => (self.outputs, self.inputs),
            Orientation::InputMajor => (self.inputs, self.outputs),
        }
    }

    /// The view that kernels take.
    pub fn matrix(&self) -> Matrix<'_> {
        let (rows, cols) = self.runs();
        Matrix::new(self.format, rows, cols, &self.bytes).expect("checked when the weight was made")
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
