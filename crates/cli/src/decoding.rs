//! From `--draft` to a decoder.

use anyhow::{Result, anyhow, bail};
use clap::Args;
use lacuna::engine::decoding::{Decoder, DecodingStats, RecyclingOptions, Rule};
use std::{fmt, str::FromStr};

/// Tokens that a sparse draft writes between two dense passes.
const SPARSE_BLOCK: usize = 8;
/// The threshold of Sirius's published speed runs.
const SIRIUS_THRESHOLD: f32 = 0.05;

/// How several tokens are guessed and checked in one pass.
#[derive(Args, Clone)]
pub struct DecodingArgs {
    /// Guess tokens and check them in one pass: `token-recycling`; `sparse` or `sirius[=THRESHOLD]`, which let a plan
    /// write and the dense model check. The first two do not change the text; sirius accepts what is likely enough.
    #[arg(long, value_name = "SPEC", env = "LACUNA_DRAFT")]
    pub draft: Option<Spec>,
    /// Most tokens checked in one pass, 1 to 64. Default: 16 for token-recycling, 8 for the others.
    #[arg(long, value_name = "N", env = "LACUNA_DRAFT_MAX")]
    pub draft_max: Option<usize>,
}

impl DecodingArgs {
    /// The decoder, for an engine with or without a plan.
    ///
    /// # Errors
    /// Numbers out of their range, or a draft that needs a plan.
    pub fn decoder(&self, has_plan: bool) -> Result<Decoder> {
        self.draft.unwrap_or(Spec::Plain).decoder(self.draft_max, has_plan)
    }
}

/// What `--draft` names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spec {
    /// One pass per token.
    Plain,
    /// Guesses from earlier candidates.
    TokenRecycling,
    /// Guesses by the plan, accepted where the dense model agrees.
    Sparse,
    /// Guesses by the plan, accepted where the dense model finds them likely enough.
    Sirius(f32),
}

impl FromStr for Spec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, value) = text.split_once('=').map_or((text, None), |(n, v)| (n, Some(v)));
        match (name, value) {
            ("plain", None) => Ok(Self::Plain),
            ("token-recycling", None) => Ok(Self::TokenRecycling),
            ("sparse", None) => Ok(Self::Sparse),
            ("sirius", None) => Ok(Self::Sirius(SIRIUS_THRESHOLD)),
            ("sirius", Some(v)) => match v.parse() {
                Ok(p) if (0.0..=1.0).contains(&p) => Ok(Self::Sirius(p)),
                _ => bail!("the threshold `{v}` is not a number from 0 to 1"),
            },
            ("plain" | "token-recycling" | "sparse", Some(_)) => bail!("`{name}` takes no value"),
            _ => {
                let known = ["plain", "token-recycling", "sparse", "sirius"];
                let hint = lacuna_core::suggest::hint(name, known);
                Err(anyhow!("unknown draft `{name}`{hint}; known are {}", known.join(", ")))
            }
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("plain"),
            Self::TokenRecycling => f.write_str("token-recycling"),
            Self::Sparse => f.write_str("sparse"),
            Self::Sirius(p) => write!(f, "sirius={p}"),
        }
    }
}

impl Spec {
    /// The decoder of this draft with at most `most` tokens in a pass.
    ///
    /// # Errors
    /// As [`DecodingArgs::decoder`].
    pub fn decoder(self, most: Option<usize>, has_plan: bool) -> Result<Decoder> {
        let rule = match self {
            Self::Plain => return Ok(Decoder::plain()),
            Self::TokenRecycling => {
                let default = RecyclingOptions::default();
                let options = RecyclingOptions { most: most.unwrap_or(default.most), ..default };
                return Ok(Decoder::token_recycling(options)?);
            }
            Self::Sparse => Rule::Exact,
            Self::Sirius(p) => Rule::Threshold(p),
        };
        if !has_plan {
            bail!("--draft {self} needs a plan that writes the drafts: add --sparse or --plan");
        }
        Ok(Decoder::sparse_steps(most.unwrap_or(SPARSE_BLOCK), rule)?)
    }
}

/// What the passes brought, in a line; `None` for plain decoding.
pub fn report(stats: &DecodingStats) -> Option<String> {
    let share = |part: u64, all: u64| if all == 0 { 0.0 } else { part as f64 / all as f64 };
    (stats.passes > 0).then(|| {
        format!(
            "{} checking passes, {:.2} tokens each ({:.0} % of the guesses right), effective density {:.2}",
            stats.passes,
            stats.accepted_length(),
            100.0 * share(stats.accepted, stats.guessed),
            stats.effective_density(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_come_back_and_slips_are_named() {
        for text in ["plain", "token-recycling", "sparse", "sirius=0.25"] {
            assert_eq!(text.parse::<Spec>().unwrap().to_string(), text);
        }
        assert_eq!("sirius".parse::<Spec>().unwrap(), Spec::Sirius(SIRIUS_THRESHOLD));
        let error = |s: &str| s.parse::<Spec>().unwrap_err().to_string();
        assert!(error("token-recyling").contains("token-recycling") && error("sirius=2").contains("0 to 1"));
        assert!(error("sparse=3").contains("takes no value") && error("sirius=nan").contains("nan"));
        assert!(Spec::Sparse.decoder(None, false).err().unwrap().to_string().contains("--plan"));
        assert!(Spec::TokenRecycling.decoder(Some(100), false).is_err() && Spec::Sparse.decoder(Some(64), true).is_ok());
    }
}
