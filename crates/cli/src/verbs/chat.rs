//! `lacuna chat`: a conversation, with the model's own template.

use super::run::Printer;
use crate::{
    Outcome,
    args::{LoadArgs, SamplingArgs},
    decoding::DecodingArgs,
    open,
};
use anyhow::{Context, Result};
use lacuna::{
    chat::{ChatTemplate, Message},
    engine::{
        Session,
        decoding::Decoder,
        generate::{Finish, Flow, Generated, Limits, generate_with},
        sampler::Sampler,
    },
    tokenizer::Tokenizer,
};
use rustyline::{DefaultEditor, error::ReadlineError};
use std::sync::atomic::Ordering;

/// Arguments of `lacuna chat`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory, a GGUF file, or a name in the local hub cache; default: the embedded model.
    model: Option<String>,
    /// What the assistant is told before the conversation.
    #[arg(long, env = "LACUNA_SYSTEM")]
    system: Option<String>,
    /// Longest answer in tokens; -1: until the model ends.
    #[arg(short = 'n', long = "predict", default_value_t = -1, allow_negative_numbers = true, env = "LACUNA_PREDICT")]
    predict: i64,
    /// Context in tokens; 0: the model's own. Default: the model's own, at most 4096.
    #[arg(short, long, env = "LACUNA_CTX_SIZE")]
    ctx_size: Option<usize>,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    decoding: DecodingArgs,
}

const HELP: &str = "\
/help           this list
/system TEXT    begin again with these instructions; without TEXT: none
/regen          answer the last question again
/clear          forget the conversation
/quit           leave (or Ctrl-D)
Ctrl-C stops an answer; a line that ends in \\ goes on in the next.";

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let sampler = Sampler::new(args.sampling.options())?;
    let ready = open::ready_alone(args.model.as_deref(), args.ctx_size, &args.load)?;
    let tokenizer = ready.tokenizer()?;
    let template = ChatTemplate::of(tokenizer, Some(crate::template_worker()?))?;
    let session = ready.session()?;
    let cancel = session.cancel_flag();
    let flag = cancel.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("installing the Ctrl-C handler")?;
    let decoder = args.decoding.decoder(ready.plan.is_some(), ready.decoding.as_ref())?;
    let limits = Limits {
        max_tokens: usize::try_from(args.predict).unwrap_or(usize::MAX),
        stop: args.sampling.stop.clone(),
        ignore_eos: args.sampling.ignore_eos,
    };
    let mut talk =
        Talk { tokenizer, template, session, sampler, decoder, limits, held: Vec::new(), messages: Vec::new() };
    talk.begin(args.system);
    let mut editor = DefaultEditor::new().context("opening the terminal")?;
    eprintln!("/help lists the commands; Ctrl-D leaves");
    loop {
        match read(&mut editor) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                // The history of a session lives as long as the session; a refused entry changes nothing.
                let _ = editor.add_history_entry(line.as_str());
                if !talk.obey(line.trim())? {
                    break;
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D leaves)"),
            Err(ReadlineError::Eof) => break,
            Err(e) => return Err(e).context("reading the line"),
        }
    }
    Ok(Outcome::Good)
}

/// One question, over several lines where they end in a backslash.
fn read(editor: &mut DefaultEditor) -> rustyline::Result<String> {
    let mut text = editor.readline("> ")?;
    while text.ends_with('\\') {
        text.pop();
        text.push('\n');
        text += &editor.readline(". ")?;
    }
    Ok(text)
}

struct Talk<'a> {
    tokenizer: &'a Tokenizer,
    template: ChatTemplate,
    session: Session,
    sampler: Sampler,
    /// Guesses learned from earlier answers stay.
    decoder: Decoder,
    limits: Limits,
    messages: Vec<Message>,
    /// Tokens whose keys and values the session holds.
    held: Vec<u32>,
}

impl Talk<'_> {
    fn begin(&mut self, system: Option<String>) {
        self.messages = system.into_iter().filter(|s| !s.is_empty()).map(|s| Message::new("system", s)).collect();
    }

    /// Follows a command or answers; false ends the conversation.
    fn obey(&mut self, line: &str) -> Result<bool> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "/help" => eprintln!("{HELP}"),
            "/quit" | "/exit" => return Ok(false),
            "/clear" => {
                let system = self.messages.first().filter(|m| m.role == "system").map(|m| m.content.clone());
                self.begin(system);
            }
            "/system" => self.begin(Some(rest.trim().to_owned())),
            "/regen" => {
                if self.messages.last().is_some_and(|m| m.role == "assistant") {
                    self.messages.pop();
                }
                match self.messages.last() {
                    Some(m) if m.role == "user" => self.answer()?,
                    _ => eprintln!("there is no question yet"),
                }
            }
            _ if word.starts_with('/') => eprintln!("no command `{word}`; /help lists them"),
            _ => {
                self.messages.push(Message::new("user", line));
                self.answer()?;
            }
        }
        Ok(true)
    }

    fn tell(&mut self, prompt: &[u32], show: &mut dyn FnMut(&str) -> Flow) -> Result<Generated> {
        let Self { decoder, session, tokenizer, sampler, limits, .. } = self;
        Ok(generate_with(decoder, session, tokenizer, prompt, sampler, limits, show)?)
    }

    fn answer(&mut self) -> Result<()> {
        let tokens = match self.template.encode(self.tokenizer, &self.messages, true) {
            Ok(tokens) => tokens,
            // A template may refuse a conversation (`raise_exception`): the question is dropped, the talk goes on.
            Err(e) => {
                eprintln!("{e}");
                self.messages.pop();
                return Ok(());
            }
        };
        if tokens.len() >= self.session.context() {
            let (n, most) = (tokens.len(), self.session.context());
            eprintln!(
                "the conversation has {n} tokens, the context holds {most}: /clear forgets it, -c makes more room"
            );
            self.messages.pop();
            return Ok(());
        }
        // What the session holds already is not computed again; one token at least must be, for its logits.
        let same = self.held.iter().zip(&tokens).take_while(|(a, b)| a == b).count().min(tokens.len() - 1);
        self.session.truncate(same);
        let cancel = self.session.cancel_flag();
        cancel.store(false, Ordering::Relaxed);
        let mut printer = Printer::default();
        let show = &mut |t: &str| printer.show(t);
        let out = self.tell(&tokens[same..], show)?;
        cancel.store(false, Ordering::Relaxed);
        printer.end()?;
        match out.finish {
            Finish::Context => eprintln!("(the context is full: /clear forgets the conversation, -c makes more room)"),
            Finish::Cancelled => eprintln!("(stopped)"),
            Finish::Length => eprintln!("(-n reached)"),
            Finish::Stop => {}
        }
        self.held = tokens;
        self.held.extend(&out.tokens);
        self.held.truncate(self.session.len());
        self.messages.push(Message::new("assistant", out.text.trim()));
        Ok(())
    }
}
