//! Fetching a model from the hub into the shared cache (feature `pull`).
//!
//! The order of writing is that of huggingface_hub, so that both can share a cache and a kill at any moment leaves a
//! usable one: bytes go to `blobs/<etag>.incomplete` (continued on the next try), the complete and verified file is
//! renamed to `blobs/<etag>`, the snapshot links to it, and `refs/main` is written last.

use super::{HubError, Name, check_component};
use sha2::{Digest, Sha256};
use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    time::Duration,
};
use ureq::{Agent, Body, http::Response};

/// Largest answer of the hub's API, in bytes.
const MAX_LISTING: u64 = 16 << 20;

/// Hears how a download goes.
pub trait Progress {
    /// A file begins, `size` bytes long, of which `have` are here already.
    fn start(&mut self, file: &str, size: u64, have: u64);
    /// `bytes` more have arrived.
    fn advance(&mut self, bytes: u64);
    /// The file is complete.
    fn finish(&mut self);
}

/// Where from, and as whom; [`Source::from_env`] reads the variables that all tools share.
#[derive(Clone)]
pub struct Source {
    /// `https://huggingface.co`, without a slash at the end.
    pub endpoint: String,
    /// Access token, for private and gated models.
    pub token: Option<String>,
    /// Nothing may be fetched.
    pub offline: bool,
}

impl Source {
    /// `HF_ENDPOINT`, `HF_TOKEN` (or the file `$HF_HOME/token`), `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let var = |name| env::var(name).ok().filter(|v| !v.trim().is_empty());
        let home = || var("HF_HOME").map(PathBuf::from).or_else(|| Some(super::cache_dir().ok()?.parent()?.to_owned()));
        let stored = || fs::read_to_string(home()?.join("token")).ok().map(|t| t.trim().to_owned());
        let yes = |v: String| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str());
        Self {
            endpoint: var("HF_ENDPOINT").unwrap_or("https://huggingface.co".into()).trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").or_else(stored),
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
        }
    }
}

/// Fetches what [`super::locate`] needs to find `name` in the cache at `root`, and returns its place.
///
/// # Errors
/// [`HubError`]; what has arrived stays and is continued by the next call.
pub fn pull(source: &Source, root: &Path, name: &Name, progress: &mut dyn Progress) -> Result<PathBuf, HubError> {
    if source.offline {
        return Err(HubError::Offline { name: name.repo.clone() });
    }
    let config = Agent::config_builder()
        .max_redirects(0)
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .user_agent(concat!("lacuna/", env!("CARGO_PKG_VERSION")))
        .build();
    let hub = Hub { source, agent: config.into() };
    let (commit, listed) = hub.listing(name)?;
    let files = wanted(name, &listed)?;
    let folder = root.join(name.folder());
    let snapshot = folder.join("snapshots").join(&commit);
    for dir in [&folder.join("blobs"), &folder.join("refs"), &snapshot] {
        fs::create_dir_all(dir).map_err(|e| HubError::io(dir, e))?;
    }
    for file in &files {
        let remote = hub.head(name, &commit, file)?;
        let blob = folder.join("blobs").join(&remote.etag);
        if !blob.is_file() {
            hub.download(&remote, file, &blob, progress)?;
        }
        link(&blob, &remote.etag, &snapshot.join(file))?;
    }
    let reference = folder.join("refs").join("main");
    fs::write(&reference, &commit).map_err(|e| HubError::io(&reference, e))?;
    super::locate_in(root, name)
}

struct Hub<'a> {
    source: &'a Source,
    agent: Agent,
}

/// What the hub says of one file.
struct Remote {
    url: String,
    etag: String,
    size: u64,
}

impl Hub<'_> {
    /// The commit behind `main` and the names of all files.
    fn listing(&self, name: &Name) -> Result<(String, Vec<String>), HubError> {
        let url = format!("{}/api/models/{}/revision/main", self.source.endpoint, name.repo);
        let fail = |problem: String| HubError::Fetch { url: url.clone(), problem };
        let mut answer = self.checked(self.agent.get(&url), &url)?;
        let text = answer.body_mut().with_config().limit(MAX_LISTING).read_to_string();
        let text = text.map_err(|e| fail(e.to_string()))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| fail(format!("not JSON: {e}")))?;
        let commit = json["sha"].as_str().unwrap_or_default();
        if !is_hash(commit) {
            return Err(fail("the answer has no commit hash `sha`".into()));
        }
        let names = json["siblings"].as_array().map(Vec::as_slice).unwrap_or_default();
        let names = names.iter().filter_map(|s| s["rfilename"].as_str()).map(str::to_owned).collect();
        Ok((commit.to_owned(), names))
    }

    /// Size and etag of a file, without following the redirection to where its bytes lie.
    fn head(&self, name: &Name, commit: &str, file: &str) -> Result<Remote, HubError> {
        let mut url = format!("{}/{}/resolve/{commit}/{file}", self.source.endpoint, name.repo);
        for _ in 0..4 {
            let fail = |problem: &str| HubError::Fetch { url: url.clone(), problem: problem.to_owned() };
            let answer = self.checked(self.agent.head(&url).header("Accept-Encoding", "identity"), &url)?;
            let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok());
            let etag = header("x-linked-etag").or(header("etag"));
            let size = header("x-linked-size").or(header("content-length")).and_then(|s| s.parse().ok());
            // A renamed repository answers with a path on the same host; the bytes of large files lie elsewhere.
            if let Some(moved) = header("location").filter(|l| l.starts_with('/') && header("x-linked-etag").is_none())
            {
                url = format!("{}{moved}", self.source.endpoint);
                continue;
            }
            let etag = etag.map(|e| e.trim_start_matches("W/").trim_matches('"').to_owned());
            let etag = etag.filter(|e| is_hash(e)).ok_or_else(|| fail("no usable etag in the answer"))?;
            let size = size.ok_or_else(|| fail("no size in the answer"))?;
            return Ok(Remote { url, etag, size });
        }
        Err(HubError::Fetch { url, problem: "too many redirections".into() })
    }

    fn download(&self, r: &Remote, name: &str, blob: &Path, progress: &mut dyn Progress) -> Result<(), HubError> {
        let partial = blob.with_extension("incomplete");
        let io = |e| HubError::io(&partial, e);
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(&partial).map_err(io)?;
        if file.try_lock().is_err() {
            let problem = "another process is downloading this file; wait for it".to_owned();
            return Err(HubError::Contents { path: partial, problem });
        }
        let mut have = file.metadata().map_err(io)?.len();
        if have > r.size {
            file.set_len(0).map_err(io)?;
            have = 0;
        }
        if have < r.size {
            let mut answer = self.body(r, have)?;
            if have > 0 && answer.status() != 206 {
                file.set_len(0).map_err(io)?;
                have = 0;
            }
            progress.start(name, r.size, have);
            copy(&mut answer.body_mut().as_reader(), &mut file, r, have, progress)?;
        }
        verify(&mut file, &partial, r)?;
        file.sync_all().map_err(io)?;
        fs::rename(&partial, blob).map_err(io)?;
        progress.finish();
        Ok(())
    }

    /// The bytes from `have` on, wherever the hub sends us; the token goes to the hub alone.
    fn body(&self, r: &Remote, have: u64) -> Result<Response<Body>, HubError> {
        let mut url = r.url.clone();
        for _ in 0..6 {
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            if have > 0 {
                request = request.header("Range", format!("bytes={have}-"));
            }
            let answer = self.checked(request, &url)?;
            match answer.headers().get("location").and_then(|v| v.to_str().ok()) {
                Some(next) if next.starts_with('/') => url = format!("{}{next}", self.source.endpoint),
                Some(next) => url = next.to_owned(),
                None => return Ok(answer),
            }
        }
        Err(HubError::Fetch { url, problem: "too many redirections".into() })
    }

    fn checked(
        &self,
        request: ureq::RequestBuilder<ureq::typestate::WithoutBody>,
        url: &str,
    ) -> Result<Response<Body>, HubError> {
        let fail = |problem: String| HubError::Fetch { url: url.to_owned(), problem };
        let ours = url.strip_prefix(&self.source.endpoint).is_some_and(|rest| rest.starts_with('/'));
        let request = match &self.source.token {
            Some(token) if ours => request.header("Authorization", format!("Bearer {token}")),
            _ => request,
        };
        let answer = request.call().map_err(|e| fail(e.to_string()))?;
        match answer.status().as_u16() {
            200..=399 => Ok(answer),
            401 | 403 => Err(fail("access refused: is the name right? Private and gated models need HF_TOKEN".into())),
            404 => Err(fail("no such model or file in the hub".into())),
            code => Err(fail(format!("the hub answered {code}; try again later"))),
        }
    }
}

fn copy(from: &mut impl Read, to: &mut File, r: &Remote, mut have: u64, p: &mut dyn Progress) -> Result<(), HubError> {
    let fail = |problem: String| HubError::Fetch { url: r.url.clone(), problem };
    let mut buffer = vec![0; 1 << 16];
    while have < r.size {
        let n = from.read(&mut buffer).map_err(|e| fail(format!("{e}; call again to continue at byte {have}")))?;
        if n == 0 {
            return Err(fail(format!("ended at byte {have} of {}; call again to continue", r.size)));
        }
        have += n as u64;
        if have > r.size {
            return Err(fail(format!("sent more than the {} bytes announced", r.size)));
        }
        to.write_all(&buffer[..n]).map_err(|e| fail(format!("writing: {e}")))?;
        p.advance(n as u64);
    }
    Ok(())
}

/// Large files are named by their SHA-256; a wrong one is removed, so that the next try starts afresh.
fn verify(file: &mut File, path: &Path, r: &Remote) -> Result<(), HubError> {
    if r.etag.len() != 64 {
        return Ok(());
    }
    let io = |e| HubError::io(path, e);
    file.rewind().map_err(io)?;
    let mut hash = Sha256::new();
    io::copy(file, &mut hash).map_err(io)?;
    let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if found == r.etag.to_ascii_lowercase() {
        return Ok(());
    }
    fs::remove_file(path).map_err(io)?;
    let problem = format!("the bytes have SHA-256 {found}, not {}; removed, call again", r.etag);
    Err(HubError::Fetch { url: r.url.clone(), problem })
}

fn is_hash(text: &str) -> bool {
    (8..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The files that loading needs: one GGUF file, or configuration, tokenizer and safetensors.
fn wanted(name: &Name, listed: &[String]) -> Result<Vec<String>, HubError> {
    let plain: Vec<&String> = listed.iter().filter(|f| check_component(f).is_ok()).collect();
    let gguf: Vec<PathBuf> = plain.iter().filter(|f| f.ends_with(".gguf")).map(PathBuf::from).collect();
    if let Some(part) = &name.part {
        let chosen = super::pick(&gguf, Path::new(&name.repo), part)?;
        return Ok(vec![chosen.to_string_lossy().into_owned()]);
    }
    if plain.iter().any(|f| *f == "config.json") && plain.iter().any(|f| f.ends_with(".safetensors")) {
        let needed = |f: &&&String| {
            [".json", ".safetensors", ".jinja"].iter().any(|end| f.ends_with(end)) || **f == "tokenizer.model"
        };
        return Ok(plain.iter().filter(needed).map(|f| f.to_string()).collect());
    }
    let problem = super::choices("no safetensors; name one file as `org/name:FILE`", &gguf);
    Err(HubError::Contents { path: PathBuf::from(&name.repo), problem })
}

#[cfg(unix)]
fn link(_blob: &Path, etag: &str, at: &Path) -> Result<(), HubError> {
    let target = Path::new("../../blobs").join(etag);
    if fs::read_link(at).is_ok_and(|t| t == target) {
        return Ok(());
    }
    match fs::remove_file(at) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(HubError::io(at, e)),
        _ => {}
    }
    std::os::unix::fs::symlink(target, at).map_err(|e| HubError::io(at, e))
}

#[cfg(not(unix))]
fn link(blob: &Path, _etag: &str, at: &Path) -> Result<(), HubError> {
    fs::copy(blob, at).map(drop).map_err(|e| HubError::io(at, e))
}

#[cfg(test)]
#[path = "pull_tests.rs"]
mod tests;
