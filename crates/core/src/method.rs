//! What a method is to the rest of the house: a name, parameters with ranges, what it must see, and the plan entries
//! it asks for. Methods themselves live in `lacuna-methods`, one file each.

use crate::{
    compress::Compressor,
    plan::{Decoding, Entry, Predictor},
    site::{Point, Proj, Site},
    statistics::{Observation, Statistics},
    suggest::hint,
    tensor::Tensor,
    weight::Orientation,
};
use std::{collections::BTreeMap, fmt, ops::Bound, path::PathBuf};

/// What can go wrong between a recipe and a plan. Messages name the place and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message of each variant says what its fields are")]
pub enum MethodError {
    #[error("unknown method `{name}`{hint} (known: {known})")]
    UnknownMethod { name: String, hint: String, known: String },
    #[error("method `{method}` has no parameter `{name}`{hint} (it takes: {known})")]
    UnknownParam { method: String, name: String, hint: String, known: String },
    #[error("parameter `{param}` of method `{method}` is {value}, outside its range {range}")]
    OutOfRange { method: String, param: String, value: String, range: String },
    #[error("method `{method}` takes no value (`{spec}`): write `{method}` alone")]
    NoValue { method: String, spec: String },
    #[error("method `{method}` cannot be used on this model: {reason}")]
    NotApplicable { method: String, reason: String },
    #[error(
        "method `{method}` needs statistics of `{point}` that no calibration pass has read: give a calibration text"
    )]
    NoStatistics { method: String, point: Point },
    #[error(
        "`{point}` holds {value} at token {token} of the calibration text: the model's weights or the text break the forward pass there"
    )]
    NonFinite { point: Point, value: f32, token: u64 },
    #[error("{place}: {reason}")]
    Layer { place: String, reason: String },
    #[error("recipe {path}: {reason}")]
    Recipe { path: String, reason: String },
    #[error("plan {}: {reason}", path.display())]
    Plan { path: PathBuf, reason: String },
    #[error(
        "plan {} was made for another model: it names model hash {plan}, these weights have {model}; calibrate again for this model",
        path.display()
    )]
    OtherModel { path: PathBuf, plan: String, model: String },
    #[error(transparent)]
    File(#[from] crate::Error),
}

/// Where a method was published.
#[derive(Clone, Copy, Debug)]
pub struct Citation {
    /// Title, year.
    pub paper: &'static str,
    /// arXiv number, if any.
    pub arxiv: Option<&'static str>,
}

/// One numeric parameter of a method.
#[derive(Clone, Copy, Debug)]
pub struct ParamSpec {
    /// Name in recipes.
    pub name: &'static str,
    /// What it means, one line.
    pub doc: &'static str,
    /// Value where the recipe gives none.
    pub default: f64,
    /// Valid values.
    pub range: (Bound<f64>, Bound<f64>),
}

impl ParamSpec {
    /// `[0, 1)` and the like.
    pub fn range_text(&self) -> String {
        let low = match self.range.0 {
            Bound::Included(x) => format!("[{x}"),
            Bound::Excluded(x) => format!("({x}"),
            Bound::Unbounded => "(-inf".into(),
        };
        let high = match self.range.1 {
            Bound::Included(x) => format!("{x}]"),
            Bound::Excluded(x) => format!("{x})"),
            Bound::Unbounded => "inf)".into(),
        };
        format!("{low}, {high}")
    }

    fn allows(&self, x: f64) -> bool {
        use std::ops::RangeBounds;
        x.is_finite() && self.range.contains(&x)
    }
}

/// Checked values for all parameters of one method.
#[derive(Clone, Debug, PartialEq)]
pub struct Params(Vec<(&'static str, f64)>);

impl Params {
    /// Defaults, overridden by `given`; unknown names and values out of range are errors.
    pub fn new<'a>(method: &dyn Method, given: impl IntoIterator<Item = (&'a str, f64)>) -> Result<Self, MethodError> {
        let specs = method.params();
        let mut values: Vec<_> = specs.iter().map(|s| (s.name, s.default)).collect();
        for (name, value) in given {
            let Some(i) = specs.iter().position(|s| s.name == name) else {
                let names = || specs.iter().map(|s| s.name);
                return Err(MethodError::UnknownParam {
                    method: method.name().into(),
                    name: name.into(),
                    hint: hint(name, names()),
                    known: if specs.is_empty() { "none".into() } else { names().collect::<Vec<_>>().join(", ") },
                });
            };
            if !specs[i].allows(value) {
                return Err(MethodError::OutOfRange {
                    method: method.name().into(),
                    param: name.into(),
                    value: value.to_string(),
                    range: specs[i].range_text(),
                });
            }
            values[i].1 = value;
        }
        Ok(Self(values))
    }

    /// The value of a parameter of the method these were made for.
    ///
    /// # Panics
    /// If the method has no parameter of that name: a slip in the method's own file.
    pub fn get(&self, name: &str) -> f64 {
        self.0.iter().find(|(n, _)| *n == name).map(|p| p.1).expect("a method asks for its own parameters only")
    }

    /// Names and values, in the order of [`Method::params`].
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        self.0.iter().copied()
    }
}

/// The MLP of one layer, as methods see it.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpShape {
    /// Neurons.
    pub inner: usize,
    /// Whether it has a gate projection.
    pub gated: bool,
    /// Name of the activation, for messages.
    pub activation: String,
    /// Whether the activation returns exact zeros (relu, relu2).
    pub exact_zeros: bool,
}

/// One layer, as methods see it; no architecture is named.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    /// Width of the residual stream.
    pub width: usize,
    /// Inputs of the output projection, and outputs of the query projection where there is one.
    pub query: usize,
    /// Outputs of the key and of the value projection; 0 where queries, keys and values come from latents, so that none of the
    /// three is a projection of the residual stream.
    pub kv: usize,
    /// The MLP; `None` for experts.
    pub mlp: Option<MlpShape>,
    /// The gated MLP that every expert of a mixture is. A rule on neurons holds for each of them; no other rule reaches them,
    /// and their statistics are those of all tokens that any of them served.
    pub experts: Option<MlpShape>,
}

impl LayerShape {
    /// `(outputs, inputs)` of a projection; `None` where the layer has no such projection.
    pub fn projection(&self, proj: Proj) -> Option<(usize, usize)> {
        let mlp = self.mlp.as_ref();
        match proj {
            Proj::Q | Proj::K | Proj::V if self.kv == 0 => None,
            Proj::Q => Some((self.query, self.width)),
            Proj::K | Proj::V => Some((self.kv, self.width)),
            Proj::O => Some((self.width, self.query)),
            Proj::Gate => mlp.filter(|m| m.gated).map(|m| (m.inner, self.width)),
            Proj::Up => mlp.map(|m| (m.inner, self.width)),
            Proj::Down => mlp.map(|m| (self.width, m.inner)),
        }
    }

    /// The projection under whose name an observer sees the vector that enters `proj`.
    pub fn observed_as(&self, proj: Proj) -> Proj {
        match proj {
            Proj::Q | Proj::K | Proj::V => Proj::Q,
            Proj::Up if self.mlp.as_ref().is_some_and(|m| m.gated) => Proj::Gate,
            other => other,
        }
    }
}

/// What a method must see before it can plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    /// What is gathered at which points. A method whose scales come from statistics asks for those first, and for more
    /// when it is asked again with them.
    pub observations: Vec<Observation>,
    /// Tokens of calibration text it works well from; 0: it plans without, and uses statistics only to report.
    pub tokens: usize,
}

/// The weights of a model, as methods see them.
pub trait Weights {
    /// `W` of a projection, dequantised, `[outputs, inputs]`; `None` where the layer has no such projection.
    fn matrix(&self, layer: usize, proj: Proj) -> Option<Vec<f32>>;

    /// The predictor of active neurons that the model's file brings for a layer, for the normalised input of the MLP, and
    /// the score from which it calls a neuron active; by default there is none.
    fn predictor(&self, layer: usize) -> Option<(Predictor, f32)> {
        let _ = layer;
        None
    }

    /// `sqrt(sum over projs of ||W[:, j]||^2)` for every input channel `j` of projections that read the same vector:
    /// the norm of everything that a channel is multiplied with. `None` where the layer has none of them.
    fn column_norms(&self, layer: usize, projs: &[Proj]) -> Option<Tensor>;
}

/// The norms of [`Weights::column_norms`], from matrices of `inputs` columns.
pub fn column_norms<'a>(matrices: impl IntoIterator<Item = &'a [f32]>, inputs: usize) -> Vec<f32> {
    let mut squares = vec![0.0_f64; inputs];
    for row in matrices.into_iter().flat_map(|m| m.chunks_exact(inputs)) {
        squares.iter_mut().zip(row).for_each(|(s, w)| *s += f64::from(*w) * f64::from(*w));
    }
    squares.into_iter().map(|s| s.sqrt() as f32).collect()
}

/// Shares to drop per layer and place, where a search or a prior decided them; others take the method's own parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Budgets {
    /// By layer and projection (`mlp.up` stands for neurons).
    pub dropped: BTreeMap<(usize, Proj), f64>,
}

/// What a method plans from.
#[derive(Clone, Copy)]
pub struct PlanContext<'a> {
    /// The layers of the model.
    pub layers: &'a [LayerShape],
    /// What the calibration passes saw so far.
    pub statistics: &'a Statistics,
    /// The weights.
    pub weights: &'a dyn Weights,
    /// Shares that were decided outside the method.
    pub budgets: &'a Budgets,
}

impl PlanContext<'_> {
    /// The share to drop at a place: what was decided for it, or `uniform`.
    pub fn dropped(&self, layer: usize, proj: Proj, uniform: f64) -> f64 {
        self.budgets.dropped.get(&(layer, proj)).copied().unwrap_or(uniform)
    }
}

/// One published technique. Everything users see of it (listing, recipe keys, errors, contract tests) comes from here.
pub trait Method: Sync {
    /// Slug: file name, recipe name, command-line name.
    fn name(&self) -> &'static str;
    /// Name for people.
    fn title(&self) -> &'static str;
    /// Where it skips.
    fn site(&self) -> Site;
    /// Where it was published.
    fn citation(&self) -> Citation;
    /// What it does, one or two sentences.
    fn summary(&self) -> &'static str;
    /// Its parameters; the first is the one that `--sparse name=value` sets.
    fn params(&self) -> &'static [ParamSpec];
    /// Weight orientations its plan can be computed on; by default either. `InputMajor` stands for all that are read by
    /// channels.
    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::OutputMajor, Orientation::InputMajor]
    }

    /// What to observe, and tokens of calibration; by default nothing. Asked again after each pass until nothing new is
    /// wanted.
    fn needs(&self, params: &Params, ctx: PlanContext<'_>) -> Needs {
        let _ = (params, ctx);
        Needs::default()
    }

    /// The entries of the plan; by default none, as for methods of [`Site::Decoding`]. Methods of [`Site::Weights`] refuse.
    ///
    /// # Errors
    /// If the model has nothing this method can skip, or statistics are missing or not finite.
    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        let _ = (params, ctx);
        if self.compressor().is_some() {
            let reason = format!("it changes stored weights; use `lacuna compress --method {}`", self.name());
            return Err(MethodError::NotApplicable { method: self.name().into(), reason });
        }
        Ok(Vec::new())
    }

    /// What a user should know of the entries it planned, such as how well something trained; by default nothing.
    fn report(&self, _: &Params, _: PlanContext<'_>, _: &[Entry]) -> Vec<String> {
        Vec::new()
    }

    /// How tokens are guessed and checked: for methods of [`Site::Decoding`], which plan no entries.
    fn decoding(&self, params: &Params) -> Option<Decoding> {
        let _ = params;
        None
    }

    /// How weights are changed: for methods of [`Site::Weights`].
    fn compressor(&self) -> Option<&dyn Compressor> {
        None
    }
}

impl fmt::Debug for dyn Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Method({})", self.name())
    }
}
