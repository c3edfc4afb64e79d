//! The body of the fuzz target of this crate, as an ordinary function.

use crate::fields::{Bounds, Endpoint, read};

/// `input` as the body of a request: the first byte chooses the endpoint.
pub fn request(input: &[u8]) {
    let Some((first, body)) = input.split_first() else { return };
    let endpoint = Endpoint::ALL[usize::from(*first) % Endpoint::ALL.len()];
    let bounds = Bounds { context: 512, layers: 6, vocab: 4096 };
    if let Err(e) = read(endpoint, body, &bounds) {
        assert!(e.status.is_client_error(), "{e}");
        assert!(e.message.len() < 2000, "a message as long as the request");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_requests_are_errors_or_requests() {
        let seed =
            br#" {"model": "m", "prompt": [[1, 2], [3]], "messages": [{"role": "user", "content": "a"}], "stop": ["x"],
            "logit_bias": {"5": -1.5}, "stream_options": {"include_usage": true}, "seed": 7, "temperature": 0.5}"#;
        for endpoint in 0..Endpoint::ALL.len() as u8 {
            let mut body = seed.to_vec();
            body[0] = endpoint;
            request(&body);
            for at in 1..body.len() {
                request(&body[..at]);
                for with in [b'{', b'}', b'[', b'"', b',', b'9', b'-', b'\\', 0xff] {
                    let mut changed = body.clone();
                    changed[at] = with;
                    request(&changed);
                }
            }
        }
    }
}
