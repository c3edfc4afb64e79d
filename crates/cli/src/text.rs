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
    fn deviation_is_that_of_a_sample() {
        assert_eq!(mean_sd(&[1.0, 2.0, 3.0]), (2.0, 1.0));
        assert_eq!(mean_sd(&[5.0]), (5.0, 0.0));
    }
}
