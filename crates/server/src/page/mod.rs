//! The page at `/`: plain files in the binary, nothing from outside, no inline script or style.
//!
//! Where the server wants an API key, the files want it too: the browser asks for it as a password and sends it with what
//! the page asks.

use crate::http::{Bytes, HeaderName, HeaderValue, Method, Reply, Route, StatusCode, header};

/// Scripts and styles only from these files, requests only to this server, no frame around the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page.
struct File {
    path: &'static str,
    content_type: &'static str,
    body: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// `/` and the files it names.
static FILES: [File; 8] = [
    File { path: "/", content_type: HTML, body: include_str!("index.html") },
    File { path: "/style.css", content_type: "text/css; charset=utf-8", body: include_str!("style.css") },
    File { path: "/app.js", content_type: SCRIPT, body: include_str!("app.js") },
    File { path: "/answer.js", content_type: SCRIPT, body: include_str!("answer.js") },
    File { path: "/api.js", content_type: SCRIPT, body: include_str!("api.js") },
    File { path: "/probe.js", content_type: SCRIPT, body: include_str!("probe.js") },
    File { path: "/settings.js", content_type: SCRIPT, body: include_str!("settings.js") },
    File { path: "/favicon.svg", content_type: "image/svg+xml", body: include_str!("favicon.svg") },
];

/// The lines of the table of routes that [`reply`] answers.
pub fn routes() -> Vec<Route> {
    let about =
        |path| if path == "/" { "the page: chat, side by side, what was skipped" } else { "a file of the page" };
    FILES.iter().map(|f| Route { method: Method::GET, path: f.path, public: false, about: about(f.path) }).collect()
}

/// The file at `path`.
pub fn reply(path: &str) -> Option<Reply> {
    let file = FILES.iter().find(|f| f.path == path)?;
    let set = |name: HeaderName, value: &'static str| (name, HeaderValue::from_static(value));
    Some(Reply::Full {
        status: StatusCode::OK,
        content_type: file.content_type,
        headers: vec![
            set(header::CONTENT_SECURITY_POLICY, POLICY),
            set(header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            set(header::REFERRER_POLICY, "no-referrer"),
            // The files change with the program.
            set(header::CACHE_CONTROL, "no-cache"),
        ],
        body: Bytes::from_static(file.body.as_bytes()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_that_is_named_is_there() {
        for file in &FILES {
            for quote in ["src=\"", "href=\"", "from \"./"] {
                for rest in file.body.split(quote).skip(1) {
                    let name = rest.split('"').next().unwrap_or("");
                    let known = FILES.iter().any(|f| f.path.trim_start_matches('/') == name);
                    assert!(known || name.starts_with('#'), "{} names {name}", file.path);
                }
            }
        }
    }

    #[test]
    fn nothing_that_the_policy_forbids_or_that_runs_text_of_a_model() {
        for file in &FILES {
            let foreign = file.body.replace("http://www.w3.org/2000/svg", "");
            assert!(!foreign.contains("http://") && !foreign.contains("https://"), "{}", file.path);
            for bad in [
                " style=\"",
                "<style",
                "<script>",
                "onclick=",
                "innerHTML",
                "insertAdjacentHTML",
                "eval(",
                "document.write",
            ] {
                assert!(!file.body.contains(bad), "{} has {bad}", file.path);
            }
        }
    }

    #[test]
    fn replies_carry_the_policy() {
        for route in routes() {
            assert!(!route.public);
            let Some(Reply::Full { headers, .. }) = reply(route.path) else { panic!("{} has no file", route.path) };
            assert!(headers.iter().any(|(n, v)| n == header::CONTENT_SECURITY_POLICY && v == POLICY));
        }
        assert!(reply("/nothing").is_none());
    }
}
