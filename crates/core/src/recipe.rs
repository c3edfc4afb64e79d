//! What a user writes: one TOML file with the base model, the calibration text and an ordered list of methods; or its
//! short form on a command line, `relu,teal=0.5`.

use crate::{compress::Pattern, method::MethodError, suggest::hint};
use std::path::PathBuf;
use toml::{Table, Value};

/// Version of the recipe's schema; a reader refuses others.
pub const RECIPE_VERSION: i64 = 1;

/// Longest recipe that is read, in bytes.
pub const RECIPE_MAX_BYTES: usize = 1 << 20;

/// The calibration text.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// UTF-8 text file.
    pub file: PathBuf,
    /// Tokens to read of it; `None`: what the methods need.
    pub tokens: Option<usize>,
    /// Which windows of a longer text are read.
    pub seed: u64,
}

/// One method with the parameters as written; the registry checks both.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Name of the method.
    pub method: String,
    /// Parameters by name, in the order of the file. The empty name is the method's first parameter (`teal=0.5`).
    pub params: Vec<(String, f64)>,
}

/// A recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// The model it is meant for: a folder, a file or a hub name.
    pub base: Option<String>,
    /// The calibration text.
    pub calibration: Option<Calibration>,
    /// How a share of the weights is spread over layers, for methods that change weights; none: the same everywhere.
    pub ratios: Option<String>,
    /// What is done, in this order.
    pub steps: Vec<Step>,
}

impl Recipe {
    /// Parses a TOML recipe; `path` is for messages.
    ///
    /// # Errors
    /// Too long, not TOML, of another version, a key that does not exist (with the nearest that does) or a value of the wrong type.
    pub fn parse(text: &str, path: &str) -> Result<Self, MethodError> {
        parse_table(text).map_err(|reason| MethodError::Recipe { path: path.into(), reason })
    }
}

/// Parses the short form: names separated by commas, each optionally with a value for its first parameter and others by
/// name, `teal=0.5:prior=1`.
pub fn parse_short(spec: &str) -> Result<Vec<Step>, MethodError> {
    let bad = |reason: String| MethodError::Recipe { path: format!("`{spec}`"), reason };
    let number =
        |name: &str, v: &str| v.trim().parse().map_err(|_| bad(format!("`{v}` after `{name}=` is not a number")));
    let step = |part: &str| {
        let mut pieces = part.split(':');
        let first = pieces.next().unwrap_or("");
        let (method, value) = first.split_once('=').map_or((first, None), |(m, v)| (m, Some(v)));
        if method.trim().is_empty() {
            return Err(bad("a method's name is missing; write for example `relu` or `teal=0.5`".into()));
        }
        let mut params = vec![];
        if let Some(v) = value {
            params.push((String::new(), number(method, v)?));
        }
        for piece in pieces {
            let missing = || bad(format!("`{piece}` is not `parameter=number`"));
            let (name, v) = piece.split_once('=').ok_or_else(missing)?;
            params.push((name.trim().into(), number(name, v)?));
        }
        Ok(Step { method: method.trim().into(), params })
    };
    spec.split(',').map(step).collect()
}

fn parse_table(text: &str) -> Result<Recipe, String> {
    if text.len() > RECIPE_MAX_BYTES {
        return Err(format!("longer than {RECIPE_MAX_BYTES} bytes"));
    }
    let table: Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
    known_keys(&table, &["version", "base", "calibration", "ratios", "step"], "recipe")?;
    match table.get("version") {
        Some(Value::Integer(RECIPE_VERSION)) => {}
        Some(other) => return Err(format!("version is {other}, this program reads {RECIPE_VERSION}")),
        None => return Err(format!("`version = {RECIPE_VERSION}` is missing")),
    }
    let base = table.get("base").map(|v| string(v, "base")).transpose()?;
    let ratios = table.get("ratios").map(|v| string(v, "ratios")).transpose()?;
    let calibration = match table.get("calibration") {
        None => None,
        Some(Value::Table(t)) => Some(parse_calibration(t)?),
        Some(_) => return Err("`calibration` must be a table: `[calibration]`".into()),
    };
    let steps = match table.get("step") {
        None => vec![],
        Some(Value::Array(list)) => list.iter().map(parse_step).collect::<Result<_, _>>()?,
        Some(_) => return Err("`step` must be an array of tables: `[[step]]`".into()),
    };
    if steps.is_empty() {
        return Err("no `[[step]]`: nothing to do".into());
    }
    Ok(Recipe { base, calibration, ratios, steps })
}

fn parse_calibration(t: &Table) -> Result<Calibration, String> {
    known_keys(t, &["file", "tokens", "seed"], "[calibration]")?;
    let file = t.get("file").ok_or("`file` is missing in [calibration]")?;
    let whole = |key: &str| match t.get(key) {
        None => Ok(None),
        Some(Value::Integer(n)) if *n >= 0 => Ok(Some(*n as u64)),
        Some(v) => Err(format!("`{key}` in [calibration] is {v}, not a whole number >= 0")),
    };
    Ok(Calibration {
        file: string(file, "file")?.into(),
        tokens: whole("tokens")?.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        seed: whole("seed")?.unwrap_or(0),
    })
}

fn parse_step(v: &Value) -> Result<Step, String> {
    let Value::Table(t) = v else { return Err("`step` must be an array of tables: `[[step]]`".into()) };
    let method = t.get("method").ok_or("`method` is missing in a [[step]]")?;
    let method = string(method, "method")?;
    let mut params = Vec::new();
    for (k, v) in t.iter().filter(|(k, _)| *k != "method") {
        match v {
            Value::Float(x) => params.push((k.clone(), *x)),
            Value::Integer(x) => params.push((k.clone(), *x as f64)),
            Value::String(text) if k == "pattern" => params.extend(pattern(text)?),
            _ => return Err(format!("parameter `{k}` of step `{method}` is {v}, not a number")),
        }
    }
    Ok(Step { method, params })
}

/// `pattern = "2:4"` is short for the two numbers of a pattern, `keep = 2` and `of = 4`.
pub fn pattern(text: &str) -> Result<[(String, f64); 2], String> {
    let (keep, of) = match Pattern::parse(text)? {
        Pattern::Free => (0, 0),
        Pattern::Runs { keep, of } => (keep, of),
    };
    Ok([("keep".into(), keep as f64), ("of".into(), of as f64)])
}

fn string(v: &Value, key: &str) -> Result<String, String> {
    v.as_str().map(str::to_owned).ok_or_else(|| format!("`{key}` is {v}, not a string"))
}

fn known_keys(t: &Table, known: &[&str], place: &str) -> Result<(), String> {
    match t.keys().find(|k| !known.contains(&k.as_str())) {
        None => Ok(()),
        Some(k) => {
            Err(format!("unknown key `{k}` in {place}{} (known: {})", hint(k, known.iter().copied()), known.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        version = 1
        base = "some/model"
        [calibration]
        file = "text.txt"
        tokens = 20000
        [[step]]
        method = "relu"
        [[step]]
        method = "teal"
        sparsity = 0.5
    "#;

    #[test]
    fn reads_a_recipe_in_order() {
        let r = Recipe::parse(GOOD, "r.toml").unwrap();
        assert_eq!(r.calibration.unwrap(), Calibration { file: "text.txt".into(), tokens: Some(20000), seed: 0 });
        assert_eq!(r.steps[0], Step { method: "relu".into(), params: vec![] });
        assert_eq!(r.steps[1], Step { method: "teal".into(), params: vec![("sparsity".into(), 0.5)] });
        let r = Recipe::parse(&GOOD.replace("sparsity = 0.5", "pattern = \"2:4\""), "r.toml").unwrap();
        assert_eq!(r.steps[1].params, [("keep".into(), 2.0), ("of".into(), 4.0)]);
    }

    #[test]
    fn slips_are_named_with_the_nearest_key() {
        let error = |t: &str| Recipe::parse(t, "r.toml").unwrap_err().to_string();
        assert!(error(&GOOD.replace("tokens", "token")).contains("did you mean `tokens`"));
        assert!(error(&GOOD.replace("version = 1", "version = 2")).contains("version is 2"));
        assert!(error(&GOOD.replace("0.5", "\"half\"")).contains("not a number"));
        assert!(error(&GOOD.replace("[[step]]", "[[stp]]")).contains("`stp`"));
        assert!(error(&GOOD.replace("sparsity = 0.5", "pattern = \"2-4\"")).contains("such as 2:4"));
        assert!(error(&GOOD.replace("base =", "ratio =")).contains("did you mean `ratios`"));
        assert!(error("version = 1").contains("nothing to do"));
        assert!(error("version = ").contains("line 1") || error("version = ").contains("TOML"));
        assert!(error(&" ".repeat(RECIPE_MAX_BYTES + 1)).contains("longer than"));
    }

    #[test]
    fn short_form() {
        let steps = parse_short("relu, teal=0.4").unwrap();
        assert_eq!(steps[1], Step { method: "teal".into(), params: vec![(String::new(), 0.4)] });
        let named = parse_short("teal=0.4:prior=1").unwrap();
        assert_eq!(named[0].params, [(String::new(), 0.4), ("prior".into(), 1.0)]);
        assert!(parse_short("teal=0.4:prior").is_err() && parse_short("teal:prior=x").is_err());
        assert!(parse_short("teal=x").is_err() && parse_short("").is_err() && parse_short("relu,").is_err());
    }
}
