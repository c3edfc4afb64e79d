//! One file per verb.

pub mod doctor;
pub mod methods;
#[cfg(feature = "pull")]
pub mod pull;
