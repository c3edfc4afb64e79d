//! Pages generated from the registry of methods and the server's table of fields; `cargo xtask docs` writes them and the tidy test compares them.

use lacuna_core::{method::Method, site::Site};
use lacuna_methods::registry::METHODS;
use std::{fs, io, path::Path};

/// Path and text of every generated page.
pub fn pages() -> Vec<(&'static str, String)> {
    vec![("docs/methods.md", methods()), ("docs/server-api.md", server())]
}

/// Writes all pages below `root`.
///
/// # Errors
/// If a page cannot be written.
pub fn write(root: &Path) -> io::Result<()> {
    for (path, text) in pages() {
        let path = root.join(path);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(path, text)?;
    }
    Ok(())
}

fn methods() -> String {
    let mut out = String::from(
        "# Methods\n\nGenerated from the registry by `cargo xtask docs`; do not edit. \
         `lacuna methods NAME` prints the same.\n\n| name | site | what it does |\n|---|---|---|\n",
    );
    for m in METHODS {
        let site = format!("{:?}", m.site()).to_lowercase();
        out += &format!("| [`{0}`](#{0}) | {site} | {1} |\n", m.name(), m.summary());
    }
    for m in METHODS {
        out += &section(*m);
    }
    out
}

fn server() -> String {
    let mut out = String::from(
        "# The server's requests\n\nGenerated from the server's tables by `cargo xtask docs`; do not edit. What the \
         server does with them is in [server.md](server.md).\n\nA field that is absent or null has its default. A value \
         that a field does not take is refused with 400 and the name, the value and the range; a field that is not listed \
         is ignored, with one warning in the log.\n\n| route | key | what it does |\n|---|---|---|\n",
    );
    for route in lacuna_server::api::routes() {
        let key = if route.public { "no" } else { "yes" };
        out += &format!("| `{} {}` | {key} | {} |\n", route.method, route.path, route.about);
    }
    out + &lacuna_server::fields::page()
}

fn section(m: &dyn Method) -> String {
    let paper = m.citation();
    let link = paper.arxiv.map_or(String::new(), |id| format!(" ([arXiv:{id}](https://arxiv.org/abs/{id}))"));
    let layouts: Vec<_> = m.layouts().iter().map(|o| o.name()).collect();
    let mut out = format!(
        "\n## {}\n\n{}. {}\n\n* Source: {}{link}\n* Weight layouts: {}\n* Use: `{} {}`\n",
        m.name(),
        m.title(),
        m.summary(),
        paper.paper,
        layouts.join(", "),
        flag(m.site()),
        usage(m),
    );
    if !m.params().is_empty() {
        out += "\n| parameter | default | range | meaning |\n|---|---|---|---|\n";
        for p in m.params() {
            out += &format!("| `{}` | {} | {} | {} |\n", p.name, p.default, p.range_text(), p.doc);
        }
    }
    out
}

fn flag(site: Site) -> &'static str {
    match site {
        Site::Decoding => "--draft",
        Site::Weights => "lacuna compress MODEL -o OUT --method",
        _ => "--sparse",
    }
}

/// The short form with the default of the first parameter.
fn usage(m: &dyn Method) -> String {
    match m.params().first() {
        Some(p) => format!("{}={}", m.name(), p.default),
        None => m.name().to_owned(),
    }
}
