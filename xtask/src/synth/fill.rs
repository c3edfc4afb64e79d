//! Seeded normal numbers, encoded row by row.

use super::shape::{Act, Role, Shape};
use lacuna_kernels::{Format, convert::encode_run};
use std::io::{self, Write};

/// A normal distribution, and the share of its numbers nearest to the mean that become zero.
#[derive(Clone, Copy, Debug)]
pub struct Filled {
    pub mean: f32,
    pub deviation: f32,
    pub zeros: f64,
}

/// A matrix of numbers that only depend on the seed.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub seed: u64,
    pub rows: usize,
    pub cols: usize,
    pub filled: Filled,
}

/// Share of a normalised input that is the common component of all embeddings of a ReLU model: `a` of the module above.
const COMMON: f64 = std::f64::consts::FRAC_1_SQRT_2;
/// Size of all layer outputs together, beside embeddings of size 1, in a ReLU model.
const OUTPUTS: f32 = 0.3;

/// The distribution of a matrix of a layer.
pub fn of_role(role: &Role, s: &Shape, act: Act, open: f64) -> Filled {
    let deviation = ((role.size)(s).1 as f32).sqrt().recip();
    match (act, role.name) {
        (Act::Relu, "ffn_gate") => {
            let shift = quantile(open) / (s.width as f64 * COMMON);
            Filled { mean: shift as f32, deviation, zeros: 0.0 }
        }
        (Act::Relu, "attn_output" | "ffn_down") => {
            Filled { mean: 0.0, deviation: deviation * OUTPUTS / s.layers as f32, zeros: 0.0 }
        }
        _ => Filled { mean: 0.0, deviation, zeros: 0.0 },
    }
}

impl Source {
    /// All rows in `format`.
    pub fn encode(&self, format: Format) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(format, &mut out).expect("writing to memory does not fail");
        out
    }

    /// Writes all rows in `format`.
    pub fn write(&self, format: Format, out: &mut dyn Write) -> io::Result<()> {
        let mut normal = Normal(self.seed);
        let least = if self.filled.zeros > 0.0 { quantile(0.5 + 0.5 * self.filled.zeros) as f32 } else { 0.0 };
        let (mean, least) = (self.filled.mean, least * self.filled.deviation);
        let mut row = vec![0.0; self.cols];
        let bytes = format.run_bytes(self.cols).ok_or(io::ErrorKind::InvalidInput)?;
        let mut encoded = vec![0; bytes];
        for _ in 0..self.rows {
            normal.fill(&mut row, self.filled);
            row.iter_mut().filter(|v| (**v - mean).abs() < least).for_each(|v| *v = 0.0);
            encode_run(format, &row, &mut encoded);
            out.write_all(&encoded)?;
        }
        Ok(())
    }
}

/// Normal numbers: SplitMix64 (Steele, Lea, Flood 2014) and the method of Box and Muller.
struct Normal(u64);

impl Normal {
    fn fill(&mut self, out: &mut [f32], filled: Filled) {
        for pair in out.chunks_mut(2) {
            let bits = self.bits();
            // Both in (0, 1]: 24 bits each are all that f32 holds.
            let unit = |b: u64| ((b & 0xFF_FFFF) + 1) as f32 / (1 << 24) as f32;
            let radius = (-2.0 * unit(bits).ln()).sqrt() * filled.deviation;
            let (sin, cos) = (std::f32::consts::TAU * unit(bits >> 32)).sin_cos();
            for (o, x) in pair.iter_mut().zip([radius * cos, radius * sin]) {
                *o = filled.mean + x;
            }
        }
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

/// The x with P(N(0, 1) <= x) = `p`: bisection on the integral of the density, which is summed by Simpson's rule.
fn quantile(p: f64) -> f64 {
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let below = |x: f64| {
        let step = x / 1000.0;
        let sum: f64 = (0..1000)
            .map(|i| i as f64 * step)
            .map(|a| density(a) + 4.0 * density(a + step / 2.0) + density(a + step))
            .sum();
        0.5 + sum * step / 6.0
    };
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if below(middle) < p { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_mean_and_the_spread_asked_for_and_repeat() {
        let mut x = vec![0.0; 100_001];
        Normal(5).fill(&mut x, Filled { mean: 3.0, deviation: 0.5, zeros: 0.0 });
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let spread = (x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / x.len() as f32).sqrt();
        assert!((mean - 3.0).abs() < 0.01 && (spread - 0.5).abs() < 0.01, "{mean} {spread}");
        let inside = x.iter().filter(|v| (**v - 3.0).abs() < 0.5).count() as f32 / x.len() as f32;
        assert!((inside - 0.6827).abs() < 0.01, "{inside}");
        let mut y = vec![0.0; 100_001];
        Normal(5).fill(&mut y, Filled { mean: 3.0, deviation: 0.5, zeros: 0.0 });
        assert_eq!(x, y);
    }

    #[test]
    fn the_smallest_share_is_zero() {
        let filled = Filled { mean: 0.0, deviation: 0.02, zeros: 0.7 };
        let bytes = Source { seed: 3, rows: 50, cols: 1000, filled }.encode(Format::Bf16);
        let zeros = bytes.as_chunks::<2>().0.iter().filter(|v| **v == [0, 0]).count() as f64 / 50_000.0;
        assert!((zeros - 0.7).abs() < 0.01, "{zeros}");
    }

    #[test]
    fn quantiles() {
        for (p, x) in [(0.5, 0.0), (0.1, -1.281_552), (0.001, -3.090_232), (0.975, 1.959_964)] {
            assert!((quantile(p) - x).abs() < 1e-5, "{p}: {}", quantile(p));
        }
    }
}
