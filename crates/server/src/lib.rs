//! The server: HTTP in front of one engine. Keeps tokio and hyper out of the library.
#![forbid(unsafe_code)]
