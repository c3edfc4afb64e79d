//! The folder for what can be made again: converted layouts, plans beside read-only models, measurements of the machine.

use std::{env, ffi::OsString, path::PathBuf};

/// `$LACUNA_CACHE`, else `$XDG_CACHE_HOME/lacuna`, else `~/.cache/lacuna`; `None` where none of these can be told, or
/// `LACUNA_CACHE` is set to nothing (no cache).
pub fn root() -> Option<PathBuf> {
    root_from(|name| env::var_os(name))
}

fn root_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(own) = variable("LACUNA_CACHE") {
        return (!own.is_empty()).then(|| own.into());
    }
    let absolute = |name| variable(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache"))).map(|p| p.join("lacuna"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_wins() {
        let root = |set: &[(&str, &str)]| {
            root_from(|n| set.iter().find(|(k, _)| *k == n).map(|(_, v)| OsString::from(*v)))
                .map(|p| p.display().to_string())
        };
        let (own, xdg, home) = (("LACUNA_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c"));
        assert_eq!(root(&[own, xdg, home]).unwrap(), "/a");
        assert_eq!(root(&[xdg, home]).unwrap(), "/b/lacuna");
        assert_eq!(root(&[("XDG_CACHE_HOME", "relative"), home]).unwrap(), "/c/.cache/lacuna");
        assert_eq!(root(&[("LACUNA_CACHE", ""), home]), None);
        assert_eq!(root(&[]), None);
    }
}
