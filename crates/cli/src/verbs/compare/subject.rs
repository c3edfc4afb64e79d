//! The model and the texts of a comparison.

use super::Args;
use crate::{
    args::{LoadArgs, LoadMode},
    open::{self, Place, Ready},
    text,
    verbs::eval::read_text,
};
use anyhow::Result;
use lacuna::{
    compare::{items::Maker, report::ModelFacts, speed::Race, task::Task, texts},
    eval::Window,
};
use lacuna_core::hash::sha256;
use std::path::{Path, PathBuf};

/// The task that is made from the text, and bytes of it that a question takes.
const ENDINGS: &str = "endings";
const PASSAGE: usize = 1200;

/// The model and its facts.
pub(super) struct Subject {
    pub(super) ready: Ready,
    pub(super) facts: ModelFacts,
    /// ` -m MODEL`, or nothing for the embedded one.
    pub(super) flag: String,
}

impl Subject {
    pub(super) fn open(name: Option<&str>, args: &Args) -> Result<Self> {
        let load = LoadArgs {
            threads: args.threads,
            kv: args.kv,
            cache_type_k: None,
            cache_type_v: None,
            sparse: None,
            plan: None,
            memory: None,
            load_mode: LoadMode::Map,
            check_tensors: false,
            // Plans are compared with what they are made from.
            no_bitmaps: true,
            batch: 512,
            model_name: None,
        };
        let place = Place::find(name)?;
        let checkpoint = place.open(&open::load_options(&load, None))?;
        let tensors = checkpoint.source.tensors.values();
        let bytes = tensors.clone().map(|t| t.bytes.len() as u64).sum();
        let parameters = tensors.map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>()).sum();
        let architecture = checkpoint.spec.arch.clone();
        drop(checkpoint);
        let ready = open::ready(name, Some(0), &load)?;
        let model = ready.dense.model();
        let kv = format!("{:?}", args.kv).to_lowercase();
        let facts = ModelFacts {
            name: place.label(),
            hash: model.hash.clone(),
            architecture,
            parameters,
            bytes,
            layers: model.blocks.len(),
            kv,
        };
        let flag = name.map_or(String::new(), |n| format!(" -m {}", text::shell(n)));
        Ok(Self { ready, facts, flag })
    }

    pub(super) fn context(&self, args: &Args) -> usize {
        args.ctx_size.min(self.ready.dense.model().spec.context)
    }
}

/// The texts, divided and cut.
pub(super) struct Texts {
    test: String,
    mark: Option<String>,
    pub(super) sha256: String,
    /// File, its hash, and the part that calibrates.
    pub(super) calibration: (PathBuf, String, String),
    pub(super) windows: Vec<Window>,
    pub(super) cut: String,
}

impl Texts {
    pub(super) fn read(args: &Args, subject: &Subject) -> Result<Self> {
        let whole = read_text(args.file())?;
        let mark = args.documents.clone().or_else(|| texts::mark(&whole).map(str::to_owned));
        let sha = sha256(whole.as_bytes());
        let (calibration, test) = match &args.calibration {
            Some(path) => {
                let text = read_text(path)?;
                ((path.clone(), sha256(text.as_bytes()), text), whole)
            }
            None => {
                // A token has about four bytes, and chunks score only their second half.
                let scored = args.tokens.saturating_mul(if mark.is_some() { 6 } else { 10 });
                let asked = if args.task == ENDINGS { args.task_items.saturating_mul(PASSAGE) } else { 0 };
                let bytes = scored.max(asked);
                let parts = texts::divide(&whole, mark.as_deref(), bytes);
                ((args.file().to_owned(), sha.clone(), parts.calibration.to_owned()), parts.test.to_owned())
            }
        };
        let tokenizer = subject.ready.tokenizer()?;
        let (windows, cut) = texts::scored(&test, mark.as_deref(), tokenizer, subject.context(args), args.tokens)?;
        Ok(Self { test, mark, sha256: sha, calibration, windows, cut })
    }

    /// The task, or why there is none.
    pub(super) fn task(&self, args: &Args, subject: &Subject) -> Result<Result<Task, String>> {
        let maker = Maker {
            tokenizer: subject.ready.tokenizer()?,
            context: subject.context(args),
            most: args.task_items,
            seed: args.seed,
        };
        Ok(match args.task.as_str() {
            "none" => Err("No task was asked for (--task none).".to_owned()),
            ENDINGS => maker.endings(&texts::passages(&self.test, self.mark.as_deref()))?.ok_or_else(|| {
                "No task: the scored text has too few passages with a last sentence; --task FILE gives one.".to_owned()
            }),
            file => Ok(maker.file(Path::new(file))?),
        })
    }

    /// What is timed: the first window that is long enough, or the longest.
    pub(super) fn race(&self, args: &Args) -> Option<Race<'_>> {
        const PROMPT: usize = 8;
        if args.n_gen == 0 {
            return None;
        }
        let wanted = PROMPT + args.n_gen;
        let enough = self.windows.iter().find(|w| w.tokens.len() >= wanted);
        let window = enough.or_else(|| self.windows.iter().max_by_key(|w| w.tokens.len()))?;
        let (prompt, tokens) = window.tokens.split_at(PROMPT.min(window.tokens.len() / 2));
        Some(Race { prompt, tokens: &tokens[..tokens.len().min(args.n_gen)], rounds: args.repetitions })
    }
}
