//! From `--draft`, or a plan with a decoding method, to a decoder.

use anyhow::{Result, anyhow, bail};
use clap::Args;
use lacuna::engine::decoding::{Decoder, DecodingStats};
use lacuna_core::plan::{Decoding, DraftSource};
use lacuna_methods::registry;
use std::{fmt, str::FromStr};

/// How several tokens are guessed and checked in one pass.
#[derive(Args, Clone)]
pub struct DecodingArgs {
    /// Guess tokens and check them in one pass: `token-recycling`; `self-speculation` or `sirius[=THRESHOLD]`, which
    /// let a plan write and the dense model check (see `lacuna methods`). Only sirius changes the text. Default: as the
    /// plan says.
    #[arg(long, value_name = "SPEC", env = "LACUNA_DRAFT")]
    pub draft: Option<Spec>,
    /// Most tokens checked in one pass, 1 to 64; default: the method's.
    #[arg(long, value_name = "N", env = "LACUNA_DRAFT_MAX")]
    pub draft_max: Option<usize>,
}

impl DecodingArgs {
    /// The decoder for an engine whose plan, if it has one, asks for `planned`.
    ///
    /// # Errors
    /// Numbers out of their range, or a draft that needs a plan.
    pub fn decoder(&self, has_plan: bool, planned: Option<&Decoding>) -> Result<Decoder> {
        let spec = self.draft.clone().unwrap_or(Spec { label: "plan".into(), decoding: planned.copied() });
        spec.decoder(self.draft_max, has_plan)
    }
}

/// What `--draft` names: a decoding method of the registry, or `plain` for one pass per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    label: String,
    decoding: Option<Decoding>,
}

impl FromStr for Spec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "plain" {
            return Ok(Self { label: text.into(), decoding: None });
        }
        let steps = registry::parse(text)?;
        let [step] = &steps[..] else { bail!("`{text}`: one decoding method is needed") };
        let decoding = step
            .method
            .decoding(&step.params)
            .ok_or_else(|| anyhow!("`{}` is not a decoding method: give it to --sparse", step.method.name()))?;
        Ok(Self { label: text.into(), decoding: Some(decoding) })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

impl Spec {
    /// The decoder of this draft with at most `most` tokens in a pass.
    ///
    /// # Errors
    /// As [`DecodingArgs::decoder`].
    pub fn decoder(&self, most: Option<usize>, has_plan: bool) -> Result<Decoder> {
        let Some(decoding) = self.decoding else { return Ok(Decoder::plain()) };
        if decoding.draft == DraftSource::Plan && !has_plan {
            bail!("--draft {self} needs a plan that writes the drafts: add --sparse or --plan");
        }
        Ok(Decoder::of(&Decoding { most: most.unwrap_or(decoding.most), ..decoding })?)
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
        for text in ["plain", "token-recycling", "self-speculation=4", "sirius=0.25"] {
            let spec: Spec = text.parse().unwrap();
            assert_eq!((spec.to_string(), spec.decoding.is_some()), (text.to_owned(), text != "plain"));
        }
        let error = |s: &str| s.parse::<Spec>().unwrap_err().to_string();
        assert!(error("token-recyling").contains("did you mean `token-recycling`"));
        assert!(error("sirius=2").contains("[0, 1]") && error("teal=0.5").contains("--sparse"));
        assert!(error("sirius,token-recycling").contains("one decoding method"));
        let sirius: Spec = "sirius".parse().unwrap();
        assert!(sirius.decoder(None, false).err().unwrap().to_string().contains("--plan"));
        assert!(sirius.decoder(Some(64), true).is_ok() && sirius.decoder(Some(65), true).is_err());
    }
}
