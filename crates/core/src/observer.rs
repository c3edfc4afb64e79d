//! Observers read named points of a forward pass; calibration, pruning and pictures read through nothing else.

use crate::site::Point;

/// Reads named points of a forward pass and accumulates statistics.
pub trait Observer {
    /// Whether this observer reads `point`; asked once per call, so that unread points cost nothing.
    fn wants(&self, point: Point) -> bool;

    /// Whether nothing behind `point` is wanted of a block that runs alone: it may end there, and what it would have left is
    /// undefined then.
    fn ends(&self, point: Point) -> bool {
        let _ = point;
        false
    }

    /// `values` holds one row per token, each of `width` numbers. Called in the order of the forward pass.
    fn observe(&mut self, point: Point, width: usize, values: &[f32]);
}
