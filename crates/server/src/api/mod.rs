//! The endpoints: requests become jobs for the [`crate::schedule`], and what comes back becomes answers.

mod answer;
mod chat;
mod completions;
mod embeddings;
mod info;
mod logprobs;
mod prepare;
mod stream;
mod text;

use crate::{
    constraint::Grammars,
    error::{Error, Result},
    fields::{Bounds, Endpoint, Values, read},
    http::{App, BoxFuture, Method, Reply, Request, Route},
    metrics::Metrics,
    page,
    schedule::{Event, Full, Job, Options, Scheduler},
};
use lacuna::{
    chat::{ChatTemplate, Worker},
    engine::Engine,
    tokenizer::Tokenizer,
};
use std::{
    collections::HashSet,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Names of unknown fields that are remembered, so that each is warned of once.
const WARNED: usize = 256;

/// What a server serves.
pub struct Config {
    /// The model's name; a plan's is `NAME:plan`.
    pub name: String,
    /// The engine, and its plans by name. The first has no plan, unless there is only one.
    pub engine: Engine,
    /// Further plans on the same model.
    pub plans: Vec<(String, Engine)>,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// Limits of the scheduler.
    pub options: Options,
    /// Whether the metrics also come under vLLM's names.
    pub vllm_metrics: bool,
    /// Where chat templates are rendered: in this process if there is none, which is for models that are trusted.
    pub templates: Option<Arc<Worker>>,
}

/// The application behind the routes.
pub struct Lacuna {
    state: Arc<State>,
    routes: Vec<Route>,
}

/// What all requests share.
struct State {
    /// Names of the plans, the dense one first.
    names: Vec<String>,
    engine: Engine,
    scheduler: Scheduler,
    tokenizer: Arc<Tokenizer>,
    template: std::result::Result<ChatTemplate, String>,
    grammars: std::result::Result<Grammars, String>,
    metrics: Arc<Metrics>,
    bounds: Bounds,
    options: Options,
    /// Bytes of the longest token.
    longest: usize,
    created: u64,
    ids: AtomicU64,
    closed: AtomicBool,
    warned: Mutex<HashSet<String>>,
    vllm_metrics: bool,
}

/// What a route does.
const HANDLERS: &[(Method, &str, bool, Handler, &str)] = &[
    (Method::GET, "/health", true, Handler::Health, "200 when ready, 503 when about to end"),
    (Method::GET, "/v1/models", false, Handler::Models, "the model and its plans"),
    (Method::GET, "/v1/models/*", false, Handler::Model, "one of them"),
    (Method::POST, "/v1/completions", false, Handler::Body(Endpoint::Completions), "continue prompts, or score them"),
    (Method::POST, "/v1/chat/completions", false, Handler::Body(Endpoint::Chat), "answer a conversation"),
    (Method::POST, "/v1/embeddings", false, Handler::Body(Endpoint::Embeddings), "texts as vectors"),
    (Method::POST, "/tokenize", false, Handler::Body(Endpoint::Tokenize), "a text as token ids"),
    (Method::POST, "/detokenize", false, Handler::Body(Endpoint::Detokenize), "token ids as a text"),
    (
        Method::POST,
        "/apply-template",
        false,
        Handler::Body(Endpoint::Template),
        "a conversation as the prompt it becomes",
    ),
    (Method::GET, "/tokenizer_info", false, Handler::Tokenizer, "special tokens and chat template"),
    (Method::GET, "/props", false, Handler::Props, "limits, plans, defaults"),
    (Method::GET, "/metrics", false, Handler::Metrics, "counters for Prometheus"),
];

#[derive(Clone, Copy)]
enum Handler {
    Health,
    Models,
    Model,
    Tokenizer,
    Props,
    Metrics,
    Body(Endpoint),
}

/// The routes of the API, without those of the page.
pub fn routes() -> Vec<Route> {
    let route = |(method, path, public, _, about): &(Method, &'static str, bool, Handler, &'static str)| Route {
        method: method.clone(),
        path,
        public: *public,
        about,
    };
    HANDLERS.iter().map(route).collect()
}

impl Lacuna {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(config: Config) -> std::io::Result<Self> {
        let Config { name, engine, plans, tokenizer, options, vllm_metrics, templates } = config;
        let names = std::iter::once(name.clone()).chain(plans.iter().map(|(plan, _)| format!("{name}:{plan}")));
        let names = names.collect();
        let engines = std::iter::once(engine.clone()).chain(plans.into_iter().map(|(_, e)| e)).collect();
        let (tokenizer, metrics) = (Arc::new(tokenizer), Arc::new(Metrics::default()));
        let spec = &engine.model().spec;
        let bounds = Bounds { context: options.context, layers: spec.blocks.len(), vocab: spec.vocab };
        let longest =
            (0..tokenizer.len() as u32).map(|id| tokenizer.pieces().bytes(id).len()).max().unwrap_or(1).max(1);
        let scheduler = Scheduler::new(engines, tokenizer.clone(), options.clone(), metrics.clone())?;
        let state = State {
            names,
            scheduler,
            template: ChatTemplate::of(&tokenizer, templates).map_err(|e| e.to_string()),
            grammars: Grammars::new(&tokenizer).map_err(|e| e.to_string()),
            tokenizer,
            metrics,
            bounds,
            options,
            longest,
            created: now(),
            ids: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            warned: Mutex::default(),
            vllm_metrics,
            engine,
        };
        let routes = routes().into_iter().chain(page::routes()).collect();
        Ok(Self { state: Arc::new(state), routes })
    }

    /// Names of the models.
    pub fn names(&self) -> &[String] {
        &self.state.names
    }

    /// The counters.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.state.metrics
    }

    /// Blocks of keys and values in use.
    pub fn blocks_in_use(&self) -> usize {
        self.state.scheduler.blocks_in_use()
    }

    /// Takes no more work: health says 503, and so do requests.
    pub fn close(&self) {
        self.state.closed.store(true, Ordering::Relaxed);
        self.state.scheduler.close();
    }
}

impl App for Lacuna {
    fn routes(&self) -> &[Route] {
        &self.routes
    }

    fn call(&self, route: usize, request: Request) -> BoxFuture<'static, Reply> {
        let state = self.state.clone();
        let handler = HANDLERS.get(route).map(|h| h.3);
        Box::pin(async move {
            let metrics = state.metrics.clone();
            let answer = Caught(Box::pin(async move {
                match handler {
                    Some(handler) => handle(state, handler, request).await,
                    None => page::reply(&request.path).ok_or_else(|| Error::internal("a route without a page")),
                }
            }));
            match answer.await {
                Ok(Ok(reply)) => reply,
                Ok(Err(e)) => {
                    if e.status.is_client_error() {
                        metrics.refused.add(1);
                        tracing::info!(status = e.status.as_u16(), code = e.code, param = e.param, "refused");
                    }
                    e.into()
                }
                Err(()) => {
                    metrics.panics.add(1);
                    Error::internal("the request failed by a fault of the server; others are not affected").into()
                }
            }
        })
    }
}

async fn handle(state: Arc<State>, handler: Handler, request: Request) -> Result<Reply> {
    match handler {
        Handler::Health => info::health(&state),
        Handler::Models => Ok(info::models(&state)),
        Handler::Model => info::model(&state, request.path.trim_start_matches("/v1/models/")),
        Handler::Tokenizer => Ok(info::tokenizer(&state)),
        Handler::Props => Ok(info::props(&state)),
        Handler::Metrics => Ok(info::metrics(&state)),
        Handler::Body(Endpoint::Completions) => completions::answer(state, request).await,
        Handler::Body(Endpoint::Chat) => chat::answer(state, request).await,
        Handler::Body(Endpoint::Embeddings) => embeddings::answer(state, request).await,
        Handler::Body(Endpoint::Tokenize) => aside(move || text::tokenize(&state, &request.body)).await,
        Handler::Body(Endpoint::Detokenize) => aside(move || text::detokenize(&state, &request.body)).await,
        Handler::Body(Endpoint::Template) => aside(move || text::template(&state, &request.body)).await,
    }
}

/// Runs what takes long beside the threads that serve sockets.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Error::busy("the server is about to end")),
    }
}

/// A future whose panics are caught.
struct Caught<T>(BoxFuture<'static, T>);

impl<T> Future for Caught<T> {
    type Output = std::result::Result<T, ()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let inner = &mut self.0;
        match std::panic::catch_unwind(AssertUnwindSafe(|| inner.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => Poll::Ready(Err(())),
        }
    }
}

impl State {
    /// Reads a body by the table; unknown fields are warned of once each.
    fn read(&self, endpoint: Endpoint, body: &[u8]) -> Result<Values> {
        let (values, unknown) = read(endpoint, body, &self.bounds)?;
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for name in unknown {
            if warned.len() < WARNED && warned.insert(name.clone()) {
                tracing::warn!(path = endpoint.path(), field = name, "unknown field, ignored (said once)");
            }
        }
        Ok(values)
    }

    /// The index of the plan that the field `model` names.
    fn plan(&self, values: &Values) -> Result<usize> {
        match values.text("model") {
            None => Ok(0),
            Some(name) => self.names.iter().position(|n| n == name).ok_or_else(|| Error::no_model(name, &self.names)),
        }
    }

    /// Refuses a request before any work where its jobs would be refused behind it.
    fn has_room(&self) -> Result<()> {
        self.scheduler.has_room().map_err(|full| self.full(full))
    }

    /// Queues the jobs of a request.
    fn submit(&self, make: impl FnOnce(crate::schedule::Events) -> Vec<Job>) -> Result<Running> {
        let (send, receive) = unbounded_channel();
        let jobs = make(send);
        let count = jobs.len();
        self.scheduler.submit(jobs).map_err(|full| self.full(full))?;
        Ok(Running { events: receive, open: count })
    }

    /// Counts a request that found no room.
    fn full(&self, full: Full) -> Error {
        self.metrics.busy.add(1);
        Error::busy(if full.closed { "the server is about to end" } else { "the queue is full; try again" })
    }

    /// An id for an answer.
    fn id(&self, prefix: &str) -> String {
        format!("{prefix}-{:x}-{}", self.created, self.ids.fetch_add(1, Ordering::Relaxed))
    }
}

/// Answers on their way; dropping it ends their work.
struct Running {
    events: UnboundedReceiver<(usize, Event)>,
    /// Answers that have not ended.
    open: usize,
}

impl Running {
    /// The next news; `None` when all have ended.
    async fn next(&mut self) -> Option<(usize, Event)> {
        if self.open == 0 {
            return None;
        }
        let news = self.events.recv().await;
        self.noted(&news);
        news
    }

    /// News that are there already.
    fn ready(&mut self) -> Option<(usize, Event)> {
        let news = if self.open == 0 { None } else { self.events.try_recv().ok() };
        self.noted(&news);
        news
    }

    /// Whether all answers have ended, which they do unless the scheduler fails.
    fn check(&self) -> Result<()> {
        if self.open == 0 { Ok(()) } else { Err(Error::internal("the answer was lost by a fault of the server")) }
    }

    fn noted(&mut self, news: &Option<(usize, Event)>) {
        if let Some((_, Event::Done(_) | Event::Failed(_))) = news {
            self.open -= 1;
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// When a request came, and the number that it is logged under.
#[derive(Clone, Copy)]
struct Arrival {
    at: Instant,
    seconds: u64,
}

impl Arrival {
    fn new() -> Self {
        Self { at: Instant::now(), seconds: now() }
    }
}
