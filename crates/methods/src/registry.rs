//! The one list of methods, and how names in recipes and on command lines become methods with checked parameters.

use crate::activations::{
    cats::Cats, cett::Cett, chess::Chess, core_neurons::CoreNeurons, drelu::DRelu, fatrelu::FatRelu,
    predictor::Predictor, q_sparse::QSparse, r_sparse::RSparse, relu::Relu, spark::Spark,
    stored_predictor::StoredPredictor, teal::Teal, topk::TopK, wina::Wina,
};
use crate::decoding::{self_speculation::SelfSpeculation, sirius::Sirius, token_recycling::TokenRecycling};
use crate::weights::{
    awq::Awq, casp::Casp, cfsp::Cfsp, chita::Chita, gpfq::Gpfq, gptq::Gptq, gptvq::Gptvq, jlcm::Jlcm, kmeans::Kmeans,
    magnitude::Magnitude, patch::Patch, random::Random, rtn::Rtn, slicegpt::SliceGpt, sparsegpt::SparseGpt,
    spectral_sample::SpectralSample, wanda::Wanda, wina_rotation::WinaRotation,
};
use lacuna_core::{
    method::{Method, MethodError, Params},
    recipe::{Step, parse_short},
    suggest::hint,
};

/// Every method. Everything else that lists methods is derived from this slice.
pub static METHODS: &[&dyn Method] = &[
    &Relu,
    &DRelu,
    &FatRelu,
    &TopK,
    &Spark,
    &CoreNeurons,
    &Cats,
    &Chess,
    &Teal,
    &Wina,
    &RSparse,
    &QSparse,
    &Cett,
    &Predictor,
    &StoredPredictor,
    &TokenRecycling,
    &SelfSpeculation,
    &Sirius,
    &Magnitude,
    &Random,
    &Wanda,
    &SparseGpt,
    &Rtn,
    &Gptq,
    &Gptvq,
    &Kmeans,
    &Jlcm,
    &Gpfq,
    &Awq,
    &Patch,
    &Cfsp,
    &Chita,
    &SpectralSample,
    &Casp,
    &SliceGpt,
    &WinaRotation,
];

/// A step with its method found and its parameters checked.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The method.
    pub method: &'static dyn Method,
    /// All its parameters.
    pub params: Params,
}

impl Resolved {
    /// The short form with every parameter: `teal=0.5` (further parameters as `name=value` after colons).
    pub fn label(&self) -> String {
        let mut text = self.method.name().to_owned();
        for (i, (name, value)) in self.params.iter().enumerate() {
            text += &if i == 0 { format!("={value}") } else { format!(":{name}={value}") };
        }
        text
    }

    /// Whether it has the parameter `name`.
    pub fn has(&self, name: &str) -> bool {
        self.method.params().iter().any(|p| p.name == name)
    }

    /// The same step with another value for one parameter.
    ///
    /// # Errors
    /// No such parameter, or a value outside its range.
    pub fn with(&self, name: &str, value: f64) -> Result<Self, MethodError> {
        let mut given: Vec<(&str, f64)> = self.params.iter().filter(|p| p.0 != name).collect();
        given.push((name, value));
        Ok(Self { method: self.method, params: Params::new(self.method, given)? })
    }
}

/// The method of that name.
///
/// # Errors
/// No such method; the message names the nearest one and lists all.
pub fn find(name: &str) -> Result<&'static dyn Method, MethodError> {
    let names = || METHODS.iter().map(|m| m.name());
    METHODS.iter().find(|m| m.name() == name).copied().ok_or_else(|| MethodError::UnknownMethod {
        name: name.into(),
        hint: hint(name, names()),
        known: names().collect::<Vec<_>>().join(", "),
    })
}

/// Finds the method of a step and checks its parameters.
///
/// # Errors
/// Unknown method or parameter (with the nearest valid name), a value out of range, a value for a method without parameters.
pub fn resolve(step: &Step) -> Result<Resolved, MethodError> {
    let method = find(&step.method)?;
    let mut given = Vec::new();
    for (name, value) in &step.params {
        match (name.as_str(), method.params().first()) {
            ("", Some(first)) => given.push((first.name, *value)),
            ("", None) => {
                let spec = format!("{}={value}", step.method);
                return Err(MethodError::NoValue { method: step.method.clone(), spec });
            }
            (name, _) => given.push((name, *value)),
        }
    }
    Ok(Resolved { method, params: Params::new(method, given)? })
}

/// Parses and resolves a short form such as `relu,teal=0.5`.
///
/// # Errors
/// As [`resolve`], or a form that is not `name[=number],...`.
pub fn parse(spec: &str) -> Result<Vec<Resolved>, MethodError> {
    parse_short(spec)?.iter().map(resolve).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_slugs_with_valid_defaults() {
        for (i, m) in METHODS.iter().enumerate() {
            assert!(m.name().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            assert!(METHODS[..i].iter().all(|o| o.name() != m.name()));
            assert!(!m.title().is_empty() && !m.summary().is_empty() && !m.citation().paper.is_empty());
            assert!(!m.layouts().is_empty());
            let defaults: Vec<_> = m.params().iter().map(|p| (p.name, p.default)).collect();
            Params::new(*m, defaults).unwrap();
        }
    }

    #[test]
    fn short_forms_resolve_and_slips_are_named() {
        let steps = parse("relu,teal=0.4").unwrap();
        assert_eq!(steps.iter().map(Resolved::label).collect::<Vec<_>>(), ["relu", "teal=0.4:prior=1"]);
        let error = |s: &str| parse(s).unwrap_err().to_string();
        assert!(error("teel=0.5").contains("did you mean `teal`"));
        assert!(error("teal=1").contains("[0, 1)"));
        assert!(error("teal=nan").contains("[0, 1)"));
        assert!(error("relu=0.5").contains("takes no value"));
        let step = Step { method: "teal".into(), params: vec![("sparcity".into(), 0.5)] };
        assert!(resolve(&step).unwrap_err().to_string().contains("did you mean `sparsity`"));
    }
}
