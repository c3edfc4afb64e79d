//! Methods that skip inputs of linear layers and neurons of the MLP.

pub mod cats;
pub mod chess;
mod common;
pub mod fatrelu;
mod prior;
pub mod relu;
pub mod teal;
pub mod topk;
pub mod wina;
