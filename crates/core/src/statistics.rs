//! What dense passes over a calibration text leave behind: histograms of scores, moments per channel, and sampled rows.

pub mod stored;

use crate::{
    firing::{Firing, Sampling},
    histogram::MagnitudeHistogram,
    method::MethodError,
    observer::Observer,
    site::Point,
    tensor::Tensor,
};
use std::{cmp::Ordering, collections::BTreeMap};

/// What is gathered at a point.
#[derive(Clone, Debug, PartialEq)]
pub enum Gather {
    /// A histogram of `|x_j|`, or of `|x_j| * scale_j`.
    Scores {
        /// One factor per entry.
        scale: Option<Tensor>,
    },
    /// Mean and mean square of every channel.
    Moments,
    /// Whole rows: those of every `every`-th token (counted over the whole text, the same tokens at every point), at
    /// most `most` of them.
    Rows {
        /// Distance between two sampled tokens, at least 1.
        every: u64,
        /// Rows kept.
        most: usize,
    },
    /// Which entries are not zero: how often, and for sampled tokens which ones together.
    Firing(Sampling),
}

/// A point, and what is gathered there.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// The point.
    pub point: Point,
    /// What is gathered.
    pub gather: Gather,
}

impl Observation {
    /// A histogram of magnitudes.
    pub fn magnitudes(point: Point) -> Self {
        Self { point, gather: Gather::Scores { scale: None } }
    }

    /// A histogram of scaled magnitudes.
    pub fn scores(point: Point, scale: Tensor) -> Self {
        Self { point, gather: Gather::Scores { scale: Some(scale) } }
    }

    /// Moments per channel.
    pub fn moments(point: Point) -> Self {
        Self { point, gather: Gather::Moments }
    }

    /// How often entries are not zero, and at which of the sampled tokens.
    pub fn firing(point: Point, sampling: Sampling) -> Self {
        Self { point, gather: Gather::Firing(sampling) }
    }

    fn key(&self) -> (Point, u8, &str, u64) {
        match &self.gather {
            Gather::Scores { scale } => (self.point, 0, scale.as_ref().map_or("", |s| s.name()), 0),
            Gather::Moments => (self.point, 1, "", 0),
            Gather::Rows { every, most } => (self.point, 2, "", every ^ (*most as u64) << 32),
            Gather::Firing(Sampling { every, most }) => (self.point, 3, "", every ^ (*most as u64) << 32),
        }
    }
}

impl From<Point> for Observation {
    fn from(point: Point) -> Self {
        Self::magnitudes(point)
    }
}

impl Eq for Observation {}

impl PartialOrd for Observation {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Observation {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

/// Moments of the channels of one point.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Tokens seen.
    pub tokens: u64,
    sums: Vec<f64>,
    squares: Vec<f64>,
}

impl Moments {
    fn add(&mut self, width: usize, values: &[f32]) {
        self.sums.resize(width, 0.0);
        self.squares.resize(width, 0.0);
        for row in values.chunks_exact(width) {
            self.tokens += 1;
            for ((s, q), &x) in self.sums.iter_mut().zip(&mut self.squares).zip(row) {
                let x = f64::from(x);
                *s += x;
                *q += x * x;
            }
        }
    }

    /// `E[x_j]` of every channel.
    pub fn means(&self) -> Vec<f64> {
        self.sums.iter().map(|s| s / self.tokens.max(1) as f64).collect()
    }

    /// `E[x_j^2]` of every channel.
    pub fn mean_squares(&self) -> Vec<f64> {
        self.squares.iter().map(|s| s / self.tokens.max(1) as f64).collect()
    }
}

/// Sampled rows of one point.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Numbers per row.
    pub width: usize,
    /// The rows, one after the other.
    pub values: Vec<f32>,
}

/// What was gathered for one observation.
#[derive(Clone, Debug, PartialEq)]
enum Gathered {
    Scores(Box<MagnitudeHistogram>),
    Moments(Moments),
    Rows(Rows),
    Firing(Firing),
}

#[derive(Clone, Debug)]
struct Slot {
    tokens: u64,
    gathered: Gathered,
}

/// Statistics of chosen observations, accumulated as an [`Observer`]. Memory does not grow with the text.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    slots: BTreeMap<Observation, Slot>,
    broken: Option<(Point, f32, u64)>,
}

impl Statistics {
    /// Statistics that will gather `observations`.
    pub fn new(observations: impl IntoIterator<Item = impl Into<Observation>>) -> Self {
        let slot = |o: Observation| {
            let gathered = match o.gather {
                Gather::Scores { .. } => Gathered::Scores(Box::default()),
                Gather::Moments => Gathered::Moments(Moments::default()),
                Gather::Rows { .. } => Gathered::Rows(Rows::default()),
                Gather::Firing(_) => Gathered::Firing(Firing::default()),
            };
            (o, Slot { tokens: 0, gathered })
        };
        Self { slots: observations.into_iter().map(|o| slot(o.into())).collect(), broken: None }
    }

    /// The magnitudes seen at `point`, if they were asked for and anything was seen.
    pub fn magnitudes(&self, point: Point) -> Option<&MagnitudeHistogram> {
        self.scores(point, None)
    }

    /// The scores `|x_j| * scale_j` seen at `point`, if they were asked for and anything was seen.
    pub fn scores(&self, point: Point, scale: Option<&Tensor>) -> Option<&MagnitudeHistogram> {
        let observation = Observation { point, gather: Gather::Scores { scale: scale.cloned() } };
        match &self.slots.get(&observation)?.gathered {
            Gathered::Scores(h) if h.total() > 0 => Some(h),
            _ => None,
        }
    }

    /// The moments of the channels at `point`, if they were asked for and anything was seen.
    pub fn moments(&self, point: Point) -> Option<&Moments> {
        match &self.slots.get(&Observation::moments(point))?.gathered {
            Gathered::Moments(m) if m.tokens > 0 => Some(m),
            _ => None,
        }
    }

    /// The rows sampled at `point`, if any were asked for and seen.
    pub fn rows(&self, point: Point) -> Option<&Rows> {
        self.slots.iter().find_map(|(o, s)| match &s.gathered {
            Gathered::Rows(r) if o.point == point && r.width > 0 => Some(r),
            _ => None,
        })
    }

    /// The activity recorded at `point`, if it was asked for and any token seen.
    pub fn firing(&self, point: Point) -> Option<&Firing> {
        self.slots.iter().find_map(|(o, s)| match &s.gathered {
            Gathered::Firing(f) if o.point == point && f.tokens() > 0 => Some(f),
            _ => None,
        })
    }

    /// Tokens seen (the largest count over the points).
    pub fn tokens(&self) -> u64 {
        self.slots.values().map(|s| s.tokens).max().unwrap_or(0)
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Those of `wanted` that were never asked for, each once.
    pub fn missing(&self, wanted: &[Observation]) -> Vec<Observation> {
        let mut missing: Vec<_> = wanted.iter().filter(|o| !self.slots.contains_key(o)).cloned().collect();
        missing.sort();
        missing.dedup();
        missing
    }

    /// Adds what another pass gathered; what both have stays as it is here.
    pub fn absorb(&mut self, other: Self) {
        for (observation, slot) in other.slots {
            self.slots.entry(observation).or_insert(slot);
        }
        self.broken = self.broken.or(other.broken);
    }

    /// An error that names the first point that held a number which is not finite.
    pub fn check(&self) -> Result<(), MethodError> {
        match self.broken {
            Some((point, value, token)) => Err(MethodError::NonFinite { point, value, token }),
            None => Ok(()),
        }
    }

    fn of_point(&mut self, point: Point) -> impl Iterator<Item = (&Observation, &mut Slot)> {
        // A point's first possible key; points order before what is gathered.
        self.slots.range_mut(Observation::magnitudes(point)..).take_while(move |(o, _)| o.point == point)
    }
}

impl Observer for Statistics {
    fn wants(&self, point: Point) -> bool {
        let first = Observation::magnitudes(point);
        self.broken.is_none() && self.slots.range(first..).next().is_some_and(|(o, _)| o.point == point)
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        if self.broken.is_some() || width == 0 {
            return;
        }
        let bad = values.iter().position(|x| !x.is_finite());
        let mut seen = 0;
        for (observation, slot) in self.of_point(point) {
            seen = slot.tokens;
            if bad.is_none() {
                slot.add(&observation.gather, width, values);
            }
        }
        if let Some(i) = bad.filter(|_| self.wants(point)) {
            self.broken = Some((point, values[i], seen + (i / width) as u64));
        }
    }
}

impl Slot {
    /// Adds rows of finite numbers.
    fn add(&mut self, gather: &Gather, width: usize, values: &[f32]) {
        let first = self.tokens;
        self.tokens += (values.len() / width) as u64;
        match (&mut self.gathered, gather) {
            (Gathered::Scores(h), Gather::Scores { scale: None }) => h.add(values),
            (Gathered::Scores(h), Gather::Scores { scale: Some(scale) }) => {
                let mut row = vec![0.0; width];
                for x in values.chunks_exact(width) {
                    row.iter_mut().zip(x).zip(scale.values()).for_each(|((r, x), s)| *r = x.abs() * s);
                    h.add(&row);
                }
            }
            (Gathered::Moments(m), _) => m.add(width, values),
            (Gathered::Firing(f), Gather::Firing(sampling)) => f.add(width, values, first, *sampling),
            (Gathered::Rows(rows), Gather::Rows { every, most }) => {
                rows.width = width;
                for (i, row) in values.chunks_exact(width).enumerate() {
                    if (first + i as u64).is_multiple_of((*every).max(1)) && rows.values.len() < most * width {
                        rows.values.extend_from_slice(row);
                    }
                }
            }
            _ => unreachable!("a slot is made for what it gathers"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::Proj;

    const DOWN: Point = Point::Input { layer: 2, proj: Proj::Down };

    #[test]
    fn reads_what_was_asked_and_names_the_place_of_a_nan() {
        let mut s = Statistics::new([DOWN]);
        assert!(s.wants(DOWN) && !s.wants(Point::Head));
        s.observe(DOWN, 2, &[1.0, 2.0, 3.0, 0.0]);
        assert_eq!((s.tokens(), s.magnitudes(DOWN).unwrap().total()), (2, 4));
        s.observe(DOWN, 2, &[1.0, 2.0, f32::NAN, 0.0]);
        let text = s.check().unwrap_err().to_string();
        assert!(text.contains("layers.2.mlp.down.input") && text.contains("token 3"), "{text}");
    }

    #[test]
    fn several_things_are_gathered_at_one_point() {
        let scale = Tensor::vector(vec![10.0, 1.0]);
        let rows = Observation { point: DOWN, gather: Gather::Rows { every: 2, most: 2 } };
        let all =
            [Observation::magnitudes(DOWN), Observation::scores(DOWN, scale.clone()), Observation::moments(DOWN), rows];
        let mut s = Statistics::new(all.clone());
        assert!(s.missing(&all).is_empty());
        for chunk in [&[1.0, -2.0, 3.0, 0.0][..], &[5.0, 6.0, 7.0, 8.0, 9.0, 10.0]] {
            s.observe(DOWN, 2, chunk);
        }
        assert!(s.scores(DOWN, Some(&scale)).unwrap().threshold(1.0) >= 90.0);
        assert!(s.magnitudes(DOWN).unwrap().threshold(1.0) < 11.0);
        let m = s.moments(DOWN).unwrap();
        assert_eq!((m.tokens, m.means()[0], m.mean_squares()[0]), (5, 5.0, 33.0));
        assert_eq!(s.rows(DOWN).unwrap().values, [1.0, -2.0, 5.0, 6.0], "tokens 0 and 2; token 4 is one too many");
        let head = Observation::magnitudes(Point::Head);
        assert_eq!(s.missing(&[head.clone(), all[0].clone(), head.clone()]), [head]);
    }
}
