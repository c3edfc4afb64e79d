//! One file per verb.

pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod compare;
pub mod compress;
pub mod demo;
pub mod doctor;
pub mod eval;
pub mod inspect;
pub mod methods;
#[cfg(feature = "pull")]
pub mod pull;
pub mod run;
pub mod serve;
