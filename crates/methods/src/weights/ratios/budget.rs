//! Spreading a budget over layers by measured points: what each layer costs and loses at several settings.
//!
//! The sum of the losses is minimised under a limit on the sum of the costs. On the lower convex hulls of the points this is
//! solved exactly by taking the steps from point to point in the order of loss saved per cost (the Lagrangian form: Shoham
//! and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").

/// What a layer costs and loses at one setting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// In the unit of the budget.
    pub cost: f64,
    /// Loss.
    pub error: f64,
}

/// From one point of a layer's hull to the next dearer one.
struct Step {
    layer: usize,
    from: usize,
    to: usize,
    cost: f64,
    /// Loss that is saved per cost.
    slope: f64,
}

/// The points of the lower convex hull by rising cost and falling error; the first is the cheapest point.
fn hull(points: &[Point]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    let key = |i: &usize| (points[*i].cost, points[*i].error);
    order.sort_by(|a, b| key(a).0.total_cmp(&key(b).0).then(key(a).1.total_cmp(&key(b).1)));
    let mut hull: Vec<usize> = Vec::new();
    for i in order {
        if hull.last().is_some_and(|l| points[i].error >= points[*l].error || points[i].cost == points[*l].cost) {
            continue;
        }
        let slope = |a: usize, b: usize| (points[a].error - points[b].error) / (points[b].cost - points[a].cost);
        while let [.., a, b] = hull[..] {
            if slope(a, b) > slope(b, i) {
                break;
            }
            hull.pop();
        }
        hull.push(i);
    }
    hull
}

/// The cheapest point of every layer, and the steps from there in the order in which they pay.
fn steps(layers: &[Vec<Point>]) -> (Vec<usize>, Vec<Step>) {
    let (mut cheapest, mut steps) = (Vec::new(), Vec::new());
    for (layer, points) in layers.iter().enumerate() {
        let hull = hull(points);
        cheapest.push(hull.first().copied().unwrap_or(0));
        for pair in hull.windows(2) {
            let (a, b) = (points[pair[0]], points[pair[1]]);
            let cost = b.cost - a.cost;
            steps.push(Step { layer, from: pair[0], to: pair[1], cost, slope: (a.error - b.error) / cost });
        }
    }
    steps.sort_by(|a, b| b.slope.total_cmp(&a.slope));
    (cheapest, steps)
}

fn cost(layers: &[Vec<Point>], chosen: &[usize]) -> f64 {
    layers.iter().zip(chosen).map(|(points, i)| points.get(*i).map_or(0.0, |p| p.cost)).sum()
}

/// The point of every layer, so that the costs make at most `budget`. A step that does not fit is left out, and cheaper ones
/// of other layers behind it may still be taken.
///
/// # Errors
/// The smallest sum of costs there is, which is above the budget.
pub fn choose(layers: &[Vec<Point>], budget: f64) -> Result<Vec<usize>, f64> {
    let (mut chosen, steps) = steps(layers);
    let mut left = budget - cost(layers, &chosen);
    if left < 0.0 {
        return Err(budget - left);
    }
    for step in steps {
        if step.cost <= left && chosen[step.layer] == step.from {
            chosen[step.layer] = step.to;
            left -= step.cost;
        }
    }
    Ok(chosen)
}

/// The cost of every layer where points between two neighbours can be had too, so that the costs make exactly `budget` (or as
/// near as there are points).
///
/// # Errors
/// As [`choose`].
pub fn spread(layers: &[Vec<Point>], budget: f64) -> Result<Vec<f64>, f64> {
    let (chosen, steps) = steps(layers);
    let mut left = budget - cost(layers, &chosen);
    // Sums of many shares are not exact.
    if left < -1e-9 * budget.abs() {
        return Err(budget - left);
    }
    let mut costs: Vec<f64> = layers.iter().zip(&chosen).map(|(p, i)| p.get(*i).map_or(0.0, |p| p.cost)).collect();
    for step in steps {
        let taken = step.cost.min(left.max(0.0));
        costs[step.layer] += taken;
        left -= taken;
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn points(pairs: &[(f64, f64)]) -> Vec<Point> {
        pairs.iter().map(|(cost, error)| Point { cost: *cost, error: *error }).collect()
    }

    #[test]
    fn hulls_leave_out_what_never_pays() {
        // (2, 5) lies above the line from (1, 8) to (3, 1); (4, 2) is dearer and worse than (3, 1).
        let p = points(&[(4.0, 2.0), (1.0, 8.0), (2.0, 5.0), (3.0, 1.0), (1.0, 9.0), (9.0, 0.0)]);
        assert_eq!(hull(&p), [1, 3, 5]);
        assert!(hull(&[]).is_empty());
    }

    /// All ways to choose, for three layers of four points.
    fn best(layers: &[Vec<Point>], budget: f64) -> f64 {
        let mut least = f64::INFINITY;
        for n in 0..64_usize {
            let at = [n % 4, n / 4 % 4, n / 16];
            let sum = |f: fn(&Point) -> f64| layers.iter().zip(at).map(|(p, i)| f(&p[i])).sum::<f64>();
            if sum(|p| p.cost) <= budget {
                least = least.min(sum(|p| p.error));
            }
        }
        least
    }

    #[test]
    fn choices_are_the_best_where_the_hull_has_a_corner_and_never_above_the_budget() {
        for seed in 0..40 {
            let noise = normal(seed, 24);
            let layer = |l: usize| {
                let of = |i: usize| (f64::from(noise[8 * l + i]).abs() + 0.1, f64::from(noise[8 * l + 4 + i]).abs());
                points(&[of(0), of(1), of(2), of(3)])
            };
            let layers = vec![layer(0), layer(1), layer(2)];
            let error = |chosen: &[usize]| layers.iter().zip(chosen).map(|(p, i)| p[*i].error).sum::<f64>();
            let (mut corner, all) = steps(&layers);
            let lowest = cost(&layers, &corner);
            assert_eq!(choose(&layers, lowest - 0.01), Err(lowest));
            for step in all {
                corner[step.layer] = step.to;
                let budget = cost(&layers, &corner) + 1e-12;
                let chosen = choose(&layers, budget).unwrap();
                assert!(error(&chosen) <= best(&layers, budget) + 1e-9, "{seed}");
                let between = choose(&layers, budget - 0.05).unwrap_or_default();
                assert!(cost(&layers, &between) <= budget - 0.05 || between.is_empty());
            }
        }
    }

    #[test]
    fn spreading_meets_the_budget_and_equal_layers_share_alike() {
        let curve = points(&[(10.0, 0.0), (5.0, 1.0), (2.0, 4.0)]);
        let costs = spread(&[curve.clone(), curve.clone()], 13.0).unwrap();
        assert!((costs.iter().sum::<f64>() - 13.0).abs() < 1e-12);
        // The steep part of both is taken before the flat part of either.
        assert!(costs.iter().all(|c| *c >= 5.0), "{costs:?}");
        assert_eq!(spread(std::slice::from_ref(&curve), 1.0), Err(2.0));
        assert_eq!(spread(&[curve], 99.0), Ok(vec![10.0]));
    }
}
