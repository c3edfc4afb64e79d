//! What to compare: short forms of methods, and ranges of them.

use crate::{
    calibrate,
    error::{Error, Result},
};
use lacuna_methods::registry::{self, Resolved};

/// Steps of a sweep that names none.
pub const DEFAULT_STEPS: usize = 5;

/// Most steps of a sweep; more tell nothing and take hours.
const MAX_STEPS: usize = 100;

/// Methods with parameters that are to become a plan.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The short form with every parameter.
    pub label: String,
    /// The same without the value that a sweep varies: one curve.
    pub family: String,
    /// That value: the first parameter of the last method that has one.
    pub value: Option<f64>,
    /// The methods.
    pub steps: Vec<Resolved>,
}

impl Candidate {
    /// The candidate of a short form; methods are parted by `,` or `+`.
    ///
    /// # Errors
    /// As [`registry::parse`].
    pub fn parse(spec: &str) -> Result<Self> {
        Ok(Self::of(registry::parse(&spec.replace('+', ","))?))
    }

    fn of(steps: Vec<Resolved>) -> Self {
        let swept = steps.iter().rposition(|s| !s.method.params().is_empty());
        let first = |s: &Resolved| s.params.iter().next().map(|p| p.1);
        let name = |(i, s): (usize, &Resolved)| {
            let mut text = s.method.name().to_owned();
            for (k, ((name, value), spec)) in s.params.iter().zip(s.method.params()).enumerate() {
                if k == 0 && swept != Some(i) {
                    text += &format!("={value}");
                } else if k > 0 && value != spec.default {
                    text += &format!(":{name}={value}");
                }
            }
            text
        };
        Self {
            label: calibrate::label(&steps),
            family: steps.iter().enumerate().map(name).collect::<Vec<_>>().join("+"),
            value: swept.and_then(|i| first(&steps[i])),
            steps,
        }
    }
}

/// A label without the parameters that have their default, the first of each method aside; as it is where this program
/// does not know the methods.
pub fn short(label: &str) -> String {
    let Ok(steps) = registry::parse(label) else { return label.to_owned() };
    let name = |s: &Resolved| {
        let mut text = s.method.name().to_owned();
        for (k, ((name, value), spec)) in s.params.iter().zip(s.method.params()).enumerate() {
            if k == 0 {
                text += &format!("={value}");
            } else if value != spec.default {
                text += &format!(":{name}={value}");
            }
        }
        text
    };
    steps.iter().map(name).collect::<Vec<_>>().join(",")
}

/// The family and value behind the label of a stored plan, whose methods this program may not know.
pub fn family_of(label: &str) -> (String, Option<f64>) {
    if let Ok(known) = Candidate::parse(label) {
        return (known.family, known.value);
    }
    let names: Vec<&str> = label.split(',').map(|s| s.split(['=', ':']).next().unwrap_or(s)).collect();
    let value = label.rsplit_once('=').and_then(|(_, v)| v.parse().ok());
    (names.join("+"), value)
}

/// The candidates of `NAME[,NAME...]=LO..HI[:STEPS]`, evenly spaced and both ends included. A NAME may be several methods
/// (`relu+teal`), of which the last is varied, and may set further parameters (`name:other=1`). A method without
/// parameters gives one candidate.
///
/// # Errors
/// Another form, a range that is empty or not finite, and what the methods say of the values.
pub fn sweep(text: &str) -> Result<Vec<Candidate>> {
    let wrong = |problem: &str| Error::Argument { name: "sweep", problem: format!("`{text}`: {problem}") };
    let form = "expected NAME[,NAME...]=LO..HI[:STEPS], such as teal=0.25..0.7:5";
    let (names, range) = text.rsplit_once('=').ok_or_else(|| wrong(form))?;
    let (low, rest) = range.split_once("..").ok_or_else(|| wrong(form))?;
    let (high, steps) = rest.split_once(':').map_or((rest, None), |(h, s)| (h, Some(s)));
    let number = |t: &str| t.trim().parse::<f64>().ok().filter(|x| x.is_finite()).ok_or_else(|| wrong(form));
    let (low, high) = (number(low)?, number(high)?);
    let steps = steps.map_or(Ok(DEFAULT_STEPS), |s| s.trim().parse().map_err(|_| wrong(form)))?;
    if low > high {
        return Err(wrong("the range runs downwards"));
    }
    if !(1..=MAX_STEPS).contains(&steps) || (steps == 1 && low < high) {
        return Err(wrong(&format!("steps must be 2 to {MAX_STEPS}, or 1 where both ends are equal")));
    }
    let steps = if low == high { 1 } else { steps };
    let mut list = Vec::new();
    for name in names.split(',').map(str::trim) {
        for value in values(low, high, steps) {
            let candidate = at(name, value)?;
            let fixed = candidate.value.is_none();
            list.push(candidate);
            if fixed {
                break;
            }
        }
    }
    Ok(list)
}

/// Evenly spaced values, free of the last digits of binary fractions.
fn values(low: f64, high: f64, steps: usize) -> impl Iterator<Item = f64> {
    (0..steps).map(move |i| {
        let part = if steps > 1 { i as f64 / (steps - 1) as f64 } else { 0.0 };
        ((low + (high - low) * part) * 1e6).round() / 1e6
    })
}

/// `name` with its last method set to `value`, unless that method takes none.
fn at(name: &str, value: f64) -> Result<Candidate> {
    let (before, last) = name.rsplit_once('+').map_or((None, name), |(b, l)| (Some(b), l));
    let (method, more) = last.split_once(':').map_or((last, None), |(m, p)| (m, Some(p)));
    let takes_value = !registry::find(method)?.params().is_empty();
    let mut spec = before.map_or(String::new(), |b| format!("{b}+"));
    spec += method;
    if takes_value {
        spec += &format!("={value}");
    }
    if let Some(more) = more {
        spec += &format!(":{more}");
    }
    Candidate::parse(&spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_methods::registry::METHODS;

    fn labels(text: &str) -> Vec<String> {
        sweep(text).unwrap().into_iter().map(|c| c.label).collect()
    }

    #[test]
    fn ends_are_included_and_values_are_round() {
        assert_eq!(labels("teal=0.25..0.65:5").len(), 5);
        let values: Vec<_> = sweep("teal=0.1..0.7:7").unwrap().iter().map(|c| c.value.unwrap()).collect();
        assert_eq!(values, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]);
        assert_eq!(sweep("teal=0.25..0.7").unwrap().len(), DEFAULT_STEPS);
        assert_eq!(sweep("teal=0.5..0.5").unwrap().len(), 1);
    }

    #[test]
    fn methods_without_a_value_appear_once_and_composition_varies_the_last() {
        let list = sweep("relu,relu+teal=0.2..0.4:3").unwrap();
        assert_eq!(list.len(), 4);
        assert_eq!((list[0].family.as_str(), list[0].value), ("relu", None));
        assert_eq!((list[3].family.as_str(), list[3].value), ("relu+teal", Some(0.4)));
        assert!(list[3].label.starts_with("relu,teal=0.4"), "{}", list[3].label);
    }

    #[test]
    fn every_method_of_the_registry_can_be_swept_over_its_default() {
        for m in METHODS {
            let value = m.params().first().map_or(0.5, |p| p.default);
            let list = sweep(&format!("{}={value}..{value}", m.name())).unwrap();
            assert_eq!((list.len(), list[0].family.as_str()), (1, m.name()));
        }
    }

    #[test]
    fn slips_are_named() {
        let error = |t: &str| sweep(t).unwrap_err().to_string();
        for bad in ["teal", "teal=0.5", "teal=a..b", "teal=0.1..nan", "teal=0.1..0.2:x", "=0.1..0.2"] {
            assert!(!error(bad).is_empty(), "{bad}");
        }
        assert!(error("teal=0.7..0.2").contains("downwards"));
        assert!(error("teal=0.1..0.2:0").contains("steps"));
        assert!(error("teal=0.1..0.2:1").contains("steps"));
        assert!(error("teel=0.1..0.2").contains("did you mean `teal`"));
        assert!(error("teal=0.5..1").contains("[0, 1)"));
    }

    #[test]
    fn short_labels_mean_the_same() {
        for m in METHODS {
            let full = Candidate::parse(m.name()).unwrap().label;
            let short = short(&full);
            assert!(short.len() <= full.len() && !short.contains(':'), "{short}");
            assert_eq!(Candidate::parse(&short).unwrap().label, full);
        }
        assert_eq!(short("newer=1:x=2"), "newer=1:x=2");
    }

    #[test]
    fn families_of_stored_labels() {
        assert_eq!(family_of("relu,teal=0.4").0, "relu+teal");
        assert_eq!(family_of("newer=0.25,other"), ("newer+other".into(), None));
        assert_eq!(family_of("newer=0.25"), ("newer".into(), Some(0.25)));
    }
}
