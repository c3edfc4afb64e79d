//! What the endpoints answer, against the library used directly.

mod common;

use common::{Server, Setup, engine, greedy, text, tokenizer};
use lacuna::{
    engine::{
        generate::{Flow, Limits, generate},
        sampler::{Sampler, SamplerOptions},
    },
    eval::LogSoftmax,
};
use serde_json::{Value, json};

/// What the library makes of a prompt.
fn alone(prompt: &str, options: SamplerOptions, limits: &Limits) -> String {
    let (engine, tokenizer) = (engine(&Setup::default()), tokenizer());
    let mut session = engine.session(512).expect("a session");
    let ids = tokenizer.encode(prompt, true).expect("tokens");
    let mut sampler = Sampler::new(options).expect("valid");
    generate(&mut session, &tokenizer, &ids, &mut sampler, limits, &mut |_| Flow::Continue).expect("generates").text
}

#[test]
fn completions_are_those_of_the_library() {
    let server = Server::usual();
    let prompt = "Once upon a time there was a";
    let limits = Limits { max_tokens: 40, ..Limits::default() };
    let want = alone(prompt, SamplerOptions::greedy(), &limits);
    let answer = server.ok("/v1/completions", &greedy(prompt, 40));
    assert_eq!(text(&answer), want);
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let streamed = server.stream("/v1/completions", &json!({
        "prompt": prompt, "max_tokens": 40, "temperature": 0, "stream": true, "stream_options": { "include_usage": true }
    }));
    let pieces: String = streamed.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(pieces, want);
    assert_eq!(streamed.last().expect("events")["usage"], answer["usage"]);
    // A seed draws as the library does; answers of one request draw with the seeds behind it.
    let warm = |seed| SamplerOptions { seed, temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerOptions::default() };
    let body = json!({ "prompt": prompt, "max_tokens": 40, "seed": 7, "n": 3 });
    let drawn = server.ok("/v1/completions", &body);
    for i in 0..3 {
        assert_eq!(drawn["choices"][i as usize]["text"], alone(prompt, warm(7 + i), &limits), "{i}");
    }
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let server = Server::usual();
    let whole = alone("Once upon a time", SamplerOptions::greedy(), &Limits { max_tokens: 60, ..Limits::default() });
    let stop = &whole[whole.char_indices().nth(40).expect("long enough").0..][..6];
    for stream in [false, true] {
        let body =
            json!({ "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "stop": stop, "stream": stream });
        let (got, finish) = if stream {
            let events = server.stream("/v1/completions", &body);
            let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
            (text, events.last().expect("events")["choices"][0]["finish_reason"].clone())
        } else {
            let answer = server.ok("/v1/completions", &body);
            (text(&answer).to_owned(), answer["choices"][0]["finish_reason"].clone())
        };
        assert_eq!(
            (got.as_str(), finish),
            (whole.split(stop).next().expect("a part"), json!("stop")),
            "stream: {stream}"
        );
    }
}

#[test]
fn prompts_are_scored_as_in_process() {
    let server = Server::usual();
    let (engine, tokenizer) = (engine(&Setup::default()), tokenizer());
    let texts = ["The little dog ran to the", "She was very happy because the sun"];
    let lists: Vec<Vec<u32>> = texts.iter().map(|t| tokenizer.encode(t, false).expect("tokens")).collect();
    let body = json!({
        "model": "tiny", "prompt": lists, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true
    });
    let answer = server.ok("/v1/completions", &body);
    for (i, ids) in lists.iter().enumerate() {
        let choice = &answer["choices"][i];
        assert_eq!(choice["index"], i);
        let scores = choice["logprobs"]["token_logprobs"].as_array().expect("scores");
        let top = choice["logprobs"]["top_logprobs"].as_array().expect("the best");
        assert_eq!(
            (scores.len(), top.len()),
            (ids.len() + 1, ids.len() + 1),
            "every prompt token and the generated one"
        );
        assert!(scores[0].is_null() && top[0].is_null());
        let mut session = engine.session(512).expect("a session");
        session
            .score(ids, &mut |position, logits| {
                let Some(&next) = ids.get(position + 1) else { return };
                let softmax = LogSoftmax::new(logits).expect("finite");
                assert_eq!(scores[position + 1].as_f64(), Some(softmax.of(logits[next as usize])), "{i}, {position}");
                let best = logits.iter().map(|l| softmax.of(*l)).fold(f64::NEG_INFINITY, f64::max);
                let most = top[position + 1]
                    .as_object()
                    .expect("a map")
                    .values()
                    .filter_map(Value::as_f64)
                    .fold(f64::NEG_INFINITY, f64::max);
                assert_eq!(most, best, "the maximum is the best token's, to the bit");
            })
            .expect("fits");
        let shown = choice["text"].as_str().expect("a text");
        let offset = choice["logprobs"]["text_offset"].as_array().expect("offsets");
        assert_eq!(offset.len(), ids.len() + 1);
        assert!(shown.trim_start().starts_with(texts[i]), "{shown}");
    }
    // The same through events, and without a generated token.
    let mut body = body;
    body["stream"] = json!(true);
    let mut streamed = vec![Vec::new(); 2];
    for event in server.stream("/v1/completions", &body) {
        let choice = &event["choices"][0];
        let i = choice["index"].as_u64().expect("a number") as usize;
        streamed[i].extend(choice["logprobs"]["token_logprobs"].as_array().expect("scores").clone());
    }
    for (i, scores) in streamed.iter().enumerate() {
        assert_eq!(Some(scores), answer["choices"][i]["logprobs"]["token_logprobs"].as_array());
    }
    body["max_tokens"] = json!(0);
    body["stream"] = json!(false);
    let scored = server.ok("/v1/completions", &body);
    assert_eq!(scored["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(lists[0].len()));
}

#[test]
fn chats_stream_what_they_answer_and_score_it() {
    let server = Server::usual();
    let messages = json!([{ "role": "user", "content": "Tell me about a dog" }]);
    let body = json!({ "messages": messages, "max_tokens": 20, "temperature": 0, "logprobs": true, "top_logprobs": 3 });
    let whole = server.ok("/v1/chat/completions", &body);
    assert_eq!(whole["object"], "chat.completion");
    let scores = whole["choices"][0]["logprobs"]["content"].as_array().expect("scores");
    assert_eq!(scores.len() as u64, whole["usage"]["completion_tokens"].as_u64().expect("a count"));
    assert!(
        scores
            .iter()
            .all(|s| s["top_logprobs"].as_array().is_some_and(|t| t.len() == 3 && t[0]["logprob"] == s["logprob"]))
    );
    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    streaming["stream_options"] = json!({ "include_usage": true });
    let events = server.stream("/v1/chat/completions", &streaming);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    let streamed: Vec<_> =
        events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten().cloned().collect();
    assert_eq!(&streamed, scores);
    let last = events.last().expect("events");
    assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &whole["usage"]["total_tokens"]));
    let prompt = server.ok("/apply-template", &json!({ "messages": messages }));
    assert!(prompt["prompt"].as_str().is_some_and(|p| p.contains("Tell me about a dog")), "{prompt}");
}

#[test]
fn plans_are_models_and_show_what_they_skip() {
    let server = Server::usual();
    let names: Vec<Value> =
        server.get("/v1/models").json()["data"].as_array().expect("a list").iter().map(|m| m["id"].clone()).collect();
    assert_eq!(names, ["tiny", "tiny:lossy"]);
    assert_eq!(server.get("/v1/models/tiny:lossy").json()["meta"]["plan"], "lossy");
    let prompt = "Once upon a time there was a";
    let run = |model: &str| {
        server.stream(
            "/v1/completions",
            &json!({
                "model": model, "prompt": prompt, "max_tokens": 30, "temperature": 0, "stream": true,
                "return_activity": true, "activity_layer": 2
            }),
        )
    };
    let (dense, lossy) = (run("tiny"), run("tiny:lossy"));
    let seen = |events: &[Value]| {
        events.iter().filter(|e| e["lacuna"].is_object()).map(|e| e["lacuna"].clone()).collect::<Vec<_>>()
    };
    let (a, b) = (seen(&dense), seen(&lossy));
    assert_eq!((a.len(), b.len()), (29, 29), "every token but the first, which the prompt gives");
    assert_eq!(a[0]["sites"], json!([]));
    assert_eq!(b[0]["sites"], json!(["attn.q", "mlp.neurons"]));
    assert!(b.iter().all(|l| l["bytes"].as_u64() < a[0]["bytes"].as_u64()));
    for one in &b {
        let kept = one["kept"].as_array().expect("layers");
        assert!(kept.len() == 6 && kept.iter().all(|l| l[1].as_f64().is_some_and(|s| s < 0.5)), "{one}");
        let cells = one["strip"]["cells"].as_array().expect("cells");
        assert!(
            one["strip"]["layer"] == 2
                && cells.len() <= 256
                && cells.iter().all(|c| c.as_u64().is_some_and(|c| c < 256))
        );
    }
    let open = |l: &Value| l["strip"]["cells"].as_array().is_some_and(|cells| cells.iter().any(|c| c == 255));
    assert!(
        b.iter().filter(|l| open(l)).count() > 20,
        "mostly some neuron of the layer is open, and the strongest is 255"
    );
    // Watching changes no text.
    let plain = server
        .ok("/v1/completions", &json!({ "model": "tiny:lossy", "prompt": prompt, "max_tokens": 30, "temperature": 0 }));
    let watched: String = lossy.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text(&plain), watched);
}

#[test]
fn texts_and_tokens_go_both_ways() {
    let server = Server::usual();
    let ids = server.ok("/tokenize", &json!({ "prompt": "The dog ran.", "add_special_tokens": false }));
    assert_eq!(ids["tokens"], json!(tokenizer().encode("The dog ran.", false).expect("tokens")));
    let back = server.ok("/detokenize", &json!({ "tokens": ids["tokens"] }));
    assert_eq!(back["prompt"].as_str().map(str::trim), Some("The dog ran."));
    let info = server.get("/tokenizer_info").json();
    assert!(info["eos_token"].is_string(), "{info}");
    let props = server.get("/props").json();
    assert_eq!((&props["n_ctx"], &props["total_slots"]), (&json!(512), &json!(8)));
}

#[test]
fn embeddings_have_length_one_and_two_poolings() {
    let server = Server::usual();
    let vector = |v: &Value| -> Vec<f64> {
        v["embedding"].as_array().expect("numbers").iter().filter_map(Value::as_f64).collect()
    };
    let of = |pooling: &str| {
        let answer = server.ok("/v1/embeddings", &json!({ "input": ["a dog", "the red ball"], "pooling": pooling }));
        answer["data"].as_array().expect("two").iter().map(vector).collect::<Vec<_>>()
    };
    let (mean, last) = (of("mean"), of("last"));
    for v in mean.iter().chain(&last) {
        assert_eq!(v.len(), 256);
        assert!((v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    }
    assert_ne!(mean, last);
    let one = server.ok("/v1/embeddings", &json!({ "input": "a dog", "encoding_format": "base64" }));
    assert_eq!(one["data"][0]["embedding"].as_str().map(str::len), Some((256 * 4usize).div_ceil(3) * 4));
}

#[test]
fn grammars_hold_whatever_the_model_wants() {
    let server = Server::usual();
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" }, "ok": { "type": "boolean" } }, "required": ["n", "ok"], "additionalProperties": false });
    let body = json!({
        "messages": [{ "role": "user", "content": "a number" }], "max_tokens": 200, "seed": 3,
        "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } }
    });
    let answer = server.ok("/v1/chat/completions", &body);
    let content = answer["choices"][0]["message"]["content"].as_str().expect("a text");
    if answer["choices"][0]["finish_reason"] == "stop" {
        let value: Value = serde_json::from_str(content).unwrap_or_else(|e| panic!("{e}: {content}"));
        assert!(value["n"].is_i64() && value["ok"].is_boolean(), "{content}");
    }
    let choice = server
        .ok("/v1/completions", &json!({ "prompt": "The", "grammar": "root ::= \"yes\" | \"no\"", "max_tokens": 10 }));
    assert!(["yes", "no"].contains(&text(&choice)), "{choice}");
    let bad = server.post("/v1/completions", &json!({ "prompt": "The", "grammar": "root ::= (" }));
    assert_eq!(bad.status, 400, "{}", bad.text());
}
