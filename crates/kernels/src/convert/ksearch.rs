//! The search for sub-block scales of the K formats: several candidate steps are tried, each refined by least squares
//! on the codes it gives, and the one with the smallest squared error stays (the idea of ggml's `make_qkx2_quants` and
//! `make_qx_quants`).

/// Rounds to the nearest integer (ties to even) by pushing the fraction out of the mantissa; exact below 2^22, and plain
/// additions vectorise on every machine, which `round` does not.
fn nearest(x: f32) -> f32 {
    const PUSH: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + PUSH) - PUSH
}

/// Step and offset (both >= 0) so that `step * q - offset`, q in 0..=15, is near the 32 values. Errors count by
/// `rms + |x|`, which favours the large weights.
pub fn affine_scale(x: &[f32; 32]) -> (f32, f32) {
    let lowest = x.iter().fold(0.0_f32, |m, v| m.min(*v));
    let highest = x.iter().fold(lowest, |m, v| m.max(*v));
    let range = highest - lowest;
    if range <= 0.0 || !range.is_finite() {
        return (0.0, -lowest);
    }
    let rms = (x.iter().map(|v| v * v).sum::<f32>() / 32.0).sqrt();
    let w = x.map(|v| rms + v.abs());
    let mut best = (range / 15.0, -lowest);
    let mut least = affine_error(x, &w, best);
    for candidate in 0..=20 {
        let inverse = (14.0 + 0.1 * candidate as f32) / range;
        let codes = x.map(|v| nearest((inverse * (v - lowest)).clamp(0.0, 15.0)));
        let fit = affine_fit(x, &w, &codes);
        if fit.0 > 0.0 {
            let error = affine_error(x, &w, fit);
            if error < least {
                (least, best) = (error, fit);
            }
        }
    }
    best
}

/// Weighted squared error of the values after coding with `(step, offset)`.
fn affine_error(x: &[f32; 32], w: &[f32; 32], (step, offset): (f32, f32)) -> f32 {
    let inverse = 1.0 / step;
    let mut errors = [0.0_f32; 32];
    for i in 0..32 {
        let q = nearest(((x[i] + offset) * inverse).clamp(0.0, 15.0));
        let e = step * q - offset - x[i];
        errors[i] = w[i] * e * e;
    }
    errors.iter().sum()
}

/// Weighted least squares of `x = step * q - offset` for given codes, with `offset` kept from becoming negative.
fn affine_fit(x: &[f32; 32], w: &[f32; 32], q: &[f32; 32]) -> (f32, f32) {
    let (mut sw, mut sx, mut sq, mut sqq, mut sxq) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for i in 0..32 {
        sw += w[i];
        sx += w[i] * x[i];
        sq += w[i] * q[i];
        sqq += w[i] * q[i] * q[i];
        sxq += w[i] * x[i] * q[i];
    }
    let det = sw * sqq - sq * sq;
    if det.is_nan() || det <= 0.0 {
        return (0.0, 0.0);
    }
    let offset = -(sqq * sx - sq * sxq) / det;
    if offset < 0.0 { (sxq / sqq, 0.0) } else { ((sw * sxq - sx * sq) / det, offset) }
}

/// Step (of either sign) so that `step * q`, q in -32..=31, is near the 16 values; errors count by `x^2`.
pub fn symmetric_scale(x: &[f32; 16]) -> f32 {
    let extreme = x.iter().fold(0.0_f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    if extreme == 0.0 || !extreme.is_finite() {
        return 0.0;
    }
    let (mut best, mut gain) = (extreme / -32.0, f32::MIN);
    for candidate in -9..=9 {
        let inverse = -(32.0 + 0.1 * candidate as f32) / extreme;
        let (mut sxq, mut sqq) = ([0.0_f32; 16], [0.0_f32; 16]);
        for i in 0..16 {
            let q = nearest((inverse * x[i]).clamp(-32.0, 31.0));
            let w = x[i] * x[i];
            sxq[i] = w * x[i] * q;
            sqq[i] = w * q * q;
        }
        let (sxq, sqq) = (sxq.iter().sum::<f32>(), sqq.iter().sum::<f32>());
        // With the best step sxq / sqq the squared error is a constant minus sxq^2 / sqq.
        if sqq > 0.0 && sxq * sxq / sqq > gain {
            (gain, best) = (sxq * sxq / sqq, sxq / sqq);
        }
    }
    best
}
