//! The part of the documentation that the table makes.

use super::{Absent, Endpoint, FIELDS, Field, Kind, Most};

/// What a field takes, in words.
pub(super) fn takes(kind: Kind) -> String {
    match kind {
        Kind::Bool => "true or false".into(),
        Kind::Int { min: i64::MIN, .. } => "a whole number".into(),
        Kind::Int { min, max } => format!("a whole number from {min} to {}", most(max)),
        Kind::Float { min, max } => format!("a number from {min} to {max}"),
        Kind::Text(usize::MAX) => "a text".into(),
        Kind::Text(bytes) => format!("a text of at most {bytes} bytes"),
        Kind::Choice(words) => format!("one of {}", words.join(", ")),
        Kind::Texts { items, bytes } => format!("a text, or a list of 1 to {items} texts, each of 1 to {bytes} bytes"),
        Kind::Inputs { items } => {
            format!("a text, a list of 1 to {items} texts, a list of token ids, or a list of 1 to {items} such lists")
        }
        Kind::Ids => "a list of token ids".into(),
        Kind::Messages { items } => format!("a list of 1 to {items} messages with `role` and `content`"),
        Kind::Object(bytes) => format!("an object of at most {bytes} bytes"),
        Kind::TextOrObject(bytes) => format!("a text or an object of at most {bytes} bytes"),
        Kind::Objects { items, bytes } => format!("a list of at most {items} objects, {bytes} bytes in all"),
        Kind::Bias { items, most } => {
            format!("an object from at most {items} token ids to numbers from -{most} to {most}")
        }
    }
}

fn most(max: Most) -> String {
    match max {
        Most::Is(n) => n.to_string(),
        Most::Context => "the context".into(),
        Most::Layer => "the last layer".into(),
    }
}

fn absent(field: &Field) -> String {
    match field.absent {
        Absent::Nothing(text) => text.into(),
        Absent::Refused => "required".into(),
        Absent::Bool(b) => b.to_string(),
        Absent::Int(n) => n.to_string(),
        Absent::Float(x) => x.to_string(),
        Absent::Word(w) => w.into(),
    }
}

/// The tables of fields, one per endpoint.
pub fn page() -> String {
    let mut out = String::new();
    for endpoint in Endpoint::ALL {
        out +=
            &format!("\n## `POST {}`\n\n| field | takes | default | meaning |\n|---|---|---|---|\n", endpoint.path());
        for field in FIELDS.iter().filter(|f| f.on.contains(&endpoint)) {
            let names: Vec<_> = std::iter::once(&field.name).chain(field.aliases).map(|n| format!("`{n}`")).collect();
            out += &format!("| {} | {} | {} | {} |\n", names.join(", "), takes(field.kind), absent(field), field.doc);
        }
    }
    out
}
