//! A client that is plain enough to be trusted.

use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// Asks the server at one address.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub at: SocketAddr,
}

impl Client {
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body.to_string().as_bytes())
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, b"")
    }

    /// The JSON of an answer that must be a success.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text());
        answer.json()
    }

    /// The events of a stream, `[DONE]` checked and left out.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let text = answer.text();
        let mut events: Vec<&str> = text.split("\n\n").filter(|e| !e.is_empty() && !e.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{text}");
        let event = |e: &str| serde_json::from_str(e.strip_prefix("data: ").expect("an event")).expect("JSON");
        events.into_iter().map(event).collect()
    }

    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let mut socket = self.open(method, path, body);
        Answer::read(&mut socket)
    }

    /// Sends a request and leaves the answer unread.
    pub fn open(&self, method: &str, path: &str, body: &[u8]) -> TcpStream {
        let mut socket = TcpStream::connect(self.at).expect("it listens");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        let mut request = head.into_bytes();
        request.extend_from_slice(body);
        // A server that refuses a long body may close before it has taken all of it.
        let _ = socket.write_all(&request);
        socket
    }
}

/// An answer as it came.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn read(socket: &mut TcpStream) -> Self {
        let mut reader = BufReader::new(socket);
        let mut head = String::new();
        loop {
            let mut line = String::new();
            let n = reader.read_line(&mut line).expect("a line");
            if n == 0 || line == "\r\n" {
                break;
            }
            head.push_str(&line);
        }
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let mut body = Vec::new();
        if chunked {
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).expect("a size");
                let size = usize::from_str_radix(line.trim(), 16).expect("a size in hexadecimal");
                let mut part = vec![0; size + 2];
                reader.read_exact(&mut part).expect("a part");
                if size == 0 {
                    break;
                }
                body.extend_from_slice(&part[..size]);
            }
        } else {
            let _ = reader.read_to_end(&mut body);
        }
        Self { status, head, body }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }
}

/// A greedy completion.
pub fn greedy(prompt: &str, tokens: usize) -> Value {
    json!({ "prompt": prompt, "max_tokens": tokens, "temperature": 0 })
}

/// The text of the first choice.
pub fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().expect("a text")
}
