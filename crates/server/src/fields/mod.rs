//! Every field of every request: the one table that requests are read by and the documentation is made from.

mod page;
mod read;
mod table;

pub use page::page;
pub use read::{Bounds, Given, Input, Values, read};
pub use table::FIELDS;

/// What takes a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /v1/completions`.
    Completions,
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/embeddings`.
    Embeddings,
    /// `POST /tokenize`.
    Tokenize,
    /// `POST /detokenize`.
    Detokenize,
    /// `POST /apply-template`.
    Template,
}

impl Endpoint {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Completions, Self::Chat, Self::Embeddings, Self::Tokenize, Self::Detokenize, Self::Template];

    /// The path.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::Template => "/apply-template",
        }
    }
}

/// The largest number that a field takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Most {
    /// This.
    Is(i64),
    /// As many as the context holds.
    Context,
    /// The last layer of the model.
    Layer,
}

/// What a field takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Int {
        /// Least.
        min: i64,
        /// Largest.
        max: Most,
    },
    /// A number.
    Float {
        /// Least.
        min: f64,
        /// Largest.
        max: f64,
    },
    /// A text of so many bytes at most.
    Text(usize),
    /// One of these.
    Choice(&'static [&'static str]),
    /// A text or a list of texts that are not empty.
    Texts {
        /// How many.
        items: usize,
        /// Bytes of each.
        bytes: usize,
    },
    /// A text, a list of texts, a list of token ids, or a list of such lists.
    Inputs {
        /// How many texts or lists.
        items: usize,
    },
    /// A list of token ids.
    Ids,
    /// A list of messages: objects with `role` and `content`.
    Messages {
        /// How many.
        items: usize,
    },
    /// An object of so many bytes of JSON at most.
    Object(usize),
    /// A text or an object.
    TextOrObject(usize),
    /// A list of objects.
    Objects {
        /// How many.
        items: usize,
        /// Bytes of JSON of all.
        bytes: usize,
    },
    /// An object from token ids to numbers.
    Bias {
        /// How many.
        items: usize,
        /// Largest absolute value.
        most: f64,
    },
}

/// What stands in for a field that is absent or null.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Absent {
    /// Nothing; the text says what that means.
    Nothing(&'static str),
    /// The request is refused.
    Refused,
    /// A truth.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// A word.
    Word(&'static str),
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Other names that clients send.
    pub aliases: &'static [&'static str],
    /// What it takes.
    pub kind: Kind,
    /// What stands in for it.
    pub absent: Absent,
    /// Where it is known.
    pub on: &'static [Endpoint],
    /// What it does.
    pub doc: &'static str,
}
