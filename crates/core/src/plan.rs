//! What a recipe becomes for one model: for each place, what the engine skips and how it decides.

use crate::{atomic::write_atomically, map::read_small, method::MethodError, site::Proj};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the stored form; a reader refuses others.
pub const PLAN_VERSION: u32 = 1;

/// Longest plan file that is read, in bytes (a plan takes about 150 bytes per entry).
pub const PLAN_MAX_BYTES: u64 = 16 << 20;

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

impl Rule {
    /// The projections whose weights this rule decides about.
    pub fn covers(&self) -> &'static [Proj] {
        match self {
            Rule::Neurons { .. } => &[Proj::Up, Proj::Down],
            Rule::Inputs { proj, .. } => {
                let i = Proj::ALL.iter().position(|p| p == proj).expect("ALL lists every projection");
                &Proj::ALL[i..=i]
            }
        }
    }

    /// How entries are selected.
    pub fn selector(&self) -> Selector {
        match *self {
            Rule::Inputs { selector, .. } | Rule::Neurons { selector } => selector,
        }
    }
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
    /// `None` where nothing was measured.
    #[serde(default)]
    pub kept: Option<f32>,
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

/// Joins the entries of several methods, first come first served: an entry whose projections are already decided is
/// left out and returned in the second list, so that a caller can say so.
pub fn compose(lists: impl IntoIterator<Item = Vec<Entry>>) -> (Vec<Entry>, Vec<Entry>) {
    let mut kept: Vec<Entry> = Vec::new();
    let mut left_out = Vec::new();
    for entry in lists.into_iter().flatten() {
        if kept.iter().any(|k| k.layer == entry.layer && overlap(k, &entry)) {
            left_out.push(entry);
        } else {
            kept.push(entry);
        }
    }
    (kept, left_out)
}

fn overlap(a: &Entry, b: &Entry) -> bool {
    a.rule.covers().iter().any(|p| b.rule.covers().contains(p))
}

impl Plan {
    /// Reads a stored plan and checks it against the model it will run on.
    ///
    /// # Errors
    /// Unreadable, over [`PLAN_MAX_BYTES`], not a plan, of another version, made for another model (both hashes are
    /// named), or with entries that no model of `layers` layers can follow.
    pub fn load(path: &Path, model: &str, layers: usize) -> Result<Self, MethodError> {
        Self::parse(&read_small(path, PLAN_MAX_BYTES)?, path, model, layers)
    }

    /// [`Plan::load`] on the bytes of a file; `path` is for messages.
    pub fn parse(text: &[u8], path: &Path, model: &str, layers: usize) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::Plan { path: path.into(), reason };
        if text.len() as u64 > PLAN_MAX_BYTES {
            return Err(bad(format!("longer than {PLAN_MAX_BYTES} bytes: not a plan of this program")));
        }
        #[derive(Deserialize)]
        struct Head {
            version: u32,
            model: String,
        }
        let remedy = "damaged or not a plan; delete it and calibrate again";
        let head: Head = serde_json::from_slice(text).map_err(|e| bad(format!("{e}: {remedy}")))?;
        if head.version != PLAN_VERSION {
            return Err(bad(format!(
                "stored as version {}, this program reads {PLAN_VERSION}: calibrate again",
                head.version
            )));
        }
        if head.model != model {
            return Err(MethodError::OtherModel { path: path.into(), plan: head.model, model: model.into() });
        }
        let plan: Self = serde_json::from_slice(text).map_err(|e| bad(format!("{e}: {remedy}")))?;
        plan.check(layers).map_err(bad)?;
        Ok(plan)
    }

    /// Checks what can be checked without the model's weights: layers in range, numbers finite and in range, no
    /// projection decided twice.
    pub fn check(&self, layers: usize) -> Result<(), String> {
        let mut seen = std::collections::HashSet::new();
        for (i, e) in self.entries.iter().enumerate() {
            if e.layer >= layers {
                return Err(format!("entry {i} names layer {}, but the model has {layers} layers", e.layer));
            }
            if let Selector::Magnitude { threshold } = e.rule.selector()
                && !(threshold.is_finite() && threshold >= 0.0)
            {
                return Err(format!(
                    "entry {i} (layer {}) has threshold {threshold}, not a finite number >= 0",
                    e.layer
                ));
            }
            if let Some(kept) = e.kept
                && !(0.0..=1.0).contains(&kept)
            {
                return Err(format!("entry {i} (layer {}) has kept share {kept}, outside [0, 1]", e.layer));
            }
            for p in e.rule.covers() {
                if !seen.insert((e.layer, *p)) {
                    return Err(format!("entry {i} decides about layers.{}.{p} a second time", e.layer));
                }
            }
        }
        Ok(())
    }

    /// Writes the plan so that a reader sees the old file or the new one, never a part.
    pub fn save(&self, path: &Path) -> Result<(), MethodError> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| MethodError::Plan { path: path.into(), reason: e.to_string() })?;
        text.push(b'\n');
        Ok(write_atomically(path, Some(text.len() as u64), |out| out.write_all(&text))?)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let selector = Selector::Magnitude { threshold: 0.1234567 };
        Plan {
            version: PLAN_VERSION,
            model: "abc".into(),
            method: "teal=0.5".into(),
            calibration_tokens: 10,
            entries: vec![
                Entry { layer: 0, rule: Rule::Inputs { proj: Proj::Q, selector }, kept: Some(0.5) },
                Entry { layer: 1, rule: Rule::Neurons { selector: Selector::NonZero }, kept: None },
            ],
        }
    }

    #[test]
    fn stored_and_read_back_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        plan().save(&path).unwrap();
        assert_eq!(Plan::load(&path, "abc", 2).unwrap(), plan());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file stays");
    }

    #[test]
    fn refuses_other_models_versions_and_damage() {
        let text = serde_json::to_string(&plan()).unwrap();
        let parse = |t: &str| Plan::parse(t.as_bytes(), Path::new("p.json"), "abc", 2).map_err(|e| e.to_string());
        assert!(parse(&text).is_ok());
        let e = Plan::parse(text.as_bytes(), Path::new("p.json"), "xyz", 2).unwrap_err().to_string();
        assert!(e.contains("abc") && e.contains("xyz"), "{e}");
        assert!(parse(&text.replace("\"version\":1", "\"version\":9")).unwrap_err().contains("version 9"));
        assert!(parse(&text.replace("\"layer\":1", "\"layer\":2")).unwrap_err().contains("layer 2"));
        assert!(parse(&text.replace("attn.q", "attn.x")).unwrap_err().contains("attn.x"));
        assert!(
            parse(&text.replace("0.5}", "1.5}").replace("\"kept\":0.5", "\"kept\":1.5")).unwrap_err().contains("1.5")
        );
        for n in 0..text.len() {
            assert!(parse(&text[..n]).is_err(), "cut at {n}");
        }
    }

    #[test]
    fn thresholds_must_be_finite_and_projections_decided_once() {
        let mut p = plan();
        p.entries[0].rule = Rule::Inputs { proj: Proj::Q, selector: Selector::Magnitude { threshold: f32::NAN } };
        assert!(p.check(2).unwrap_err().contains("NaN"));
        let mut p = plan();
        p.entries.push(Entry {
            layer: 1,
            rule: Rule::Inputs { proj: Proj::Down, selector: Selector::NonZero },
            kept: None,
        });
        assert!(p.check(2).unwrap_err().contains("second time"));
    }

    #[test]
    fn composing_keeps_the_first_word() {
        let input = |proj| Entry { layer: 0, rule: Rule::Inputs { proj, selector: Selector::NonZero }, kept: None };
        let neurons = Entry { layer: 0, rule: Rule::Neurons { selector: Selector::NonZero }, kept: None };
        let (kept, out) = compose([vec![neurons], Proj::ALL.map(input).to_vec()]);
        assert_eq!(kept.len(), 6, "neurons, q, k, v, o, gate");
        assert_eq!(out, [input(Proj::Up), input(Proj::Down)]);
    }
}
