//! `lacuna serve`: an OpenAI-compatible server for one model and its plans.

use crate::{
    Outcome,
    args::{Kv, LoadArgs, LoadMode},
    open::{self, Place},
    sparse,
    text::{self, parse_bytes},
};
use anyhow::{Context, Result, bail};
use lacuna::{
    engine::{Engine, kv_bytes},
    model::memory::MemoryEstimate,
};
use lacuna_core::plan::Plan;
use lacuna_server::{
    api::{Config, Lacuna},
    fields, http,
    schedule::Options,
};
use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

/// Arguments of `lacuna serve`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory, a GGUF file, or a name in the local hub cache; default: the embedded model.
    #[arg(value_name = "MODEL", env = "LACUNA_MODEL")]
    model: Option<String>,
    /// A plan that is served as MODEL:NAME beside the dense model: `NAME=FILE`, a FILE, or methods as `run` takes them
    /// (`teal=0.5`). May be given several times.
    #[arg(long = "plan", value_name = "PLAN", env = "LACUNA_PLANS", value_delimiter = ';')]
    plans: Vec<String>,
    /// What clients call the model; default: the name of its file or directory.
    #[arg(short, long, env = "LACUNA_ALIAS")]
    alias: Option<String>,
    /// Address to listen at. Anything but a loopback address lets other machines in.
    #[arg(long, default_value = "127.0.0.1", env = "LACUNA_HOST")]
    host: String,
    /// Port; 0 takes any that is free.
    #[arg(long, default_value_t = 8080, env = "LACUNA_PORT")]
    port: u16,
    /// A file of API keys, one per line: every route but /health wants one.
    #[arg(long, value_name = "FILE", env = "LACUNA_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Names besides localhost under which clients may call the server (the header Host).
    #[arg(long, value_name = "NAME", env = "LACUNA_ALLOWED_HOSTS", value_delimiter = ',')]
    allowed_hosts: Vec<String>,
    /// Answers that are computed side by side.
    #[arg(long, default_value_t = 8, env = "LACUNA_PARALLEL", value_parser = clap::value_parser!(u16).range(1..=1024))]
    parallel: u16,
    /// Answers that wait; further requests are refused with 503.
    #[arg(long, default_value_t = 256, env = "LACUNA_QUEUE", value_parser = clap::value_parser!(u32).range(1..=65536))]
    queue: u32,
    /// Context of each answer in tokens; 0: the model's own. Default: the model's own, at most 4096.
    #[arg(short, long, env = "LACUNA_CTX_SIZE")]
    ctx_size: Option<usize>,
    /// Memory for keys and values of earlier prompts; 0 keeps none.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "256M", env = "LACUNA_PREFIX_CACHE")]
    prefix_cache: u64,
    /// Seconds that answers under way have when the server is told to end; then they are cut.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "30", env = "LACUNA_DRAIN")]
    drain: Duration,
    /// Metrics also under the names of vLLM.
    #[arg(long, env = "LACUNA_VLLM_METRICS")]
    vllm_metrics: bool,
    /// Threads; default: all cores.
    #[arg(short, long, env = "LACUNA_THREADS")]
    threads: Option<usize>,
    /// Type of the KV cache, keys and values.
    #[arg(long, value_enum, default_value = "f16", env = "LACUNA_KV")]
    kv: Kv,
    /// Refuse to load what needs more memory than this (such as 6G).
    #[arg(long, value_name = "LIMIT", value_parser = parse_bytes, env = "LACUNA_MEMORY")]
    memory: Option<u64>,
    /// Map the file, or read it into memory (safe against files that change underneath).
    #[arg(long, value_enum, default_value = "map", env = "LACUNA_LOAD_MODE")]
    load_mode: LoadMode,
    /// Look for NaN and infinities in all weights first.
    #[arg(long, env = "LACUNA_CHECK_TENSORS")]
    check_tensors: bool,
    /// Read all matrices as they are: none as bitmaps (done where many zeros make that faster), none from `model.lacuna`.
    #[arg(long, env = "LACUNA_NO_BITMAPS")]
    no_bitmaps: bool,
    /// Most prompt tokens processed together.
    #[arg(short, long, default_value_t = 512, env = "LACUNA_BATCH")]
    batch: usize,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let keys = keys(args.api_key_file.as_deref())?;
    let load = load(&args);
    let place = Place::find(args.model.as_deref())?;
    let ready = open::ready(args.model.as_deref(), args.ctx_size, &load)?;
    let context = ready.session()?.context();
    let prefixes = usize::try_from(args.prefix_cache).context("--prefix-cache")?;
    let dense = ready.dense.clone();
    let plans = args.plans.iter().map(|p| plan(p, &load, &place, &dense)).collect::<Result<Vec<_>>>()?;
    memory(&args, &ready, context, &plans)?;
    if let Some((twice, _)) =
        plans.iter().enumerate().find(|(i, (n, _))| plans[..*i].iter().any(|(m, _)| m == n)).map(|p| p.1)
    {
        bail!("--plan: two plans are called `{twice}`");
    }
    let made = |(name, plan): (String, Plan)| Ok((name, sparse::with_plan(&plan, &dense)?.engine));
    let plans = plans.into_iter().map(made).collect::<Result<Vec<_>>>()?;
    let name = args.alias.clone().unwrap_or_else(|| clean(&place.label()));
    let parallel = usize::from(args.parallel);
    let options = Options { parallel, queue: args.queue as usize, context, prefixes, probe: None };
    let config = Config {
        name,
        engine: dense,
        plans,
        tokenizer: ready.into_tokenizer()?,
        options: options.clone(),
        vllm_metrics: args.vllm_metrics,
        templates: Some(crate::template_worker()?),
    };
    let app = Arc::new(Lacuna::new(config).context("starting the engine")?);
    let (hosts, drain_time) = (args.allowed_hosts.clone(), args.drain);
    let listen = http::Options { keys, hosts, drain_time, ..http::Options::default() };
    let announced = (app.clone(), listen.clone());
    let host =
        if args.host.contains(':') { format!("[{}]", args.host.trim_matches(['[', ']'])) } else { args.host.clone() };
    let address = format!("{host}:{}", args.port);
    lacuna_server::run(app, &address, listen, |at| announce(at, &announced.0, &options, &announced.1))
        .with_context(|| format!("listening at {address}"))?;
    eprintln!("ended");
    Ok(Outcome::Good)
}

fn load(args: &Args) -> LoadArgs {
    LoadArgs {
        threads: args.threads,
        kv: args.kv,
        cache_type_k: None,
        cache_type_v: None,
        sparse: None,
        plan: None,
        memory: args.memory,
        load_mode: args.load_mode,
        check_tensors: args.check_tensors,
        no_bitmaps: args.no_bitmaps,
        batch: args.batch,
        model_name: args.model.clone(),
    }
}

fn keys(file: Option<&std::path::Path>) -> Result<http::Keys> {
    let Some(path) = file else { return Ok(http::Keys::default()) };
    let keys = http::Keys::parse(&fs::read_to_string(path).with_context(|| format!("{}", path.display()))?);
    if keys.is_empty() {
        bail!("{}: no key in it; one per line", path.display());
    }
    Ok(keys)
}

/// Refuses more answers, prefixes and copies of weights for the plans than the memory holds.
fn memory(args: &Args, ready: &open::Ready, context: usize, plans: &[(String, Plan)]) -> Result<()> {
    let Some(limit) = args.memory else { return Ok(()) };
    let model = ready.dense.model();
    let each = kv_bytes(&model.spec, ready.dense.kv(), context).unwrap_or(usize::MAX) as u64;
    let mut need = ready.need();
    need.kv = each.saturating_mul(u64::from(args.parallel)).saturating_add(args.prefix_cache);
    let copies = plans.iter().map(|(_, plan)| MemoryEstimate::copies(model, plan));
    need.weights = copies.fold(need.weights, u64::saturating_add);
    open::refuse(&need, limit)
}

/// A plan and its name.
fn plan(given: &str, load: &LoadArgs, place: &Place, dense: &Engine) -> Result<(String, Plan)> {
    let stem = |path: &PathBuf| path.file_stem().map(|s| clean(&s.to_string_lossy())).unwrap_or_default();
    let file = PathBuf::from(given);
    let (name, args) = match given.split_once('=') {
        Some((name, path)) if PathBuf::from(path).is_file() || path.ends_with(".json") => {
            (name.to_owned(), LoadArgs { plan: Some(path.into()), ..load.clone() })
        }
        _ if file.is_file() || given.ends_with(".json") => (stem(&file), LoadArgs { plan: Some(file), ..load.clone() }),
        _ => (given.to_owned(), LoadArgs { sparse: Some(given.to_owned()), ..load.clone() }),
    };
    if name.is_empty() || name.len() > 96 || !name.chars().all(|c| c.is_ascii_alphanumeric() || "._-=,+".contains(c)) {
        bail!("--plan {given}: `{name}` is no name for a plan; letters, digits and ._-=,+ are");
    }
    let plan = sparse::plan(&args, place, dense.model()).with_context(|| format!("--plan {given}"))?;
    let Some(plan) = plan else { bail!("--plan {given}: no plan") };
    if plan.decoding.is_some() {
        tracing::warn!("--plan {given}: it guesses tokens, which the server does not do; its rules apply");
    }
    Ok((name, plan))
}

/// A time of at most a day.
fn seconds(text: &str) -> Result<Duration, String> {
    let value = text.parse().ok().filter(|s| (0.0..=86_400.0).contains(s));
    value.map(Duration::from_secs_f64).ok_or_else(|| "a number of seconds from 0 to 86400 is wanted".into())
}

/// A name for clients: letters, digits and `._-`.
fn clean(label: &str) -> String {
    label.chars().take(96).map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect()
}

/// What the server is, on stderr.
fn announce(at: SocketAddr, app: &Lacuna, options: &Options, listen: &http::Options) {
    let routes = http::App::routes(app);
    let public: Vec<_> = routes.iter().filter(|r| r.public).map(|r| r.path).collect();
    let keys = match listen.keys.len() {
        0 => "none: everybody who reaches the address may ask".to_owned(),
        n => format!("{n}, wanted everywhere but at the public routes"),
    };
    eprintln!("listening at http://{at}/ (the page; the API below http://{at}/v1)");
    eprintln!("models        {}", app.names().join(", "));
    eprintln!(
        "context       {} tokens, {} answers at once, {} waiting",
        options.context, options.parallel, options.queue
    );
    eprintln!("prefix cache  {}", text::bytes(options.prefixes as u64));
    eprintln!("API keys      {keys}");
    eprintln!("public        {}", public.join(" "));
    eprintln!(
        "limits        body {}, head {} s, body {} s, idle {} s, write stall {} s, {} connections, drain {} s",
        text::bytes(listen.body_bytes as u64),
        listen.head_time.as_secs(),
        listen.body_time.as_secs(),
        listen.idle_time.as_secs(),
        listen.write_time.as_secs(),
        listen.connections,
        listen.drain_time.as_secs_f64(),
    );
    eprintln!("fields        {} in all, see docs/server-api.md", fields::FIELDS.len());
    if !at.ip().is_loopback() && listen.keys.is_empty() {
        tracing::warn!("{at} is reachable from other machines, and no API key is wanted (--api-key-file)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_clean() {
        assert_eq!(clean("My Model (2).gguf"), "My-Model--2-.gguf");
        assert_eq!(clean(&"x".repeat(200)).len(), 96);
    }
}
