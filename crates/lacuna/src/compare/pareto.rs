//! Which points no other point beats.

/// Indices of the points `(cost, loss)` that no other is at most equal to in both and better in one, by rising cost. Points that are
/// not finite are never on the front.
pub fn front(points: &[(f64, f64)]) -> Vec<usize> {
    let mut order: Vec<usize> =
        (0..points.len()).filter(|&i| points[i].0.is_finite() && points[i].1.is_finite()).collect();
    order.sort_by(|&a, &b| points[a].0.total_cmp(&points[b].0).then(points[a].1.total_cmp(&points[b].1)));
    let mut best = f64::INFINITY;
    order.retain(|&i| {
        let better = points[i].1 < best;
        best = best.min(points[i].1);
        better
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beaten_is_left_out() {
        let points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (2.5, 2.0), (4.0, 1.0), (f64::NAN, 0.0)];
        assert_eq!(front(&points), [1, 2, 0]);
        assert!(front(&[]).is_empty());
    }

    #[test]
    fn no_point_of_the_front_is_beaten_and_every_other_is() {
        let points: Vec<(f64, f64)> =
            (0..200_u32).map(|i| (f64::from(i * 7919 % 97), f64::from(i * 104_729 % 89))).collect();
        let on = front(&points);
        let beats = |a: (f64, f64), b: (f64, f64)| a.0 <= b.0 && a.1 <= b.1 && a != b;
        for (i, &p) in points.iter().enumerate() {
            let beaten = points.iter().any(|&q| beats(q, p));
            let twin = on.iter().any(|&j| points[j] == p);
            assert_eq!(!beaten, on.contains(&i) || twin, "{p:?}");
        }
    }
}
