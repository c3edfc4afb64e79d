//! The table.

use super::{
    Absent::{self, Bool, Float, Int, Nothing, Refused, Word},
    Endpoint::{self, Chat, Completions, Detokenize, Embeddings, Template, Tokenize},
    Field, Kind,
    Most::{Context, Is, Layer},
};

const TEXT: &[Endpoint] = &[Completions, Chat];
const TURNS: &[Endpoint] = &[Chat, Template];

const fn field(
    name: &'static str,
    aliases: &'static [&'static str],
    kind: Kind,
    absent: Absent,
    on: &'static [Endpoint],
    doc: &'static str,
) -> Field {
    Field { name, aliases, kind, absent, on, doc }
}

/// Most prompts of one request.
pub const PROMPTS: usize = 256;
/// Longest schema or grammar in bytes.
const GRAMMAR: usize = 256 << 10;

/// All fields.
#[rustfmt::skip]
pub const FIELDS: &[Field] = &[
    field("model", &[], Kind::Text(256), Nothing("the dense model"), &[Completions, Chat, Embeddings, Tokenize, Detokenize, Template],
        "which model and plan answers: `MODEL` dense, `MODEL:plan`"),
    field("prompt", &[], Kind::Inputs { items: PROMPTS }, Refused, &[Completions],
        "what is continued: a text, several, or their token ids; at most as many tokens as the context holds"),
    field("messages", &[], Kind::Messages { items: 1024 }, Refused, TURNS,
        "the conversation; `content` is a text or a list of parts of type `text`"),
    field("max_tokens", &["max_completion_tokens", "n_predict"], Kind::Int { min: 0, max: Context }, Nothing("completions: 16; chat: as many as fit"), TEXT,
        "most tokens to generate; generation also ends where the context is full. 0 scores the prompt (completions with `echo`)"),
    field("temperature", &[], Kind::Float { min: 0.0, max: 100.0 }, Float(1.0), TEXT,
        "divides the logits; 0 takes the most likely token"),
    field("top_p", &[], Kind::Float { min: 0.0, max: 1.0 }, Float(1.0), TEXT,
        "keeps the most likely tokens until their probabilities sum to this"),
    field("top_k", &[], Kind::Int { min: 0, max: Is(1 << 20) }, Int(0), TEXT,
        "keeps this many most likely tokens; 0 keeps all"),
    field("min_p", &[], Kind::Float { min: 0.0, max: 1.0 }, Float(0.0), TEXT,
        "keeps tokens at least this likely relative to the most likely one"),
    field("seed", &[], Kind::Int { min: i64::MIN, max: Is(i64::MAX) }, Nothing("from the clock"), TEXT,
        "seed of the random stream: the same prompt and seed give the same text, alone or beside others"),
    field("n", &[], Kind::Int { min: 1, max: Is(16) }, Int(1), TEXT,
        "answers per prompt; answer i draws with seed + i"),
    field("stop", &[], Kind::Texts { items: 16, bytes: 256 }, Nothing("none"), TEXT,
        "texts that end the answer and are not part of it"),
    field("ignore_eos", &[], Kind::Bool, Bool(false), TEXT,
        "goes on behind tokens that end a text"),
    field("presence_penalty", &[], Kind::Float { min: -2.0, max: 2.0 }, Float(0.0), TEXT,
        "subtracted once from the logit of each recent token"),
    field("frequency_penalty", &[], Kind::Float { min: -2.0, max: 2.0 }, Float(0.0), TEXT,
        "subtracted for each time a recent token occurred"),
    field("repetition_penalty", &["repeat_penalty"], Kind::Float { min: 0.01, max: 100.0 }, Float(1.0), TEXT,
        "divides positive and multiplies negative logits of recent tokens"),
    field("repeat_last_n", &[], Kind::Int { min: 0, max: Is(1 << 20) }, Int(64), TEXT,
        "tokens that count as recent for the three penalties, those of the prompt included"),
    field("logit_bias", &[], Kind::Bias { items: 1024, most: 100.0 }, Nothing("none"), TEXT,
        "added to the logits of these token ids"),
    field("logprobs", &[], Kind::Int { min: 0, max: Is(20) }, Nothing("none"), &[Completions],
        "log-probabilities of the tokens and of so many most likely ones at their places (before penalties and temperature)"),
    field("logprobs", &[], Kind::Bool, Bool(false), &[Chat],
        "log-probabilities of the answer's tokens"),
    field("top_logprobs", &[], Kind::Int { min: 0, max: Is(20) }, Int(0), &[Chat],
        "so many most likely tokens at each place, with `logprobs`"),
    field("echo", &[], Kind::Bool, Bool(false), &[Completions],
        "the answer begins with the prompt; with `logprobs` also those of the prompt"),
    field("stream", &[], Kind::Bool, Bool(false), TEXT,
        "server-sent events as the text is written, ended by `[DONE]`"),
    field("stream_options", &[], Kind::Object(4096), Nothing("none"), TEXT,
        "`{\"include_usage\": true}`: a last event with the counts"),
    field("tools", &[], Kind::Objects { items: 128, bytes: GRAMMAR }, Nothing("none"), TURNS,
        "functions that the model may call, by the model's template"),
    field("tool_choice", &[], Kind::TextOrObject(4096), Nothing("auto"), TURNS,
        "`none`, `auto`, `required`, or `{\"type\": \"function\", \"function\": {\"name\": ...}}`"),
    field("parallel_tool_calls", &[], Kind::Bool, Bool(true), &[Chat],
        "false: at most one call"),
    field("response_format", &[], Kind::Object(GRAMMAR), Nothing("text"), TEXT,
        "`{\"type\": \"json_object\"}` or `{\"type\": \"json_schema\", \"json_schema\": {\"schema\": ...}}`: the answer is such JSON"),
    field("json_schema", &[], Kind::Object(GRAMMAR), Nothing("none"), TEXT,
        "a schema that the answer follows (llama.cpp's short form)"),
    field("grammar", &[], Kind::Text(GRAMMAR), Nothing("none"), TEXT,
        "a grammar that the answer follows: Lark, or GBNF"),
    field("cache_prompt", &[], Kind::Bool, Bool(true), TEXT,
        "reuses what is computed already of a prompt that begins alike; the text does not depend on it"),
    field("return_activity", &[], Kind::Bool, Bool(false), TEXT,
        "each event carries `lacuna`: bytes read, shares kept per layer and site, and a strip of one layer's neurons"),
    field("activity_layer", &[], Kind::Int { min: 0, max: Layer }, Int(0), TEXT,
        "the layer of that strip"),
    field("add_generation_prompt", &[], Kind::Bool, Bool(true), TURNS,
        "whether the template begins the assistant's turn"),
    field("user", &[], Kind::Text(1024), Nothing("none"), &[Completions, Chat, Embeddings],
        "accepted without effect"),
    field("input", &[], Kind::Inputs { items: PROMPTS }, Refused, &[Embeddings],
        "texts or token ids"),
    field("encoding_format", &[], Kind::Choice(&["float", "base64"]), Word("float"), &[Embeddings],
        "numbers, or little-endian f32 in base64"),
    field("pooling", &[], Kind::Choice(&["mean", "last"]), Word("mean"), &[Embeddings],
        "how the final hidden states (behind the last norm) become one vector, which is then scaled to length 1"),
    field("prompt", &["content"], Kind::Text(usize::MAX), Refused, &[Tokenize],
        "the text"),
    field("add_special_tokens", &["add_special"], Kind::Bool, Bool(true), &[Tokenize],
        "adds the tokens that stand around a text"),
    field("tokens", &[], Kind::Ids, Refused, &[Detokenize],
        "the token ids"),
];
