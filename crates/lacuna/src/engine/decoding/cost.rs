//! What a pass over `n` tokens costs: a line fitted to the times of the passes so far.

/// Weight that older passes keep with each new one.
const KEEP: f64 = 0.97;
/// What a further token costs relative to the first while nothing is known.
const GUESS: f64 = 0.1;

/// Least squares fit of `time = first + further * (n - 1)`, recent passes weighing more.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Cost {
    /// Notes that a pass over `n` tokens took `seconds`.
    pub fn add(&mut self, n: usize, seconds: f64) {
        let x = n as f64 - 1.0;
        for (sum, v) in [
            (&mut self.weight, 1.0),
            (&mut self.x, x),
            (&mut self.y, seconds),
            (&mut self.xx, x * x),
            (&mut self.xy, x * seconds),
        ] {
            *sum = *sum * KEEP + v;
        }
    }

    /// Cost of a further token relative to that of the first, at least 0.
    pub fn further(&self) -> f64 {
        let spread = self.weight * self.xx - self.x * self.x;
        if spread <= 1e-6 * self.weight * self.weight {
            return GUESS;
        }
        let slope = (self.weight * self.xy - self.x * self.y) / spread;
        let first = (self.y - slope * self.x) / self.weight;
        if first <= 0.0 { 1.0 } else { (slope / first).max(0.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_line_and_follows_a_change() {
        let mut c = Cost::default();
        assert_eq!(c.further(), GUESS);
        c.add(1, 0.5);
        assert_eq!(c.further(), GUESS, "one size says nothing about the slope");
        for i in 0..50 {
            let n = 1 + i % 7;
            c.add(n, 0.2 + 0.05 * (n - 1) as f64);
        }
        assert!((c.further() - 0.25).abs() < 0.05, "{}", c.further());
        for i in 0..400 {
            let n = 1 + i % 7;
            c.add(n, 0.2 + 0.2 * (n - 1) as f64);
        }
        assert!((c.further() - 1.0).abs() < 0.01, "{}", c.further());
        for i in 0..400 {
            c.add(1 + i % 7, 0.2 - 0.01 * (i % 7) as f64);
        }
        assert_eq!(c.further(), 0.0, "never negative");
    }
}
