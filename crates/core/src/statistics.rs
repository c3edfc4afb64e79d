//! What one dense pass over a calibration text leaves behind: one histogram of magnitudes per observed point.

use crate::{histogram::MagnitudeHistogram, method::MethodError, observer::Observer, site::Point};
use std::collections::BTreeMap;

/// Statistics of chosen points, accumulated as an [`Observer`]. Memory does not grow with the text.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    points: BTreeMap<Point, PointStatistics>,
    broken: Option<(Point, f32, u64)>,
}

#[derive(Clone, Debug, Default)]
struct PointStatistics {
    tokens: u64,
    magnitudes: MagnitudeHistogram,
}

impl Statistics {
    /// Statistics that will read `points`.
    pub fn new(points: impl IntoIterator<Item = Point>) -> Self {
        Self { points: points.into_iter().map(|p| (p, PointStatistics::default())).collect(), broken: None }
    }

    /// The magnitudes seen at `point`, if it was asked for and anything was seen.
    pub fn magnitudes(&self, point: Point) -> Option<&MagnitudeHistogram> {
        self.points.get(&point).map(|s| &s.magnitudes).filter(|h| h.total() > 0)
    }

    /// Tokens seen (the largest count over the points).
    pub fn tokens(&self) -> u64 {
        self.points.values().map(|s| s.tokens).max().unwrap_or(0)
    }

    /// Whether no point was asked for.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// An error that names the first point that held a number which is not finite.
    pub fn check(&self) -> Result<(), MethodError> {
        match self.broken {
            Some((point, value, token)) => Err(MethodError::NonFinite { point, value, token }),
            None => Ok(()),
        }
    }
}

impl Observer for Statistics {
    fn wants(&self, point: Point) -> bool {
        self.broken.is_none() && self.points.contains_key(&point)
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        let Some(s) = self.points.get_mut(&point).filter(|_| self.broken.is_none() && width > 0) else { return };
        if let Err(i) = s.magnitudes.add(values) {
            self.broken = Some((point, values[i], s.tokens + (i / width) as u64));
        }
        s.tokens += (values.len() / width) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::Proj;

    #[test]
    fn reads_what_was_asked_and_names_the_place_of_a_nan() {
        let down = Point::Input { layer: 2, proj: Proj::Down };
        let mut s = Statistics::new([down]);
        assert!(s.wants(down) && !s.wants(Point::Head));
        s.observe(down, 2, &[1.0, 2.0, 3.0, 0.0]);
        assert_eq!((s.tokens(), s.magnitudes(down).unwrap().total()), (2, 4));
        s.observe(down, 2, &[1.0, 2.0, f32::NAN, 0.0]);
        let text = s.check().unwrap_err().to_string();
        assert!(text.contains("layers.2.mlp.down.input") && text.contains("token 3"), "{text}");
    }
}
