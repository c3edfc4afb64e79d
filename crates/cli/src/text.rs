//! Numbers as people read them.

use std::fmt::Display;

/// Bytes with a binary unit, as llama-bench prints sizes: `606.53 MiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.2} {unit}") }
}

/// A count with a decimal unit, as llama-bench prints parameters: `1.10 B`.
pub fn count(n: u64) -> String {
    let value = n as f64;
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.2} K", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", value / 1e6),
        _ => format!("{:.2} B", value / 1e9),
    }
}

/// A share as per cent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// `1 thread`, `2 threads`.
pub fn plural(n: usize, word: &str) -> String {
    format!("{n} {word}{}", if n == 1 { "" } else { "s" })
}

/// `-` where there is nothing to show.
pub fn or_dash<T: Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// Parses a size: bytes, or a number with K, M, G or T (powers of 1024, an `iB` or `B` may follow).
///
/// # Errors
/// What was expected.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let expected = || format!("`{text}` is not a size; expected bytes or a number with K, M, G or T, such as 6G");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| expected())?;
    let unit = unit.trim().to_ascii_uppercase();
    let power = match unit.trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return Err(expected()),
    };
    let bytes = number * 1024f64.powi(power);
    if bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err(expected()) }
}

/// A CSV field in quotes (RFC 4180).
pub fn csv_field(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// A word as a POSIX shell reads it back: in single quotes where it has to be.
pub fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Date and time now, UTC: `2026-11-22 05:40 UTC`.
pub fn utc_now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    utc(since.as_secs())
}

/// Seconds since 1970 as a date (the algorithm is H. Hinnant's `civil_from_days`).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

/// Mean and sample standard deviation (0 for fewer than two).
pub fn mean_sd(samples: &[f64]) -> (f64, f64) {
    let n = samples.len() as f64;
    if samples.is_empty() {
        return (0.0, 0.0);
    }
    let mean = samples.iter().sum::<f64>() / n;
    let sum: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, if samples.len() < 2 { 0.0 } else { (sum / (n - 1.0)).sqrt() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        assert_eq!(bytes(636_018_688), "606.55 MiB");
        assert_eq!(bytes(12), "12 B");
        assert_eq!(count(1_100_048_384), "1.10 B");
        assert_eq!(count(260_032), "260.03 K");
        for (text, want) in [("123", 123), ("2K", 2048), ("1.5g", 3 << 29), ("6GiB", 6 << 30), ("1TB", 1 << 40)] {
            assert_eq!(parse_bytes(text), Ok(want), "{text}");
        }
        for bad in ["", "G", "-1", "1X", "1GG", "1e400", "nan", "99999999999T"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn dates_and_words() {
        assert_eq!(utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(utc(1_795_324_800 + 61), "2026-11-22 05:21 UTC");
        assert_eq!(shell("relu,teal=0.5"), "relu,teal=0.5");
        assert_eq!(shell("it's <b>"), "'it'\\''s <b>'");
        assert_eq!(shell(""), "''");
        assert_eq!(csv_field("a\"b"), "\"a\"\"b\"");
    }

    #[test]
    fn deviation_is_that_of_a_sample() {
        assert_eq!(mean_sd(&[1.0, 2.0, 3.0]), (2.0, 1.0));
        assert_eq!(mean_sd(&[5.0]), (5.0, 0.0));
    }
}
