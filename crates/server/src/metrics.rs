//! Counters of the server, as Prometheus reads them.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, n: usize) {
        self.0.store(n as u64, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper ends of the buckets in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Times, counted by size.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    /// Counts one.
    pub fn observe(&self, time: Duration) {
        let at = BUCKETS.iter().position(|end| time.as_secs_f64() <= *end).unwrap_or(BUCKETS.len());
        self.buckets[at].fetch_add(1, Relaxed);
        self.micros.fetch_add(time.as_micros() as u64, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, about: &str) {
        let mut sum = 0;
        let mut line = |text: std::fmt::Arguments<'_>| {
            // Writing to a string does not fail.
            let _ = out.write_fmt(text);
        };
        line(format_args!("# HELP {name} {about}\n# TYPE {name} histogram\n"));
        for (end, count) in BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()]).zip(&self.buckets) {
            sum += count.load(Relaxed);
            line(format_args!("{name}_bucket{{le=\"{end}\"}} {sum}\n"));
        }
        line(format_args!("{name}_sum {}\n{name}_count {sum}\n", self.micros.load(Relaxed) as f64 / 1e6));
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Answers being computed.
    pub running: Gauge,
    /// Answers in the queue.
    pub waiting: Gauge,
    /// Blocks of keys and values in use.
    pub blocks: Gauge,
    /// Bytes of keys and values kept of earlier prompts.
    pub prefix_bytes: Gauge,
    /// Prompt tokens computed.
    pub prompt_tokens: Counter,
    /// Tokens generated.
    pub generated_tokens: Counter,
    /// Prompt tokens looked for among kept prefixes.
    pub prefix_queries: Counter,
    /// Prompt tokens found there.
    pub prefix_hits: Counter,
    /// Answers that ended by themselves.
    pub stopped: Counter,
    /// Answers that ended by their length.
    pub length: Counter,
    /// Answers that failed.
    pub failed: Counter,
    /// Answers whose client left.
    pub cancelled: Counter,
    /// Requests refused because the queue was full.
    pub busy: Counter,
    /// Requests refused for what they asked.
    pub refused: Counter,
    /// Panics that were caught.
    pub panics: Counter,
    /// Time in the queue.
    pub queue_seconds: Histogram,
    /// Time to the first token, the queue included.
    pub first_token_seconds: Histogram,
    /// Time of a decode step of all answers.
    pub token_seconds: Histogram,
    /// Time of an answer from queue to end.
    pub answer_seconds: Histogram,
}

impl Metrics {
    /// The text that Prometheus reads; with `vllm` also under the names of vLLM.
    pub fn text(&self, vllm: bool) -> String {
        let mut out = String::new();
        let mut number = |kind: &str, name: &str, about: &str, value: u64| {
            // Writing to a string does not fail.
            let _ = write!(out, "# HELP {name} {about}\n# TYPE {name} {kind}\n{name} {value}\n");
        };
        for (name, about, value) in [
            ("lacuna_requests_running", "Answers being computed.", &self.running),
            ("lacuna_requests_waiting", "Answers in the queue.", &self.waiting),
            ("lacuna_kv_blocks_used", "Blocks of keys and values in use.", &self.blocks),
            ("lacuna_prefix_cache_bytes", "Keys and values kept of earlier prompts.", &self.prefix_bytes),
        ] {
            number("gauge", name, about, value.get());
        }
        for (name, about, value) in [
            ("lacuna_prompt_tokens_total", "Prompt tokens computed.", &self.prompt_tokens),
            ("lacuna_generated_tokens_total", "Tokens generated.", &self.generated_tokens),
            (
                "lacuna_prefix_cache_queries_total",
                "Prompt tokens looked for in the prefix cache.",
                &self.prefix_queries,
            ),
            ("lacuna_prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", &self.prefix_hits),
            ("lacuna_requests_cancelled_total", "Answers whose client left.", &self.cancelled),
            ("lacuna_requests_busy_total", "Requests refused because the queue was full.", &self.busy),
            ("lacuna_requests_refused_total", "Requests refused for what they asked.", &self.refused),
            ("lacuna_panics_total", "Panics that were caught.", &self.panics),
        ] {
            number("counter", name, about, value.get());
        }
        if vllm {
            number("gauge", "vllm:num_requests_running", "Answers being computed.", self.running.get());
            number("gauge", "vllm:num_requests_waiting", "Answers in the queue.", self.waiting.get());
            number("counter", "vllm:prompt_tokens_total", "Prompt tokens computed.", self.prompt_tokens.get());
            number("counter", "vllm:generation_tokens_total", "Tokens generated.", self.generated_tokens.get());
            number("counter", "vllm:prefix_cache_queries", "Tokens looked for.", self.prefix_queries.get());
            number("counter", "vllm:prefix_cache_hits", "Tokens found.", self.prefix_hits.get());
        }
        self.finished(&mut out, "lacuna_requests_finished_total", "reason");
        self.times(&mut out, "lacuna_");
        if vllm {
            self.finished(&mut out, "vllm:request_success_total", "finished_reason");
            self.times(&mut out, "vllm:");
        }
        out
    }

    fn finished(&self, out: &mut String, name: &str, label: &str) {
        out.push_str(&format!("# HELP {name} Answers by how they ended.\n# TYPE {name} counter\n"));
        for (reason, count) in [("stop", &self.stopped), ("length", &self.length), ("error", &self.failed)] {
            out.push_str(&format!("{name}{{{label}=\"{reason}\"}} {}\n", count.get()));
        }
    }

    fn times(&self, out: &mut String, prefix: &str) {
        for (name, about, times) in [
            ("time_to_first_token_seconds", "Time to the first token.", &self.first_token_seconds),
            ("inter_token_latency_seconds", "Time of a decode step.", &self.token_seconds),
            ("request_queue_time_seconds", "Time in the queue.", &self.queue_seconds),
            ("e2e_request_latency_seconds", "Time of an answer.", &self.answer_seconds),
        ] {
            times.write(out, &format!("{prefix}{name}"), about);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_vllm_names_are_a_switch() {
        let metrics = Metrics::default();
        metrics.queue_seconds.observe(Duration::from_millis(3));
        metrics.queue_seconds.observe(Duration::from_secs(99));
        let text = metrics.text(true);
        assert!(text.contains("lacuna_request_queue_time_seconds_bucket{le=\"0.001\"} 0\n"), "{text}");
        assert!(text.contains("lacuna_request_queue_time_seconds_bucket{le=\"60\"} 1\n"), "{text}");
        assert!(text.contains("lacuna_request_queue_time_seconds_bucket{le=\"+Inf\"} 2\n"), "{text}");
        assert!(text.contains("vllm:num_requests_running 0\n") && !metrics.text(false).contains("vllm"));
    }
}
