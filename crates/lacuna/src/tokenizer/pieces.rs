//! The bytes that every id stands for.

/// Bytes of every id of a vocabulary, one after the other, and which ids are special.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    special: Vec<bool>,
    strip_leading_space: bool,
}

impl Pieces {
    /// An empty table; `strip_leading_space`: a text's first space belongs to the encoding, not to the text (SPM).
    pub fn new(strip_leading_space: bool) -> Self {
        Self { strip_leading_space, ..Self::default() }
    }

    /// Adds the next id.
    pub fn push(&mut self, bytes: &[u8], special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.special.push(special);
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no ids.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of `id`; none for an id outside the vocabulary (a model may have more rows than the tokenizer ids).
    pub fn bytes(&self, id: u32) -> &[u8] {
        let i = id as usize;
        let Some(&end) = self.ends.get(i) else { return &[] };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start..end]
    }

    /// Whether `id` is a control token, which is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Whether a text's first space is dropped.
    pub fn strips_leading_space(&self) -> bool {
        self.strip_leading_space
    }
}

/// The byte of a piece written `<0xNN>`.
pub(super) fn byte_literal(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character of byte-level BPE stands for: printable Latin-1 stands for itself, the other 68 bytes are
/// U+0100 and up in their order (GPT-2, `encoder.py`, `bytes_to_unicode`).
pub(super) fn byte_of_char(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = c as u32;
    if code < 0x100 {
        return printable(code as u8).then_some(code as u8);
    }
    let index = (code - 0x100) as usize;
    (0..=255u8).filter(|&b| !printable(b)).nth(index)
}

/// The bytes of a byte-level piece; the piece's own UTF-8 where some character stands for no byte (added tokens).
pub(super) fn byte_level(piece: &str) -> Vec<u8> {
    piece.chars().map(byte_of_char).collect::<Option<Vec<u8>>>().unwrap_or_else(|| piece.as_bytes().to_vec())
}

/// The bytes of an SPM piece: `<0xNN>` is that byte, U+2581 a space.
pub(super) fn spm(piece: &str) -> Vec<u8> {
    match byte_literal(piece) {
        Some(b) => vec![b],
        None => piece.replace('\u{2581}', " ").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_characters_cover_all_bytes_once() {
        let mut seen = [false; 256];
        for b in (0..0x200u32).filter_map(char::from_u32).filter_map(byte_of_char) {
            assert!(!seen[b as usize], "byte {b} twice");
            seen[b as usize] = true;
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(byte_of_char('\u{120}'), Some(b' '), "the well-known G with a dot is the space");
        assert_eq!(byte_of_char('\u{10a}'), Some(b'\n'));
        assert_eq!(byte_of_char('\u{2581}'), None);
    }

    #[test]
    fn byte_literals_need_two_hex_digits() {
        assert_eq!(byte_literal("<0x0A>"), Some(10));
        assert_eq!(byte_literal("<0xff>"), Some(255));
        for bad in ["<0x-1>", "<0x1>", "<0x100>", "<0x+1>", "0x0A", "<0x0A", "<0xé>"] {
            assert_eq!(byte_literal(bad), None, "{bad}");
        }
    }

    #[test]
    fn ids_outside_have_no_bytes() {
        let mut p = Pieces::new(false);
        p.push(b"a", false);
        p.push(b"<s>", true);
        assert_eq!((p.bytes(0), p.bytes(1), p.bytes(2)), (&b"a"[..], &b"<s>"[..], &b""[..]));
        assert!(p.is_special(1) && !p.is_special(0) && !p.is_special(9));
    }
}
