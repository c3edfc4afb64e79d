//! From what a user calls a model to an engine that is ready to run.

use crate::{
    args::{Kv, LoadArgs, LoadMode},
    sparse, text,
    verbs::doctor,
};
use anyhow::{Context, Result, anyhow, bail};
use lacuna::{
    cache, embedded,
    engine::{Engine, KvType, Options, Session},
    hub,
    model::{Checkpoint, Demand, LoadOptions, MemoryEstimate, spec::Spec},
    tokenizer::Tokenizer,
};
use lacuna_core::plan::Decoding;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

/// Longest context that is taken without being asked for; `-c 0` takes the model's own.
const DEFAULT_CONTEXT: usize = 4096;

/// Where a model lies.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// In the program.
    Embedded,
    /// A Hugging Face directory or a GGUF file.
    Path(PathBuf),
}

impl Place {
    /// What `name` means; nothing is the embedded model.
    ///
    /// # Errors
    /// Not a model, and where was looked.
    pub fn find(name: Option<&str>) -> Result<Self> {
        match name {
            None if embedded::exists() => Ok(Self::Embedded),
            None => bail!("this build has no embedded model; name one: a directory, a GGUF file or org/name"),
            Some(name) => Ok(Self::Path(hub::locate(name)?)),
        }
    }

    /// The path, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Embedded => None,
            Self::Path(path) => Some(path),
        }
    }

    /// Opens the files: everything is parsed, nothing is computed.
    ///
    /// # Errors
    /// What is damaged, unknown or impossible, by file and tensor.
    pub fn open(&self, options: &LoadOptions) -> Result<Checkpoint> {
        Ok(match self {
            Self::Embedded => Checkpoint::embedded(options)?,
            Self::Path(path) => Checkpoint::open(path, options)?,
        })
    }

    /// What people call it: the last component of its path.
    pub fn label(&self) -> String {
        match self {
            Self::Embedded => embedded::NAME.to_owned(),
            Self::Path(path) => path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        }
    }
}

/// An engine with everything around it.
pub struct Ready {
    /// The engine, with its plan.
    pub engine: Engine,
    /// The same model without a plan; shares all weights that need no other orientation. (The engine itself where there
    /// is no plan, or only the plan's engine is run.)
    pub dense: Engine,
    /// The plan's name; `None` if everything is computed.
    pub plan: Option<String>,
    /// What people read of how it runs: the plan's name or `dense`, and whether there are bitmaps.
    label: String,
    /// How the plan guesses and checks tokens, if it does.
    pub decoding: Option<Decoding>,
    tokenizer: Result<Tokenizer>,
    context: usize,
    need: MemoryEstimate,
}

impl Ready {
    /// The plan's name, `dense` without one; with `+bitmaps` behind where zeros are left out.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Tells the log the largest resident size so far beside the estimate.
    pub fn log_memory(&self) {
        let status = std::fs::read_to_string("/proc/self/status").ok();
        if let Some(peak) = status.and_then(|s| doctor::memory_field(&s, "VmHWM")) {
            let MemoryEstimate { weights, kv, scratch, program } = self.need;
            tracing::info!(peak, estimate = self.need.total(), weights, kv, scratch, program, "memory");
        }
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// None in the files, or one that cannot be used or belongs to another model.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|e| anyhow!("{e:#}"))
    }

    /// The tokenizer alone, for what outlives this.
    ///
    /// # Errors
    /// As [`Ready::tokenizer`].
    pub fn into_tokenizer(self) -> Result<Tokenizer> {
        self.tokenizer
    }

    /// The estimate for one conversation.
    pub fn need(&self) -> MemoryEstimate {
        self.need
    }

    /// A conversation with the context that was asked for.
    ///
    /// # Errors
    /// As the engine's.
    pub fn session(&self) -> Result<Session> {
        Ok(self.engine.session(self.context)?)
    }
}

/// Whether the dense engine stays beside one with a plan. Its weights that the plan has other copies of then stay too:
/// resident in read mode, untouched in map mode.
#[derive(Clone, Copy, PartialEq)]
enum Base {
    Kept,
    Dropped,
}

/// Loads the model `name` for a context of `ctx` tokens.
///
/// # Errors
/// Everything between the name and the engine; a memory limit refuses before the weights are touched.
pub fn ready(name: Option<&str>, ctx: Option<usize>, args: &LoadArgs) -> Result<Ready> {
    load(name, ctx, args, Base::Kept)
}

/// As [`ready`] for those who run nothing but the plan's engine: originals of converted weights are not kept.
///
/// # Errors
/// As there.
pub fn ready_alone(name: Option<&str>, ctx: Option<usize>, args: &LoadArgs) -> Result<Ready> {
    load(name, ctx, args, Base::Dropped)
}

fn load(name: Option<&str>, ctx: Option<usize>, args: &LoadArgs, base: Base) -> Result<Ready> {
    let start = Instant::now();
    let place = Place::find(name)?;
    let checkpoint = place.open(&load_options(args, ctx))?;
    let context = context(ctx, &checkpoint.spec)?;
    let mut need = checkpoint.memory(&demand(args, context)?);
    within(&need, args.memory)?;
    let named = LoadArgs { model_name: name.map(str::to_owned), ..args.clone() };
    let tokenizer = tokenizer(&place, &checkpoint);
    let model = Arc::new(checkpoint.bind()?);
    let plan = sparse::plan(&named, &place, &model)?;
    if let Some(plan) = &plan {
        // Originals that were read stay until all copies are made, and those in the program stay; the pages of a map
        // are given back.
        let read = args.load_mode == LoadMode::Read && (base == Base::Kept || cache::root().is_none());
        let stay = read || place == Place::Embedded;
        let replaced = if stay { need.replaced(&model, plan) } else { 0 };
        need = need.with_plan(&model, plan);
        need.weights += replaced;
        within(&need, args.memory)?;
    }
    let decoding = plan.as_ref().and_then(|p| p.decoding);
    let dense = Engine::new(model, options(args)?)?;
    let (dense, packed) = sparse::with_bitmaps(args, dense)?;
    if let Some(packed) = &packed {
        // As with the copies of plans.
        let stays = args.load_mode == LoadMode::Read || place == Place::Embedded;
        need.weights += packed.bytes;
        need.weights -= if stays { 0 } else { packed.dense_bytes.min(need.weights) };
        within(&need, args.memory)?;
    }
    // Nobody will ask for what was read and is kept in another form now.
    let unread = base == Base::Dropped && plan.is_none() && args.load_mode == LoadMode::Read;
    let dense = if unread { dense.without_originals() } else { dense };
    let (engine, dense, plan, label) = match plan {
        Some(plan) => {
            let sparse = sparse::with_plan(&plan, &dense)?;
            let dense = if base == Base::Kept { dense } else { sparse.engine.clone() };
            (sparse.engine, dense, Some(plan.method), sparse.label)
        }
        None => {
            let label = packed.as_ref().map_or("dense".to_owned(), |p| format!("dense {}", p.label()));
            (dense.clone(), dense, None, label)
        }
    };
    tracing::info!("ready in {:.3} s", start.elapsed().as_secs_f64());
    Ok(Ready { engine, dense, plan, label, decoding, tokenizer, context, need })
}

fn within(need: &MemoryEstimate, limit: Option<u64>) -> Result<()> {
    limit.map_or(Ok(()), |limit| refuse(need, limit))
}

/// What the flags will make of a model with a context of `context` tokens.
///
/// # Errors
/// Flags that contradict each other.
pub fn demand(args: &LoadArgs, context: usize) -> Result<Demand> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = args.threads.filter(|t| *t > 0).unwrap_or_else(cores);
    Ok(Demand { context, kv: kv_type(args.kv()?), batch: args.batch, threads })
}

/// The tokenizer that belongs to a checkpoint, checked against its vocabulary.
///
/// # Errors
/// As [`Ready::tokenizer`].
pub fn tokenizer(place: &Place, checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let tokenizer = match place {
        Place::Embedded => embedded::tokenizer()?,
        Place::Path(path) => Tokenizer::open(path)?,
    };
    tokenizer.check_vocab(checkpoint.spec.vocab)?;
    Ok(tokenizer)
}

/// The engine's form of the flags, without a plan.
///
/// # Errors
/// Numbers out of their range.
pub fn options(args: &LoadArgs) -> Result<Options> {
    if args.threads == Some(0) {
        bail!("`-t 0`: at least one thread is needed; without -t there is one per core");
    }
    Ok(Options { threads: args.threads.unwrap_or(0), kv: kv_type(args.kv()?), prefill_chunk: args.batch, plan: None })
}

/// The loader's form of the flags.
pub fn load_options(args: &LoadArgs, context: Option<usize>) -> LoadOptions {
    let mode = match args.load_mode {
        LoadMode::Map => lacuna_core::map::LoadMode::Map,
        LoadMode::Read => lacuna_core::map::LoadMode::Read,
    };
    LoadOptions { mode, check_tensors: args.check_tensors, context: context.filter(|c| *c > 0) }
}

/// The engine's form of a cache type.
pub fn kv_type(kv: Kv) -> KvType {
    match kv {
        Kv::F32 => KvType::F32,
        Kv::F16 => KvType::F16,
        Kv::Bf16 => KvType::Bf16,
    }
}

/// The context to use, given what was asked for and what the model was made for.
///
/// # Errors
/// More than the model has positions for, where these are learned. Rotary positions go on behind what the model was
/// trained with: that is a warning.
pub fn context(asked: Option<usize>, spec: &Spec) -> Result<usize> {
    let own = spec.context;
    match asked {
        None => Ok(own.min(DEFAULT_CONTEXT)),
        Some(0) => Ok(own),
        Some(n) if n > spec.most_positions() => {
            bail!("-c {n}: this model has learned positions, and has them for {own} tokens; use at most -c {own}")
        }
        Some(n) => {
            if n > own {
                tracing::warn!(
                    "-c {n} is more than the {own} positions this model was trained with: expect worse text behind them"
                );
            }
            Ok(n)
        }
    }
}

/// Refuses an estimate above the limit, in units that people read.
///
/// # Errors
/// The parts of the estimate, the limit, and what to do.
pub fn refuse(estimate: &MemoryEstimate, limit: u64) -> Result<()> {
    let parts = format!(
        "weights {}, keys and values {}, work space {}, program and tokenizer {}",
        text::bytes(estimate.weights),
        text::bytes(estimate.kv),
        text::bytes(estimate.scratch),
        text::bytes(estimate.program)
    );
    let (need, most) = (text::bytes(estimate.total()), text::bytes(limit));
    estimate.within(limit).with_context(|| format!("--memory: needs {need} ({parts}), allowed are {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna::model::spec::Position;

    #[test]
    fn contexts() {
        let spec = |context, position| {
            let embedded = Checkpoint::embedded(&LoadOptions::default()).expect("the embedded model");
            Spec { context, position, ..embedded.spec }
        };
        let rotary = |asked, own| context(asked, &spec(own, Position::Rotary)).expect("rotary positions go on");
        assert_eq!(rotary(None, 512), 512);
        assert_eq!(rotary(None, 131_072), 4096);
        assert_eq!(rotary(Some(0), 131_072), 131_072);
        assert_eq!(rotary(Some(9999), 512), 9999);
        assert_eq!(rotary(Some(100), 512), 100);
        let learned = spec(512, Position::Learned { offset: 2 });
        assert_eq!(context(Some(512), &learned).expect("all of its positions"), 512);
        assert!(context(Some(513), &learned).expect_err("one too many").to_string().contains("at most -c 512"));
    }
}
