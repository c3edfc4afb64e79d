//! Methods that change stored weights, one linear layer at a time, through [`lacuna_core::compress::Compressor`].

pub mod awq;
pub mod casp;
pub mod cfsp;
pub mod chita;
pub mod gpfq;
pub mod gptq;
pub mod gptvq;
pub mod jlcm;
pub mod kmeans;
pub mod magnitude;
pub mod patch;
pub mod random;
pub mod rtn;
pub mod slicegpt;
pub mod sparsegpt;
pub mod spectral_sample;
pub mod wanda;
pub mod wina_rotation;

pub mod ratios;
mod tools;
