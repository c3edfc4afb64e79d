//! Finding models on this machine: a path, or a name in the Hugging Face cache that all tools share.
//!
//! The cache is `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `$XDG_CACHE_HOME/huggingface/hub`, else
//! `~/.cache/huggingface/hub`; inside it `models--org--name/{refs,blobs,snapshots}` (huggingface_hub, "Understand
//! caching"). Names come from strangers (recipes, later requests), so they pass a strict grammar before they are
//! joined to a path, and what a link leads to must lie inside the cache. Nothing here opens a socket; with the feature
//! `pull`, the module `pull` does.

#[cfg(feature = "pull")]
pub mod pull;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// Why a model was not found or not fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The text is not a valid name.
    #[error("`{name}` is not a model name: {why}; expected `name` or `org/name`, optionally `:file-or-quantisation`")]
    Name {
        /// What was given, cut to 120 characters and with control characters escaped.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Neither a path nor a cached model.
    #[error("model `{name}` not found: no such file or directory, and nothing in the hub cache at {}; {remedy}", looked.display())]
    NotFound {
        /// What was asked for.
        name: String,
        /// The place in the cache where it would be.
        looked: PathBuf,
        /// What to do next.
        remedy: String,
    },
    /// The folder holds nothing that can be loaded, or no file that fits.
    #[error("{}: {problem}", path.display())]
    Contents {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The entry leads out of the cache.
    #[error("{}: leads outside the hub cache (to {}); refused", path.display(), target.display())]
    Outside {
        /// The entry.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// No cache folder can be derived from the environment.
    #[error("no hub cache: set HF_HUB_CACHE, HF_HOME or HOME")]
    NoCache,
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A download failed.
    #[error("{url}: {problem}")]
    Fetch {
        /// The address.
        url: String,
        /// What happened, and what to do.
        problem: String,
    },
    /// Downloads are switched off by the environment.
    #[error("HF_HUB_OFFLINE is set: nothing is downloaded; unset it to pull `{name}`")]
    Offline {
        /// What was asked for.
        name: String,
    },
}

impl HubError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// A checked name in the hub: `name` or `org/name`, and the part after a colon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `name` or `org/name`.
    pub repo: String,
    /// A file name or a quantisation (`Q4_K_M`), where several files live in one repository.
    pub part: Option<String>,
}

/// Device names that Windows keeps for itself, with any extension.
const WINDOWS_DEVICES: [&str; 6] = ["con", "prn", "aux", "nul", "conin$", "conout$"];

impl Name {
    /// Checks `text` against the hub's own grammar: at most two components of 1 to 96 characters out of
    /// `A-Za-z0-9._-`, neither starting nor ending with `-` or `.`, without `--` and `..`.
    ///
    /// # Errors
    /// [`HubError::Name`] with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let fail = |why| HubError::Name { name: text.chars().take(120).flat_map(char::escape_debug).collect(), why };
        let (repo, part) = match text.split_once(':') {
            Some((repo, part)) => (repo, Some(part)),
            None => (text, None),
        };
        if repo.split('/').count() > 2 {
            return Err(fail("more than one `/`"));
        }
        for component in repo.split('/') {
            check_component(component).map_err(fail)?;
        }
        if let Some(part) = part {
            check_component(part).map_err(fail)?;
        }
        Ok(Self { repo: repo.to_owned(), part: part.map(str::to_owned) })
    }

    /// The folder of this model in a cache: `models--org--name`.
    pub fn folder(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }
}

/// One component of a name, or one file name from a listing.
fn check_component(component: &str) -> Result<(), &'static str> {
    if component.is_empty() {
        return Err("an empty component");
    }
    if component.len() > 96 {
        return Err("a component longer than 96 characters");
    }
    if !component.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Err("a character other than A-Z a-z 0-9 . _ -");
    }
    if component.starts_with(['.', '-']) || component.ends_with(['.', '-']) {
        return Err("a component that starts or ends with `.` or `-`");
    }
    if component.contains("--") || component.contains("..") {
        return Err("`--` or `..` inside a component");
    }
    let stem = component.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let numbered =
        (stem.starts_with("com") || stem.starts_with("lpt")) && stem.len() == 4 && stem.as_bytes()[3].is_ascii_digit();
    if numbered || WINDOWS_DEVICES.contains(&stem.as_str()) {
        return Err("a device name of Windows");
    }
    Ok(())
}

/// The cache folder that the environment names; it need not exist.
///
/// # Errors
/// [`HubError::NoCache`] if not even a home directory is known.
pub fn cache_dir() -> Result<PathBuf, HubError> {
    let var = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| var("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| var("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| var("XDG_CACHE_HOME").map(|p| p.join("huggingface/hub")))
        .or_else(|| var("HOME").map(|p| p.join(".cache/huggingface/hub")))
        .ok_or(HubError::NoCache)
}

/// Where the model that a user calls `text` lies: a directory with `config.json`, or a GGUF file. An existing path wins
/// over a name of the hub.
///
/// # Errors
/// [`HubError`]; the message says where was looked and what to do.
pub fn locate(text: &str) -> Result<PathBuf, HubError> {
    let path = Path::new(text);
    if !text.is_empty() && path.exists() {
        return loadable(path);
    }
    if path.is_absolute() || text.starts_with("./") || text.starts_with("../") || text.ends_with(".gguf") {
        let problem = "no such file or directory; name a Hugging Face directory, a GGUF file or org/name".to_owned();
        return Err(HubError::Contents { path: path.to_owned(), problem });
    }
    locate_in(&cache_dir()?, &Name::parse(text)?)
}

/// The model `name` in the cache at `root`.
///
/// # Errors
/// As [`locate`].
pub fn locate_in(root: &Path, name: &Name) -> Result<PathBuf, HubError> {
    let folder = root.join(name.folder());
    let reference = folder.join("refs").join("main");
    let commit = match fs::read_to_string(&reference) {
        Ok(text) => text.trim().to_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let remedy = format!("fetch it with `lacuna pull {0}` or `hf download {0}`", name.repo);
            return Err(HubError::NotFound { name: name.repo.clone(), looked: folder, remedy });
        }
        Err(e) => return Err(HubError::io(&reference, e)),
    };
    if commit.is_empty() || commit.len() > 64 || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
        let problem = "is not a commit hash; delete the folder and fetch the model again".to_owned();
        return Err(HubError::Contents { path: reference, problem });
    }
    let snapshot = folder.join("snapshots").join(commit);
    let found = match &name.part {
        None => loadable(&snapshot)?,
        Some(part) => pick_gguf(&snapshot, part)?,
    };
    inside(root, &found)?;
    if found.is_dir() {
        for entry in fs::read_dir(&found).map_err(|e| HubError::io(&found, e))? {
            inside(root, &entry.map_err(|e| HubError::io(&found, e))?.path())?;
        }
    }
    Ok(found)
}

/// A file as it is; a directory if it holds `config.json`; the only GGUF file of a directory.
fn loadable(path: &Path) -> Result<PathBuf, HubError> {
    if path.is_file() || path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    let mut files = gguf_files(path)?;
    match files.len() {
        0 => {
            let problem = "neither config.json nor a .gguf file in this directory".to_owned();
            Err(HubError::Contents { path: path.to_owned(), problem })
        }
        1 => Ok(files.remove(0)),
        _ => {
            Err(HubError::Contents { path: path.to_owned(), problem: choices("several GGUF files, name one", &files) })
        }
    }
}

fn gguf_files(dir: &Path) -> Result<Vec<PathBuf>, HubError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| HubError::io(dir, e))? {
        let path = entry.map_err(|e| HubError::io(dir, e))?.path();
        if path.extension().is_some_and(|e| e == "gguf") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The GGUF file of `dir` that `part` means.
fn pick_gguf(dir: &Path, part: &str) -> Result<PathBuf, HubError> {
    pick(&gguf_files(dir)?, dir, part)
}

/// The file called `part`, or the only one with `part` among the `-` or `.` separated pieces of its name.
fn pick(files: &[PathBuf], place: &Path, part: &str) -> Result<PathBuf, HubError> {
    if let Some(exact) = files.iter().find(|p| p.file_name().is_some_and(|n| n == part)) {
        return Ok(exact.clone());
    }
    let fits = |p: &&PathBuf| {
        let stem = p.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        stem.split(['-', '.']).any(|piece| piece.eq_ignore_ascii_case(part))
    };
    let mut fitting: Vec<_> = files.iter().filter(fits).cloned().collect();
    let problem = match fitting.len() {
        1 => return Ok(fitting.remove(0)),
        0 => choices(&format!("no file for `{part}`"), files),
        _ => choices(&format!("several files for `{part}`, name one"), &fitting),
    };
    Err(HubError::Contents { path: place.to_owned(), problem })
}

fn choices(what: &str, files: &[PathBuf]) -> String {
    let names: Vec<_> =
        files.iter().map(|p| p.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect();
    format!("{what}; it holds: {}", if names.is_empty() { "no GGUF file".to_owned() } else { names.join(", ") })
}

fn inside(root: &Path, path: &Path) -> Result<(), HubError> {
    let root = root.canonicalize().map_err(|e| HubError::io(root, e))?;
    let target = path.canonicalize().map_err(|e| HubError::io(path, e))?;
    if target.starts_with(&root) { Ok(()) } else { Err(HubError::Outside { path: path.to_owned(), target }) }
}

#[cfg(test)]
#[path = "hub/tests.rs"]
mod tests;
