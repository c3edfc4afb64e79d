//! What skipping costs and saves on one model: perplexity, bits per byte, divergence from dense, kept share and bytes.
//!
//! `cargo run --release -p lacuna --example sparse_quality -- MODEL_DIR STORIES.txt TEST_STORIES SPEC...` where the
//! first `TEST_STORIES` of the last 300 documents (between `<|endoftext|>` lines) are scored, the first 40 documents calibrate,
//! and each SPEC is a short form (`relu`, `teal=0.5`, `relu,teal=0.4`); `dense` alone scores all in chunks. Plans are
//! followed everywhere (no dense fall-back), in masked passes.

use lacuna::{
    calibrate,
    engine::{
        Engine, Options,
        break_even::BreakEven,
        compile::{CompileOptions, compile},
        layouts::LayoutCache,
    },
    eval::{EngineSource, Scoring, divergence, perplexity, windows},
    model::{LoadOptions, Model, load},
    tokenizer::Tokenizer,
};
use lacuna_core::observer::Observer;
use lacuna_methods::registry;
use std::{error::Error, path::Path, sync::Arc};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, text, count, specs @ ..] = &args[..] else {
        return Err("usage: sparse_quality MODEL_DIR STORIES.txt TEST_STORIES SPEC...".into());
    };
    let (dir, count) = (Path::new(dir), count.parse::<usize>()?.min(300));
    let tokenizer = Tokenizer::from_dir(dir)?;
    let text = std::fs::read_to_string(text)?;
    let documents = windows::split_documents(&text, "<|endoftext|>");
    let encode = |d: &[&str]| d.iter().map(|d| tokenizer.encode(d, true)).collect::<Result<Vec<_>, _>>();
    let first_test = documents.len().saturating_sub(300);
    let test = windows::documents(encode(&documents[first_test..first_test + count])?, 512);
    let training = encode(&documents[..40])?;
    let model = Arc::new(load(dir, &LoadOptions::default())?);
    let dense = Engine::new(model.clone(), Options::default())?;
    println!("| plan | perplexity | bits/byte | mean KLD | p99 KLD | same top | kept | bytes/token |");
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    for spec in specs {
        if spec == "dense" {
            let mut source = EngineSource::new(&dense, 0, Scoring::Dense)?;
            let p = perplexity(&mut source, &test, Some(tokenizer.pieces()), |_| {})?;
            let bits = p.bits_per_byte().unwrap_or(f64::NAN);
            let bytes = dense.bytes_per_token(200);
            println!("| dense | {:.3} ± {:.3} | {bits:.4} | 0 | 0 | 1 | 1 | {bytes} |", p.ppl().0, p.ppl().1);
            println!("({} predictions, {} bytes)", p.count, p.bytes);
        } else {
            sparse(spec, &model, &dense, &training, &test, &tokenizer)?;
        }
    }
    Ok(())
}

fn sparse(
    spec: &str,
    model: &Arc<Model>,
    dense: &Engine,
    training: &[Vec<u32>],
    test: &[windows::Window],
    tokenizer: &Tokenizer,
) -> Outcome<()> {
    let steps = registry::parse(spec)?;
    let mut session = dense.session(0)?;
    let mut forward = |tokens: &[u32], observer: &mut dyn Observer| {
        session.truncate(0);
        session.observe(tokens, observer)
    };
    let subject = calibrate::Subject::new(model);
    let (plan, _) = calibrate::calibrate(&steps, &subject, &mut forward, training, |_, _, _| {})?;
    let options =
        CompileOptions { cache: LayoutCache::new(None, ""), break_even: BreakEven::never_dense(), masked: true };
    let compiled = compile(&plan, model, &options, dense.pool(), &|_, _| {})?;
    let engine = Engine::new(compiled.model, Options { plan: Some(compiled.plan), ..Options::default() })?;
    let mut base = EngineSource::new(dense, 0, Scoring::Dense)?;
    let mut source = EngineSource::new(&engine, 0, Scoring::Masked)?;
    let d = divergence(&mut base, &mut source, test, Some(tokenizer.pieces()), |_| {})?;
    let counters = source.session().counters();
    let sites = counters.layers.iter().flat_map(|l| l.inputs.iter().chain([&l.neurons]));
    let (kept, total) = sites.fold((0, 0), |(k, t), s| (k + s.kept, t + s.total));
    println!(
        "| {spec} | {:.3} | {:.4} | {:.4} ± {:.4} | {:.3} | {:.3} | {:.3} | {:.0} |",
        d.test.ppl().0,
        d.test.bits_per_byte().unwrap_or(f64::NAN),
        d.kld().value,
        d.kld().error,
        d.kld_quantile(0.99),
        d.same_top().value,
        kept as f64 / total as f64,
        counters.bytes_per_token()
    );
    for note in compiled.notes {
        println!("({note})");
    }
    Ok(())
}
