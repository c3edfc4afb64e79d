//! From what a user calls a model to an engine that is ready to run.

use crate::{
    args::{Kv, LoadArgs, LoadMode},
    sparse, text,
};
use anyhow::{Context, Result, anyhow, bail};
use lacuna::{
    embedded,
    engine::{Engine, KvType, Options, Session},
    hub,
    model::{Checkpoint, LoadOptions, MemoryEstimate},
    tokenizer::Tokenizer,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
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
    /// The same model without a plan; shares all weights that need no other orientation.
    pub dense: Engine,
    /// The plan's name; `None` if everything is computed.
    pub plan: Option<String>,
    tokenizer: Result<Tokenizer>,
    context: usize,
}

impl Ready {
    /// The plan's name, `dense` without one.
    pub fn label(&self) -> &str {
        self.plan.as_deref().unwrap_or("dense")
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// None in the files, or one that cannot be used or belongs to another model.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|e| anyhow!("{e:#}"))
    }

    /// A conversation with the context that was asked for.
    ///
    /// # Errors
    /// As the engine's.
    pub fn session(&self) -> Result<Session> {
        Ok(self.engine.session(self.context)?)
    }
}

/// Loads the model `name` for a context of `ctx` tokens.
///
/// # Errors
/// Everything between the name and the engine; a memory limit refuses before the weights are touched.
pub fn ready(name: Option<&str>, ctx: Option<usize>, args: &LoadArgs) -> Result<Ready> {
    let place = Place::find(name)?;
    let checkpoint = place.open(&load_options(args, ctx))?;
    let context = context(ctx, checkpoint.spec.context);
    if let Some(limit) = args.memory {
        refuse(&checkpoint.memory(context, kv_type(args.kv()?).bytes()), limit)?;
    }
    let tokenizer = tokenizer(&place, &checkpoint);
    let dense = Engine::new(Arc::new(checkpoint.bind()?), options(args)?)?;
    let named = LoadArgs { model_name: name.map(str::to_owned), ..args.clone() };
    let (engine, plan) = match sparse::apply(&named, &place, &dense)? {
        Some(sparse) => (sparse.engine, Some(sparse.label)),
        None => (dense.clone(), None),
    };
    Ok(Ready { engine, dense, plan, tokenizer, context })
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
pub fn context(asked: Option<usize>, own: usize) -> usize {
    match asked {
        None => own.min(DEFAULT_CONTEXT),
        Some(0) => own,
        Some(n) if n > own => {
            tracing::warn!("-c {n} is more than the {own} positions this model was made for; {own} are used");
            own
        }
        Some(n) => n,
    }
}

/// Refuses an estimate above the limit, in units that people read.
///
/// # Errors
/// The parts of the estimate, the limit, and what to do.
pub fn refuse(estimate: &MemoryEstimate, limit: u64) -> Result<()> {
    let parts = format!(
        "weights {}, keys and values {}, work space {}",
        text::bytes(estimate.weights),
        text::bytes(estimate.kv),
        text::bytes(estimate.scratch)
    );
    let (need, most) = (text::bytes(estimate.total()), text::bytes(limit));
    estimate.within(limit).with_context(|| format!("--memory: needs {need} ({parts}), allowed are {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts() {
        assert_eq!(context(None, 512), 512);
        assert_eq!(context(None, 131_072), 4096);
        assert_eq!(context(Some(0), 131_072), 131_072);
        assert_eq!(context(Some(9999), 512), 512);
        assert_eq!(context(Some(100), 512), 100);
    }
}
