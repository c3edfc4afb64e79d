//! Scales of charts: from values to pixels, and where the marks stand.

/// How values spread over an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spread {
    /// Evenly.
    Linear,
    /// By the signed square root: small differences stay visible beside large ones, and zero and below have a place.
    Root,
}

/// One axis.
#[derive(Clone, Debug)]
pub struct Axis {
    spread: Spread,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// An axis over `values` (what is not finite is left out) with a little room at both ends, from pixel `from` to `to`.
    pub fn over(values: impl Iterator<Item = f64>, spread: Spread, from: f64, to: f64) -> Self {
        let bent = values.filter(|v| v.is_finite()).map(|v| bend(spread, v));
        let (low, high) = bent.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let room = (0.06 * (high - low)).max(1e-3 * high.abs()).max(1e-9);
        Self { spread, low: low - room, high: high + room, from, to }
    }

    /// Pixel of a value, inside the axis.
    pub fn at(&self, value: f64) -> f64 {
        let part = (bend(self.spread, value) - self.low) / (self.high - self.low);
        self.from + (self.to - self.from) * part.clamp(0.0, 1.0)
    }

    /// Round values inside the axis, at least `apart` pixels from one another.
    pub fn ticks(&self, apart: f64) -> Vec<f64> {
        let (low, high) = (unbend(self.spread, self.low), unbend(self.spread, self.high));
        match self.spread {
            Spread::Linear => {
                let most = ((self.to - self.from).abs() / apart).max(1.0);
                let step = round_up((high - low) / most);
                let first = (low / step).ceil() as i64;
                (0..).map(|i| (first + i) as f64 * step).take_while(|v| *v <= high).take(100).collect()
            }
            Spread::Root => {
                let size = |e: i32| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e));
                let sizes: Vec<f64> = (-6..7).flat_map(size).collect();
                let all = sizes.iter().rev().map(|v| -v).chain([0.0]).chain(sizes.iter().copied());
                let inside: Vec<f64> = all.filter(|v| (low..=high).contains(v)).collect();
                self.thin(&inside, apart)
            }
        }
    }

    /// Zero and the ends first, so that crowding costs the middle.
    fn thin(&self, values: &[f64], apart: f64) -> Vec<f64> {
        let mut order: Vec<f64> = values.to_vec();
        order.sort_by(|a, b| (*b == 0.0).cmp(&(*a == 0.0)).then(b.abs().total_cmp(&a.abs())));
        let mut kept: Vec<f64> = Vec::new();
        for v in order {
            if kept.iter().all(|k| (self.at(*k) - self.at(v)).abs() >= apart) {
                kept.push(v);
            }
        }
        kept.sort_by(f64::total_cmp);
        kept
    }
}

fn bend(spread: Spread, v: f64) -> f64 {
    match spread {
        Spread::Linear => v,
        Spread::Root => v.signum() * v.abs().sqrt(),
    }
}

fn unbend(spread: Spread, v: f64) -> f64 {
    match spread {
        Spread::Linear => v,
        Spread::Root => v.signum() * v * v,
    }
}

/// The least of 1, 2, 5 times a power of ten that is not below `step`.
fn round_up(step: f64) -> f64 {
    let base = 10f64.powf(step.max(1e-12).log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|m| m * base).find(|s| *s >= step * (1.0 - 1e-9)).unwrap_or(10.0 * base)
}

/// A tick's text: as few digits as tell it from its neighbours.
pub fn label(value: f64) -> String {
    let text = format!("{:.6}", value);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.replace('-', "\u{2212}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_ticks_are_round_and_inside() {
        let axis = Axis::over([3.1, 9.7].into_iter(), Spread::Linear, 0.0, 400.0);
        assert_eq!(axis.ticks(60.0), [4.0, 6.0, 8.0, 10.0]);
        assert!(axis.at(3.1) > 0.0 && axis.at(9.7) < 400.0);
        assert_eq!(axis.at(1e9), 400.0, "what lies outside is drawn at the edge");
    }

    #[test]
    fn roots_keep_zero_and_small_values_apart() {
        let axis = Axis::over([-0.2, 0.0, 1.0, 100.0].into_iter(), Spread::Root, 300.0, 0.0);
        let ticks = axis.ticks(24.0);
        assert!(ticks.contains(&0.0) && ticks.contains(&100.0), "{ticks:?}");
        assert!(ticks.windows(2).all(|w| (axis.at(w[0]) - axis.at(w[1])).abs() >= 24.0), "{ticks:?}");
        assert!(axis.at(1.0) < axis.at(0.0) - 15.0, "1 of 100 is seen");
    }

    #[test]
    fn degenerate_values_still_make_an_axis() {
        for values in [vec![], vec![2.0], vec![f64::NAN], vec![0.0, 0.0]] {
            for spread in [Spread::Linear, Spread::Root] {
                let axis = Axis::over(values.iter().copied(), spread, 0.0, 100.0);
                assert!(axis.at(2.0).is_finite() && axis.ticks(20.0).len() < 101, "{values:?}");
            }
        }
    }

    #[test]
    fn labels_are_short() {
        assert_eq!(
            [label(0.5), label(-2.0), label(100.0), label(0.30000000000000004)],
            ["0.5", "\u{2212}2", "100", "0.3"]
        );
    }
}
