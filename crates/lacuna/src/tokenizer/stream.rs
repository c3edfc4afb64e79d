//! Decoding one id at a time without ever showing half a character.

use super::Pieces;

/// Turns ids into text as they come; bytes of a character that is not complete yet are held back.
#[derive(Clone, Debug)]
pub struct TextStream<'a> {
    pieces: &'a Pieces,
    held: Vec<u8>,
    at_start: bool,
}

impl<'a> TextStream<'a> {
    /// `fresh`: nothing precedes the first id, so that the leading-space rule of the vocabulary applies.
    pub(super) fn new(pieces: &'a Pieces, fresh: bool) -> Self {
        Self { pieces, held: Vec::new(), at_start: fresh && pieces.strips_leading_space() }
    }

    /// The text that `id` completes, possibly none. Special tokens have no text.
    pub fn push(&mut self, id: u32) -> String {
        if self.pieces.is_special(id) {
            return String::new();
        }
        let mut bytes = self.pieces.bytes(id);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.held.extend_from_slice(bytes);
        let complete = complete_len(&self.held);
        let text = String::from_utf8_lossy(&self.held[..complete]).into_owned();
        self.held.drain(..complete);
        text
    }

    /// What is still held back at the end of the text, as U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}

/// Length of `bytes` without a last character that more bytes could still complete.
fn complete_len(bytes: &[u8]) -> usize {
    let mut start = 0;
    loop {
        match std::str::from_utf8(&bytes[start..]) {
            Ok(_) => return bytes.len(),
            Err(e) => match e.error_len() {
                None => return start + e.valid_up_to(),
                Some(bad) => start += e.valid_up_to() + bad,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_table(strip: bool) -> Pieces {
        let mut p = Pieces::new(strip);
        (0..=255u8).for_each(|b| p.push(&[b], false));
        p.push(b"<s>", true);
        p
    }

    #[test]
    fn emoji_byte_by_byte_appears_whole() {
        let p = bytes_table(false);
        let mut s = TextStream::new(&p, true);
        let text = "a\u{1F600}\u{e9}!";
        let parts: Vec<String> = text.bytes().map(|b| s.push(b.into())).collect();
        assert_eq!(parts, ["a", "", "", "", "\u{1F600}", "", "\u{e9}", "!"]);
        assert_eq!(s.finish(), "");
    }

    #[test]
    fn broken_bytes_are_replaced_not_held_for_ever() {
        let p = bytes_table(false);
        let mut s = TextStream::new(&p, true);
        assert_eq!(s.push(0xff), "\u{fffd}");
        assert_eq!(s.push(0xf0), "");
        assert_eq!(s.push(u32::from(b'x')), "\u{fffd}x");
        assert_eq!(s.push(0xf0), "");
        assert_eq!(s.finish(), "\u{fffd}");
    }

    #[test]
    fn leading_space_rule() {
        let p = bytes_table(true);
        let mut fresh = TextStream::new(&p, true);
        assert_eq!(fresh.push(256) + &fresh.push(32) + &fresh.push(32) + &fresh.push(65), " A");
        let mut after = TextStream::new(&p, false);
        assert_eq!(after.push(32) + &after.push(65), " A");
    }
}
