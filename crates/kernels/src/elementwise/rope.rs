//! Rotary position embedding (Su et al. 2021).

/// Which components rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopePairs {
    /// `(i, i + dims/2)`: checkpoints of Hugging Face.
    Half,
    /// `(2i, 2i + 1)`: GGUF files of the llama architecture.
    Adjacent,
}

/// Fills `cos` and `sin` with those of `position * freqs[i]`, times `factor` (1 except for longrope).
///
/// The angle is computed in f64: at position 100,000 a product in f32 is off by up to 0.004 radians.
///
/// # Panics
/// If the lengths differ.
pub fn rope_table(freqs: &[f32], position: usize, factor: f32, cos: &mut [f32], sin: &mut [f32]) {
    assert_eq!([cos.len(), sin.len()], [freqs.len(); 2], "lengths of the table");
    for ((freq, cos), sin) in freqs.iter().zip(cos).zip(sin) {
        let (s, c) = (position as f64 * f64::from(*freq)).sin_cos();
        (*cos, *sin) = ((c * f64::from(factor)) as f32, (s * f64::from(factor)) as f32);
    }
}

/// Rotates the first `2 * cos.len()` components of every head of `head_dim` in `x` (one token): the pair `(a, b)`
/// becomes `(a cos - b sin, b cos + a sin)`.
///
/// # Panics
/// If `cos` and `sin` differ in length, rotate more than `head_dim`, or `x` is not a whole number of heads.
pub fn rope(x: &mut [f32], head_dim: usize, pairs: RopePairs, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert!(sin.len() == half && 2 * half <= head_dim, "a table of {half} and {} for heads of {head_dim}", sin.len());
    assert!(x.len().is_multiple_of(head_dim), "{} numbers in heads of {head_dim}", x.len());
    for head in x.chunks_exact_mut(head_dim) {
        let head = &mut head[..2 * half];
        match pairs {
            RopePairs::Half => {
                let (a, b) = head.split_at_mut(half);
                let table = cos.iter().zip(sin);
                a.iter_mut().zip(b).zip(table).for_each(|((a, b), (c, s))| (*a, *b) = turn(*a, *b, *c, *s));
            }
            RopePairs::Adjacent => {
                let table = cos.iter().zip(sin);
                let pairs = head.chunks_exact_mut(2);
                pairs.zip(table).for_each(|(p, (c, s))| (p[0], p[1]) = turn(p[0], p[1], *c, *s));
            }
        }
    }
}

fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_is_that_of_the_formula() {
        let freqs = [1.0, 0.1, 0.01];
        let (mut cos, mut sin) = ([0.0; 3], [0.0; 3]);
        for position in [0, 1, 7, 100_003] {
            rope_table(&freqs, position, 1.0, &mut cos, &mut sin);
            for pairs in [RopePairs::Half, RopePairs::Adjacent] {
                // Two heads of 8 of which 6 rotate.
                let x: Vec<f32> = (0..16).map(|i| i as f32 - 5.5).collect();
                let mut y = x.clone();
                rope(&mut y, 8, pairs, &cos, &sin);
                for head in [0, 8] {
                    assert_eq!(y[head + 6..head + 8], x[head + 6..head + 8]);
                    for (i, freq) in freqs.iter().enumerate() {
                        let (p, q) = match pairs {
                            RopePairs::Half => (head + i, head + i + 3),
                            RopePairs::Adjacent => (head + 2 * i, head + 2 * i + 1),
                        };
                        let (s, c) = (position as f64 * f64::from(*freq)).sin_cos();
                        let (a, b) = (f64::from(x[p]), f64::from(x[q]));
                        assert!((f64::from(y[p]) - (a * c - b * s)).abs() < 1e-5);
                        assert!((f64::from(y[q]) - (b * c + a * s)).abs() < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let freqs: Vec<f32> = (0..16).map(|i| 10_000f32.powf(-i as f32 / 16.0)).collect();
        let rotated = |position: usize, shift: f32| {
            let (mut cos, mut sin) = (vec![0.0; 16], vec![0.0; 16]);
            rope_table(&freqs, position, 1.0, &mut cos, &mut sin);
            let mut x: Vec<f32> = (0..32).map(|i| (i as f32 * shift).cos()).collect();
            rope(&mut x, 32, RopePairs::Half, &cos, &sin);
            x
        };
        let score = |query: usize, key: usize| -> f32 {
            rotated(query, 0.3).iter().zip(rotated(key, 0.7)).map(|(a, b)| a * b).sum()
        };
        let near = score(9, 4);
        for base in [0, 100, 30_000] {
            assert!((score(base + 5, base) - near).abs() < 1e-4, "{base}");
        }
        assert!((score(10, 4) - near).abs() > 1e-3);
    }
}
