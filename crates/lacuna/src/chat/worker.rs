//! Rendering in another process.
//!
//! Fuel counts instructions, and forty of them double a string forty times; a constant that long is made even while the
//! template is compiled. No limit inside a process holds such a program without ending the process, so a program that
//! opens models of strangers starts itself once more as a worker: the worker limits its own memory and processor time,
//! and its end is an error of that rendering and nothing else. Requests and replies are lines of JSON.

use super::ChatTemplate;
use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// Bytes by which the templates may make the worker grow.
const MEMORY: u64 = 512 << 20;
/// Processor time of one rendering, in whole seconds, which is how the system counts.
const SECONDS: u64 = 2;
/// How long a reply may take where the processor is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a rendering needs.
#[derive(Serialize)]
pub(super) struct Request<'a, M, T> {
    pub template: &'a str,
    pub bos: &'a str,
    pub eos: &'a str,
    /// `None` only compiles.
    pub messages: Option<&'a M>,
    pub tools: &'a T,
    pub answer: bool,
}

/// A [`Request`] as the worker reads it.
#[derive(Deserialize)]
struct Asked {
    template: String,
    bos: String,
    eos: String,
    // These keep the order of the fields, which templates show with `tojson`.
    messages: Option<serde_json::Value>,
    tools: serde_json::Value,
    answer: bool,
}

/// The text, or what is wrong.
type Reply = Result<String, String>;

/// A process that renders templates for this one. It is started when it is needed, and again when it has ended.
pub struct Worker {
    program: PathBuf,
    arguments: Vec<OsString>,
    running: Mutex<Option<Running>>,
}

struct Running {
    child: Child,
    input: ChildStdin,
    replies: mpsc::Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already: then there is nothing to kill, and `wait` only collects it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    /// A worker that `program` becomes when it is called with `arguments`: it must call [`work`].
    pub fn new(program: impl Into<PathBuf>, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        let arguments = arguments.into_iter().map(Into::into).collect();
        Self { program: program.into(), arguments, running: Mutex::default() }
    }

    /// The reply to `request`, or what is wrong with it.
    pub(super) fn ask(&self, request: &Request<impl Serialize, impl Serialize>) -> Reply {
        let mut line = serde_json::to_vec(request).map_err(|e| e.to_string())?;
        line.push(b'\n');
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // A worker that has served may have been ended from outside since: that is not this request's fault.
        if let Some(mut old) = running.take()
            && let Some(reply) = old.ask(&line)
        {
            *running = Some(old);
            return reply;
        }
        let mut new = self.start().map_err(|e| format!("{} cannot be started: {e}", self.program.display()))?;
        let Some(reply) = new.ask(&line) else {
            let limit = MEMORY >> 20;
            return Err(format!(
                "it needs more than {limit} MiB or {SECONDS} s of processor time; the template is damaged or hostile"
            ));
        };
        *running = Some(new);
        reply
    }

    fn start(&self) -> io::Result<Running> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // Ctrl-C at a terminal goes to whole groups; it is meant for the answer, not for the worker.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("it was started without pipes"));
        };
        let (send, replies) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Running { child, input, replies })
    }
}

impl Running {
    /// `None` if it ends, or does not answer in time.
    fn ask(&mut self, line: &[u8]) -> Option<Reply> {
        self.input.write_all(line).and_then(|()| self.input.flush()).ok()?;
        serde_json::from_str(&self.replies.recv_timeout(PATIENCE).ok()?).ok()
    }
}

/// The worker's side: answers the requests on `input` until it ends.
///
/// # Errors
/// Reading or writing fails, or a line is no request.
pub fn work(input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    limit_memory();
    let mut last: Option<ChatTemplate> = None;
    for line in input.lines() {
        let asked: Asked = serde_json::from_str(&line?)?;
        limit_time();
        serde_json::to_writer(&mut output, &answer(&mut last, &asked))?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(())
}

/// Renders; the template of the last request is not compiled again.
fn answer(last: &mut Option<ChatTemplate>, asked: &Asked) -> Reply {
    let problem = |e: Error| if let Error::Template { problem, .. } = e { problem } else { e.to_string() };
    let same = |t: &ChatTemplate| t.text == asked.template && t.bos == asked.bos && t.eos == asked.eos;
    let template = match last.take().filter(same) {
        Some(same) => same,
        None => ChatTemplate::new(&asked.template, asked.bos.clone(), asked.eos.clone(), "", None).map_err(problem)?,
    };
    let template = last.insert(template);
    match &asked.messages {
        Some(messages) => template.render_with(messages, &asked.tools, asked.answer).map_err(problem),
        None => Ok(String::new()),
    }
}

/// Bounds the address space of this process. Where the system cannot, [`PATIENCE`] is the bound.
#[cfg(unix)]
fn limit_memory() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let most = (pages * rustix::param::page_size() as u64).saturating_add(MEMORY);
    let set = |resource, current| {
        let maximum = getrlimit(resource).maximum;
        setrlimit(resource, Rlimit { current: Some(maximum.map_or(current, |m| m.min(current))), maximum })
    };
    if let Err(e) = set(Resource::As, most) {
        tracing::debug!("no limit on the memory of templates: {e}");
    }
    // A worker that ends at its limit leaves no file behind.
    if let Err(e) = set(Resource::Core, 0) {
        tracing::debug!("no limit on core files: {e}");
    }
}

#[cfg(not(unix))]
fn limit_memory() {}

/// Gives this process [`SECONDS`] more of the processor.
#[cfg(unix)]
fn limit_time() {
    use rustix::{
        process::{Resource, Rlimit, getrlimit, setrlimit},
        time::{ClockId, clock_gettime},
    };
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec.unsigned_abs();
    let maximum = getrlimit(Resource::Cpu).maximum;
    // One more, because the limit is met when the count of whole seconds reaches it.
    if let Err(e) = setrlimit(Resource::Cpu, Rlimit { current: Some(used + SECONDS + 1), maximum }) {
        tracing::debug!("no limit on the time of templates: {e}");
    }
}

#[cfg(not(unix))]
fn limit_time() {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Message;

    fn replies(requests: &[Request<Vec<Message>, ()>]) -> Vec<Reply> {
        let mut last = None;
        let line = |r| serde_json::from_str(&serde_json::to_string(r).expect("JSON")).expect("a request");
        requests.iter().map(|r| answer(&mut last, &line(r))).collect()
    }

    #[test]
    fn a_worker_renders_what_is_rendered_in_the_process() {
        let turns = vec![Message::new("user", "Hi <b> \u{1f600}"), Message::new("assistant", "Ho\n")];
        let text = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ m.role }}:{{ m['content'] }}|{% endfor %}\
                    {% if tools is none %}-{% endif %}{% if add_generation_prompt %}>{% endif %}";
        let here = ChatTemplate::new(text, "<s>".into(), String::new(), "x", None).expect("it compiles");
        let request =
            |template, messages| Request { template, bos: "<s>", eos: "", messages, tools: &(), answer: true };
        let got = replies(&[request(text, Some(&turns)), request("{% for %}", None), request(text, Some(&turns))]);
        let want = here.render(&turns, true).expect("it renders");
        assert_eq!(got[0], Ok(want.clone()));
        assert!(got[1].as_ref().is_err_and(|e| e.contains("syntax")), "{:?}", got[1]);
        assert_eq!(got[2], Ok(want));
    }

    #[test]
    fn a_program_that_is_no_worker_is_an_error() {
        let request: Request<Vec<Message>, ()> =
            Request { template: "", bos: "", eos: "", messages: None, tools: &(), answer: true };
        let ask = |program: &str| Worker::new(program, [] as [&str; 0]).ask(&request);
        assert!(ask("no-such-program-of-lacuna").is_err_and(|e| e.contains("cannot be started")));
        // It ends at once without an answer.
        #[cfg(unix)]
        assert!(ask("true").is_err_and(|e| e.contains("MiB")));
    }
}
