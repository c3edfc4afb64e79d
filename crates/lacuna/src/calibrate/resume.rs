//! Passes that go on where a killed one stopped: statistics are stored at intervals, keyed by the model, the text (its
//! windows, so the seed too) and what is observed.

use super::{Pass, Subject};
use crate::error::Result;
use lacuna_core::{
    atomic::write_atomically,
    hash::sha256,
    map::{LoadMode, open},
    statistics::{Observation, Statistics},
};
use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Time between two stored states.
const INTERVAL: Duration = Duration::from_secs(20);

/// Where the states of passes over one text with one model lie.
#[derive(Debug)]
pub struct Resume {
    folder: PathBuf,
    subject: String,
    interval: Duration,
    used: RefCell<Vec<PathBuf>>,
}

impl Resume {
    /// States below `<root>/calibrations`; without a root nothing is stored.
    pub fn below(root: Option<&Path>, subject: &Subject, windows: &[Vec<u32>]) -> Option<Self> {
        let text: Vec<u8> =
            windows.iter().flat_map(|w| w.iter().chain([&u32::MAX])).flat_map(|t| t.to_le_bytes()).collect();
        let subject = format!("{} {}", subject.hash, sha256(&text));
        let folder = root?.join("calibrations");
        Some(Self { folder, subject, interval: INTERVAL, used: RefCell::default() })
    }

    /// Removes what was stored; the plan is made.
    pub fn clear(&self) {
        // What cannot be removed is only in the way.
        self.used.take().iter().for_each(|path| drop(fs::remove_file(path)));
    }

    fn path(&self, key: &str) -> PathBuf {
        let path = self.folder.join(format!("{}.safetensors", &key[..24]));
        self.used.borrow_mut().push(path.clone());
        path
    }

    /// What an earlier pass gathered, and how many windows it finished.
    fn load(&self, key: &str, observations: &[Observation], windows: usize) -> (Statistics, usize) {
        let path = self.path(key);
        let read = |path: &Path| Statistics::read(open(path, LoadMode::Read).ok()?, key, observations.to_vec()).ok();
        match read(&path).filter(|(_, done)| *done <= windows) {
            Some((statistics, done)) => {
                tracing::info!("an earlier pass had finished {done} of {windows} windows; going on behind them");
                (statistics, done)
            }
            None => (Statistics::new(observations.to_vec()), 0),
        }
    }

    /// Stores a state; a folder that cannot be written is no error, the pass only cannot be resumed.
    fn store(&self, key: &str, statistics: &Statistics, done: usize) {
        let path = self.path(key);
        let written = fs::create_dir_all(&self.folder)
            .map_err(lacuna_core::Error::io(&self.folder, "create"))
            .and_then(|()| write_atomically(&path, None, |out| statistics.write(key, done, out)));
        if let Err(e) = written {
            tracing::warn!("this pass could not be resumed if it were stopped: {e}");
        }
    }
}

/// One dense pass over `windows` that gathers `observations`. `progress(done, all)` counts tokens. With `resume`, a pass
/// that was stopped goes on.
///
/// # Errors
/// What `forward` returns; the first point that held NaN or infinity.
pub fn observe_resumable(
    forward: &mut Pass<'_>,
    windows: &[Vec<u32>],
    observations: Vec<Observation>,
    resume: Option<&Resume>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Statistics> {
    let total = windows.iter().map(Vec::len).sum();
    let key = resume.map_or(String::new(), |r| Statistics::key(&r.subject, &observations));
    let (mut statistics, first) = match resume {
        Some(r) => r.load(&key, &observations, windows.len()),
        None => (Statistics::new(observations), 0),
    };
    let mut done: usize = windows[..first].iter().map(Vec::len).sum();
    let mut stored = Instant::now();
    for (i, window) in windows.iter().enumerate().skip(first) {
        forward(window, &mut statistics)?;
        statistics.check()?;
        done += window.len();
        progress(done, total);
        if let Some(r) = resume.filter(|r| stored.elapsed() >= r.interval || i + 1 == windows.len()) {
            r.store(&key, &statistics, i + 1);
            stored = Instant::now();
        }
    }
    Ok(statistics)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::{observer::Observer, site::Point};

    #[test]
    fn a_killed_pass_goes_on_and_ends_with_the_same_statistics() {
        let dir = tempfile::tempdir().unwrap();
        let resume = || Resume {
            folder: dir.path().join("calibrations"),
            subject: "model text".into(),
            interval: Duration::ZERO,
            used: RefCell::default(),
        };
        let windows: Vec<Vec<u32>> = (0..5).map(|i| vec![i, i + 1]).collect();
        let wanted = vec![Observation::magnitudes(Point::Head)];
        let run = |resume: Option<&Resume>, dies_at: Option<u32>| {
            let mut seen = Vec::new();
            let mut forward = |tokens: &[u32], o: &mut dyn Observer| {
                if Some(tokens[0]) == dies_at {
                    return Err(crate::error::Error::Cancelled);
                }
                seen.push(tokens[0]);
                o.observe(Point::Head, 1, &[tokens[0] as f32, 0.5]);
                Ok(())
            };
            let s = observe_resumable(&mut forward, &windows, wanted.clone(), resume, &mut |_, _| {});
            (s.ok().map(|s| s.magnitudes(Point::Head).unwrap().clone()), seen)
        };
        let whole = run(None, None).0;
        let first = resume();
        assert_eq!(run(Some(&first), Some(3)), (None, vec![0, 1, 2]));
        let second = resume();
        assert_eq!(run(Some(&second), None), (whole.clone(), vec![3, 4]));
        assert_eq!(run(Some(&resume()), None), (whole, vec![]), "a finished pass is not run again");
        second.clear();
        assert_eq!(fs::read_dir(dir.path().join("calibrations")).unwrap().count(), 0);
    }
}
