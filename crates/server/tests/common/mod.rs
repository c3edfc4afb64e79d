//! A server in this process with the embedded model.
#![allow(dead_code, unused_imports, reason = "each test file uses a part of it")]

pub mod client;

pub use client::{Answer, Client, greedy, text};

use lacuna::{
    embedded,
    engine::{CompiledPlan, Engine, InputRule, LayerPlan, NeuronRule, Options as EngineOptions, transpose},
    model::{Checkpoint, LoadOptions, Model, weights::Mlp},
    tokenizer::Tokenizer,
};
use lacuna_core::{plan::Selector, site::Proj};
use lacuna_server::{
    api::{Config, Lacuna},
    http::{self, Shutdown},
    schedule::{Options, Probe},
};
use std::{
    net::TcpListener,
    ops::Deref,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A server that runs until it is dropped.
pub struct Server {
    pub client: Client,
    pub app: Arc<Lacuna>,
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

/// What a test changes of the usual server.
#[derive(Clone)]
pub struct Setup {
    pub parallel: usize,
    pub queue: usize,
    pub context: usize,
    pub prefixes: usize,
    pub chunk: usize,
    pub threads: usize,
    pub probe: Option<Probe>,
    /// Changes the model.
    pub change: Option<fn(&mut Model)>,
    pub http: http::Options,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            parallel: 8,
            queue: 256,
            context: 512,
            prefixes: 64 << 20,
            chunk: 512,
            threads: 1,
            probe: None,
            change: None,
            http: http::Options::default(),
        }
    }
}

pub fn tokenizer() -> Tokenizer {
    embedded::tokenizer().expect("the embedded model")
}

pub fn engine(setup: &Setup) -> Engine {
    let mut model =
        Checkpoint::embedded(&LoadOptions::default()).and_then(Checkpoint::bind).expect("the embedded model");
    setup.change.iter().for_each(|change| change(&mut model));
    let options = EngineOptions { threads: setup.threads, prefill_chunk: setup.chunk, ..EngineOptions::default() };
    Engine::new(Arc::new(model), options).expect("valid options")
}

/// Neurons that are not zero, and inputs of q above a threshold: lossy, so that it answers differently.
pub fn plan(model: &Model) -> CompiledPlan {
    let layers = model.blocks.iter().map(|block| {
        let mut layer = LayerPlan::default();
        if let Some(linear) = block.linear(Proj::Q) {
            layer.inputs[Proj::Q as usize] =
                Some(InputRule::new(Selector::above(0.5), transpose::by_channels(&linear.weight)));
        }
        if let Mlp::Gated(g) = &block.mlp {
            layer.neurons = Some(NeuronRule::new(Selector::non_zero(), transpose::by_channels(&g.down.weight)));
        }
        layer
    });
    CompiledPlan { layers: layers.collect(), masked: false }
}

impl Server {
    pub fn new(setup: &Setup) -> Self {
        let engine = engine(setup);
        let plan = engine.with_plan(Some(Arc::new(plan(engine.model())))).expect("a fitting plan");
        let Setup { parallel, queue, context, prefixes, probe, http, .. } = setup.clone();
        let options = Options { parallel, queue, context, prefixes, probe };
        let config = Config {
            name: "tiny".into(),
            engine,
            plans: vec![("lossy".into(), plan)],
            tokenizer: tokenizer(),
            options,
            vllm_metrics: true,
            templates: None,
        };
        let app = Arc::new(Lacuna::new(config).expect("a thread"));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let at = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("a socket");
        let (shutdown, served) = (Shutdown::default(), app.clone());
        let end = shutdown.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("it does not block");
                http::serve(listener, served, http, end).await.expect("serves");
            });
        });
        Self { client: Client { at }, app, shutdown, thread: Some(thread) }
    }

    pub fn usual() -> Self {
        Self::new(&Setup::default())
    }

    /// Waits until no blocks of keys and values are in use beyond `left`.
    pub fn wait_until_free(&self, left: usize) {
        let start = Instant::now();
        while self.app.blocks_in_use() > left {
            assert!(start.elapsed() < Duration::from_secs(10), "{} blocks are still in use", self.app.blocks_in_use());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Deref for Server {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.begin();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
