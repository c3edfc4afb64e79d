//! Base64 (RFC 4648, section 4), for vectors of numbers and for the keys that browsers send.

const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// `bytes` in base64 with padding.
pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let word = part.iter().enumerate().fold(0u32, |word, (i, b)| word | u32::from(*b) << (16 - 8 * i));
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= part.len() { char::from(letter) } else { '=' });
        }
    }
    out
}

/// The bytes of a text in base64 with padding; `None` if it is something else.
pub(crate) fn decode(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let plain = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut out = Vec::with_capacity(plain.len() / 4 * 3 + 2);
    for part in plain.chunks(4) {
        let mut word = 0u32;
        for (i, letter) in part.iter().enumerate() {
            let value = LETTERS.iter().position(|l| l == letter)?;
            word |= (value as u32) << (18 - 6 * i);
        }
        out.extend_from_slice(&word.to_be_bytes()[1..][..part.len() * 6 / 8]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn vectors_of_the_rfc() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")]
        {
            assert_eq!(super::encode(plain.as_bytes()), coded);
            assert_eq!(super::decode(coded.as_bytes()).as_deref(), Some(plain.as_bytes()));
        }
        for bad in ["Zg", "Zg=", "Zg=a", "=", "====", "Zm9v\n", "Zm-v", "Z==="] {
            assert_eq!(super::decode(bad.as_bytes()), None, "{bad}");
        }
    }
}
