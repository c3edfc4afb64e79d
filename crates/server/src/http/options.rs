//! What the accept loop allows, and who may talk to it.

use super::HeaderMap;
use std::{fmt, net::IpAddr, time::Duration};

/// Limits of the accept loop; [`Default`] are the server's.
#[derive(Clone, Debug)]
pub struct Options {
    /// From the first byte of a request to the end of its head.
    pub head_time: Duration,
    /// From the end of the head to the end of the body.
    pub body_time: Duration,
    /// Between requests, and from connecting to the first byte.
    pub idle_time: Duration,
    /// How long a client may take nothing of an answer.
    pub write_time: Duration,
    /// How long answers may go on once the server is told to end.
    pub drain_time: Duration,
    /// Silence in a stream of events after which a comment is sent.
    pub ping_time: Duration,
    /// Longest head, in bytes.
    pub head_bytes: usize,
    /// Longest body, in bytes.
    pub body_bytes: usize,
    /// Connections at once. When all are taken, the one that has waited longest without a request makes room.
    pub connections: usize,
    /// Who may ask; none: everybody.
    pub keys: Keys,
    /// Names under which the server may be called besides `localhost` and its own address.
    pub hosts: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(30),
            idle_time: Duration::from_secs(60),
            write_time: Duration::from_secs(30),
            drain_time: Duration::from_secs(30),
            ping_time: Duration::from_secs(30),
            head_bytes: 32 << 10,
            body_bytes: 16 << 20,
            connections: 16_384,
            keys: Keys::default(),
            hosts: Vec::new(),
        }
    }
}

/// API keys. They are compared in constant time and never printed.
#[derive(Clone, Default)]
pub struct Keys(Vec<String>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl Keys {
    /// The keys of a file: one per line; empty lines and lines that start with `#` are skipped.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        Self(lines.map(str::to_owned).collect())
    }

    /// Whether everybody may ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the request carries one of the keys, or none is wanted: `Authorization: Bearer KEY`, or as a browser sends
    /// what its user typed, the password of `Authorization: Basic`, whatever the user's name.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let field = headers.get(super::header::AUTHORIZATION).map_or(&b""[..], |v| v.as_bytes());
        let Some(given) = bearer(field).map(<[u8]>::to_vec).or_else(|| password(field)) else { return false };
        // Every key is compared, so that the time does not tell which one was close.
        self.0.iter().fold(false, |found, key| same(key.as_bytes(), &given) | found)
    }
}

fn bearer(field: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = field.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

fn password(field: &[u8]) -> Option<Vec<u8>> {
    let (scheme, coded) = field.split_at_checked(6)?;
    let plain = crate::base64::decode(coded.trim_ascii()).filter(|_| scheme.eq_ignore_ascii_case(b"basic "))?;
    let name = plain.iter().position(|b| *b == b':')?;
    Some(plain[name + 1..].to_vec())
}

/// Equality in a time that depends on the lengths alone.
fn same(key: &[u8], given: &[u8]) -> bool {
    let mut difference = key.len() ^ given.len();
    for i in 0..key.len().max(given.len()) {
        let (a, b) = (key.get(i).copied().unwrap_or(0), given.get(i).copied().unwrap_or(0));
        difference |= usize::from(a ^ b);
    }
    std::hint::black_box(difference) == 0
}

impl Options {
    /// Whether a request may name `host` (as in the fields `Host` and `Origin`, perhaps with a port) as its server. A page
    /// of a stranger whose name resolves to this machine (DNS rebinding) sends that name; so only names that are known are
    /// answered: `localhost`, loopback addresses, the address `local` that the client is connected to, and listed names.
    pub fn knows_host(&self, host: &str, local: Option<IpAddr>) -> bool {
        let Some(name) = host_name(host) else { return false };
        if name.eq_ignore_ascii_case("localhost") || self.hosts.iter().any(|h| h.eq_ignore_ascii_case(name)) {
            return true;
        }
        let Ok(ip) = name.parse::<IpAddr>() else { return false };
        let ip = ip.to_canonical();
        ip.is_loopback() || local.is_some_and(|l| l.to_canonical() == ip)
    }
}

/// The name of `name:port` or `[address]:port`.
fn host_name(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (name, rest) = rest.split_once(']')?;
            (name, rest.strip_prefix(':').or_else(|| rest.is_empty().then_some("0"))?)
        }
        None => host.split_once(':').unwrap_or((host, "0")),
    };
    let good = !name.is_empty() && port.parse::<u16>().is_ok();
    good.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let options = Options { hosts: vec!["models.example".into()], ..Options::default() };
        let local = Some("192.168.1.5".parse().expect("an address"));
        for good in [
            "localhost",
            "LocalHost:8080",
            "127.0.0.1:8080",
            "127.9.9.9",
            "[::1]:80",
            "[::1]",
            "192.168.1.5:1",
            "models.example:443",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert!(options.knows_host(good, local), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.nip.io",
            "localhost:port",
            "192.168.1.6",
            "[::1",
            "[::1]x",
            "localhost@evil.example",
            "8.8.8.8:80",
            "localhost ",
            ":80",
            "models.example.",
            "0.0.0.0",
        ] {
            assert!(!options.knows_host(bad, local), "{bad}");
        }
    }

    #[test]
    fn keys() {
        let keys = Keys::parse("# ours\nalpha\n\n  beta  \n");
        let admit = |field: Option<&str>| {
            let mut headers = HeaderMap::new();
            field.map(|f| headers.insert("authorization", f.parse().expect("a value")));
            keys.admit(&headers)
        };
        assert!(admit(Some("Bearer alpha")) && admit(Some("bearer beta ")));
        let basic = |plain: &str| admit(Some(&format!("Basic {}", crate::base64::encode(plain.as_bytes()))));
        assert!(basic("anybody:alpha") && basic(":beta"));
        assert!(!basic("alpha") && !basic("alpha:") && !basic("a:alpha ") && !basic("alpha:gamma"));
        for bad in [
            "alpha",
            "Bearer",
            "Bearer ",
            "Bearer alph",
            "Bearer alphaa",
            "Bearer ours",
            "Basic alpha",
            "Bearer alpha beta",
        ] {
            assert!(!admit(Some(bad)), "{bad}");
        }
        assert!(!admit(None) && Keys::default().admit(&HeaderMap::new()));
        assert_eq!(format!("{keys:?}"), "2 keys");
    }
}
