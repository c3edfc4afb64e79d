//! What a recipe becomes for one model: for each place, what the engine skips and how it decides.

use crate::site::Proj;
use serde::{Deserialize, Serialize};

/// Version of the stored form; a reader refuses others.
pub const PLAN_VERSION: u32 = 1;

/// Decides which entries of a vector stay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Selector {
    /// Keep what is not exactly zero.
    NonZero,
    /// Keep `|x| > threshold` (strictly).
    Magnitude {
        /// The threshold, finite and not negative.
        threshold: f32,
    },
}

/// What is skipped at one place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "kebab-case")]
pub enum Rule {
    /// Input channels of one projection: the vector that enters it is selected, the kept columns are read (axpy form).
    Inputs {
        /// Which projection.
        #[serde(with = "proj_name")]
        proj: Proj,
        /// Which channels stay.
        selector: Selector,
    },
    /// Neurons of the MLP: selected on the activated gate; rows of up (dot form) and columns of down (axpy form) follow.
    Neurons {
        /// Which neurons stay.
        selector: Selector,
    },
}

/// One entry of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Layer, from 0.
    pub layer: usize,
    /// What is skipped.
    #[serde(flatten)]
    pub rule: Rule,
    /// Share of entries that calibration saw kept, 0 to 1; what the dense fall-back compares with the break-even share.
    pub kept: f32,
}

/// A plan, bound to one model by hash. The engine follows it and never asks which method wrote it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// Hash of the model it was made for (hex).
    pub model: String,
    /// The method and its parameters, for people and reports.
    pub method: String,
    /// Tokens of calibration text behind it (0: none needed).
    pub calibration_tokens: usize,
    /// What is skipped where.
    pub entries: Vec<Entry>,
}

mod proj_name {
    use crate::site::Proj;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(p: &Proj, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(p.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Proj, D::Error> {
        let name = String::deserialize(d)?;
        Proj::parse(&name).ok_or_else(|| D::Error::custom(format!("unknown projection `{name}`")))
    }
}
