//! Methods that skip inputs of linear layers and neurons of the MLP.

pub mod cats;
pub mod cett;
pub mod chess;
pub mod core_neurons;
pub mod drelu;
pub mod fatrelu;
pub mod predictor;
pub mod q_sparse;
pub mod r_sparse;
pub mod relu;
pub mod spark;
pub mod stored_predictor;
pub mod teal;
pub mod topk;
pub mod wina;
